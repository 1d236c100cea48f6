"""Bad rows: each is put among good ones, is quarantined by line, id and reason, and costs none of them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
GOOD = [json.loads(line) for line in (ROOT / "configs/quickstart/data.jsonl").read_text(encoding="utf-8").splitlines()[:40]]
TRIPLE = {"id": "bad", "instruction": "Reverse: l v", "output": "v l", "score": 2}
MEGABYTES = 10_000_000


def jsonl(rows: Iterable[Any], end: bytes = b"\n") -> bytes:
    """Rows as lines: bytes as they are, anything else as JSON."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + end for row in rows)


def but(**changes: object) -> dict[str, object]:
    """A good row, changed; what is set to `...` is left out."""
    return {key: value for key, value in (TRIPLE | changes).items() if value is not ...}


def turns(*said: object, **more: object) -> dict[str, object]:
    """A chat: `"user: a"` is a message, anything else stands as it is."""
    messages = [dict(zip(("role", "content"), item.split(": ", 1), strict=True)) if isinstance(item, str) else item for item in said]
    return {"id": "bad", "score": 2, "messages": messages, **more}


def raw(text: str, **changes: object) -> bytes:
    """A row with `text` in the place of its instruction, written as it is."""
    return json.dumps(but(instruction="@@", **changes)).replace('"@@"', text).encode()


# name -> the row (bytes: the line as it is), the id that its quarantine gives, a part of the reason
ROWS: dict[str, tuple[Any, str | None, str]] = {
    # what a response is not
    "empty response": (but(output=""), "bad", "empty response"),
    "white space for a response": (but(output=" \n\t\u00a0\u2003"), "bad", "empty response"),
    "empty response in data": ({"id": "bad", "score": 2, "data": ["Reverse: l v", ""]}, "bad", "empty response"),
    "empty first response of two": (turns("user: Reverse: l v", "assistant: ", "user: Reverse: l v", "assistant: v l"), "bad", "empty response"),
    "response null": (but(output=None), "bad", "unknown shape"),
    "response missing": (but(output=...), "bad", "unknown shape"),
    "both names of a response null": (but(output=None, response=None), "bad", "unknown shape"),
    # lengths and texts
    "prompt longer than max_length": (but(instruction="Repeat: " + "a " * 99 + "a"), "bad", "leaves no room for a response in data.max_length 64"),
    "system longer than max_length": (but(system="a " * 99 + "a", instruction=" Reverse: l v"), "bad", "leaves no room"),
    "no text": (but(instruction="", input=""), "bad", "no text"),
    "white space for a text": (but(instruction=" \n ", input="\t"), "bad", "no text"),
    "no input for a text": (but(instruction="", input="<noinput>"), "bad", "no text"),
    "an unknown word": (but(instruction="Reverse: supercalifragilistic"), "bad", "the tokenizer does not know"),
    "an unknown word in the response": (but(output="v l ?"), "bad", "the tokenizer does not know"),
    "the control token EOS in the prompt": (but(instruction="Reverse: </s> v"), "bad", "control token '</s>'"),
    "the control token BOS in the response": (but(output="v <s>"), "bad", "control token '<s>'"),
    "the control token of the unknown": (but(output="<unk>"), "bad", "control token '<unk>'"),
    "a control token in the system": (but(system="</s>"), "bad", "control token '</s>'"),
    "NUL in a text": (but(output="v\0l"), "bad", "the tokenizer does not know"),
    "line separators in a text": (but(output="v\u2028l\u0085v"), "bad", "the tokenizer does not know"),
    "half a surrogate pair": (but(output="\ud83d"), "bad", "half of a surrogate pair"),
    "half a surrogate pair in the input": (but(input="\udc00"), "bad", "half of a surrogate pair"),
    # wrong types
    **{
        f"{key} is {name}": (but(**{key: value}), "bad", f"`{key}` is {name}, not text")
        for key in ("instruction", "output", "input", "system")
        for name, value in {"a number": 3, "true or false": True, "a list": ["Reverse: l v"], "an object": {"text": "l"}}.items()
    },
    "instruction null": (but(instruction=None), "bad", "unknown shape"),
    "id is a fraction": (but(id=1.5), None, "`id` is 1.5"),
    "id is NaN": (but(id=float("nan")), None, "`id` is nan"),
    "id is true": (but(id=True), None, "`id` is True"),
    "id is a list": (but(id=["bad"]), None, "`id` is ['bad']"),
    "id is an object": (but(id={"$oid": "bad"}), None, "`id` is {'$oid': 'bad'}"),
    "id is half a surrogate pair": (but(id="\ud800"), None, "`id` is '\\ud800'"),
    "id used before": (but(id=GOOD[3]["id"]), GOOD[3]["id"], f"id '{GOOD[3]['id']}' was used before, at "),
    "id of two lines, no response": (but(id="b\na\rd", output=""), "b\na\rd", "empty response"),
    "id of megabytes, no response": (but(id="b" * MEGABYTES, output=""), "b" * MEGABYTES, "empty response"),
    "instruction is a list of lists": (but(instruction=[[[["Reverse: l v"]]]]), "bad", "`instruction` is a list, not text"),
    # scores
    "score missing": (but(score=...), "bad", "no score, and curriculum.bins goes by score"),
    "score null": (but(score=None), "bad", "no score"),
    "score an empty text": (but(score=""), "bad", "no score"),
    **{
        f"score {name}": (but(score=value), "bad", "; wanted: a number from 1 to 5, or null")
        for name, value in {
            "zero": 0,
            "below 1": 0.999,
            "above 5": 5.001,
            "negative": -3,
            "in words": "hard",
            "with a comma": "3,5",
            "as a fraction": "4/5",
            "hexadecimal": "0x3",
            "NaN": float("nan"),
            "NaN as text": "nan",
            "infinite": float("inf"),
            "minus infinity": float("-inf"),
            "infinity as text": "inf",
            "of 400 digits": 10**400,
            "true": True,
            "a list": [3],
            "an object": {"value": 3},
            "white space": "  ",
            "half a surrogate pair": "\ud800",
        }.items()
    },
    "difficulty outside, score inside": (but(difficulty=9), "bad", "`difficulty` is 9"),
    # shapes
    "no keys": ({}, None, "unknown shape with keys (none)"),
    "unknown keys only": ({"question": "Reverse: l v", "answer": "v l"}, None, "unknown shape with keys 'question', 'answer'"),
    "keys in capitals": ({"Instruction": "Reverse: l v", "Output": "v l"}, None, "unknown shape"),
    "a thousand unknown keys": ({f"key{i}": i for i in range(1000)}, None, "unknown shape"),
    "an unknown key of megabytes": ({"k" * MEGABYTES: 1}, None, "unknown shape"),
    "nested lists": ([[["Reverse: l v", "v l"]]], None, "is a list, not an object"),
    "a text": ("Reverse: l v", None, "is a text, not an object"),
    "a number": (7, None, "is a number, not an object"),
    "null": (None, None, "is null, not an object"),
    "true": (True, None, "is true or false, not an object"),
    "data of odd length": ({"id": "bad", "score": 2, "data": ["Reverse: l v", "v l", "Reverse: l v"]}, "bad", "in pairs"),
    "data empty": ({"id": "bad", "score": 2, "data": []}, "bad", "in pairs"),
    "data with a null": ({"id": "bad", "score": 2, "data": ["Reverse: l v", None]}, "bad", "in pairs"),
    "data is a text": ({"id": "bad", "score": 2, "data": "Reverse: l v"}, "bad", "in pairs"),
    "data is an object": ({"id": "bad", "score": 2, "data": {"user": "Reverse: l v"}}, "bad", "in pairs"),
    "data of pairs": ({"id": "bad", "score": 2, "data": [["Reverse: l v", "v l"]]}, "bad", "in pairs"),
    "prompt without completion": ({"id": "bad", "score": 2, "prompt": "Reverse: l v"}, "bad", "unknown shape"),
    "completion without prompt": ({"id": "bad", "score": 2, "completion": "v l"}, "bad", "unknown shape"),
    "prompt a list, completion a text": ({"id": "bad", "score": 2, "prompt": [{"role": "user", "content": "l"}], "completion": "v"}, "bad", "`prompt` is a list"),
    "prompt and completion both of the user": (
        {"id": "bad", "score": 2, "prompt": [{"role": "user", "content": "l"}], "completion": [{"role": "user", "content": "l"}]},
        "bad",
        "wanted: perhaps system",
    ),
    # chats
    "messages empty": (turns(), "bad", "roles []"),
    "messages without the assistant": (turns("user: Reverse: l v"), "bad", "assistant last"),
    "messages of the system alone": (turns("system: Reverse:"), "bad", "assistant last"),
    "messages in the wrong order": (turns("assistant: v l", "user: Reverse: l v"), "bad", "assistant last"),
    "messages with two users": (turns("user: Reverse:", "user: l v", "assistant: v l"), "bad", "assistant last"),
    "messages with two systems": (turns("system: l", "system: v", "user: l", "assistant: v"), "bad", "assistant last"),
    "messages with a late system": (turns("user: l", "system: v", "assistant: v"), "bad", "assistant last"),
    "messages of unknown roles": (turns("human: Reverse: l v", "gpt: v l"), "bad", "roles ['human', 'gpt']"),
    "messages with a role of the wrong type": (turns({"role": ["user"], "content": "l"}, "assistant: v"), "bad", "assistant last"),
    "messages without roles": (turns({"content": "l"}, {"content": "v"}), "bad", "assistant last"),
    "messages without contents": (turns({"role": "user"}, {"role": "assistant"}), "bad", "contents are texts"),
    "messages with a null content": (turns("user: l", {"role": "assistant", "content": None}), "bad", "contents are texts"),
    "messages with contents in parts": (turns({"role": "user", "content": [{"type": "text", "text": "l"}]}, "assistant: v"), "bad", "contents are texts"),
    "messages as a text": ({"id": "bad", "score": 2, "messages": "user: l"}, "bad", "not a list"),
    "messages of texts": (turns("user: l", "assistant: v") | {"messages": ["l", "v"]}, "bad", "not a list"),
    "messages in columns of unequal length": (
        turns() | {"messages": {"role": ["user", "assistant"], "content": ["Reverse: l v", "v l", "Reverse: v l"]}},
        "bad",
        "not a list of {role, content}",
    ),
    "system beside another system": (turns("system: l", "user: l", "assistant: v", system="v"), "bad", "differ"),
    # lines that are no JSON
    "a truncated line": (json.dumps(TRIPLE).encode()[:-9], None, "not valid JSON"),
    "two rows in one line": (json.dumps(TRIPLE).encode() * 2, None, "not valid JSON: Extra data"),
    "two rows with a CR between them": (json.dumps(TRIPLE).encode() + b"\r" + json.dumps(TRIPLE).encode(), None, "not valid JSON: Extra data"),
    "a comma behind the row": (json.dumps(TRIPLE).encode() + b",", None, "not valid JSON"),
    "Python for JSON": (str(TRIPLE).encode(), None, "not valid JSON"),
    "a comment": (b"# the good ones follow", None, "not valid JSON"),
    "a line break within a text": (raw('"Reverse:\tl v"'), None, "not valid JSON: Invalid control character"),
    "NUL bytes": (b"\0" * 100, None, "not valid JSON"),
    "a BOM in the middle of the file": (b"\xef\xbb\xbf" + json.dumps(TRIPLE).encode(), None, "not valid JSON"),
    "invalid UTF-8": (raw('"Reverse: \xff"').replace("\xff".encode(), b"\xff"), None, "invalid UTF-8 at byte"),
    "Latin-1": (raw('"l\xe9"').decode().encode("latin-1"), None, "invalid UTF-8 at byte"),
    "a surrogate as UTF-8": (raw('"@"').replace(b"@", b"\xed\xa0\x80"), None, "invalid UTF-8 at byte"),
    "an overlong NUL": (raw('"@"').replace(b"@", b"\xc0\x80"), None, "invalid UTF-8 at byte"),
    "a number of 5,000 digits": (raw('"l"', score="@@@").replace(b'"@@@"', b"1" * 5000), None, "not valid JSON"),
    "nesting of 10,000 levels": (raw("[" * 10_000 + "]" * 10_000), None, "not valid JSON"),
    "nesting of 10,000 levels, not closed": (b'{"a":' * 10_000, None, "not valid JSON"),
    "a line of megabytes that is no JSON": (b"x" * MEGABYTES, None, "not valid JSON"),
    "a line of megabytes": (but(output="v" * MEGABYTES), "bad", "the tokenizer does not know"),
    "an instruction of megabytes as a score": (but(score="v" * MEGABYTES), "bad", "wanted: a number from 1 to 5"),
}

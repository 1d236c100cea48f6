"""One row as a record: its shape is found from its keys, and all that can be wrong with it is said here.

    instruction, input?, output | response    an Alpaca triple
    data: [user, assistant, ...]              the paper's released scored files
    messages: [{role, content}, ...]          a chat that the assistant closes; a system message may open it
    prompt, completion                        two strings, or two lists of messages

Any of them may have `id`, `system`, and `difficulty` or else `score`: a number from 1 to 5, also as text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from reprlib import repr as short
from typing import Any

import numpy as np

from phased_ift_jax.records import InstructionRecord, ScoredRecord, Source, Turn

NO_INPUT = re.compile(r"<?\s*no\s?input\s*>?\.?", re.IGNORECASE)  # how GPT-3 wrote "this task has no input" into Alpaca's inputs
SHAPES_WANTED = "instruction + output, messages, prompt + completion, or data: [user, assistant, ...]"
Content = tuple[str, tuple[Turn, ...]]  # system text and turns


class BadRow(Exception):
    """One row cannot be used; the text is the reason that its quarantine gives."""


def record_of(row: Any, source: Source, ids: Ids, append_period: bool) -> InstructionRecord | ScoredRecord:
    """What a reader found at `source` as a record, named by `ids`.

    Raises:
        BadRow: the row cannot be used; its id stays free for a later row.
    """
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow(f"is {kind(row)}, not an object")
    given, difficulty, shape = _given_id(row), _difficulty(row), _shape(row)
    system, turns = shape(row)
    beside = _text(row, "system")
    if beside and system and beside != system:
        raise BadRow("`system` and the system message differ")
    system = system or beside
    if not all(turn.instruction.strip() or turn.input.strip() for turn in turns):
        raise BadRow("no text: instruction and input are empty")
    if not is_unicode(system + "".join(turn.instruction + turn.input + turn.response for turn in turns)):
        raise BadRow("not Unicode text: half of a surrogate pair")
    identifier = ids.claim(given, system, turns, source)
    if append_period and shape is _triple:
        turns = (_with_period(turns[0]),)
    record = InstructionRecord(identifier, turns, source, system)
    return record if difficulty is None else ScoredRecord(record, difficulty)


def row_of(record: InstructionRecord) -> dict[str, Any]:
    """A row that `record_of` reads as this record again: an Alpaca triple where the record is one, else a chat."""
    turn = record.turns[0]
    if len(record.turns) == 1:
        row = {"id": record.id, "instruction": turn.instruction, "input": turn.input, "output": turn.response}
        return row | ({"system": record.system} if record.system else {})
    said = [{"role": "system", "content": record.system}] if record.system else []
    for turn in record.turns:
        said += [{"role": "user", "content": turn.instruction}, {"role": "assistant", "content": turn.response}]
    return {"id": record.id, "messages": said}


def _shape(row: dict[str, Any]) -> Callable[[dict[str, Any]], Content]:
    present = {key for key, value in row.items() if value is not None}
    for keys, shape in SHAPES:
        if keys <= present:
            return shape
    raise BadRow(f"unknown shape with keys {', '.join(map(short, list(row)[:8])) or '(none)'}; wanted: {SHAPES_WANTED}")


def _triple(row: dict[str, Any]) -> Content:
    written = _text(row, "input")
    given = "" if not written.strip() or NO_INPUT.fullmatch(written.strip()) else written
    return "", (Turn(_text(row, "instruction"), _text(row, "output" if row.get("output") is not None else "response"), given),)


def _with_period(turn: Turn) -> Turn:
    instruction = turn.instruction.strip()
    return turn if not instruction or instruction.endswith(".") else replace(turn, instruction=instruction + ".")


def _official(row: dict[str, Any]) -> Content:
    texts = row["data"]
    if not isinstance(texts, list) or not texts or len(texts) % 2 or not all(isinstance(text, str) for text in texts):
        raise BadRow("`data` is not a list of texts in pairs, [user, assistant, ...]")
    return "", tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))


def _chat(row: dict[str, Any]) -> Content:
    said = _messages(row["messages"])
    system = said.pop(0)[1] if said[:1] and said[0][0] == "system" else ""
    roles, texts = [role for role, _ in said], [text for _, text in said]
    if not said or roles != ["user", "assistant"] * (len(said) // 2):
        raise BadRow(f"roles {short(roles)}; wanted: perhaps system, then user and assistant in turn, assistant last")
    return system, tuple(Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True))


def _messages(value: Any) -> list[tuple[object, str]]:
    if isinstance(value, dict) and all(isinstance(column, list) for column in value.values()):  # how TFDS and parquet keep such lists
        if len({len(column) for column in value.values()}) > 1:
            raise BadRow("`messages` is not a list of {role, content}: its columns differ in length")
        value = [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not all(isinstance(message, dict) and isinstance(message.get("content"), str) for message in value):
        raise BadRow("`messages` is not a list of {role, content} whose contents are texts")
    return [(message.get("role"), message["content"]) for message in value]


def _completion(row: dict[str, Any]) -> Content:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat({"messages": prompt + completion})
    return "", (Turn(_text(row, "prompt"), _text(row, "completion")),)


SHAPES = (
    (frozenset({"messages"}), _chat),
    (frozenset({"data"}), _official),
    (frozenset({"instruction", "output"}), _triple),
    (frozenset({"instruction", "response"}), _triple),
    (frozenset({"prompt", "completion"}), _completion),
)


class Ids:
    """The ids given out so far, and where: a given id serves once, a content's hash gets `-2`, `-3` behind it when it comes again."""

    def __init__(self) -> None:
        self._used: dict[str, Source] = {}
        self._copies: Counter[str] = Counter()

    def claim(self, given: str | None, system: str, turns: tuple[Turn, ...], source: Source) -> str:
        if given in self._used:
            raise BadRow(f"id {short(given)} was used before, at {self._used[given]}")
        identifier = given or self._fresh(_hash(system, turns))
        self._used[identifier] = source
        return identifier

    def _fresh(self, content: str) -> str:
        identifier = content
        while identifier in self._used:
            self._copies[content] += 1
            identifier = f"{content}-{self._copies[content] + 1}"
        return identifier


def _hash(system: str, turns: tuple[Turn, ...]) -> str:
    content = {"system": system, "turns": [{"instruction": turn.instruction, "input": turn.input, "response": turn.response} for turn in turns]}
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def _given_id(row: dict[str, Any]) -> str | None:
    value = row.get("id")
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not is_unicode(str(value)):
        raise BadRow(f"`id` is {short(value)}; wanted: text or a whole number")
    return str(value)


def id_or_none(row: Any) -> str | None:
    try:
        return _given_id(row) if isinstance(row, dict) else None
    except BadRow:
        return None


def _difficulty(row: dict[str, Any]) -> float | None:
    key = "score" if row.get("difficulty") in (None, "") else "difficulty"
    value = row.get(key)
    if value is None or value == "":
        return None
    try:
        number = float("nan") if isinstance(value, bool) or not isinstance(value, str | int | float) else float(value)
    except (ValueError, OverflowError):
        number = float("nan")
    if not 1.0 <= number <= 5.0:
        raise BadRow(f"`{key}` is {short(value)}; wanted: a number from 1 to 5, or null")
    narrow = np.float32(number)  # a float32 column holds 4.2 as 4.19999981; as that, a threshold at 4.2 would part equal scores
    return float(str(narrow)) if float(narrow) == number else number


def _text(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if value is not None and not isinstance(value, str):
        raise BadRow(f"`{key}` is {kind(value)}, not text")
    return value or ""


def is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__

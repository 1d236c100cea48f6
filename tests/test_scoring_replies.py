"""A reply is worth a number only where nothing about it is in doubt; whatever else a server may send is an outcome, with a reason and without a number."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from phased_ift_jax.records import InstructionRecord, Source, Turn
from phased_ift_jax.scoring import difficulty
from phased_ift_jax.scoring.difficulty import PARTS, Settings, parser, read_text, request_of

PLAIN, EXPECTED = Settings("m"), Settings("m", expected_score=True)

# --- replies ---------------------------------------------------------------------------------------------------------------------

GOOD = '{"instruction_difficulty": 2.5, "response_difficulty": 3}'


def reply(content: str | None, finish_reason: str | None = "stop", **message: object) -> dict[str, Any]:
    """A chat completion as the official client dumps it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1760000000,
        "model": "some-model-2026-01-01",
        "choices": [
            {
                "index": 0,
                "finish_reason": finish_reason,
                "logprobs": None,
                "message": {"role": "assistant", "content": content, "refusal": None, "annotations": [], "audio": None, "function_call": None, "tool_calls": None} | message,
            }
        ],
        "usage": {"prompt_tokens": 1300, "completion_tokens": 19, "total_tokens": 1319, "prompt_tokens_details": {"cached_tokens": 1024}},
        "service_tier": "default",
        "system_fingerprint": "fp_1",
    }


CALL = [{"id": "call_1", "type": "function", "function": {"name": "rate", "arguments": GOOD}}]
TEXTS = {
    GOOD: (2.5, 3.0),
    '{"response_difficulty": 3.0, "instruction_difficulty": 2.5}': (2.5, 3.0),
    f"\n {GOOD} \n": (2.5, 3.0),
    f"```json\n{GOOD}\n```": (2.5, 3.0),
    f"```\n{GOOD}```\n": (2.5, 3.0),
    '{"instruction_difficulty":1,"response_difficulty":5}': (1.0, 5.0),
    '{\n  "instruction_difficulty" : 1.0,\n  "response_difficulty" : 5.00\n}': (1.0, 5.0),
    "2.5 3": (2.5, 3.0),
    "1 5\n": (1.0, 5.0),
    # out of range
    "0 7": "out_of_range",
    "7": "unparseable",
    '{"instruction_difficulty": 0, "response_difficulty": 7}': "out_of_range",
    '{"instruction_difficulty": 3, "response_difficulty": 5.01}': "out_of_range",
    '{"instruction_difficulty": 0.99, "response_difficulty": 3}': "out_of_range",
    '{"instruction_difficulty": -3, "response_difficulty": 3}': "out_of_range",
    f'{{"instruction_difficulty": {"9" * 400}, "response_difficulty": 3}}': "out_of_range",
    # in doubt
    "4/5": "unparseable",
    "4/5 3/5": "unparseable",
    "NaN": "unparseable",
    "NaN NaN": "unparseable",
    "nan 3": "unparseable",
    "3 4 5": "unparseable",
    "3": "unparseable",
    "3\n4": "unparseable",
    "2,5 3": "unparseable",
    "2,5": "unparseable",
    "3-4": "unparseable",
    "03 4": "unparseable",
    "3. 4": "unparseable",
    ".5 4": "unparseable",
    "+3 4": "unparseable",
    "3e0 4": "unparseable",
    "1_0 4": "unparseable",
    "٣ ٤": "unparseable",
    "\uff13 \uff14": "unparseable",
    "3\u00a04": "unparseable",
    "1\u0663 2": "unparseable",
    "1.\u0663 2": "unparseable",
    "three four": "unparseable",
    "The instruction is a 2 and the response a 3.": "unparseable",
    "2.5 3 (out of 5)": "unparseable",
    f"Here you are: {GOOD}": "unparseable",
    f"{GOOD} I hope this helps!": "unparseable",
    f"<think>maybe 2 or 3</think>{GOOD}": "unparseable",
    GOOD + GOOD: "unparseable",
    f"[{GOOD}]": "unparseable",
    "[2.5, 3]": "unparseable",
    "```json\n" + GOOD: "unparseable",
    GOOD + "\n```": "unparseable",
    GOOD[:-1]: "unparseable",
    GOOD[:40]: "unparseable",
    "{": "unparseable",
    "{}": "unparseable",
    '{"instruction_difficulty": 2.5}': "unparseable",
    '{"difficulty": 2.5, "response_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": 2.5, "instruction_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": 2.5, "response_difficulty": 3, "response_difficulty": 4}': "unparseable",
    '{"instruction_difficulty": 2.5, "response_difficulty": 3, "confidence": 4}': "unparseable",
    '{"instruction_difficulty": "2.5", "response_difficulty": "3"}': "unparseable",
    '{"instruction_difficulty": null, "response_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": true, "response_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": NaN, "response_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": Infinity, "response_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": [2], "response_difficulty": 3}': "unparseable",
    '{"instruction_difficulty": 1 to 3, "response_difficulty": 3}': "unparseable",
    "{'instruction_difficulty': 2.5, 'response_difficulty': 3}": "unparseable",
    " " * 2000 + GOOD: "unparseable",
    "[" * 100_000: "unparseable",
    "9" * 100_000 + " 3": "unparseable",
    "": "unparseable",
    " \n": "unparseable",
}
REPLIES: list[tuple[object, object]] = [
    *((reply(text), outcome) for text, outcome in TEXTS.items()),
    (reply(None), "unparseable"),
    (reply(None, refusal="I'm sorry, I can't assist with that."), "refused"),
    (reply("", refusal="I'm sorry, I can't help with 3 4."), "refused"),
    (reply(GOOD, refusal="I'm sorry."), "refused"),
    (reply(None, "content_filter"), "filtered"),
    (reply("", "content_filter"), "filtered"),
    (reply(GOOD, "content_filter"), "filtered"),
    (reply(GOOD[:30], "length"), "unparseable"),
    (reply(GOOD, "length"), "unparseable"),
    (reply("2.5 3", "length"), "unparseable"),  # the next character might have been a digit
    (reply("", "length"), "unparseable"),
    (reply(None, "tool_calls", tool_calls=CALL), "unparseable"),
    (reply(None, "function_call", function_call=CALL[0]["function"]), "unparseable"),
    (reply("I'm sorry, but I can't rate this."), "unparseable"),
    ({**reply(GOOD), "choices": []}, "unparseable"),
    ({**reply(GOOD), "choices": None}, "unparseable"),
    ({**reply(GOOD), "choices": [None]}, "unparseable"),
    ({**reply(GOOD), "choices": [{"finish_reason": "stop"}]}, "unparseable"),
    ({**reply(GOOD), "choices": [{"finish_reason": "stop", "message": None}]}, "unparseable"),
    (reply([{"type": "text", "text": GOOD}]), "unparseable"),  # type: ignore[arg-type]
    (reply(3.5), "unparseable"),  # type: ignore[arg-type]
    ({}, "unparseable"),
    ({"error": {"message": "The server had an error", "type": "server_error"}}, "unparseable"),
    ("<html>502 Bad Gateway</html>", "unparseable"),
    (None, "unparseable"),
    (GOOD, "unparseable"),
    ([2.5, 3], "unparseable"),
]
PARSE = parser(PLAIN)


@pytest.mark.parametrize(("raw", "outcome"), REPLIES, ids=[str(number) for number in range(len(REPLIES))])
def test_replies_as_they_come(raw: Any, outcome: object) -> None:
    reading = PARSE(raw)
    if isinstance(outcome, tuple):
        assert (reading.outcome, reading.value, reading.reason) == ("ok", outcome, "")
    else:
        assert (reading.outcome, reading.value) == (outcome, None)
        assert reading.reason
        assert "\n" not in reading.reason
        assert len(reading.reason) < 300


def test_every_reply_of_the_table_that_can_be_one_is_one_of_the_official_client() -> None:
    from openai.types.chat import ChatCompletion

    assert PARSE(ChatCompletion.model_validate(reply(GOOD)).model_dump()).value == (2.5, 3.0)


NAMES = st.sampled_from([*PARTS, "choices", "message", "content", "logprobs", "token", "logprob"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([GOOD, "2 3", "stop", "length"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def plainly(text: str) -> tuple[float, ...] | None:
    """What a text says beyond doubt, by another way than patterns: a JSON object of just the two, or two words that are numbers."""
    bare = text.strip(" \t\r\n")
    for fence in ("```json", "```"):
        if bare.startswith(fence) and bare.endswith("```") and len(bare) > 6:
            bare = bare[len(fence) : -3].strip(" \t\r\n")
            break
    try:
        found = json.loads(bare, object_pairs_hook=list, parse_constant=lambda _: None)
        values = [dict(found)[part] for part in PARTS] if sorted(key for key, _ in found) == sorted(PARTS) else []
    except (ValueError, TypeError, RecursionError):
        values = [float(word) for word in bare.split()] if re.fullmatch(r"[-0-9.]+ +[-0-9.]+", bare.replace("\t", " "), re.ASCII) else []
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return tuple(numbers) if len(numbers) == 2 and all(1 <= number <= 5 for number in numbers) else None


NUMBERISH = st.floats(0.5, 5.5).map(lambda x: str(round(x, 2))) | st.integers(-1, 7).map(str)
NUMBERISH |= st.sampled_from(["NaN", "null", '"3"', "true", "1e0", "3.", "03", "1e999", "[3]", ""])
OBJECTS = st.builds(
    lambda names, numbers, blank, tail: "{" + blank + ",".join(f'"{name}":{blank}{number}' for name, number in zip(names, numbers, strict=False)) + "}" + tail,
    st.lists(st.sampled_from([*PARTS, *PARTS, "difficulty"]), min_size=1, max_size=3),
    st.lists(NUMBERISH, min_size=3, max_size=3),
    st.sampled_from(["", " ", "\n  ", "\u00a0"]),
    st.sampled_from(["", "", "", "\n", "}", ".", " 5"]),
)
LINES = st.lists(NUMBERISH, max_size=4).map(" ".join)


@given(st.one_of(st.text(), OBJECTS, LINES, JSON.map(json.dumps), OBJECTS.map(lambda text: f"```json\n{text}\n```")))
@example(GOOD)
def test_a_number_is_read_only_where_it_is_beyond_doubt(text: str) -> None:
    reading = read_text(text)
    assert reading.value == (plainly(text) if reading.outcome == "ok" else None)
    if reading.outcome == "ok":
        assert reading.value is not None
        assert all(isinstance(number, float) and 1 <= number <= 5 for number in reading.value)


@given(st.tuples(*[st.floats(1, 5).map(lambda x: round(x, 3))] * 2))
def test_what_a_structured_model_writes_is_read(value: tuple[float, float]) -> None:
    for form in (json.dumps(dict(zip(PARTS, value, strict=True))), json.dumps(dict(zip(PARTS, value, strict=True)), indent=2), f"{value[0]} {value[1]}"):
        assert read_text(form).value == value


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in ((value, key), *places(one))]


@given(st.data())
def test_the_parser_never_raises(data: st.DataObject) -> None:
    """On any JSON value, and on a good reply in which something was put in another's place."""
    raw = data.draw(JSON)
    if data.draw(st.booleans()):
        broken = with_tokens([('{"instruction_difficulty": ', None), ("2", {"2": 0.9, "3": 0.1}), (', "response_difficulty": ', None), ("3", {"3": 1.0}), ("}", None)])
        container, key = data.draw(st.sampled_from(places(broken)))
        container[key], raw = raw, broken
    for settings in (PLAIN, EXPECTED):
        reading = parser(settings)(raw)
        assert (reading.outcome == "ok") == (reading.value is not None)
        if reading.value is not None:
            assert len(reading.value) == 2
            assert all(isinstance(number, float) and 1 <= number <= 5 for number in reading.value)


# --- the expected score ----------------------------------------------------------------------------------------------------------


def with_tokens(tokens: list[tuple[str, dict[str, float] | None]], content: str | None = None) -> dict[str, Any]:
    """A reply with log-probabilities: tokens in order, each with its alternatives' probabilities (None: it is certain)."""
    made = []
    for text, alternatives in tokens:
        shares = alternatives or {text: 1.0}
        top = [{"token": one, "bytes": list(one.encode()), "logprob": math.log(share)} for one, share in shares.items() if share > 0]
        drawn = next((one["logprob"] for one in top if one["token"] == text), math.log(max(1 - sum(shares.values()), 1e-9)))
        made.append({"token": text, "bytes": list(text.encode()), "logprob": drawn, "top_logprobs": top})
    raw = reply("".join(text for text, _ in tokens) if content is None else content)
    raw["choices"][0]["logprobs"] = {"content": made, "refusal": None}
    return raw


def rated(first: tuple[str, dict[str, float] | None], second: tuple[str, dict[str, float] | None], *more: tuple[str, dict[str, float] | None]) -> dict[str, Any]:
    return with_tokens([('{"', None), ("instruction_difficulty", None), ('":', None), first, (',"response_difficulty":', None), second, ("}", None), *more])


def expected(raw: dict[str, Any]) -> Any:
    return parser(EXPECTED)(raw)


SURE = ("4", {"4": 1.0})
OPENING, NEXT = '{"instruction_difficulty":', ',"response_difficulty":'


def test_the_expected_score_is_the_mean_over_digits() -> None:
    reading = expected(rated(("3", {"3": 0.6, "2": 0.3, "4": 0.1}), SURE))
    assert reading.outcome == "ok"
    assert reading.value == pytest.approx((2.8, 4.0))
    assert parser(PLAIN)(rated(("3", {"3": 0.6, "2": 0.3, "4": 0.1}), SURE)).value == (3.0, 4.0), "the same reply read without it"


def test_what_is_no_digit_from_1_to_5_has_no_share() -> None:
    raw = rated(("3", {"3": 0.5, "2": 0.45, "x": 0.02, "0": 0.01, "35": 0.01, "three": 0.01}), SURE)
    assert expected(raw).value == pytest.approx(((1.5 + 0.9) / 0.95, 4.0))


def test_a_digit_with_a_space_is_that_digit() -> None:
    raw = rated((" 3", {" 3": 0.4, "3": 0.2, " 2": 0.4}), SURE)
    assert expected(raw).value == pytest.approx((2.6, 4.0))


def test_the_token_that_was_drawn_counts_though_it_is_not_listed() -> None:
    assert expected(rated(("5", {"4": 0.6}), SURE)).value == pytest.approx((0.6 * 4 + 0.4 * 5, 4.0))


def test_an_end_of_sequence_token_may_follow() -> None:
    ended = with_tokens([(GOOD.replace("2.5", "2")[:27], None), ("2", None), (', "response_difficulty": ', None), ("3", None), ("}", None), ("</s>", None)])
    ended["choices"][0]["message"]["content"] = GOOD.replace("2.5", "2")
    assert expected(ended).value == (2.0, 3.0)


@given(st.lists(st.floats(0, 1), min_size=5, max_size=5).filter(lambda weights: sum(weights) > 0.1), st.integers(0, 4))
def test_it_lies_within_what_was_possible(weights: list[float], drawn: int) -> None:
    shares = {str(digit): weight / sum(weights) for digit, weight in enumerate(weights, 1)}
    reading = expected(rated((str(drawn + 1), shares), SURE))
    possible = [digit for digit, weight in enumerate(weights, 1) if weight > 0]
    assert reading.outcome == "ok"
    assert min([*possible, drawn + 1]) - 1e-9 <= reading.value[0] <= max([*possible, drawn + 1]) + 1e-9
    assert reading.value[0] == pytest.approx(sum(int(digit) * share for digit, share in shares.items()), abs=1e-6)


def logprobs(raw: dict[str, Any], change: Any) -> dict[str, Any]:
    change(raw["choices"][0]["logprobs"]["content"])
    return raw


@pytest.mark.parametrize(
    ("raw", "outcome", "says"),
    [
        (with_tokens([(OPENING, None), ("2", None), (".", None), ("5", None), (NEXT, None), SURE, ("}", None)]), "unparseable", "whole number"),
        (rated(("2.5", None), SURE), "unparseable", "whole number"),
        (with_tokens([(OPENING, None), ("3,", {"3,": 1.0}), (NEXT[1:], None), SURE, ("}", None)]), "unparseable", "that is a token"),
        (with_tokens([("3", {"3": 0.95}), (" ", None), SURE]), "ok", ""),
        (rated(("3", {"3": 0.5, "three": 0.4}), SURE), "unparseable", "hold 0.5 of the probability"),
        (rated(("3", {"3": 0.8, "4": 0.7}), SURE), "unparseable", "hold 1.5 of the probability"),
        (rated(("7", {"7": 0.5, "5": 0.5}), SURE), "out_of_range", "7 and 4"),
        (reply(GOOD.replace("2.5", "2")), "unparseable", "missing, or do not spell it"),
        (with_tokens([("2", None), (" ", None), ("3", None)], content=GOOD.replace("2.5", "2")), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens.pop()), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens[3].update(logprob=math.nan)), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens[3].update(logprob=0.5)), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens[3].update(logprob="-0.1")), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens[3].update(logprob=False)), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens[3].update(top_logprobs=None)), "unparseable", "do not spell it"),
        (logprobs(rated(SURE, SURE), lambda tokens: tokens[3]["top_logprobs"].append({"token": "1", "logprob": -math.inf})), "ok", ""),
    ],
)
def test_no_expected_score_where_it_is_in_doubt(raw: dict[str, Any], outcome: str, says: str) -> None:
    reading = expected(raw)
    assert reading.outcome == outcome
    assert says in reading.reason


def test_whole_numbers_are_asked_for_with_the_expected_score() -> None:
    body = request_of(InstructionRecord("1", (Turn("Name a flower.", "A rose."),), Source("data.jsonl", 1)), EXPECTED).body
    assert all("Each number is a whole one" in message["content"] and "decimals" not in message["content"] for message in body["messages"])
    assert (body["logprobs"], body["top_logprobs"]) == (True, 20)
    assert body["response_format"]["json_schema"]["schema"]["properties"][PARTS[0]] == {"type": "integer", "enum": [1, 2, 3, 4, 5]}


# --- the number ------------------------------------------------------------------------------------------------------------------


@given(st.tuples(*[st.integers(100, 500).map(lambda n: n / 100)] * 2))
def test_the_difficulty_is_the_mean_and_equal_means_are_equal(value: tuple[float, float]) -> None:
    columns = difficulty.columns(value)
    assert [columns[part] for part in PARTS] == list(value)
    assert columns["difficulty"] == (round(value[0] * 100) + round(value[1] * 100)) / 200

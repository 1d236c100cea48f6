"""How hard is a record? The question that is put to a model, and the two numbers that are read from its reply.

The question is a prompt (`difficulty_prompt.txt`, or one's own) around the record, which stands in it as one line of JSON. No text can end that line
or look like markup inside it (`quoted`), so the messages are the same for all records but for this line. A reply counts only in one of the forms of
`FORMS`; everything else is an outcome without a number.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from reprlib import repr as short
from typing import Any, Literal

from phased_ift_jax.records import InstructionRecord, UserError
from phased_ift_jax.scoring.request import Reading, Request, read_reply

PROMPT_VERSION = "difficulty-1"
LOWEST, HIGHEST = 1, 5
PARTS = ("instruction_difficulty", "response_difficulty")
Structured = Literal["auto", "json_schema", "json_object", "none"]
Difficulty = tuple[float, float]  # in the order of PARTS

# --- the prompt ------------------------------------------------------------------------------------------------------------------

OWN_FILE = Path(__file__).with_name("difficulty_prompt.txt")
RULE = re.compile(r"^={3,}[ \t]*\n", re.MULTILINE)
NUMBERS = {
    False: "Each number may have decimals (such as 1.2 or 3.75) where an example lies between two levels.",
    True: "Each number is a whole one, 1, 2, 3, 4 or 5: the nearest, where an example lies between two levels.",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """Texts with the placeholders `{record}` (once, in `user`) and `{numbers}` (which numbers are allowed)."""

    version: str
    sha256: str  # of the file's text
    system: str
    user: str


def load_prompt(path: str | Path | None = None, own: Path = OWN_FILE, version: str = PROMPT_VERSION) -> Prompt:
    """Our prompt `own`, or the one of a file: a system message, a line of `=====`, and the message with `{record}`; the first two may be missing.

    Raises:
        UserError: the file cannot be read, or its placeholders are not `{record}` once, after the line, and perhaps `{numbers}`.
    """
    try:
        text = Path(path or own).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(f"--prompt_file: cannot read {str(path)!r}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    parts = RULE.split(text)
    if len(parts) > 2:
        raise UserError(f"--prompt_file: {path} has {len(parts) - 1} lines of =====; wanted: one at most, between the system message and the other")
    system, user = ["", *parts][-2:]
    for name in sorted(set(re.findall(r"\{(\w+)\}", text)) - {"record", "numbers"}):
        raise UserError(f"--prompt_file: {path} has the placeholder {{{name}}}; known: {{record}}, which is the record as JSON, and {{numbers}}")
    if (user.count("{record}"), system.count("{record}")) != (1, 0):
        wanted = "once, in the message after =====" if len(parts) == 2 else "once"
        raise UserError(f"--prompt_file: {path} has {{record}} {text.count('{record}')} times; wanted: {wanted}")
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return Prompt(version if path is None else f"own-{sha256[:12]}", sha256, system.strip(), user.strip())


PROMPT = load_prompt()


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a question depends on but its record.

    `reasoning_effort` is for models that reason; None sends nothing. `temperature` is sent only where reasoning is off (no effort, or `none`), since
    models that reason refuse one; None never sends it. `max_completion_tokens` counts the tokens of reasoning too.

    Raises:
        UserError: the values do not go together.
    """

    model: str
    structured: Structured = "auto"
    expected_score: bool = False
    temperature: float | None = 0.0
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    prompt: Prompt = field(default=PROMPT)

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise UserError("--model: a name is needed, such as the one your provider lists")
        if self.temperature is not None and not 0 <= self.temperature <= 2:
            raise UserError(f"--temperature: {self.temperature} is not from 0 to 2")
        if self.reasoning_effort is not None and not self.reasoning_effort.strip():
            raise UserError("--reasoning_effort: is empty; wanted: a word of the model's, such as none or low, or no such flag")
        if self.max_completion_tokens is not None and self.max_completion_tokens < 16:
            raise UserError(f"--max_completion_tokens: {self.max_completion_tokens} is too few for two numbers; at least 16")
        if self.expected_score and self.reasons:
            raise UserError(f"--expected_score: a model that reasons (--reasoning_effort {self.reasoning_effort}) gives no log-probabilities; leave one of the two out")

    @property
    def reasons(self) -> bool:
        return self.reasoning_effort not in (None, "none")

    def card(self) -> dict[str, Any]:
        """As JSON, for the run card: the prompt by version and hash."""
        return asdict(self) | {"prompt": {"version": self.prompt.version, "sha256": self.prompt.sha256}}


# --- the question ----------------------------------------------------------------------------------------------------------------

# What could be taken for a tag or a control token of some chat format, and what a reader cannot see: controls, line separators, marks of direction,
# zero widths, fillers, variation selectors, tags, surrogates. Spelt out, since Unicode's tables change with Python, and a key must not.
ESCAPED = re.compile(
    r"<|\[(?=/?[gs]?[A-Z_]{2,}\])|[\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164]"
    r"|[\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\uffff\U00013430-\U0001345f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


_as_json = json.JSONEncoder(ensure_ascii=False).encode


def quoted(record: InstructionRecord) -> str:
    """A record as one line of JSON, in which `<`, control words in brackets and whatever is invisible are `\\u` escapes; `json.loads` gives its fields back.

    One turn is `{system?, instruction, input?, response}`, several are `{system?, conversation: [{instruction, input?, response}, ...]}`; what is
    empty is left out, but for instruction and response. The id is no part of it: equal records are one question.
    """
    turns = [{"instruction": turn.instruction} | ({"input": turn.input} if turn.input else {}) | {"response": turn.response} for turn in record.turns]
    content = ({"system": record.system} if record.system else {}) | (turns[0] if len(turns) == 1 else {"conversation": turns})
    return quoted_json(content)


def quoted_json(content: Mapping[str, Any]) -> str:
    """As one line of JSON without markup and without what cannot be seen; `json.loads` gives the content back."""
    return ESCAPED.sub(_escape, _as_json(content))


def _escape(found: re.Match[str]) -> str:
    units = found[0].encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[start : start + 4]}" for start in range(0, len(units), 4))


def request_of(record: InstructionRecord, settings: Settings, sample: int = 0) -> Request:
    """The question about one record; `sample` 1, 2 ... asks it once more. Bodies of equal settings share what they have in common."""
    messages, before, after, rest = frame(settings)
    return Request({"model": settings.model, "messages": [*messages, {"role": "user", "content": before + quoted(record) + after}]} | rest, sample)


@lru_cache(maxsize=8)
def frame(settings: Settings, name: str = "difficulty", parts: tuple[str, str] = PARTS) -> tuple[list[dict[str, str]], str, str, dict[str, Any]]:
    """What is the same for all records that are asked about by the two numbers `parts`: messages, the text before and after the record, and the other keys of a body."""
    system, user = (text.replace("{numbers}", NUMBERS[settings.expected_score]) for text in (settings.prompt.system, settings.prompt.user))
    reasons = settings.reasons or settings.temperature is settings.reasoning_effort is None  # most models that refuse a temperature do
    rest: dict[str, Any] = {"max_completion_tokens": settings.max_completion_tokens or (4096 if reasons else 64)}
    if settings.structured != "none":
        rest["response_format"] = {"type": "json_object"} if settings.structured == "json_object" else _schema(settings.expected_score, name, parts)
    if settings.reasoning_effort is not None:
        rest["reasoning_effort"] = settings.reasoning_effort
    if settings.temperature is not None and not settings.reasons:
        rest["temperature"] = settings.temperature
    if settings.expected_score:
        rest |= {"logprobs": True, "top_logprobs": 20}
    before, after = user.split("{record}")
    return [{"role": "system", "content": system}] if system else [], before, after, rest


def _schema(whole: bool, name: str, parts: tuple[str, str]) -> dict[str, Any]:
    number = {"type": "integer", "enum": list(range(LOWEST, HIGHEST + 1))} if whole else {"type": "number"}  # `minimum` is refused by many servers
    schema = {"type": "object", "properties": dict.fromkeys(parts, number), "required": list(parts), "additionalProperties": False}
    return {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}


def requests_for(records: Iterable[InstructionRecord], settings: Settings, repeat_share: float = 0.0, seed: int = 0) -> Iterator[Request]:
    """The questions about records, in order; about `repeat_share` of them are followed by themselves as sample 1.

    Which ones is drawn by a hash of (seed, key): other records, and their order, change nothing.
    """
    for record in records:
        request = request_of(record, settings)
        yield request
        if repeat_share and int.from_bytes(hashlib.sha256(f"{seed}:{request.key}".encode()).digest()[:8]) < repeat_share * 2**64:
            yield Request(request.body, 1)


def modes(structured: Structured) -> tuple[Structured, ...]:
    """What to try in turn, until a server takes a first question: `auto` is whatever it can, the others are themselves."""
    return ("json_schema", "json_object", "none") if structured == "auto" else (structured,)


REMEDIES = {
    "response_format": "--structured json_object or none",
    "temperature": "--temperature none, or --reasoning_effort none where the model can do without",
    "reasoning_effort": "another --reasoning_effort, or none given",
    "logprobs": "leave --expected_score out",
}


def remedy(message: str) -> tuple[str, str] | None:
    """(setting, what would do) if a server's refusal of a request (HTTP 400 or 422) names something that settings can change."""
    return next(((name, does) for name, does in REMEDIES.items() if name in message or name.replace("_", " ") in message), None)


# --- the reply -------------------------------------------------------------------------------------------------------------------

_BLANK = r"[ \t\r\n]*"
_NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?"


def forms_of(parts: tuple[str, str]) -> list[re.Pattern[str]]:
    """The JSON object of two numbers, in either order, perhaps in a fence; or the first and the second, alone on one line."""
    first, second = (rf"(?P<{part}>{_NUMBER})" for part in parts)
    pairs = [rf'"{part}"{_BLANK}:{_BLANK}{number}' for part, number in zip(parts, (first, second), strict=True)]
    objects = [rf"\{{{_BLANK}{one}{_BLANK},{_BLANK}{other}{_BLANK}\}}" for one, other in (pairs, pairs[::-1])]
    fenced = [rf"{_BLANK}(?P<fence>```(?:json)?{_BLANK})?{form}{_BLANK}(?(fence)```{_BLANK})" for form in objects]
    return [re.compile(form) for form in (*fenced, rf"{_BLANK}{first}[ \t]+{second}{_BLANK}")]


FORMS = forms_of(PARTS)
LONGEST = 1000  # characters of a reply that may be two numbers
LEAST_MASS = 0.8  # of the probability must lie on whole numbers from 1 to 5


def parser(settings: Settings) -> Callable[[Mapping[str, Any]], Reading]:
    """What makes a `Reading` of a raw reply to `request_of(record, settings)`; its value is a `Difficulty`. It never raises."""

    def parse(reply: Mapping[str, Any]) -> Reading:
        return read_reply(reply, lambda text: _expected(_tokens(reply), text) if settings.expected_score else read_text(text))

    return parse


def read_text(text: str) -> Reading:
    """The two numbers of a reply that is exactly one of `FORMS`."""
    return read_pair(text, FORMS, PARTS, (LOWEST, HIGHEST))


def read_pair(text: str, forms: list[re.Pattern[str]], parts: tuple[str, str], bounds: tuple[int, int]) -> Reading:
    """Two numbers, in the order of `parts`, of a reply that is exactly one of these forms."""
    found = _match(text, forms)
    if found is None:
        return Reading("unparseable", reason=f"not two numbers in the form that was asked for: {short(text)}")
    value = float(found[parts[0]]), float(found[parts[1]])
    if not all(bounds[0] <= number <= bounds[1] for number in value):
        return Reading("out_of_range", reason=f"{found[parts[0]][:12]} and {found[parts[1]][:12]}; wanted: numbers from {bounds[0]} to {bounds[1]}")
    return Reading("ok", value)


def _match(text: str, forms: list[re.Pattern[str]]) -> re.Match[str] | None:
    return next((found for form in forms if (found := form.fullmatch(text))), None) if len(text) <= LONGEST else None


def _expected(tokens: list[Mapping[str, Any]], text: str) -> Reading:
    """The mean of the whole numbers that the model might have written in place of the two that it wrote.

    Whole numbers are asked for, so that a number is one token: sum of d * p(d) / sum of p(d), over the alternatives of that token that are a digit d
    from 1 to 5. The second mean is given the first number as written. A reply has no value if a number has decimals (what an alternative's decimals would
    have been is not known), if its token holds more than the number, if the tokens do not spell the reply, or if the digits hold less than `LEAST_MASS`.
    """
    written = read_text(text)
    if written.outcome != "ok":
        return written
    found, starts = _match(text, FORMS), [0, *accumulate(len(token["token"]) for token in tokens)]
    assert found is not None
    if not "".join(token["token"] for token in tokens).startswith(text):  # an end-of-sequence token may follow
        return Reading("unparseable", reason="the reply's log-probabilities are missing, or do not spell it; for a model that gives none, leave --expected_score out")
    means = []
    for part in PARTS:
        token = tokens[bisect_right(starts, found.start(part)) - 1]
        if token["token"].strip() != found[part] or len(found[part]) > 1:
            return Reading("unparseable", reason=f"{part} is {found[part]} in the token {short(token['token'])}; wanted: a whole number that is a token")
        mass = _mass(token)
        covered = math.fsum(mass.values())
        if not LEAST_MASS <= covered <= 1.001:
            return Reading("unparseable", reason=f"{part}: the whole numbers from 1 to 5 hold {covered:.3g} of the probability; wanted: {LEAST_MASS} to 1")
        means.append(round(math.fsum(number * share for number, share in mass.items()) / covered, 6))
    return Reading("ok", (means[0], means[1]))


def _tokens(reply: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The tokens of a reply with their log-probabilities; none if any is not of the shape that is documented."""
    try:
        tokens: list[Mapping[str, Any]] = [{**token, "top_logprobs": list(token["top_logprobs"])} for token in reply["choices"][0]["logprobs"]["content"]]
        one_by_one = [one for token in tokens for one in (token, *token["top_logprobs"])]
        sound = all(isinstance(one["token"], str) and type(one["logprob"]) in (int, float) and one["logprob"] <= 0.001 for one in one_by_one)
    except (TypeError, KeyError, IndexError, AttributeError):
        return []
    return tokens if sound else []


def _mass(token: Mapping[str, Any]) -> dict[int, float]:
    """Probability of each whole number from 1 to 5 at a token; the one that was drawn may be missing among the alternatives."""
    alternatives = {one["token"]: math.exp(one["logprob"]) for one in (token, *token["top_logprobs"])}
    return {digit: math.fsum(p for text, p in alternatives.items() if text.strip() == str(digit)) for digit in range(LOWEST, HIGHEST + 1)}


def columns(value: Difficulty) -> dict[str, float]:
    """The fields of a scored row: the mean of the two, to six decimals (so that equal means are equal numbers), and the two."""
    return {"difficulty": round(math.fsum(value) / 2, 6)} | dict(zip(PARTS, value, strict=True))

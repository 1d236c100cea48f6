"""Which of two answers is better? The question that is put to a judge, once in each order, and the two scores that are read from its reply.

The prompt (`preference_prompt.txt`, or one's own) asks for the paper's criteria: helpfulness, relevance, accuracy, level of detail. The request and its
answers stand in it as one line of JSON, quoted as a record is for its difficulty; a reply counts in the same forms only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from phased_ift_jax.records import Judged, UserError
from phased_ift_jax.scoring import difficulty
from phased_ift_jax.scoring.difficulty import Prompt, forms_of, frame, quoted_json, read_pair
from phased_ift_jax.scoring.request import Reading, Request, read_reply

PROMPT_VERSION = "preference-1"
PARTS = ("answer_1", "answer_2")
BOUNDS = (0, 10)  # 1 to 10 is asked for; a zero that a judge gives all the same is a score
FORMS = forms_of(PARTS)
OWN_FILE = Path(__file__).with_name("preference_prompt.txt")


def load_prompt(path: str | Path | None = None) -> Prompt:
    """Our prompt, or the one of a file: a system message, a line of `=====`, and the message with `{record}`, in whose place the pair is put.

    Raises:
        UserError: the file cannot be read, or has not `{record}` once, after the line, and no other placeholder.
    """
    prompt = difficulty.load_prompt(path, OWN_FILE, PROMPT_VERSION)
    if "{numbers}" in prompt.system + prompt.user:
        raise UserError(f"--prompt_file: {path} has the placeholder {{numbers}}, which is for difficulty; known: {{record}}, which is the pair as JSON")
    return prompt


PROMPT = load_prompt()


@dataclass(frozen=True, slots=True)
class Settings(difficulty.Settings):
    """All that a question depends on but its pair; expected scores are for difficulty alone."""

    prompt: Prompt = field(default=PROMPT)


@lru_cache(maxsize=8)
def _frame(settings: Settings) -> tuple[list[dict[str, str]], str, str, dict[str, Any]]:
    if settings.expected_score:
        raise UserError("--expected_score: a judge's scores are read as written; leave it out")
    return frame(settings, "preference", PARTS)


def requests_of(instruction: str, given: str, candidate: str, baseline: str, settings: Settings) -> tuple[Request, Request]:
    """The question about two answers, with the candidate's first and with the baseline's first; `given` is the request's input, perhaps empty.

    Raises:
        UserError: the settings ask for expected scores.
    """
    messages, before, after, rest = _frame(settings)
    asked = {"instruction": instruction} | ({"input": given} if given else {})

    def request(*answers: str) -> Request:
        quoted = quoted_json(asked | dict(zip(PARTS, answers, strict=True)))
        return Request({"model": settings.model, "messages": [*messages, {"role": "user", "content": before + quoted + after}]} | rest)

    return request(candidate, baseline), request(baseline, candidate)


def parse(reply: Mapping[str, Any]) -> Reading:
    """A `Reading` of a raw reply, whose value is the two scores by place: the first answer's, the second one's. It never raises."""
    return read_reply(reply, lambda text: read_pair(text, FORMS, PARTS, BOUNDS))


def judged(requests: tuple[Request, Request], readings: tuple[Reading, Reading]) -> tuple[Judged, Judged]:
    """Both orders of `requests_of` with what was read from their replies: scores are (candidate's, baseline's) in both."""
    (first, second), (one, other) = requests, readings
    turned = other.value[::-1] if other.outcome == "ok" else None
    return Judged(one.outcome, one.value, one.reason, first.key), Judged(other.outcome, turned, other.reason, second.key)

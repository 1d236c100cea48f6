"""Answers as `generate` writes them, and those of two models to the same prompts side by side.

A prompt is known by its set and its id, never by its place in a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from phased_ift_jax.records import Source, UserError

WANTED = "a line of answers.jsonl, as docs/formats.md has it"
# what may differ between two files of answers and is no property of the models
DECODING = ("max_new_tokens", "max_length", "temperature", "top_p", "top_k", "prompt_template")


@dataclass(frozen=True, slots=True)
class Answer:
    """`response` is None where the model has given none; `tokens` are its own count of it, and `reference` is what is right, where the prompt says so."""

    test_set: str
    id: str
    instruction: str
    input: str
    response: str | None
    finish_reason: str
    tokens: int | None
    reference: str | None


@dataclass(frozen=True)
class Answers:
    """Those of one model, by (set, id), in the file's order."""

    path: Path
    model: str
    by_prompt: Mapping[tuple[str, str], Answer]
    decoding: Mapping[str, Any] = field(default_factory=dict)  # of the first line, as far as it says


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt. Where one is not there, `missing` says why there is nothing to judge; else it is empty."""

    prompt: Answer  # either of them
    candidate: str
    baseline: str
    missing: str
    tokens: tuple[int, int] | None

    @property
    def name(self) -> str:
        return f"{self.prompt.test_set}/{self.prompt.id}"


def read(path: Path) -> Answers:
    """A file of answers of one model.

    Raises:
        UserError: it cannot be read, a line is no answer, a prompt is answered twice, or several models have answered.
    """
    found: dict[tuple[str, str], Answer] = {}
    models: dict[str, int] = {}
    decoding: dict[str, Any] = {}
    for number, row in _rows(path):
        try:
            answer = _answer(row)
        except (ValueError, KeyError, TypeError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise UserError(f"{Source(str(path), number)}: not an answer ({what}); wanted: {WANTED}") from None
        if (prompt := (answer.test_set, answer.id)) in found:
            raise UserError(f"{Source(str(path), number)}: prompt '{answer.id}' of '{answer.test_set}' is answered a second time; keep one")
        found[prompt] = answer
        models.setdefault(str(row.get("model") or path.stem), number)
        decoding = decoding or {name: row[name] for name in DECODING if name in row}
    if not found:
        raise UserError(f"'{path}' holds no answer; wanted: {WANTED}")
    if len(models) > 1:
        (one, _), (other, number), *_ = models.items()
        raise UserError(f"{Source(str(path), number)}: answered by '{other}', the lines before by '{one}'; give one model's answers at a time")
    return Answers(path, next(iter(models)), found, decoding)


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    try:
                        yield number, json.loads(line)
                    except ValueError as error:
                        raise UserError(f"{Source(str(path), number)}: not an answer ({error}); wanted: {WANTED}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}': {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}; name a file that `generate` has written") from None


def _answer(row: Any) -> Answer:
    if not isinstance(row, dict):
        raise ValueError("not an object")
    texts = {name: row.get(name) for name in ("set", "input", "finish_reason")}
    for name, text in (texts | {"instruction": row["instruction"], "response": row["response"]}).items():
        if not isinstance(text, str | None):
            raise ValueError(f"`{name}` is {text!r:.40}, no text")
    if row["instruction"] is None or not isinstance(row["id"], str | int):
        raise ValueError("`id` and `instruction` are needed")
    references = (text for name in ("reference", "output") if isinstance(text := row.get(name), str))
    tokens = row.get("response_tokens")
    return Answer(
        texts["set"] or "",
        str(row["id"]),
        row["instruction"],
        texts["input"] or "",
        row["response"],
        texts["finish_reason"] or "",
        tokens if isinstance(tokens, int) else None,
        next(references, None),
    )


def pairs_of(candidate: Answers, baseline: Answers) -> list[Pair]:
    """One pair for each prompt that either file has, in the candidate's order, then those that only the baseline has.

    Raises:
        UserError: the files are of other prompts: none in common, or other words behind the same name.
    """
    one, other = candidate.by_prompt, baseline.by_prompt
    if not one.keys() & other.keys():
        shown = " and ".join(f"'{'/'.join(next(iter(answers.by_prompt)))}' in '{answers.path}'" for answers in (candidate, baseline))
        raise UserError(f"the files answer other prompts, such as {shown}; give answers to the same ones, with the same sets and ids")
    return [_pair(one.get(prompt), other.get(prompt)) for prompt in [*one, *(prompt for prompt in other if prompt not in one)]]


def _pair(candidate: Answer | None, baseline: Answer | None) -> Pair:
    prompt = candidate or baseline
    assert prompt
    if candidate and baseline and (candidate.instruction, candidate.input) != (baseline.instruction, baseline.input):
        raise UserError(f"the files answer other prompts: '{prompt.id}' of '{prompt.test_set}' has other words in each; give answers to the same ones")
    missing = "; ".join(f"{who}: {why}" for who, answer in (("candidate", candidate), ("baseline", baseline)) if (why := _absence(answer)))
    tokens = (candidate.tokens, baseline.tokens) if candidate and baseline and not missing else (None, None)
    return Pair(
        prompt,
        (candidate and candidate.response) or "",
        (baseline and baseline.response) or "",
        missing,
        None if tokens[0] is None or tokens[1] is None else (tokens[0], tokens[1]),
    )


def _absence(answer: Answer | None) -> str:
    """Why there is no answer; empty where there is one, even if that is empty."""
    if answer is None:
        return "prompt not in the file"
    return "" if answer.response is not None else "prompt too long" if answer.finish_reason == "too_long" else answer.finish_reason or "no response"

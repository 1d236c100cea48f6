"""What is likely wrong with a run that has not begun: findings from its config and its tokenized rows, each with what would do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from phased_ift_jax.data.templates import render
from phased_ift_jax.records import UserError
from phased_ift_jax.training.survey import Survey

TYPICAL_WEIGHT = 0.02  # of a decoder's matrices: what they are drawn with, and about what they stay at
TRUNCATED = 0.05  # share of the rows above which the end of answers is hardly learnt
ROUNDING = {"bfloat16": 8, "float16": 11}  # significant bits of a weight


@dataclass(frozen=True)
class Finding:
    """A fault; a `serious` one makes the run worthless."""

    serious: bool
    text: str


def examine(run: Survey) -> list[Finding]:
    """All findings, the serious ones first."""
    return sorted([*_updates(run), *_tokens(run), *_truncation(run), *_template(run)], key=lambda finding: not finding.serious)


def _updates(run: Survey) -> Iterator[Finding]:
    """An AdamW step moves a weight by about the learning rate; less than half the distance to the next number that a dtype has, it is rounded away."""
    bits = ROUNDING.get(run.config.model.param_dtype)
    if bits is None or run.config.training.optim != "adamw":
        return
    smallest = 2.0 ** (np.floor(np.log2(TYPICAL_WEIGHT)) + 1 - bits) / 2
    for phase in run.plan.phases:
        if (peak := float(phase.learning_rates.max())) < smallest:
            yield Finding(
                True,
                f"{phase.phase.folder}: steps of {peak:.2g} on {run.config.model.param_dtype} master weights round away (a weight of {TYPICAL_WEIGHT} moves by "
                f"{smallest:.2g} or not at all); set model.param_dtype float32",
            )


def _tokens(run: Survey) -> Iterator[Finding]:
    begin, end = run.tokenizer.bos_token_id, run.tokenizer.eos_token_id
    doubled = [i for i, e in enumerate(run.dataset.examples) if np.any((e.tokens[1:] == begin) & (e.tokens[:-1] == begin))]
    if doubled and begin != end:
        yield Finding(True, f"{_rows(run, doubled)}: two {run.tokenizer.bos_token} in a row; the prompt template and the tokenizer both add one")
    masked = [i for i, e in enumerate(run.dataset.examples) if not e.response_tokens]
    if masked:
        yield Finding(True, f"{_rows(run, masked)}: no token is trained")
    endless = [i for i, e in enumerate(run.dataset.examples) if not e.truncated and e.response_tokens and e.tokens[e.responses[-1][1] - 1] != end]
    if endless:
        serious = len(endless) * 2 > len(run.dataset.examples)
        yield Finding(serious, f"{_rows(run, endless)}: the last trained token is not {run.tokenizer.eos_token}; a model that never learns to stop does not")


def _truncation(run: Survey) -> Iterator[Finding]:
    count = sum(e.truncated for e in run.dataset.examples)
    if count > TRUNCATED * len(run.dataset.examples):
        share = count / len(run.dataset.examples)
        limit = run.config.data.max_length
        yield Finding(False, f"{share:.0%} of the rows are cut at data.max_length {limit} and do not learn to stop; raise it, or set data.truncation quarantine")


def _template(run: Survey) -> Iterator[Finding]:
    name = run.config.data.prompt_template
    if name == "tokenizer" or not run.tokenizer.chat_template:
        return
    try:
        theirs, ours = (render(template, run.dataset.records[0], run.tokenizer).text for template in ("tokenizer", name))
    except UserError:  # one that cannot be used for training is no template to compare with
        return
    if theirs != ours:
        yield Finding(False, f"data.prompt_template {name} is not the chat template that this tokenizer comes with; a chat model wants its own: data.prompt_template tokenizer")


def _rows(run: Survey, rows: list[int]) -> str:
    return f"{len(rows)} of {len(run.dataset.examples)} rows, such as {run.dataset.records[rows[0]].source}"

"""Sources of difficulty that cost nothing: scores that a file holds, the length of the response, instruction-following difficulty.

A figure that has no scale of its own becomes a difficulty by its rank: the lowest of n is 1, the highest 5, the others lie evenly
between; equal figures share the mean of their ranks. So the order stays as it is, with its ties and no others, and a difficulty says
which share of *these* records lies below, not how hard a record is by itself: split such a file by sizes. The figure stays beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from phased_ift_jax.records import InstructionRecord, Quarantined, Reading, ScoredRecord
from phased_ift_jax.scoring.agreement import ranks
from phased_ift_jax.scoring.scored_file import Unscored

SCORERS = ("import", "length", "ifd")
RowOf = Callable[[InstructionRecord], Mapping[str, Any]]  # data/row_kinds.row_of, which is another room's
Ratios = Callable[[Sequence[InstructionRecord]], tuple[list[float | Quarantined], dict[str, Any]]]  # training/ifd.ratios, of a model


class Scored(NamedTuple):
    """What `scored_file.write` is given after the path."""

    rows: list[dict[str, Any]]
    unscored: list[Unscored]
    card: dict[str, Any]


def score(scorer: str, reading: Reading, row_of: RowOf, ratios: Ratios) -> Scored:
    """By the name of one of `SCORERS`; only "ifd" needs `ratios`."""
    if scorer == "ifd":
        return score_by_ifd(reading, row_of, ratios)
    return {"import": import_scores, "length": score_by_length}[scorer](reading, row_of)


def import_scores(reading: Reading, row_of: RowOf) -> Scored:
    """The records that have a difficulty or score, as they are; the others are unscored."""
    scored = [record for record in reading.records if isinstance(record, ScoredRecord)]
    without = [Quarantined(record.source, record.id, "no score") for record in reading.records if isinstance(record, InstructionRecord)]
    return _scored("import", row_of, [(one.record, {"difficulty": one.difficulty}) for one in scored], [*without, *reading.quarantined], {})


def score_by_length(reading: Reading, row_of: RowOf) -> Scored:
    """By the characters of the response, of all responses of a conversation; kept as `length`. An empty response is scored as any other."""
    records = [_plain(record) for record in reading.records]
    return _ranked("length", row_of, records, [sum(len(turn.response) for turn in record.turns) for record in records], reading.quarantined, {})


def score_by_ifd(reading: Reading, row_of: RowOf, ratios: Ratios) -> Scored:
    """By instruction-following difficulty; kept as `ifd`. What cannot be measured is unscored with the reason."""
    records = [_plain(record) for record in reading.records]
    found, facts = ratios(records)
    measured = [(record, ratio) for record, ratio in zip(records, found, strict=True) if not isinstance(ratio, Quarantined)]
    others = [*(reason for reason in found if isinstance(reason, Quarantined)), *reading.quarantined]
    return _ranked("ifd", row_of, [record for record, _ in measured], [ratio for _, ratio in measured], others, facts)


def by_rank(figures: Sequence[float]) -> np.ndarray:
    """Difficulties from 1 to 5 in the order of the figures, (n,); a single one is 1."""
    return 1 + 4 * (ranks(figures) - 1) / max(len(figures) - 1, 1)


def _ranked(
    scorer: str, row_of: RowOf, records: Sequence[InstructionRecord], figures: Sequence[float], others: Iterable[Quarantined], settings: Mapping[str, Any]
) -> Scored:
    numbers = [{"difficulty": float(difficulty), scorer: figure} for difficulty, figure in zip(by_rank(figures), figures, strict=True)]
    return _scored(scorer, row_of, list(zip(records, numbers, strict=True)), others, {**settings, "difficulty": "rank of the figure, from 1 to 5"})


def _scored(
    scorer: str, row_of: RowOf, scored: Sequence[tuple[InstructionRecord, Mapping[str, Any]]], others: Iterable[Quarantined], settings: Mapping[str, Any]
) -> Scored:
    rows = [{**row_of(record), **numbers, "scorer": scorer} for record, numbers in scored]
    return Scored(rows, [Unscored.of(other) for other in others], {"scorer": scorer, "settings": dict(settings)})


def _plain(record: InstructionRecord | ScoredRecord) -> InstructionRecord:
    return record.record if isinstance(record, ScoredRecord) else record

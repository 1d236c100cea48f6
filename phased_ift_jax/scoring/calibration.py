"""A scored file against a reference: which records are in both, how well the order agrees, and which thresholds the reference can test.

What a reference knows of a record is a range: a score is a range of one number, a label such as "is in the official stage 3" says only
on which side of 3.5 the record lies. A threshold is tested by the records of which the reference knows the side, and only if there are
some on either.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phased_ift_jax.records import InstructionRecord, Turn
from phased_ift_jax.scoring import agreement

Key = tuple[str, ...]
STAGE3 = 3.5  # where the official stage 3 begins
NO_INPUT = re.compile(r"\n<?\s*no\s?input\s*>?\.?$", re.IGNORECASE)  # readers leave it out of a triple; in a prepared text it is the last line


@dataclass(frozen=True, slots=True)
class Known:
    """What a reference knows of a record: a difficulty in [low, high), or exactly `low` where both are the same."""

    record: InstructionRecord
    low: float
    high: float

    @classmethod
    def labelled(cls, record: InstructionRecord, in_stage3: bool) -> Known:
        return cls(record, STAGE3, np.inf) if in_stage3 else cls(record, 1.0, STAGE3)


@dataclass(frozen=True, slots=True)
class Matched:
    """Positions of the records that are in both, and how they were found; each is in at most one pair."""

    pairs: np.ndarray  # int64, (n, 2): of the scored file, of the reference
    by_id: int
    other_text: int  # pairs of one id, but different texts: they are no pairs

    @property
    def by_content(self) -> int:
        return len(self.pairs) - self.by_id


def match(scored: Sequence[InstructionRecord], reference: Sequence[InstructionRecord]) -> Matched:
    """Pair the records of equal id and content, then those of equal content in the order of the files.

    Contents are equal as they stand, or as the official data preparation left them: a period after an instruction that ended in none, the
    input on the next line.
    """
    texts, by_id = [_texts(record) for record in reference], {record.id: j for j, record in enumerate(reference)}
    own = [_texts(record) for record in scored]
    named = {i: by_id[record.id] for i, record in enumerate(scored) if record.id in by_id}
    partner = {i: j for i, j in named.items() if {*own[i]} & {*texts[j]}}
    by_name, taken, free = len(partner), set(partner.values()), defaultdict[Key, list[int]](list)
    for j in reversed(range(len(reference))):
        for key in texts[j] if j not in taken else ():
            free[key].append(j)
    for i in (i for i in range(len(scored)) if i not in partner):
        for held in (free[key] for key in own[i] if key in free):
            while held and held[-1] in taken:
                held.pop()
            if held:
                taken.add(partner.setdefault(i, held[-1]))
                break
    return Matched(np.array(sorted(partner.items()), np.int64).reshape(-1, 2), by_name, len(named) - by_name)


def calibrate(scored: Sequence[tuple[InstructionRecord, float]], reference: Sequence[Known], thresholds: Sequence[float]) -> dict[str, Any]:
    """All figures, as JSON: how many matched, Spearman over the records of known score, and for each threshold how many the reference has on
    either side and the AUC of telling them apart, None where it cannot be tested.

    `confusion` is of the phases between the thresholds that can be tested, rows the reference's: `by_value`, with the same thresholds on both
    scales, and `by_size`, with those of the scored file at which its phases are as large as the reference's.
    """
    found = match([record for record, _ in scored], [known.record for known in reference])
    scores = np.array([scored[i][1] for i in found.pairs[:, 0]], np.float64)
    low, high = (np.array([getattr(reference[j], end) for j in found.pairs[:, 1]], np.float64) for end in ("low", "high"))
    exact = low == high
    spearman = agreement.spearman(scores[exact], low[exact])
    result: dict[str, Any] = {
        "scored": len(scored),
        "reference": len(reference),
        "matched": len(found.pairs),
        "matched_by_id": found.by_id,
        "matched_by_content": found.by_content,
        "same_id_other_text": found.other_text,
        "spearman": spearman.value,
        "spearman_n": spearman.n,
        "thresholds": [],
        "confusion": None,
    }
    for threshold in thresholds:
        above, below = low >= threshold, np.where(exact, low < threshold, high <= threshold)
        sided = above | below
        figures = {"threshold": threshold, "above": int(above.sum()), "below": int(below.sum())}
        result["thresholds"].append(figures | {"auc": agreement.auc(scores[sided], above[sided]).value})
    tested = [figures["threshold"] for figures in result["thresholds"] if figures["auc"] is not None]
    phase = agreement.phases(low, tested)
    # a range lies in one phase where its end does, which is no part of it
    sure = exact | (phase == np.searchsorted(np.array(tested), high, side="left"))
    if tested and sure.any():
        own = _cuts(scores[sure], np.bincount(phase[sure], minlength=len(tested) + 1))
        tables = {name: agreement.confusion(low[sure], scores[sure], tested, cuts).tolist() for name, cuts in (("by_value", tested), ("by_size", own))}
        result["confusion"] = {"thresholds": tested, "own_thresholds": [cut if np.isfinite(cut) else None for cut in own], "n": int(sure.sum())} | tables
    return result


def _cuts(scores: np.ndarray, sizes: np.ndarray) -> list[float]:
    """Thresholds at which phases come nearest to these sizes; equal scores are never parted. Infinite where all scores lie below."""
    values, counts = np.unique(scores, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    return [float(np.append(values, np.inf)[np.abs(below - target).argmin()]) for target in np.cumsum(sizes)[:-1]]


def _texts(record: InstructionRecord) -> tuple[Key, ...]:
    """The record's texts as they stand, and as the official data preparation would leave them."""

    def texts(ending: str) -> Key:
        return (record.system, *(text for turn in record.turns for text in (_asked(turn, ending), turn.response.strip())))

    return tuple(dict.fromkeys((texts(""), texts("."))))


def _asked(turn: Turn, ending: str) -> str:
    instruction = turn.instruction.strip()
    text = (instruction + ("" if instruction.endswith(".") else ending) + "\n" + turn.input.strip()).strip()
    return NO_INPUT.sub("", text)

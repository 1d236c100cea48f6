"""How far two scorings of the same records agree: figures on two rows of numbers, pair by pair.

A figure that is not defined (nothing to compare, or a row of one value that correlates with nothing) is None, never NaN, and each has its n.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

Scores = Sequence[float] | np.ndarray


class Figure(NamedTuple):
    """A value, None where it is not defined, and over how many pairs it is taken."""

    value: float | None
    n: int


def pairs(a: Scores, b: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64, shape (n,).

    Raises:
        ValueError: they differ in length, or hold something that is no finite number.
    """
    one, other = (np.asarray(scores, np.float64) for scores in (a, b))
    if one.shape != other.shape or one.ndim != 1:
        raise ValueError(f"scores of shapes {one.shape} and {other.shape}; wanted: two rows of one length")
    if not (np.isfinite(one).all() and np.isfinite(other).all()):
        raise ValueError("scores that are no finite numbers; wanted: only records that both have scored")
    return one, other


def exact(a: Scores, b: Scores) -> Figure:
    """Share of pairs that are equal."""
    one, other = pairs(a, b)
    return _mean(one == other)


def quadratic_weighted_kappa(a: Scores, b: Scores) -> Figure:
    """Cohen's kappa with weights (a - b)^2: 1 - mean of (a_i - b_i)^2 over mean of (a_i - b_j)^2.

    On whole numbers it is the usual figure; it needs no classes, so decimals are not rounded. None if all scores are one number.
    """
    one, other = pairs(a, b)
    if not len(one):
        return Figure(None, 0)
    scale = max(np.abs(one).max(), np.abs(other).max()) or 1.0  # so that no square overflows
    one, other = one / scale, other / scale
    by_chance = one.var() + other.var() + (one.mean() - other.mean()) ** 2  # the mean over all i and j, without n^2 terms
    return Figure(float(1 - ((one - other) ** 2).mean() / by_chance) if np.ptp([one, other]) and by_chance else None, len(one))


def pearson(a: Scores, b: Scores) -> Figure:
    """Linear correlation; None if either row holds one value only."""
    one, other = pairs(a, b)
    if not len(one) or one.min() == one.max() or other.min() == other.max():
        return Figure(None, len(one))
    one, other = _centred(one), _centred(other)
    return Figure(float(np.clip(one @ other / np.sqrt((one @ one) * (other @ other)), -1, 1)), len(one))


def spearman(a: Scores, b: Scores) -> Figure:
    """Correlation of ranks, equal scores sharing their mean rank; None if either row holds one value only."""
    return pearson(*(ranks(scores) for scores in pairs(a, b)))


def ranks(scores: Scores) -> np.ndarray:
    """Ranks from 1, equal scores sharing their mean, shape (n,)."""
    _, inverse, counts = np.unique(np.asarray(scores, np.float64), return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def auc(scores: Scores, member: Sequence[bool] | np.ndarray) -> Figure:
    """Probability that a member scores higher than a non-member, drawn at random; a tie counts half. None without one of either."""
    ranked, inside = ranks(scores), np.asarray(member, bool)
    if ranked.shape != inside.shape:
        raise ValueError(f"{len(ranked)} scores and {len(inside)} memberships; wanted: as many")
    ins, outs = int(inside.sum()), int((~inside).sum())
    if not ins or not outs:
        return Figure(None, ins + outs)
    return Figure(float((ranked[inside].sum() - ins * (ins + 1) / 2) / (ins * outs)), ins + outs)


def phases(scores: Scores, thresholds: Sequence[float]) -> np.ndarray:
    """Position (from 0) of each score's phase, int64, shape (n,): thresholds ascend, and a score at a threshold is in the phase above it."""
    return np.searchsorted(np.asarray(thresholds, np.float64), np.asarray(scores, np.float64), side="right")


def changes_phase(a: Scores, b: Scores, thresholds: Sequence[float]) -> Figure:
    """Share of pairs that lie in different phases."""
    one, other = pairs(a, b)
    return _mean(phases(one, thresholds) != phases(other, thresholds))


def confusion(reference: Scores, scores: Scores, thresholds: Sequence[float], own_thresholds: Sequence[float] | None = None) -> np.ndarray:
    """How many records the reference has in phase i and `scores` in phase j, int64, shape (phases, phases).

    `own_thresholds` are those of `scores`, where they are not on the reference's scale; as many as there are of the reference.
    """
    one, other = pairs(reference, scores)
    own = thresholds if own_thresholds is None else own_thresholds
    if len(own) != len(thresholds):
        raise ValueError(f"{len(own)} thresholds against {len(thresholds)} of the reference; wanted: as many")
    size = len(thresholds) + 1
    return np.bincount(phases(one, thresholds) * size + phases(other, own), minlength=size * size).reshape(size, size)


def summary(a: Scores, b: Scores, thresholds: Sequence[float] = ()) -> dict[str, Any]:
    """All that two scorings of the same records, on one scale, are compared by, as JSON: each figure by name, and their common `n`.

    `changes_phase` and `confusion` are there where thresholds are given.
    """
    figures = {figure.__name__: figure(a, b) for figure in (exact, quadratic_weighted_kappa, spearman, pearson)}
    if thresholds:
        figures["changes_phase"] = changes_phase(a, b, thresholds)
    result: dict[str, Any] = {"n": len(a)} | {name: figure.value for name, figure in figures.items()}
    return result | ({"thresholds": list(thresholds), "confusion": confusion(a, b, thresholds).tolist()} if thresholds else {})


def _centred(row: np.ndarray) -> np.ndarray:
    """Around its mean, the largest at 1: no square overflows or vanishes."""
    row = row / np.abs(row).max()
    return (row - row.mean()) / np.abs(row - row.mean()).max()


def _mean(which: np.ndarray) -> Figure:
    return Figure(float(which.mean()) if len(which) else None, len(which))

"""Verdicts and win rates as the paper counts them, from the scores of both orders.

Letters: K runs (training seeds), P prompts of a test set. A *point* is half a verdict: +0.5 win, 0 tie, -0.5 lose, NaN invalid, so that
a mean of points is the paper's win rate, (win + tie/2) / (win + tie + lose) - 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from phased_ift_jax.records import Judgment

# The rules, and what a pair that is invalid by them counts in a win rate: nothing, or as the official script has it, which divides by all
# pairs, also those that it drops: each is a loss then, whichever of the two models is asked about.
RULES = {"paper": np.nan, "conservative": np.nan, "official_script": -0.5}


def scores_of(judgments: Sequence[Judgment]) -> np.ndarray:
    """float64 of shape (P, 2 orders, 2): candidate's and baseline's score, NaN where an order has none."""
    none = (np.nan, np.nan)
    return np.array([[order.scores or none for order in judgment.orders] for judgment in judgments], np.float64).reshape(-1, 2, 2)


def preferences(scores: np.ndarray) -> np.ndarray:
    """Of scores (..., 2 orders, 2): +1 candidate, 0 tie, -1 baseline, NaN no scores; shape (..., 2 orders)."""
    return np.sign(scores[..., 0] - scores[..., 1])


def points(scores: np.ndarray, rule: str = "paper") -> np.ndarray:
    """Of scores (..., 2 orders, 2): a point for each pair, NaN where it is invalid.

    paper            win twice, or win once and tie once, is a win; a tie twice, or a win and a loss, is a tie; the rest is lost. Zero is a score.
    conservative     only the same preference in both orders decides: a win and a tie is a tie
    official_script  the paper's, but a pair with a score of 0 is dropped
    """
    total = preferences(scores).sum(-1)
    verdict = np.trunc(total / 2) if rule == "conservative" else np.sign(total)
    dropped = (scores <= 0).any((-1, -2)) & (rule == "official_script")
    return np.where(dropped, np.nan, verdict / 2)


def tally(points: np.ndarray) -> dict[str, int]:
    """How many pairs were won, tied, lost and invalid; their sum is the number of pairs."""
    counts = {"win": points > 0, "tie": points == 0, "lose": points < 0, "invalid": np.isnan(points)}
    return {name: int(which.sum()) for name, which in counts.items()} | {"pairs": points.size}


def counted(points: np.ndarray, as_point: float) -> np.ndarray:
    """Points with invalid pairs as that point. Where all are invalid they stay so: that is no verdict, neither a tie nor a loss."""
    return points if np.isnan(points).all() else np.where(np.isnan(points), as_point, points)


def win_rate(points: np.ndarray) -> float:
    """From -0.5 to 0.5, 0 where both are equally good; NaN without a valid pair."""
    valid = points[~np.isnan(points)]
    return float(valid.mean()) if valid.size else float("nan")


def size_weighted(rates: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Mean over sets, the first dim, weighted by their numbers of prompts; a set without a rate (NaN) is left out, NaN where all are."""
    known = ~np.isnan(rates)
    weights = known * np.asarray(sizes, np.float64).reshape(-1, *[1] * (rates.ndim - 1))
    total = weights.sum(0)
    return np.divide((weights * np.where(known, rates, 0.0)).sum(0), total, out=np.full(total.shape, np.nan), where=total > 0)


def overall(sets: Sequence[np.ndarray]) -> float:
    """The size-weighted win rate of sets of points, each (K, P); NaN without a valid pair."""
    return float(size_weighted(np.array([win_rate(points_KP) for points_KP in sets]), [points_KP.shape[-1] for points_KP in sets]))

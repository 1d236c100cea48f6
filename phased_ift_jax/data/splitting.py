"""Where scores are cut into bins: at given values, at shares of the rows, or found (floor 1: knows no JAX).

Equal scores are never parted: a cut lies between two neighbouring distinct scores a < b, and its threshold t, the number with the fewest decimals in
(a, b] (the greatest of them), belongs to the bin above, as everywhere. `curriculum.bins.thresholds` makes the same bins of it. Cuts depend on
the scores alone, not on their order.

`found` answers what the paper leaves open, thresholds that need no eye and make stages alike in size. It takes, of all ways to put K - 1 cuts, the one of

    least  cost = 1/(K-1) sum_k saddle(t_k)  -  1/K sum_k ln(K p_k)

with p_k the share of the rows in bin k: the second term is the mean log of what a bin's size is of an equal share, 0 for equal sizes and without bound
for an empty bin. saddle is how shallow the valley is in which a cut lies, min over (a, b) of f / min(highest f to the left, highest f to the right):
0 in a gap between two peaks, 1 on a slope. f is the Gaussian kernel density that is drawn, with Scott's bandwidth, s n^(-1/5).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal
from itertools import pairwise

import numpy as np

from phased_ift_jax.records import UserError

PAPER_SIZES = (0.585, 0.284, 0.131)
MANY = 1000  # cuts that `found` weighs, evenly spaced over the rows' ranks, and as many of the widest gaps: all, where there are fewer


@dataclass(frozen=True, eq=False)
class Scores:
    """The distinct scores, rising, and how many rows have each; both of shape (m,)."""

    values: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, scores: Sequence[float]) -> Scores:
        return cls(*np.unique(np.asarray(scores, np.float64), return_counts=True))

    @property
    def below(self) -> np.ndarray:
        """The share of the rows below each cut, shape (m - 1,)."""
        return np.cumsum(self.counts)[:-1] / self.counts.sum()

    @property
    def bandwidth(self) -> float:
        """Scott's, in points of score."""
        n = self.counts.sum()
        mean = self.values @ self.counts / n
        return float(np.sqrt(np.square(self.values - mean) @ self.counts / n) * n**-0.2)

    def density(self, at: np.ndarray) -> np.ndarray:
        """The Gaussian kernel density at some scores, rows per row and point of score; of very many distinct scores by a fine histogram."""
        centres, weights, width = self.values, self.counts, self.bandwidth
        if len(centres) > 2 * MANY:
            weights, edges = np.histogram(centres, 2 * MANY, weights=weights)
            centres = (edges[1:] + edges[:-1]) / 2
        heights = [np.exp(-0.5 * np.square((part[:, None] - centres) / width)) @ weights for part in np.array_split(at, len(at) // MANY + 1)]
        return np.concatenate(heights) / (self.counts.sum() * width * np.sqrt(2 * np.pi))

    def bins(self, thresholds: Sequence[float]) -> np.ndarray:
        """How many rows each bin has."""
        return np.bincount(np.searchsorted(thresholds, self.values, side="right"), self.counts, len(thresholds) + 1).astype(np.int64)

    def threshold(self, cut: int) -> float:
        """The number of a cut (from 0: between the first two distinct scores)."""
        a, b = (float(value) for value in self.values[cut : cut + 2])
        shortened = (float(Decimal(repr(b)).quantize(Decimal(1).scaleb(-digits), ROUND_FLOOR)) for digits in range(17))
        return next((short for short in shortened if a < short <= b), b)

    def allow(self, bins: int) -> None:
        """Raise `UserError` where there cannot be so many bins."""
        if bins > len(self.values):
            only = ", ".join([*(f"{value:g}" for value in self.values[:6]), *(["..."] if len(self.values) > 6 else [])])
            raise UserError(f"split: {bins} bins cannot be had of {len(self.values)} distinct scores ({only}); equal scores are never parted; ask for fewer bins")


@dataclass(frozen=True)
class Found:
    """What `found` weighed: the terms of its cost."""

    thresholds: tuple[float, ...]
    saddles: tuple[float, ...]
    unevenness: float
    cost: float


def at_values(scores: Scores, thresholds: Sequence[float]) -> tuple[float, ...]:
    """The thresholds as they are; raises `UserError` where they do not rise or a bin is empty."""
    if not all(a < b for a, b in pairwise((-np.inf, *thresholds, np.inf))):
        raise UserError(f"split: the thresholds {' '.join(f'{t:g}' for t in thresholds)} are not finite numbers that rise")
    scores.allow(len(thresholds) + 1)
    edges = [-np.inf, *thresholds, np.inf]
    for (low, high), count in zip(pairwise(edges), scores.bins(thresholds), strict=True):
        if not count:
            where = " and ".join(word for word in (f"at least {low:g}", f"below {high:g}") if "inf" not in word)
            raise UserError(f"split: no score is {where}; the scores go from {scores.values[0]:g} to {scores.values[-1]:g}")
    return tuple(map(float, thresholds))


def at_shares(scores: Scores, below: Sequence[float]) -> tuple[float, ...]:
    """Thresholds with these shares of the rows below them, as nearly as cuts allow: the sum of the distances is the least that distinct cuts have.

    Raises:
        UserError: shares that do not rise between 0 and 1, or fewer distinct scores than bins.
    """
    if not all(a < b for a, b in pairwise((0.0, *below, 1.0))):
        raise UserError(f"split: the shares below each threshold, {' '.join(f'{share:g}' for share in below)}, must rise between 0 and 1")
    scores.allow(len(below) + 1)
    bins, shares = len(below) + 1, scores.below
    near = np.unique(np.clip(np.add.outer(np.searchsorted(shares, below), np.arange(-bins, bins)), 0, len(shares) - 1))
    cuts = _cheapest(shares[near], np.abs(shares[near] - np.array(below)[:, None]), lambda part: np.where(part > 0, 0.0, np.inf))[0]
    return tuple(scores.threshold(near[cut]) for cut in cuts)


def found(scores: Scores, bins: int) -> Found:
    """The thresholds of least cost; raises `UserError` where there are fewer distinct scores than bins, or fewer than two bins."""
    if bins < 2:
        raise UserError(f"split: {bins} bins are no split; ask for 2 or more")
    scores.allow(bins)
    gaps = np.diff(scores.values)
    ranks = np.linspace(0, len(gaps) - 1, MANY).astype(np.int64)
    weighed = np.union1d(ranks, np.argsort(-gaps, kind="stable")[:MANY]) if len(gaps) > 2 * MANY else np.arange(len(gaps))
    shares, saddles = scores.below[weighed], _saddles(scores)[weighed]

    def uneven(part: np.ndarray) -> np.ndarray:
        return -np.log(bins * np.where(part > 0, part, 0.0)) / bins

    with np.errstate(divide="ignore"):
        cuts, cost = _cheapest(shares, np.tile(saddles / (bins - 1), (bins - 1, 1)), uneven)
    chosen = saddles[list(cuts)]
    return Found(tuple(scores.threshold(weighed[cut]) for cut in cuts), tuple(chosen.tolist()), cost - float(chosen.mean()), cost)


def _saddles(scores: Scores) -> np.ndarray:
    """How shallow the valley of each cut is, shape (m - 1,): 0 is a gap between peaks, 1 a slope."""
    values = scores.values
    at = np.union1d(np.linspace(values[0], values[-1], 2 * MANY + 1), (values[1:] + values[:-1]) / 2)
    density = scores.density(at)
    saddle = density / np.minimum(np.maximum.accumulate(density), np.maximum.accumulate(density[::-1])[::-1])
    saddles = np.full(len(values) - 1, 1.0)
    np.minimum.at(saddles, np.clip(np.searchsorted(values, at, side="right") - 1, 0, len(saddles) - 1), saddle)
    return saddles


def _cheapest(below: np.ndarray, cut_costs: np.ndarray, bin_cost: Callable[[np.ndarray], np.ndarray]) -> tuple[tuple[int, ...], float]:
    """Which of c cuts, one a row of `cut_costs` (K - 1, c), rising, cost the least with the bins between them; of equals those furthest left.

    `below` (c,) is the share below each cut; `bin_cost` of a share must be infinite where it is not positive.
    """
    cost, came_from = bin_cost(below) + cut_costs[0], []
    for costs in cut_costs[1:]:
        sums = cost[:, None] + bin_cost(below - below[:, None])
        came_from.append(sums.argmin(0))
        cost = sums.min(0) + costs
    total = cost + bin_cost(1 - below)
    cuts = [int(total.argmin())]
    for before in reversed(came_from):
        cuts.insert(0, int(before[cuts[0]]))
    return tuple(cuts), float(total.min())

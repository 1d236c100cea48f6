"""How sure a win rate is: intervals, tests, what length explains, and what the judge's own noise is.

Letters: K runs (training seeds), P prompts of a test set, R resamples, S test sets. Points are those of `win_rate`: half a verdict, NaN invalid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

from phased_ift_jax.evaluation.win_rate import overall, win_rate

RESAMPLES = 10_000
SIMILAR = (0.8, 1.25)  # ratios of lengths that count as similar
ALIKE = 0.01  # difference of budgets above which two arms are no fair comparison
FLAT = 12.0  # log-odds beyond which a fit has run away: the data are separated


def bootstrap(sets_KP: Sequence[np.ndarray], resamples: int = RESAMPLES, seed: int = 0) -> np.ndarray:
    """Win rates of each set in data drawn anew, shape (S, R): prompts within their set, both orders together, and runs, the same ones in every set.

    Prompts with equal points are exchangeable, so that it is enough to draw how often each kind of prompt comes.
    """
    rng = np.random.default_rng(seed)
    runs = len(sets_KP[0])
    drawn_RK = rng.multinomial(runs, np.full(runs, 1 / runs), resamples)
    rates = []
    for points_KP in sets_KP:
        kinds_KU, counts = np.unique(np.where(np.isnan(points_KP), np.inf, points_KP), axis=1, return_counts=True)
        valid_KU = np.isfinite(kinds_KU)
        drawn_RU = rng.multinomial(points_KP.shape[1], counts / counts.sum(), resamples)
        total, valid = ((drawn_RK @ each_KU * drawn_RU).sum(1) for each_KU in (np.where(valid_KU, kinds_KU, 0.0), valid_KU))
        rates.append(np.divide(total, valid, out=np.full(resamples, np.nan), where=valid > 0))
    return np.stack(rates)


def interval(resampled: np.ndarray, level: float = 0.95) -> tuple[float, float] | None:
    """Percentile interval of R resampled figures; None where they are none."""
    known = resampled[~np.isnan(resampled)]
    if not known.size:
        return None
    low, high = np.quantile(known, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def student(values_K: np.ndarray, level: float = 0.95) -> tuple[float, list[float] | None]:
    """The mean of K figures, and Student's interval of it, for which two are needed."""
    mean = float(values_K.mean())
    if len(values_K) < 2:
        return mean, None
    half = float(stats.t.ppf((1 + level) / 2, len(values_K) - 1) * stats.sem(values_K))
    return mean, [mean - half, mean + half]


def vary(sets_KP: Sequence[np.ndarray]) -> bool:
    """Whether points differ within a set, so that drawing them anew tells something."""
    return any(np.unique(points_KP[~np.isnan(points_KP)]).size > 1 for points_KP in sets_KP)


def exact_interval(sets_KP: Sequence[np.ndarray], reach: float = 0.5, level: float = 0.95) -> tuple[float, float] | None:
    """Bounds, None without a valid pair, of a win rate whose points, from -reach to reach, are the same in all prompts of a set: no resampling tells how many others there are.

    It is Clopper's and Pearson's interval of a share of which nothing was seen, with unlike prompts as far off as points can be. Valid prompts of
    one set may weigh more than those of another; each counts as one of the heaviest.
    """
    rates = np.array([win_rate(points_KP) for points_KP in sets_KP])
    known, sizes = ~np.isnan(rates), np.array([points_KP.shape[1] for points_KP in sets_KP])
    if not known.any():
        return None
    valid = np.array([(~np.isnan(points_KP)).any(0).sum() for points_KP in sets_KP])
    unseen = 1 - ((1 - level) / 2) ** (1 / (valid[known] * sizes[known].sum() / sizes[known]).min())
    rate = overall(sets_KP)
    return max(rate - unseen * float(rates[known].max() + reach), -reach), min(rate + unseen * float(reach - rates[known].min()), reach)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p of that many wins among decided pairs, if both were equally likely; 1 where nothing was decided."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """p values adjusted for their number (Holm, step down), by the same names."""
    names = sorted(p_values, key=p_values.__getitem__)
    steps = [(len(names) - rank) * p_values[name] for rank, name in enumerate(names)]
    return dict(zip(names, np.minimum(np.maximum.accumulate(steps), 1.0).tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Variance:
    """The variance of a win rate over K runs and P prompts: `of_seeds` / K + `of_prompts` / P; `of_seeds` is None with one run.

    `of_prompts` is that of a prompt's mean over the runs, within its set, so that it holds what is left of the noise of single pairs.
    """

    of_seeds: float | None
    of_prompts: float
    total: float
    freedom: float  # degrees of freedom of `total` (Satterthwaite)

    @property
    def standard_error(self) -> float:
        return self.total**0.5

    def interval(self, rate: float, level: float = 0.95) -> tuple[float, float]:
        half = float(stats.t.ppf((1 + level) / 2, self.freedom)) * self.standard_error
        return rate - half, rate + half

    def smallest_effect(self, level: float = 0.95, power: float = 0.8) -> float:
        """The true win rate that a comparison as noisy as this one finds with that power, two-sided."""
        return float(stats.norm.ppf((1 + level) / 2) + stats.norm.ppf(power)) * self.standard_error


def variance(sets_KP: Sequence[np.ndarray], reach: float = 0.5) -> Variance | None:
    """Of the size-weighted win rate, from the prompts that are valid in every run (two-way analysis of variance, set by set); None without two of them.

    Points are from -reach to reach.
    """
    valid = [(points_KP.shape[1], points_KP[:, ~np.isnan(points_KP).any(0)]) for points_KP in sets_KP]
    valid = [(size, points_KP) for size, points_KP in valid if points_KP.shape[1]]
    freedom = sum(points_KP.shape[1] - 1 for _, points_KP in valid)
    if not freedom:
        return None
    prompts, runs = sum(size for size, _ in valid), len(valid[0][1])
    means_K, noise, of_prompts = np.zeros(runs), 0.0, 0.0
    for size, points_KP in valid:
        count = points_KP.shape[1]
        weight = (size / prompts) ** 2 / count
        by_run_K, by_prompt_P = points_KP.mean(1), points_KP.mean(0)
        rest_KP = points_KP - by_run_K[:, None] - by_prompt_P + points_KP.mean()
        means_K += size / prompts * by_run_K
        noise += weight * (rest_KP**2).sum() / max((runs - 1) * (count - 1), 1)
        of_prompts += weight * (by_prompt_P.var(ddof=1) if count > 1 else reach**2)  # of one prompt, the most that points can vary
    if runs == 1:
        return Variance(None, of_prompts * prompts, of_prompts, freedom)
    seen = means_K.var(ddof=1)
    of_seeds = max(seen - noise, 0.0)
    total = of_seeds / runs + of_prompts
    uncertain = (seen / runs) ** 2 / (runs - 1) * (of_seeds > 0) + of_prompts**2 / freedom
    return Variance(of_seeds, of_prompts * prompts, total, total**2 / uncertain if uncertain else freedom)


def length_controlled(points: np.ndarray, lengths: np.ndarray, prompts: np.ndarray, level: float = 0.95) -> dict:
    """The win rate that two answers of equal length would have, by a logistic model after AlpacaEval 2:

        P(candidate wins) = 1 / (1 + exp(-(theta + phi * tanh(d / sd(d)))))        d: candidate's length - baseline's

    fitted by maximum likelihood, with a tie as half a win; at d = 0 the win rate is 1 / (1 + exp(-theta)) - 0.5. Intervals are by the sandwich
    estimator, with the pairs of one prompt together. (AlpacaEval has a term for each prompt's difficulty too, fitted over many models.)

    Args: points (n,), lengths (n, 2) of candidate and baseline, prompts (n,) whole numbers that say which pairs share a prompt.
    Returns: `win_rate`, `interval`, `length_effect` (phi), `length_effect_interval`, `pairs`, `reason`: None, or why the figures are None.
    """
    valid = ~np.isnan(points) & ~np.isnan(lengths).any(1)
    won, difference, prompts = points[valid] + 0.5, lengths[valid, 0] - lengths[valid, 1], prompts[valid]
    spread = float(difference.std()) if difference.size else 0.0
    if not difference.size:
        return _no_control(0, "no valid pair with both lengths")
    if not spread and difference.any():
        return _no_control(difference.size, "all pairs differ in length by the same")
    X = np.stack([np.ones_like(won), np.tanh(difference / spread)], 1) if spread else np.ones((won.size, 1))
    theta = np.zeros(X.shape[1])
    for _ in range(50):
        p = special.expit(X @ theta)
        hessian = (X * (p * (1 - p))[:, None]).T @ X
        if np.linalg.cond(hessian) > 1e12 or np.abs(X @ theta).max() > FLAT:
            return _no_control(difference.size, "the verdict follows from the length alone, or is the same in every pair: the model has no finite fit")
        step = np.linalg.solve(hessian, X.T @ (won - p))
        theta = theta + step
        if np.abs(step).max() < 1e-10:
            break
    _, prompts = np.unique(prompts, return_inverse=True)
    scores = np.zeros((prompts.max() + 1, X.shape[1]))
    np.add.at(scores, prompts, X * (won - special.expit(X @ theta))[:, None])
    bread = np.linalg.inv(hessian)
    half = stats.norm.ppf((1 + level) / 2) * np.sqrt(np.diag(bread @ scores.T @ scores @ bread))
    low, high = special.expit(np.array([theta - half, theta + half])[:, 0]) - 0.5
    effect = (float(theta[1]), [float(theta[1] - half[1]), float(theta[1] + half[1])]) if spread else (None, None)
    return {
        "win_rate": float(special.expit(theta[0]) - 0.5),
        "interval": (float(low), float(high)),
        "length_effect": effect[0],
        "length_effect_interval": effect[1],
        "pairs": int(difference.size),
        "reason": None,
    }


def _no_control(pairs: int, reason: str) -> dict:
    return dict.fromkeys(("win_rate", "interval", "length_effect", "length_effect_interval")) | {"pairs": pairs, "reason": reason}


def is_similar(lengths: np.ndarray) -> np.ndarray:
    """Of lengths (..., 2): whether they differ by no more than `SIMILAR` allows; not where one was not measured."""
    candidate, baseline = lengths[..., 0], lengths[..., 1]
    return (candidate >= SIMILAR[0] * baseline) & (candidate <= SIMILAR[1] * baseline)


def judge_noise(preferences: np.ndarray) -> dict:
    """What the judge's two views of a pair say about the judge, from preferences (n, 2 orders), candidate first and baseline first. Shares from 0 to 1.

    `agreement`: of valid pairs, the same preference in both orders; `flip_rate`: the opposite one; the rest is a tie in one order alone.
    `first`, `tie`, `second`: of all valid single views, which place was preferred; `second_of_decided`: of those that preferred one.
    """
    both = preferences[~np.isnan(preferences).any(1)]
    first = (preferences * (1, -1))[~np.isnan(preferences)]
    decided = int((first != 0).sum())
    return {
        "pairs": len(both),
        "agreement": _share(both[:, 0] == both[:, 1]),
        "flip_rate": _share(both[:, 0] * both[:, 1] < 0),
        "views": first.size,
        "first": _share(first > 0),
        "tie": _share(first == 0),
        "second": _share(first < 0),
        "second_of_decided": float((first < 0).sum() / decided) if decided else None,
    }


def _share(which: np.ndarray) -> float | None:
    return float(which.mean()) if which.size else None


"""Did it help? Everything that a report says about two models, from judgments of their answers, as one JSON object (keys: docs/formats.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from phased_ift_jax.evaluation.judgments import UNITS
from phased_ift_jax.evaluation.statistics import (
    RESAMPLES,
    SIMILAR,
    bootstrap,
    exact_interval,
    holm,
    interval,
    is_similar,
    judge_noise,
    length_controlled,
    sign_test,
    variance,
    vary,
)
from phased_ift_jax.evaluation.win_rate import RULES, counted, overall, points, preferences, scores_of, size_weighted, tally
from phased_ift_jax.records import Judgment, UserError

INVALID = {"excluded": np.nan, "as_ties": 0.0}
BOUNDS = {"worst": -0.5, "best": 0.5}
POWER = 0.8
NO_VARIANCE = 1e-18  # what rounding leaves of none
SEEDS = {
    1: "It is one training seed: the interval does not hold what another seed would change.",
    2: "There are two training seeds: how much seeds differ is hardly known from two, and the interval may be too narrow.",
}
AGAIN = "as models that are judged again are no second training seed"


def compare(*runs: Sequence[Judgment], length_unit: str = "characters", resamples: int = RESAMPLES, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Compare two models by the judgments of one run, or of several (pairs of training seeds) over the same prompts, which are then K runs of P prompts.

    Raises:
        UserError: there are no judgments, or they are not of one pair of models in each run and another one in every run, one judge, and the same prompts.
    """
    names, prompts = _aligned(runs)
    by_prompt = [{_prompt(judgment): judgment for judgment in run} for run in runs]
    table = [[run[prompt] for prompt in prompts] for run in by_prompt]
    test_sets = list(dict.fromkeys(test_set for test_set, _ in prompts))
    of_set = {test_set: np.array([prompt[0] == test_set for prompt in prompts]) for test_set in test_sets}
    scores = np.stack([scores_of(row) for row in table])
    lengths = {unit: np.array([[judgment.lengths.get(unit, (np.nan, np.nan)) for judgment in row] for row in table], np.float64) for unit in UNITS}

    def sets(points_KP: np.ndarray) -> list[np.ndarray]:
        return [points_KP[:, where] for where in of_set.values()]

    def estimate(sets_KP: list[np.ndarray], as_point: float = np.nan) -> dict[str, Any]:
        return estimated(sets_KP, as_point, resamples, seed, level)

    rules: dict[str, Any] = {}
    for rule, as_point in RULES.items():
        points_KP = points(scores, rule)
        by_set = {name: tally(one) | estimate([one], as_point) for name, one in zip(test_sets, sets(points_KP), strict=True)}
        for name, p in holm({name: one["sign_test"]["p"] for name, one in by_set.items()}).items():
            by_set[name]["sign_test"]["p_holm"] = p
            by_set[name]["conclusion"] = _conclusion(by_set[name], p, level)
        rules[rule] = tally(points_KP) | estimate(sets(points_KP), as_point) | {"sets": by_set}

    points_KP = points(scores)
    invalid: dict[str, Any] = {name: estimate(sets(points_KP), as_point) for name, as_point in INVALID.items()}
    invalid |= {name: estimate(sets(np.nan_to_num(points_KP, nan=as_point))) for name, as_point in BOUNDS.items()}
    missing = Counter(_outcome(judgment) for row in table for judgment in row)
    invalid |= {"pairs": int(np.isnan(points_KP).sum()), "outcomes": {outcome: n for outcome, n in sorted(missing.items()) if outcome != "ok"}}
    invalid["could_change_conclusion"] = len({invalid[name]["conclusion"] for name in ("excluded", *BOUNDS)}) > 1

    length = lengths[length_unit]
    same_prompt = np.broadcast_to(np.arange(len(prompts)), points_KP.shape)
    controlled = length_controlled(points_KP.ravel(), length.reshape(-1, 2), same_prompt.ravel(), level)
    similar_KP = np.where(is_similar(length), points_KP, np.nan)
    noise = variance(sets(points_KP))
    result = names | {
        "prompts": len(prompts),
        "runs": len(runs),
        "level": level,
        "resamples": resamples,
        "headline": {"rule": "paper"} | {key: rules["paper"][key] for key in ("win_rate", "interval", "sign_test", "conclusion")},
        "rules": rules,
        "invalid": invalid,
        "lengths": {unit: _lengths(values, points_KP) for unit, values in lengths.items() if not np.isnan(values).all()},
        "length_controlled": {"unit": length_unit} | controlled | {"win_rate": _percent(controlled["win_rate"]), "interval": _percents(controlled["interval"])},
        "similar_length": {"unit": length_unit, "ratios": list(SIMILAR)} | tally(points_KP[is_similar(length)]) | estimate([similar_KP]),
        "judge_noise": judge_noise(preferences(scores).reshape(-1, 2)),
        "noise": {
            "standard_error": _percent(noise.standard_error if noise else None),
            "smallest_effect": _percent(noise.smallest_effect(level, POWER) if noise else None),
            "power": POWER,
            "variance_of_prompts": noise.of_prompts if noise else None,
            "variance_of_seeds": noise.of_seeds if noise else None,
        },
        "by_run": [_percent(overall([one[None] for one in sets_P])) for sets_P in ([one[run] for one in sets(points_KP)] for run in range(len(runs)))],
    }
    return result | {"words": list(_words(result))}


def _prompt(judgment: Judgment) -> tuple[str, str]:
    return judgment.test_set, judgment.id


def _outcome(judgment: Judgment) -> str:
    return next((order.outcome for order in judgment.orders if order.scores is None), "ok")


def _aligned(runs: Sequence[Sequence[Judgment]]) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Names of the models and of the judge, and the prompts of every run: (set, id), in the first one's order."""
    if not runs or not all(runs):
        raise UserError("no judgments to compare; give at least one in every run")
    prompts = [_prompt(judgment) for judgment in runs[0]]
    for number, run in enumerate(runs, 1):
        seen = Counter(map(_prompt, run))
        (test_set, identifier), times = seen.most_common(1)[0]
        if times > 1:
            raise UserError(f"judgments: prompt '{identifier}' of '{test_set}' was judged {times} times in run {number}; keep one, {AGAIN}")
        if odd := set(prompts) ^ set(seen):
            test_set, identifier = min(odd)
            raise UserError(f"judgments: prompt '{identifier}' of '{test_set}' is not in both run 1 and run {number}; runs are compared over the same prompts")
        if len(models := {(judgment.candidate, judgment.baseline) for judgment in run}) > 1:
            raise UserError(f"judgments: run {number} is of several pairs of models, {sorted(models)[:3]}; give one pair at a time")
    if len(judges := {judgment.judge for run in runs for judgment in run}) > 1:
        raise UserError(f"judgments: of several judges, {', '.join(sorted(judges))}; compare by one at a time")
    pairs = [(run[0].candidate, run[0].baseline) for run in runs]
    for number, pair in enumerate(pairs, 1):
        if (first := pairs.index(pair) + 1) < number:
            raise UserError(f"judgments: runs {first} and {number} are both of '{pair[0]}' against '{pair[1]}'; give one, {AGAIN}")
    return {kind: ", ".join(dict.fromkeys(getattr(run[0], kind) for run in runs)) for kind in ("candidate", "baseline", "judge")}, prompts


def estimated(sets_KP: list[np.ndarray], as_point: float, resamples: int, seed: int, level: float, reach: float = 0.5) -> dict[str, Any]:
    """Win rate, interval and conclusion with invalid pairs counted `as_point`; the sign test is over decided pairs alone. Points are from -reach to reach."""
    sizes, test = [points_KP.shape[1] for points_KP in sets_KP], _sign_test(sets_KP)
    sets_KP = [counted(points_KP, as_point) for points_KP in sets_KP]
    rate = overall(sets_KP)
    drawn, exact = interval(size_weighted(bootstrap(sets_KP, resamples, seed), sizes), level), exact_interval(sets_KP, reach, level)
    found = {"win_rate": _percent(rate), "interval": _percents(drawn if vary(sets_KP) else exact), "sign_test": test}
    if len(sets_KP[0]) > 1:  # of K seeds drawn anew the variance is too small by a K-th, and it knows no t
        noise = variance(sets_KP, reach)
        students = noise.interval(rate, level) if noise and noise.total > NO_VARIANCE else exact if noise else None
        found |= {"interval": _percents(students), "bootstrap_interval": _percents(drawn)}
    return found | {"conclusion": _conclusion(found, test["p"], level)}


def _conclusion(found: dict[str, Any], p: float, level: float) -> str:
    """Beyond noise is what both say: the interval, which leaves out zero, and the sign test, which holds for few pairs too."""
    rate, between = found["win_rate"], found["interval"]
    if rate is None:
        return "no_verdict"
    if between is None or between[0] <= 0 <= between[1] or p >= 1 - level:
        return "within_noise"
    return "better" if rate > 0 else "worse"


def _sign_test(sets_KP: Sequence[np.ndarray]) -> dict[str, Any]:
    """Over prompts: of several runs, a prompt is won that was won in more of them than lost."""
    balance = np.sign(np.concatenate([np.nansum(points_KP, 0) for points_KP in sets_KP]))
    wins, losses = int((balance > 0).sum()), int((balance < 0).sum())
    return {"wins": wins, "losses": losses, "p": sign_test(wins, losses)}


def _lengths(lengths: np.ndarray, points_KP: np.ndarray) -> dict[str, float | None]:
    known = ~np.isnan(lengths).any(-1)
    candidate, baseline = lengths[known].mean(0).tolist()
    longer = np.sign(lengths[..., 0] - lengths[..., 1]) * np.sign(points_KP)
    won, lost = int((longer > 0).sum()), int((longer < 0).sum())
    return {"candidate": candidate, "baseline": baseline, "ratio": candidate / baseline if baseline else None, "longer_wins": won / (won + lost) if won + lost else None}


def _percent(figure: float | None) -> float | None:
    return None if figure is None or np.isnan(figure) else 100 * figure


def _percents(pair: tuple[float, float] | None) -> list[float] | None:
    return None if pair is None else [100 * figure for figure in pair]


def _said(found: dict[str, Any], level: float) -> str:
    between = "" if found["interval"] is None else " ({:.0%} interval {:+.1f} to {:+.1f})".format(level, *found["interval"])
    return f"{found['win_rate']:+.1f} points{between}"


def _words(result: dict[str, Any]) -> Iterable[str]:
    """The result in plain sentences, the first of which is the answer."""
    headline, level = result["headline"], result["level"]
    candidate, baseline, pairs = result["candidate"], result["baseline"], result["rules"]["paper"]["pairs"]
    judge, invalid, controlled = result["judge_noise"], result["invalid"], result["length_controlled"]
    if headline["conclusion"] == "no_verdict":
        yield f"No verdict: of {pairs:,} pairs, the judge scored none in both orders."
        return
    n = f"over {result['prompts']:,} prompts" + (f" and {result['runs']} training seeds" if result["runs"] > 1 else "")
    if headline["conclusion"] == "within_noise":
        smallest = result["noise"]["smallest_effect"]
        yield f"The difference between {candidate} and {baseline} is within noise: {_said(headline, level)} {n}."
        if smallest:
            yield f"A comparison as noisy as this one finds a true difference of {smallest:.1f} points in {POWER:.0%} of cases; a smaller one may be there."
    else:
        yield f"{candidate} is {headline['conclusion']} than {baseline}: {_said(headline, level)} {n}."
    if result["runs"] == 1 or (result["runs"] == 2 and headline["interval"]):
        yield SEEDS[result["runs"]]
    for unit, length in result["lengths"].items():
        if unit == controlled["unit"]:
            yield f"Answers of {candidate} have {length['candidate']:,.0f} {unit} on average, those of {baseline} {length['baseline']:,.0f}."
    if controlled["win_rate"] is not None:
        low, high = controlled["interval"]
        noisy = ", which is within noise" if low <= 0 <= high else ""
        yield f"At equal length the difference would be {_said(controlled, level)}{noisy}."
    if invalid["pairs"]:
        could = "could" if invalid["could_change_conclusion"] else "could not"
        worst, best = invalid["worst"]["win_rate"], invalid["best"]["win_rate"]
        yield f"{invalid['pairs']:,} of {pairs:,} pairs have no verdict; they {could} change this conclusion (from {worst:+.1f} points, all lost, to {best:+.1f}, all won)."
    if judge["flip_rate"] > judge["agreement"]:
        yield f"The judge is not fit for this: it prefers the other answer in {judge['flip_rate']:.0%} of pairs when their places change, the same one in {judge['agreement']:.0%}."

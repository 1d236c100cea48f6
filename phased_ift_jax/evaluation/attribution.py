"""Where a gain comes from, of the arms of one experiment: order, selection, restarts of the schedule, length (keys: docs/formats.md).

Each line sets an arm against another that differs from it in one thing. What differs is paired: the same seed is the same pair, so that what a
seed does to both arms alike is in no interval. A gain is positive where the first arm is better: its held-out loss lower, its win rate higher.
The lines are no sum: one may hold part of another.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from phased_ift_jax.evaluation.comparison import estimated
from phased_ift_jax.evaluation.statistics import ALIKE, RESAMPLES, student
from phased_ift_jax.evaluation.win_rate import points, scores_of
from phased_ift_jax.records import Judgment

LEVEL = 0.95
LINES = {  # what: its arm, the arm that this is set against, and both in words
    "total": ("phased", "one_off", "Phased against one-off"),
    "order": ("phased", "random", "Order: phased against random phases of the same sizes"),
    "reversal": ("phased", "reversed", "Order: phased against the reversed order"),
    "selection": ("last_alone_equal_steps", "one_off", "Selection: the last stage alone, with as many steps, against one-off"),
    "restarts": ("one_off_restarts", "one_off", "Restarts of the schedule: one-off with them against one-off without"),
    "length": ("by_length", "random", "Length: phases by length against random phases"),
}
Losses = Mapping[str, Mapping[int, Mapping[str, float]]]  # of each arm and seed, the held-out loss of each bin after the last phase
Judged = Mapping[str, Mapping[int, Sequence[Judgment]]]  # of each arm and seed, judgments against the baseline arm of that seed


def of_report(found: Mapping[str, Any], judged: Judged, baseline: str) -> dict[str, Any]:
    """The attribution of what `report.gather` found of an experiment's runs."""
    runs = found["runs"]
    ended = {arm["name"]: [runs[n] for n in arm["runs"] if runs[n]["finished"]] for arm in found["arms"]}
    losses = {name: {run["seed"]: run["forgetting"]["rows"][-1]["loss"] for run in of_arm} for name, of_arm in ended.items()}
    return attribute(losses, found["budget"]["arms"], judged, baseline)


def attribute(losses: Losses, budgets: Mapping[str, Mapping[str, float]], judged: Judged | None = None, baseline: str = "one_off") -> dict[str, Any]:
    """Every line, with intervals over seeds (of win rates over prompts, too) and by how much the two arms' budgets differ."""
    lines = []
    for what, (arm, against, words) in LINES.items():
        line: dict[str, Any] = {"what": what, "arm": arm, "against": against, "loss": _loss(losses.get(arm, {}), losses.get(against, {}))}
        line["win_rate"] = _win_rate(judged or {}, arm, against, baseline)
        both = [budgets.get(name, {}) for name in (arm, against)]
        line["budget"] = {measure: both[0][measure] / value - 1 for measure, value in both[1].items() if value and measure in both[0]}
        line["unlike"] = [measure for measure, share in line["budget"].items() if abs(share) > ALIKE]
        lines.append(line | {"title": words, "words": f"{words}: {'; '.join(_said(line))}."})
    return {"level": LEVEL, "baseline": baseline, "lines": lines, "words": [line["words"] for line in lines]}


def _loss(mine: Mapping[int, Mapping[str, float]], theirs: Mapping[int, Mapping[str, float]]) -> dict[str, Any] | None:
    """Gains of the bins and of their mean, in nats a token; None without a seed and a bin in common."""
    seeds = sorted(mine.keys() & theirs.keys())
    bins = [name for name in (mine[seeds[0]] if seeds else ()) if all(name in arm[seed] for arm in (mine, theirs) for seed in seeds)]
    if not bins:
        return None
    gains_KB = np.array([[theirs[seed][name] - mine[seed][name] for name in bins] for seed in seeds])
    return {"seeds": seeds, "mean": _figures(gains_KB.mean(1)), "bins": {name: _figures(gains_K) for name, gains_K in zip(bins, gains_KB.T, strict=True)}}


def _figures(gains_K: np.ndarray) -> dict[str, Any]:
    gain, interval = student(gains_K, LEVEL)
    conclusion = "no_verdict" if interval is None else "within_noise" if interval[0] <= 0 <= interval[1] else "better" if gain > 0 else "worse"
    return {"gain": gain, "interval": interval, "conclusion": conclusion, "by_seed": gains_K.tolist()}


def _win_rate(judged: Judged, arm: str, against: str, baseline: str) -> dict[str, Any] | None:
    """Gain in points of win rate against the baseline, prompt by prompt; the baseline itself ties with itself. None where either was not judged."""
    sides = [{seed: _points(found) for seed, found in judged.get(name, {}).items()} for name in (arm, against) if name != baseline]
    seeds = sorted(set.intersection(*(set(side) for side in sides)))
    prompts = [prompt for prompt in (sides[0][seeds[0]] if seeds else ()) if all(prompt in side[seed] for side in sides for seed in seeds)]
    if not prompts:
        return None
    signs = [1.0 if name == arm else -1.0 for name in (arm, against) if name != baseline]
    gains_KP = np.array([[sum(sign * side[seed][prompt] for sign, side in zip(signs, sides, strict=True)) for prompt in prompts] for seed in seeds])
    sets = np.array([test_set for test_set, _ in prompts])
    figures = estimated([gains_KP[:, sets == name] for name in dict.fromkeys(sets.tolist())], np.nan, RESAMPLES, 0, LEVEL, reach=1.0)
    return {"seeds": seeds, "prompts": len(prompts), "gain": figures.pop("win_rate")} | figures


def _points(judgments: Sequence[Judgment]) -> dict[tuple[str, str], float]:
    return {(judgment.test_set, judgment.id): float(point) for judgment, point in zip(judgments, points(scores_of(judgments)), strict=True)}


def _said(line: Mapping[str, Any]) -> Iterator[str]:
    """What a line says, in words."""
    measured = [(line["loss"]["mean"], 3, "nats in mean held-out loss", line["loss"]["seeds"])] if line["loss"] else []
    measured += [(line["win_rate"], 1, "points in win rate", line["win_rate"]["seeds"])] if line["win_rate"] else []
    for figures, digits, unit, seeds in measured:
        said = f"a gain of {figures['gain']:+.{digits}f} {unit}" if figures["gain"] is not None else f"no {unit}"
        if figures["interval"]:
            over = f"{len(seeds)} seeds" if len(seeds) > 1 else "prompts of one seed"
            said += " ({:.0%} interval {:+.{d}f} to {:+.{d}f} over {})".format(LEVEL, *figures["interval"], over, d=digits)
        yield {"no_verdict": ""}.get(figures["conclusion"], figures["conclusion"].replace("_", " ") + ", ") + said
        if len(seeds) == 1 and not figures["interval"]:
            yield "one seed, so no interval: nothing says whether that is more than noise"
    if not measured:
        yield f"not measured, which needs the arms {line['arm']} and {line['against']}, finished, of one seed"
    elif line["unlike"]:
        yield "budgets differ: " + ", ".join(f"{measure.replace('_', ' ')} {line['budget'][measure]:+.1%}" for measure in line["unlike"])

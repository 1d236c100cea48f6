"""Laws of an experiment: arms differ in what they name and in nothing else, a kill changes no figure, and the attribution finds what was planted."""

from __future__ import annotations

import numpy as np
import pytest

from phased_ift_jax.evaluation.attribution import LINES, attribute
from phased_ift_jax.records import Judged, Judgment

ARMS = ("phased", "one_off", "one_off_restarts", "random", "reversed", "last_alone_equal_steps", "by_length")
BUDGET = {"examples": 100, "optimizer_steps": 10, "sum_of_learning_rates": 1e-3}


# --- the attribution, of matrices made up --------------------------------------------------------------------------------------------


def losses(rng, effects, seeds=5, noise=0.01, shared=0.5):
    """Losses of two bins: what a seed does to all arms, the arm's own gain in each bin, and noise of each cell."""
    of_seed = rng.normal(0, shared, (seeds, 2))
    return {
        arm: {seed: dict(zip(("easy", "hard"), (3.0 + of_seed[seed] - np.array(effects.get(arm, (0, 0))) + rng.normal(0, noise, 2)).tolist(), strict=True)) for seed in range(seeds)}
        for arm in ARMS
    }


def lines(found):
    return {line["what"]: line for line in found["lines"]}


PLANTED = {"phased": (0.10, 0.30), "random": (0.05, 0.10), "reversed": (-0.20, 0.10), "last_alone_equal_steps": (-0.50, 0.20), "one_off_restarts": (0.06, 0.06), "by_length": (0.05, 0.25)}
GAINS = {"total": (0.10, 0.30), "order": (0.05, 0.20), "reversal": (0.30, 0.20), "selection": (-0.50, 0.20), "restarts": (0.06, 0.06), "length": (0.0, 0.15)}


def test_planted_effects_are_recovered():
    """Each bin's, and their mean's, though what seeds do to all arms alike is ten times as large."""
    found = lines(attribute(losses(np.random.default_rng(0), PLANTED, noise=0.002), dict.fromkeys(ARMS, BUDGET)))
    assert list(found) == list(LINES)
    for what, planted in GAINS.items():
        for figures, gain in ((found[what]["loss"]["bins"]["easy"], planted[0]), (found[what]["loss"]["bins"]["hard"], planted[1]), (found[what]["loss"]["mean"], sum(planted) / 2)):
            assert figures["gain"] == pytest.approx(gain, abs=0.006)
            assert len(figures["by_seed"]) == 5
            if gain:
                assert figures["conclusion"] == ("better" if gain > 0 else "worse"), what
    assert "a gain of +0.125 of mean held-out loss" in found["order"]["words"] or "a gain of +0.12" in found["order"]["words"]
    assert "worse, -0.15" in found["selection"]["words"]


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Of 400 made-up experiments 95 % do, and where there is no effect as many are within noise: three standard errors to either side."""
    rng, runs = np.random.default_rng(1), 400
    held = {"effect": 0, "none": 0}
    for _ in range(runs):
        found = lines(attribute(losses(rng, {"phased": (0.02, 0.02)}), {}))
        low, high = found["order"]["loss"]["mean"]["interval"]
        held["effect"] += low <= 0.02 <= high
        held["none"] += found["restarts"]["loss"]["mean"]["conclusion"] == "within_noise"
    for count in held.values():
        assert abs(count / runs - 0.95) < 3 * (0.95 * 0.05 / runs) ** 0.5


def test_one_seed_has_no_interval_and_says_so():
    found = lines(attribute(losses(np.random.default_rng(0), PLANTED, seeds=1), {}))
    for line in found.values():
        assert line["loss"]["mean"]["interval"] is None
        assert line["loss"]["mean"]["conclusion"] == "no_verdict"
        assert "one seed, so no interval" in line["words"]


def test_only_seeds_that_both_arms_have_are_pairs_and_a_missing_arm_is_told():
    made = losses(np.random.default_rng(0), PLANTED)
    made["random"] = {seed: made["random"][seed] for seed in (3, 1)}
    del made["by_length"]
    found = lines(attribute(made, {}))
    assert found["order"]["loss"]["seeds"] == [1, 3]
    assert found["order"]["loss"]["mean"]["by_seed"] == [np.mean([made["random"][seed][name] - made["phased"][seed][name] for name in ("easy", "hard")]) for seed in (1, 3)]
    assert found["length"]["loss"] is None
    assert "not measured, which needs the arms by_length and random" in found["length"]["words"]


def test_budgets_that_differ_stand_beside_the_line():
    budgets = dict.fromkeys(ARMS, BUDGET) | {"one_off_restarts": BUDGET | {"sum_of_learning_rates": 1.1e-3, "optimizer_steps": 10.05}}
    found = lines(attribute(losses(np.random.default_rng(0), {}), budgets))
    assert found["restarts"]["budget"] == {"examples": 0.0, "optimizer_steps": pytest.approx(0.005), "sum_of_learning_rates": pytest.approx(0.1)}
    assert found["restarts"]["unlike"] == ["sum_of_learning_rates"]
    assert "budgets differ: sum of learning rates +10.0%" in found["restarts"]["words"]
    assert found["order"]["unlike"] == []


def judgments(rng, arm, seed, shift, prompts=200):
    """Of prompts that have a difficulty of their own, which all arms share."""
    own = np.random.default_rng(9).normal(0, 1, prompts)
    better = own + shift + rng.normal(0, 0.5, prompts) > 0
    return [Judgment(str(i), "set", f"{arm}-{seed}", f"one_off-{seed}", "a judge", (Judged("ok", (7.0, 5.0) if good else (5.0, 7.0)),) * 2) for i, good in enumerate(better)]


def test_win_rates_are_paired_by_seed_and_prompt():
    """Order is what phased wins more than random does, both against the baseline; against the baseline itself it is the win rate."""
    rng = np.random.default_rng(2)
    judged = {arm: {seed: judgments(rng, arm, seed, shift) for seed in range(3)} for arm, shift in (("phased", 1.0), ("random", 0.0), ("reversed", 1.0))}
    found = lines(attribute(losses(rng, {}), {}, judged))
    rate = {arm: 100 * np.mean([[one.orders[0].scores == (7.0, 5.0) for one in of_seed] for of_seed in seeds.values()]) - 50 for arm, seeds in judged.items()}
    assert found["total"]["win_rate"]["gain"] == pytest.approx(rate["phased"])
    assert found["order"]["win_rate"]["gain"] == pytest.approx(rate["phased"] - rate["random"])
    assert found["order"]["win_rate"]["conclusion"] == "better"
    assert found["reversal"]["win_rate"]["conclusion"] == "within_noise"
    assert found["length"]["win_rate"] is None
    assert f"{rate['phased'] - rate['random']:+.1f} points of win rate" in found["order"]["words"]

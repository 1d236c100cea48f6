"""Statistics against known answers: planted effects, other libraries, and figures computed another way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from phased_ift_jax.evaluation.comparison import compare, estimated
from phased_ift_jax.evaluation.statistics import (
    Variance,
    bootstrap,
    holm,
    interval,
    is_similar,
    judge_noise,
    length_controlled,
    sign_test,
    variance,
)
from phased_ift_jax.evaluation.win_rate import overall, size_weighted
from phased_ift_jax.records import Judged, Judgment

Measured = Callable[[str, float], None]
SIX = (252, 218, 180, 80, 188, 129)  # the paper's sets
DRAWS = 1000


def drawn(rng: np.random.Generator, sizes: tuple[int, ...], runs: int, seeds: float, prompts: float, noise: float, shift: float = 0.0, invalid: float = 0.0) -> list[np.ndarray]:
    """Points of each set, (K, P): a win above 0.3, a loss below -0.3 of what seed, prompt and chance add up to."""
    of_seed = seeds * rng.normal(size=(runs, 1))
    latent = [shift + of_seed + prompts * rng.normal(size=size) + noise * rng.normal(size=(runs, size)) for size in sizes]
    return [np.where(rng.random(each.shape) < invalid, np.nan, (each > 0.3) * 0.5 - (each < -0.3) * 0.5) for each in latent]


def true_rate(spread: float, shift: float) -> float:
    return float(0.5 * stats.norm.sf((0.3 - shift) / spread) - 0.5 * stats.norm.cdf((-0.3 - shift) / spread))


def drawn_lengths(rng: np.random.Generator, pairs: int, ratio: float = 1.5) -> np.ndarray:
    return np.exp(rng.normal((math.log(400 * ratio), math.log(400)), 0.6, (pairs, 2))).round()


@pytest.mark.parametrize(("sizes", "shift", "invalid"), [(SIX, 0.0, 0.0), (SIX, 0.3, 0.05), ((80, 188), 0.15, 0.0)])
def test_the_bootstrap_interval_holds_the_truth_in_95_percent(measured: Measured, sizes: tuple[int, ...], shift: float, invalid: float) -> None:
    """1,000 data sets, 1,000 resamples of each (10,000 are the default)."""
    rng, truth, hits = np.random.default_rng(3), true_rate(1.0, shift), 0
    for draw in range(DRAWS):
        low, high = interval(size_weighted(bootstrap(drawn(rng, sizes, 1, 0, 0, 1, shift, invalid), 1000, draw), sizes))
        hits += low <= truth <= high
    measured(f"coverage of the 95 % bootstrap interval, {sum(sizes)} prompts, {invalid:.0%} invalid", hits / DRAWS)
    assert 0.93 <= hits / DRAWS <= 0.97


def test_the_bootstrap_draws_prompts_within_their_set_as_an_explicit_one_does() -> None:
    """Resampling indices, one prompt at a time: the same mean, deviation and quantiles, set by set and of two runs."""
    rng = np.random.default_rng(0)
    sets = drawn(rng, (40, 90), 2, 0.2, 0.5, 0.5, 0.1, 0.1)
    ours, explicit = bootstrap(sets, 20_000, 1), np.empty((2, 8_000))
    for draw in range(8_000):
        runs = rng.integers(2, size=2)
        for number, points_KP in enumerate(sets):
            explicit[number, draw] = np.nanmean(points_KP[runs][:, rng.integers(points_KP.shape[1], size=points_KP.shape[1])])
    assert ours.mean(1) == pytest.approx(explicit.mean(1), abs=0.003)
    assert ours.std(1) == pytest.approx(explicit.std(1), rel=0.03)
    assert np.quantile(ours, [0.025, 0.975], 1) == pytest.approx(np.quantile(explicit, [0.025, 0.975], 1), abs=0.006)
    assert np.corrcoef(ours)[0, 1] == pytest.approx(np.corrcoef(explicit)[0, 1], abs=0.03)  # the same runs in both sets


def test_the_bootstrap_is_a_function_of_its_seed_and_fast(measured: Measured) -> None:
    sets = drawn(np.random.default_rng(0), SIX, 3, 0.2, 0.5, 0.5)
    started = time.perf_counter()
    one = bootstrap(sets)
    measured("seconds of 10,000 resamples of 3 x 1,047 pairs", time.perf_counter() - started)
    assert one.shape == (6, 10_000)
    assert (one == bootstrap(sets)).all()
    assert (one != bootstrap(sets, seed=1)).any()


def test_both_orders_together_are_wider_than_two_independent_games() -> None:
    """Why prompts are resampled: with orders that agree, twice as many games would give an interval too narrow by the root of two."""
    games = np.repeat(drawn(np.random.default_rng(0), (200,), 1, 0, 0, 1)[0], 2, axis=1)
    assert bootstrap([games[:, ::2]]).std() == pytest.approx(math.sqrt(2) * bootstrap([games]).std(), rel=0.05)


@settings(deadline=None)
@given(st.integers(0, 400), st.integers(0, 400))
def test_the_sign_test_is_scipys_and_the_binomial_sum(wins: int, losses: int) -> None:
    p, n = sign_test(wins, losses), wins + losses
    assert p == (stats.binomtest(wins, n, 0.5, alternative="two-sided").pvalue if n else 1.0)
    assert p == pytest.approx(min(1.0, 2 * sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n))


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_is_statsmodels(p_values: list[float]) -> None:
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    ours = holm({str(number): p for number, p in enumerate(p_values)})
    assert [ours[str(number)] for number in range(len(p_values))] == pytest.approx(multitest.multipletests(p_values, method="holm")[1].tolist())


@pytest.mark.parametrize(("runs", "seeds", "least", "most"), [(3, 0.0, 0.93, 0.99), (3, 0.1, 0.91, 0.98), (3, 0.3, 0.90, 0.97), (5, 0.1, 0.92, 0.97)])
def test_the_variance_of_seeds_and_prompts(measured: Measured, runs: int, seeds: float, least: float, most: float) -> None:
    """The law var_seed / K + var_prompt / P is the variance that is seen over 1,000 repeated experiments, and Student's interval with it covers."""
    rng, sizes = np.random.default_rng(5), (80, 188)
    truth, rates, found, hits, narrow = true_rate(math.sqrt(seeds**2 + 0.5**2 + 0.8**2), 0.15), [], [], 0, 0
    for draw in range(DRAWS):
        sets = drawn(rng, sizes, runs, seeds, 0.5, 0.8, 0.15)
        rates.append(overall(sets))
        found.append(variance(sets))
        low, high = found[-1].interval(rates[-1])
        hits += low <= truth <= high
        if seeds == 0.3:
            low, high = interval(size_weighted(bootstrap(sets, 300, draw), sizes))
            narrow += low <= truth <= high
    measured(f"coverage of Student's interval, {runs} seeds that vary by {seeds}", hits / DRAWS)
    if seeds == 0.3:
        measured(f"coverage of the seed x prompt bootstrap, {runs} seeds that vary by {seeds}", narrow / DRAWS)
        assert narrow < 0.88 * DRAWS  # why it is not the headline's
    assert all(each.total == pytest.approx(each.of_seeds / runs + each.of_prompts / 268) for each in found)
    if seeds:  # without any, an estimate that may not be negative is too large
        assert np.mean([each.total for each in found]) == pytest.approx(np.var(rates, ddof=1), rel=0.15)
    assert np.mean([each.total for each in found]) >= 0.88 * np.var(rates, ddof=1)
    assert least <= hits / DRAWS <= most


def test_the_standard_error_of_one_run_is_the_bootstraps() -> None:
    sets = drawn(np.random.default_rng(2), SIX, 1, 0, 0, 1, 0.1, 0.1)
    assert variance(sets).of_seeds is None
    assert variance(sets).standard_error == pytest.approx(size_weighted(bootstrap(sets), SIX).std(), rel=0.03)


def test_the_variance_of_too_few() -> None:
    """A set with one valid prompt has the most variance that there can be; one prompt in all has none that is known."""
    wide, alone = np.array([[0.5, -0.5] * 20]), np.array([[0.5]])
    assert variance([alone]) is None
    assert variance([np.full((1, 9), np.nan)]) is None
    assert variance([wide, alone]).total == pytest.approx((40 / 41) ** 2 * 0.25 * 40 / 39 / 40 + (1 / 41) ** 2 * 0.25)
    assert variance([np.zeros((2, 9))]).interval(0.0) == (0.0, 0.0)
    assert variance([2 * wide, 2 * alone], reach=1.0).total == pytest.approx(4 * variance([wide, alone]).total), "in other units it is the same"


@settings(deadline=None)
@given(st.sampled_from([-0.5, 0.5]), st.integers(1, 60), st.integers(1, 3), st.sampled_from([0.5, 0.9, 0.95, 0.99]))
def test_equal_points_have_the_exact_interval(point: float, prompts: int, runs: int, level: float) -> None:
    """Clopper's and Pearson's, which scipy has; it leaves out zero where the sign test says so."""
    runs = runs if prompts > 1 else 1  # of one prompt, the variance over runs is not known
    found = estimated([np.full((runs, prompts), point)], np.nan, 50, 0, level)
    wins = prompts if point > 0 else 0
    exact = stats.binomtest(wins, prompts).proportion_ci(level, method="exact")
    assert found["interval"] == pytest.approx([100 * exact.low - 50, 100 * exact.high - 50])
    assert (found["conclusion"] == "within_noise") == (found["sign_test"]["p"] >= 1 - level)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([-0.5, 0.0, 0.5]), st.integers(1, 40), st.integers(0, 20)), min_size=1, max_size=4), st.sampled_from([0.5, 1.0]))
def test_what_does_not_vary_still_has_an_interval_of_width(sets: list[tuple[float, int, int]], reach: float) -> None:
    """Sets of equal points, and invalid ones: wide enough for the truth that is the least likely to look like this, and within what points can be."""
    points = [2 * reach * np.array([[point] * valid + [np.nan] * invalid]) for point, valid, invalid in sets]
    found = estimated(points, np.nan, 50, 0, 0.95, reach)
    low, high = (edge / 100 for edge in found["interval"])
    rate = found["win_rate"] / 100
    assert -reach <= low <= rate + 1e-9
    assert rate - 1e-9 <= high <= reach
    size = sum(valid + invalid for _, valid, invalid in sets)
    for point, valid, invalid in sets:  # unlike prompts in one set alone, as many as would be missed in 2.5 % of draws
        missed = (1 - 0.025 ** (1 / valid)) * (valid + invalid) / size
        assert low <= rate - missed * (2 * reach * point + reach) + 1e-9
        assert high >= rate + missed * (reach - 2 * reach * point) - 1e-9


@pytest.mark.parametrize("runs", [1, 2, 3])
def test_no_figure_has_an_interval_without_width(runs: int) -> None:
    """Also where the runs' points cancel, so that neither prompts nor seeds seem to vary."""
    rng = np.random.default_rng(0)
    tables = [rng.choice([-0.5, 0.0, 0.5, np.nan], (runs, prompts)) for prompts in (1, 2, 3, 6) for _ in range(40)]
    tables += [np.resize([[0.5, 0.0], [0.0, 0.5]], (runs, 6)), np.full((runs, 4), 0.5)]
    intervals = [found for points_KP in tables if (found := estimated([points_KP], np.nan, 200, 0, 0.95)["interval"])]
    assert len(intervals) > 50
    assert all(high - low > 1e-6 for low, high in intervals)


def test_the_smallest_effect_is_found_in_80_percent(measured: Measured) -> None:
    """From data without an effect comes the smallest one; data with it are then significant in 80 % of draws."""
    rng, sizes = np.random.default_rng(7), (80, 188)
    effect = float(np.mean([variance(drawn(rng, sizes, 1, 0, 0, 1)).smallest_effect() for _ in range(50)]))
    low, high = 0.0, 1.0
    for _ in range(40):
        low, high = ((low + high) / 2, high) if true_rate(1, (low + high) / 2) < effect else (low, (low + high) / 2)
    found = 0
    for draw in range(DRAWS):
        between = interval(size_weighted(bootstrap(drawn(rng, sizes, 1, 0, 0, 1, low), 500, draw), sizes))
        found += between[0] > 0
    measured("share of draws in which an effect of the smallest size is found (0.80 wanted)", found / DRAWS)
    assert 0.76 <= found / DRAWS <= 0.84
    assert Variance(None, 1.0, 0.01, 99).smallest_effect() == pytest.approx(0.1 * (1.959964 + 0.841621))


@pytest.mark.parametrize(("planted", "length"), [(0.0, 1.0), (0.5, 1.0), (-0.4, 0.6), (0.3, 0.0)])
def test_length_control_recovers_a_planted_effect_and_none_for_pure_length(measured: Measured, planted: float, length: float) -> None:
    """300 data sets of 1,047 pairs whose candidate is 1.5 times as long: the mean is the planted one, and intervals cover it."""
    rng, truth, rates, plain, hits = np.random.default_rng(11), 1 / (1 + math.exp(-planted)) - 0.5, [], [], 0
    for _ in range(300):
        lengths = drawn_lengths(rng, 1047)
        difference = lengths[:, 0] - lengths[:, 1]
        p = 1 / (1 + np.exp(-(planted + length * np.tanh(difference / difference.std()))))
        tied = rng.random(1047) < 0.1
        points = np.where(tied & (np.abs(p - 0.5) < 0.05), 0.0, (rng.random(1047) < p) - 0.5)
        found = length_controlled(points, lengths, np.arange(1047))
        rates.append(found["win_rate"])
        plain.append(points.mean())
        hits += found["interval"][0] <= truth <= found["interval"][1]
    measured(f"length-controlled less planted win rate, points (planted {planted}, length {length})", abs(100 * (np.mean(rates) - truth)))
    assert np.mean(rates) == pytest.approx(truth, abs=0.004)
    assert 0.92 <= hits / 300 <= 0.985
    if length:
        assert np.mean(plain) - truth > 0.03  # what it takes away


def test_the_length_model_is_statsmodels() -> None:
    sm = pytest.importorskip("statsmodels.api")
    rng, pairs = np.random.default_rng(0), 400
    lengths, points, prompts = drawn_lengths(rng, pairs), rng.choice([-0.5, 0.0, 0.5], pairs), np.arange(pairs) // 3
    difference = lengths[:, 0] - lengths[:, 1]
    model = sm.GLM(points + 0.5, sm.add_constant(np.tanh(difference / difference.std())), family=sm.families.Binomial())
    fit = model.fit(cov_type="cluster", cov_kwds={"groups": prompts, "use_correction": False})
    found = length_controlled(points, lengths, prompts)
    assert found["length_effect"] == pytest.approx(fit.params[1])
    assert found["length_effect_interval"] == pytest.approx(fit.conf_int()[1].tolist())
    assert found["win_rate"] == pytest.approx(1 / (1 + math.exp(-fit.params[0])) - 0.5)
    assert found["interval"] == pytest.approx((1 / (1 + np.exp(-fit.conf_int()[0])) - 0.5).tolist())


def test_length_control_without_an_answer_says_why() -> None:
    lengths, prompts = drawn_lengths(np.random.default_rng(0), 50), np.arange(50)
    difference = lengths[:, 0] - lengths[:, 1]
    for points, given_lengths, reason in (
        (np.full(50, np.nan), lengths, "no valid pair"),
        (np.zeros(50), np.full((50, 2), np.nan), "no valid pair"),
        (np.sign(difference) / 2, lengths, "no finite fit"),
        (np.full(50, 0.5), lengths, "no finite fit"),
        (np.zeros(50), np.tile([30.0, 20.0], (50, 1)), "differ in length by the same"),
    ):
        found = length_controlled(points, given_lengths, prompts)
        assert found["win_rate"] is found["interval"] is None
        assert reason in found["reason"]
    equal = length_controlled(np.resize([0.5, 0.5, -0.5, 0.0], 52), np.tile([20.0, 20.0], (52, 1)), np.arange(52))
    assert (equal["win_rate"], equal["length_effect"]) == (pytest.approx(0.125), None)
    assert length_controlled(np.zeros(50), lengths, prompts)["win_rate"] == 0


def test_similar_lengths() -> None:
    pairs = [(80, 100), (79, 100), (125, 100), (126, 100), (100, 100), (0, 0), (0, 5), (np.nan, np.nan)]
    assert is_similar(np.array(pairs, np.float64)).tolist() == [True, False, True, False, True, True, False, False]


def test_the_noise_of_judges_that_are_known() -> None:
    """One that always prefers the second place, one that always says the same, one that is silent."""
    second = judge_noise(np.array([[-1.0, 1.0]] * 10))
    assert (second["flip_rate"], second["agreement"], second["second"], second["second_of_decided"]) == (1, 0, 1, 1)
    steady = judge_noise(np.array([[1.0, 1.0], [-1.0, -1.0], [0.0, 0.0], [np.nan, 1.0]]))
    assert (steady["pairs"], steady["agreement"], steady["flip_rate"], steady["views"]) == (3, 1, 0, 7)
    assert (steady["first"], steady["tie"], steady["second"]) == (2 / 7, 2 / 7, 3 / 7)
    silent = judge_noise(np.full((4, 2), np.nan))
    assert (silent["pairs"], silent["views"], silent["agreement"], silent["second_of_decided"]) == (0, 0, None, None)


def judged(sets: list[np.ndarray], lengths: tuple[int, int] = (100, 100)) -> list[list[Judgment]]:
    """Judgments, run by run, that have these points."""
    scores = {0.5: (8.0, 7.0), 0.0: (7.0, 7.0), -0.5: (7.0, 8.0)}
    return [
        [
            Judgment(f"{number}", f"set {which}", f"new{run or ''}", f"old{run or ''}", "judge", (Judged("ok", scores[point]),) * 2, {"characters": lengths})
            for which, points_KP in enumerate(sets)
            for number, point in enumerate(points_KP[run].tolist())
        ]
        for run in range(len(sets[0]))
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6))
def test_a_conclusion_is_what_the_figures_say(seed: int) -> None:
    """Better or worse only where interval and sign test agree, in the words as well."""
    rng = np.random.default_rng(seed)
    found = compare(*judged(drawn(rng, (30, 20), int(rng.integers(1, 4)), 0.2, 0.5, 0.5, rng.normal() / 2)), resamples=500)
    headline = found["headline"]
    low, high = headline["interval"]
    expected = "within_noise" if low <= 0 <= high or headline["sign_test"]["p"] >= 0.05 else "better" if low > 0 else "worse"
    assert headline["conclusion"] == expected
    candidate, baseline = found["candidate"], found["baseline"]
    assert {"within_noise": "within noise", "better": f"{candidate} is better than {baseline}", "worse": f"{candidate} is worse than {baseline}"}[expected] in found["words"][0]
    assert f"{headline['win_rate']:+.1f} points" in found["words"][0]
    for one in found["rules"]["paper"]["sets"].values():
        assert one["sign_test"]["p_holm"] >= one["sign_test"]["p"]
        assert one["conclusion"] == "within_noise" or one["sign_test"]["p_holm"] < 0.05
    assert np.mean(found["by_run"]) == pytest.approx(headline["win_rate"])
    assert ("one training seed" in " ".join(found["words"])) == (found["runs"] == 1)


def test_one_pair_proves_nothing_and_seeds_that_disagree_are_noise() -> None:
    assert compare(*judged([np.array([[0.5]])]))["headline"]["conclusion"] == "within_noise"
    apart = np.repeat([[0.5], [0.5], [-0.5]], 100, axis=1)  # each seed alone would be beyond doubt
    found = compare(*judged([apart]))
    assert found["headline"]["conclusion"] == "within_noise"
    assert found["by_run"] == [50, 50, -50]
    assert found["noise"]["variance_of_seeds"] == pytest.approx(1 / 3)


def test_an_advantage_that_is_length_alone_is_said_to_be() -> None:
    rng = np.random.default_rng(4)
    lengths = drawn_lengths(rng, 600, 1.6)
    difference = lengths[:, 0] - lengths[:, 1]
    points = (rng.random(600) < 1 / (1 + np.exp(-2 * np.tanh(difference / difference.std())))) - 0.5
    judgments = [
        Judgment(each.id, each.test_set, each.candidate, each.baseline, each.judge, each.orders, {"characters": (int(one), int(two))})
        for each, (one, two) in zip(judged([points[None]])[0], lengths, strict=True)
    ]
    found = compare(judgments)
    assert found["headline"]["conclusion"] == "better"
    assert any(sentence.startswith("At equal length") and "within noise" in sentence for sentence in found["words"])
    assert found["lengths"]["characters"]["longer_wins"] > 0.7
    assert abs(found["similar_length"]["win_rate"]) < 12
    assert found["similar_length"]["pairs"] == is_similar(lengths).sum() > 50

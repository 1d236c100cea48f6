"""Figures of agreement: each equals its definition written out, is symmetric where it should be, and is None rather than NaN."""

from __future__ import annotations

import json
import math
from itertools import product
from random import Random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from phased_ift_jax.scoring import agreement
from phased_ift_jax.scoring.agreement import Figure

SCORE = st.sampled_from([1.0, 1.0, 1.5, 2.0, 2.25, 3.5, 4.0, 4.75, 5.0])  # many ties, as in real scores
PAIRS = st.lists(st.tuples(SCORE, SCORE), max_size=30)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
THRESHOLDS = st.sets(SCORE, max_size=3).map(sorted)
FIGURES = [agreement.exact, agreement.quadratic_weighted_kappa, agreement.spearman, agreement.pearson]
CORRELATIONS = FIGURES[1:]


def rows(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [a for a, _ in pairs], [b for _, b in pairs]


def close(figure: Figure, value: float | None) -> bool:
    return figure.value is None if value is None else figure.value is not None and math.isclose(figure.value, value, abs_tol=1e-9)


# --- known answers ---------------------------------------------------------------------------------------------------------------


def test_known_answers() -> None:
    a, b = [1, 2, 3, 4, 5], [1, 2, 3, 5, 4]
    assert close(agreement.exact(a, b), 0.6)
    assert close(agreement.quadratic_weighted_kappa(a, b), 0.9)  # 1 - (2 / 5) / (2 + 2)
    assert close(agreement.spearman(a, b), 0.9)  # 1 - 6 * 2 / (5 * 24)
    assert close(agreement.auc([0.1, 0.4, 0.35, 0.8], [False, False, True, True]), 0.75)
    assert agreement.phases([1.49, 1.5, 3.49, 3.5, 5], [1.5, 3.5]).tolist() == [0, 1, 1, 2, 2]
    assert close(agreement.changes_phase([1.0, 1.5, 4.0, 2.0], [1.5, 1.5, 3.5, 5.0], [1.5, 3.5]), 0.5)
    assert agreement.confusion([1.0, 1.5, 4.0, 2.0], [1.5, 1.5, 3.5, 5.0], [1.5, 3.5]).tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 1]]


def test_opposite_scorers_and_independent_ones() -> None:
    a = [1, 2, 3, 4, 5]
    assert close(agreement.quadratic_weighted_kappa(a, a[::-1]), -1)
    assert close(agreement.spearman(a, a[::-1]), -1)
    one, other = (np.array(row) for row in zip(*product(a, a), strict=True))
    assert close(agreement.quadratic_weighted_kappa(one, other), 0)
    assert close(agreement.pearson(one, other), 0)


def test_a_scorer_that_is_shifted_agrees_in_order_but_not_in_value() -> None:
    a = np.array([1.0, 2, 3, 4])
    assert close(agreement.spearman(a, a + 1), 1)
    assert close(agreement.quadratic_weighted_kappa(a, a + 1), 1 - 1 / 3.5)


# --- definitions -----------------------------------------------------------------------------------------------------------------


@given(PAIRS)
def test_kappa_is_one_minus_observed_over_chance(pairs: list[tuple[float, float]]) -> None:
    a, b = rows(pairs)
    chance = [(x - y) ** 2 for x in a for y in b]
    expected = 1 - (sum((x - y) ** 2 for x, y in pairs) / len(a)) / (sum(chance) / len(chance)) if sum(chance) else None
    assert close(agreement.quadratic_weighted_kappa(a, b), expected)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=30))
def test_kappa_of_whole_numbers_is_the_one_of_tables(pairs: list[tuple[int, int]]) -> None:
    table, weights = np.zeros((5, 5)), np.array([[(i - j) ** 2 / 16 for j in range(5)] for i in range(5)])
    for a, b in pairs:
        table[a - 1, b - 1] += 1
    chance = (weights * np.outer(table.sum(1), table.sum(0))).sum() / len(pairs)
    assert close(agreement.quadratic_weighted_kappa(*rows(pairs)), 1 - (weights * table).sum() / chance if chance else None)


@given(PAIRS)
def test_correlations_are_scipys(pairs: list[tuple[float, float]]) -> None:
    a, b = rows(pairs)
    defined = len(set(a)) > 1 and len(set(b)) > 1
    assert close(agreement.spearman(a, b), float(stats.spearmanr(a, b).statistic) if defined else None)
    assert close(agreement.pearson(a, b), float(stats.pearsonr(a, b).statistic) if defined else None)
    assert agreement.ranks(a).tolist() == stats.rankdata(a).tolist()


@given(st.lists(st.tuples(SCORE, st.booleans()), max_size=30))
def test_auc_counts_pairs_and_ties_half(scored: list[tuple[float, bool]]) -> None:
    inside, outside = [s for s, member in scored if member], [s for s, member in scored if not member]
    won = [(i > o) + (i == o) / 2 for i in inside for o in outside]
    scores, members = [s for s, _ in scored], [m for _, m in scored]
    assert close(agreement.auc(scores, members), sum(won) / len(won) if won else None)
    assert agreement.auc(scores, members).n == len(scored)
    turned = agreement.auc([-s for s in scores], members)
    assert close(turned, 1 - sum(won) / len(won) if won else None)


@given(PAIRS, THRESHOLDS)
def test_phases_are_those_of_a_plain_count(pairs: list[tuple[float, float]], thresholds: list[float]) -> None:
    a, b = rows(pairs)

    def phase(score: float) -> int:
        return sum(score >= threshold for threshold in thresholds)

    table = agreement.confusion(a, b, thresholds)
    assert table.shape == (len(thresholds) + 1,) * 2
    assert all(table[i, j] == sum((phase(x), phase(y)) == (i, j) for x, y in pairs) for i in range(len(table)) for j in range(len(table)))
    assert close(agreement.changes_phase(a, b, thresholds), 1 - np.trace(table) / len(a) if a else None)


def test_each_scorer_may_have_thresholds_of_its_own() -> None:
    reference, scores = [1.0, 2.0, 4.0], [10, 200, 3000]
    assert agreement.confusion(reference, scores, [1.5, 3.5], [100, 1000]).tolist() == np.eye(3).tolist()
    with pytest.raises(ValueError, match="1 thresholds against 2"):
        agreement.confusion(reference, scores, [1.5, 3.5], [100])


# --- laws ------------------------------------------------------------------------------------------------------------------------


@given(PAIRS, st.randoms())
def test_symmetric_and_blind_to_order(pairs: list[tuple[float, float]], random: Random) -> None:
    shuffled = list(pairs)
    random.shuffle(shuffled)
    for figure in FIGURES:
        a, b = rows(pairs)
        assert close(figure(b, a), figure(a, b).value)
        assert close(figure(*rows(shuffled)), figure(a, b).value)


@given(st.lists(SCORE, min_size=1))
def test_a_scorer_agrees_with_itself(scores: list[float]) -> None:
    assert agreement.exact(scores, scores) == Figure(1.0, len(scores))
    for figure in CORRELATIONS:
        assert close(figure(scores, scores), 1.0 if len(set(scores)) > 1 else None)


@given(st.lists(st.tuples(FINITE, FINITE), max_size=20))
def test_within_bounds_and_never_nan(pairs: list[tuple[float, float]]) -> None:
    """Whatever finite numbers there are, up to the ends of float64."""
    a, b = rows(pairs)
    for figure in FIGURES:
        value, n = figure(a, b)
        assert n == len(pairs)
        assert value is None or -1 - 1e-9 <= value <= 1 + 1e-9
    value, _ = agreement.auc(a, [x > y for x, y in pairs])
    assert value is None or 0 <= value <= 1


@pytest.mark.parametrize("a", [[], [3.0], [2.0, 2.0, 2.0]])
@pytest.mark.parametrize("constant", [1.0, 2.0, 0.1 + 0.2])
def test_constant_rows_correlate_with_nothing(a: list[float], constant: float) -> None:
    b = [constant] * len(a)
    assert agreement.spearman(a, b) == agreement.pearson(a, b) == Figure(None, len(a))
    assert agreement.exact(a, b).value == (None if not a else float(a[0] == constant))
    assert close(agreement.quadratic_weighted_kappa(a, b), None if not a or a[0] == constant else 0.0)
    json.dumps(agreement.summary(a, b, [1.5, 3.5]), allow_nan=False)


def test_one_constant_row_has_a_kappa_of_zero() -> None:
    """It agrees exactly as far as chance would."""
    assert agreement.quadratic_weighted_kappa([1, 2, 3], [2, 2, 2]).value == pytest.approx(0)
    assert agreement.spearman([1, 2, 3], [2, 2, 2]) == Figure(None, 3)


@pytest.mark.parametrize(
    ("a", "b", "says"),
    [([1, 2], [1], "of one length"), ([1, math.nan], [1, 2], "no finite"), ([[1], [2]], [[1], [2]], "two rows"), ([1, math.inf], [1, 2], "no finite")],
)
def test_what_cannot_be_compared_is_refused(a: list[float], b: list[float], says: str) -> None:
    for figure in FIGURES:
        with pytest.raises(ValueError, match=says):
            figure(a, b)


def test_auc_wants_a_membership_of_each() -> None:
    with pytest.raises(ValueError, match="2 scores and 1 memberships"):
        agreement.auc([1, 2], [True])


def test_a_summary_is_json_of_the_figures() -> None:
    a, b = [1.0, 1.5, 4.0, 2.0], [1.5, 1.5, 3.5, 5.0]
    summary = agreement.summary(a, b, [1.5, 3.5])
    assert json.loads(json.dumps(summary)) == summary
    assert {"n": 4, "exact": 0.25, "changes_phase": 0.5, "thresholds": [1.5, 3.5], "confusion": [[0, 1, 0], [0, 1, 1], [0, 0, 1]]}.items() <= summary.items()
    assert "changes_phase" not in agreement.summary(a, b)

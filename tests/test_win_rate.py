"""Verdicts and win rates: the paper's rule spelled out, real two-order logs replayed, its tables' averages, and files of judgments."""

from __future__ import annotations

import ast
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phased_ift_jax.evaluation.comparison import compare
from phased_ift_jax.evaluation.judgments import lengths_of, read_judgments, row_of, write_judgments
from phased_ift_jax.evaluation.win_rate import RULES, counted, overall, points, scores_of, size_weighted, tally
from phased_ift_jax.records import Judged, Judgment, UserError

JUDGES = ("gpt4", "gpt3.5")
SETS = ("vicuna", "koala")
OUTCOMES = ("refused", "filtered", "unparseable", "out_of_range", "failed", "no_answer")
# The nine branches, by which answer each order preferred (c: candidate, b: baseline, =: neither)
NINE = {"cc": "win", "c=": "win", "=c": "win", "==": "tie", "cb": "tie", "bc": "tie", "bb": "lose", "b=": "lose", "=b": "lose"}
CONSERVATIVE = NINE | {"c=": "tie", "=c": "tie", "b=": "tie", "=b": "tie"}

reasons = st.text(max_size=5) | st.just("\ud800")
orders = st.builds(lambda a, b: Judged("ok", (a / 2, b / 2)), *[st.integers(0, 20)] * 2) | st.builds(Judged, st.sampled_from(OUTCOMES), reason=reasons)
lengths = st.dictionaries(st.sampled_from(["characters", "words", "tokens"]), st.tuples(*[st.integers(0, 9999)] * 2))
judgments_of_one_pair = st.lists(
    st.builds(Judgment, st.text(), st.sampled_from("abc"), st.just("new"), st.just("old"), st.just("judge"), st.tuples(orders, orders), lengths),
    min_size=1,
    max_size=40,
    unique_by=lambda judgment: (judgment.test_set, judgment.id),
)


def made(pairs: list[tuple], test_set: str = "a", **more: object) -> list[Judgment]:
    """Judgments from pairs of (candidate's, baseline's) scores in both orders, None where an order failed."""
    both = [tuple(Judged("ok", order) if order else Judged("failed") for order in pair) for pair in pairs]
    return [Judgment(str(number), test_set, "new", "old", "judge", two, **more) for number, two in enumerate(both)]


def log_of(shared_data: Path, test_set: str, judge: str) -> Path:
    return shared_data / "judgments" / f"{test_set}_wrap_reviews_{judge}.json"


def replayed(shared_data: Path, judge: str) -> list[Judgment]:
    return [judgment for test_set in SETS for judgment in read_judgments(log_of(shared_data, test_set, judge), judge)]


def by_hand(rows: list[dict], rule: str) -> tuple[Counter, float]:
    """What a rule makes of a log, straight from its texts: counts, and the win rate."""
    seen: Counter = Counter()
    for row in rows:
        one, two = ast.literal_eval(row["scores"])
        second, first = ast.literal_eval(row["scores_reverse"])
        if rule == "official_script" and not (one > 0 and two > 0 and first > 0 and second > 0):
            seen["invalid"] += 1
            continue
        branch = ("c" if one > two else "b" if two > one else "=") + ("c" if first > second else "b" if second > first else "=")
        seen[(CONSERVATIVE if rule == "conservative" else NINE)[branch]] += 1
    divisor = len(rows) if rule == "official_script" else seen["win"] + seen["tie"] + seen["lose"]
    return seen, 100 * (seen["win"] + seen["tie"] / 2) / divisor - 50


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("judge", JUDGES)
def test_recorded_judgments_replayed_equal_what_is_counted_by_hand(shared_data: Path, judge: str, rule: str) -> None:
    found = compare(*[replayed(shared_data, judge)], resamples=100)["rules"][rule]
    total, weighted, prompts = Counter(), 0.0, 0
    for test_set in SETS:
        rows = json.loads(log_of(shared_data, test_set, judge).read_text())["data"]
        expected, rate = by_hand(rows, rule)
        assert {kind: found["sets"][test_set][kind] for kind in ("win", "tie", "lose", "invalid")} == {kind: expected[kind] for kind in ("win", "tie", "lose", "invalid")}
        assert found["sets"][test_set]["win_rate"] == pytest.approx(rate, abs=1e-9)
        total, weighted, prompts = total + expected, weighted + len(rows) * rate, prompts + len(rows)
    assert prompts == 260
    assert {kind: found[kind] for kind in ("win", "tie", "lose", "invalid")} == {kind: total[kind] for kind in ("win", "tie", "lose", "invalid")}
    assert found["win_rate"] == pytest.approx(weighted / prompts, abs=1e-9)


def test_zeros_are_scores_but_for_the_official_script(shared_data: Path) -> None:
    rules = compare(replayed(shared_data, "gpt4"), resamples=100)["rules"]
    assert (rules["paper"]["invalid"], rules["official_script"]["invalid"]) == (0, 4)
    assert rules["official_script"]["win_rate"] < rules["paper"]["win_rate"]


@pytest.mark.parametrize("judge", JUDGES)
def test_the_judges_own_noise(shared_data: Path, judge: str) -> None:
    """Counted by hand: how often the judge's two views of a pair agree, are opposite, and which place is preferred."""
    same = opposite = first = second = views = 0
    for test_set in SETS:
        for row in json.loads(log_of(shared_data, test_set, judge).read_text())["data"]:
            (one, two), (three, four) = ast.literal_eval(row["scores"]), ast.literal_eval(row["scores_reverse"])
            same += (one > two and four > three) or (one < two and four < three) or (one == two and three == four)
            opposite += (one > two and three > four) or (one < two and three < four)
            first, second, views = first + (one > two) + (three > four), second + (one < two) + (three < four), views + 2
    noise = compare(replayed(shared_data, judge), resamples=100)["judge_noise"]
    expected = {"pairs": 260, "agreement": same / 260, "flip_rate": opposite / 260, "views": views, "first": first / views, "second": second / views}
    assert expected == {key: noise[key] for key in expected}
    assert noise["second_of_decided"] == second / (first + second)
    unfit = [sentence for sentence in compare(replayed(shared_data, judge), resamples=100)["words"] if "not fit" in sentence]
    assert len(unfit) == (judge == "gpt3.5")


def test_the_size_weighted_average_gives_the_papers_tables(shared_data: Path) -> None:
    tables = json.loads((shared_data / "paper" / "win_rate_tables.json").read_text())
    sizes = tables["sizes"]
    off = [abs(float(size_weighted(np.array([row[name] for name in sizes]), list(sizes.values()))) - row["avg"]) for row in tables["rows"]]
    assert len(off) == 52
    assert max(off) < 0.02


def test_nine_branches() -> None:
    shown = {"c": (2.0, 1.0), "b": (1.0, 2.0), "=": (0.0, 0.0)}
    scores = scores_of(made([(shown[one], shown[two]) for one, two in NINE]))
    for rule, branches in (("paper", NINE), ("conservative", CONSERVATIVE)):
        assert [{0.5: "win", 0.0: "tie", -0.5: "lose"}[point] for point in points(scores, rule)] == list(branches.values())
    script = points(scores, "official_script")  # drops what has a zero, as each tie here
    assert np.isnan(script).tolist() == ["=" in branch for branch in NINE]
    np.testing.assert_array_equal(script[~np.isnan(script)], points(scores)[~np.isnan(script)])


@settings(deadline=None)
@given(judgments_of_one_pair)
def test_laws_of_counting(judgments: list[Judgment]) -> None:
    """Win + tie + lose + invalid are all prompts; exchanged models mirror the result; bounds hold; a dropped pair is a loss of both models."""
    mirrored = [
        Judgment(one.id, one.test_set, "old", "new", one.judge, tuple(Judged(order.outcome, order.scores and order.scores[::-1]) for order in one.orders)) for one in judgments
    ]
    found, mirror = compare(judgments, resamples=50), compare(mirrored, resamples=50)
    for rule, one in found["rules"].items():
        other = mirror["rules"][rule]
        assert one["win"] + one["tie"] + one["lose"] + one["invalid"] == one["pairs"] == len(judgments)
        assert sum(each["pairs"] for each in one["sets"].values()) == len(judgments)
        assert (one["win"], one["tie"], one["lose"], one["invalid"]) == (other["lose"], other["tie"], other["win"], other["invalid"])
        assert (one["win_rate"] is None) == (one["win"] + one["tie"] + one["lose"] == 0) == (one["conclusion"] == "no_verdict")
        if one["win_rate"] is not None and rule != "official_script":
            assert one["win_rate"] == pytest.approx(-other["win_rate"], abs=1e-9)
    invalid = found["invalid"]
    assert sum(invalid["outcomes"].values()) == invalid["pairs"] == found["rules"]["paper"]["invalid"]
    for name in ("excluded", "as_ties"):
        if (rate := invalid[name]["win_rate"]) is not None and all(each["win_rate"] is not None for each in found["rules"]["paper"]["sets"].values()):
            assert invalid["worst"]["win_rate"] - 1e-9 <= rate <= invalid["best"]["win_rate"] + 1e-9
    json.dumps(found, allow_nan=False)


def test_a_dead_judge_gives_no_verdict_and_never_a_tie() -> None:
    alive = made([((8.0, 7.0), (9.0, 7.0))] * 30)
    for dead in (made([(None, None)] * 50, "b"), made([((8.0, 7.0), None)] * 50, "b"), made([(None, (0.0, 0.0))] * 50, "b")):
        found = compare(dead)
        assert found["words"] == ["No verdict: of 50 pairs, the judge scored none in both orders."]
        rules, invalid = found["rules"].values(), found["invalid"]
        figures = [found["headline"], invalid["excluded"], invalid["as_ties"], *rules, *(rule["sets"]["b"] for rule in rules)]
        assert {(one["conclusion"], one["win_rate"], one["interval"]) for one in figures} == {("no_verdict", None, None)}
        assert [(rule["tie"], rule["invalid"]) for rule in rules] == [(0, 50)] * 3
        assert (invalid["worst"]["win_rate"], invalid["best"]["win_rate"]) == (-50, 50)
        half = compare(alive + dead)  # a set that is dead leaves the others' verdict as it is, and nothing in it becomes a tie
        assert (half["headline"]["win_rate"], half["invalid"]["as_ties"]["win_rate"]) == (50, 50)
        assert half["rules"]["official_script"]["sets"]["b"]["conclusion"] == "no_verdict"
        assert half["invalid"]["could_change_conclusion"]
        assert "50 of 80 pairs have no verdict; they could change this conclusion" in " ".join(half["words"])


def test_invalid_pairs_by_hand() -> None:
    """Six wins, two losses and two invalid: 6/8, (6 + 1)/10, 6/10, 8/10, each less a half."""
    found = compare(made([((2.0, 1.0), (2.0, 1.0))] * 6 + [((1.0, 2.0), (1.0, 2.0))] * 2 + [(None, (1.0, 2.0)), (None, None)]), resamples=100)
    assert [found["invalid"][name]["win_rate"] for name in ("excluded", "as_ties", "worst", "best")] == pytest.approx([25, 20, 10, 30])
    assert found["rules"]["official_script"]["win_rate"] == pytest.approx(10)
    assert found["rules"]["official_script"]["sign_test"] == found["rules"]["paper"]["sign_test"]  # what is dropped is no loss to a test
    assert found["invalid"]["outcomes"] == {"failed": 2}
    filtered = Judgment("1", "a", "new", "old", "judge", (Judged("ok", (1.0, 2.0)), Judged("filtered")))
    assert compare([filtered], resamples=10)["invalid"]["outcomes"] == {"filtered": 1}


def test_a_mean_of_points_is_the_papers_formula() -> None:
    one = np.array([0.5, 0.5, 0.0, -0.5, np.nan])
    assert tally(one) == {"win": 2, "tie": 1, "lose": 1, "invalid": 1, "pairs": 5}
    assert overall([one[None]]) == (2 + 0.5) / 4 - 0.5
    assert overall([counted(one, -0.5)[None]]) == pytest.approx((2 + 0.5) / 5 - 0.5)


def test_sets_weigh_by_their_prompts() -> None:
    won, lost, none = np.full((1, 3), 0.5), np.full((1, 1), -0.5), np.full((1, 5), np.nan)
    assert overall([won, lost]) == (3 * 0.5 - 0.5) / 4
    assert overall([won, lost, none]) == overall([won, lost])  # a set without a verdict has no weight


@settings(deadline=None)
@given(judgments_of_one_pair)
def test_judgments_are_read_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, judgments: list[Judgment]) -> None:
    path = tmp_path_factory.mktemp("judgments") / "judgments.jsonl"
    write_judgments(path, judgments)
    assert read_judgments(path) == judgments


def test_a_log_as_our_own_lines_gives_the_same_comparison(shared_data: Path, tmp_path: Path) -> None:
    logged = replayed(shared_data, "gpt4")
    write_judgments(tmp_path / "judgments.jsonl", logged)
    assert compare(read_judgments(tmp_path / "judgments.jsonl")) == compare(logged)
    assert logged[0].lengths == lengths_of(*(json.loads(log_of(shared_data, "vicuna", "gpt4").read_text())["data"][0][name] for name in ("Answer1", "Answer2")))


LINE = row_of(made([((8.0, 7.0), (9.0, 7.0))])[0])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no judgment"),
        ("[1, 2]", ":1: not a judgment"),
        (json.dumps(LINE)[:-9], ":1: not a judgment"),
        (json.dumps(LINE) + "\n" + json.dumps(LINE | {"id": 7}), ":2: not a judgment (id, set, candidate, baseline, judge are not all texts)"),
        (json.dumps({key: LINE[key] for key in LINE if key != "judge"}), "(no 'judge')"),
        (json.dumps(LINE | {"orders": LINE["orders"][::-1]}), "`orders` are not two"),
        (json.dumps(LINE | {"orders": LINE["orders"][:1]}), "`orders` are not two"),
        (json.dumps(LINE | {"orders": [LINE["orders"][0], LINE["orders"][1] | {"outcome": "failed"}]}), "only `ok` has scores"),
        (json.dumps(LINE | {"orders": [LINE["orders"][0], LINE["orders"][1] | {"scores": None}]}), "no two scores"),
        (json.dumps(LINE | {"orders": [LINE["orders"][0], LINE["orders"][1] | {"scores": [1, 11]}]}), "beyond 0 to 10"),
        (json.dumps(LINE | {"lengths": {"words": [1, -2]}}), "`lengths` are not pairs"),
        (json.dumps(LINE | {"lengths": [1, 2]}), "`lengths` are not pairs"),
        (json.dumps(LINE | {"orders": [LINE["orders"][0] | {"outcome": "failed", "scores": None, "reason": {}}, LINE["orders"][1]]}), "`reason` and `key` are not texts"),
        (json.dumps({"data": [], "Meta_Info": {"dataset_name": "a"}}), "holds no judgment"),
        (json.dumps({"data": [{}]}), "is no recorded log"),
        (json.dumps({"data": 3, "Meta_Info": {"dataset_name": "a"}}), "is no recorded log"),
    ],
)
def test_what_is_no_judgment_is_refused_in_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "judgments.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        read_judgments(path)
    assert said in str(refused.value)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["words", "first", "scores", "a"]), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([*((key,) for key in LINE), *(("orders", order, key) for order in (0, 1) for key in LINE["orders"][0]), ("lengths", "words")]), json_values)
def test_a_line_is_a_judgment_or_refused_whatever_stands_in_it(tmp_path_factory: pytest.TempPathFactory, place: tuple, value: object) -> None:
    row = json.loads(json.dumps(LINE))
    inside = row
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    path = tmp_path_factory.mktemp("judgments") / "judgments.jsonl"
    path.write_text(json.dumps(row))
    try:
        found = read_judgments(path)
    except UserError:
        return
    assert compare(found, resamples=10)["prompts"] == 1
    write_judgments(path, found)
    assert read_judgments(path) == found


@pytest.mark.parametrize("scores", ["[-1, -1]", "[8.0]", "8 7", "", None, "[NaN, 3]", "[true, 3]", "[8.0, 7.0, 1.0]", "[11, 3]", '["8", "7"]'])
def test_a_recorded_score_that_is_none_is_an_invalid_order(tmp_path: Path, scores: str | None) -> None:
    path = tmp_path / "log.json"
    row = {"text": "Why?", "Answer1": "a b", "Answer2": "c", "scores": "[8.0, 7.0]", "scores_reverse": scores}
    path.write_text(json.dumps({"Meta_Info": {"dataset_name": "vicuna"}, "data": [row]}))
    (judgment,) = read_judgments(path, "gpt-4")
    assert judgment.orders[0].scores == (8.0, 7.0)
    assert judgment.orders[1].scores is None
    assert judgment.orders[1].outcome in ("unparseable", "out_of_range")
    assert compare([judgment])["headline"]["conclusion"] == "no_verdict"


def test_recorded_scores_by_place_become_scores_by_model(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    row = {"text": "Why?", "Answer1": "a b", "Answer2": "c", "scores": "[8.0, 7.0]", "scores_reverse": "[5.0, 9.0]"}
    path.write_text(json.dumps({"Meta_Info": {"dataset_name": "vicuna"}, "data": [row]}))
    (judgment,) = read_judgments(path, "gpt-4")
    assert [order.scores for order in judgment.orders] == [(8.0, 7.0), (9.0, 5.0)]


def test_judgments_that_are_not_of_one_comparison_are_refused() -> None:
    one = made([((8.0, 7.0), (9.0, 7.0))] * 3)
    other = [Judgment(each.id, each.test_set, "third", each.baseline, each.judge, each.orders) for each in one]
    judge = [Judgment(each.id, each.test_set, each.candidate, each.baseline, "another", each.orders) for each in one]
    for runs, said in (
        ([[]], "no judgments"),
        ([one, []], "no judgments"),
        ([one + one[:1]], "'0' of 'a' was judged 2 times in run 1"),
        ([one, one[:2]], "'2' of 'a' is not in both run 1 and run 2"),
        ([one[:2] + other[2:]], "several pairs of models"),
        ([one, judge], "several judges, another, judge"),
        ([one, one], "runs 1 and 2 are both of 'new' against 'old'"),
        ([one, other, one], "runs 1 and 3 are both of 'new' against 'old'"),
    ):
        with pytest.raises(UserError, match=said):
            compare(*runs)
    assert compare(one, other, resamples=50)["candidate"] == "new, third"  # each seed's model has its own name

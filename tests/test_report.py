"""Laws of the report: every number comes from a file, all text is text, and the page opens in a real browser, alone."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_run import make_config, rows, train  # noqa: F401 - rows is a fixture

from phased_ift_jax import report as verb
from phased_ift_jax.evaluation import page, report
from phased_ift_jax.evaluation.forgetting import ANSWERS, ForgettingMatrix
from phased_ift_jax.evaluation.judgments import lengths_of, write_judgments
from phased_ift_jax.records import Judged, Judgment, UserError

HOSTILE = [
    "</script><script>window.hit = 1</script>",
    '"><img src=x onerror="window.hit = 1">',
    "<svg/onload=window.hit=1>",
    "{{ 7 * 7 }}",
    "javascript:hit()" + "_long" * 40,
    "\u202eabc\u0000\ud800",
]
LIMIT = 5_000_000


@pytest.fixture(scope="module")
def runs(rows, tmp_path_factory, compilation_cache) -> Path:  # noqa: F811
    """Two seeds of the phased arm, and one of one_off and random each, in a folder: small, and trained."""
    folder = tmp_path_factory.mktemp("runs")
    few = {"training__max_steps": 5, "training__learning_rate": 0.01, "evaluation__exact_match": True, "evaluation__max_new_tokens": 3, "export__after_each_phase": False}
    for name, arm, seed in (("phased", "phased", 7), ("one_off", "one_off", 7), ("random", "random", 7), ("phased-8", "phased", 8)):
        config = make_config(rows, folder / name, **few | {"curriculum__arm": arm, "seed": seed})
        train(config)
    return folder


def made(folder: Path, *words: object) -> tuple[str, dict[str, Any]]:
    """The page and the numbers that the verb writes."""
    assert verb.main([*map(str, words), "--out", str(folder / "report.html")]) == 0
    return (folder / "report.html").read_text(encoding="utf-8"), json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def of_runs(runs, tmp_path_factory) -> tuple[Path, str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("page")
    return folder / "report.html", *made(folder, *(runs / name for name in ("phased", "one_off", "random", "phased-8")))


def judgments_of(seed: int, sets: dict[str, int], tilt: float = 0.0, names: tuple[str, str] = ("phased", "one_off")) -> list[Judgment]:
    rng = np.random.default_rng(seed)

    def order() -> Judged:
        return Judged("ok", (float(rng.integers(3, 8) + (rng.random() < tilt)), float(rng.integers(3, 8)))) if rng.random() > 0.05 else Judged("refused", reason="no")

    return [Judgment(str(n), name, *names, "a judge", (order(), order()), lengths_of("a " * rng.integers(5, 50), "b " * 20)) for name, count in sets.items() for n in range(count)]


def write_answers(path: Path, model: str, judgments: list[Judgment], text: str) -> Path:
    lines = ({"set": j.test_set, "id": j.id, "instruction": f"Ask {j.id}", "input": "", "model": model, "response": f"{text} {j.id}", "finish_reason": "eos"} for j in judgments)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def of_judgments(runs, tmp_path_factory) -> tuple[Path, str, dict[str, Any]]:
    """Real runs with judgments of two seeds over two sets, and answers."""
    folder = tmp_path_factory.mktemp("judged")
    for seed in (1, 2):
        write_judgments(folder / f"{seed}.jsonl", judgments_of(seed, {"koala": 30, "vicuna": 20}, tilt=0.4, names=(f"phased-{seed}", f"one_off-{seed}")))
    found = judgments_of(1, {"koala": 30, "vicuna": 20})
    answers = [write_answers(folder / f"{name}.jsonl", name, found, name) for name in ("phased", "one_off")]
    words = [runs / "phased", runs / "one_off", "--judgments", folder / "1.jsonl", folder / "2.jsonl", "--answers", *answers]
    return folder / "report.html", *made(folder, *words)


def test_held_out_figures_are_those_of_the_runs(runs, of_runs):
    """Shares and losses are forgetting.json's; the difference is a count of tasks, and its test McNemar's."""
    _, text, facts = of_runs
    assert [arm["name"] for arm in facts["arms"]] == ["phased", "one_off", "random"]
    assert facts["arms"][0]["seeds"] == [7, 8]
    last = {name: json.loads((runs / name / "forgetting.json").read_text())["rows"][-1] for name in ("phased", "one_off", "random")}
    for one in facts["held_out"]:
        assert one["pairs"] == [[str(runs / "phased"), str(runs / one["baseline"])]]
        for name, row in one["exact_match"]["sets"].items():
            assert row["candidate"] == pytest.approx(last["phased"]["exact_match"][name])
            assert row["baseline"] == pytest.approx(last[one["baseline"]]["exact_match"][name])
            assert row["difference"] == pytest.approx(100 * (row["candidate"] - row["baseline"]))
        for name, row in one["loss"].items():
            assert (row["candidate"], row["baseline"]) == (last["phased"]["loss"][name], last[one["baseline"]]["loss"][name])
            assert row["interval"] is None
        test = one["exact_match"]["sign_test"]
        assert test["p"] == pytest.approx(stats.binomtest(test["wins"], test["wins"] + test["losses"]).pvalue if test["wins"] + test["losses"] else 1)
        assert 100 * (test["wins"] - test["losses"]) / one["exact_match"]["tasks"] == pytest.approx(one["exact_match"]["difference"])
    for run in facts["runs"]:
        for row in run["forgetting"]["rows"]:
            for value in row["loss"].values():
                assert f">{value:.3f}<" in text


def test_every_block_names_a_file_that_is_there(of_runs, of_judgments):
    def files(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["file"]] if isinstance(node.get("file"), str) else []
            return own + list(node.get("files", ())) + [name for value in node.values() for name in files(value)]
        return [name for value in node for name in files(value)] if isinstance(node, list) else []

    for _, text, facts in (of_runs, of_judgments):
        named = set(files(facts))
        assert len(named) > 5
        for name in named:
            assert Path(name).exists(), name
            assert name in text


def test_the_budget_is_the_plans_and_differences_are_flagged(runs, of_runs):
    _, text, facts = of_runs
    for name in ("phased", "one_off", "random"):
        assert facts["budget"]["arms"][name] == json.loads((runs / name / "plan.json").read_text())["budget"]
    trained = [json.loads(line) for line in (runs / "phased/metrics.jsonl").read_text().splitlines()]
    ledger = facts["budget"]["arms"]["phased"]
    assert ledger["examples"] == sum(line["examples"] for line in trained)
    assert ledger["response_tokens"] == sum(line["response_tokens"] for line in trained)
    assert ledger["sum_of_learning_rates"] == pytest.approx(sum(line["learning_rate"] for line in trained))
    # five steps a phase, and one_off has one
    assert "optimizer_steps" in facts["budget"]["unlike"]
    assert text.count("over 1 %") == len(facts["budget"]["unlike"])
    [said] = [word for word in facts["words"] if word.startswith("Arms differ by more than 1% in ")]
    assert all(measure.replace("_", " ").replace("flops", "FLOPs") in said for measure in facts["budget"]["unlike"])


def test_rows_by_difficulty_are_those_used(runs):
    outline = json.loads((runs / "phased/plan.json").read_text())
    assert sum(outline["difficulties"].values()) == sum(count["used"] for count in outline["bins"])
    easy = sum(count for tenth, count in outline["difficulties"].items() if float(tenth) < 1.5)
    assert easy == next(count["used"] for count in outline["bins"] if count["name"] == "easy")


def test_answers_are_kept_with_the_row_that_counts_them(tmp_path):
    matrix, row = ForgettingMatrix(tmp_path / "forgetting.json"), {"bin": "easy", "id": "1", "prompt": "p", "response": "r", "answer": "a"}
    matrix.add("base", [row], loss={"easy": 1.0})
    matrix.add("1-easy", [row, row | {"id": "2"}], loss={"easy": 1.0})
    matrix.drop("base")
    matrix._keep("2-hard", [row])  # a kill between the answers and their row
    matrix.add("2-hard", [row | {"answer": "r"}], loss={"easy": 1.0})
    kept = [json.loads(line) for line in (tmp_path / ANSWERS).read_text().splitlines()]
    assert [(line["after"], line["id"], line["answer"]) for line in kept] == [("1-easy", "1", "a"), ("1-easy", "2", "a"), ("2-hard", "1", "r")]


def test_without_an_answer_no_file_of_answers_is_written(tmp_path):
    ForgettingMatrix(tmp_path / "forgetting.json").add("base", loss={"easy": 1.0})
    assert [path.name for path in tmp_path.iterdir()] == ["forgetting.json"]


@given(st.lists(st.integers(1, 700), min_size=1, max_size=4))
def test_a_thinned_curve_keeps_means_and_phases(lengths):
    lines = [
        {"phase": f"p{k}", "phase_index": k, "loss": 1.0 * (n % 7), "learning_rate": 1.0, "tokens": n + 1, "seconds": 0.5}
        for k, length in enumerate(lengths)
        for n in range(length)
    ]
    for number, line in enumerate(lines, 1):
        line["global_step"] = number
    found = report._curves(iter(lines))
    assert len(found["points"]) <= report.POINTS + len(lengths)
    assert list(dict.fromkeys(point["phase"] for point in found["points"])) == [f"p{k}" for k in range(len(lengths))]
    steps = [0, *(point["step"] for point in found["points"])]
    assert steps[-1] == len(lines)
    weights = np.diff(steps)
    assert (weights > 0).all()
    assert weights @ [point["loss"] for point in found["points"]] == pytest.approx(sum(line["loss"] for line in lines))


@given(st.lists(st.floats(-1e6, 1e6, allow_subnormal=False), min_size=1, max_size=8), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_in_order_and_has_some_ticks(values, zero, around):
    found = page.axis(values, around=0.0 if around else None, zero=zero)
    places = [found(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(0 <= place <= 100 for place in places)
    assert 1 <= len(found.ticks) <= 11
    slack = 1e-6 * (found.high - found.low)
    assert all(found.low - slack <= tick <= found.high + slack for tick in found.ticks)
    if around:
        assert found(0.0) == 50


def test_files_of_a_comparison_are_sets_or_seeds_by_their_models(tmp_path):
    """Whatever their order, files of the same two models are one run, and those of others another one: no run has prompts of two seeds."""
    files = {}
    for seed in (1, 2):
        for name, count in (("koala", 40), ("vicuna", 30)):
            files[name[0], seed] = tmp_path / f"{name}{seed}.jsonl"
            write_judgments(files[name[0], seed], judgments_of(seed, {name: count}, 0.9 * (seed == 1), (f"phased-{seed}", f"one_off-{seed}")))
    told = []
    for order in list(permutations(files.values()))[::5]:
        _, facts = made(tmp_path, "--judgments", *order)
        (found,) = facts["comparisons"]
        assert found["runs"] == 2
        assert found["rules"]["paper"]["pairs"] == 140
        told.append((sorted(found["by_run"]), round(found["headline"]["win_rate"], 9), found["headline"]["conclusion"]))
    assert all(rates == pytest.approx(told[0][0]) for rates, *_ in told)
    assert len({tuple(rest) for _, *rest in told}) == 1
    assert "2 training seeds" in facts["words"][0]


@pytest.mark.parametrize("order", [("k1", "again", "v1"), ("k1", "v1", "again"), ("k1", "k1")])
def test_a_second_pass_of_a_judge_is_no_training_seed(tmp_path, order):
    for name, seed, sets in (("k1", 1, {"koala": 9}), ("v1", 1, {"vicuna": 9}), ("again", 2, {"koala": 9})):
        write_judgments(tmp_path / name, judgments_of(seed, sets))
    with pytest.raises(UserError, match=r"was judged 2 times in run 1; .* no second training seed") as caught:
        made(tmp_path, "--judgments", *(tmp_path / name for name in order))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_an_answer_may_hold_any_separator_of_lines(tmp_path, character):
    found = judgments_of(1, {"koala": 3})
    write_judgments(tmp_path / "j.jsonl", found)
    path = write_answers(tmp_path / "phased.jsonl", "phased", found, "A")
    path.write_text("".join(json.dumps(json.loads(line) | {"response": f"A{character}B"}, ensure_ascii=False) + "\n" for line in path.read_text().splitlines()), encoding="utf-8")
    _, facts = made(tmp_path, "--judgments", tmp_path / "j.jsonl", "--answers", path)
    assert [row["answers"][0]["text"] for row in facts["examples"]["rows"]] == [f"A{character}B"] * 3


def test_two_seeds_and_one_task_have_no_interval_and_no_nan():
    def run(seed, answer):
        return {"name": f"{answer}{seed}", "seed": seed, "finished": True, "answers": {("easy", "1"): {"response": "4", "answer": answer}}, "forgetting": {"rows": [{"loss": {}}]}}

    runs = [run(1, "4"), run(2, "5"), run(1, "5"), run(2, "5")]
    found = report._held_out({"name": "phased", "runs": [0, 1]}, {"name": "one_off", "runs": [2, 3]}, runs)
    assert found["exact_match"]["interval"] is None
    assert found["words"] == ["The difference between phased and one_off is within noise: +50.0 points of exact match (no interval) over 1 held-out tasks."]
    assert "(95% interval " in report._held_out({"name": "phased", "runs": [0]}, {"name": "one_off", "runs": [2]}, runs)["words"][0]


def test_what_a_comparison_does_not_hold_is_said():
    """Two seeds are few, and a run whose seed the other arm does not have is in no pair."""
    def run(name, seed):
        answers = {("easy", str(task)): {"response": "4", "answer": "4" if task % 2 or name == "phased" else "5"} for task in range(40)}
        return {"name": f"{name}{seed}", "seed": seed, "finished": True, "answers": answers, "forgetting": {"rows": [{"loss": {}}]}}

    runs = [run("phased", 1), run("phased", 2), run("one_off", 1), run("one_off", 2), run("one_off", 3)]
    two = report._held_out({"name": "phased", "runs": [0, 1]}, {"name": "one_off", "runs": [2, 3]}, runs)["words"]
    assert two[1:] == ["There are two training seeds: how much seeds differ is hardly known from two, and the interval may be too narrow."]
    more = report._held_out({"name": "phased", "runs": [0, 1]}, {"name": "one_off", "runs": [2, 3, 4]}, runs)["words"]
    assert more == [*two, "Left out, without a run of the other arm to go with: one_off3."]


def test_differences_of_exact_match_vary_from_all_lost_to_all_won():
    """Two bins, of one task each: as wide as ±100 points allow."""
    def run(answer):
        return {"name": answer, "seed": 1, "finished": True, "answers": {(name, "1"): {"response": "4", "answer": answer} for name in "ab"}, "forgetting": {"rows": [{"loss": {}}]}}

    found = report._held_out({"name": "phased", "runs": [0]}, {"name": "one_off", "runs": [1]}, [run("4"), run("4 ")])["exact_match"]
    unseen = 100 * (1 - 0.025 ** (1 / 2))
    assert found["interval"] == pytest.approx([-unseen, unseen])


def test_equal_answers_are_within_noise_and_the_page_says_so(tmp_path):
    even = [Judgment(str(n), "koala", "phased", "one_off", "j", (Judged("ok", (5.0, 6.0 - n % 3)), Judged("ok", (5.0, 6.0 - n % 3)))) for n in range(90)]
    write_judgments(tmp_path / "j.jsonl", even)
    text, facts = made(tmp_path, "--judgments", tmp_path / "j.jsonl")
    assert facts["words"][0].startswith("The difference between phased and one_off is within noise: +0.0 points")
    assert "<h1>The difference between phased and one_off is within noise" in text
    assert facts["comparisons"][0]["rules"]["paper"]["sets"]["koala"]["pairs"] == 90


def test_runs_of_one_arm_say_that_nothing_is_compared(runs, tmp_path):
    _, facts = made(tmp_path, runs / "phased", runs / "phased-8")
    assert facts["held_out"] == []
    assert facts["words"] == ["2 runs of one arm: there is nothing to compare with. Give runs of another arm, or judgments."]


def test_an_unfinished_run_is_in_no_comparison(runs, tmp_path):
    half = shutil.copytree(runs / "one_off", tmp_path / "half")
    matrix = ForgettingMatrix(half / "forgetting.json")
    matrix.drop("1-one_off")
    text, facts = made(tmp_path, runs / "phased", half)
    assert facts["words"][0].startswith("No verdict between phased and one_off")
    assert "not finished" in text


def test_two_pairs_of_seeds_give_losses_an_interval(runs, tmp_path):
    """Student's, against scipy's own."""
    twin = shutil.copytree(runs / "one_off", tmp_path / "twin")
    (twin / "config.yaml").write_text((twin / "config.yaml").read_text().replace("seed: 7\n", "seed: 8\n", 1))
    _, facts = made(tmp_path, runs / "phased", runs / "phased-8", runs / "one_off", twin)
    (found,) = facts["held_out"]
    assert len(found["pairs"]) == 2
    last = [ForgettingMatrix(runs / name / "forgetting.json").rows[-1]["loss"] for name in ("phased", "phased-8", "one_off")]
    for name, row in found["loss"].items():
        differences = [last[0][name] - last[2][name], last[1][name] - last[2][name]]
        expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
        np.testing.assert_allclose(row["interval"], [expected.low, expected.high], rtol=1e-9)


def test_the_papers_rows_are_the_papers(shared_data):
    given, ours = json.loads((shared_data / "paper/win_rate_tables.json").read_text()), json.loads(report.PAPER.read_text())
    assert ours["sizes"] == given["sizes"]
    assert ours["rows"] == [{key: value for key, value in row.items() if key != "part"} for row in given["rows"]]


@pytest.mark.parametrize(("name", "models"), [("meta-llama/Llama-2-7b-hf", {"Llama-2-7B"}), ("models/Mistral-7B-v0.1", {"Mistral-7B"}), ("gs://b/Llama-2-70b-hf", {"Llama-2-70B"})])
def test_the_papers_rows_are_of_the_same_model(name, models):
    found = report._paper([{"model": name}])
    assert found["same_model"]
    assert {row["model"] for row in found["rows"]} == models


def test_a_model_that_the_paper_has_not_is_said_to_be_none_of_its(of_judgments):
    assert not of_judgments[2]["paper"]["same_model"]
    assert "The paper has no row for the model of these runs" in of_judgments[1]


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.names: set[str] = set()
        self.outside: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.names |= {name for name, _ in attrs}
        addresses = [value or "" for name, value in attrs if name in ("src", "href", "action", "xlink:href", "data", "poster")]
        self.outside += [address for address in addresses if not address.startswith(("#", "data:,"))]


def hostile_page(folder: Path, runs: Path) -> tuple[Path, str]:
    """Every text that a report takes from files is hostile: names, sets, ids, prompts, answers, outcomes, reasons, versions, phases, bins."""
    names, evil = (HOSTILE[0] + HOSTILE[4], HOSTILE[1] + HOSTILE[4]), HOSTILE[2]
    orders = [(Judged("ok", (7.0, 5.0)), Judged("ok", (6.0, 5.0))), (Judged(evil, reason=evil), Judged(evil, reason=evil))]
    found = [Judgment(evil + str(n), HOSTILE[n % 4], *names, evil, orders[n % 2], {"words": (3, 2)}) for n in range(12)]
    write_judgments(folder / "j.jsonl", found)
    answers = [write_answers(folder / f"{n}.jsonl", name, found, "".join(HOSTILE)) for n, name in enumerate(names)]
    run = shutil.copytree(runs / "phased", folder / "a<b>'&\"")
    for name in ("plan.json", "forgetting.json", ANSWERS, "metrics.jsonl"):
        text = (run / name).read_text().replace("easy", json.dumps(evil)[1:-1])
        (run / name).write_text(text)
    for manifest in run.glob("checkpoints/*/*/manifest.json"):
        facts = json.loads(manifest.read_text())
        manifest.write_text(json.dumps(facts | {"versions": {evil: HOSTILE[1]}}))
    text, _ = made(folder, run, runs / "one_off", "--judgments", folder / "j.jsonl", "--answers", *answers)
    return folder / "report.html", text


def test_text_of_data_is_text(runs, of_runs, of_judgments, tmp_path):
    """The elements and attributes of a hostile page are those that harmless pages have, one script among them, and nothing is fetched."""
    harmless = [Elements(text) for _, text, _ in (of_runs, of_judgments)]
    hostile = Elements(hostile_page(tmp_path, runs)[1])
    assert hostile.tags["script"] == 1
    assert not hostile.tags["img"]
    assert hostile.tags.keys() <= harmless[0].tags.keys() | harmless[1].tags.keys()
    assert hostile.names <= harmless[0].names | harmless[1].names
    for found in (*harmless, hostile):
        assert found.outside == []


@pytest.mark.parametrize("text", ["&'\"<> " * 4000, "\N{SNOWMAN}\U0001f600" * 9000, "word " * 3000])
def test_a_page_of_all_six_sets_stays_small(tmp_path, text):
    found = judgments_of(3, {"sinstruct": 252, "wizardlm": 218, "koala": 180, "vicuna": 80, "oasst": 188, "anthropic": 129})
    write_judgments(tmp_path / "j.jsonl", found)
    answers = [write_answers(tmp_path / f"{name}.jsonl", name, found, text) for name in ("phased", "one_off", "random")]
    html, facts = made(tmp_path, "--judgments", tmp_path / "j.jsonl", "--answers", *answers)
    assert len(html.encode()) < LIMIT
    assert facts["examples"]["of"] == 1047
    assert f"cut after {facts['examples']['cut_after']:,} characters" in html


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["NOWHERE", "--out", "r.html"], "holds no run"),
        (["--out", "r.html"], "nothing to report on"),
        (["NOWHERE", "--out", "r.json"], "does not end in .html"),
        (["--judgments", "NOWHERE", "--out", "r.html"], "cannot read"),
        (["--judgments", "J", "--answers", "J", "--out", "r.html"], "is no file of answers"),
    ],
)
def test_bad_input_is_one_line(tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    write_judgments(tmp_path / "J", judgments_of(1, {"koala": 3}))
    with pytest.raises(UserError, match=says) as caught:
        verb.main(words)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["J"]


@pytest.fixture(scope="module")
def browser():
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"))), None)
    if chromium is None:
        pytest.skip("needs a browser: install chromium (apt-get install chromium) or Google Chrome")
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install '.[test]'")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])  # containers have no user namespaces
        yield found
        found.close()


class Opened:
    """A page in the browser, what it complained of, and what it asked for."""

    def __init__(self, browser: Any, path: Path, **context: Any) -> None:
        self.page = browser.new_context(**context).new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.absolute().as_uri())
        assert len(self.requests) == 1

    def shown(self) -> int:
        return self.page.locator(".example:visible").count()


@pytest.mark.parametrize("colors", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("which", ["of_runs", "of_judgments"])
def test_the_page_opens_without_a_complaint_or_a_request(request, browser, which, colors, width):
    opened = Opened(browser, request.getfixturevalue(which)[0], color_scheme=colors, viewport={"width": width, "height": 800})
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == width
    background = opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor").removeprefix("rgb(").split(",")[0]
    assert (int(background) > 128) == (colors == "light")
    inside = opened.page.evaluate(
        """[...document.querySelectorAll('svg.strip')].map((strip) => {
          const [box, dot] = [strip, strip.querySelector('.dot')].map((e) => e.getBoundingClientRect());
          return box.left <= dot.left + 5 && dot.right - 5 <= box.right && box.top < dot.top && dot.bottom < box.bottom;
        })"""
    )
    assert len(inside) >= 5
    assert all(inside), "every dot lies in its strip"


def test_filters_show_what_they_say(browser, of_judgments):
    path, _, facts = of_judgments
    opened, examples = Opened(browser, path), facts["examples"]["rows"]
    assert opened.shown() == min(20, len(examples))
    opened.page.get_by_role("button", name="Show more").click()
    assert opened.shown() == len(examples) == 50
    for verdict, count in Counter(row["verdict"] for row in examples if row["set"] == "vicuna").items():
        opened.page.select_option("#set", "vicuna")
        opened.page.select_option("#verdict", verdict)
        assert opened.shown() == count
        assert set(opened.page.locator(".example:visible .pill").all_inner_texts()) == {verdict}
    opened.page.select_option("#set", "")
    opened.page.select_option("#verdict", "")
    opened.page.fill("#search", "ONE_OFF 17")
    assert opened.shown() == sum("one_off 17" in answer["text"] for row in examples for answer in row["answers"]) > 0
    assert opened.page.inner_text("#count") == "2 of 2 shown"
    assert opened.complaints == []


def test_without_scripts_all_is_there_but_the_filters(browser, of_judgments):
    path, _, facts = of_judgments
    opened = Opened(browser, path, java_script_enabled=False)
    assert opened.shown() == len(facts["examples"]["rows"])
    assert not opened.page.locator(".filters").is_visible()
    assert opened.page.locator("svg.strip:visible").count() >= 4


def test_no_hostile_script_runs(browser, runs, tmp_path):
    opened = Opened(browser, hostile_page(tmp_path, runs)[0], viewport={"width": 390, "height": 800})
    assert opened.complaints == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") == 390
    assert opened.page.evaluate("window.hit") is None
    assert opened.page.locator(".example").first.inner_text().count("window.hit") >= 2
    opened.page.evaluate("document.querySelector('main').innerHTML += '<img src=x onerror=\"window.hit = 1\">'")
    opened.page.wait_for_timeout(200)
    assert opened.page.evaluate("window.hit") is None, "were it not escaped, the policy would still stop it"


def test_it_prints(browser, of_runs, tmp_path):
    opened = Opened(browser, of_runs[0], color_scheme="dark")
    opened.page.emulate_media(media="print")
    assert not opened.page.locator(".filters").is_visible()
    assert opened.page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(255, 255, 255)"
    pdf = opened.page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert 2 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 20

"""Laws of an experiment: arms differ in what they name and in nothing else, a kill changes no figure, and the attribution finds what was planted."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml
from faults.kill_experiment import timeless

from phased_ift_jax import arms, experiment
from phased_ift_jax.evaluation.attribution import LINES, attribute
from phased_ift_jax.records import Failure, Judged, Judgment, UserError
from phased_ift_jax.training.survey import survey

ARMS = ("phased", "one_off", "one_off_restarts", "random", "reversed", "last_alone_equal_steps", "by_length")
ROOT = Path(__file__).parent.parent
BASE = {
    "model": {"model_name_or_path": str(ROOT / "configs/quickstart/model"), "init": "random", "dtype": "float32"},
    "data": {"max_length": 64, "eval_size": 4, "sample_size": 60},
    "curriculum": {"bins": {"by": "score", "thresholds": [1.5, 3.5], "names": ["easy", "medium", "hard"]}},
    "training": {"num_train_epochs": 1, "global_batch_size": 8, "learning_rate": 1e-3},
    "checkpoint": {"save_minutes": None, "save_steps": 2},
    "export": {"after_each_phase": False},
    "logging": {"report_to": []},
}
BUDGET = {"examples": 100, "optimizer_steps": 10, "sum_of_learning_rates": 1e-3}


# --- the attribution, of matrices made up --------------------------------------------------------------------------------------------


def losses(rng, effects, seeds=5, noise=0.01, shared=0.5):
    """Losses of two bins: what a seed does to all arms, the arm's own gain in each bin, and noise of each cell."""
    of_seed = rng.normal(0, shared, (seeds, 2))

    def cell(arm, seed):
        easy, hard = 3.0 + of_seed[seed] - np.array(effects.get(arm, (0, 0))) + rng.normal(0, noise, 2)
        return {"easy": float(easy), "hard": float(hard)}

    return {arm: {seed: cell(arm, seed) for seed in range(seeds)} for arm in ARMS}


def lines(found):
    return {line["what"]: line for line in found["lines"]}


PLANTED = {"phased": (0.10, 0.30), "random": (0.05, 0.10), "reversed": (-0.20, 0.10)}
PLANTED |= {"last_alone_equal_steps": (-0.50, 0.20), "one_off_restarts": (0.06, 0.06), "by_length": (0.05, 0.25)}
GAINS = {"total": (0.10, 0.30), "order": (0.05, 0.20), "reversal": (0.30, 0.20), "selection": (-0.50, 0.20), "restarts": (0.06, 0.06), "length": (0.0, 0.15)}


def test_planted_effects_are_recovered():
    """Each bin's, and their mean's, though what seeds do to all arms alike is ten times as large."""
    found = lines(attribute(losses(np.random.default_rng(0), PLANTED, noise=0.002), dict.fromkeys(ARMS, BUDGET)))
    assert list(found) == list(LINES)
    for what, planted in GAINS.items():
        loss = found[what]["loss"]
        for figures, gain in ((loss["bins"]["easy"], planted[0]), (loss["bins"]["hard"], planted[1]), (loss["mean"], sum(planted) / 2)):
            assert figures["gain"] == pytest.approx(gain, abs=0.006)
            assert len(figures["by_seed"]) == 5
            if gain:
                assert figures["conclusion"] == ("better" if gain > 0 else "worse"), what
    assert f"better, a gain of {found['order']['loss']['mean']['gain']:+.3f} nats in mean held-out loss" in found["order"]["words"]
    assert "worse, a gain of -0.1" in found["selection"]["words"]


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
    assert f"{rate['phased'] - rate['random']:+.1f} points in win rate" in found["order"]["words"]


# --- the grid ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join((ROOT / "configs/quickstart/data.jsonl").read_text().splitlines(keepends=True)[:100]))
    return path


def written(folder: Path, rows: Path, **keys) -> Path:
    """The YAML of an experiment that lies in `exp`, beside it."""
    tree = json.loads(json.dumps({"output_dir": "exp", "seeds": [1, 2], "arms": ["phased", "one_off"], "base": BASE} | keys))
    if isinstance(tree["base"], dict):
        tree["base"]["data"].setdefault("path", str(rows))
    (folder / "experiment.yaml").write_text(yaml.safe_dump(tree))
    return folder / "experiment.yaml"


def flat(tree, prefix=""):
    for key, value in tree.items():
        if isinstance(value, dict) and key not in ("bins", "eval_bins"):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.fixture(scope="module")
def grid(rows, tmp_path_factory):
    """Of every arm known by name, and one of another name, and of two seeds: its config and its survey."""
    path = written(tmp_path_factory.mktemp("grid"), rows, arms=dict.fromkeys(arms.KNOWN) | {"mine": {"curriculum": {"order": [2, 1]}, "training.learning_rate": 2e-3}})
    told = arms.load(str(path))
    told = arms.resolved(told, experiment._phased(told))
    runs = {(cell.arm, cell.seed): arms.run_of(told, cell) for cell in told.cells}
    return told, runs, {key: survey(run, experiment.HOST) for key, run in runs.items()}


CHANGES = {  # what an arm changes of the phased one's keys
    "phased": set(),
    "one_off": {"curriculum.arm"},
    "one_off_restarts": {"curriculum.arm", "curriculum.lr_schedule"},
    "random": {"curriculum.arm"},
    "reversed": {"curriculum.order"},
    "last_alone": {"curriculum.order"},
    "last_alone_equal_steps": {"curriculum.order", "training.max_steps"},
    "by_length": {"curriculum.bins", "data.eval_bins"},
    "mine": {"curriculum.order", "training.learning_rate"},
}


def test_an_arm_changes_what_it_names_and_nothing_else(grid):
    told, runs, _ = grid
    assert set(told.arms) == set(CHANGES)
    for (arm, seed), run in runs.items():
        mine, phased = (dict(flat(one.model_dump(mode="json", by_alias=True))) for one in (run, runs["phased", seed]))
        assert {key for key in mine if mine[key] != phased[key]} == CHANGES[arm] | ({"output_dir"} if arm != "phased" else set()), arm
        assert (run.seed, run.output_dir) == (seed, f"exp/{arm}/seed{seed}/run")


def names_of(dataset, rows):
    return [dataset.records[row].id for row in rows]


def test_all_arms_and_seeds_share_held_out_rows_and_what_is_trained(grid):
    _, _, surveys = grid
    held = {tuple(tuple(names_of(found.dataset, found.dataset.held_out_rows(b))) for b in (1, 2, 3)) + found.dataset.eval_bin_names for found in surveys.values()}
    assert len(held) == 1
    assert all(len(ids) == 4 for ids in next(iter(held))[:3])
    trained = {(arm, tuple(sorted(i for phase in found.dataset.phases for i in names_of(found.dataset, phase.rows)))) for (arm, _), found in surveys.items()}
    assert {len(ids) for arm, ids in trained if arm in ("last_alone", "last_alone_equal_steps", "mine")} < {60, *range(60)}
    assert len({ids for arm, ids in trained if arm not in ("last_alone", "last_alone_equal_steps", "mine")}) == 1


def test_each_arm_trains_what_its_name_says(grid):
    _, _, surveys = grid
    plans = {arm: found.plan for (arm, seed), found in surveys.items() if seed == 1}
    phases = {arm: [names_of(found.dataset, phase.rows) for phase in found.dataset.phases] for (arm, seed), found in surveys.items() if seed == 1}
    sizes = {arm: list(map(len, of_arm)) for arm, of_arm in phases.items()}
    assert phases["reversed"] == phases["phased"][::-1]
    assert phases["last_alone"] == phases["last_alone_equal_steps"] == phases["phased"][-1:]
    assert phases["mine"] == [phases["phased"][1], phases["phased"][0]]
    assert sizes["random"] == sizes["phased"]
    assert phases["random"] != phases["phased"]
    steps = {arm: sum(len(phase.steps) for phase in plan.phases) for arm, plan in plans.items()}
    assert steps["last_alone_equal_steps"] == steps["phased"] > steps["last_alone"]
    starts = {arm: int((plan.phases[0].learning_rates == 0).sum()) for arm, plan in plans.items()}
    assert (starts["one_off"], starts["one_off_restarts"]) == (1, 3), "a schedule warms up from 0"
    found = surveys["by_length", 1]
    lengths = [[found.dataset.examples[row].response_tokens for row in phase.rows] for phase in found.dataset.phases]
    ties = Counter(length for of_phase in lengths for length in of_phase)
    for one, other in pairwise(lengths):
        assert max(one) < min(other)
    edges, wanted = np.cumsum([len(of_phase) for of_phase in lengths]), np.cumsum(sizes["phased"])
    assert all(abs(edge - want) <= max(ties.values()) / 2 for edge, want in zip(edges, wanted, strict=True)), "as near as rows of equal length allow"


def test_the_resolved_experiment_is_the_same_experiment(grid, tmp_path):
    told, runs, _ = grid
    (tmp_path / "experiment.yaml").write_text(arms.dump(told))
    again = arms.load(str(tmp_path / "experiment.yaml"))
    assert arms.resolved(again, experiment._phased(again)) == told
    assert {(cell.arm, cell.seed): arms.run_of(again, cell) for cell in again.cells} == runs


def test_the_plan_shows_arms_budgets_what_differs_and_needs_no_weights(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, rows, arms=["phased", "one_off", "reversed", "last_alone"], tokens_per_second=10.0)
    assert experiment.main([str(path), "--plan", "--usd_per_hour", "3.6"]) == 0
    said = capsys.readouterr().out
    told = arms.resolved(arms.load(str(path)), experiment._phased(arms.load(str(path))))
    tokens = {arm: survey(arms.run_of(told, arms.Cell(arm, 1, Path("x"))), experiment.HOST).plan.ledger()["tokens"] for arm in told.arms}
    for arm, count in tokens.items():
        assert re.search(rf"(?m)^{arm} .* {count:,} ", said), arm
    assert "note: last_alone differs from phased: examples -" in said
    assert "note: reversed" not in said
    assert "4 arms x 2 seeds (1, 2) = 8 cells, 8 of them left" in said
    seconds = 2 * sum(tokens.values()) / 10
    assert f"${seconds / 1000:,.2f} at $3.6 an hour; by 10 tokens a second" in said
    assert not (tmp_path / "exp").exists()


BAD = [
    ({"arms": ["phased", "revrsed"]}, (), "arms.revrsed: changes nothing, and is no arm known by name; did you mean reversed?"),
    ({"arm": ["phased"]}, (), "unknown key arm; did you mean arms?"),
    ({"arms": {"mine": {"training.learning_rat": 1}}}, (), "arms.mine: unknown key training.learning_rat; did you mean training.learning_rate?"),
    ({"arms": {"mine": {"curriculum.order": [7]}, "phased": {"data.eval_size": 1}}}, (), "arms.phased.data.eval_size: arms share data, held-out rows and seeds; set it in base"),
    ({"arms": ["by_length"], "base": BASE | {"curriculum": BASE["curriculum"] | {"order": [2, 3]}}}, (), "arms.by_length: the phased arm leaves rows out"),
    ({"seeds": [1, 1]}, (), "seeds: each once; got [1, 1]"),
    ({"base": BASE | {"data": BASE["data"] | {"eval_size": 0}}}, (), "nothing would be measured"),
    ({"base": BASE | {"data": BASE["data"] | {"path": "nowhere.jsonl"}}}, (), "data.path: no such file 'nowhere.jsonl'"),
    ({"base": "nowhere.yaml"}, (), "config: cannot read 'nowhere.yaml'"),
    ({"evaluation": {"prompts": ["a.jsonl"], "judging": {"judge": "llm"}}}, (), "evaluation.judging: name the model that is asked with `model`"),
    ({"evaluation": {"prompts": ["a.jsonl"], "judging": {"judge": "exact"}, "baseline": "random"}}, (), "evaluation.baseline: 'random' is none of the arms phased, one_off"),
    ({"evaluation": {"prompt": ["a.jsonl"]}}, (), "unknown key evaluation.prompt; did you mean evaluation.prompts?"),
    ({"output_dir": "gs://bucket/x"}, (), "output_dir: an experiment lies on a disk"),
    ({}, ("--shard", "2/2"), "--shard: '2/2' is not I/N"),
    ({}, ("--seed", "3"), "--seed: an experiment has `seeds`"),
    ({}, ("--usd_per_hour", "1"), "--usd_per_hour: 1.0 is no price, or there is no --plan to tell it"),
    ({}, ("--evaluation.judging.modell", "x"), "unknown key evaluation.judging.modell; did you mean evaluation.judging.model?"),
    ({"evaluation": {"prompts": ["a.jsonl"]}}, ("--evaluation.judging.budget_usd", "-1"), "evaluation.judging.budget_usd: input should be greater than 0"),
    ({}, ("--training.learning_rte", "1"), "unknown key training.learning_rte; did you mean training.learning_rate?"),
]


def test_who_judges_may_be_given_as_flags(rows, tmp_path, monkeypatch):
    """As in the YAML, of whose other keys none changes."""
    asked = {"prompts": ["a.jsonl"], "judging": {"judge": "exact", "references": ["b.jsonl"]}}
    path, seen = written(tmp_path, rows, evaluation=asked), []
    monkeypatch.setattr(experiment, "_phased", lambda told: seen.append(told))
    monkeypatch.setattr(experiment.arms, "resolved", lambda told, phased: told)
    monkeypatch.setattr(experiment, "_plan", lambda told, price: "")
    words = ("--evaluation.judging.judge", "llm", "--evaluation.judging.model", "a-judge", "--evaluation.judging.budget_usd", "2.5")
    assert experiment.main([str(path), "--plan", *words]) == 0
    same = written(tmp_path, rows, evaluation=asked | {"judging": asked["judging"] | {"judge": "llm", "model": "a-judge", "budget_usd": 2.5}})
    assert seen == [arms.load(str(same))]


@pytest.mark.parametrize(("keys", "words", "line"), BAD)
def test_bad_input_is_one_line_and_nothing_is_written(keys, words, line, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = written(tmp_path, rows, **keys)
    with pytest.raises(UserError) as caught:
        experiment.main([str(path), *words])
    assert line in str(caught.value)
    assert len([said for said in str(caught.value).splitlines() if line in said]) == 1
    assert sorted(tmp_path.iterdir()) == [path]


# --- doing it ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("code", "end", "tried"), [(1, Failure, 4), (-9, Failure, 4), (2, UserError, 1), (75, 75, 1)])
def test_how_a_childs_end_is_told(code, end, tried, rows, tmp_path, monkeypatch):
    """A crash is that cell's alone; what a run refuses, or a request to stop, ends the experiment at once."""
    monkeypatch.chdir(tmp_path)
    real, started = subprocess.Popen, []

    def start(words, **keys):
        started.append(words)
        ending = f"os.kill(os.getpid(), {-code})" if code < 0 else f"sys.exit({code})"
        return real([sys.executable, "-c", f"import os, sys; print('error: what is wrong', file=sys.stderr, flush=True); {ending}"], **keys)

    monkeypatch.setattr(experiment.subprocess, "Popen", start)
    path = written(tmp_path, rows)
    if end == 75:
        assert experiment.main([str(path)]) == 75
    else:
        with pytest.raises(end, match="phased/seed1: what is wrong" if code == 2 else r"4 of 4 cells have failed.*phased/seed1/train\.log") as caught:
            experiment.main([str(path)])
        assert "\n" not in str(caught.value)
    assert len(started) == tried
    assert not (tmp_path / "exp/report.json").exists()


PAIR = ["phased", "reversed"]  # whose steps have the same shapes, so that they are compiled once


def verb(folder: Path, *words: str) -> subprocess.Popen:
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-m", "phased_ift_jax.experiment", "experiment.yaml", *words],
        cwd=folder, env=environment, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(process: subprocess.Popen, code: int = 0) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == code, said
    return said


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in sorted(folder.rglob("*")) if path.is_file()}


def figures(folder: Path) -> str:
    """report.json without what depends on a clock."""
    return json.dumps(timeless(json.loads((folder / "exp/report.json").read_text())), indent=1)


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    written(folder, rows, arms=PAIR)
    said = ended(verb(folder))
    assert "Order: phased against the reversed order: " in said
    return folder


def test_the_folder_describes_itself_and_the_report_has_the_attribution(undisturbed):
    made = undisturbed / "exp"
    assert {path.name for path in made.iterdir()} == {"experiment.yaml", *PAIR, "report.html", "report.json", "attribution.json"}
    found, told = (json.loads((made / name).read_text()) for name in ("report.json", "attribution.json"))
    assert found["attribution"] == told
    assert [(arm["name"], arm["seeds"]) for arm in found["arms"]] == [(arm, [1, 2]) for arm in PAIR]
    last = {(arm, seed): json.loads((made / arm / f"seed{seed}/run/forgetting.json").read_text())["rows"][-1]["loss"] for arm in PAIR for seed in (1, 2)}
    line = lines(told)["reversal"]
    for name, row in line["loss"]["bins"].items():
        assert row["by_seed"] == [last["reversed", seed][name] - last["phased", seed][name] for seed in (1, 2)]
        assert row["interval"][0] < row["gain"] < row["interval"][1]
    page = (made / "report.html").read_text()
    assert 'id="attribution"' in page
    assert f">{line['loss']['mean']['gain']:+.3f}<".replace("-", "\N{MINUS SIGN}") in page
    budgets = {arm: json.loads((made / arm / "seed1/run/plan.json").read_text())["budget"] for arm in PAIR}
    assert line["budget"]["optimizer_steps"] == budgets["phased"]["optimizer_steps"] / budgets["reversed"]["optimizer_steps"] - 1


def test_a_second_run_does_nothing(undisturbed, monkeypatch, capsys):
    monkeypatch.chdir(undisturbed)
    monkeypatch.setattr(experiment.subprocess, "Popen", None)
    before = files(undisturbed)
    assert experiment.main(["experiment.yaml"]) == 0
    assert capsys.readouterr().out.startswith("Phased against")
    assert files(undisturbed) == before


MOMENTS = [  # (what is there when the end comes, how it comes and to whom, the words of that start)
    ("exp/phased/seed1/run/config.yaml", signal.SIGKILL, os.killpg, ("--shard", "0/2")),
    ("exp/phased/seed1/run/newest_checkpoint", signal.SIGTERM, os.kill, ("--shard", "0/2")),
    ("exp/reversed/seed1/run/metrics.jsonl", signal.SIGKILL, os.kill, ("--shard", "1/2")),
]


def test_killed_at_any_moment_in_two_shards_it_ends_with_the_same_report(undisturbed, rows, tmp_path, monkeypatch):
    """Of the whole group or the verb alone, whose child ends with it (SIGTERM: saves and stops). One seed of the undisturbed cells is the same experiment."""
    one_seed = tmp_path / "undisturbed"
    shutil.copytree(undisturbed, one_seed)
    written(one_seed, rows, arms=PAIR, seeds=[1])
    monkeypatch.chdir(one_seed)
    assert experiment.main(["experiment.yaml", "--report_only"]) == 0
    written(tmp_path, rows, arms=PAIR, seeds=[1])
    for path, number, kill, words in MOMENTS:
        process, until = verb(tmp_path, *words), time.monotonic() + 120
        while process.poll() is None and not (tmp_path / path).exists() and time.monotonic() < until:
            time.sleep(0.02)
        assert process.poll() is None, process.communicate()[0]
        kill(process.pid, number)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == (-number if number == signal.SIGKILL else 75), said
        assert not (tmp_path / "exp/report.json").exists()
    assert "1 of 2 cells are done; whoever is last reports" in ended(verb(tmp_path, "--shard", "0/2"))
    assert not (tmp_path / "exp/report.json").exists()
    ended(verb(tmp_path, "--shard", "1/2"))
    assert figures(tmp_path) == figures(one_seed)
    assert (tmp_path / "exp/attribution.json").read_bytes() == (one_seed / "exp/attribution.json").read_bytes()


def test_done_cells_of_other_settings_are_refused(undisturbed, monkeypatch):
    monkeypatch.chdir(undisturbed)
    before = files(undisturbed)
    with pytest.raises(UserError, match=r"training.learning_rate: the run in 'exp/phased/seed1/run' was started with 0.001, this is 0.002") as caught:
        experiment.main(["experiment.yaml", "--training.learning_rate", "0.002"])
    assert "\n" not in str(caught.value)
    assert files(undisturbed) == before


def test_what_is_asked_is_answered_judged_and_attributed(undisturbed, rows, tmp_path, monkeypatch):
    """Of the cells that are trained: two arms with one seed, by reference."""
    shutil.copytree(undisturbed / "exp", tmp_path / "exp")
    asked = [json.loads(line)["data"] for line in rows.read_text().splitlines()[:3]]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps({"id": str(i), "instruction": task, "output": answer}) + "\n" for i, (task, answer) in enumerate(asked)))
    judging = {"prompts": ["tasks=tasks.jsonl"], "max_new_tokens": 2, "max_length": 64, "judging": {"judge": "exact"}, "baseline": "reversed"}
    written(tmp_path, rows, arms=PAIR, seeds=[1], evaluation=judging)
    said = ended(verb(tmp_path))
    assert re.findall(r": (training|answering|judging)\n", said) == ["answering", "answering", "judging"]
    found = json.loads((tmp_path / "exp/report.json").read_text())
    (compared,) = found["comparisons"]
    win_rate = lines(found["attribution"])["reversal"]["win_rate"]
    assert (win_rate["prompts"], win_rate["seeds"]) == (3, [1])
    assert win_rate["gain"] == compared["headline"]["win_rate"]
    assert "points in win rate" in lines(found["attribution"])["reversal"]["words"]
    before = files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert experiment.main(["experiment.yaml"]) == 0
    assert files(tmp_path) == before

"""Laws of splitting: bins are disjoint and cover, equal scores are never parted, the order of rows changes nothing; and what is written trains the same rows."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from phased_ift_jax import cli, split
from phased_ift_jax import config as configs
from phased_ift_jax.data.phase_files import run_card
from phased_ift_jax.data.phase_files import split as split_rows
from phased_ift_jax.data.phases import hash_of_ids
from phased_ift_jax.data.readers import read
from phased_ift_jax.data.splitting import Scores, at_shares, at_values, found
from phased_ift_jax.records import InstructionRecord, Reading, ScoredRecord, Source, Turn, UserError
from phased_ift_jax.training.survey import survey

ROOT = Path(__file__).resolve().parents[1]
FINE = st.floats(1.0, 5.0, allow_nan=False)
SCORES = st.lists(st.one_of(FINE, st.integers(4, 20).map(lambda quarter: quarter / 4)), min_size=1, max_size=60)


def verb(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.run(split.main, [str(word) for word in words])
    return int(str(left.value.code))


def written(path: Path, rows: Sequence[dict[str, Any] | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(scores: Sequence[float | None]) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "instruction": f"Say {i}", "output": "word " * (i % 5 + 1), "difficulty": score} for i, score in enumerate(scores)]


def reading_of(scores: Sequence[float | None]) -> Reading:
    records = [InstructionRecord(f"r{i}", (Turn("a", "b"),), Source("x", i)) for i in range(len(scores))]
    return Reading(tuple(record if score is None else ScoredRecord(record, score) for record, score in zip(records, scores, strict=True)), ())


def table_6(rows: int = 52_000, seed: int = 0) -> list[float]:
    """Scores as in the paper's Table 6 and its sizes: 58.5 % at exactly 1.0, 28.4 % in [1.5, 3.5), the rest above; quarters and tenths, as a model gives them."""
    rng = random.Random(seed)

    def some(share: float, values: Sequence[float]) -> list[float]:
        return rng.choices(values, weights=[3 if value % 0.5 == 0 else 2 if value % 0.25 == 0 else 1 for value in values], k=round(share * rows))

    quarters = lambda low, high: [round(low + step / 20, 2) for step in range(round(20 * (high - low))) if step % 5 == 0 or step % 2 == 0]  # noqa: E731
    parts = (0.585, [1.0]), (0.178, quarters(1.5, 2.5)), (0.106, quarters(2.5, 3.5)), (0.0278, [3.5]), (0.041, quarters(3.55, 4.5)), (0.0617, [*quarters(4.5, 5.0), 5.0, 5.0, 5.0])
    scores = [score for share, values in parts for score in some(share, values)]
    rng.shuffle(scores)
    return scores


# --- the cuts --------------------------------------------------------------------------------------------------------------------


def ways(scores: list[float], bins: int, shares: list[float]) -> list[tuple[float, ...]]:
    return [found(Scores.of(scores), bins).thresholds, at_shares(Scores.of(scores), shares)]


@settings(deadline=None)
@given(SCORES, st.integers(2, 5), st.data())
def test_bins_are_disjoint_and_cover_and_never_part_equal_scores(scores: list[float], bins: int, data: st.DataObject) -> None:
    shares = sorted(data.draw(st.lists(st.floats(0.01, 0.99), min_size=bins - 1, max_size=bins - 1, unique=True)))
    if len(set(scores)) < bins:
        for ask in (lambda: found(Scores.of(scores), bins), lambda: at_shares(Scores.of(scores), shares)):
            with pytest.raises(UserError, match=f"split: {bins} bins cannot be had of {len(set(scores))} distinct scores") as refused:
                ask()
            assert "\n" not in str(refused.value)
        return
    shuffled = data.draw(st.permutations(scores))
    for thresholds, again in zip(ways(scores, bins, shares), ways(shuffled, bins, shares), strict=True):
        assert thresholds == again
        made = split_rows(reading_of(scores), [f"b{i}" for i in range(bins)], thresholds)
        assert sorted(row for number in range(1, bins + 1) for row in made.rows(number)) == list(range(len(scores)))
        assert all(made.rows(number) for number in range(1, bins + 1))
        bin_of = dict(zip(scores, made.bin_of.tolist(), strict=True))
        assert [bin_of[score] for score in scores] == made.bin_of.tolist()  # a function of the score alone
        assert [bin_of[score] for score in sorted(scores)] == sorted(made.bin_of.tolist())  # and a rising one
        assert Scores.of(scores).bins(thresholds).tolist() == [len(made.rows(number)) for number in range(1, bins + 1)]
        assert at_values(Scores.of(scores), thresholds) == thresholds  # given as values they are the same
        assert at_values(Scores.of(scores), [float(repr(t)) for t in thresholds]) == thresholds


@settings(deadline=None)
@given(SCORES, st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3, unique=True).map(sorted))
def test_no_other_cuts_are_nearer_to_the_shares(scores: list[float], below: list[float]) -> None:
    values = sorted(set(scores))
    if len(values) <= len(below):
        return
    at = [sum(score < value for score in scores) / len(scores) for value in values[1:]]
    best = min(sum(abs(a - b) for a, b in zip(some, below, strict=True)) for some in combinations(at, len(below)))
    thresholds = at_shares(Scores.of(scores), below)
    assert sum(abs(sum(s < t for s in scores) / len(scores) - b) for t, b in zip(thresholds, below, strict=True)) == pytest.approx(best, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(4, 20).map(lambda quarter: quarter / 4), min_size=3, max_size=40), st.integers(2, 4))
def test_what_is_found_costs_the_least_of_all(scores: list[float], bins: int) -> None:
    """Against the formula written out, over every way to cut."""
    values, n = sorted(set(scores)), len(scores)
    if len(values) < bins:
        return
    mean = sum(scores) / n
    width = math.sqrt(sum((s - mean) ** 2 for s in scores) / n) * n**-0.2
    at = np.union1d(np.linspace(values[0], values[-1], 2001), [(a + b) / 2 for a, b in pairwise(values)])
    density = np.array([sum(math.exp(-(((x - s) / width) ** 2) / 2) for s in scores) for x in at.tolist()])

    def saddle(a: float, b: float) -> float:
        inside = [i for i, x in enumerate(at.tolist()) if a <= x < b or x == b == values[-1]]
        return min(density[i] / min(density[: i + 1].max(), density[i:].max()) for i in inside)

    saddles = [saddle(a, b) for a, b in pairwise(values)]

    def cost(cuts: tuple[int, ...]) -> float:
        edges = [-math.inf, *(values[cut + 1] for cut in cuts), math.inf]
        sizes = [sum(low <= s < high for s in scores) / n for low, high in pairwise(edges)]
        return sum(saddles[cut] for cut in cuts) / len(cuts) - sum(math.log(bins * size) for size in sizes) / bins

    best = min(map(cost, combinations(range(len(values) - 1), bins - 1)))
    made = found(Scores.of(scores), bins)
    assert made.cost == pytest.approx(best, abs=1e-9)
    assert made.cost == pytest.approx(sum(made.saddles) / len(made.saddles) + made.unevenness)
    assert cost(tuple(next(i for i, (a, b) in enumerate(pairwise(values)) if a < t <= b) for t in made.thresholds)) == pytest.approx(best, abs=1e-9)


@settings(deadline=None)
@given(FINE, FINE)
def test_a_threshold_is_the_shortest_number_that_parts_two_scores(one: float, other: float) -> None:
    if one == other:
        return
    a, b = sorted((one, other))
    threshold = Scores.of([a, b]).threshold(0)
    assert a < threshold <= b
    assert Scores.of([1.0, 1.5]).threshold(0) == 1.5
    assert (Scores.of([4.0, 4.0625]).threshold(0), Scores.of([3.4, 5.0]).threshold(0), Scores.of([4.699999999999999, 4.7]).threshold(0)) == (4.06, 5.0, 4.7)


def test_two_heaps_are_parted_between_them() -> None:
    rng = np.random.default_rng(0)
    heaps = [rng.normal(centre, 0.1, size).clip(1, 5) for centre, size in ((1.5, 3000), (3.0, 2500), (4.4, 3500))]  # thousands of distinct scores
    made = found(Scores.of(np.concatenate(heaps).tolist()), 3)
    assert [bool(low.max() < t <= high.min()) for t, (low, high) in zip(made.thresholds, pairwise(heaps), strict=True)] == [True, True]
    assert max(made.saddles) < 0.05
    assert found(Scores.of([1.0] * 900 + [1.0000001] * 50 + [5.0] * 50), 3).thresholds == (1.0000001, 5.0)


def test_table_6_falls_into_sensible_phases() -> None:
    scores = Scores.of(table_6())
    assert at_shares(scores, [0.585, 0.869]) == (1.5, 3.5)
    first, second = found(scores, 3).thresholds
    assert first == 1.5  # what scores exactly 1 stays together, and alone
    assert 3.0 <= second <= 4.5
    assert min(scores.bins((first, second))) > 0.05 * 52_000
    assert found(Scores.of(table_6(seed=1)), 3).thresholds[0] == 1.5
    assert [len(found(scores, bins).thresholds) for bins in (2, 4, 6)] == [1, 3, 5]


# --- the verb --------------------------------------------------------------------------------------------------------------------


def test_the_official_stage_three(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official = shared_data / "phasedsft" / "en-alpaca52k-stage3.jsonl"
    assert verb(official, "--out", tmp_path / "phases", "--thresholds", "4.0", "4.75", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert [facts["rows"] for facts in told["bins"]] == [2140, 3287, 1462]
    assert told["rows"] == {"read": 6889, "in_bins": 6889, "unscored": 0, "quarantined": 0}
    assert sum(facts["rows"] * facts["mean_score"] for facts in told["bins"]) / 6889 == pytest.approx(4.255, abs=5e-4)
    assert verb(official, "--out", tmp_path / "phases", "--auto", "3", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["thresholds"] == [4.06, 4.75]
    assert [facts["rows"] for facts in told["bins"]] == [2218, 3209, 1462]


def test_rows_that_training_leaves_out_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = rows_of([1.0, 2.0, 3.0, 4.0])
    assert verb(written(tmp_path / "whole.jsonl", rows), "--out", tmp_path / "whole", "--thresholds", 2.5) == 0
    assert "note:" not in capsys.readouterr().out
    rows[1]["output"] = rows[3]["output"] = " "
    data = written(tmp_path / "some.jsonl", rows)
    assert verb(data, "--out", tmp_path / "some", "--thresholds", 2.5) == 0
    assert "note: 2 of those in bins have an empty response: training quarantines them" in capsys.readouterr().out
    assert [facts["empty_responses"] for facts in json.loads((tmp_path / "some" / "phases.json").read_text())["bins"]] == [1, 1]


def test_what_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows: list[Any] = rows_of([1.0, 4.166666666666667, 1.0, None, 2.5, 3.5, 3.5, 5.0])
    data = written(tmp_path / "scored.jsonl", [*rows, "{no json"])
    card = {"scorer": "llm", "model": "a-model", "sha256": hashlib.sha256(data.read_bytes()).hexdigest()}
    (tmp_path / "scored.card.json").write_text(json.dumps(card))
    out = tmp_path / "out" / "phases"
    assert verb(data, "--out", out, "--thresholds", 1.5, 3.5, "--names", "easy", "medium", "hard") == 0
    shown = capsys.readouterr().out
    assert "9 rows = 7 in bins + 1 without a score + 1 that cannot be used" in shown
    assert [line.split()[:3] for line in shown.splitlines() if "%" in line] == [["easy", "2", "28.6%"], ["medium", "1", "14.3%"], ["hard", "4", "57.1%"]]
    listed = json.loads((out / "phases.json").read_text())
    assert [(b["name"], b["ids"], b["rows"], b["mean_score"]) for b in listed["bins"]] == [
        ("easy", ["r0", "r2"], 2, 1.0),
        ("medium", ["r4"], 1, 2.5),
        ("hard", ["r1", "r5", "r6", "r7"], 4, pytest.approx((4.166666666666667 + 3.5 + 3.5 + 5) / 4)),
    ]
    assert all(b["ids_sha256"] == hash_of_ids(b["ids"]) for b in listed["bins"])
    assert listed["bins"][0]["mean_words"] == 2.0  # of "word" and "word word word"
    assert "mean_tokens" not in listed["bins"][0]
    assert listed["scorer"] == card
    (tmp_path / "scored.card.json").write_text(json.dumps(card | {"sha256": "of another file"}))
    assert run_card(str(data)) is None
    assert listed["chosen"] == {"by": "thresholds", "asked": [1.5, 3.5]}
    left = [json.loads(line) for line in (out / "unscored.jsonl").read_text().splitlines()]
    assert [(row["line"], row["id"], row["reason"].split(":")[0]) for row in left] == [(4, "r3", "no score"), (9, None, "not valid JSON")]
    assert (out / "distribution.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (out / "distribution.svg").read_text()
    assert sorted(os.listdir(out)) == [".lock", "distribution.png", "distribution.svg", "phases.json", "unscored.jsonl"]


def test_tokens_are_counted_by_the_tokenizer_that_is_named(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of prompt and response, each by itself: the paper's count, 134.91 on the released stage 3."""
    (tmp_path / "llama2").mkdir()
    (tmp_path / "llama2" / "tokenizer.model").write_bytes((shared_data / "llama2" / "tokenizer.model").read_bytes())
    settings_ = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (tmp_path / "llama2" / "tokenizer_config.json").write_text(json.dumps(settings_))
    official = shared_data / "phasedsft" / "en-alpaca52k-stage3.jsonl"
    assert verb(official, "--out", tmp_path / "out", "--auto", 2, "--tokenizer", tmp_path / "llama2", "--json") == 0
    bins = json.loads(capsys.readouterr().out)["bins"]
    assert sum(facts["rows"] * facts["mean_tokens"] for facts in bins) / 6889 == pytest.approx(134.91, abs=0.005)


def test_sizes_asked_and_had_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "scored.jsonl", rows_of([1.0] * 7 + [2.0, 4.0, 5.0]))
    assert verb(data, "--out", tmp_path / "out", "--sizes", "paper", "--json") == 0
    chosen = json.loads(capsys.readouterr().out)["chosen"]
    assert (chosen["by"], chosen["asked"], chosen["achieved"]) == ("sizes", [0.585, 0.284, 0.131], [0.7, 0.2, 0.1])
    assert verb(data, "--out", tmp_path / "out", "--sizes", "60", "30", "10") == 0
    assert "60.0% / 30.0% / 10.0% asked, 70.0% / 20.0% / 10.0% had" in capsys.readouterr().out
    assert verb(data, "--out", tmp_path / "out", "--quantiles", "0.585", "0.869") == 0
    assert "58.5% / 86.9% asked, 70.0% / 90.0% had: thresholds 2.0 5.0" in capsys.readouterr().out


def test_faults_of_the_command_line_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = written(tmp_path / "scored.jsonl", rows_of([1.0] * 7 + [2.0, 5.0]))
    bare = written(tmp_path / "bare.jsonl", rows_of([None, None]))
    before = sorted(os.listdir(tmp_path))
    faults = {
        ("--auto", "4"): "4 bins cannot be had of 3 distinct scores (1, 2, 5); equal scores are never parted; ask for fewer bins",
        ("--sizes", "0.4", "0.3", "0.2", "0.1"): "4 bins cannot be had of 3 distinct scores",
        ("--auto", "1"): "1 bins are no split",
        ("--thresholds", "1.0", "3.0"): "no score is below 1; the scores go from 1 to 5",
        ("--thresholds", "2.5", "3.0"): "no score is at least 2.5 and below 3",
        ("--thresholds", "3", "2"): "are not finite numbers that rise",
        ("--thresholds", "nan"): "are not finite numbers that rise",
        ("--quantiles", "0.5", "1.5"): "must rise between 0 and 1",
        ("--sizes", "0.5", "0.3"): "that add up to 1",
        ("--sizes", "half"): "or `paper`",
        ("--auto", "3", "--names", "a", "b"): "2 names for 3 bins",
        ("--auto", "2", "--names", "a", "a/b"): "must be distinct",
        ("--auto", "2", "--names", "a", "all", "--tfds"): "'all' cannot name a split",
        ("--auto", "2", "--tokenizer", str(tmp_path)): "--tokenizer: ",
        ("--auto", "2", "--sizes", "paper"): "not allowed with",
        (): "is required",
    }
    for words, message in faults.items():
        assert verb(data, "--out", tmp_path / "out", *words) == 2, words
        said = capsys.readouterr()
        assert message in said.err, said.err
        assert (said.out, said.err.count("\n")) == ("", 1)
    for place, message in ((tmp_path, "no phases.json of a split"), (data, "cannot write"), ("gs://bucket/x", "in a bucket")):
        assert verb(data, "--out", place, "--auto", 2) == 2
        assert message in capsys.readouterr().err
    assert verb(bare, "--out", tmp_path / "out", "--auto", 2) == 2
    assert "has a score" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == before


def test_a_second_split_replaces_its_own_files_and_no_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = written(tmp_path / "scored.jsonl", rows_of([1.0, 2.0, 3.0, 4.0])), tmp_path / "out"
    assert verb(data, "--out", out, "--auto", 2, "--tfds") == 0
    (out / "notes.txt").write_text("mine")
    first = (out / "phases.json").read_text()
    assert verb(data, "--out", out, "--thresholds", 2, 3) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / "tfds").exists()  # it would be of the first split
    assert len(json.loads((out / "phases.json").read_text())["bins"]) == 3
    assert verb(data, "--out", out, "--auto", 2) == 0
    assert (out / "phases.json").read_text() == first  # the same again
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "phases.json").write_text('{"bins": []}')
    capsys.readouterr()
    assert verb(data, "--out", foreign, "--auto", 2) == 2
    assert (foreign / "phases.json").read_text() == '{"bins": []}'


def test_without_matplotlib_the_rest_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    data = written(tmp_path / "scored.jsonl", rows_of([1.0, 2.0, 3.0, 4.0]))
    assert verb(data, "--out", tmp_path / "out", "--auto", 2) == 0
    assert capsys.readouterr().err == "note: no picture, for matplotlib is missing: pip install 'phased_ift_jax[analysis]'\n"
    assert sorted(os.listdir(tmp_path / "out")) == [".lock", "phases.json", "unscored.jsonl"]


def test_importing_the_verb_loads_no_jax() -> None:
    program = "import sys\nfrom phased_ift_jax import split\nfrom phased_ift_jax.data import phase_files, phase_builder, split_plot\n"
    program += "print(sorted({'jax', 'flax', 'matplotlib', 'tensorflow', 'openai'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.stdout == "[]\n"


# --- what is written, trained ------------------------------------------------------------------------------------------------------


def real_rows() -> list[Any]:
    """The quickstart's rows, shuffled, with scores that float32 does not have; chats, inputs (whose new line its tokenizer refuses), a row twice, unscored ones, a bad one."""
    rows = [json.loads(line) for line in (ROOT / "configs/quickstart/data.jsonl").read_text(encoding="utf-8").splitlines()[::40]]
    random.Random(0).shuffle(rows)
    for number, row in enumerate(rows):
        row["score"] = min(5.0, float(row["score"]) + number % 3 / 7)
        if number % 2:
            del row["id"]
        user, assistant = row["data"]
        if number % 11 == 0:
            row["system"] = "Reverse: a b"
        if number % 5 == 0:
            rows[number] = {key: row[key] for key in row if key != "data"} | {"instruction": user, "input": ["a", "b", "c", "d", "e", "f"][number % 6], "output": assistant}
        elif number % 7 == 0:
            said = [{"role": "system", "content": "Reverse: b a"}] * (number % 2) + [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}] * 2
            rows[number] = {"messages": said, "score": row["score"]}
    rows[3]["score"] = rows[23]["score"] = None
    assert len(rows) == 300
    return [*rows[:10], "{no json", *rows[10:], rows[11]]


def run_of(tmp_path: Path, data: object, bins: object, **more: Any) -> configs.RunConfig:
    tree = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    tree["output_dir"], tree["model"]["model_name_or_path"] = str(tmp_path / "run"), str(ROOT / "configs/quickstart/model")
    tree["data"] |= {"path": data, "eval_size": 10, "max_quarantined": 0.4, **more}
    tree["curriculum"] = {"bins": bins}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    return configs.load(tmp_path / "run.yaml")


def test_tfds_trains_what_the_file_and_its_phases_train(tmp_path: Path) -> None:
    data, out = written(tmp_path / "scored.jsonl", real_rows()), tmp_path / "out"
    assert verb(data, "--out", out, "--thresholds", 2, 4, "--names", "hard-not", "medium", "b", "--tfds") == 0  # neither their order nor the alphabet's
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    one = survey(run_of(tmp_path, str(data), {"from": str(out / "phases.json")}), mesh)
    assert sum(row.reason.startswith("its id is not in") for row in one.dataset.quarantined) == 2
    for bins in ({"from": str(out / "phases.json")}, {"by": "file"}):
        other = survey(run_of(tmp_path, f"tfds:{out / 'tfds'}", bins, split="all"), mesh)
        assert other.dataset.identity == one.dataset.identity
        assert other.dataset.bin_names == one.dataset.bin_names == ("hard-not", "medium", "b")
        for mine, theirs in zip(one.plan.phases, other.plan.phases, strict=True):
            assert [one.dataset.records[row].id for row in mine.phase.rows] == [other.dataset.records[row].id for row in theirs.phase.rows]
        assert other.plan.rows() == one.plan.rows()
        assert other.plan.ledger() == one.plan.ledger()
        assert sum("phase" in row.reason or "its id is not in" in row.reason for row in other.dataset.quarantined) == 2
    held = {one.dataset.records[row].id for row in np.flatnonzero(one.dataset.held_out)}
    assert held == {other.dataset.records[row].id for row in np.flatnonzero(other.dataset.held_out)}
    assert len(held) == 30


def test_ids_and_scores_survive_tfds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = written(tmp_path / "scored.jsonl", real_rows()), tmp_path / "out"
    assert verb(data, "--out", out, "--auto", 3, "--tfds") == 0

    def content(reading: Reading) -> list[tuple[Any, ...]]:
        plain = [(item.record, item.difficulty) if isinstance(item, ScoredRecord) else (item, None) for item in reading.records]
        return [(record.id, record.system, record.turns, score) for record, score in plain]

    mine, theirs = content(read(str(data))), content(read(f"tfds:{out / 'tfds'}", split="all"))
    assert theirs == mine
    assert max(Counter(row[0] for row in mine).values()) == 1
    assert [row[3] for row in mine] == [row["score"] for row in real_rows() if isinstance(row, dict)]
    assert any(row[3] and float(np.float32(row[3])) != row[3] != round(row[3], 4) for row in mine)  # what TFDS's own floats would not keep
    listed = json.loads((out / "phases.json").read_text())
    for facts in listed["bins"]:
        assert [row[0] for row in content(read(f"tfds:{out / 'tfds'}", split=facts["name"]))] == facts["ids"]
    with pytest.raises(UserError, match=r"split 'train'.*its phases are read with data\.split: all"):
        read(f"tfds:{out / 'tfds'}")


def test_train_refuses_phases_that_are_not_of_its_data(tmp_path: Path) -> None:
    rows = real_rows()
    data, out = written(tmp_path / "scored.jsonl", rows), tmp_path / "out"
    assert verb(data, "--out", out, "--thresholds", 2, 4) == 0
    mesh = {"data": 1, "fsdp": 1, "tensor": 1}
    other = written(tmp_path / "other.jsonl", rows[50:])
    with pytest.raises(UserError, match=r"lists \d+ ids that the data does not have"):
        survey(run_of(tmp_path, str(other), {"from": str(out / "phases.json")}), mesh)
    listed = json.loads((out / "phases.json").read_text())
    moved = listed["bins"][0]["ids"].pop()
    listed["bins"][1]["ids"].append(moved)
    (out / "phases.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match=r"the ids of bin 'stage1' of .* are not those that its ids_sha256 is of"):
        survey(run_of(tmp_path, str(data), {"from": str(out / "phases.json")}), mesh)

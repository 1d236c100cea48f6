"""A scored file against a reference: who is matched with whom, figures against brute force, and what a reference cannot test."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phased_ift_jax import calibrate as verb
from phased_ift_jax import cli
from phased_ift_jax.data.readers import read
from phased_ift_jax.data.row_kinds import row_of
from phased_ift_jax.records import InstructionRecord, Source, Turn, UserError
from phased_ift_jax.score import main as score_main
from phased_ift_jax.scoring import scored_file
from phased_ift_jax.scoring.calibration import STAGE3, Known, calibrate, match
from phased_ift_jax.scoring.measures import score_by_length

OFFICIAL, LABELLED = "phasedsft/en-alpaca52k-stage3.jsonl", "alpaca/random_9k_with_stage3_label.jsonl"


def record(name: str, instruction: str, response: str = "r", given: str = "") -> InstructionRecord:
    return InstructionRecord(name, (Turn(instruction, response, given),), Source("some.jsonl", 1))


def names(scored: list[InstructionRecord], reference: list[InstructionRecord]) -> dict[str, str]:
    return {scored[i].id: reference[j].id for i, j in match(scored, reference).pairs}


def test_records_are_matched_by_id_and_content_then_by_content() -> None:
    scored = [record("1", "Say a"), record("2", "Say b"), record("3", "Say c", given="x"), record("4", "Say d."), record("5", "Say e", "other"), record("6", "Say f")]
    prepared = [record("2", "Say a."), record("b", "Say b"), record("c", "Say c.\nx"), record("4", "Say d."), record("5", "Say e."), record("f", "Say f.\n<noinput>.")]
    found = match(scored, prepared)
    assert {scored[i].id: prepared[j].id for i, j in found.pairs} == {"1": "2", "2": "b", "3": "c", "4": "4", "6": "f"}
    assert (found.by_id, found.by_content, found.other_text) == (1, 4, 2)
    assert names(prepared, scored) == {theirs: ours for ours, theirs in names(scored, prepared).items()}


def test_equal_contents_are_matched_one_to_one_in_order() -> None:
    ours, theirs = [record(f"a{i}", "Say a") for i in range(3)], [record(f"b{i}", "Say a.") for i in range(2)]
    assert names(ours, theirs) == {"a0": "b0", "a1": "b1"}
    assert names(theirs, ours) == {"b0": "a0", "b1": "a1"}
    assert match([], theirs).pairs.shape == (0, 2)


def test_the_official_join_is_found_again(shared_data: Path) -> None:
    """Raw Alpaca against the released file: the 1,255 records that the labels name, each with the official id."""
    labelled = [json.loads(line) for line in (shared_data / LABELLED).read_text(encoding="utf-8").splitlines()]
    raw, official = read(str(shared_data / LABELLED)).records, [known.record for known in verb.known(str(shared_data / OFFICIAL))]
    found = match([one for one in raw if isinstance(one, InstructionRecord)], official)
    assert {int(i): official[j].id for i, j in found.pairs} == {i: row["official_id"] for i, row in enumerate(labelled) if row["official_stage3"]}
    assert (found.by_id, found.by_content, found.other_text) == (0, 1255, 0)


def made_up(seed: int) -> tuple[list[tuple[InstructionRecord, float]], list[Known]]:
    """Some records with scores, and what a reference knows of them: scores of some, of others on which side of 3.5 they are."""
    rng = np.random.default_rng(seed)
    scored, reference = [], []
    for i in range(40):
        one, value = record(str(i), f"Do {i}."), float(rng.choice([1, 1.5, 2, 3, 3.5, 4.5, 5]))
        scored.append((one, float(rng.choice([1.0, 1.5, 2.25, 3.5, 4.75]))))
        reference.append(Known(one, value, value) if rng.random() < 0.6 else Known.labelled(one, value >= STAGE3))
    return scored, reference


@pytest.mark.parametrize("seed", range(10))
def test_figures_are_those_of_brute_force(seed: int) -> None:
    scored, reference = made_up(seed)
    found = calibrate(scored, reference, [1.5, 3.5, 4.0])
    for one in found["thresholds"]:
        t = one["threshold"]
        above = [score for (_, score), known in zip(scored, reference, strict=True) if known.low >= t]
        below = [score for (_, score), known in zip(scored, reference, strict=True) if (known.low < t if known.low == known.high else known.high <= t)]
        assert (one["above"], one["below"]) == (len(above), len(below))
        assert one["auc"] == pytest.approx(np.mean([(a > b) + (a == b) / 2 for a, b in itertools.product(above, below)]))
    confusion = found["confusion"]
    bounds = [-math.inf, 1.5, 3.5, 4.0, math.inf]

    def phase(low: float, high: float) -> int | None:
        return next((i for i, (a, b) in enumerate(itertools.pairwise(bounds)) if a <= low and (high <= b if high > low else low < b)), None)

    expected = np.zeros((4, 4), int)
    for (_, score), known in zip(scored, reference, strict=True):
        if (row := phase(known.low, known.high)) is not None:
            expected[row, phase(score, score)] += 1
    assert confusion["by_value"] == expected.tolist()
    assert confusion["n"] == expected.sum() < len(scored)


@pytest.mark.parametrize("seed", range(5))
def test_order_is_all_that_counts_but_for_confusion_by_value(seed: int) -> None:
    scored, reference = made_up(seed)
    stretched = [(one, 1 + (score - 1) ** 3 / 16) for one, score in scored]
    shuffled = [reference[i] for i in np.random.default_rng(seed).permutation(len(reference))]
    for others in (calibrate(stretched, reference, [1.5, 3.5]), calibrate(scored, shuffled, [1.5, 3.5])):
        plain = calibrate(scored, reference, [1.5, 3.5])
        for one in (plain, others):
            del one["confusion"]["by_value"], one["confusion"]["own_thresholds"]
        assert others == plain


def test_a_file_agrees_with_itself_wholly() -> None:
    scored = [(record(str(i), f"Do {i}."), 1 + 4 * i / 99) for i in range(100)]
    found = calibrate(scored, [Known(one, score, score) for one, score in scored], [1.5, 3.5])
    assert (found["matched_by_id"], found["spearman"], [one["auc"] for one in found["thresholds"]]) == (100, 1.0, [1.0, 1.0])
    for table in (found["confusion"]["by_value"], found["confusion"]["by_size"]):
        assert table == np.diag(np.diag(table)).tolist()


def test_length_against_the_labels_gives_the_known_figure(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored_file.write(tmp_path / "length.jsonl", *score_by_length(read(str(shared_data / "alpaca/random_9k.json")), row_of))
    found = told(capsys, tmp_path / "length.jsonl", shared_data / LABELLED)
    assert (found["matched"], found["matched_by_id"], found["spearman_n"]) == (9229, 9229, 1255)
    lower, upper = found["thresholds"]
    assert (lower["above"], lower["below"], lower["auc"]) == (1255, 0, None)
    assert (upper["above"], upper["below"], round(upper["auc"], 3)) == (1255, 7974, 0.683)
    assert found["confusion"]["thresholds"] == [3.5]
    assert np.sum(found["confusion"]["by_size"], axis=0) == pytest.approx([7974, 1255], abs=60)  # many responses are equally long


@pytest.mark.long
def test_ifd_by_stories260k_gives_the_figure_of_the_docs(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "ifd.jsonl"
    assert score_main([str(shared_data / "alpaca/random_9k.json"), "--out", str(out), "--scorer", "ifd", "--ifd_model", str(shared_data / "stories260k")]) == 0
    assert "9,223 records scored" in capsys.readouterr().out
    assert round(told(capsys, out, shared_data / LABELLED)["thresholds"][1]["auc"], 3) == 0.601


def told(capsys: pytest.CaptureFixture[str], scored: Path, reference: Path, *words: str) -> dict[str, Any]:
    assert verb.main([str(scored), "--against", str(reference), "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)  # type: ignore[no-any-return]


def test_the_released_file_cannot_test_its_own_bound(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    official = str(shared_data / OFFICIAL)
    assert verb.main([official, "--against", official, "--thresholds", "1.5", "3.5", "4", "4.75"]) == 0
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if "cannot" in line] == [f"{t} cannot be tested: the reference knows of no record below it" for t in (1.5, 3.5)]
    assert "spearman  1.000, over 6,889" in said
    assert [line.split() for line in said.splitlines() if line.startswith(("below 4 ", "4 to 4.75 ", "from 4.75 "))][:3] == [
        ["below", "4", "2,140", "0", "0"],
        ["4", "to", "4.75", "0", "3,287", "0"],
        ["from", "4.75", "0", "0", "1,462"],
    ]


@pytest.fixture
def some(tmp_path: Path) -> Callable[..., str]:
    def write(name: str, *rows: dict[str, Any]) -> str:
        (tmp_path / name).write_text("".join(json.dumps({"instruction": f"Do {i}.", "output": "x"} | row) + "\n" for i, row in enumerate(rows)))
        return str(tmp_path / name)

    return write


def test_what_is_wrong_is_one_line(some: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    scored, unscored, elsewhere = some("scored.jsonl", {"score": 2}), some("plain.jsonl", {}), some("other.jsonl", {"score": 2, "instruction": "Be."})
    odd, label = some("odd.jsonl", {"official_stage3": "yes"}), some("label.jsonl", {"official_stage3": True, "official_score": 7})
    for words, wanted in (
        ([unscored, "--against", scored], "has no scores"),
        ([scored, "--against", unscored], "neither scores nor official_stage3"),
        ([scored, "--against", elsewhere], "no record of"),
        ([scored, "--against", odd], "official_stage3 'yes'"),
        ([scored, "--against", label], "official_score 7"),
        ([scored, "--against", scored, "--thresholds", "3.5", "1.5"], "do not rise"),
        ([scored, "--against", scored, "--thresholds", "1"], "do not rise from above 1"),
        ([scored], "--against"),
    ):
        with pytest.raises(SystemExit) as end:
            cli.run(verb.main, words)
        said = capsys.readouterr().err.splitlines()
        assert (end.value.code, len(said)) == (2, 1), said
        assert wanted in said[0]


def test_labels_without_scores_are_enough(some: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    scored = some("scored.jsonl", {"score": 1}, {"score": 4}, {"score": 2}, {"score": "NaN"})
    labels = some("labels.jsonl", {"official_stage3": False}, {"official_stage3": True}, {"official_stage3": None})
    found = told(capsys, Path(scored), Path(labels))
    assert (found["reference"], found["spearman"], found["spearman_n"]) == (2, None, 0)
    assert [one["auc"] for one in found["thresholds"]] == [None, 1.0]
    assert verb.main([scored, "--against", labels]) == 0
    said = capsys.readouterr()
    assert "spearman  not defined" in said.out
    assert "scored.jsonl' 1 cannot be used" in said.err
    assert "line 4: `score` is 'NaN'" in said.err
    with pytest.raises(UserError):
        verb.known(scored.replace("scored", "missing"))

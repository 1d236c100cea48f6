"""Laws of goodput: what a run's time was, from its files alone, and that it tells the time lost to a stop."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from test_run import Crash, crash_in_step, make_config, rows, train, undisturbed  # noqa: F401

from phased_ift_jax import status as status_verb
from phased_ift_jax.files import sole_writer
from phased_ift_jax.training.goodput import SECONDS, STARTS
from phased_ift_jax.training.status import status

pytestmark = pytest.mark.usefixtures("compilation_cache")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_run_that_was_stopped_tells_the_time_it_lost(rows, tmp_path, monkeypatch, capsys):  # noqa: F811
    """Steps trained twice count once, every step counts though only one of four is logged, and an idle gap between two starts shows."""
    config, run = make_config(rows, tmp_path / "run", logging__logging_steps=4), tmp_path / "run"
    with monkeypatch.context() as patch:
        crash_in_step(patch, 6)
        with pytest.raises(Crash):
            train(config)
    stopped = status(run)["goodput"]
    saved = [line["seconds"] for line in lines(run / SECONDS) if line["step"] <= 3]
    assert len(lines(run / SECONDS)) > len(saved), "steps that no checkpoint holds are no part of the result"
    assert stopped["trained_seconds"] == pytest.approx(sum(saved), rel=1e-12)
    assert (stopped["starts"], stopped["ended"]) == (1, False)
    with sole_writer(run):  # a process is at work, and will save them
        assert status(run)["goodput"]["trained_seconds"] == pytest.approx(sum(line["seconds"] for line in lines(run / SECONDS)), rel=1e-12)
    assert stopped["wall_seconds"] == pytest.approx(time.time() - lines(run / STARTS)[0]["start"], abs=5)

    train(config)
    facts = status(run)["goodput"]
    places = [(line["phase_index"], line["step"]) for line in lines(run / "trained_ids.jsonl")]
    assert [(line["phase_index"], line["step"]) for line in lines(run / SECONDS)] == places, "each step of the result, once"
    taken = {(line["phase_index"], line["step"]): line["seconds"] for line in lines(run / SECONDS)}
    assert all(taken[line["phase_index"], line["step"]] == line["seconds"] for line in lines(run / "metrics.jsonl"))
    (first, second, end) = lines(run / STARTS)
    assert (facts["starts"], facts["ended"]) == (2, True)
    assert facts["trained_seconds"] == pytest.approx(sum(taken.values()), rel=1e-12)
    assert facts["wall_seconds"] == pytest.approx(end["done"] - first["start"], rel=1e-12)
    assert 0 < facts["share"] < 1
    assert facts["share"] == facts["trained_seconds"] / facts["wall_seconds"]

    train(config)
    assert status(run)["goodput"] == facts, "a start that finds nothing left to do is none"
    (run / STARTS).write_text("".join(json.dumps(line) + "\n" for line in ({"start": first["start"] - 3600}, second, end)) + '{"sta')
    gap = status(run)["goodput"]
    assert gap["wall_seconds"] == pytest.approx(facts["wall_seconds"] + 3600, rel=1e-12)
    assert gap["share"] == gap["trained_seconds"] / gap["wall_seconds"] < facts["share"]
    assert gap["trained_seconds"] == facts["trained_seconds"]
    assert status_verb.main([str(run)]) == 0
    assert f"goodput: {100 * gap['share']:.0f} % of 1:00:" in (said := capsys.readouterr().out)
    assert "between the first of 2 starts and the end was training" in said


def test_a_run_without_times_has_no_goodput(undisturbed, tmp_path, capsys):  # noqa: F811
    """One of an earlier version: nothing is made up."""
    for name in ("plan.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((undisturbed / name).read_bytes())
    assert status(tmp_path)["goodput"] is None
    assert status_verb.main([str(tmp_path)]) == 0
    assert "goodput" not in capsys.readouterr().out

"""The quickstart, cut short, by four processes of two devices each: its losses, who writes, and what becomes of three when one is killed."""

from __future__ import annotations

import os
import re
import time
from contextlib import suppress
from pathlib import Path

import pytest
from test_processes import Pod, assert_same_losses, cache, lines  # noqa: F401
from test_run import ROOT, metrics

from phased_ift_jax import config as config_module

WHOLE = ("--evaluation.exact_match", "false")
SHORT = ("--training.max_steps", "6", "--data.eval_size", "16", *WHOLE)
BOOKS = ("metrics.jsonl", "trained_ids.jsonl", "tensorboard/run/events.out.tfevents.*")
LIMIT = 60  # seconds in which all survivors have ended


def quickstart(folder: Path, cache: Path, processes: int = 4, devices: int = 2, words: tuple[str, ...] = SHORT) -> Pod:  # noqa: F811
    config = config_module.load(ROOT / "configs/quickstart.yaml", [("output_dir", str(folder / "run"))])
    return Pod(folder, config, cache, processes, devices, words, joined=devices > 1)


def writers(pod: Pod, path: Path) -> list[int]:
    """Which members hold a file open, be it in the child that each supervises."""
    found = []
    for index, member in enumerate(pod.members):
        family = [str(member.pid), *Path(f"/proc/{member.pid}/task/{member.pid}/children").read_text().split()]
        for descriptor in (one for pid in family for one in Path(f"/proc/{pid}/fd").iterdir()):
            with suppress(FileNotFoundError):
                found += [index] if os.readlink(descriptor) == str(path) else []
    return found


@pytest.fixture(scope="module")
def four(cache, tmp_path_factory) -> tuple[Path, dict[str, list[int]]]:  # noqa: F811
    """A run of four, and who held its books open in its first phase."""
    folder = tmp_path_factory.mktemp("four")
    pod = quickstart(folder, cache)
    pod.wait_for(lambda: lines(folder / "run") >= 1)
    held = {name: writers(pod, *(folder / "run").glob(name)) for name in BOOKS}
    assert pod.codes() == [0] * 4, [log.read_text()[-3000:] for log in pod.logs]
    return folder, held


def test_four_processes_learn_what_one_does(four, cache, tmp_path, measured):  # noqa: F811
    """All three phases, step by step, against a process with one device."""
    assert quickstart(tmp_path, cache, processes=1, devices=1).codes() == [0]
    measured("losses, four processes against one (<= 1e-5)", assert_same_losses(four[0] / "run", tmp_path / "run"))
    assert [(line["phase"], line["step"]) for line in metrics(four[0] / "run")] == [(phase, step) for phase in ("easy", "medium", "hard") for step in range(1, 7)]
    assert (four[0] / "run/trained_ids.jsonl").read_text() == (tmp_path / "run/trained_ids.jsonl").read_text()


@pytest.mark.long
def test_four_processes_end_the_whole_quickstart_as_one_process_does(cache, tmp_path, measured):  # noqa: F811
    """All 1,260 steps, against one process with as many devices whose sums go through the same library (gloo): not one bit may differ."""
    for name, processes, devices in (("four", 4, 2), ("one", 1, 8)):
        pod = quickstart(tmp_path / name, cache, processes, devices, WHOLE)
        assert pod.codes(3000) == [0] * processes, [log.read_text()[-3000:] for log in pod.logs]
    measured("losses, the whole quickstart in four processes against one (<= 1e-5)", assert_same_losses(tmp_path / "four/run", tmp_path / "one/run"))
    for name in ("forgetting.json", "trained_ids.jsonl"):
        assert (tmp_path / "four/run" / name).read_text() == (tmp_path / "one/run" / name).read_text()
    assert len(metrics(tmp_path / "four/run")) == 1260


def test_process_0_alone_keeps_the_books(four):
    folder, held = four
    assert held == {name: [0] for name in BOOKS}
    assert "done: " in (folder / "process0.log").read_text()
    for index in (1, 2, 3):
        assert not re.search("loss|step|held-out|done", (folder / f"process{index}.log").read_text())


@pytest.mark.parametrize("victim", [2, 0])
def test_all_others_end_with_a_line_when_one_is_killed(victim, cache, tmp_path):  # noqa: F811
    pod = quickstart(tmp_path, cache)
    pod.wait_for(lambda: lines(tmp_path / "run") >= 2)
    pod.members[victim].kill()
    end = time.monotonic() + LIMIT
    try:
        codes = {index: member.wait(max(0.1, end - time.monotonic())) for index, member in enumerate(pod.members) if index != victim}
    finally:
        pod.codes(0)
    assert set(codes.values()) == {1}, [log.read_text()[-3000:] for log in pod.logs]
    for index in codes:
        [line] = pod.errors(index)
        assert re.match(rf"error: process .*{victim}.* of the run.* is gone; everything up to the newest checkpoint is saved", line), line

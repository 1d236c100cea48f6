"""Laws of real processes that die: by kill -9 at random moments and at exact points, by request, and for want of space. The short forms;
`kill.py` and `stop.py` beside this file are the long ones."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from faults import kill, micro, stop
from faults.driver import POINTS
from faults.micro import DRIVER, Position, Reference, Run


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def rows(work) -> Path:
    return micro.hundred_rows(work)


@pytest.fixture(scope="module")
def references(work) -> dict[str, Reference]:
    return kill.make_references(work)


def test_what_is_compared_is_told_apart(references, tmp_path):
    """One bit of the weights, of a loss, of a held-out loss or of an id is a difference; the same run is none; every step has a state of its own."""
    undisturbed = references["keep"].output
    assert micro.differences(undisturbed, undisturbed) == []
    assert len(set(references["keep"].digests.values())) == sum(references["keep"].steps)
    end = f"checkpoints/1-easy/{references['keep'].steps[0]}"
    places = {"hf/2-medium/model.safetensors": b"", "metrics.jsonl": b'"loss": ', "forgetting.json": b'"easy": ', micro.LEDGER: b"quickstart-"}
    for name, before in places.items():
        copy = shutil.copytree(undisturbed, tmp_path / "copy", ignore=shutil.ignore_patterns("checkpoints"))
        shutil.copytree(undisturbed / end, copy / end)
        content = bytearray((copy / name).read_bytes())
        content[content.rfind(before) + len(before) if before else -1] ^= 1
        (copy / name).write_bytes(content)
        assert any(one.startswith(name) for one in micro.differences(copy, undisturbed)), name
        assert f"the arrays of {end} are others" not in micro.differences(copy, undisturbed)
        shutil.rmtree(copy)


def test_killed_sixteen_times_over_three_runs(references, work):
    """Every run ends bit for bit as the undisturbed one, and no whole checkpoint ever held anything else."""
    tally = kill.kill_all(16, 3, seed=1, jobs=2, work=work, references=references)
    print(kill.table(tally.kills))
    assert tally.broken == []
    assert tally.kills.total() == 16
    assert tally.folders >= 3
    assert len({found for _, found in tally.kills}) >= 3, "they hit different things"


def test_stopped_five_times(references, work):
    """Exit code 75 within seconds, whatever it was at; nothing that was logged is lost; a second signal is safe."""
    stops = stop.stop_all(5, seed=1, references=references, work=work)
    assert stops.broken == []
    assert len(stops.seen) == 5


@pytest.mark.parametrize("halves", [("reset", "keep"), pytest.param(("keep", "reset"), marks=pytest.mark.long)])
def test_each_phase_trains_exactly_once_wherever_it_is_killed(references, work, halves):
    """Killed right before and right after the last step, the seal of the last checkpoint, and the export of each phase, and before the
    export's rename. Every other point to one run, every other to another, one process after another."""
    with ThreadPoolExecutor(2) as pool:
        chains = [pool.submit(chain, POINTS[half::2], references[state], work / f"exact-{state}-{half}", state) for half, state in enumerate(halves)]
    for one in chains:
        one.result()


def chain(points: tuple[str, ...], reference: Reference, folder: Path, state: str) -> None:
    """Every process trains from the newest whole checkpoint on, in order, so that no step of a phase that was saved is taken again; the
    ids that were trained, and the result, are those of the undisturbed run."""
    run = Run(folder, folder.parent / "rows.jsonl", folder.parent / "cache", state, save_steps=5)
    for phase, last in enumerate(reference.steps, 1):
        for point in points:
            before = micro.newest(run.output)
            code, taken = taken_by(run, point, phase)
            where = f"{point} of phase {phase}: {run.tail()}"
            assert code == -signal.SIGKILL, where
            assert taken == reference.after(before)[: len(taken)], where
            assert at_point(point, run, reference, phase, taken), where
            assert (micro.newest(run.output) == (phase, last)) == (point not in POINTS[: POINTS.index("after-seal")]), where
    before = micro.newest(run.output)
    assert taken_by(run, "none", 0) == (0, reference.after(before))
    assert micro.differences(run.output, reference.output) == []


def taken_by(run: Run, point: str, phase: int) -> tuple[int, list[Position]]:
    """The exit code of a process that dies at a point, and the optimizer steps that it took."""
    steps = run.config.with_suffix(".steps")
    steps.unlink(missing_ok=True)
    code = run.ends(str(DRIVER), point, str(phase))
    return code, [(int(index), int(step)) for index, step in map(str.split, steps.read_text().splitlines())]


def at_point(point: str, run: Run, reference: Reference, phase: int, taken: list[Position]) -> bool:
    """Whether the process died where it should have."""
    last, exported = (phase, reference.steps[phase - 1]), (run.output / "hf" / reference.folders[phase - 1]).exists()
    if point == "before-step":
        return taken[-1:] == [(phase, last[1] - 1)]
    if point in ("after-step", "before-seal", "after-seal"):
        return taken[-1:] == [last] and not exported
    return exported == (point == "after-export")


SMALL_DISK = """
mount -t tmpfs -o size=64M tmpfs "$1" || exit 99
head -c %d /dev/zero > "$1/ballast"
"$2" -m phased_ift_jax.train "$3" 2> "$4/errors"; echo "exit $?"
"$2" -c "$5" "$1/run"
rm "$1/ballast"
"$2" -m phased_ift_jax.train "$3"; echo "exit $?"
cp -r "$1/run" "$4/run"
"""
LOOK = "import sys; from pathlib import Path; from faults import micro; print('whole', *micro.whole(Path(sys.argv[1])))"


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_loses_nothing(work, rows, tmp_path):
    """Room for one state of a wider model and not for two: exit code 1, one line that says so, the checkpoint before it whole; given room,
    the same command ends as if nothing had been."""
    (tmp_path / "disk").mkdir()
    if subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path / "disk")], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare and user namespaces, to mount a small file system")
    model = shutil.copytree(micro.QUICKSTART / "model", tmp_path / "model")
    sizes = json.loads((model / "config.json").read_text()) | {"hidden_size": 128, "intermediate_size": 384}
    (model / "config.json").write_text(json.dumps(sizes))
    undisturbed = Run(tmp_path / "undisturbed", rows, work / "cache", save_steps=4, model=model)
    undisturbed.must_end()

    state = 3 * (undisturbed.output / "hf/1-easy/model.safetensors").stat().st_size  # weights and two moments
    config, ballast = tmp_path / "small.yaml", (64 << 20) - state * 3 // 2
    config.write_text(yaml.safe_dump(micro.config(tmp_path / "disk/run", rows, "reset", 4, model)))
    command = ["unshare", "-Urm", "bash", "-c", SMALL_DISK % ballast, "-", str(tmp_path / "disk"), sys.executable, str(config), str(tmp_path), LOOK]
    environment = micro.environment(work / "cache")
    environment["PYTHONPATH"] = os.pathsep.join([str(micro.HERE.parent), *filter(None, [environment.get("PYTHONPATH")])])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=micro.PATIENCE, check=False)
    told = [line for line in (tmp_path / "errors").read_text().replace("\r", "\n").splitlines() if re.search("error|traceback", line, re.IGNORECASE)]
    assert len(told) == 1, (tmp_path / "errors").read_text()
    assert "no space is left" in told[0]
    assert "the same command goes on" in told[0]
    said = [line for line in done.stdout.splitlines() if line.startswith(("exit", "whole", "going on"))]
    assert said == ["exit 1", "whole (1, 4)", f"going on from {tmp_path / 'disk/run/checkpoints/1-easy/4'} (epoch 1)", "exit 0"], done.stdout + done.stderr
    assert micro.differences(tmp_path / "run", undisturbed.output) == []

"""Laws of several processes: real ones, with a device mesh over all of them, on 127.0.0.1. What one of them goes through, all end well of."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from test_run import ROOT, assert_same_result, make_config, metrics, rows, train  # noqa: F401

from phased_ift_jax import config as config_module
from phased_ift_jax import convert, processes
from phased_ift_jax.training import manifest

MEMBER = Path(__file__).parent / "pod_member.py"
EPOCHS = 6
GONE = 30  # seconds in which a survivor has ended


class Pod:
    """Processes of one run, started alike; each has a log of its own."""

    def __init__(
        self,
        folder: Path,
        config: config_module.RunConfig,
        cache: Path | None,
        processes: int = 2,
        devices: int = 2,
        words: tuple[str, ...] = (),
        places: tuple[Path, ...] = (),
        surroundings: tuple[dict[str, str], ...] = (),
        joined: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True, parents=True)
        self.logs = [folder / f"process{index}.log" for index in range(processes)]
        path = folder / "config.yaml"
        path.write_text(config_module.dump(config))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.members = []
        for index, log in enumerate(self.logs):
            environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "JAX_NUM_CPU_DEVICES": str(devices)} | (surroundings[index] if surroundings else {})
            if cache:
                environment |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            if processes > 1 or joined:  # with a coordinator of its own, even one process adds up by way of gloo
                environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index)}
            with open(log, "w") as out:
                command = [sys.executable, str(MEMBER), str(path), *words]
                self.members.append(subprocess.Popen(command, cwd=places[index] if places else ROOT, env=environment, stdout=out, stderr=out))

    def codes(self, timeout: float = 240) -> list[int]:
        """Exit codes, once all have ended; what has not ended by then is killed."""
        end = time.monotonic() + timeout
        try:
            return [member.wait(max(0.1, end - time.monotonic())) for member in self.members]
        finally:
            for member in self.members:
                member.kill()

    def errors(self, index: int) -> list[str]:
        lines = re.split(r"[\r\n]+", self.logs[index].read_text(errors="replace"))
        return [line for line in lines if re.match(r"error:|Traceback|\*\*\* |    @|[EF]\d{4} |terminate called", line)]

    def wait_for(self, happened: Callable[[], bool], timeout: float = 180) -> None:
        end = time.monotonic() + timeout
        while not happened():
            assert time.monotonic() < end, [log.read_text()[-2000:] for log in self.logs]
            assert all(member.poll() is None for member in self.members), [log.read_text()[-2000:] for log in self.logs]
            time.sleep(0.02)


def lines(output: Path) -> int:
    path = output / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="module")
def config_of(rows) -> Callable[..., config_module.RunConfig]:  # noqa: F811
    return lambda output, **changes: make_config(
        rows, output, **{"training__num_train_epochs": EPOCHS, "logging__report_to": [], "curriculum__optimizer_state": "keep", "checkpoint__save_steps": 4}
        | {"evaluation__exact_match": True, "evaluation__show_answers": 0, "evaluation__max_new_tokens": 8}
        | changes,
    )


@pytest.fixture(scope="module")
def undisturbed(config_of, cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    pod = Pod(folder, config_of(folder / "run"), cache)
    assert pod.codes() == [0, 0], [log.read_text()[-3000:] for log in pod.logs]
    return folder / "run"


def test_process_0_alone_speaks_and_writes(undisturbed):
    said = [(undisturbed.parent / f"process{index}.log").read_text() for index in (0, 1)]
    assert "done: " in said[0]
    assert "held-out" not in said[1]
    assert "step" not in said[1], "no progress bar either"
    ids = (undisturbed / "trained_ids.jsonl").read_text().splitlines()
    assert len(ids) == len(metrics(undisturbed))


def test_two_processes_compute_what_one_does(undisturbed, config_of, cache, tmp_path, measured):
    """Same batches, same figures: 2 x 2 devices against 1 x 4, in another order of sums."""
    pod = Pod(tmp_path, config_of(tmp_path / "run"), cache, processes=1, devices=4)
    assert pod.codes() == [0]
    measured("losses, two processes against one", assert_same_losses(tmp_path / "run", undisturbed))
    assert (tmp_path / "run/trained_ids.jsonl").read_text() == (undisturbed / "trained_ids.jsonl").read_text()


@pytest.mark.parametrize("source", ["a Hugging Face folder", "what from-hf made of it"])
def test_each_process_reads_its_slices_of_a_pretrained_model(source, undisturbed, rows, cache, tmp_path):  # noqa: F811
    base = undisturbed / "hf/3-hard"
    if source != "a Hugging Face folder":
        assert convert.main(["from-hf", str(base), str(tmp_path / "converted")]) == 0
        base = tmp_path / "converted"
    changes = {"model__init": "pretrained", "model__model_name_or_path": str(base), "curriculum__order": [1], "training__max_steps": 3, "logging__report_to": []}
    pod = Pod(tmp_path, make_config(rows, tmp_path / "two", **changes), cache)
    assert pod.codes() == [0, 0], [log.read_text()[-3000:] for log in pod.logs]
    train(make_config(rows, tmp_path / "one", **changes))
    assert_same_losses(tmp_path / "two", tmp_path / "one")


def assert_same_losses(one: Path, other: Path) -> float:
    """Step by step, to 1e-5; returns the largest difference."""
    assert [(line["phase_index"], line["step"]) for line in metrics(one)] == [(line["phase_index"], line["step"]) for line in metrics(other)]
    losses = [np.array([line["loss"] for line in metrics(run)]) for run in (one, other)]
    np.testing.assert_allclose(*losses, rtol=0, atol=1e-5)
    return float(np.abs(losses[0] - losses[1]).max())


@pytest.fixture(scope="module")
def survived(config_of, cache, tmp_path_factory) -> Path:
    """A run of two, of which process 1, then process 0 was killed."""
    folder = tmp_path_factory.mktemp("killed")
    config = config_of(folder / "run")
    for victim, after in ((1, 6), (0, 30)):
        pod = Pod(folder, config, cache)
        pod.wait_for(lambda after=after: lines(folder / "run") >= after)
        pod.members[victim].kill()
        killed = time.monotonic()
        survivor = 1 - victim
        code = pod.members[survivor].wait(GONE + 60)
        pod.codes()
        assert time.monotonic() - killed < GONE
        assert code == 1
        [line] = pod.errors(survivor)
        assert re.match(rf"error: process .*{victim}.* of the run.* is gone; everything up to the newest checkpoint is saved", line), line
    return folder / "run"


def test_a_survivor_ends_soon_with_one_line_and_both_go_on_bit_for_bit(survived, undisturbed, config_of, cache, tmp_path):
    run = shutil.copytree(survived, tmp_path / "run")
    pod = Pod(tmp_path, config_of(run), cache)
    assert pod.codes() == [0, 0], [log.read_text()[-3000:] for log in pod.logs]
    assert "going on from" in pod.logs[0].read_text()
    assert_same_result(run, undisturbed)
    assert (run / "trained_ids.jsonl").read_text() == (undisturbed / "trained_ids.jsonl").read_text()


def test_what_two_began_one_can_end(survived, undisturbed, config_of, cache, tmp_path, measured):
    run = shutil.copytree(survived, tmp_path / "run")
    pod = Pod(tmp_path, config_of(run), cache, processes=1, devices=4)
    assert pod.codes() == [0], pod.logs[0].read_text()[-3000:]
    measured("losses, two processes against one", assert_same_losses(run, undisturbed))


@pytest.mark.parametrize("asked", [0, 1])
def test_all_stop_at_the_same_step_whoever_is_asked(undisturbed, config_of, cache, tmp_path, asked):
    """Exit code 75 on both, no step lost; started again, the result is the undisturbed one's, bit for bit."""
    pod = Pod(tmp_path, config_of(tmp_path / "run"), cache)
    pod.wait_for(lambda: lines(tmp_path / "run") >= 5)
    pod.members[asked].send_signal(signal.SIGTERM)
    assert pod.codes(60) == [75, 75], [log.read_text()[-3000:] for log in pod.logs]
    last = metrics(tmp_path / "run")[-1]
    found = [facts for path in (tmp_path / "run/checkpoints").glob("*/*") if (facts := manifest.facts_of(path))]
    newest = max((facts["phase"], facts["step"]) for facts in found)
    assert newest == (last["phase_index"], last["step"])
    pod = Pod(tmp_path, config_of(tmp_path / "run"), cache)
    assert pod.codes() == [0, 0], [log.read_text()[-3000:] for log in pod.logs]
    assert_same_result(tmp_path / "run", undisturbed)


def test_what_process_0_refuses_all_refuse(undisturbed, config_of, cache, tmp_path):
    """Both end with its line and exit code 2, and none waits for the other."""
    (tmp_path / "file").write_text("")
    pod = Pod(tmp_path, config_of(tmp_path / "file"), cache)
    assert pod.codes(90) == [2, 2], [log.read_text()[-2000:] for log in pod.logs]
    for index in (0, 1):
        [line] = pod.errors(index)
        assert re.match("error: output_dir: '.*' is a file; name a folder", line)


def test_what_another_process_refuses_all_refuse_before_anything_is_written(undisturbed, rows, cache, tmp_path):  # noqa: F811
    """A host whose file lacks a row: the run that is there is not put aside, and no new one is begun."""
    run, places = shutil.copytree(undisturbed, tmp_path / "run"), (tmp_path / "host0", tmp_path / "host1")
    for place, fewer in zip(places, (0, 1), strict=True):
        place.mkdir()
        (place / "rows.jsonl").write_text("".join(rows.read_text().splitlines(keepends=True)[fewer:]))
    before = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("run*/**/*"))
    pod = Pod(tmp_path, make_config(rows, run, data__path="rows.jsonl"), cache, words=("--data.path", "rows.jsonl", "--fresh"), places=places)
    assert pod.codes(90) == [2, 2], [log.read_text()[-2000:] for log in pod.logs]
    for index in (0, 1):
        [line] = pod.errors(index)
        assert "data.path: its rows, scores or bins is not what process 0 has" in line
    assert sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("run*/**/*")) == before


def test_saves_by_the_clock_come_once_each(config_of, cache, tmp_path):
    """What the processes agree on one step late is not answered twice."""
    config = config_of(tmp_path / "run", checkpoint__save_steps=None, checkpoint__save_minutes=0.02, checkpoint__save_total_limit=1000, training__num_train_epochs=4000)
    pod = Pod(tmp_path, config, cache)
    pod.wait_for(lambda: len(list((tmp_path / "run/checkpoints/1-easy").glob("*/manifest.json"))) >= 4)
    pod.members[1].send_signal(signal.SIGTERM)
    assert pod.codes(60) == [75, 75]
    *saved, _ = sorted(int(path.parent.name) for path in (tmp_path / "run/checkpoints/1-easy").glob("*/manifest.json"))
    assert np.diff(saved).min() > 1, saved


LAST_WORDS = (
    b"E1121 14:36:20.977735    4856 coordination_service.cc:1549] [5] Use error polling to propagate the following error to all tasks: "
    b"UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n1\nThe tasks have crashed.\n"
    b"F1121 14:36:20.978967    4867 client.h:80] Terminating process because the JAX distributed service detected fatal errors.\n"
)


@pytest.mark.parametrize("said", [b"loss 1.0\n", b"\r 3/9 [00:01]\r", b"E0521 08:00:00.000000 1 coordination_service_agent.cc:9] will retry\n"])
def test_what_a_child_says_is_passed_on_up_to_jaxs_last_words(said, capfd):
    """In whatever pieces it comes; a line of JAX's that is not its last changes nothing."""
    for cut in (len(said), len(said) + 40):
        reading, writing = os.pipe()
        whole, withheld = said + LAST_WORDS, []
        os.write(writing, whole[:cut])
        relaying = threading.Thread(target=processes._relay, args=(reading, withheld))
        relaying.start()
        time.sleep(0.1)
        os.write(writing, whole[cut:])
        os.close(writing)
        relaying.join()
        assert capfd.readouterr().err.encode() + b"".join(withheld) == whole
        assert b"client.h" in b"".join(withheld)
        if cut == len(said):
            assert b"".join(withheld) == LAST_WORDS


def test_why_a_child_has_died_is_said_in_a_line():
    rest = "; everything up to the newest checkpoint is saved: start the same command on every host again"
    assert processes.epitaph(signal.SIGABRT, LAST_WORDS, joined=True) == f"process 1 of the run is gone{rest}"
    assert "process 0 of the run, which the others talk through, is gone" in processes.epitaph(signal.SIGABRT, b"coordination: the leader task was preempted", joined=True)
    assert processes.epitaph(signal.SIGKILL, b"", joined=True) == f"a process of the run was ended by SIGKILL{rest}"
    lonely = processes.epitaph(signal.SIGABRT, b"F1 client.h:80] coordination service: DEADLINE_EXCEEDED", joined=False)
    assert re.match(r"the other processes were not found within \d+ s \(.*\); start the same command on every host$", lonely)


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "nonsense", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "nonsense is not host:port"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "'two'"),
        ({"JAX_COORDINATOR_ADDRESS": "127.0.0.1:9"}, "JAX_NUM_PROCESSES not set"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "OMPI_COMM_WORLD_SIZE 2"),
    ],
)
def test_an_environment_that_does_not_say_it_all_is_refused(environment, says, tmp_path):
    """Never is one of several processes taken for the only one."""
    command = [sys.executable, "-m", "phased_ift_jax.train", str(ROOT / "configs/quickstart.yaml"), "--output_dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2, done.stderr
    [line] = [line for line in done.stderr.splitlines() if line.strip()]
    assert line.startswith("error: several processes (")
    assert says in line
    assert not (tmp_path / "run").exists()

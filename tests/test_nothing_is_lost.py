"""Laws of what goes wrong: damaged checkpoints, failed saves, two writers, numbers that are none, silence; and what `status` says of it."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from test_run import Crash, assert_same_result, crash_in_step, final_weights, make_config, metrics, rows, train, undisturbed  # noqa: F401

from phased_ift_jax import cli, interrupts
from phased_ift_jax import config as config_module
from phased_ift_jax import convert as convert_verb
from phased_ift_jax import status as status_verb
from phased_ift_jax import train as train_verb
from phased_ift_jax.files import sole_writer
from phased_ift_jax.records import UserError
from phased_ift_jax.training import checkpoint, loop, manifest, output
from phased_ift_jax.training.checkpoint import Checkpoints, SaveFailed
from phased_ift_jax.training.status import status

pytestmark = pytest.mark.usefixtures("compilation_cache")


@pytest.fixture(scope="module")
def stopped(rows, undisturbed, tmp_path_factory) -> Path:  # noqa: F811
    """A run that crashed within its second phase, with two checkpoints there and one at the end of the first."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    lengths = [phase["steps"] for phase in json.loads((undisturbed / "plan.json").read_text())["phases"]]
    with pytest.MonkeyPatch.context() as patch:
        crash_in_step(patch, lengths[0] + 6)
        with pytest.raises(Crash):
            train(make_config(rows, folder, checkpoint__save_steps=2))
    assert [(position.phase, position.step) for position, _ in store_of(folder).committed()][1:] == [(2, 2), (2, 4)]
    return folder


def store_of(output: Path) -> Checkpoints:
    facts = next(facts for path in sorted((output / "checkpoints/1-easy").glob("[0-9]*")) if (facts := manifest.facts_of(path)))
    return Checkpoints(output / "checkpoints", facts["identity"], 2)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


DAMAGE = {"truncated": truncate, "one bit flipped": flip, "zeroed": zero, "deleted": Path.unlink}


def all_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_to_every_file_is_found(stopped, tmp_path, damage):
    """The checkpoint before it is used, and the damaged one is named with the file, whichever file it is."""
    newest = store_of(stopped).newest()[1]
    before = sorted(store_of(stopped).committed())[-2][1]
    files = all_files(newest)
    assert len(files) >= 6
    for file in files:
        run = shutil.copytree(stopped, tmp_path / "run")
        damaged = run / file.relative_to(stopped)
        if damage != "deleted" and not damaged.stat().st_size:
            shutil.rmtree(run)
            continue
        DAMAGE[damage](damaged)
        store = store_of(run)
        assert store.newest()[1].relative_to(run) == before.relative_to(stopped), file
        assert list(store.damaged) == [run / newest.relative_to(stopped)]
        assert damaged.name in store.damaged[run / newest.relative_to(stopped)]
        assert str(run / newest.relative_to(stopped)) in status(run, verify=True)["damaged"]
        shutil.rmtree(run)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, rows, undisturbed, tmp_path, capsys):  # noqa: F811
    """It says which file is damaged, sets that checkpoint aside, and ends as if nothing had been."""
    run = shutil.copytree(stopped, tmp_path / "run")
    newest = store_of(run).newest()[1]
    victim = max(all_files(newest), key=lambda path: path.stat().st_size)
    flip(victim)
    train(make_config(rows, run))
    said = capsys.readouterr().out
    assert f"'{newest}' is damaged: {victim.relative_to(newest)} has other content than was saved" in said
    assert "going on from" in said
    assert (newest.with_name("damaged-4")).is_dir()
    assert_same_result(run, undisturbed)


def test_no_whole_checkpoint_is_an_error_and_no_start_at_zero(stopped, rows, tmp_path):  # noqa: F811
    """Exit code 2, and --fresh starts again without losing what was there."""
    run = shutil.copytree(stopped, tmp_path / "run")
    for _, path in store_of(run).committed():
        flip(max(all_files(path), key=lambda file: file.stat().st_size))
    with pytest.raises(UserError, match=r"no whole checkpoint is left: in .* has other content than was saved; .*--fresh"):
        train(make_config(rows, run))
    weights = (run / "metrics.jsonl").read_bytes()
    assert output.begin_afresh(make_config(rows, run)) == tmp_path / "run.1"
    assert (tmp_path / "run.1/metrics.jsonl").read_bytes() == weights
    assert not run.exists()
    assert output.begin_afresh(make_config(rows, run)) is None


def crash_in_commit(monkeypatch, where: str, number: int) -> None:
    """Stop the commit thread as a kill would, the given time that it comes to a place: no later line of it is run."""
    calls = itertools.count(1)
    real = getattr(shutil if where == "rmtree" else manifest, where)

    def stop(*arguments, **options):
        if next(calls) == number:
            raise KeyboardInterrupt  # not an Exception: nothing of the commit's own handling runs
        return real(*arguments, **options)

    if where == "rmtree":
        monkeypatch.setattr(checkpoint, "shutil", SimpleNamespace(rmtree=stop))
    else:
        monkeypatch.setattr(manifest, where, stop)


@pytest.mark.parametrize(("where", "number"), [("seal", 1), ("seal", 3), ("unseal", 1), ("rmtree", 1)])
def test_a_kill_in_a_commit_leaves_no_remains_and_no_damage(rows, undisturbed, tmp_path, monkeypatch, where, number):  # noqa: F811
    """Between orbax's rename and the manifest (of the first save, too), before and within the removal of an old checkpoint: the run
    started again goes on, says nothing of damage, and ends as if nothing had been."""
    with monkeypatch.context() as patch:
        crash_in_commit(patch, where, number)
        with pytest.raises(KeyboardInterrupt):
            train(make_config(rows, tmp_path / "run", checkpoint__save_steps=1))
    assert status(tmp_path / "run")["damaged"] == {}
    store = store_of_run(tmp_path / "run")
    store.newest()
    assert not store.damaged
    train(make_config(rows, tmp_path / "run"))
    assert_same_result(tmp_path / "run", undisturbed)
    assert not list((tmp_path / "run/checkpoints").glob("*/.*"))
    assert all(manifest.fault(path) is None for path in (tmp_path / "run/checkpoints").glob("*/*"))


def store_of_run(run: Path) -> Checkpoints:
    return Checkpoints(run / "checkpoints", loop.prepare(config_module.load(run / "config.yaml")).dataset.identity, 2)


def test_a_file_that_the_disk_does_not_hold_is_no_checkpoint(rows, tmp_path, monkeypatch):  # noqa: F811
    """An error at fsync, where delayed allocation and quotas say that the disk is full, fails the save; nothing older is removed."""
    real, calls = os.fsync, itertools.count(1)

    def fsync(handle):
        if "/2/" in os.readlink(f"/proc/self/fd/{handle}") and next(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(SaveFailed, match="no space is left on the disk"):
            train(make_config(rows, tmp_path / "run", checkpoint__save_steps=1))
    assert store_of_run(tmp_path / "run").newest()[0].step == 1


def test_damage_that_is_not_in_the_way_does_not_stop_a_run(stopped, rows, undisturbed, tmp_path):  # noqa: F811
    """An earlier phase that is evaluated and exported is not needed any more; damage twice at one step is set aside twice."""
    run = shutil.copytree(stopped, tmp_path / "run")
    flip(max(all_files(run / "checkpoints/1-easy"), key=lambda file: file.stat().st_size))
    newest = store_of_run(run).newest()[1]
    flip(max(all_files(newest), key=lambda file: file.stat().st_size))
    newest.with_name("damaged-4").mkdir()
    (newest.with_name("damaged-4") / "file").touch()
    train(make_config(rows, run))
    assert newest.with_name("damaged-4.1").is_dir()
    assert_same_result(run, undisturbed)


def test_checkpoints_that_are_gone_are_no_fresh_start(stopped, rows, tmp_path):  # noqa: F811
    """A disk that is not mounted: the folder of checkpoints is empty, though something was saved in it."""
    run = shutil.copytree(stopped, tmp_path / "run", ignore=shutil.ignore_patterns("hf", "forgetting.json"))
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(UserError, match="2-medium/4' was saved and is gone"):
        train(make_config(rows, run))


def test_an_export_of_a_damaged_checkpoint_is_refused(undisturbed, tmp_path):  # noqa: F811
    run = shutil.copytree(undisturbed, tmp_path / "run")
    victim = max(all_files(run / "checkpoints/3-hard"), key=lambda file: file.stat().st_size)
    flip(victim)
    with pytest.raises(UserError, match="has other content than was saved"):
        convert_verb.main(["to-hf", str(run), str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ["begin", "end", "manifest"])
def test_a_failed_save_stops_the_run_at_the_next_step(rows, undisturbed, tmp_path, monkeypatch, when):  # noqa: F811
    """With its cause; the checkpoint before it is whole, and the run started again ends as if nothing had been (trap 21)."""
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    steps, saves = [], itertools.count(1)
    real_save, real_seal, real_step = checkpoint.ocp.save_async, manifest.seal, loop.put

    class Failing:
        def __init__(self, saving):
            self.saving = saving

        def result(self):
            self.saving.result()
            raise full

    def save_async(*arguments, **options):
        number = next(saves)
        if number == 2 and when == "begin":
            raise full
        saving = real_save(*arguments, **options)
        return Failing(saving) if number == 2 and when == "end" else saving

    def seal(path, facts):
        if when == "manifest" and facts["step"] == 6:
            raise full
        real_seal(path, facts)

    def put(tree, dims, mesh):
        if dims == "":
            time.sleep(0.3)  # so that the save is over before the next step but one
            steps.append(1)
        return real_step(tree, dims, mesh)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.ocp, "save_async", save_async)
        patch.setattr(manifest, "seal", seal)
        patch.setattr(loop, "put", put)
        with pytest.raises(SaveFailed, match=r"saving .*/1-easy/6' failed: no space is left on the disk; the checkpoint before it is whole"):
            train(make_config(rows, tmp_path / "run"))
    assert len(steps) <= 8
    assert store_of(tmp_path / "run").newest()[0].step == 3
    train(make_config(rows, tmp_path / "run"))
    assert_same_result(tmp_path / "run", undisturbed)


HOLD = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
from phased_ift_jax.files import sole_writer
with sole_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_one_process_trains_in_a_folder(rows, tmp_path, stopped):  # noqa: F811
    """A second one is told who is at it, before it reads anything; a process that was killed holds nothing."""
    run = shutil.copytree(stopped, tmp_path / "run")
    with sole_writer(run), pytest.raises(UserError, match=rf"process {os.getpid()} on .*, is at work in '{run}'"):
        loop.prepare(make_config(tmp_path / "no such file", run))
    with sole_writer(run), pytest.raises(UserError, match=rf"process {os.getpid()} on .*, is at work in '{run}'"), sole_writer(run):
        pass
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        loop.prepare(make_config(rows, run))
    assert status(run)["at_work"]
    child.kill()
    child.communicate(timeout=30)
    loop.prepare(make_config(rows, run))
    assert not status(run)["at_work"]


def poison(monkeypatch, at: int) -> None:
    """Make the loss of one step of the run no number, by way of its weights."""
    real, calls = loop.put, itertools.count(1)

    def put(tree, dims, mesh):
        if dims == "ABT" and hasattr(tree, "weights_BT") and next(calls) == at:
            tree.weights_BT[...] *= np.float32(math.nan)
        return real(tree, dims, mesh)

    monkeypatch.setattr(loop, "put", put)


def test_a_loss_that_is_no_number_ends_the_run_with_its_rows_named(rows, undisturbed, tmp_path, monkeypatch):  # noqa: F811
    """Phase, step and ids are said, no checkpoint holds anything of it, and the run goes on from the one before."""
    config = make_config(rows, tmp_path / "run", data__eval_size=0)
    with monkeypatch.context() as patch:
        poison(patch, 5)
        with pytest.raises(loop.NonFinite, match="phase easy, step 5: loss is nan; rows of the batch: ") as caught:
            train(config)
    assert "\n" not in str(caught.value)
    run = loop.prepare(config)
    ids = [run.dataset.records[row].id for row in run.plan.phases[0].steps[4]]
    assert json.loads((tmp_path / "run/nonfinite.json").read_text()) == {"phase": "easy", "phase_index": 1, "step": 5, "loss": "nan", "grad_norm": "nan", "ids": ids}
    assert store_of(tmp_path / "run").newest()[0].step == 3
    train(config)
    train(make_config(rows, tmp_path / "whole", data__eval_size=0))
    for name, weight in final_weights(tmp_path / "whole").items():
        np.testing.assert_array_equal(final_weights(tmp_path / "run")[name], weight)


def test_such_a_step_may_be_left_out_and_is_counted(rows, tmp_path, monkeypatch, capsys):  # noqa: F811
    """With on_nonfinite: skip weights and moments stay as they were, and the line of that step says so; here it is the last of a phase."""
    config = make_config(rows, tmp_path / "run", data__eval_size=0, training__on_nonfinite="skip", logging__logging_steps=4)
    last = len(loop.prepare(config).plan.phases[0].steps)
    poison(monkeypatch, last)
    train(config)
    assert f"| easy | {last} | 2 |" in (tmp_path / "run/hf/1-easy/README.md").read_text()
    assert "| left out |" in (tmp_path / "run/hf/1-easy/README.md").read_text()
    assert all(np.isfinite(weight).all() for weight in final_weights(tmp_path / "run").values())
    [line] = [line for line in metrics(tmp_path / "run") if line.get("skipped")]
    assert (line["phase"], line["step"], line["loss"], line["grad_norm"]) == ("easy", last, None, None)
    assert status(tmp_path / "run")["skipped"] == 1


def test_a_step_left_out_leaves_no_bit_changed(rows, tmp_path):  # noqa: F811
    config = make_config(rows, tmp_path / "run", training__on_nonfinite="skip")
    run = loop.prepare(config)
    phase = run.plan.phases[0]
    trainer = run.trainer(phase)
    batch = next(iter(loop.batches(phase.steps, 0, run.dataset.examples, phase.shapes, 1)))
    rate = np.float32(1e-3)
    state, _ = trainer.step(trainer.fresh(run.base_params()), loop.put(batch, "ABT", run.mesh), rate)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    batch.weights_BT[...] *= np.float32(math.inf)
    state, numbers = trainer.step(state, loop.put(batch, "ABT", run.mesh), rate)
    assert not math.isfinite(float(numbers["loss"]))
    jax.tree.map(np.testing.assert_array_equal, (state.params, state.opt_state), before)


def test_silence_is_answered_with_the_stacks_of_all_threads(capfd):
    with interrupts.watchdog(0.2 / 60) as alive:
        for _ in range(4):
            time.sleep(0.1)
            alive()
        assert "Thread" not in capfd.readouterr().err
        time.sleep(0.5)
    assert "test_silence_is_answered" in capfd.readouterr().err
    time.sleep(0.3)
    assert capfd.readouterr().err == ""


def test_status_says_how_far_a_run_is(stopped, undisturbed, tmp_path, capsys):  # noqa: F811
    facts = status(stopped)
    assert [(phase["folder"], phase["done"] == phase["steps"], phase["evaluated"], phase["exported"]) for phase in facts["phases"]] == [
        ("1-easy", True, True, True),
        ("2-medium", False, False, False),
        ("3-hard", False, False, False),
    ]
    assert facts["phases"][1]["done"] == 4
    assert facts["next_start"] == "goes on at step 5 of 2-medium"
    assert facts["checkpoint"].endswith("2-medium/4")
    assert facts["seconds_left"] > 0
    assert status_verb.main([str(stopped), "--verify"]) == 0
    assert "every file of every checkpoint is as it was saved" in capsys.readouterr().out
    done = status(undisturbed)
    assert done["next_start"] == "finds nothing left to do"
    assert done["seconds_left"] == 0
    run = shutil.copytree(stopped, tmp_path / "run")
    victim = max(all_files(run / "checkpoints/2-medium/4"), key=lambda file: file.stat().st_size)
    truncate(victim)
    with pytest.raises(UserError, match=f"2-medium/4' is damaged: {victim.relative_to(run / 'checkpoints/2-medium/4')} has"):
        status_verb.main([str(run), "--verify"])
    assert "goes on at step 3 of 2-medium" in capsys.readouterr().out
    with pytest.raises(UserError, match="holds no run that was started"):
        status_verb.main([str(tmp_path)])


def test_status_needs_no_jax(undisturbed):  # noqa: F811
    program = "import sys\nfrom phased_ift_jax import status\nstatus.main(sys.argv[1:])\nassert not {'jax', 'orbax', 'transformers'} & set(sys.modules)"
    told = subprocess.run([sys.executable, "-c", program, str(undisturbed), "--json"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(told)["phases"][2]["done"] > 0


def test_a_failure_inside_is_one_line_and_exit_code_1(capsys):
    def fails(argv):
        raise SaveFailed("saving failed")

    with pytest.raises(SystemExit) as ended:
        cli.run(fails, [])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: saving failed\n"


def test_fresh_is_a_flag(rows, stopped, tmp_path, capsys, monkeypatch):  # noqa: F811
    """--fresh renames the run that is there, whatever its settings were, once the new one is found sound; then it starts at zero."""
    run = shutil.copytree(stopped, tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text((run / "config.yaml").read_text())
    with pytest.raises(UserError, match="no such file"):
        train_verb.main([str(path), "--output_dir", str(run), "--seed", "8", "--fresh", "--data.path", "nowhere.jsonl"])
    assert run.exists()
    seen = []
    monkeypatch.setattr(loop, "train", lambda run, *_: seen.append((run.config.seed, run.output.exists())) or (_ for _ in ()).throw(Crash))
    with pytest.raises(Crash):
        train_verb.main([str(path), "--output_dir", str(run), "--seed", "8", "--fresh"])
    assert seen == [(8, False)]
    assert f"is now in '{tmp_path / 'run.1'}'" in capsys.readouterr().out
    assert (tmp_path / "run.1/config.yaml").exists()


def test_what_was_made_of_a_phase_that_is_trained_again_is_made_again(rows, undisturbed, tmp_path, capsys):  # noqa: F811
    """After a fallback behind the end of a phase, its figures and its export are those of the weights that are there then; the old export is kept."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    for phase in ("2-medium", "3-hard"):
        truncate(max(all_files(run / "checkpoints" / phase), key=lambda file: file.stat().st_size))
    (run / "hf/2-medium/model.safetensors").write_bytes(b"of other weights")
    train(make_config(rows, run))
    assert f"what was exported from 2-medium is now in '{run / 'hf/before-2-medium'}'" in capsys.readouterr().out
    assert (run / "hf/before-2-medium/model.safetensors").read_bytes() == b"of other weights"
    assert (run / "hf/2-medium/model.safetensors").read_bytes() == (undisturbed / "hf/2-medium/model.safetensors").read_bytes()
    for name in ("forgetting.json", "trained_ids.jsonl"):
        assert (run / name).read_text() == (undisturbed / name).read_text()
    assert metrics(run) == metrics(undisturbed)

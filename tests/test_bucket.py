"""A run whose output_dir is in a bucket: the laws of a run on a disk, held on a server of this machine, through orbax and tensorstore."""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import fake_gcs
import pytest
from fake_gcs import server  # noqa: F401
from test_processes import Pod
from test_run import Crash, assert_same_result, crash_in_step, final_weights, make_config, metrics, rows, train, undisturbed  # noqa: F401

from phased_ift_jax import cli, lease, object_store
from phased_ift_jax import report as report_verb
from phased_ift_jax import status as status_verb
from phased_ift_jax import train as train_verb
from phased_ift_jax.config import dump
from phased_ift_jax.lease import LEASE, Lease, LeaseLost
from phased_ift_jax.object_store import Objects
from phased_ift_jax.records import UserError
from phased_ift_jax.training import loop, mirror
from phased_ift_jax.training.checkpoint import SaveFailed
from phased_ift_jax.training.status import status_of_address

pytestmark = pytest.mark.usefixtures("compilation_cache")
ADDRESS = "gs://bucket/runs/run"


@pytest.fixture
def gcs(server, monkeypatch, tmp_path) -> fake_gcs.FakeGCS:  # noqa: F811
    """An empty bucket, a machine that has never seen a run, and no patience."""
    fake_gcs.empty(server, monkeypatch)
    monkeypatch.setenv("PHASED_IFT_RUN_ID", "this-run")
    move(monkeypatch, tmp_path, "machine")
    return server


def move(monkeypatch, tmp_path: Path, machine: str) -> None:
    """Go on with another disk."""
    monkeypatch.setenv("PHASED_IFT_WORK", str(tmp_path / machine))


@pytest.fixture(scope="module")
def stopped(server, rows, undisturbed, tmp_path_factory) -> dict[str, fake_gcs.Object]:  # noqa: F811
    """What a run has left in the bucket that crashed within its second phase: one checkpoint at the end of the first, two within."""
    server.buckets["bucket"].clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHASED_IFT_RUN_ID", "this-run")
        patch.setenv("PHASED_IFT_WORK", str(tmp_path_factory.mktemp("stopped")))
        crash_in_step(patch, len([line for line in metrics(undisturbed) if line["phase_index"] == 1]) + 6)
        with pytest.raises(Crash):
            train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    sealed = [name.removesuffix("/manifest.json") for name in server.objects("runs/run/checkpoints/") if name.endswith("/manifest.json")]
    assert sealed == [f"runs/run/checkpoints/{at}" for at in ("1-easy/10", "2-medium/2", "2-medium/4")]
    return dict(server.buckets["bucket"])


def test_a_run_in_a_bucket_is_a_run_on_a_disk(gcs, rows, undisturbed, monkeypatch, tmp_path, capsys):  # noqa: F811
    """Weights, metrics and matrix are the same to the last bit, nothing was renamed or copied, and a machine that knows nothing of it
    finds nothing left to do."""
    run = train(make_config(rows, ADDRESS))
    assert_same_result(run.output, undisturbed)
    for file in ("metrics.jsonl", "forgetting.json", "plan.json", "config.yaml"):
        assert gcs.objects()[f"runs/run/{file}"] == (run.output / file).read_bytes()
    assert gcs.objects()["runs/run/hf/3-hard/model.safetensors"] == (undisturbed / "hf/3-hard/model.safetensors").read_bytes()
    assert not [asked for asked in gcs.asked if "rewriteTo" in asked or "copyTo" in asked or "compose" in asked]
    assert f"runs/run/{LEASE}" not in gcs.objects(), "the lease is given back"
    assert str(tmp_path) not in json.dumps({name: content.decode(errors="replace") for name, content in gcs.objects().items() if "README" in name or name.endswith("checkpoint")})
    before = gcs.objects()
    move(monkeypatch, tmp_path, "another machine")
    train(make_config(rows, ADDRESS))
    assert gcs.objects() == before
    assert f"going on from {ADDRESS}/checkpoints/3-hard/" in capsys.readouterr().out


def test_a_machine_that_is_gone_is_no_loss(gcs, stopped, rows, undisturbed, monkeypatch, tmp_path):  # noqa: F811
    """Crashed in a step, and gone on with on a machine whose disk is empty: as if nothing had been, whatever has become of the copies at the top."""
    gcs.buckets["bucket"].update(stopped)
    gcs.put("runs/run/metrics.jsonl", b"nonsense")
    gcs.delete("runs/run/forgetting.json")
    lease = Objects(ADDRESS)
    run = train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    assert_same_result(run.output, undisturbed)
    assert lease.list().keys() >= {"hf/1-easy.json", "hf/2-medium.json", "hf/3-hard.json"}
    assert len([name for name in lease.list() if name.endswith("manifest.json")]) == 3


def test_the_time_of_a_run_is_kept_in_the_bucket(gcs, rows, monkeypatch, tmp_path):  # noqa: F811
    """A start that was killed before anything was saved, one that was killed on another machine, and one that ended: each is noted, and their time."""
    for machine, step in (("first", 1), ("second", 6)):
        move(monkeypatch, tmp_path, machine)
        with monkeypatch.context() as patch:
            patch.setattr(mirror.Mirror, "close", lambda self: self.lease._ended.set())  # a kill gives nothing back
            crash_in_step(patch, step)
            with pytest.raises(Crash):
                train(make_config(rows, ADDRESS))
    killed = status_of_address(ADDRESS)["goodput"]
    assert (killed["starts"], killed["ended"]) == (2, False)
    move(monkeypatch, tmp_path, "third")
    run = train(make_config(rows, ADDRESS))
    facts = status_of_address(ADDRESS)["goodput"]
    assert (facts["starts"], facts["ended"]) == (3, True)
    assert facts["trained_seconds"] == pytest.approx(sum(json.loads(line)["seconds"] for line in (run.output / "metrics.jsonl").read_text().splitlines()), rel=1e-12)
    times = [json.loads(line) for line in gcs.objects()["runs/run/starts.jsonl"].splitlines()]
    assert facts["wall_seconds"] == times[-1]["done"] - times[0]["start"]


def test_a_start_that_cannot_read_leaves_the_bucket_as_it_was(gcs, stopped, rows, undisturbed, monkeypatch, tmp_path):  # noqa: F811
    """What a failed download leaves on this machine is not the run, and is not put in its place."""
    gcs.buckets["bucket"].update(stopped)
    before = gcs.objects()

    def download(self, files):
        for _, path in files:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        raise object_store.StoreError("the network is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Objects, "download", download)
        with pytest.raises(object_store.StoreError, match="the network is gone"):
            train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    assert gcs.objects() == before
    assert_same_result(train(make_config(rows, ADDRESS, checkpoint__save_steps=2)).output, undisturbed)


def test_what_was_taken_over_is_not_touched_any_more(gcs, stopped, monkeypatch, tmp_path):
    """A process that has slept through its lease removes nothing, uploads nothing and commits nothing of what another has put there since."""
    gcs.buckets["bucket"].update(stopped)
    objects, checkpoint = Objects(ADDRESS), tmp_path / "run/checkpoints/2-medium/4"
    (tmp_path / "run").mkdir()
    slept = mirror.Mirror(objects, tmp_path / "run", Lease(objects).acquire())
    Lease(objects).acquire()
    before = gcs.objects()
    for act in (slept.begin, slept.settle, slept.remove, lambda path: slept.commit(path, "{}"), lambda path: slept.export(path)):
        with pytest.raises(LeaseLost):
            act(checkpoint)
        assert gcs.objects() == before


@pytest.mark.parametrize("moment", ["first save", "manifest", "removal", "evaluation", "export"])
def test_a_kill_at_any_moment_is_no_loss(gcs, rows, undisturbed, monkeypatch, tmp_path, moment, capsys):  # noqa: F811
    """Before a manifest, within a removal, after a phase, before an export's last object: nothing half done is taken for whole."""
    owner, name, number = {
        "first save": (mirror.Mirror, "commit", 1),
        "manifest": (mirror.Mirror, "commit", 3),
        "removal": (mirror.Mirror, "_clear", 4),  # the saves begin with one, too: the fourth is the first removal
        "evaluation": (loop, "evaluate", 2),
        "export": (mirror.Mirror, "publish", 2),
    }[moment]
    real, calls = getattr(owner, name), itertools.count(1)

    def stop(*arguments, **options):
        if next(calls) == number:
            if moment == "removal":
                store, checkpoint = arguments
                store.objects.write(store._mark(checkpoint), b"")
                store.objects.delete([f"{store._name(checkpoint)}/manifest.json"])
            raise KeyboardInterrupt  # not an Exception: nothing of the commit's own handling runs
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, stop)
        patch.setattr(mirror.Mirror, "close", lambda self: self.lease._ended.set())  # a kill gives nothing back
        with pytest.raises(KeyboardInterrupt):
            train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    assert "runs/run/checkpoints/1-easy/.2.under-way" in gcs.objects() or moment != "removal"
    move(monkeypatch, tmp_path, "another machine")
    run = train(make_config(rows, ADDRESS, checkpoint__save_steps=5))
    assert_same_result(run.output, undisturbed)
    found = {match[1] for name in gcs.objects() if (match := re.match(r"(.*/checkpoints/[^/]+/[0-9]+)/", name))}
    assert {f"{checkpoint}/manifest.json" for checkpoint in found} <= gcs.objects().keys(), "remains are removed"
    assert "damaged" not in capsys.readouterr().out
    assert not [name for name in gcs.objects() if "under-way" in name]


DAMAGE = {"a bit flipped": fake_gcs.FakeGCS.flip, "deleted": fake_gcs.FakeGCS.delete}


@pytest.mark.parametrize("damage", DAMAGE)
def test_every_damage_to_every_object_is_found(gcs, stopped, damage):
    """Whichever object of the newest checkpoint it is, the one before is next, and the object is named; nothing but listings is read for it."""
    newest = [name for name in stopped if name.startswith("runs/run/checkpoints/2-medium/4/") and stopped[name].content]
    assert len(newest) >= 12
    for name in newest:
        gcs.buckets["bucket"].clear()
        gcs.buckets["bucket"].update(stopped)
        DAMAGE[damage](gcs, name)
        facts = status_of_address(ADDRESS, verify=True)
        assert facts["checkpoint"] == f"{ADDRESS}/checkpoints/2-medium/2", name
        [(path, fault)] = facts["damaged"].items()
        assert path == f"{ADDRESS}/checkpoints/2-medium/4"
        assert name.removeprefix("runs/run/checkpoints/2-medium/4/").removesuffix(".json") in fault
    assert not [asked for asked in gcs.asked if asked.startswith("GET") and "/d/" in asked]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(gcs, stopped, rows, undisturbed, capsys):  # noqa: F811
    """It says which object is damaged, and ends as if nothing had been, with a whole checkpoint where the damaged one was."""
    gcs.buckets["bucket"].update(stopped)
    victim = max((name for name in stopped if "2-medium/4/" in name), key=lambda name: len(stopped[name].content))
    gcs.flip(victim)
    run = train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    said = capsys.readouterr().out
    assert f"'{ADDRESS}/checkpoints/2-medium/4' is damaged: {victim.partition('/4/')[2]} has other content than was saved" in said
    assert f"going on from {ADDRESS}/checkpoints/2-medium/2" in said
    assert gcs.objects("runs/run/hf/2-medium.json")
    assert_same_result(run.output, undisturbed)


def test_no_whole_checkpoint_is_an_error_and_no_start_at_zero(gcs, stopped, rows):  # noqa: F811
    gcs.buckets["bucket"].update(stopped)
    for name in stopped:
        if name.endswith("state/_METADATA"):
            gcs.flip(name)
    with pytest.raises(UserError, match=rf"no whole checkpoint is left: in '{ADDRESS}/checkpoints/.*_METADATA has other content"):
        train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    for name in stopped:
        if "/checkpoints/" in name:
            gcs.delete(name)
    with pytest.raises(UserError, match=rf"'{ADDRESS}/checkpoints/2-medium/4' was saved and is gone"):
        train(make_config(rows, ADDRESS, checkpoint__save_steps=2))


@pytest.mark.parametrize(("what", "status"), [("/1-easy/6/state/", 403), ("/1-easy/6/ledgers/", 503), ("/1-easy/6/manifest.json", 503), (r"/\.6\.under-way", 503)])
def test_a_failed_save_stops_the_run_with_one_line(gcs, rows, undisturbed, monkeypatch, tmp_path, what, status):  # noqa: F811
    """Arrays, ledgers, manifest or the mark before them: the checkpoint before is whole, and the same command goes on from it."""
    gcs.fail(f"POST .*{what}", status)
    line = rf"^saving '{ADDRESS}/checkpoints/1-easy/6' failed: .*{status}.*; the checkpoint before it is whole, and the same command goes on from there$"
    with pytest.raises(SaveFailed, match=line) as caught:
        train(make_config(rows, ADDRESS))
    assert "\n" not in str(caught.value)
    facts = status_of_address(ADDRESS, verify=True)
    assert (facts["checkpoint"], facts["damaged"]) == (f"{ADDRESS}/checkpoints/1-easy/3", {})
    gcs.faults.clear()
    move(monkeypatch, tmp_path, "another machine")
    assert_same_result(train(make_config(rows, ADDRESS)).output, undisturbed)


@pytest.mark.parametrize("status", [503, 0, -1])
def test_passing_faults_are_not_noticed(gcs, rows, undisturbed, monkeypatch, status):  # noqa: F811
    """Here and there the store is busy, or a connection ends before its request or its answer is through."""
    monkeypatch.setattr(object_store, "PATIENCE", 60.0)
    for skip in range(20, 400, 60):
        gcs.fail(r"GET|LIST|(POST|DELETE) .*(ledgers|manifest.json|under-way|lease)", status, times=1, skip=skip)
    assert_same_result(train(make_config(rows, ADDRESS)).output, undisturbed)
    assert not any(fault.times for fault in gcs.faults)


def test_what_was_exported_from_weights_that_are_gone_is_made_again(gcs, rows, undisturbed, tmp_path, monkeypatch):  # noqa: F811
    """The run is back in its last phase: its export there counts no more, and an end that is the same makes the same."""
    train(make_config(rows, ADDRESS))
    [victim] = [name for name in gcs.objects("runs/run/checkpoints/3-hard/") if name.endswith("state/_METADATA")]
    gcs.flip(victim)
    exports = gcs.buckets["bucket"]["runs/run/hf/3-hard.json"].generation
    move(monkeypatch, tmp_path, "another machine")
    assert_same_result(train(make_config(rows, ADDRESS)).output, undisturbed)
    assert gcs.buckets["bucket"]["runs/run/hf/3-hard.json"].generation > exports


def test_an_old_checkpoint_that_cannot_be_removed_stops_nothing(gcs, rows, undisturbed, capfd):  # noqa: F811
    gcs.fail("DELETE .*/1-easy/3/manifest.json", 403)
    assert_same_result(train(make_config(rows, ADDRESS)).output, undisturbed)
    assert "warning: an old checkpoint cannot be removed: 'gs://bucket/runs/run/checkpoints/1-easy/3/manifest.json' cannot be removed" in capfd.readouterr().err


def test_one_process_trains_at_an_address(gcs, rows, undisturbed, monkeypatch, tmp_path, capsys):  # noqa: F811
    """Another run is told who is at it, before it reads anything, with exit code 2; the same run, and any after the expiry, takes over."""
    (tmp_path / "run.yaml").write_text(dump(make_config(rows, ADDRESS)))
    other = Lease(Objects(ADDRESS), "another-tpu", 60).acquire()
    other._ended.set()
    with pytest.raises(UserError, match="another-tpu"):
        loop.prepare(make_config(tmp_path / "no such file", ADDRESS))
    with pytest.raises(SystemExit) as ended:
        cli.run(train_verb.main, [str(tmp_path / "run.yaml")])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert f"another-tpu (process {os.getpid()} on " in said
    assert f"is at work in '{ADDRESS}'; wait for it to end, or choose another output_dir" in said
    with pytest.raises(UserError, match=f"'{ADDRESS}' holds no run that was started"):
        status_of_address(ADDRESS)
    assert list(gcs.objects()) == [f"runs/run/{LEASE}"]
    held = gcs.buckets["bucket"][f"runs/run/{LEASE}"]
    gcs.buckets["bucket"][f"runs/run/{LEASE}"] = fake_gcs.Object(held.content, held.generation, held.updated - 61)
    assert_same_result(train(make_config(rows, ADDRESS)).output, undisturbed)


def test_a_run_that_was_taken_over_stops_and_commits_nothing(gcs, rows, undisturbed, monkeypatch, tmp_path):  # noqa: F811
    """In the middle of its second save: the arrays are there, the manifest is not, and the run that took over ends undisturbed."""
    real, taken = mirror.Mirror.settle, []

    def settle(self, checkpoint):
        real(self, checkpoint)
        if checkpoint.name == "6" and not taken:
            taken.append(Lease(Objects(ADDRESS), "this-run", 60).acquire())

    monkeypatch.setattr(mirror.Mirror, "settle", settle)
    with pytest.raises((LeaseLost, SaveFailed), match=f"'{ADDRESS}' was taken over by this-run \\(process"):
        train(make_config(rows, ADDRESS))
    assert "runs/run/checkpoints/1-easy/6/state/_METADATA" in gcs.objects()
    assert "runs/run/checkpoints/1-easy/6/manifest.json" not in gcs.objects()
    assert f"runs/run/{LEASE}" in gcs.objects(), "what is fenced gives nothing back"
    taken[0].release()
    move(monkeypatch, tmp_path, "another machine")
    assert_same_result(train(make_config(rows, ADDRESS)).output, undisturbed)


def test_a_renewal_that_finds_another_stops_the_run_at_the_next_step(gcs, rows, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lease, "LEASE_SECONDS", 0.4)
    steps, real = [], loop.put

    def put(tree, dims, mesh):
        if dims == "":
            steps.append(1)
            if len(steps) == 2:
                Lease(Objects(ADDRESS), "this-run", 60).acquire()
            time.sleep(0.3)
        return real(tree, dims, mesh)

    monkeypatch.setattr(loop, "put", put)
    with pytest.raises(LeaseLost, match="was taken over by this-run"):
        train(make_config(rows, ADDRESS, data__eval_size=0, checkpoint__save_steps=1000))
    assert len(steps) <= 6


def test_two_processes_train_into_a_bucket(gcs, rows, tmp_path):  # noqa: F811
    """Killed and started again on two machines that know nothing of it: what two processes make on a disk, to the last bit."""

    def pod(name: str, output: str | Path, cache: Path | None) -> Pod:
        machines = tuple({"PHASED_IFT_WORK": str(tmp_path / name / f"machine{index}")} for index in range(2))
        return Pod(tmp_path / name, make_config(rows, output, checkpoint__save_steps=2), cache, surroundings=machines)

    killed = pod("first", ADDRESS, None)  # what it compiles lies in the bucket, too
    killed.wait_for(lambda: len([name for name in gcs.objects() if name.endswith("manifest.json")]) >= 2)
    for member in killed.members:
        member.kill()
        member.wait()
    for name, output in (("second", ADDRESS), ("third", tmp_path / "disk/run")):
        again = pod(name, output, tmp_path / "compiled")
        assert again.codes() == [0, 0], [log.read_text()[-3000:] for log in again.logs]
    assert f"going on from {ADDRESS}/checkpoints/1-easy/" in (tmp_path / "second/process0.log").read_text()
    for file in ("forgetting.json", "trained_ids.jsonl", "hf/3-hard/model.safetensors"):
        assert gcs.objects()[f"runs/run/{file}"] == (tmp_path / "disk/run" / file).read_bytes(), file


def test_a_run_is_not_continued_with_settings_that_would_change_it(gcs, stopped, rows):  # noqa: F811
    gcs.buckets["bucket"].update(stopped)
    with pytest.raises(UserError, match=f"seed: the run in '{ADDRESS}' was started with 7, this is 8"):
        loop.prepare(make_config(rows, ADDRESS, seed=8))
    gcs.put("runs/run/config.yaml", b"nonsense")
    with pytest.raises(UserError, match=f"'{ADDRESS}/config.yaml' is no configuration of this version"):
        loop.prepare(make_config(rows, ADDRESS))
    gcs.buckets["bucket"].clear()
    gcs.put("runs/run/thesis.tex", b"years of work")
    with pytest.raises(UserError, match=f"'{ADDRESS}' is not empty and holds no run"):
        loop.prepare(make_config(rows, ADDRESS))


def test_fresh_is_refused_where_nothing_can_be_renamed(gcs, stopped, rows, tmp_path):  # noqa: F811
    gcs.buckets["bucket"].update(stopped)
    (tmp_path / "run.yaml").write_text(dump(make_config(rows, ADDRESS)))
    with pytest.raises(UserError, match=f"--fresh: nothing in '{ADDRESS}' can be renamed; name another output_dir"):
        train_verb.main([str(tmp_path / "run.yaml"), "--fresh"])
    assert gcs.buckets["bucket"] == stopped


def test_a_bucket_that_is_not_there_is_the_users_fault(gcs, rows):  # noqa: F811
    with pytest.raises(UserError, match=r"output_dir: 'gs://nowhere/run/config.yaml' .*|output_dir: 'gs://nowhere/run' cannot be listed: no such bucket"):
        loop.prepare(make_config(rows, "gs://nowhere/run"))
    with pytest.raises(UserError, match=r"'s3://bucket/run' is neither a folder on a disk nor an address such as gs://bucket/runs/one"):
        loop.prepare(make_config(rows, "s3://bucket/run"))


def test_status_of_an_address(gcs, stopped, capsys):
    """The same facts as of a folder, without JAX, and who is at work is the lease's holder."""
    gcs.buckets["bucket"].update(stopped)
    assert status_verb.main([ADDRESS, "--verify"]) == 0
    said = capsys.readouterr().out
    assert f"newest checkpoint, verified: {ADDRESS}/checkpoints/2-medium/4" in said
    assert "the next start goes on at step 5 of 2-medium" in said
    assert "at work: no process" in said
    lease = Lease(Objects(ADDRESS), "this-run", 60).acquire()
    program = "import sys\nfrom phased_ift_jax import status\nstatus.main(sys.argv[1:])\nassert not {'jax', 'orbax', 'transformers'} & set(sys.modules)"
    facts = json.loads(subprocess.run([sys.executable, "-c", program, ADDRESS, "--json"], capture_output=True, text=True, check=True, timeout=60).stdout)
    assert [phase["exported"] for phase in facts["phases"]] == [True, False, False]
    assert facts["at_work"].startswith("this-run (process")
    assert facts["run"] == ADDRESS
    lease.release()


@pytest.mark.parametrize("victim", ["hf/1-easy/model.safetensors", "hf/1-easy.json"])
def test_a_damaged_export_is_made_again(gcs, stopped, rows, undisturbed, victim):  # noqa: F811
    gcs.buckets["bucket"].update(stopped)
    gcs.flip(f"runs/run/{victim}")
    train(make_config(rows, ADDRESS, checkpoint__save_steps=2))
    assert gcs.objects()["runs/run/hf/1-easy/model.safetensors"] == (undisturbed / "hf/1-easy/model.safetensors").read_bytes()


def test_an_export_is_brought_back_for_the_hub(gcs, rows, undisturbed, monkeypatch, tmp_path):  # noqa: F811
    train(make_config(rows, ADDRESS))
    move(monkeypatch, tmp_path, "another machine")
    run = train(make_config(rows, ADDRESS, export__push_to_hub=True, export__hub_model_id="me/model"))
    monkeypatch.setattr(loop.hub, "push", lambda folder, name: sorted(path.name for path in folder.iterdir()))
    assert loop.publish(run) == sorted(path.name for path in (undisturbed / "hf/3-hard").iterdir())
    assert final_weights(run.output).keys() == final_weights(undisturbed).keys()
    shutil.rmtree(run.output)


def test_a_report_of_a_run_in_a_bucket_is_of_what_lies_there(gcs, stopped, tmp_path, monkeypatch):
    gcs.buckets["bucket"].update(stopped)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert report_verb.main([ADDRESS, "--out", str(tmp_path / "report.html")]) == 0
    (run,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert run["name"] == ADDRESS
    assert run["forgetting"]["rows"] == json.loads(gcs.objects()["runs/run/forgetting.json"])["rows"]
    assert run["plan"]["budget"] == json.loads(gcs.objects()["runs/run/plan.json"])["budget"]
    assert not run["finished"]
    assert run["versions"]
    assert str(tmp_path) not in (tmp_path / "report.html").read_text()

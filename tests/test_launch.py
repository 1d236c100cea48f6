"""Laws of `launch/`: against a gcloud, an srun and an nvidia-smi of this file's own, whose workers are folders that run what they are sent.

A secret reaches the run and nothing else; what one worker does, all do; a worker that fails, or keeps silent, is named.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launch").glob("*.sh"), *(ROOT / "launch").glob("*.sbatch")])
TOKEN, KEY, MANAGED = "hf_AbCdEfGhIjKlMnOp", "0123456789abcdef-wandb", "from-the-manager-77"
SYSTEM = "/usr/local/bin:/usr/bin:/bin"

# A cloud in a folder: a file `state`, and for each worker of each node a home in which commands are really run.
GCLOUD = """
import json, os, shutil, subprocess, sys
from pathlib import Path
cloud, args = Path(os.environ["FAKE_CLOUD"]), sys.argv[1:]
flags = dict(a[2:].partition("=")[::2] for a in args if a.startswith("--"))
words = [a for a in args if not a.startswith("--")]
said = sys.stdin.read()
number = len(list((cloud / "calls").iterdir()))
(cloud / "calls" / f"{os.getpid()}-{os.urandom(3).hex()}.json").write_text(json.dumps({"order": number, "args": args, "stdin": said}))
state = (cloud / "state").read_text()
homes = lambda node: sorted((cloud / "homes" / node).iterdir())
def not_found():
    print("ERROR: (gcloud) NOT_FOUND: Resource was not found.", file=sys.stderr)
    sys.exit(1)
def environment(node, worker):
    # nothing of the machine that started gcloud reaches a worker
    return {"HOME": str(cloud / "homes" / node / worker), "PATH": f"{cloud}/worker:SYSTEM", "FAKE_HOST": f"t1v-n-{node}-w-{worker}", "FAKE_CLOUD": str(cloud)}
if words[:3] == ["secrets", "versions", "access"]:
    print("MANAGED")
elif "create" in words:
    if state != "none":
        sys.exit("ERROR: ALREADY_EXISTS")
    names = [flags["node-id"]] if "node-id" in flags else [f"{flags['node-prefix']}-{i}" for i in range(int(flags["node-count"]))]
    (cloud / "nodes").write_text(" ".join(names))
    for name in names:
        for worker in range(int(os.environ["FAKE_WORKERS"])):
            (cloud / "homes" / name / str(worker)).mkdir(parents=True)
    (cloud / "state").write_text("WAITING_FOR_RESOURCES")
elif "queued-resources" in words and "delete" in words:
    (cloud / "state").write_text("none")
    shutil.rmtree(cloud / "homes", ignore_errors=True)
elif "queued-resources" in words and "describe" in words:
    if state == "none":
        not_found()
    print(state, ";".join((cloud / "nodes").read_text().split()), sep="\\t")
    (cloud / "state").write_text({"WAITING_FOR_RESOURCES": "PROVISIONING", "PROVISIONING": "ACTIVE"}.get(state, state))
elif "describe" in words:
    print("READY", 2 * len(homes(words[-1])), 2, sep="\\t")  # two networks
elif "scp" in words:
    node = words[-1].removesuffix(":")
    for home in homes(node):
        for file in words[4:-1]:
            shutil.copy(file, home)
elif "ssh" in words:
    node = words[4]
    unreachable = (cloud / "unreachable").read_text().split() if (cloud / "unreachable").exists() else []
    chosen = [h.name for h in homes(node) if flags["worker"] in ("all", h.name) and f"{node}/{h.name}" not in unreachable]
    if (cloud / "breaks").exists() and "start" in flags["command"] and chosen == ["1"]:
        (cloud / "breaks").unlink()
        said = ""  # a connection that broke is repeated by gcloud, without what it had read
    running = [
        subprocess.Popen(["bash", "-c", flags["command"]], cwd=homes(node)[0].parent / w, env=environment(node, w), stdin=subprocess.PIPE, text=True) for w in chosen
    ]
    for process in running:
        process.communicate(said if len(chosen) == 1 else "")
    sys.exit(max([p.returncode for p in running], default=0) if "lies" not in os.environ else 0)
else:
    sys.exit(f"unknown: {args}")
"""
WORKER = {
    "hostname": 'echo "$FAKE_HOST"',
    "uv": """
        if [ -f "$FAKE_CLOUD/broken/$FAKE_HOST" ]; then echo "no space left on device"; exit 7; fi
        echo "$*" >>"$FAKE_CLOUD/uv-$FAKE_HOST"
        for place; do :; done
        if [ "$1" = venv ]; then mkdir -p "$place/bin" && cp "$FAKE_CLOUD/worker/fake_python" "$place/bin/python"; fi""",
    # `-m phased_ift_jax.train` stands for hours of training: it ends with the code that is in the cloud's file `end`, when there is one
    "fake_python": """
        if [ "$2" != phased_ift_jax.train ]; then exec PYTHON "$@"; fi
        trap 'echo saved; exit 75' TERM
        printf '%s\\n' "$FAKE_HOST $PHASED_IFT_RUN_ID $(printf %s "$HF_TOKEN" | sha256sum | cut -c1-64) ${WANDB_API_KEY+key} ${COLOUR-}" >>"$FAKE_CLOUD/trained"
        shift 2; printf '<%s>' "$@"; echo
        while [ -d "$HOME" ] && [ ! -f "$FAKE_CLOUD/end" ]; do sleep 0.05; done
        echo "the last line of $FAKE_HOST"
        exit "$(cat "$FAKE_CLOUD/end-$FAKE_HOST" 2>/dev/null || cat "$FAKE_CLOUD/end" 2>/dev/null || echo 1)" """,
}


def script(path: Path, text: str, first: str = "/usr/bin/env bash") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{first}\n{textwrap.dedent(text).strip()}\n")
    path.chmod(0o755)


@dataclass
class Cloud:
    """The fake, the repository that is sent to it, and what was called."""

    folder: Path
    repository: Path
    memory: Path
    environment: dict[str, str]

    def tpu(self, verb: str, *words: str, code: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        where = ["--name=my-tpu", "--zone=us-east5-b", "--project=mine", "--poll=0"]
        told = subprocess.run(
            [self.repository / "launch/tpu_vm.sh", verb, *where, *words],
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=120,
            stdin=subprocess.DEVNULL,
            check=False,
        )
        self.said.append(told.stdout + told.stderr)
        if code is not None:
            assert told.returncode == code, told.stdout + told.stderr
        return told

    def __post_init__(self) -> None:
        self.said: list[str] = []

    def state(self, state: str) -> None:
        (self.folder / "state").write_text(state)

    def end(self, code: int) -> None:
        (self.folder / "end").write_text(str(code))

    @property
    def calls(self) -> list[dict[str, Any]]:
        calls = [json.loads(path.read_text()) for path in (self.folder / "calls").iterdir()]
        return sorted(calls, key=lambda call: call["order"])

    def commands(self) -> list[str]:
        """What was called, in order, without looks at the state."""
        return [" ".join(call["args"]) for call in self.calls if "describe" not in call["args"]]

    def trained(self) -> list[str]:
        path = self.folder / "trained"
        return sorted(path.read_text().splitlines()) if path.exists() else []

    def wait_for(self, count: int, process: subprocess.Popen[str] | None = None) -> None:
        until = time.monotonic() + 30
        while len(self.trained()) < count:
            assert time.monotonic() < until, "the training has not started"
            assert process is None or process.poll() is None, process.communicate()
            time.sleep(0.05)

    def check_secrets(self) -> None:
        """No secret is in an argument, in anything that was printed, or in any file, but for what was read from standard input."""
        for secret in (TOKEN, KEY, MANAGED):
            assert not any(secret in " ".join(call["args"]) for call in self.calls)
            assert not any(secret in text for text in self.said)
            for path in [*self.folder.rglob("*"), *self.memory.rglob("*")]:
                if path.is_file() and "calls" not in path.parts and path.name != "gcloud":
                    assert secret.encode() not in path.read_bytes(), path
        for call in self.calls:
            if call["stdin"]:
                assert not any(flag in call["args"] for flag in ("--worker=all",)), "the workers would share one standard input"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    for name in ("launch", "configs", "phased_ift_jax", "pyproject.toml", ".gitignore"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, folder / name)  # type: ignore[operator]
    for words in (["init", "-q"], ["add", "-A"], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    return folder


@pytest.fixture
def cloud(tmp_path: Path, repository: Path) -> Iterator[Cloud]:
    folder = tmp_path / "cloud"
    (folder / "calls").mkdir(parents=True)
    (folder / "state").write_text("none")
    script(folder / "launcher/gcloud", GCLOUD.replace("SYSTEM", SYSTEM).replace("MANAGED", MANAGED), f"{sys.executable} -S")
    for name, text in WORKER.items():
        script(folder / "worker" / name, text.replace("PYTHON", sys.executable))
    environment = {"PATH": f"{folder}/launcher:{SYSTEM}", "HOME": str(tmp_path), "FAKE_CLOUD": str(folder), "FAKE_WORKERS": "2", "PHASED_IFT_LAUNCH_DIR": str(tmp_path / "memory")}
    yield Cloud(folder, repository, tmp_path / "memory", environment)
    (folder / "end").write_text("0")
    shutil.rmtree(folder / "homes", ignore_errors=True)


def up(cloud: Cloud, *words: str) -> None:
    cloud.tpu("create", "--accelerator_type=v6e-16", "--spot", *words)
    cloud.tpu("setup")


def commit(repository: Path) -> str:
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True).stdout.strip()


AT = "--zone=us-east5-b --project=mine --quiet"
CONFIG = "configs/quickstart.yaml"


def test_a_whole_life(cloud: Cloud) -> None:
    """Create, set up, run; taken away, resumed; done, deleted."""
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY}
    cloud.tpu("create", "--accelerator_type=v6e-16", "--spot", "--", "--labels=team=a")
    assert cloud.commands() == [
        f"compute tpus queued-resources create my-tpu {AT} --node-id=my-tpu --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e --spot --labels=team=a"
    ]
    cloud.tpu("setup")
    sent, installed = cloud.commands()[1:]
    assert sent.startswith("compute tpus tpu-vm scp ")
    assert sent.endswith(f"phased_ift.tar.gz {sent.split()[4].replace('.tar.gz', '_worker.sh')} my-tpu: {AT} --worker=all")
    assert installed == f"compute tpus tpu-vm ssh my-tpu {AT} --worker=all --command=bash phased_ift_worker.sh setup {commit(cloud.repository)} tpu"
    for worker in "01":
        home = cloud.folder / "homes/my-tpu" / worker
        assert (home / "phased_ift/code" / CONFIG).is_file()
        assert (home / "phased_ift/commit").read_text().strip() == commit(cloud.repository)
        assert f"--editable {home}/phased_ift/code[tpu]" in (cloud.folder / f"uv-t1v-n-my-tpu-w-{worker}").read_text()

    before = len(cloud.commands())
    cloud.tpu("run", "--detach", "--env", "COLOUR=blue", "--env=PAUSE=0", "--env=ATTEMPTS=1", CONFIG, "--output_dir", "runs/it's [1, 2]", **secrets)
    cloud.wait_for(2)
    digest = sha256(TOKEN.encode()).hexdigest()
    trained = [f"t1v-n-my-tpu-w-{worker} my-tpu {digest} key blue" for worker in "01"]
    assert cloud.trained() == trained
    starts = [call for call in cloud.calls if " start " in call["args"][-1]]
    assert sorted(call["args"][-2] for call in starts) == ["--worker=0", "--worker=1"]
    assert len({call["args"][-1] for call in starts}) == 1
    assert {call["stdin"] for call in starts} == {f"HF_TOKEN={TOKEN}\nWANDB_API_KEY={KEY}\nCOLOUR=blue\nPAUSE=0\nATTEMPTS=1\nEND\n"}
    assert len(cloud.commands()) == before + 3, "one look whether a run is there already, and two starts"

    told = cloud.tpu("status")
    assert told.stdout.startswith("my-tpu: ACTIVE\n")
    assert "my-tpu worker 0: running\nmy-tpu worker 1: running\n" in told.stdout
    assert "runs/it's [1, 2]' holds no run that was started" in told.stderr, "output_dir is the run's own"
    assert "<configs/quickstart.yaml><--output_dir><runs/it's [1, 2]>" in cloud.tpu("logs", "--worker=1").stdout
    cloud.tpu("run", "--detach", CONFIG, code=2, **secrets)  # one at a time
    assert len(cloud.trained()) == 2

    cloud.state("SUSPENDED")
    shutil.rmtree(cloud.folder / "homes")
    refused = cloud.tpu("resume", code=2, WANDB_API_KEY=KEY)
    assert refused.stderr == "error: HF_TOKEN: the run was started with it, and it is not set now; set it, or name it with --secret\n"
    before = len(cloud.commands())
    going_on = subprocess.Popen(
        [cloud.repository / "launch/tpu_vm.sh", "resume", "--name=my-tpu", "--poll=0"],
        env=cloud.environment | secrets,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    cloud.wait_for(4, going_on)
    cloud.end(0)
    told_resume = going_on.communicate(timeout=60)[0]
    cloud.said.append(told_resume)
    assert going_on.returncode == 0, told_resume
    assert "the last line of t1v-n-my-tpu-w-0" in told_resume
    assert cloud.trained() == sorted(trained * 2), "the same command, with the same environment, on the same name"
    again = cloud.commands()[before:]
    assert again[0] == f"compute tpus queued-resources delete my-tpu {AT} --force"
    assert again[1] == cloud.commands()[0]
    assert [line.split()[3] for line in again[2:5]] == ["scp", "ssh", "ssh"] or [line.split()[3] for line in again[2:5]] == ["ssh", "scp", "ssh"]
    assert installed in again

    cloud.tpu("delete")
    assert cloud.commands()[-1] == f"compute tpus queued-resources delete my-tpu {AT} --force"
    assert not cloud.memory.joinpath("my-tpu").exists()
    cloud.check_secrets()


def test_every_remote_command_goes_to_all_workers_of_all_slices(cloud: Cloud) -> None:
    cloud.environment["FAKE_WORKERS"] = "3"
    up(cloud, "--node_count=2")
    assert "--node-count=2 --node-prefix=my-tpu" in cloud.commands()[0]
    cloud.end(0)
    cloud.tpu("run", CONFIG)
    every = {(node, worker) for node in ("my-tpu-0", "my-tpu-1") for worker in "012"}
    assert {tuple(line.split()[0].removeprefix("t1v-n-").split("-w-")) for line in cloud.trained()} == every
    singles = {}
    for call in cloud.calls:
        if "ssh" not in call["args"] and "scp" not in call["args"]:
            continue
        node = next(word for word in call["args"] if word.startswith("my-tpu")).removesuffix(":")
        worker, command = next(word[9:] for word in call["args"] if word.startswith("--worker=")), call["args"][-1]
        if worker != "all":
            singles.setdefault(command, set()).add((node, worker))
    assert list(singles.values()) == [every]


def test_a_connection_that_breaks_at_the_start_is_tried_again_with_all_that_was_to_be_said(cloud: Cloud) -> None:
    up(cloud)
    (cloud.folder / "breaks").touch()
    cloud.tpu("run", "--detach", CONFIG, HF_TOKEN=TOKEN)
    cloud.wait_for(2)
    time.sleep(0.3)
    assert len(cloud.trained()) == 2, "and nothing is started twice"
    assert [line.split()[2] for line in cloud.trained()] == [sha256(TOKEN.encode()).hexdigest()] * 2
    cloud.check_secrets()


def test_secrets_from_the_manager(cloud: Cloud) -> None:
    up(cloud)
    cloud.end(0)
    told = cloud.tpu("run", "--secret", "HF_TOKEN=projects/mine/secrets/token", CONFIG, HF_TOKEN=TOKEN)
    assert "secrets versions access projects/mine/secrets/token/versions/latest" in cloud.commands()
    assert "sent over standard input: HF_TOKEN" in told.stderr
    assert cloud.trained()[0].split()[2] == sha256(MANAGED.encode()).hexdigest(), "the manager's, where both are there"
    cloud.check_secrets()


@pytest.mark.parametrize("words", [["--env=HF_TOKEN=" + TOKEN, CONFIG], [CONFIG, "--token", TOKEN], ["--secret=HF_TOKEN", CONFIG]])
def test_a_secret_in_the_command_is_refused(cloud: Cloud, words: list[str]) -> None:
    up(cloud)
    cloud.tpu("run", *words, code=2, HF_TOKEN=TOKEN)
    cloud.check_secrets()
    assert cloud.trained() == []


def test_a_worker_that_fails_to_be_set_up_is_named(cloud: Cloud) -> None:
    cloud.tpu("create", "--accelerator_type=v6e-16")
    (cloud.folder / "broken").mkdir()
    (cloud.folder / "broken/t1v-n-my-tpu-w-1").touch()
    told = cloud.tpu("setup", code=7)
    assert "error: setup: my-tpu worker 1: exit code 7\n" in told.stderr
    assert "worker 1| no space left on device" in told.stderr
    assert "worker 0: exit" not in told.stderr


def test_a_worker_that_keeps_silent_is_named(cloud: Cloud) -> None:
    """gcloud ends with 0 where it has left out a worker."""
    cloud.tpu("create", "--accelerator_type=v6e-16")
    (cloud.folder / "unreachable").write_text("my-tpu/1")
    assert "error: setup: my-tpu worker 1 gave no answer (exit code 255)\n" in cloud.tpu("setup", code=255).stderr


def test_where_one_worker_does_not_start_none_goes_on(cloud: Cloud) -> None:
    up(cloud)
    shutil.rmtree(cloud.folder / "homes/my-tpu/1/phased_ift/run")
    (cloud.folder / "homes/my-tpu/1/phased_ift/venv").rename(cloud.folder / "gone")
    (cloud.folder / "homes/my-tpu/1/phased_ift/code/launch/until_done.sh").unlink()
    (cloud.folder / "unreachable").write_text("my-tpu/1")
    told = cloud.tpu("run", CONFIG, code=255)
    assert "error: start: my-tpu worker 1 gave no answer" in told.stderr
    assert "worker 0: exited" in eventually(lambda: cloud.tpu("status").stdout, "exited")


def eventually(ask: Any, text: str) -> str:
    until = time.monotonic() + 20
    while text not in (told := ask()):
        assert time.monotonic() < until, told
        time.sleep(0.1)
    return told


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_run_ends_as_the_training_did(cloud: Cloud, code: int) -> None:
    up(cloud)
    cloud.end(0)
    (cloud.folder / "end-t1v-n-my-tpu-w-1").write_text(str(code))
    told = cloud.tpu("run", "--env=ATTEMPTS=2", "--env=PAUSE=0", CONFIG, code=code)
    assert ("my-tpu worker 1: exit code" in told.stderr) == (code != 0)
    assert len(cloud.trained()) == (3 if code == 1 else 2), "what is at fault or was asked to stop is not tried again"
    assert "the last line of t1v-n-my-tpu-w-0\n" in told.stdout


def test_stop_and_resume(cloud: Cloud) -> None:
    up(cloud)
    cloud.tpu("run", "--detach", CONFIG)
    cloud.wait_for(2)
    assert "stopped with everything saved" in cloud.tpu("stop").stderr
    assert "worker 1: exited 75 asked" in cloud.tpu("status").stdout
    cloud.end(0)
    cloud.tpu("resume")
    assert len(cloud.trained()) == 4
    assert sum("create" in line for line in cloud.commands()) == 1, "a slice that is there is kept"


def test_resume_goes_on_after_a_notice_and_gives_up_on_bad_input(cloud: Cloud) -> None:
    up(cloud)
    cloud.end(75)  # not asked by us: the machine had notice
    cloud.tpu("run", CONFIG, code=75)
    assert "not done after 3 attempts" in cloud.tpu("resume", "--attempts=3", code=75).stderr
    assert len(cloud.trained()) == 2 + 2 * 3
    cloud.end(2)
    cloud.tpu("resume", code=2)
    assert len(cloud.trained()) == 2 + 2 * 4


def holders(path: Path) -> set[int]:
    """Processes that have a file open."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            if os.readlink(link) == str(path):
                found.add(int(link.parts[2]))
    return found


def test_a_worker_that_has_started_anew_is_started_again(cloud: Cloud) -> None:
    up(cloud)
    cloud.tpu("run", "--detach", "--env=ATTEMPTS=1", CONFIG)
    cloud.wait_for(2)
    run = cloud.folder / "homes/my-tpu/1/phased_ift/run"
    for pid in sorted(holders(run / "lock")):  # the eldest first, which would note how the others ended
        os.kill(pid, signal.SIGKILL)  # as a machine ends: no exit code is written
    assert "worker 1: lost" in eventually(lambda: cloud.tpu("status").stdout, "lost")
    going_on = subprocess.Popen(
        [cloud.repository / "launch/tpu_vm.sh", "resume", "--name=my-tpu", "--poll=0"], env=cloud.environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    cloud.wait_for(4, going_on)
    cloud.end(0)
    assert "all start together" in going_on.communicate(timeout=60)[1]
    assert going_on.returncode == 0


def test_what_was_sent_before_and_is_no_more_is_removed_and_what_the_run_made_stays(cloud: Cloud) -> None:
    up(cloud)
    code = cloud.folder / "homes/my-tpu/0/phased_ift/code"
    (code / "runs").mkdir()
    (code / "runs/checkpoint").touch()
    shipped = cloud.folder / "homes/my-tpu/0/phased_ift/shipped"
    shipped.write_text(shipped.read_text() + "phased_ift_jax/old module.py\n")
    (code / "phased_ift_jax/old module.py").touch()
    cloud.tpu("setup")
    assert not (code / "phased_ift_jax/old module.py").exists()
    assert (code / "runs/checkpoint").exists()
    assert (code / CONFIG).exists()
    assert (cloud.folder / "homes/my-tpu/0/phased_ift").stat().st_mode & 0o77 == 0


def test_a_tree_with_changes_is_refused(cloud: Cloud) -> None:
    cloud.tpu("create", "--accelerator_type=v6e-16")
    change = cloud.repository / "change.py"
    change.touch()
    try:
        assert "error: the tree has changes that no commit holds" in cloud.tpu("setup", code=2).stderr
        assert not any("scp" in line for line in cloud.commands())
        cloud.tpu("setup", "--allow_dirty")
        cloud.tpu("setup", "--commit", commit(cloud.repository)[:10])
    finally:
        change.unlink()
    assert not (cloud.folder / "homes/my-tpu/0/phased_ift/code/change.py").exists()


def test_a_dry_run_calls_nothing_and_shows_no_secret(cloud: Cloud) -> None:
    up(cloud)
    cloud.end(0)
    cloud.tpu("run", CONFIG, "--seed", "1", HF_TOKEN=TOKEN, WANDB_API_KEY=KEY)
    before, kept = len(cloud.calls), {path: path.read_bytes() for path in cloud.memory.rglob("*") if path.is_file()}
    printed = {}
    for verb, words in {
        "create": ["--accelerator_type=v4-16", "--reserved"],
        "setup": [],
        "run": ["--secret=WANDB_API_KEY=projects/mine/secrets/key", CONFIG, "--seed", "1"],
        "status": [],
        "logs": [],
        "stop": [],
        "resume": [],
        "delete": [],
    }.items():
        told = cloud.tpu(verb, "--dry_run", *words, HF_TOKEN=TOKEN, WANDB_API_KEY=KEY)
        assert "gcloud compute tpus" in told.stdout, verb
        printed[verb] = told.stdout + told.stderr
    assert len(cloud.calls) == before
    assert {path: path.read_bytes() for path in cloud.memory.rglob("*") if path.is_file()} == kept
    assert "--runtime-version=tpu-ubuntu2204-base --reserved" in printed["create"]
    assert "over standard input: WANDB_API_KEY HF_TOKEN" in printed["run"]
    assert "secrets versions access projects/mine/secrets/key/versions/latest" in printed["run"]
    assert "configs/quickstart.yaml\\ --seed\\ 1" in printed["resume"]
    cloud.check_secrets()


@pytest.mark.parametrize(
    ("kind", "version"),
    [("v4-8", "tpu-ubuntu2204-base"), ("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v5p-8", "v2-alpha-tpuv5"), ("v6e-8", "v2-alpha-tpuv6e")],
)
def test_each_generation_has_its_runtime(cloud: Cloud, kind: str, version: str) -> None:
    assert f"--accelerator-type={kind} --runtime-version={version}" in cloud.tpu("create", "--dry_run", "--accelerator-type", kind).stdout


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["create"], "--accelerator_type (or TPU_ACCELERATOR_TYPE): such as"),
        (["create", "--accelerator_type=v5e-16"], "v5e is asked for as v5litepod-16"),
        (["create", "--accelerator_type=v9-16"], "none is known for 'v9-16'"),
        (["create", "--accelerator_type=v4-8", "--name=My_TPU"], "'My_TPU' is no name for a TPU"),
        (["setup", "--comit=x"], "unknown flag --comit"),
        (["setup", "--commit=0000"], "no such commit"),
        (["run"], "which CONFIG?"),
        (["run", "configs/none.yaml"], "has no 'configs/none.yaml'"),
        (["status", "--poll"], "--poll needs a value"),
        (["erase"], "unknown verb 'erase'"),
        (["resume"], "no command was started from here"),
    ],
)
def test_what_is_asked_for_wrongly_is_refused_in_a_line(cloud: Cloud, words: list[str], why: str) -> None:
    told = cloud.tpu(*words, code=2)
    assert why in told.stderr
    assert told.stderr.startswith("error: ")
    assert told.stderr.count("\n") == 1
    assert cloud.calls == []


def test_a_request_that_fails_in_the_queue_is_no_success(cloud: Cloud) -> None:
    cloud.tpu("create", "--no_wait", "--accelerator_type=v6e-16")
    cloud.state("FAILED")
    assert "my-tpu is not ready: FAILED" in cloud.tpu("setup", code=1).stderr


# ---- until_done.sh, one machine with GPUs, Slurm ----


def test_the_loop_passes_a_request_on_and_waits_for_what_is_saved(tmp_path: Path) -> None:
    child = f"trap 'sleep 0.5; touch {tmp_path}/saved; exit 75' TERM; touch {tmp_path}/ready; while :; do sleep 0.05; done"
    loop = subprocess.Popen([ROOT / "launch/until_done.sh", "bash", "-c", child])
    while not (tmp_path / "ready").exists():
        time.sleep(0.02)
    loop.terminate()  # this process alone, not its group
    assert loop.wait(timeout=20) == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize(("child", "code"), [("sleep 60", 75), ("trap 'exit 1' TERM; while :; do sleep 0.05; done", 1)])
def test_the_loop_does_not_start_what_was_asked_to_stop(tmp_path: Path, child: str, code: int) -> None:
    """Before it listens, SIGTERM ends a process with nothing unsaved; where the saving fails, that is what is said."""
    loop = subprocess.Popen([ROOT / "launch/until_done.sh", "bash", "-c", f"echo x >>{tmp_path}/starts; {child}"], env=os.environ | {"PAUSE": "0"}, stderr=subprocess.DEVNULL)
    while not (tmp_path / "starts").exists():
        time.sleep(0.02)
    time.sleep(0.1)
    loop.terminate()
    assert loop.wait(timeout=20) == code
    assert (tmp_path / "starts").read_text() == "x\n"


def test_the_loop_can_be_stopped_between_two_attempts(tmp_path: Path) -> None:
    loop = subprocess.Popen([ROOT / "launch/until_done.sh", "false"], env=os.environ | {"PAUSE": "60"}, stderr=subprocess.PIPE, text=True)
    assert loop.stderr is not None
    assert "attempt 1 of 10" in loop.stderr.readline()
    loop.terminate()
    assert loop.wait(timeout=20) == 75


def machine(tmp_path: Path, smi: str | None, python: str = "exit 0") -> dict[str, str]:
    if smi is not None:
        script(tmp_path / "bin/nvidia-smi", smi)
    script(tmp_path / "bin/python-with-cuda", python)
    return {"PATH": f"{tmp_path}/bin:{SYSTEM}", "PYTHON": str(tmp_path / "bin/python-with-cuda"), "HOME": str(tmp_path), "PAUSE": "0"}


@pytest.mark.parametrize(
    ("smi", "why"),
    [
        (None, "no nvidia-smi here"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "nvidia-smi finds no GPU: NVIDIA-SMI has failed"),
        ("exit 0", "nvidia-smi finds no GPU"),
        ("echo 'NVIDIA A100, 81920 MiB, 535.104.05'", "the driver is 535.104.05, and CUDA 13 needs 580"),
    ],
)
def test_without_a_gpu_it_refuses_in_a_line(tmp_path: Path, smi: str | None, why: str) -> None:
    if smi is None and shutil.which("nvidia-smi", path=SYSTEM):
        pytest.skip("this machine has an nvidia-smi")
    told = subprocess.run([ROOT / "launch/gpu.sh", CONFIG], cwd=ROOT, env=machine(tmp_path, smi), capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert why in told.stderr
    assert told.stderr.count("\n") == 1


GPUS = "for i in 1 2; do echo 'NVIDIA H100 80GB HBM3, 81559 MiB, 580.65.06'; done"


def test_on_gpus_it_says_what_it_uses_and_trains_until_done(tmp_path: Path) -> None:
    python = f"""
        case "$*" in *jax_cuda13_plugin*) exit 0 ;; -c*) echo '3.12.1, jax 0.11.0'; exit ;; esac
        printf '<%s>' "$@" >>{tmp_path}/trained; echo >>{tmp_path}/trained
        [ "$(wc -l <{tmp_path}/trained)" -ge 2 ]"""
    told = subprocess.run(
        [ROOT / "launch/gpu.sh", CONFIG, "--curriculum.order", "[[1, 2], 3]"], cwd=ROOT, env=machine(tmp_path, GPUS, python), capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert (tmp_path / "trained").read_text() == "<-m><phased_ift_jax.train><configs/quickstart.yaml><--curriculum.order><[[1, 2], 3]>\n" * 2
    assert "GPUs     2: 2 x NVIDIA H100 80GB HBM3, 81559 MiB\n" in told.stdout
    assert "driver   580.65.06\n" in told.stdout


def test_a_python_without_cuda_is_not_filled_behind_its_owners_back(tmp_path: Path) -> None:
    told = subprocess.run([ROOT / "launch/gpu.sh", CONFIG], cwd=ROOT, env=machine(tmp_path, GPUS, "exit 1"), capture_output=True, text=True, check=False)
    assert (told.returncode, told.stderr.count("\n")) == (2, 1)
    assert "has not all of '.[cuda]'" in told.stderr


def slurm(tmp_path: Path, trains: str, *words: str, state: str = "RUNNING", **environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """The job under a fake srun of two tasks; what srun and scontrol were called with."""
    for name, text in {
        "srun": f"""
            echo "srun $*" >>{tmp_path}/called
            while [ "${{1#--}}" != "$1" ]; do shift; done
            SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=0 "$@" & first=$!
            SLURM_STEP_NUM_TASKS=2 SLURM_PROCID=1 "$@" & second=$!
            trap 'kill -TERM $first $second' TERM
            wait $first; a=$?; wait $second; b=$?
            exit $((a > b ? a : b))""",
        "scontrol": f'echo "scontrol $*" >>{tmp_path}/called',
        "squeue": f"echo {state}",
        "task-python": trains,
    }.items():
        script(tmp_path / "bin" / name, text)
    settings = {"HOME": str(tmp_path), "SLURM_JOB_ID": "41", "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": str(tmp_path / "bin/task-python"), "PAUSE": "0", "ATTEMPTS": "2"}
    environment = settings | {"PATH": f"{tmp_path}/bin:{SYSTEM}"} | environment
    spooled = tmp_path / "slurm_script"
    shutil.copy(ROOT / "launch/slurm.sbatch", spooled)
    told = subprocess.run(["bash", spooled, *words], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False)
    called = tmp_path / "called"
    return told, called.read_text().splitlines() if called.exists() else []


def test_under_slurm_all_tasks_run_the_command_and_a_stopped_job_is_queued_again(tmp_path: Path) -> None:
    trains = f'echo "$SLURM_STEP_NUM_TASKS $SLURM_PROCID $PHASED_IFT_RUN_ID $*" >>{tmp_path}/trained; exit 75'
    told, called = slurm(tmp_path, trains, CONFIG, "--seed", "1")
    assert told.returncode == 75, told.stderr
    assert sorted((tmp_path / "trained").read_text().splitlines()) == [f"2 {task} slurm-41 -m phased_ift_jax.train {CONFIG} --seed 1" for task in (0, 1)]
    assert called == [f"srun --kill-on-bad-exit=0 --wait=0 --gpu-bind=none {tmp_path}/bin/task-python -m phased_ift_jax.train {CONFIG} --seed 1", "scontrol requeue 41"]


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 2), (2, 1)])
def test_under_slurm_nothing_else_is_queued_again(tmp_path: Path, code: int, starts: int) -> None:
    told, called = slurm(tmp_path, f"exit {code}", CONFIG)
    assert (told.returncode, len(called)) == (code, starts)
    assert all(line.startswith("srun") for line in called)


def test_under_slurm_a_cancelled_job_and_one_without_end_are_not_queued_again(tmp_path: Path) -> None:
    assert len(slurm(tmp_path, "exit 75", CONFIG, state="CANCELLED")[1]) == 1
    told, called = slurm(tmp_path, "exit 75", CONFIG, SLURM_RESTART_COUNT="5", REQUEUES="5")
    assert (told.returncode, "not done" in told.stderr, len(called)) == (75, True, 2)


def test_slurm_is_asked_for_what_the_product_needs(tmp_path: Path) -> None:
    """SIGTERM to the tasks (not B:, to the shell alone) while there is time to save; requeue; and tasks as processes.py and JAX see them."""
    asked = {line.split()[1] for line in (ROOT / "launch/slurm.sbatch").read_text().splitlines() if line.startswith("#SBATCH")}
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= asked
    assert "SLURM_STEP_NUM_TASKS" in (ROOT / "phased_ift_jax/processes.py").read_text()
    for words, environment, why in (
        ([], {}, "which CONFIG?"),
        (["none.yaml"], {}, "no such file"),
        ([CONFIG], {"SLURM_JOB_ID": ""}, "this is for Slurm"),
        ([CONFIG], {"PYTHON": "/none"}, "no Python"),
    ):
        told, called = slurm(tmp_path, "exit 0", *words, **environment)
        assert (told.returncode, called) == (2, [])
        assert why in told.stderr


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(path: Path) -> None:
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert checker, "shellcheck is missing: it comes with '.[test]'"
    told = subprocess.run([checker, path], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout
    assert os.access(path, os.X_OK)
    for line in path.read_text().splitlines():
        if line and not line.startswith("#"):
            assert line == "set -euo pipefail" or path.name == "until_done.sh"
            break


def test_help_names_every_verb_and_flag() -> None:
    script_text = (ROOT / "launch/tpu_vm.sh").read_text()
    told = subprocess.run([ROOT / "launch/tpu_vm.sh", "--help"], capture_output=True, text=True, check=True).stdout
    for word in ("create", "setup", "run", "status", "logs", "stop", "resume", "delete"):
        assert f"\n  {word} " in told
    kept = re.search(r"^kept=\((.*)\)", script_text, re.MULTILINE)
    assert kept
    flags = {*kept[1].split(), "spot", "reserved", "on_demand", "env", "secret"} - {"provisioning"}
    for line in re.findall(r"^    ((?:\w+ \| )+\w+)\)(?: printf| *\n +printf)", script_text, re.MULTILINE):
        flags |= set(line.split(" | "))
    assert {"follow", "dry_run", "worker", "poll"} <= flags
    for flag in flags:
        assert re.search(rf"^ +--.*\b{flag}\b", told, re.MULTILINE), flag

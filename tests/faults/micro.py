"""The micro run that the harness kills and stops, what an undisturbed one ends as, and how two are compared.

Three phases of a model of 0.16 million parameters, each process a real `python -m phased_ift_jax.train`. No JAX in here: the arrays of
checkpoints are read with tensorstore, beside the code that is tested.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
import yaml

from phased_ift_jax.training import manifest

HERE = Path(__file__).resolve().parent
QUICKSTART = HERE.parents[1] / "configs/quickstart"
TRAIN = ("-m", "phased_ift_jax.train")
DRIVER = HERE / "driver.py"
LEDGER = "trained_ids.jsonl"
EPOCHS = 4
OF_TIME = ("seconds", "tokens_per_second", "mfu")  # fields of metrics.jsonl that no two runs share
PATIENCE = 300.0  # seconds after which a process is taken to hang

Position = tuple[int, int]  # phase (from 1), optimizer steps of it that are done


class Broken(AssertionError):
    """A law does not hold."""


def config(output: Path, rows: Path, state: str, save_steps: int, model: Path = QUICKSTART / "model") -> dict[str, Any]:
    return {
        "seed": 7,
        "output_dir": str(output),
        "model": {"model_name_or_path": str(model), "init": "random", "dtype": "float32"},
        "data": {"path": str(rows), "max_length": 64, "eval_size": 8},
        "curriculum": {"bins": {"by": "score", "thresholds": [1.5, 3.5], "names": ["easy", "medium", "hard"]}, "optimizer_state": state},
        "training": {"num_train_epochs": EPOCHS, "global_batch_size": 8, "learning_rate": 1e-3},
        "checkpoint": {"save_minutes": None, "save_steps": save_steps},
        "logging": {"report_to": []},
    }


def environment(cache: Path | None) -> dict[str, str]:
    """One thread a process, so that two share two cores; without a cache every process compiles."""
    caching = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    if cache:
        caching = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    threads = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "OMP_NUM_THREADS": "1"}
    return {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"} | threads | caching


def hundred_rows(folder: Path) -> Path:
    """A hundred rows of the quickstart's data: the last step of each epoch is uneven."""
    path = folder / "rows.jsonl"
    path.write_text("".join((QUICKSTART / "data.jsonl").read_text().splitlines(keepends=True)[:100]))
    return path


@dataclass
class Run:
    """A run in a folder of its own: its config, its output, and one log a process."""

    folder: Path
    rows: Path
    cache: Path | None
    state: str = "reset"
    save_steps: int = 3
    model: Path = QUICKSTART / "model"
    starts: int = 0

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True)
        self.config.write_text(yaml.safe_dump(config(self.output, self.rows, self.state, self.save_steps, self.model)))

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @property
    def output(self) -> Path:
        return self.folder / "run"

    @contextmanager
    def started(self, *program: str) -> Iterator[subprocess.Popen[bytes]]:
        """A process of the run; whatever happens, none outlives the block."""
        self.starts += 1
        (self.folder / "started").touch()
        with open(self._log, "wb") as log:
            command = [sys.executable, *(program or TRAIN), str(self.config)]
            process = subprocess.Popen(command, cwd=self.folder, env=environment(self.cache), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def ends(self, *program: str) -> int:
        """The exit code of a process that nobody disturbs."""
        with self.started(*program) as process:
            return process.wait(PATIENCE)

    def must_end(self, *program: str) -> None:
        if code := self.ends(*program):
            raise Broken(f"exit code {code} undisturbed\n{self.tail()}")

    def said(self) -> str:
        """What the newest process has printed."""
        return self._log.read_text(errors="replace")

    def tail(self) -> str:
        return "\n".join(self.said().replace("\r", "\n").splitlines()[-12:])

    def touched(self, path: Path) -> bool:
        """Whether the newest process has written a file, or an entry of a folder."""
        try:
            return path.stat().st_mtime_ns > (self.folder / "started").stat().st_mtime_ns
        except FileNotFoundError:
            return False

    @property
    def _log(self) -> Path:
        return self.folder / f"log.{self.starts:03}"


@dataclass(frozen=True)
class Life:
    """Seconds of an undisturbed process until its plan is written, its first step is logged, and its end."""

    plan: float
    first: float
    whole: float


@dataclass(frozen=True)
class Reference:
    """An undisturbed run of which every state was saved and none removed."""

    output: Path
    digests: dict[Position, str]
    folders: tuple[str, ...]
    steps: tuple[int, ...]
    life: Life

    def done(self, position: Position) -> int:
        """Optimizer steps of the whole run that are done at a position."""
        return sum(self.steps[: max(position[0] - 1, 0)]) + position[1]

    def after(self, position: Position) -> list[Position]:
        """The steps that are left to train there."""
        return [at for at in sorted(self.digests) if at > position]


def reference(work: Path, rows: Path, cache: Path, state: str) -> Reference:
    """Make the undisturbed run of a policy, with a checkpoint at every step."""
    run = Run(work / f"undisturbed-{state}", rows, cache, state, save_steps=1)
    life = timed(run, str(DRIVER), "keep-all", "0")
    phases = json.loads((run.output / "plan.json").read_text())["phases"]
    digests = {position: digest(path) for position, path in whole(run.output).items()}
    made = Reference(run.output, digests, tuple(phase["folder"] for phase in phases), tuple(phase["steps"] for phase in phases), life)
    if set(digests) != {(phase["index"], step) for phase in phases for step in range(1, phase["steps"] + 1)}:
        raise Broken(f"the undisturbed run in '{run.output}' has not kept a checkpoint of every step: {sorted(digests)}")
    return made


def timed(run: Run, *program: str) -> Life:
    """Run a process to its end and see when it did what."""
    begun, seen = time.monotonic(), {}
    with run.started(*program) as process:
        while process.poll() is None and time.monotonic() - begun < PATIENCE:
            if "plan" not in seen and run.touched(run.output / "plan.json"):
                seen["plan"] = time.monotonic() - begun
            if "first" not in seen and lines(run.output):
                seen["first"] = time.monotonic() - begun
            time.sleep(0.01)
    if process.returncode:
        raise Broken(f"exit code {process.returncode} undisturbed\n{run.tail()}")
    return Life(seen["plan"], seen["first"], time.monotonic() - begun)


@contextmanager
def workplace(given: Path | None, prefix: str) -> Iterator[tuple[Path, list[str]]]:
    """A folder to work in and a list for the laws found broken, which are printed at the end; a temporary folder is kept where there are any."""
    work, broken = given or Path(tempfile.mkdtemp(prefix=prefix)), list[str]()
    work.mkdir(parents=True, exist_ok=True)
    yield work.resolve(), broken
    for line in broken:
        print(f"BROKEN {line}")
    if not given and not broken:
        shutil.rmtree(work)


# --- what lies in the folder of a run ---------------------------------------------------------------------------------------------


def lines(output: Path) -> int:
    """Lines of metrics.jsonl that are whole: optimizer steps logged."""
    try:
        return (output / "metrics.jsonl").read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def checkpoints(output: Path) -> Iterator[tuple[Position, Path]]:
    """Folders named as checkpoints, whole or not."""
    for path in output.glob("checkpoints/*/*"):
        if re.fullmatch(r"[0-9]+", path.name):
            yield (int(path.parent.name.partition("-")[0]), int(path.name)), path


def whole(output: Path) -> dict[Position, Path]:
    """Checkpoints of which every byte is as their manifest says, oldest first."""
    return dict(sorted((position, path) for position, path in checkpoints(output) if (path / manifest.MANIFEST).exists() and manifest.fault(path) is None))


def newest(output: Path) -> Position:
    """Where a start goes on: the newest whole checkpoint, or the base."""
    return max(whole(output), default=(0, 0))


def digest(checkpoint: Path) -> str:
    """A hash of the names, dtypes, shapes and bits of all arrays, weights and moments; of nothing else."""
    [metadata] = checkpoint.glob("*/_METADATA")
    driver = "zarr3" if json.loads(metadata.read_text()).get("use_zarr3") else "zarr"
    store = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{metadata.parent}/"}}
    found = ts.KvStore.open(store).result().list().result()
    names = sorted({key.decode().rpartition("/")[0] for key in found if key.endswith((b"/.zarray", b"/zarr.json"))})
    if not names:
        raise Broken(f"'{checkpoint}' holds no arrays")
    total = hashlib.sha256()
    for name in names:
        array = np.asarray(ts.open({"driver": driver, "kvstore": store | {"path": f"{name}/"}}, open=True, read=True).result().read().result())
        total.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return total.hexdigest()


# --- equal to the last bit ----------------------------------------------------------------------------------------------------------


def differences(output: Path, undisturbed: Path) -> list[str]:
    """In what a run that is done differs from the undisturbed one: nothing, it should."""
    found = []
    for folder, steps in _phases(undisturbed):
        exported = Path("hf", folder, "model.safetensors")
        if _bytes(output / exported) != _bytes(undisturbed / exported):
            found.append(f"{exported} is another")
        end = Path("checkpoints", folder, str(steps))
        if not (output / end / manifest.MANIFEST).exists() or manifest.fault(output / end) or digest(output / end) != digest(undisturbed / end):
            found.append(f"the arrays of {end} are others")
    if _metrics(output) != _metrics(undisturbed):
        found.append("metrics.jsonl has other rows")
    for name in ("forgetting.json", LEDGER):
        if _bytes(output / name) is None or _bytes(output / name) != _bytes(undisturbed / name):
            found.append(f"{name} is another, or missing")
    return found + ledger_faults(output)


def ledger_faults(output: Path) -> list[str]:
    """One line a step, in order, and each id exactly as often as its phase has epochs."""
    if not (output / LEDGER).exists():
        return [f"there is no {LEDGER}"]
    rows = [json.loads(line) for line in (output / LEDGER).read_text().splitlines()]
    steps = [(index, step) for index, (_, steps) in enumerate(_phases(output), 1) for step in range(1, steps + 1)]
    found = [] if [(row["phase_index"], row["step"]) for row in rows] == steps else [f"{LEDGER} has not one line a step in order"]
    for index, (folder, _) in enumerate(_phases(output), 1):
        times = Counter(id for row in rows if row["phase_index"] == index for id in row["ids"])
        if not times or set(times.values()) != {EPOCHS}:
            found.append(f"{LEDGER}: {sum(count != EPOCHS for count in times.values())} of {len(times)} ids of {folder} were not trained {EPOCHS} times")
    return found


def _phases(output: Path) -> list[tuple[str, int]]:
    return [(phase["folder"], phase["steps"]) for phase in json.loads((output / "plan.json").read_text())["phases"]]


def _metrics(output: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in OF_TIME} for row in rows]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None

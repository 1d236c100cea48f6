"""What a run says of itself while it runs: metrics.jsonl, trained_ids.jsonl, seconds.jsonl, TensorBoard, W&B, and the rate of its steps."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import time
import uuid
from pathlib import Path
from typing import Any

from phased_ift_jax.chips import peak_flops
from phased_ift_jax.config import LoggingConfig
from phased_ift_jax.files import write_whole
from phased_ift_jax.records import UserError

SECONDS = "seconds.jsonl"


def check_reporters(config: LoggingConfig) -> None:
    """Refuse, before a run starts, to report to a package that is not installed.

    Raises:
        UserError: with the line that installs it.
    """
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if name in config.report_to and importlib.util.find_spec(package) is None:
            raise UserError(f"logging.report_to: {name} needs `pip install {package}`")


class Ledger:
    """A jsonl file of one line a step, in order of (phase index, step). Lines after a checkpoint go when a run resumes from it."""

    def __init__(self, path: Path, resume_after: tuple[int, int]) -> None:
        self.last: dict[str, Any] | None = None  # the last line that stays
        end = 0
        if path.exists():
            with open(path, "rb") as file:
                for text in file:
                    line = _line(text)
                    if line is None or (line["phase_index"], line["step"]) > resume_after:
                        break
                    end, self.last = end + len(text), line
            os.truncate(path, end)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by close()

    def write(self, line: dict[str, Any]) -> None:
        """Add a line; it is in the file, if not on the disk, when this returns."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def settle(self) -> None:
        """Have the disk hold every line."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Books:
    """What a run writes of each step: `trained_ids.jsonl`, the rows of every step; `seconds.jsonl`, its time; `metrics.jsonl`, a line a logged step;
    TensorBoard, W&B.

    Where several processes train, one keeps them: the others' are `silent`.
    """

    def __init__(self, folder: Path, config: LoggingConfig, resume_after: tuple[int, int], settings: dict[str, Any], silent: bool = False) -> None:
        self._every = config.logging_steps
        self._ledgers = [] if silent else [Ledger(folder / name, resume_after) for name in ("metrics.jsonl", "trained_ids.jsonl", SECONDS)]
        self._tensorboard = self._wandb = None
        if silent:
            return
        name, last = config.run_name or folder.resolve().name, self._ledgers[0].last
        self._tensorboard = _tensorboard(folder / "tensorboard" / name, last["global_step"] + 1 if last else 0) if "tensorboard" in config.report_to else None
        self._wandb = _wandb(name, folder, settings) if "wandb" in config.report_to else None

    def write(self, line: dict[str, Any], ids: list[str], last: bool = False) -> None:
        """Note a step: its rows always, its numbers if it is one of every `logging_steps` or the phase's `last`."""
        if not self._ledgers:
            return
        metrics, trained, seconds = self._ledgers
        trained.write({name: line[name] for name in ("phase", "phase_index", "step")} | {"ids": ids})
        seconds.write({name: line[name] for name in ("phase_index", "step", "seconds")})
        if line["step"] % self._every and not last:
            return
        metrics.write(line)
        numbers = {name: value for name, value in line.items() if isinstance(value, int | float) and not isinstance(value, bool) and name != "global_step"}
        if self._tensorboard:
            for name, value in numbers.items():
                self._tensorboard.add_scalar(name, value, line["global_step"])
        if self._wandb:
            self._wandb.log(numbers, step=line["global_step"])

    def settle(self) -> None:
        """Have the disk hold every line: before a checkpoint is committed that has trained what they say."""
        for ledger in self._ledgers:
            ledger.settle()
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        for ledger in self._ledgers:
            ledger.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


class Rate:
    """Tokens and FLOPs per second since the last look; what was compiled before the first step is not in it."""

    def __init__(self, kind: str, devices: int) -> None:
        self._peak = peak_flops(kind, devices)
        self._since = time.perf_counter()

    def lap(self, tokens: int, flops: float) -> dict[str, float]:
        """Facts of the step that just ended: seconds, tokens per second and, where the chip is known, MFU (causal attention)."""
        now = time.perf_counter()
        seconds, self._since = now - self._since, now
        facts = {"seconds": seconds, "tokens_per_second": tokens / seconds}
        return facts | ({"mfu": flops / seconds / self._peak} if self._peak else {})


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file whose last may have been cut off by a kill."""
    if not path.exists():
        return []
    with open(path, "rb") as file:
        return list(itertools.takewhile(lambda line: line is not None, map(_line, file)))  # type: ignore[arg-type]


def _line(text: bytes) -> dict[str, Any] | None:
    """A line, or None where it was cut off."""
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if text.endswith(b"\n") and isinstance(line, dict) and {"phase_index", "step"} <= line.keys() else None


def _tensorboard(folder: Path, purge_step: int) -> Any:
    # of these tensorboardX imports what is installed, which takes seconds, and a scalar needs none
    unused = {name: None for name in ("torch", "google.cloud.storage") if name not in sys.modules}
    sys.modules.update(unused)  # type: ignore[arg-type]
    try:
        from tensorboardX import SummaryWriter
    finally:
        for name in unused:
            del sys.modules[name]
    return SummaryWriter(str(folder), purge_step=purge_step)


def _wandb(name: str, folder: Path, settings: dict[str, Any]) -> Any:
    """The W&B run of this folder: a restart continues it, wherever it runs; a folder that was begun afresh has another."""
    import wandb

    noted = folder / "wandb_run_id"
    if not noted.exists():
        write_whole(noted, (os.environ.get("WANDB_RUN_ID") or uuid.uuid4().hex[:16]) + "\n")
    return wandb.init(name=name, dir=str(folder), id=noted.read_text(encoding="utf-8").strip(), resume="allow", config=settings)

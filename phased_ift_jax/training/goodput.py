"""Goodput: the share of a run's time in which it trained what its result is made of. Read from its files alone: no JAX."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from phased_ift_jax.training import mirror
from phased_ift_jax.training.metrics import SECONDS, whole_lines

STARTS = "starts.jsonl"


def note(folder: Path, event: str, at: float) -> None:
    """Note in a run's folder that it has a `start`, or is `done`, at this time (seconds since 1970); the disk, or the bucket, has it then."""
    with open(folder / STARTS, "a", encoding="utf-8") as file:
        file.write(json.dumps({event: at}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    mirror.show(folder / STARTS)


def is_running(folder: Path) -> bool:
    """Whether the last thing that was noted is a start."""
    return "start" in (_noted(folder) or [{}])[-1]


def goodput(folder: Path, until: tuple[int, int]) -> dict[str, Any] | None:
    """Seconds from a run's first start to its end (or to now), those of its steps up to (phase index, step), and their share; None where no start was noted."""
    noted = _noted(folder)
    starts = [line["start"] for line in noted if "start" in line]
    if not starts:
        return None
    trained = sum(line["seconds"] for line in whole_lines(folder / SECONDS) if (line["phase_index"], line["step"]) <= until)
    # not less than was trained: the clocks of two machines may differ
    wall = max(noted[-1].get("done", time.time()) - starts[0], trained)
    return {"share": trained / wall if wall else 0.0, "trained_seconds": trained, "wall_seconds": wall, "starts": len(starts), "ended": "done" in noted[-1]}


def _noted(folder: Path) -> list[dict[str, float]]:
    """The lines of a run's starts; one that a kill has cut off is none."""
    lines = []
    for text in (folder / STARTS).read_text(encoding="utf-8", errors="replace").splitlines() if (folder / STARTS).exists() else []:
        try:
            [(event, at)] = json.loads(text).items()
            lines.append({event: float(at)})
        except (ValueError, TypeError, AttributeError):
            continue
    return lines

"""How far a run is, from its files alone: no JAX, no data, no model."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from phased_ift_jax.files import holder_of
from phased_ift_jax.lease import holder
from phased_ift_jax.object_store import Objects
from phased_ift_jax.records import UserError
from phased_ift_jax.training import manifest, mirror
from phased_ift_jax.training.goodput import goodput
from phased_ift_jax.training.metrics import whole_lines

RECENT = 50  # steps whose median time tells what a step takes: compilations are among them, and count little


def status(run: Path, verify: bool = False) -> dict[str, Any]:
    """Facts of the run in a folder: phases, newest whole checkpoint, last step, seconds left, what its next start will do.

    `verify` compares every checkpoint with its manifest; `damaged` then says of each damaged one what is wrong.

    Raises:
        UserError: the folder holds no run.
    """
    try:
        phases = json.loads((run / "plan.json").read_text(encoding="utf-8"))["phases"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"'{run}' holds no run that was started (no plan.json); give the output_dir of one") from None
    found = sorted((facts["phase"], facts["step"], path) for path in (run / "checkpoints").glob("*/[0-9]*") if (facts := manifest.facts_of(path)))
    damaged = {str(path): "its manifest is missing or damaged" for path in manifest.unreadable(run / "checkpoints")}
    if verify:
        faults = {path: manifest.fault(path) for *_, path in found}
        # one that a run at work has removed meanwhile has no manifest any more
        damaged |= {str(path): fault for path, fault in faults.items() if fault and manifest.facts_of(path)}
    newest = next(((phase, step, path) for phase, step, path in reversed(found) if str(path) not in damaged), None)
    lines = whole_lines(run / "metrics.jsonl")
    evaluated = {row["after"] for row in _forgetting(run)}
    done = [_done(phase, newest) for phase in phases]
    seconds = statistics.median([line["seconds"] for line in lines[-RECENT:]]) if lines else None
    at_work = holder_of(run)
    left = sum(phase["steps"] - steps for phase, steps in zip(phases, done, strict=True))
    return {
        "run": str(run),
        "at_work": at_work,
        "phases": [
            phase | {"done": steps, "evaluated": phase["folder"] in evaluated, "exported": (run / "hf" / phase["folder"]).is_dir()}
            for phase, steps in zip(phases, done, strict=True)
        ],
        "checkpoint": str(newest[2]) if newest else None,
        "last_step": {name: lines[-1].get(name) for name in ("phase", "step", "loss", "seconds")} if lines else None,
        "skipped": sum(bool(line.get("skipped")) for line in lines),
        # of steps that no checkpoint holds only a process at work knows that they will count
        "goodput": goodput(run, (len(phases) + 1, 0) if at_work else newest[:2] if newest else (0, 0)),
        "seconds_left": None if seconds is None else seconds * left,
        "next_start": _next(phases, done, newest, run) if newest or not damaged else "finds no whole checkpoint, and refuses",
        "damaged": damaged,
    }


def status_of_address(address: str, verify: bool = False) -> dict[str, Any]:
    """The same of a run in a bucket, where `verify` compares with what the store says of each object."""
    with mirror.picture(address) as folder:
        of_folder = json.dumps(status(folder, verify) | {"at_work": holder(Objects(address))})
        return dict(json.loads(of_folder.replace(str(folder), address.rstrip("/"))))


def _done(phase: dict[str, Any], newest: tuple[int, int, Path] | None) -> int:
    """Steps of a phase that need not be trained again."""
    if newest is None or phase["index"] > newest[0]:
        return 0
    return int(phase["steps"]) if phase["index"] < newest[0] else newest[1]


def _next(phases: list[dict[str, Any]], done: list[int], newest: tuple[int, int, Path] | None, run: Path) -> str:
    unfinished = next(((phase, steps) for phase, steps in zip(phases, done, strict=True) if steps < phase["steps"]), None)
    if unfinished is None:
        last = phases[-1]["folder"]
        return "finds nothing left to do" if (run / "hf" / last).is_dir() else f"evaluates and exports {last}"
    phase, steps = unfinished
    if newest is None:
        return f"starts {phase['folder']} from the base"
    return f"goes on at step {steps + 1} of {phase['folder']}" if steps else f"starts {phase['folder']} from '{newest[2]}'"


def _forgetting(run: Path) -> list[dict[str, Any]]:
    try:
        return list(json.loads((run / "forgetting.json").read_text(encoding="utf-8"))["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return []

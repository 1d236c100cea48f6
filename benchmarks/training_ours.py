"""Our side of `training.py`:  python benchmarks/training_ours.py JOB.json

The loop of `python -m phased_ift_jax.train` itself, with its packing, logging and bookkeeping, held between steps until its turn comes.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from training_peers import WARM, Turns

from phased_ift_jax.config import RunConfig
from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
from phased_ift_jax.train import Results
from phased_ift_jax.training import loop
from phased_ift_jax.xla_flags import lasting_memory, set_flags


class Held:
    """A trainer's jitted step; everything of it is as it was, but that it waits for its turn after a call."""

    def __init__(self, step: Any, turns: Turns) -> None:
        self._step, self._turns = step, turns

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)

    def __call__(self, *arguments: Any) -> Any:
        new = self._step(*arguments)
        self._turns.step_done(lambda: jax.block_until_ready(new))
        return new


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    config = RunConfig.model_validate(job["config"])
    lasting_memory(config.model.model_name_or_path)  # this and the flags as `train` does
    set_flags(config.training.deterministic)
    turns, compiling = Turns(job["warm"], job.get("warm_seconds", WARM)), list[float]()
    jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: compiling.append(seconds) if event.endswith("backend_compile_duration") else None)
    run = loop.prepare(config)
    (phase,) = run.plan.phases
    turns.tokens = [int(phase.lengths[phase.steps[step]].sum()) for step in range(len(phase.steps))]
    trainer = run.trainer(phase)
    trainer.__dict__["step"] = Held(trainer.step, turns)  # where its cached property is kept
    turns.facts = lambda: {
        "rows": phase.shapes.rows,
        "lengths": phase.shapes.lengths,
        "compile_seconds": sum(compiling),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
    }
    loop.train(run, Results(ForgettingMatrix(run.output / "forgetting.json")))


if __name__ == "__main__":
    main()

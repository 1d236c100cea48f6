"""A training process that dies at an exact point:  python driver.py POINT PHASE CONFIG

It patches the functions of the product in its own process, kills itself (-9) at POINT of PHASE, and is `phased_ift_jax.train` in all else.
Every optimizer step that was really taken is one line, "PHASE STEP", of CONFIG's name with `.steps`, by whatever process it was. POINT `none`
only counts; `keep-all` removes no old checkpoint.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

import jax

from phased_ift_jax import cli, train
from phased_ift_jax.training import checkpoint, loop, manifest
from phased_ift_jax.training.plan import PhasePlan
from phased_ift_jax.training.step import Trainer

POINTS = ("before-step", "after-step", "before-seal", "after-seal", "before-export", "before-rename", "after-export")


def die() -> NoReturn:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError("nothing is run after that")


class Armed:
    """Where to die, and what has been trained."""

    def __init__(self, point: str, phase: int, steps: Path) -> None:
        self.point, self.phase = point, phase
        self.at, self.last = (0, 0), 0  # (phase, step) under way, and the last step of that phase
        self._steps = os.open(steps, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def here(self, point: str, phase: int) -> None:
        if (point, phase) == (self.point, self.phase):
            die()

    def count_steps(self) -> None:
        """Know the position of every step, and note it once it is taken."""
        begin, step = loop._begin, Trainer.__dict__["step"].func

        @functools.wraps(begin)
        def beginning(*arguments: Any, **options: Any) -> Any:
            state, start = begin(*arguments, **options)
            [phase] = [one for one in [*arguments, *options.values()] if isinstance(one, PhasePlan)]
            self.at, self.last = (phase.phase.index, start), len(phase.steps)
            return state, start

        loop._begin = beginning
        Trainer.step = functools.cached_property(lambda trainer: Counted(self, step(trainer)))
        Trainer.step.__set_name__(Trainer, "step")

    def around(self, owner: Any, name: str, point: str, phase_of: Any, before: str = "before-", after: str | None = "after-") -> None:
        """Die before or after a function of the product, where its arguments belong to the phase."""
        real = getattr(owner, name)

        @functools.wraps(real)
        def armed(*arguments: Any, **options: Any) -> Any:
            phase = phase_of(*arguments)
            self.here(before + point, phase)
            result = real(*arguments, **options)
            if after is not None:
                self.here(after + point, phase)
            return result

        setattr(owner, name, armed)

    def taken(self) -> None:
        os.write(self._steps, f"{self.at[0]} {self.at[1]}\n".encode())


class Counted:
    """The compiled step, which says when it was called and is itself in all else."""

    def __init__(self, armed: Armed, step: Any) -> None:
        self._armed, self._step = armed, step

    def __call__(self, *arguments: Any) -> Any:
        armed = self._armed
        armed.at = (armed.at[0], armed.at[1] + 1)
        last = armed.at[1] == armed.last
        if last:
            armed.here("before-step", armed.at[0])
        result = jax.block_until_ready(self._step(*arguments))
        armed.taken()
        if last:
            armed.here("after-step", armed.at[0])
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._step, name)


def exported_phase(path: Any) -> int:
    """The phase whose export lies at a path; 0 where none does."""
    name = Path(path).name.partition("-")[0]
    return int(name) if Path(path).parent.name == "hf" and name.isdigit() else 0


def main(point: str, phase: int, config: Path) -> NoReturn:
    if point not in (*POINTS, "none", "keep-all"):
        raise SystemExit(f"no point {point!r}; known: {', '.join(POINTS)}")
    armed = Armed(point, phase, config.with_suffix(".steps"))
    armed.count_steps()
    armed.around(manifest, "seal", "seal", lambda folder, facts: facts["phase"] if facts["complete"] else 0)
    armed.around(loop.conversion, "to_hf", "export", lambda source, destination, *_: exported_phase(destination))
    armed.around(os, "rename", "rename", lambda source, destination: exported_phase(destination), after=None)
    if point == "keep-all":
        checkpoint.Checkpoints._prune = lambda store: None
    cli.run(train.main, [str(config)])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))

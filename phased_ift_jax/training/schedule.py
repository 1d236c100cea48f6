"""Learning rates, in closed form: plain numpy, computed before the run and handed to the train step one number at a time.

The formulas are those of `transformers.optimization` (get_cosine_schedule_with_warmup and its siblings): step i, from 0, trains at
peak * scale(i), so that with a warmup the very first step's rate is 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from phased_ift_jax.config import CurriculumConfig, TrainingConfig


def scales(kind: str, steps: int, warmup_ratio: float) -> np.ndarray:
    """Share of the peak rate at each of `steps` steps, float64; the first ceil(warmup_ratio * steps) rise linearly from 0."""
    step = np.arange(steps, dtype=np.float64)
    if kind == "constant":
        return np.ones(steps)
    warmup = math.ceil(warmup_ratio * steps)
    rising = step / max(1, warmup)
    progress = (step - warmup) / max(1, steps - warmup)
    if kind == "cosine":
        after = np.maximum(0.0, 0.5 * (1.0 + np.cos(np.pi * progress)))
    elif kind == "linear":
        after = np.maximum(0.0, 1.0 - progress)
    else:  # constant_with_warmup
        after = np.ones(steps)
    return np.where(step < warmup, rising, after)


def learning_rates(curriculum: CurriculumConfig, training: Sequence[TrainingConfig], steps: Sequence[int], phased_steps: Sequence[int]) -> list[np.ndarray]:
    """The rate of every step of every phase, float32; `training` is each phase's, with its overrides.

    A schedule restarts with each phase, or goes on over all of them. In the one_off arm there is one phase; restarting there means at
    the phased arm's boundaries, scaled to this arm's steps (`phased_steps` are the phased arm's).
    """
    if curriculum.restarts_schedule and curriculum.arm == "one_off":
        total = sum(steps)
        edges = [round(total * edge / sum(phased_steps)) for edge in np.cumsum([0, *phased_steps])]
        lengths = list(np.diff(edges))
        owners = [training[0]] * len(lengths)
    elif curriculum.restarts_schedule:
        lengths, owners = list(steps), list(training)
    else:
        lengths, owners = [sum(steps)], [training[0]]
    scale = np.concatenate([scales(owner.lr_scheduler_type, int(length), owner.warmup_ratio) for owner, length in zip(owners, lengths, strict=True)])
    peaks = np.repeat([phase.learning_rate for phase in training], steps)
    return np.split((peaks * scale).astype(np.float32), np.cumsum(steps)[:-1])

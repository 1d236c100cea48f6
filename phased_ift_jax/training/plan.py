"""What a run will do, phase by phase, before it does it: rows, tokens, steps, learning rates, row shapes, and the budget ledger."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from phased_ift_jax.config import RunConfig, TrainingConfig
from phased_ift_jax.data.batches import Steps
from phased_ift_jax.data.dataset import Dataset
from phased_ift_jax.data.packing import Shapes, choose_shapes, row_lengths
from phased_ift_jax.models.attention import implementation
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import Phase, UserError
from phased_ift_jax.training.schedule import learning_rates


@dataclass(frozen=True, eq=False)
class PhasePlan:
    """One phase with its own training settings, steps and rates; totals are over all its epochs."""

    phase: Phase
    training: TrainingConfig
    steps: Steps
    learning_rates: np.ndarray  # float32, one a step
    shapes: Shapes
    lengths: np.ndarray  # tokens of every example of the dataset
    response_lengths: np.ndarray

    @cached_property
    def times_trained(self) -> np.ndarray:
        """How often each row of the dataset is trained in this phase."""
        times = np.zeros(len(self.lengths), np.int64)
        epochs, more = divmod(len(self.steps), self.steps.per_epoch)
        times[self.steps.rows] = epochs
        for step in range(len(self.steps) - more, len(self.steps)):
            times[self.steps[step]] += 1
        return times

    @cached_property
    def row_lengths(self) -> np.ndarray:
        """The T of every step's rows."""
        return row_lengths([self.lengths[self.steps[step]] for step in range(len(self.steps))], self.shapes)

    @property
    def examples(self) -> int:
        return int(self.times_trained.sum())

    @property
    def tokens(self) -> int:
        return int(self.times_trained @ self.lengths)

    @property
    def response_tokens(self) -> int:
        return int(self.times_trained @ self.response_lengths)

    def flops(self, model: DecoderConfig) -> float:
        """Model FLOPs of the phase, attention counted causally and inside examples only."""
        return model.train_flops(self.tokens, int(self.times_trained @ attended_pairs(self.lengths, model.sliding_window)))


@dataclass(frozen=True, eq=False)
class Plan:
    """All phases of a run."""

    phases: tuple[PhasePlan, ...]
    model: DecoderConfig

    def ledger(self) -> dict[str, float]:
        """The budget by which arms are compared."""
        return {
            "examples": sum(phase.examples for phase in self.phases),
            "tokens": sum(phase.tokens for phase in self.phases),
            "response_tokens": sum(phase.response_tokens for phase in self.phases),
            "optimizer_steps": sum(len(phase.steps) for phase in self.phases),
            "sum_of_learning_rates": float(sum(phase.learning_rates.sum(dtype=np.float64) for phase in self.phases)),
            "flops": sum(phase.flops(self.model) for phase in self.phases),
        }

    def rows(self) -> list[dict[str, object]]:
        """One line of facts for each phase, for a table or a file."""
        return [
            {
                "phase": phase.phase.folder,
                "rows": len(phase.phase.rows),
                "epochs": phase.training.num_train_epochs if phase.training.max_steps < 0 else round(phase.examples / len(phase.phase.rows), 2),
                "examples": phase.examples,
                "tokens": phase.tokens,
                "response_tokens": phase.response_tokens,
                "steps": len(phase.steps),
                "lr_first": float(phase.learning_rates[0]),
                "lr_peak": float(phase.learning_rates.max()),
                "lr_last": float(phase.learning_rates[-1]),
            }
            for phase in self.phases
        ]

    @property
    def all_shapes(self) -> tuple[Shapes, ...]:
        return tuple(dict.fromkeys(phase.shapes for phase in self.phases))


def attended_pairs(lengths: np.ndarray, window: int | None) -> np.ndarray:
    """(query, key) pairs of examples of these lengths under a causal mask and a window of W keys."""
    beyond = np.maximum(lengths - window, 0) if window else np.zeros_like(lengths)
    return lengths * (lengths + 1) // 2 - beyond * (beyond + 1) // 2


def row_price(model: DecoderConfig, attention: str, platform: str | None) -> float:
    """The row length in tokens at which attention (12 N H L per pair, of which causality leaves fused kernels half) costs as much as all matmuls
    (6 per parameter); infinite on CPUs, where `xla` passes over other examples, so that the length of a row costs nothing.
    """
    if (attention, platform) == ("xla", "cpu"):
        return float("inf")
    return model.matmul_parameters / (model.num_layers * model.num_heads * model.head_dim)


def make_plan(config: RunConfig, dataset: Dataset, model: DecoderConfig, row_devices: int, platform: str | None = None) -> Plan:
    """Steps, rates and shapes of every phase; `row_devices` is how many devices share the rows of a batch, `platform` what they are, where it is known."""
    attention = implementation(config.model.attn_implementation, platform, model.head_dim, config.model.dtype)[0] if platform else config.model.attn_implementation
    price = row_price(model, attention, platform)
    trainings = [training_of(config.training, phase) for phase in dataset.phases]
    if config.curriculum.optimizer_state == "keep" and len({training.optim for training in trainings}) > 1:
        raise UserError("curriculum.phases: optim changes between phases, and optimizer_state: keep has moments of one optimizer only; use reset")
    steps = [steps_of(training, phase, config.seed) for training, phase in zip(trainings, dataset.phases, strict=True)]
    phased = [len(steps_of(training_of(config.training, phase), phase, config.seed)) for phase in dataset.phased]
    rates = learning_rates(config.curriculum, trainings, [len(s) for s in steps], phased)
    lengths = np.array([len(example.tokens) for example in dataset.examples], np.int64)
    response_lengths = np.array([example.response_tokens for example in dataset.examples], np.int64)
    shapes: dict[tuple[int, int], Shapes] = {}
    for training in trainings:
        key = (training.global_batch_size, training.gradient_accumulation_steps)
        if key not in shapes:
            like = [s for s, other in zip(steps, trainings, strict=True) if (other.global_batch_size, other.gradient_accumulation_steps) == key]
            sizes = [lengths[s[i]] for s in like for i in range(len(s))]
            shapes[key] = choose_shapes(sizes, row_devices * training.gradient_accumulation_steps, config.data.packing_shapes, price, config.data.packing)
    return Plan(
        tuple(
            PhasePlan(phase, training, s, rate, shapes[training.global_batch_size, training.gradient_accumulation_steps], lengths, response_lengths)
            for phase, training, s, rate in zip(dataset.phases, trainings, steps, rates, strict=True)
        ),
        model,
    )


def training_of(training: TrainingConfig, phase: Phase) -> TrainingConfig:
    """The training settings of a phase: the run's, with the phase's overrides."""
    return TrainingConfig.model_validate(training.model_dump() | phase.overrides)


def steps_of(training: TrainingConfig, phase: Phase, seed: int) -> Steps:
    """The optimizer steps of a phase."""
    return Steps(phase.rows, training.global_batch_size, training.num_train_epochs, (seed, phase.index), training.max_steps)

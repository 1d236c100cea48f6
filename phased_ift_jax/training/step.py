"""The jitted train step: (state, batch, learning rate) -> (state, metrics), pure, with every sharding given.

The loss is the mean over the trained tokens of the global batch. Accumulation parts, devices and packing only change where its terms
are added up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from phased_ift_jax.config import ModelConfig, TrainingConfig
from phased_ift_jax.models.decoder import Compute, DecoderConfig, Params, init_params, parameter_dims, parameter_shapes
from phased_ift_jax.records import PackedBatch
from phased_ift_jax.sharding import replicated, spec, tree_shardings
from phased_ift_jax.training.loss import summed_loss, token_losses
from phased_ift_jax.training.optimizer import apply, make_optimizer, state_shardings

BATCH_DIMS = "ABT"
jax.tree_util.register_dataclass(PackedBatch, ["tokens_BT", "targets_BT", "weights_BT", "segments_BT", "positions_BT"], [])


@partial(jax.tree_util.register_dataclass, data_fields=["params", "opt_state"], meta_fields=[])
@dataclass(frozen=True)
class TrainState:
    """What a step changes. Which step it is, the host knows: (phase, step) is in the checkpoint beside it."""

    params: Params
    opt_state: Any


@dataclass(frozen=True)
class Trainer:
    """A model on a mesh with one phase's settings: the functions that make, train and measure its state.

    Equal settings give equal trainers; `compiled` functions are shared between phases by keeping one trainer for them.
    """

    model: DecoderConfig
    training: TrainingConfig
    mesh: Mesh
    param_dtype: str = "float32"
    dtype: str = "float32"
    gradient_checkpointing: str = "none"
    attn_implementation: str = "auto"

    @property
    def compute(self) -> Compute:
        return Compute(self.dtype, self.gradient_checkpointing, self.attn_implementation, self.mesh)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        return make_optimizer(self.training, parameter_dims(self.model))

    @cached_property
    def shapes(self) -> TrainState:
        params = parameter_shapes(self.model, jnp.dtype(self.param_dtype))
        return TrainState(params, jax.eval_shape(self.optimizer.init, params))

    @cached_property
    def shardings(self) -> TrainState:
        params = tree_shardings(parameter_dims(self.model), self.shapes.params, self.mesh)
        return TrainState(params, state_shardings(self.optimizer, self.shapes.params, params, self.mesh))

    def init_params(self, seed: int) -> Params:
        """Random parameters, made under their shardings."""
        make = jax.jit(partial(init_params, self.model, dtype=jnp.dtype(self.param_dtype)), out_shardings=self.shardings.params)
        return make(jax.random.key(seed))

    def fresh(self, params: Params) -> TrainState:
        """A state with these parameters and an optimizer that has seen nothing."""
        return TrainState(params, jax.jit(self.optimizer.init, out_shardings=self.shardings.opt_state)(params))

    @cached_property
    def loss_and_gradients(self) -> Callable[[Params, PackedBatch], tuple[jax.Array, Params]]:
        """Mean loss of a batch (A, B, T) and its gradients, each under its parameter's sharding and, but for the embedding's, in `gradient_dtype`."""
        return jax.jit(self._loss_and_gradients, out_shardings=(replicated(self.mesh), self.shardings.params))

    @cached_property
    def step(self) -> jax.stages.Wrapped:
        """One optimizer step, (state, batch, learning rate) -> (state, metrics); the state's buffers are given up to the new state.

        With `on_nonfinite: skip` a step whose loss or gradient is no finite number leaves the state as it was.
        """

        def step(state: TrainState, batch: PackedBatch, learning_rate: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
            loss, gradients = self._loss_and_gradients(state.params, batch)
            gradients = jax.tree.map(lambda g: g.astype(jnp.promote_types(g.dtype, jnp.float32)), gradients)
            norm = optax.global_norm(gradients)
            params, opt_state = apply(self.optimizer, state.params, state.opt_state, gradients, learning_rate)
            # a moment of bfloat16 weights comes wide out of wide gradients; the state keeps its dtypes, and so its buffers and this compilation
            new = jax.tree.map(lambda after, before: after.astype(before.dtype), TrainState(params, opt_state), state)
            if self.training.on_nonfinite == "skip":
                finite = jnp.isfinite(loss) & jnp.isfinite(norm)
                new = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
            return new, {"learning_rate": learning_rate, "loss": loss, "grad_norm": norm}

        return jax.jit(step, donate_argnums=0, out_shardings=(self.shardings, replicated(self.mesh)))

    def compile_step(self, rows: int, length: int, parts: int) -> None:
        """Compile `step` for batches of `rows` rows of `length` tokens, computed in so many parts; a call with such a batch compiles nothing then."""
        self.lower_step(rows, length, parts).compile()

    def lower_step(self, rows: int, length: int, parts: int) -> jax.stages.Lowered:
        """`step` for such batches, ready to be compiled for the mesh's devices, which need not be there."""
        state = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), self.shapes, self.shardings)
        shape = (parts, rows // parts, length)
        sharding = NamedSharding(self.mesh, spec(BATCH_DIMS, shape, self.mesh))
        ids, weights = (jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in (jnp.int32, jnp.float32))
        return self.step.lower(state, PackedBatch(ids, ids, weights, ids, ids), jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(self.mesh)))

    @cached_property
    def evaluate(self) -> Callable[[Params, PackedBatch], tuple[jax.Array, jax.Array]]:
        """Summed loss of a batch's trained tokens, and how many there are."""

        def evaluate(params: Params, batch: PackedBatch) -> tuple[jax.Array, jax.Array]:
            sums = jax.lax.map(lambda part: summed_loss(self.model, params, part, self.compute), batch)
            return jnp.sum(sums), jnp.sum(batch.weights_BT)

        return jax.jit(evaluate, out_shardings=replicated(self.mesh))

    @cached_property
    def token_losses(self) -> Callable[[Params, PackedBatch], jax.Array]:
        """The loss of each of a batch's trained tokens (A, B, T): what `evaluate` adds up."""
        return jax.jit(lambda params, batch: jax.lax.map(lambda part: token_losses(self.model, params, part, self.compute), batch), out_shardings=replicated(self.mesh))

    def _loss_and_gradients(self, params: Params, batch: PackedBatch) -> tuple[jax.Array, Params]:
        trained = jnp.maximum(jnp.sum(batch.weights_BT), 1.0)
        params = differentiated(params, self.training.gradient_dtype)
        wide = partial(jnp.promote_types, jnp.float32)  # losses and parts are added up in no less, whatever each is in

        def part_loss(params: Params, part: PackedBatch) -> jax.Array:
            total = summed_loss(self.model, params, part, self.compute)
            return total / trained.astype(total.dtype)

        def of_part(part: PackedBatch) -> tuple[jax.Array, Params]:
            loss, gradients = jax.value_and_grad(part_loss)(params, part)
            return loss, jax.lax.with_sharding_constraint(gradients, self.shardings.params)

        def add(sums: tuple[jax.Array, Params], part: PackedBatch) -> tuple[tuple[jax.Array, Params], None]:
            return jax.tree.map(lambda total, more: total + more.astype(total.dtype), sums, of_part(part)), None

        if batch.tokens_BT.shape[0] == 1:
            return of_part(jax.tree.map(lambda x: x[0], batch))
        zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, wide(p.dtype)), params)
        return jax.lax.scan(add, (jnp.zeros((), wide(self.dtype)), zeros), batch)[0]


def differentiated(params: Params, gradient_dtype: str | None) -> Params:
    """The parameters as a step takes its gradients of them, which have their dtypes: `gradient_dtype`, but for the embedding, in whose gradient
    all occurrences of a token are added up.
    """
    return params if gradient_dtype is None else jax.tree.map(lambda p: p.astype(gradient_dtype), params) | {"embed": params["embed"]}


def trainer_of(model: ModelConfig, sizes: DecoderConfig, training: TrainingConfig, mesh: Mesh) -> Trainer:
    """The trainer of a run's model settings, of a model of these sizes."""
    return Trainer(sizes, training, mesh, model.param_dtype, model.dtype, model.gradient_checkpointing, model.attn_implementation)

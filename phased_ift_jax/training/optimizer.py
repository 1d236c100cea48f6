"""AdamW through optax, as `torch.optim.AdamW` under transformers' Trainer: clip, moments, decoupled decay on all but norms and biases."""

from __future__ import annotations

from typing import Any

import jax
import optax
from jax.sharding import Mesh

from phased_ift_jax.config import TrainingConfig
from phased_ift_jax.models.decoder import Params, is_matrix
from phased_ift_jax.sharding import replicated


def make_optimizer(training: TrainingConfig, parameter_dims: Any) -> optax.GradientTransformation:
    """A transformation whose updates are to be scaled by minus the learning rate (the train step does, see `apply`)."""
    decayed = jax.tree.map(is_matrix, parameter_dims)
    adam = optax.scale_by_adam(training.adam_beta1, training.adam_beta2, training.adam_epsilon, mu_dtype=training.adam_mu_dtype)
    moments = adam if training.optim == "adamw" else optax.identity()
    return optax.chain(optax.clip_by_global_norm(training.max_grad_norm), moments, optax.add_decayed_weights(training.weight_decay, mask=decayed))


def apply(optimizer: optax.GradientTransformation, params: Params, opt_state: Any, gradients: Params, learning_rate: jax.Array) -> tuple[Params, Any]:
    """One update: params - learning_rate * (moments' direction + decay)."""
    updates, opt_state = optimizer.update(gradients, opt_state, params)
    return jax.tree.map(lambda p, u: (p - learning_rate.astype(u.dtype) * u).astype(p.dtype), params, updates), opt_state


def state_shardings(optimizer: optax.GradientTransformation, param_shapes: Any, param_shardings: Any, mesh: Mesh) -> Any:
    """Each moment under its parameter's sharding, given explicitly; left to itself, jit would put zeros on the first device."""
    shapes = jax.eval_shape(optimizer.init, param_shapes)
    return optax.tree_utils.tree_map_params(optimizer.init, lambda _, sharding: sharding, shapes, param_shardings, transform_non_params=lambda _: replicated(mesh))

"""Cross-entropy over the trained tokens, in chunks of positions, so that the logits of a whole batch never exist at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from phased_ift_jax.models import decoder
from phased_ift_jax.models.decoder import Compute, DecoderConfig, Params
from phased_ift_jax.records import PackedBatch
from phased_ift_jax.sharding import batch_rows, constrain, gathered

CHUNK = 1024  # tokens of one device whose logits exist at once
CPU_CHUNKS = (768, 192, 64)  # the same on a CPU, of trained tokens alone, each size of what those before it have left
Sums = tuple[jax.Array, jax.Array | None]  # the loss, and the head's gradient where it is asked for


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, dims: str, mesh: Mesh | None) -> jax.Array:
    """Sum over all positions of weight * -log p(target), in at least float32. `dims` of the head are DV or VD.

    The gradient is made in the same pass as the loss, since what follows a sum can only scale it: the logits are computed once, and the
    head's gradient is added up over the chunks in at least float32; on CPUs of trained positions alone. No device holds it whole: it is added up over them chunk by chunk, which
    sends a head through the links for every `CHUNK` tokens of a device.
    """
    return _scan(hidden_BTD, head, targets_BT, weights_BT, dims, mesh, gradients=False)[0]


def _forward(hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, dims: str, mesh: Mesh | None) -> tuple[jax.Array, Any]:
    loss, *gradients = _scan(hidden_BTD, head, targets_BT, weights_BT, dims, mesh, gradients=True)
    return loss, [(gradient, jnp.zeros((), array.dtype)) for gradient, array in zip(gradients, (hidden_BTD, head), strict=True)]


def _backward(dims: str, mesh: Mesh | None, gradients: Any, scale: jax.Array) -> tuple[jax.Array, jax.Array, None, None]:
    # scaled before they are rounded: 1 / n rounded, or numbers rounded twice, would turn all of them the same way
    hidden_gradient, head_gradient = ((gradient * scale).astype(like.dtype) for gradient, like in gradients)
    return hidden_gradient, head_gradient, None, None


cross_entropy.defvjp(_forward, _backward)


def _scan(
    hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, dims: str, mesh: Mesh | None, gradients: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    """The loss and, where asked for, its gradients by hidden states (B, T, D) and head (`dims`), all in at least float32."""
    B, T, D = hidden_BTD.shape
    wide = jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    whole_head = gathered(head, dims, hidden_BTD.dtype, mesh)
    on_cpu = _on_cpu(mesh)
    # a CPU copies the operand that a matmul is to read transposed: there the narrow one is, and the sum is turned once, at the end
    summed_dims = "DV" if on_cpu else dims

    def add(sums: Sums, chunk: tuple[jax.Array, ...]) -> tuple[Sums, jax.Array | None]:
        hidden_BTD, targets_BT, weights_BT = chunk
        weights_BT = weights_BT.astype(wide)
        losses_BT, scores_BTV, total_BT, chosen_BTV = _each(hidden_BTD, whole_head, targets_BT, dims, wide, look_up=on_cpu)
        loss = sums[0] + jnp.sum(losses_BT * weights_BT)
        if sums[1] is None:
            return (loss, None), None
        errors_BTV = ((jnp.exp(scores_BTV - total_BT[..., None]) - chosen_BTV.astype(wide)) * weights_BT[..., None]).astype(hidden_BTD.dtype)
        head_gradient = sums[1] + jnp.einsum(f"BTD,BTV->{summed_dims}", hidden_BTD, errors_BTV, preferred_element_type=wide)
        return (loss, head_gradient), jnp.einsum(f"BTV,{dims}->BTD", errors_BTV, whole_head, preferred_element_type=wide)

    rows = B if mesh is None or B % batch_rows(mesh.shape) else B // batch_rows(mesh.shape)  # those that devices do not divide are held whole by each
    sums: Sums = (jnp.zeros((), wide), jnp.zeros(head.shape if summed_dims == dims else head.shape[::-1], wide) if gradients else None)
    if on_cpu:
        sums, hidden_gradient_BTD = _over_trained(add, sums, rows, hidden_BTD, targets_BT, weights_BT)
    elif (chunks := chunks_of(T, rows)) == 1:
        sums, hidden_gradient_BTD = add(sums, (hidden_BTD, targets_BT, weights_BT))
    else:
        sums, hidden_gradient_CBTD = jax.lax.scan(add, sums, _cut(chunks, hidden_BTD, targets_BT, weights_BT))
        hidden_gradient_BTD = None if hidden_gradient_CBTD is None else hidden_gradient_CBTD.swapaxes(0, 1).reshape(B, T, D)
    if sums[1] is None:
        return sums[0], None, None
    # added up over the devices before the layers' backward pass starts, which does not wait for it and would leave it whole till the end
    head_gradient = sums[1] if summed_dims == dims else sums[1].T
    return sums[0], *jax.lax.optimization_barrier((hidden_gradient_BTD, constrain(head_gradient, dims, mesh)))


def _on_cpu(mesh: Mesh | None) -> bool:
    return mesh is None or bool(mesh.devices.flat[0].platform == "cpu")


def _over_trained(add: Callable[..., Any], sums: Sums, rows: int, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> tuple[Sums, jax.Array | None]:
    """`add` over trained positions alone, put before the others of their rows: the head is most of a small model's work.

    They are computed in as many chunks of the first size of `CPU_CHUNKS` (tokens of all rows that a device has) as are full, then of the next;
    the last size takes the rest, and may go into positions that are not trained.
    """
    order_BT = jnp.argsort(weights_BT == 0, axis=1, stable=True)
    ordered = jnp.take_along_axis(hidden_BTD, order_BT[..., None], axis=1), *(jnp.take_along_axis(x_BT, order_BT, axis=1) for x_BT in (targets_BT, weights_BT))
    most, sizes = jnp.max(jnp.sum(weights_BT != 0, axis=1)), sorted({max(1, min(hidden_BTD.shape[1], size // rows)) for size in CPU_CHUNKS}, reverse=True)
    padded = [jnp.pad(x, ((0, 0), (0, sizes[-1]), *[(0, 0)] * (x.ndim - 2))) for x in ordered]
    made_BTD = None if sums[1] is None else jnp.zeros(padded[0].shape, sums[1].dtype)

    def one(size: int, begin: jax.Array, chunk: jax.Array, carry: tuple[Sums, jax.Array | None]) -> tuple[Sums, jax.Array | None]:
        (sums, made_BTD), at = carry, begin + chunk * size
        sums, gradient_BTD = add(sums, tuple(jax.lax.dynamic_slice_in_dim(x, at, size, axis=1) for x in padded))
        return sums, None if made_BTD is None else jax.lax.dynamic_update_slice_in_dim(made_BTD, gradient_BTD, at, axis=1)

    begin = jnp.zeros((), most.dtype)
    for size in sizes:
        chunks = (most - begin) // size if size > sizes[-1] else -(-(most - begin) // size)
        sums, made_BTD = jax.lax.fori_loop(0, chunks, partial(one, size, begin), (sums, made_BTD))
        begin += chunks * size
    if made_BTD is None:
        return sums, None
    return sums, jnp.take_along_axis(made_BTD[:, : order_BT.shape[1]], jnp.argsort(order_BT, axis=1)[..., None], axis=1)


def _each(hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, dims: str, wide: jnp.dtype, look_up: bool = False) -> tuple[jax.Array, ...]:
    """-log p(target) of every position (B, T), and what it is made of: scores (B, T, V), their logsumexp (B, T), where the target is (B, T, V).

    The target's score is looked up, or added up with zeros for all others, which wants no gather where the vocabulary is divided.
    """
    scores_BTV = jnp.einsum(f"BTD,{dims}->BTV", hidden_BTD, head, preferred_element_type=wide)
    total_BT = jax.nn.logsumexp(scores_BTV, axis=-1)
    chosen_BTV = jnp.arange(scores_BTV.shape[-1], dtype=targets_BT.dtype) == targets_BT[..., None]
    found_BT = jnp.take_along_axis(scores_BTV, targets_BT[..., None], axis=-1)[..., 0] if look_up else jnp.sum(jnp.where(chosen_BTV, scores_BTV, 0), axis=-1)
    return total_BT - found_BT, scores_BTV, total_BT, chosen_BTV


def _cut(chunks: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Arrays (B, T, ...) as (chunks, B, T / chunks, ...)."""
    return tuple(array.reshape(len(array), chunks, -1, *array.shape[2:]).swapaxes(0, 1) for array in arrays)


def chunks_of(T: int, rows: int) -> int:
    """How many chunks of equal length rows of T tokens are cut into, so that `rows` of them (a device's) have at most `CHUNK` tokens in each,
    or one of each row.
    """
    least = -(-T * rows // CHUNK)
    return next((count for count in range(least, T) if T % count == 0), T)


def summed_loss(config: DecoderConfig, params: Params, batch: PackedBatch, compute: Compute = Compute()) -> jax.Array:  # noqa: B008 - frozen
    """The sum of the trained tokens' losses of packed rows (B, T); divide by the sum of the weights for the mean."""
    hidden_BTD = decoder.hidden_states(config, params, batch.tokens_BT, batch.segments_BT, batch.positions_BT, compute)
    head, dims = decoder.unembedding(config, params)
    return cross_entropy(hidden_BTD, head, batch.targets_BT, batch.weights_BT, dims, compute.mesh)


def token_losses(config: DecoderConfig, params: Params, batch: PackedBatch, compute: Compute = Compute()) -> jax.Array:  # noqa: B008 - frozen
    """The loss of each trained token, at the position before it and zero elsewhere, of packed rows (B, T): what `summed_loss` adds up."""
    hidden_BTD = decoder.hidden_states(config, params, batch.tokens_BT, batch.segments_BT, batch.positions_BT, compute)
    head, dims = decoder.unembedding(config, params)
    (B, T, _), wide = hidden_BTD.shape, jnp.promote_types(hidden_BTD.dtype, jnp.float32)
    whole_head = gathered(head, dims, hidden_BTD.dtype, compute.mesh)
    chunks = chunks_of(T, -(-B // (1 if compute.mesh is None else batch_rows(compute.mesh.shape))))
    losses_CBT = jax.lax.map(lambda chunk: _each(chunk[0], whole_head, chunk[1], dims, wide)[0], _cut(chunks, hidden_BTD, batch.targets_BT))
    return losses_CBT.swapaxes(0, 1).reshape(B, T) * batch.weights_BT.astype(wide)

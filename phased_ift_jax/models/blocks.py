"""Attention in plain XLA, in blocks of queries and keys, that costs what the examples cost and not what the rows do.

The softmax runs along a query's blocks of keys and is never a whole row (Dao et al., 2022, arXiv 2205.14135). Which blocks these are is known
only when a batch is there, so the loops have bounds that are data: one program, for whatever examples lie in the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

BLOCK = 64  # tokens: on CPUs larger blocks compute more of what is masked than they save


class Blocks(NamedTuple):
    """What is attended to, cut into C blocks of `BLOCK` tokens; query heads lie with the key/value head that they share, Q = G * BLOCK of them."""

    q_CBKQH: jax.Array
    k_CBKSH: jax.Array
    v_CBKSH: jax.Array
    first_CBT: jax.Array  # the first key that each query sees
    lowest_C: jax.Array  # the block of the first key that any query of a block sees


def attend_packed(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
    """Causal attention inside the examples of packed rows: each query sees its own example, up to itself, `window` keys at most.

    A window of W is W keys, the query's own included, as in transformers. The tokens of an example (equal segment numbers) lie side by side;
    padding (segment 0) gets finite numbers that mean nothing. A masked key weighs exactly 0.0, so what it holds cannot change the result in
    one bit. What the backward pass needs, the output and its log-sum-exp, is named "attention" for `jax.checkpoint` policies.
    """
    return _attend(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
    return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT, window)[0]


def _forward(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> tuple[jax.Array, Any]:
    blocks, wide = _blocks(q_BTNH, k_BTKH, v_BTKH, segments_BT, window), jnp.promote_types(q_BTNH.dtype, jnp.float32)

    def row(c: jax.Array) -> tuple[jax.Array, jax.Array]:
        def over(block: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            most_BKQ, total_BKQ, y_BKQH = sums
            scores_BKQS = _scores(blocks, c, block, wide)
            higher_BKQ = jnp.maximum(most_BKQ, _by_row(jnp.max, scores_BKQS))
            shrunk_BKQ, weights_BKQS = jnp.exp(most_BKQ - higher_BKQ), jnp.exp(scores_BKQS - higher_BKQ[..., None])
            values_BKQH = jnp.einsum("BKQS,BKSH->BKQH", weights_BKQS.astype(v_BTKH.dtype), blocks.v_CBKSH[block], preferred_element_type=wide)
            return higher_BKQ, total_BKQ * shrunk_BKQ + _by_row(jnp.sum, weights_BKQS), y_BKQH * shrunk_BKQ[..., None] + values_BKQH

        shape = blocks.q_CBKQH.shape[1:]
        nothing = jnp.full(shape[:-1], jnp.finfo(wide).min, wide), jnp.zeros(shape[:-1], wide), jnp.zeros(shape, wide)
        most_BKQ, total_BKQ, y_BKQH = jax.lax.fori_loop(blocks.lowest_C[c], c + 1, over, nothing)
        return (y_BKQH / total_BKQ[..., None]).astype(q_BTNH.dtype), most_BKQ + jnp.log(total_BKQ)

    y_CBKQH, sums_CBKQ = checkpoint_name(jax.lax.map(row, jnp.arange(len(blocks.q_CBKQH))), "attention")
    return _joined(y_CBKQH, q_BTNH), (blocks, y_CBKQH, sums_CBKQ)


def _backward(window: int | None, kept: Any, gradient_BTNH: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    blocks, y_CBKQH, sums_CBKQ = kept
    wide, dy_CBKQH = jnp.promote_types(gradient_BTNH.dtype, jnp.float32), _cut(gradient_BTNH, blocks.k_CBKSH.shape[2])

    def row(sums: tuple[jax.Array, jax.Array], c: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        q_BKQH, dy_BKQH = blocks.q_CBKQH[c], dy_CBKQH[c]
        # turned here, once: a CPU copies the operand that a matmul reads transposed
        q_BKHQ, dy_BKHQ = q_BKQH.swapaxes(2, 3), dy_BKQH.swapaxes(2, 3)
        # as a matmul, of a sum's precision: a CPU's sum over a dim as short as a head is a slow one
        shared_BKQ = jnp.einsum("BKQH,BKQH->BKQ", dy_BKQH, y_CBKQH[c], preferred_element_type=wide, precision="highest")

        def over(block: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            dq_BKQH, dk_CBKHS, dv_CBKHS = sums
            weights_BKQS = jnp.exp(_scores(blocks, c, block, wide) - sums_CBKQ[c][..., None])
            dweights_BKQS = jnp.einsum("BKQH,BKSH->BKQS", dy_BKQH, blocks.v_CBKSH[block], preferred_element_type=wide)
            dscores_BKQS = (weights_BKQS * (dweights_BKQS - shared_BKQ[..., None]) * q_BKQH.shape[-1] ** -0.5).astype(q_BKQH.dtype)
            dq_BKQH += jnp.einsum("BKQS,BKSH->BKQH", dscores_BKQS, blocks.k_CBKSH[block], preferred_element_type=wide)
            dk_BKHS = jnp.einsum("BKHQ,BKQS->BKHS", q_BKHQ, dscores_BKQS, preferred_element_type=wide)
            dv_BKHS = jnp.einsum("BKHQ,BKQS->BKHS", dy_BKHQ, weights_BKQS.astype(dy_BKQH.dtype), preferred_element_type=wide)
            return dq_BKQH, dk_CBKHS.at[block].add(dk_BKHS), dv_CBKHS.at[block].add(dv_BKHS)

        dq_BKQH, *sums_CBKHS = jax.lax.fori_loop(blocks.lowest_C[c], c + 1, over, (jnp.zeros(q_BKQH.shape, wide), *sums))
        return (sums_CBKHS[0], sums_CBKHS[1]), dq_BKQH

    (dk_CBKHS, dv_CBKHS), dq_CBKQH = jax.lax.scan(row, 2 * (jnp.zeros(blocks.k_CBKSH.swapaxes(3, 4).shape, wide),), jnp.arange(len(dy_CBKQH)))
    dq_BTNH, dk_BTKH, dv_BTKH = (_joined(x_CBKQH, gradient_BTNH) for x_CBKQH in (dq_CBKQH, dk_CBKHS.swapaxes(3, 4), dv_CBKHS.swapaxes(3, 4)))
    return dq_BTNH, dk_BTKH, dv_BTKH, None


_attend.defvjp(_forward, _backward)


def _scores(blocks: Blocks, c: jax.Array, block: jax.Array, wide: jnp.dtype) -> jax.Array:
    """Of one block of queries over one of keys, minus infinity where a query does not see a key."""
    q_BKQH, k_BKSH = blocks.q_CBKQH[c], blocks.k_CBKSH[block]
    scores_BKQS = jnp.einsum("BKQH,BKSH->BKQS", q_BKQH, k_BKSH, preferred_element_type=wide) * q_BKQH.shape[-1] ** -0.5
    (B, K, Q, S), key_S = scores_BKQS.shape, block * BLOCK + jnp.arange(BLOCK)
    seen_BTS = (key_S >= blocks.first_CBT[c][..., None]) & (key_S <= c * BLOCK + jnp.arange(BLOCK)[:, None])
    return jnp.where(seen_BTS[:, None, None], scores_BKQS.reshape(B, K, Q // BLOCK, BLOCK, S), -jnp.inf).reshape(B, K, Q, S)


def _by_row(reduced: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    """A sum or maximum over the last dim, taken of a matrix: with more dims XLA's way on CPUs is a slow one."""
    return reduced(x.reshape(-1, x.shape[-1]), axis=-1).reshape(x.shape[:-1])


def _blocks(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> Blocks:
    (B, T), K = segments_BT.shape, k_BTKH.shape[2]
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, -T % BLOCK)))
    position_T = jnp.arange(segments_BT.shape[1])
    begins_BT = (position_T == 0) | (segments_BT != jnp.roll(segments_BT, 1, axis=1))
    first_BT = jax.lax.cummax(jnp.where(begins_BT, position_T, 0), axis=1)
    first_BT = jnp.where(segments_BT == 0, position_T, first_BT)  # padding sees itself alone
    first_BT = first_BT if window is None else jnp.maximum(first_BT, position_T - (window - 1))
    first_CBT = first_BT.reshape(B, -1, BLOCK).swapaxes(0, 1)
    return Blocks(_cut(q_BTNH, K), _cut(k_BTKH, K), _cut(v_BTKH, K), first_CBT, jnp.min(first_CBT, axis=(1, 2)) // BLOCK)


def _cut(x_BTNH: jax.Array, K: int) -> jax.Array:
    """(B, T, N, H) as blocks (C, B, K, N / K * BLOCK, H), with zeros after the rows."""
    B, T, N, H = x_BTNH.shape
    x_BTNH = jnp.pad(x_BTNH, ((0, 0), (0, -T % BLOCK), (0, 0), (0, 0)))
    return x_BTNH.reshape(B, -1, BLOCK, K, N // K, H).transpose(1, 0, 3, 4, 2, 5).reshape(-1, B, K, N // K * BLOCK, H)


def _joined(x_CBKQH: jax.Array, like_BTNH: jax.Array) -> jax.Array:
    """What `_cut` has cut, in rows of another array's length and dtype."""
    (C, B, K, Q, H), T = x_CBKQH.shape, like_BTNH.shape[1]
    x_BTNH = x_CBKQH.reshape(C, B, K, Q // BLOCK, BLOCK, H).transpose(1, 0, 4, 2, 3, 5).reshape(B, C * BLOCK, -1, H)
    return x_BTNH[:, :T].astype(like_BTNH.dtype)

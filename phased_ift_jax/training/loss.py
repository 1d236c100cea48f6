"""Cross-entropy over the trained tokens, in chunks of positions, so that the logits of a whole batch never exist at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from phased_ift_jax.models import decoder
from phased_ift_jax.models.decoder import DecoderConfig, Params
from phased_ift_jax.records import PackedBatch

CHUNK = 512  # positions of a row whose logits exist at once


def token_losses(config: DecoderConfig, params: Params, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """-log p(target) at every position, (B, T), in at least float32."""

    def chunk(hidden: jax.Array, targets: jax.Array) -> jax.Array:
        scores = decoder.logits(config, params, hidden)
        return jax.nn.logsumexp(scores, axis=-1) - jnp.take_along_axis(scores, targets[..., None], axis=-1)[..., 0]

    B, T, D = hidden_BTD.shape
    if T <= CHUNK:
        return chunk(hidden_BTD, targets_BT)
    padded = -(-T // CHUNK) * CHUNK
    hidden_CBTD = jnp.pad(hidden_BTD, ((0, 0), (0, padded - T), (0, 0))).reshape(B, -1, CHUNK, D).swapaxes(0, 1)
    targets_CBT = jnp.pad(targets_BT, ((0, 0), (0, padded - T))).reshape(B, -1, CHUNK).swapaxes(0, 1)
    losses_CBT = jax.lax.map(lambda pair: jax.checkpoint(chunk)(*pair), (hidden_CBTD, targets_CBT))
    return losses_CBT.swapaxes(0, 1).reshape(B, padded)[:, :T]


def summed_loss(
    config: DecoderConfig, params: Params, batch: PackedBatch, gradient_checkpointing: str = "none", attn_implementation: str = "auto", platform: str = "cpu"
) -> jax.Array:
    """The sum of the trained tokens' losses of packed rows (B, T); divide by the sum of the weights for the mean."""
    hidden_BTD = decoder.hidden_states(config, params, batch.tokens_BT, batch.segments_BT, batch.positions_BT, gradient_checkpointing, attn_implementation, platform)
    losses_BT = token_losses(config, params, hidden_BTD, batch.targets_BT)
    return jnp.sum(losses_BT * batch.weights_BT.astype(losses_BT.dtype))

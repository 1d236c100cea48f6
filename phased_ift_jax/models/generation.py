"""Greedy answers from token ids: one prefill, then one token a step over a key/value cache, all in one jitted call."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from phased_ift_jax.models.decoder import DecoderConfig, Params, cached_step, empty_cache, logits


@functools.partial(jax.jit, static_argnums=(0, 4, 5))
def _greedy(config: DecoderConfig, params: Params, prompts_BT: jax.Array, lengths_B: jax.Array, max_new_tokens: int, eos_token_id: int) -> jax.Array:
    B, T = prompts_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T), (B, T))
    cache = empty_cache(config, B, T + max_new_tokens, params["embed"].dtype)
    hidden_BTD, cache = cached_step(config, params, prompts_BT, positions_BT, cache)

    def next_token(hidden_BD: jax.Array) -> jax.Array:
        return jnp.argmax(logits(config, params, hidden_BD[:, None])[:, 0], axis=-1).astype(jnp.int32)

    first_B = next_token(jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0])
    answers_BT = jnp.full((B, max_new_tokens), eos_token_id, jnp.int32).at[:, 0].set(first_B)

    def unfinished(carry: tuple) -> jax.Array:
        step, token_B, finished_B, _, _ = carry
        return (step < max_new_tokens) & ~jnp.all(finished_B | (token_B == eos_token_id))

    def body(carry: tuple) -> tuple:
        step, token_B, finished_B, answers_BT, cache = carry
        finished_B = finished_B | (token_B == eos_token_id)
        # a right-padded prompt's slots beyond its end hold padding; each is overwritten before a query may see it
        hidden_B1D, cache = cached_step(config, params, token_B[:, None], (lengths_B + step - 1)[:, None], cache)
        token_B = jnp.where(finished_B, eos_token_id, next_token(hidden_B1D[:, 0]))
        return step + 1, token_B, finished_B, answers_BT.at[:, step].set(token_B), cache

    return jax.lax.while_loop(unfinished, body, (1, first_B, jnp.zeros(B, bool), answers_BT, cache))[3]


def greedy(config: DecoderConfig, params: Params, prompts: list[np.ndarray], max_new_tokens: int, eos_token_id: int, batch_size: int = 128) -> list[np.ndarray]:
    """The most likely continuation of each prompt (1-D int32 ids), in order, without its end-of-sequence token.

    Prompts are batched by length and padded to few shapes; a continuation stops at `eos_token_id` or after `max_new_tokens`.
    """
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = -(-max(len(prompts[i]) for i in chosen) // 32) * 32
        tokens_BT = np.zeros((batch_size, longest), np.int32)
        lengths_B = np.ones(batch_size, np.int32)
        for row, i in enumerate(chosen):
            tokens_BT[row, : len(prompts[i])] = prompts[i]
            lengths_B[row] = len(prompts[i])
        generated_BT = np.asarray(_greedy(config, params, tokens_BT, lengths_B, max_new_tokens, eos_token_id))
        for row, i in enumerate(chosen):
            ends = np.flatnonzero(generated_BT[row] == eos_token_id)
            answers[i] = generated_BT[row, : ends[0] if len(ends) else max_new_tokens]
    return answers

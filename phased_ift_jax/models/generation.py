"""Responses from prompts of token ids: one prefill, then one token of every row at a time over a key/value cache.

Rows of a batch end at the same slot of the cache, whatever their length: padding lies before a prompt, and all rows write their next key
to the same slot. The cache is a ring; what a slot's key is to a row follows from its age alone, so that a window needs no more slots than
it is wide. Every `STRIDE` tokens the host looks: rows that have ended are dropped once they are half of the batch, and the ring grows as
far as it is needed. Both go by few sizes, each of which is compiled once.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections import abc
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from phased_ift_jax.models.attention import attend_cache, kernel
from phased_ift_jax.models.decoder import Compute, DecoderConfig, Params, logits, unrolled, unrolled_states
from phased_ift_jax.sharding import batch_rows, constrain, per_device, put, replicated

STRIDE = 64  # tokens between two looks of the host
Tick = Callable[[int, int], object]  # told of new tokens, and of rows that have ended


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the most likely one at temperature 0, else drawn among the `top_k` most likely (0: all) that make up `top_p`."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True, eq=False)
class Prompt:
    """Token ids, how many may follow them, and the key of their samples."""

    ids: np.ndarray  # int32, shape (T,)
    most: int
    key: int = 0


@dataclass(frozen=True, eq=False)
class Response:
    """What followed a prompt, the end-of-sequence token left out; `ended`: there was one."""

    ids: np.ndarray  # int32
    ended: bool


@dataclass(frozen=True)
class Generator:
    """What is compiled into prefill and decoding: the model, the choice of tokens, the tokens that end a response, and where it is computed."""

    config: DecoderConfig
    eos: tuple[int, ...]
    decoding: Decoding = Decoding()
    mesh: Mesh | None = None
    batch_size: int = 32

    @property
    def compute(self) -> Compute:
        return Compute(mesh=self.mesh)

    def in_turn(self, params: Params, batches: Sequence[Sequence[Prompt]], tick: Tick = lambda tokens, ended: None) -> abc.Generator[list[Response], None, None]:
        """What `respond` makes of batch after batch; on a CPU as many at a time as it has cores, among which one token's small matmuls are hardly shared."""
        if self.compute.platform != "cpu" or (self.mesh is not None and self.mesh.size > 1):
            yield from (self.respond(params, batch, tick) for batch in batches)
            return
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(lambda batch: self.respond(params, batch, tick), batches)

    def respond(self, params: Params, prompts: Sequence[Prompt], tick: Tick = lambda tokens, ended: None) -> list[Response]:
        """The responses to one batch of prompts, in order; `params` as `unrolled` gives them. Every prompt has a token, and room for one more."""
        B, T = self._rows(len(prompts)), _length(max(len(prompt.ids) for prompt in prompts))
        window = self.config.sliding_window or np.inf
        tokens_BT, length_B, last_B, key_B = np.zeros((B, T), np.int32), np.zeros(B, np.int32), np.zeros(B, np.int32), np.zeros(B, np.uint32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, T - len(prompt.ids) :] = prompt.ids
            length_B[row], last_B[row], key_B[row] = len(prompt.ids), len(prompt.ids) + prompt.most - 1, prompt.key
        given = [self._put(array, dims) for array, dims in ((tokens_BT, "BT"), (length_B, "B"), (last_B, "B"), (key_B, "B"))]
        state, told = _prefill(self, int(min(T, window)), params, *given)
        written: list[list[int]] = [[] for _ in prompts]
        ended_by_eos, rows, column = [False] * len(prompts), list(range(B)), T
        going = np.arange(B) < len(prompts)
        while True:
            tokens_TB, ended_B = (np.asarray(x) for x in told)
            for at in np.flatnonzero(going):
                row, new = rows[at], tokens_TB[:, at].tolist()[: prompts[rows[at]].most - len(written[rows[at]])]
                stop = next((i for i, token in enumerate(new) if token in self.eos), None)
                written[row] += new[:stop]
                ended_by_eos[row] = stop is not None
            tick(int(going.sum()) * len(tokens_TB), int((going & ended_B).sum()))
            going &= ~ended_B
            if not going.any():
                return [Response(np.array(ids, np.int32), ended) for ids, ended in zip(written, ended_by_eos, strict=True)]
            steps = min(STRIDE, max(prompts[rows[at]].most - len(written[rows[at]]) for at in np.flatnonzero(going)))
            slots, kept = int(min(_size(column + steps), window)), np.arange(len(rows))
            if 2 * (fewer := self._rows(int(going.sum()))) <= len(rows):
                kept = np.argsort(~going, kind="stable")[:fewer]
            if len(kept) < len(rows) or slots > state.cache[0][0].shape[3]:
                state = _fitted(self, slots, state, kept)
                rows, going = [rows[at] for at in kept], going[kept]
            state, told = _decode(self, params, state, column, steps)
            told = (told[0][:steps], told[1])
            column += steps

    def _rows(self, needed: int) -> int:
        """How many rows a batch of so many has: each device that shares them has 1, 2, 3, 4, 6, 8, 12, ..., or its share of a full batch."""
        unit = 1 if self.mesh is None else batch_rows(self.mesh.shape)
        return unit * min(_size(-(-needed // unit), 1), max(-(-needed // unit), -(-self.batch_size // unit)))

    def _put(self, array: np.ndarray, dims: str) -> jax.Array:
        return jnp.asarray(array) if self.mesh is None else put(array, dims, self.mesh)


class State(NamedTuple):
    """Where a batch is. The last token of each row is not in the cache yet; its slot is the next one."""

    cache: tuple[tuple[jax.Array, jax.Array], ...]  # of each layer keys and values, (B, K, H, S); column c is in slot c mod S
    token_B: jax.Array
    position_B: jax.Array  # of that token in its row
    last_B: jax.Array  # the position behind which a row may not go
    key_B: jax.Array  # of a row's samples
    ended_B: jax.Array


def _size(needed: int, least: int = 32) -> int:
    """The least power of two, or three quarters of one, that is enough: few sizes, and at most half too much."""
    power = 1 << max(least.bit_length() - 1, (needed - 1).bit_length())
    return power * 3 // 4 if needed <= power * 3 // 4 and power > 2 * least - 1 else power


def _length(needed: int) -> int:
    """The same by quarters, for prompts, whose padding is multiplied by all of the model."""
    quarter = max(32, 1 << max(0, (needed - 1).bit_length() - 3))
    return -(-needed // quarter) * quarter


def in_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions of prompts in batches; none is padded to twice its length (or 64 tokens).

    Those of most tokens come first: they show at once whether memory is enough, and what is last should be short, since others wait for it.
    """
    batches: list[list[int]] = []
    for at in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and len(batches[-1]) < batch_size and 2 * max(lengths[at], 32) > lengths[batches[-1][0]]:
            batches[-1].append(at)
        else:
            batches.append([at])
    return sorted(batches, key=lambda batch: -len(batch) * lengths[batch[0]])


def greedy(
    config: DecoderConfig, params: Params, prompts: Sequence[np.ndarray], max_new_tokens: int, eos_token_id: int, batch_size: int = 128, mesh: Mesh | None = None
) -> list[np.ndarray]:
    """The most likely continuation of each prompt (1-D int32 ids), in order, without its end-of-sequence token."""
    generator, params = Generator(config, (eos_token_id,), mesh=mesh, batch_size=batch_size), unrolled(params)
    answers: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
    batches = in_batches([len(prompt) for prompt in prompts], batch_size)
    for batch, responses in zip(batches, generator.in_turn(params, [[Prompt(prompts[at], max_new_tokens) for at in batch] for batch in batches]), strict=True):
        for at, response in zip(batch, responses, strict=True):
            answers[at] = response.ids
    return answers


def sample_key(seed: int, name: str) -> int:
    """The key of a prompt's samples, the same in whatever batch and order."""
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:4], "big")


def choose(decoding: Decoding, logits_BV: jax.Array, key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """The next token of each row, int32; a sample is a function of its logits, its row's key and its position. Filters are those of transformers, in its order."""
    if decoding.temperature == 0:
        # the first of the largest, as argmax has it, which on CPUs takes as long as the head's whole matmul
        V = logits_BV.shape[-1]
        best_BV = jnp.where(logits_BV == jnp.max(logits_BV, axis=-1, keepdims=True), jnp.arange(V, dtype=jnp.int32), V - 1)
        return jnp.min(best_BV, axis=-1)
    scaled_BV = logits_BV / decoding.temperature
    if decoding.top_k or decoding.top_p < 1:
        falling_BV = -jnp.sort(-scaled_BV, axis=-1)[:, : decoding.top_k or None]
        shares_BV = jax.nn.softmax(falling_BV, axis=-1)
        kept_B = jnp.sum(jnp.cumsum(shares_BV, axis=-1) - shares_BV < decoding.top_p, axis=-1)  # each whose likelier ones do not make up top_p
        least_B1 = jnp.take_along_axis(falling_BV, jnp.maximum(kept_B, 1)[:, None] - 1, axis=-1)
        scaled_BV = jnp.where(scaled_BV >= least_B1, scaled_BV, -jnp.inf)

    def draw(key: jax.Array, position: jax.Array, scaled_V: jax.Array) -> jax.Array:
        return jax.random.categorical(jax.random.fold_in(jax.random.key(key), position), scaled_V)

    return jax.vmap(draw)(key_B, position_B, scaled_BV).astype(jnp.int32)


def _next(generator: Generator, params: Params, hidden_BD: jax.Array, state: State) -> State:
    """The state with the tokens that follow these hidden states; a row that has ended stays as it is."""
    position_B = state.position_B + 1
    token_B = choose(generator.decoding, logits(generator.config, params, hidden_BD[:, None])[:, 0], state.key_B, position_B)
    token_B = jnp.where(state.ended_B, state.token_B, token_B)
    position_B = jnp.where(state.ended_B, state.position_B, position_B)
    ended_B = jnp.isin(token_B, jnp.array(generator.eos, jnp.int32)) | (position_B >= state.last_B)
    return state._replace(token_B=token_B, position_B=position_B, ended_B=state.ended_B | ended_B)


def _told(generator: Generator, tokens_TB: jax.Array, state: State) -> Any:
    """What the host looks at, whole on every device."""
    told = (tokens_TB, state.ended_B)
    return told if generator.mesh is None else jax.lax.with_sharding_constraint(told, replicated(generator.mesh))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _prefill(generator: Generator, slots: int, params: Params, tokens_BT: jax.Array, length_B: jax.Array, last_B: jax.Array, key_B: jax.Array) -> tuple[State, Any]:
    """The state after the prompts, which end in the last column, with the first token of each response; the cache has the last so many columns."""
    (B, T), config, compute = tokens_BT.shape, generator.config, generator.compute
    positions_BT = jnp.arange(T) - (T - length_B[:, None])
    segments_BT = (positions_BT >= 0).astype(jnp.int32)
    attention = functools.partial(kernel(compute.attn_implementation, compute.platform, config.head_dim, params["embed"].dtype), window=config.sliding_window)
    cache: list[tuple[jax.Array, ...]] = []

    def inside(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> jax.Array:
        ring = (jnp.moveaxis(jnp.roll(x_BTKH[:, T - slots :], T % slots, axis=1), 1, 3) for x_BTKH in (k_BTKH, v_BTKH))
        cache.append(tuple(constrain(x_BKHS, "BKHS", compute.mesh) for x_BKHS in ring))
        return per_device(attention, (q_BTNH, k_BTKH, v_BTKH, segments_BT), ("BTNH", "BTKH", "BTKH", "BT"), compute.mesh)

    hidden_BTD = unrolled_states(config, params, tokens_BT, jnp.maximum(positions_BT, 0), [inside] * config.num_layers, compute)
    state = State(tuple(cache), jnp.zeros(B, jnp.int32), length_B - 1, last_B, key_B, length_B == 0)  # type: ignore[arg-type]
    state = _next(generator, params, hidden_BTD[:, -1], state)
    return state, _told(generator, state.token_B[None], state)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fitted(generator: Generator, slots: int, state: State, kept: jax.Array) -> State:
    """The state of these rows alone, with a ring of at least so many slots; one that has gone round is as long as it will be."""

    def fit(x_BKHS: jax.Array) -> jax.Array:
        grown = jnp.pad(x_BKHS[kept], ((0, 0), (0, 0), (0, 0), (0, max(0, slots - x_BKHS.shape[3]))))
        return constrain(grown, "BKHS", generator.mesh)

    cache = tuple((fit(k), fit(v)) for k, v in state.cache)
    return State(cache, *(constrain(x_B[kept], "B", generator.mesh) for x_B in state[1:]))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(generator: Generator, params: Params, state: State, column: jax.Array, steps: jax.Array) -> tuple[State, Any]:
    """At most so many further tokens of each row, written from this column on; (STRIDE, B) of them, zeros where all rows had ended before."""
    config, S = generator.config, state.cache[0][0].shape[3]

    def step(carry: tuple[jax.Array, State, jax.Array]) -> tuple[jax.Array, State, jax.Array]:
        done, state, tokens_TB = carry
        here = (column + done) % S
        # how long ago a slot was written says which position of its row it holds, and so whether it is of this row at all
        age_S = (here - jnp.arange(S)) % S
        seen_BS = age_S < jnp.minimum(state.position_B[:, None] + 1, config.sliding_window or S)
        cache: list[Any] = []

        def over(old: tuple[jax.Array, jax.Array], q_B1NH: jax.Array, *new_B1KH: jax.Array) -> jax.Array:
            cache.append(tuple(jax.lax.dynamic_update_slice_in_dim(x, jnp.moveaxis(new, 1, 3), here, axis=3) for x, new in zip(old, new_B1KH, strict=True)))
            return attend_cache(q_B1NH[:, 0], cache[-1][0], cache[-1][1], seen_BS)[:, None]

        attends = [functools.partial(over, old) for old in state.cache]
        hidden_B1D = unrolled_states(config, params, state.token_B[:, None], state.position_B[:, None], attends, generator.compute)
        state = _next(generator, params, hidden_B1D[:, 0], state._replace(cache=tuple(cache)))
        return done + 1, state, tokens_TB.at[done].set(state.token_B)

    def going_on(carry: tuple[jax.Array, State, jax.Array]) -> jax.Array:
        return (carry[0] < steps) & ~jnp.all(carry[1].ended_B)

    _, state, tokens_TB = jax.lax.while_loop(going_on, step, (jnp.int32(0), state, jnp.zeros((STRIDE, len(state.token_B)), jnp.int32)))
    return state, _told(generator, tokens_TB, state)

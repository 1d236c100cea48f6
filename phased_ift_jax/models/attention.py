"""Attention and rotary positions, in the order of Hugging Face checkpoints."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from phased_ift_jax.models.blocks import attend_packed
from phased_ift_jax.models.kernels import attend_cudnn, attend_splash, refusal, visible

Kernel = Callable[..., jax.Array]  # called as `attend_packed` is


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base `theta`, and the scaling of long-context checkpoints by its Hugging Face name.

    `default` scales nothing; `linear` divides positions by `factor`; `llama3` (Llama 3.1) keeps short wavelengths, divides long ones by
    `factor` and blends between; `yarn` (Peng et al., 2023, arXiv 2309.00071) blends between the coordinates that turn `beta_fast` and
    `beta_slow` times over the original length, and scales cosines and sines by `attention_factor`. All as `transformers.modeling_rope_utils`.
    """

    theta: float = 10_000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per position of each pair of coordinates, float32, shape (H/2,)."""
        inverse = 1.0 / self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "linear":
            inverse = inverse / self.factor
        if self.kind == "llama3":
            wavelength = 2 * math.pi / inverse
            short = self.original_max_position_embeddings / self.high_freq_factor
            long = self.original_max_position_embeddings / self.low_freq_factor
            blend = (self.original_max_position_embeddings / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
            blended = (1 - blend) * inverse / self.factor + blend * inverse
            inverse = np.where(wavelength > long, inverse / self.factor, np.where(wavelength < short, inverse, blended))
        if self.kind == "yarn":
            low, high = (self._coordinate(turns, head_dim) for turns in (self.beta_fast, self.beta_slow))
            if self.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, head_dim - 1)
            scaled = np.clip((np.arange(head_dim // 2) - low) / (high - low or 0.001), 0, 1)
            inverse = scaled * inverse / self.factor + (1 - scaled) * inverse
        return inverse.astype(np.float32)

    def _coordinate(self, turns: float, head_dim: int) -> float:
        """The pair of coordinates, as a real number, that turns so many times over the original length."""
        return head_dim * math.log(self.original_max_position_embeddings / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def yarn_attention_factor(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """What yarn scales cosines and sines by where the checkpoint does not say: 0.1 ln(factor) + 1, or DeepSeek's ratio of two such."""

    def scale(m: float) -> float:
        return 0.1 * m * math.log(factor) + 1.0 if factor > 1 else 1.0

    return scale(mscale) / scale(mscale_all_dim) if mscale and mscale_all_dim else scale(1.0)


def rotations(rope: Rope, head_dim: int, positions_BT: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `rotate`, each (B, T, 1, H), computed in at least float32 and rounded to `dtype` as transformers does."""
    wide = jnp.promote_types(dtype, jnp.float32)
    angles_BTH = positions_BT[..., None].astype(wide) * jnp.asarray(rope.frequencies(head_dim), wide)
    angles_BT1H = jnp.concatenate([angles_BTH, angles_BTH], axis=-1)[:, :, None, :]
    return (jnp.cos(angles_BT1H) * rope.attention_factor).astype(dtype), (jnp.sin(angles_BT1H) * rope.attention_factor).astype(dtype)


def rotate(x_BTNH: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn each pair (i, i + H/2) of a head's coordinates by its position's angle."""
    cos, sin = rotation
    first, second = jnp.split(x_BTNH, 2, axis=-1)
    return x_BTNH * cos + jnp.concatenate([-second, first], axis=-1) * sin


def attend_reference(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None) -> jax.Array:
    """What `attend_packed` computes, in the plainest way: one mask over the full square. Other kernels are compared with this one."""
    return checkpoint_name(attend(q_BTNH, k_BTKH, v_BTKH, visible(segments_BT, window)), "attention")


IMPLEMENTATIONS: dict[str, Kernel] = {"xla": attend_packed, "reference": attend_reference, "splash": attend_splash, "cudnn": attend_cudnn}
FASTEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # elsewhere: xla


def implementation(name: str, platform: str, head_dim: int, dtype: Any) -> tuple[str, str]:
    """The kernel that a configured name stands for on a platform, and, where that is not the one meant, in one line why (else empty).

    `platform` is that of the devices that will compute, whatever devices this process has. `auto` is the platform's fastest kernel; each
    honours segments and window. Where a kernel cannot compute these heads in this dtype, it is `xla`.
    """
    meant = FASTEST.get(platform, "xla") if name == "auto" else name
    why = refusal(meant, platform, head_dim, dtype)
    return ("xla", why) if why else (meant, "")


def kernel(name: str, platform: str, head_dim: int, dtype: Any) -> Kernel:
    """The function that `implementation` names; splash attention is interpreted where there is no TPU."""
    used, _ = implementation(name, platform, head_dim, dtype)
    return functools.partial(attend_splash, interpret=platform != "tpu") if used == "splash" else IMPLEMENTATIONS[used]


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, mask_BTS: jax.Array) -> jax.Array:
    """Softmax attention with grouped heads, logits and softmax in at least float32. Returns (B, T, N, H) in q's dtype.

    A masked key weighs exactly 0.0, so what it holds cannot change the result in one bit.
    """
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    wide = jnp.promote_types(q_BTNH.dtype, jnp.float32)
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H)
    logits_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=wide) * H**-0.5
    logits_BKGTS = jnp.where(mask_BTS[:, None, None], logits_BKGTS, jnp.finfo(wide).min)
    weights_BKGTS = jax.nn.softmax(logits_BKGTS, axis=-1).astype(v_BSKH.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS, v_BSKH).reshape(B, T, N, H)


def attend_cache(q_BNH: jax.Array, k_BKHS: jax.Array, v_BKHS: jax.Array, seen_BS: jax.Array) -> jax.Array:
    """The same for one query of each row over a cache whose slots come last: a matmul, and a CPU's vectors, go along them."""
    B, N, H = q_BNH.shape
    K = k_BKHS.shape[1]
    wide = jnp.promote_types(q_BNH.dtype, jnp.float32)
    logits_BKGS = jnp.einsum("BKGH,BKHS->BKGS", q_BNH.reshape(B, K, N // K, H), k_BKHS, preferred_element_type=wide) * H**-0.5
    weights_BKGS = jax.nn.softmax(jnp.where(seen_BS[:, None, None], logits_BKGS, jnp.finfo(wide).min), axis=-1).astype(v_BKHS.dtype)
    return jnp.einsum("BKGS,BKHS->BKGH", weights_BKGS, v_BKHS).reshape(B, N, H)

"""Fused attention kernels: splash attention for TPUs and cuDNN's for NVIDIA GPUs, each called as `attention.attend_packed` is.

Both name what the backward pass needs of them "attention", for `jax.checkpoint` policies.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

LANES = 128  # a TPU's vector width: splash attention's blocks are multiples of it
BLOCK = 1024  # the largest block whose scores and weights, float32 and square, fit in the fast memory of every TPU generation
FUSED_BLOCKS = 4  # the fused backward kernel keeps as many copies of the queries' gradient as keys have blocks: beyond this, two kernels


def refusal(kernel: str, platform: str, head_dim: int, dtype: Any) -> str:
    """Why a kernel cannot compute attention with these heads on a platform ("tpu", "gpu", "cpu"); empty where it can."""
    name = jnp.dtype(dtype).name
    if kernel == "splash" and name not in ("bfloat16", "float32"):
        return f"splash computes in bfloat16 or float32, not in {name}"
    if kernel == "cudnn":
        if platform not in ("gpu", "cuda"):
            return f"cudnn is for NVIDIA GPUs, and this is {platform}"
        if name not in ("bfloat16", "float16"):
            return f"cudnn computes in bfloat16 or float16, not in {name}"
        if head_dim > 128 or head_dim % 8:
            return f"cudnn takes heads of 8, 16, ... 128 numbers, not of {head_dim}"
    return ""


def attend_splash(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None, *, interpret: bool = False, block: int = BLOCK
) -> jax.Array:
    """JAX's splash attention for TPUs, forward and backward in blocks of at most `block` tokens, a multiple of 128; float32 inside.

    Blocks that causality or window hide whole are never computed, keys and values are not repeated for the query heads that share them.
    `interpret` runs the same kernels in plain XLA, slowly, where there is no TPU. A pallas kernel is not partitioned by the compiler: on
    several devices call it inside `jax.shard_map(..., check_vma=False)` over rows and heads.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    T, N, H = q_BTNH.shape[1:]
    blocks = -(-T // block)
    size = -(-T // (blocks * LANES)) * LANES
    # rows end in a segment of their own; heads are a multiple of 64, the least that the kernel's authors test
    q_BTNH, k_BTKH, v_BTKH = (_padded(x, blocks * size, -(-H // 64) * 64) for x in (q_BTNH * H**-0.5, k_BTKH, v_BTKH))
    segments_BT = jnp.pad(segments_BT.astype(jnp.int32), ((0, 0), (0, blocks * size - T)), constant_values=-1)
    kernel = _splash_kernel(N, blocks, size, None if window is None or window >= T else window, interpret)

    def row(q_NTH: jax.Array, k_KTH: jax.Array, v_KTH: jax.Array, segments_T: jax.Array) -> jax.Array:
        return kernel(q_NTH, k_KTH, v_KTH, splash.SegmentIds(segments_T, segments_T))

    y_BNTH = jax.vmap(row)(q_BTNH.swapaxes(1, 2), k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), segments_BT)
    return y_BNTH.swapaxes(1, 2)[:, :T, :, :H]


@cache
def _splash_kernel(heads: int, blocks: int, size: int, window: int | None, interpret: bool) -> Any:
    """The kernel for rows of so many blocks of `size` tokens; one for all layers, its tables in numpy, so that it belongs to no trace."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    square = (blocks * size, blocks * size)
    mask = masks.CausalMask(square) if window is None else masks.LocalMask(square, (window - 1, 0), 0)
    fused = blocks <= FUSED_BLOCKS
    sizes = splash.BlockSizes(
        block_q=size,
        block_kv=size,
        block_q_dkv=size,
        block_kv_dkv=size,
        block_q_dq=None if fused else size,
        block_kv_dq=None if fused else size,
        use_fused_bwd_kernel=fused,
    )
    with jax.ensure_compile_time_eval():
        kernel = splash.make_splash_mha(
            masks.MultiHeadMask([mask] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1, residual_checkpoint_name="attention", interpret=interpret
        )
        return jax.tree.map(np.asarray, kernel)


def attend_cudnn(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segments_BT: jax.Array, window: int | None, *, implementation: str = "cudnn") -> jax.Array:
    """cuDNN's fused attention through `jax.nn.dot_product_attention`; `refusal` says which heads and dtypes it takes.

    Its public form knows no segments, so what a query may see goes as a dense mask: B T T numbers of q's dtype (B = 4, T = 2048 in bfloat16:
    34 MB, and as much again in the backward pass for a gradient that nobody reads), the same for all heads. Causality is said as well, so
    that blocks above the diagonal are not computed. Its log-sum-exp has no name: a policy that saves names computes it again.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    q_BTNH, k_BTKH, v_BTKH = (_padded(x, T + T % 2, H) for x in (q_BTNH, k_BTKH, v_BTKH))  # cuDNN takes a mask of even length only
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, T % 2)), constant_values=-1)
    mask_BNTT = visible(segments_BT, window)[:, None]
    y_BTNH = jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask_BNTT, scale=H**-0.5, is_causal=True, implementation=implementation)  # type: ignore[call-overload]
    return checkpoint_name(y_BTNH[:, :T], "attention")


def visible(segments_BT: jax.Array, window: int | None) -> jax.Array:
    """What each query may see, bool (B, T, T): its own example up to itself, `window` keys at most, its own included."""
    T = segments_BT.shape[1]
    distance_TS = jnp.arange(T)[:, None] - jnp.arange(T)
    return (distance_TS >= 0) & (distance_TS < (window or T)) & (segments_BT[:, :, None] == segments_BT[:, None, :])


def _padded(x_BTNH: jax.Array, length: int, head_dim: int) -> jax.Array:
    """The same with zeros after its rows and heads."""
    return jnp.pad(x_BTNH, ((0, 0), (0, length - x_BTNH.shape[1]), (0, 0), (0, head_dim - x_BTNH.shape[3])))

"""Whether attention is right on a GPU, and how fast Llama-2-7B trains on it:  python benchmarks/gpu_check.py (or gpu_check.sh)

First the kernels `cudnn` and `xla` in bfloat16 against `reference` in float32: outputs and gradients on packed rows, with and without
window and grouped heads; each may be off by three times what the reference itself is off in bfloat16. Then 20 steps of Llama-2-7B from random
weights on rows of 4,096 tokens, in the precision of configs/llama2_7b_h200.yaml, through the trainer of a real run; where the rows of a
step do not fit, half as many. MFU counts 6 FLOPs a matmul parameter and token, and attention in full (12 L N H S a token) or half of it.
Prints tables and, last, a line of JSON, which goes into $OUT/gpu_check.json, too.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phased_ift_jax import cli
from phased_ift_jax.chips import peak_flops
from phased_ift_jax.xla_flags import set_flags

if TYPE_CHECKING:
    from phased_ift_jax.records import PackedBatch

CONFIG = Path(__file__).resolve().parents[1] / "configs/llama2_7b_h200.yaml"
LLAMA2_7B = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_layers": 32, "num_heads": 32, "num_kv_heads": 32, "head_dim": 128}
TINY = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16}
CASES = [(kv_heads, window) for kv_heads in (8, 2) for window in (None, 100)]  # of 8 query heads
ALLOWED = 3  # times the reference's own rounding, as FlashAttention's tests allow gradients
FLOOR = 2.0**-8  # half a unit in the last place of bfloat16: below, being off means nothing
WARM_UP = 3  # steps that are not timed


def attention(name: str, kv_heads: int, window: int | None, length: int, head_dim: int) -> dict[str, Any]:
    """How far a kernel is off the truth, and how far it may be, as shares of the norm: the worst of output and three gradients."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from phased_ift_jax.models.attention import IMPLEMENTATIONS

    rng = np.random.default_rng(kv_heads)
    q, k, v, out = (rng.normal(size=(2, length, heads, head_dim)).astype(np.float32) for heads in (8, kv_heads, kv_heads, 8))
    ends = np.array([[0.3, 0.35, 0.9], [0.1, 0.5, 1.0]]) * length  # three examples a row, the first row with padding after them
    segments = np.stack([np.where(np.arange(length) < row[-1], 1 + np.searchsorted(row, np.arange(length), side="right"), 0) for row in ends])
    real = (segments > 0)[:, :, None, None]

    def results(kernel: str, dtype: Any) -> list[np.ndarray]:
        def attend(q: Any, k: Any, v: Any) -> Any:
            return IMPLEMENTATIONS[kernel](q, k, v, jnp.asarray(segments, jnp.int32), window) * real

        @jax.jit
        def both(q: Any, k: Any, v: Any, out: Any) -> Any:
            value, backward = jax.vjp(attend, q, k, v)
            return value, *backward(out)

        rounded = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v, out * real))
        with jax.default_matmul_precision("highest" if dtype == jnp.float32 else "default"):
            return [np.asarray(x, np.float32) for x in both(*(x.astype(dtype) for x in rounded))]

    truth = results("reference", jnp.float32)
    off, usual = (
        max(float(np.linalg.norm((x - y) * (real if x.shape[2] == 8 else real[:, :, :1])) / np.linalg.norm(y)) for x, y in zip(results(kernel, jnp.bfloat16), truth, strict=True))
        for kernel in (name, "reference")
    )
    limit = max(ALLOWED * usual, FLOOR)
    return {"kernel": name, "kv_heads": kv_heads, "window": window, "off": off, "limit": limit, "right": off <= limit}


def full_rows(vocabulary: int, rows: int, length: int) -> PackedBatch:
    """One example a row, of random tokens, all of them trained."""
    import numpy as np

    from phased_ift_jax.records import PackedBatch

    shape = (1, rows, length)
    tokens = np.random.default_rng(0).integers(0, vocabulary, shape, np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), shape)
    return PackedBatch(tokens, np.roll(tokens, -1, 2), np.ones(shape, np.float32), np.ones(shape, np.int32), positions)


def training(sizes: dict[str, int], steps: int, given: PackedBatch) -> dict[str, Any]:
    """Tokens a second and peak memory of a run's own steps, each with this batch: real tokens count, no padding."""
    import jax
    import numpy as np

    from phased_ift_jax import config
    from phased_ift_jax.models.decoder import DecoderConfig
    from phased_ift_jax.sharding import make_mesh, put
    from phased_ift_jax.training.step import BATCH_DIMS, trainer_of

    run = config.load(CONFIG)
    mesh, model = make_mesh(run.mesh, jax.devices()[:1]), DecoderConfig(**sizes)  # type: ignore[arg-type]
    trainer = trainer_of(run.model, model, run.training, mesh)
    _, rows, length = given.tokens_BT.shape
    tokens = int((given.segments_BT > 0).sum())
    square = int(((2 * given.positions_BT + 1) * (given.segments_BT > 0)).sum())  # of each example's length, added up
    began = time.perf_counter()
    trainer.compile_step(rows, length, 1)
    compiled = time.perf_counter() - began
    state, rate, losses = trainer.fresh(trainer.init_params(0)), put(np.float32(run.training.learning_rate), "", mesh), []
    for step in range(WARM_UP + steps):
        if step == WARM_UP:
            jax.block_until_ready(state)
            began = time.perf_counter()
        state, metrics = trainer.step(state, put(given, BATCH_DIMS, mesh), rate)
        losses.append(metrics["loss"])
    jax.block_until_ready(state)
    seconds = (time.perf_counter() - began) / steps
    speed = tokens / seconds
    kind = jax.devices()[0].device_kind
    peak = peak_flops(kind, 1)
    full, causal = (model.train_flops(tokens, attended) / seconds for attended in (square, square / 2))
    memory = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {
        "rows": rows,
        "length": length,
        "tokens": tokens,
        "steps": steps,
        "compile_seconds": round(compiled, 1),
        "step_seconds": seconds,
        "tokens_per_second": speed,
        "flops_full": full,
        "flops_causal": causal,
        "mfu_full": peak and full / peak,
        "mfu_causal": peak and causal / peak,
        "peak_bytes": memory,
        "loss_first": float(losses[0]),
        "loss_last": float(losses[-1]),
    }


def fitting(sizes: dict[str, int], rows: int, length: int, steps: int) -> dict[str, Any]:
    """`training` with as many rows as fit, tried by halves."""
    from jax.errors import JaxRuntimeError

    while True:
        try:
            return training(sizes, steps, full_rows(sizes["vocab_size"], rows, length))
        except JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or rows == 1:
                raise
        print(f"{rows} rows of {length} tokens do not fit; {rows // 2} are tried", flush=True)
        rows //= 2


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help=f"optimizer steps that are timed, after {WARM_UP} that are not")
    parser.add_argument("--rows", type=int, default=4, help="rows of a step")
    parser.add_argument("--length", type=int, help="tokens of a row [4096, tiny 256]")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, on whatever device there is: whether this program works")
    args = parser.parse_args()
    settings = set_flags(deterministic=False)
    import jax

    if jax.default_backend() != "gpu" and not args.tiny:
        print(f"error: JAX finds no GPU here but {jax.devices()[0].device_kind}; is '.[cuda]' installed? --tiny goes the same way on any device", file=sys.stderr)
        return 2
    from phased_ift_jax.models.attention import IMPLEMENTATIONS

    print("\n".join([f"device   {jax.devices()[0].device_kind}, jax {jax.__version__}", *(f"flags    {line}" for line in settings), ""]), flush=True)
    kernels = [name for name in ("cudnn", "xla") if name in IMPLEMENTATIONS and (name != "cudnn" or jax.default_backend() == "gpu")]
    of_case = functools.partial(attention, length=256 if args.tiny else 1024, head_dim=16 if args.tiny else 128)
    kept = [of_case(name, kv_heads, window) for name in kernels for kv_heads, window in CASES]
    print(cli.table([["kernel", "query heads", "key heads", "window", "off", "allowed", ""]] + [
        [c["kernel"], 8, c["kv_heads"], c["window"] or "none", f"{c['off']:.2e}", f"{c['limit']:.2e}", "right" if c["right"] else "WRONG"] for c in kept
    ]), flush=True)
    seen = fitting(TINY if args.tiny else LLAMA2_7B, args.rows, args.length or (256 if args.tiny else 4096), args.steps)
    share = {name: "-" if seen[name] is None else f"{seen[name]:.1%}" for name in ("mfu_full", "mfu_causal")}
    memory = "-" if seen["peak_bytes"] is None else f"{seen['peak_bytes'] / 2**30:.1f} GiB"
    print("\n" + cli.table([
        ["rows x tokens", "tokens/s", "s a step", "TFLOP/s full", "MFU full", "MFU causal", "peak memory", "compiled in", "loss first", "last"],
        [
            f"{seen['rows']} x {seen['length']}", f"{seen['tokens_per_second']:,.0f}", f"{seen['step_seconds']:.3f}", f"{seen['flops_full'] / 1e12:.1f}",
            share["mfu_full"], share["mfu_causal"], memory, f"{seen['compile_seconds']} s", f"{seen['loss_first']:.3f}", f"{seen['loss_last']:.3f}",
        ],
    ]))  # fmt: skip
    right = all(case["right"] for case in kept) and math.isfinite(seen["loss_last"])
    told = json.dumps({"device": jax.devices()[0].device_kind, "jax": jax.__version__, "right": right, "attention": kept, "training": seen})
    if "OUT" in os.environ:
        Path(os.environ["OUT"], "gpu_check.json").write_text(told + "\n")
    print(told)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())

"""What `training.deterministic` costs on a GPU, and whether it holds:  python benchmarks/determinism.py

Trains the same steps of a Llama (1.1 billion parameters on a GPU, a small one elsewhere) in fresh processes, with and without it by turns.
Prints the median time of a step of each, their ratio, and how many distinct results the processes of each came to: with it that must be
one (exit code 1 otherwise). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys

from phased_ift_jax.xla_flags import set_flags

SIZES = {
    "gpu": {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 5632, "num_layers": 22, "num_heads": 32, "num_kv_heads": 4, "head_dim": 64},
    "cpu": {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 344, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32},
}


def measure(deterministic: bool, steps: int) -> dict[str, object]:
    """Median seconds of a step, and a digest of the weights after the last: in this process, whose flags are set once."""
    set_flags(deterministic)
    import hashlib
    import time

    import jax
    import numpy as np

    from phased_ift_jax.config import MeshConfig, TrainingConfig
    from phased_ift_jax.models.decoder import DecoderConfig
    from phased_ift_jax.records import PackedBatch
    from phased_ift_jax.sharding import make_mesh, put
    from phased_ift_jax.training.step import BATCH_DIMS, Trainer

    kind = "gpu" if jax.default_backend() == "gpu" else "cpu"
    mesh, dtype = make_mesh(MeshConfig()), "bfloat16" if kind == "gpu" else "float32"
    model = DecoderConfig(**SIZES[kind])  # type: ignore[arg-type]
    trainer = Trainer(model, TrainingConfig(), mesh, "float32", dtype, "none" if kind == "cpu" else "full")
    rng, shape = np.random.default_rng(0), (1, 8, 1024 if kind == "gpu" else 128)
    tokens = rng.integers(0, model.vocab_size, shape, np.int32)
    positions = np.broadcast_to(np.arange(shape[2], dtype=np.int32), shape)
    batch = PackedBatch(tokens, np.roll(tokens, -1, 2), np.ones(shape, np.float32), np.ones(shape, np.int32), positions)
    state, seconds = trainer.fresh(trainer.init_params(0)), []
    for _ in range(steps):
        began = time.perf_counter()
        state, metrics = trainer.step(state, put(batch, BATCH_DIMS, mesh), put(np.float32(1e-4), "", mesh))
        float(metrics["loss"])
        seconds.append(time.perf_counter() - began)
    digest = hashlib.sha256(b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(state.params))).hexdigest()
    return {"device": jax.devices()[0].device_kind, "seconds": statistics.median(seconds[2:]), "digest": digest}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps of a process, of which the first two are not counted")
    parser.add_argument("--repeats", type=int, default=3, help="processes with it, and as many without")
    parser.add_argument("--inside", choices=["True", "False"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        print(json.dumps(measure(args.inside == "True", args.steps)))
        return 0
    seen: dict[bool, list[dict[str, object]]] = {True: [], False: []}
    for turn in range(2 * args.repeats):
        command = [sys.executable, __file__, "--steps", str(args.steps), "--inside", str(bool(turn % 2))]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
        seen[bool(turn % 2)].append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {kind: statistics.median(float(str(one["seconds"])) for one in ones) for kind, ones in seen.items()}
    results = {kind: len({one["digest"] for one in ones}) for kind, ones in seen.items()}
    for kind in (False, True):
        print(f"deterministic {kind!s:5}  {seconds[kind]:.4f} s a step, {results[kind]} distinct result(s) of {args.repeats}")
    print(f"cost: {seconds[True] / seconds[False]:.3f} times")
    print(json.dumps({"device": seen[True][0]["device"], "seconds": {str(k): v for k, v in seconds.items()}, "results": {str(k): v for k, v in results.items()}}))
    return 0 if results[True] == 1 else 1


if __name__ == "__main__":
    sys.exit(main())

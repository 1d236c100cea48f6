"""How long a model of full size takes in and out, and how much memory:  python benchmarks/conversion.py --model llama2-7b --work /tmp/conversion

Writes a random checkpoint of the model's exact shapes, copies and hashes it (what the disk and SHA-256 cost), converts it from-hf and
to-hf, compares every tensor bit for bit, and loads it as bfloat16 into 8 virtual devices. Needs three times the checkpoint's bytes of
disk, and its own bytes of memory for the load. Prints a table; the last line is JSON. Exit code 1 where a bit differs, or where a conversion
takes more than 6 GB (from-hf) or 4 GB (to-hf) of memory, or three times as long as copying and hashing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.models.hf_weights import weights
from phased_ift_jax.models.tensor_files import INDEX, Tensor, Tensors, index_text, shards, write_tensors

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", "hidden_act": "silu", "rms_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2}
MISTRAL = LLAMA | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 4096}
WIDTH = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
MODELS = {
    "llama2-7b": LLAMA | WIDTH | {"intermediate_size": 11008, "num_key_value_heads": 32},
    "mistral-7b": MISTRAL | WIDTH | {"intermediate_size": 14336, "num_key_value_heads": 8},
}
POOL = 1 << 25  # random numbers, of which each tensor takes a run that starts at a place of its own
CONVERT = """
import sys
from phased_ift_jax import convert
code = convert.main(sys.argv[1:])
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
sys.exit(code)
"""
LOAD = """
import json, os, sys, time
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
import jax, jax.numpy as jnp
from phased_ift_jax.config import MeshConfig, TrainingConfig
from phased_ift_jax.models import hf_weights
from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training.step import Trainer
def resident(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
folder = open_folder(sys.argv[1])
trainer = Trainer(folder.config, TrainingConfig(), make_mesh(MeshConfig()), "bfloat16")
jax.block_until_ready(jax.jit(jnp.copy, out_shardings=trainer.shardings.params["norm"])(jnp.zeros(folder.config.hidden_size)))  # XLA's own, which is not the model's
before, start = resident("VmRSS"), time.perf_counter()
params = hf_weights.load(folder, trainer.shardings.params, jnp.bfloat16)
jax.block_until_ready(params)
print(json.dumps({"seconds": time.perf_counter() - start, "added": resident("VmHWM") - before, "own": sum(leaf.nbytes for leaf in jax.tree.leaves(params))}))
"""


def write_checkpoint(folder: Path, attributes: dict[str, object]) -> int:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(attributes))
    rng = np.random.default_rng(0)
    pool = rng.standard_normal(POOL, np.float32).astype(ml_dtypes.bfloat16)

    def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
        start = int(rng.integers(POOL))
        return Tensor(name, shape, pool.dtype, lambda: np.resize(np.roll(pool, -start), shape))

    files = shards([tensor(name, weight.layout.their_shape(weight.each)) for weight in weights(open_folder(str(folder))) for name in weight.names])
    for name, group in files.items():
        write_tensors(folder / name, group)
    (folder / INDEX).write_text(index_text(files))
    return sum(tensor.nbytes for group in files.values() for tensor in group)


def forget() -> str:
    """Empty the page cache, where that is allowed."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError:
        return "as it was"
    return "emptied before each"


def converted_in(*arguments: str) -> tuple[float, int]:
    """Seconds and peak resident bytes of the verb, in a process of its own."""
    start = time.perf_counter()
    told = subprocess.run([sys.executable, "-c", CONVERT, *arguments], check=True, stdout=subprocess.PIPE, text=True).stdout
    return time.perf_counter() - start, int(told.split()[-1]) * 1024  # not ru_maxrss, in which Linux counts the process that started this one, too


def sha256(folder: Path) -> None:
    for file in sorted(folder.glob("*.safetensors")):
        with open(file, "rb") as handle:
            hashlib.file_digest(handle, "sha256")


def equal(a: Path, b: Path) -> bool:
    """Every tensor's name, dtype, shape and bytes."""
    left, right = Tensors(a), Tensors(b)

    def content(tensors: Tensors, name: str) -> tuple[object, ...]:
        whole = tuple(slice(None) for _ in tensors.shape(name))
        return tensors.dtype(name), tensors.shape(name), hashlib.sha256(tensors.read(name, whole).view(np.uint8).data).digest()

    return left.names() == right.names() and all(content(left, name) == content(right, name) for name in left.names())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="llama2-7b")
    parser.add_argument("--work", type=Path, required=True, help="folder for the checkpoints; made, and removed at the end")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, to try the script")
    args = parser.parse_args()
    work: Path = args.work
    base, converted, exported, copy = (work / name for name in ("base", "converted", "exported", "copy"))
    attributes = MODELS[args.model] | ({"num_hidden_layers": args.layers} if args.layers else {})
    size = write_checkpoint(base, attributes)
    result: dict[str, object] = {"model": args.model, "layers": attributes["num_hidden_layers"], "bytes": size, "shards": len(list(base.glob("*.safetensors")))}

    result["page cache"] = forget()
    start = time.perf_counter()
    shutil.copytree(base, copy, copy_function=lambda a, b: subprocess.run(["cp", a, b], check=True))
    os.sync()
    copied = time.perf_counter() - start
    forget()
    start = time.perf_counter()
    sha256(copy)
    hashed = time.perf_counter() - start
    shutil.rmtree(copy)
    forget()
    into = converted_in("from-hf", str(base), str(converted))
    forget()
    out = converted_in("to-hf", str(converted), str(exported))
    result |= {"cp": copied, "sha256": hashed, "from-hf": into[0], "from-hf peak": into[1], "to-hf": out[0], "to-hf peak": out[1]}
    result |= {"from-hf / (cp + sha256)": into[0] / (copied + hashed), "to-hf / (cp + sha256)": out[0] / (copied + hashed)}
    result["bit-identical"] = equal(base, exported)
    shutil.rmtree(converted)
    shutil.rmtree(exported)
    told = subprocess.run([sys.executable, "-c", LOAD, str(base)], check=True, capture_output=True, text=True).stdout
    result |= {f"load: {name}": value for name, value in json.loads(told.splitlines()[-1]).items()}
    shutil.rmtree(work)
    result |= {"cores": os.cpu_count(), "python": platform.python_version()}
    for name, value in result.items():
        print(f"{name:26} {f'{value:.2f}' if isinstance(value, float) else f'{value:,}' if isinstance(value, int) else value}")
    print(json.dumps(result))
    held = result["bit-identical"] and into[1] <= 6e9 and out[1] <= 4e9 and max(into[0], out[0]) <= 3 * (copied + hashed)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()

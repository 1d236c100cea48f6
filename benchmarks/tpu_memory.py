"""How much of a TPU chip's memory a train step takes, compiled for slices that are not here:  python benchmarks/tpu_memory.py [--only 7b] [--json FILE]

Each line is a shipped config at so many rows of so many tokens: libtpu's compiler says the peak. One to three minutes a line on 2 cores.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LLAMA: Mapping[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-5, "vocab_size": 32000}
# config.json of the models, as far as it says sizes
MODELS: dict[str, Mapping[str, Any]] = {
    "llama2_7b": LLAMA | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32},
    "llama2_13b": LLAMA | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40},
    "llama2_70b": LLAMA | {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8},
    "llama3_8b": LLAMA
    | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    | {"vocab_size": 128256, "rope_theta": 500000.0},
    "mistral_7b": LLAMA
    | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"num_attention_heads": 32, "num_key_value_heads": 8, "sliding_window": 4096},
}
LEAN = {"model.gradient_checkpointing": "full", "training.adam_mu_dtype": "bfloat16"}


@dataclass(frozen=True)
class Case:
    """A shipped config on a topology with `rows` rows of `length` tokens a step, and what a chip may take of its memory (GiB)."""

    config: str
    model: str
    topology: str
    rows: int
    length: int
    bound: float
    slices: int = 1
    changes: Mapping[str, Any] = field(default_factory=dict)


# weights and second moment in float32, first moment in bfloat16, gradients in float32
CASES = [
    Case("llama2_7b", "llama2_7b", "v5e:4x4", 16, 2048, 6.8, changes=LEAN),
    Case("llama2_7b", "llama2_7b", "v5e:4x4", 128, 2048, 13.6, changes=LEAN),
    Case("mistral_7b", "mistral_7b", "v5e:4x4", 16, 2048, 7.5, changes=LEAN),
    Case("mistral_7b", "mistral_7b", "v5p:2x2x2", 16, 4096, 17.4, changes=LEAN),
    Case("llama2_13b_v5e16", "llama2_13b", "v5e:4x4", 16, 2048, 14.0),
    Case("llama2_13b", "llama2_13b", "v5p:2x2x4", 16, 2048, 16.5),
    Case("llama2_70b", "llama2_70b", "v5p:4x4x4", 64, 4096, 23.0),
    Case("llama2_7b", "llama2_7b", "v5e:4x4", 32, 2048, 7.0, 2, LEAN | {"mesh.data": 2}),
    Case("llama3_8b", "llama3_8b", "v5e:4x4", 16, 2048, 8.1),
]


def compiled(case: Case) -> Any:
    """The step of a case, compiled: a `phased_ift_jax.training.topology.Compiled`."""
    from phased_ift_jax.training import topology as topologies

    topology = topologies.topology_of(case.topology, case.slices)
    from phased_ift_jax import config
    from phased_ift_jax.models.hf_folder import open_folder
    from phased_ift_jax.sharding import make_mesh
    from phased_ift_jax.training.step import trainer_of

    run = config.changed(config.load(ROOT / "configs" / f"{case.config}.yaml"), case.changes)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(MODELS[case.model]))
        sizes = open_folder(folder, None, weights=False).config
    return topologies.compile_shape(trainer_of(run.model, sizes, run.training, make_mesh(run.mesh, topology.devices)), topology, case.rows, case.length)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="lines whose config or topology has this in its name")
    parser.add_argument("--json", type=Path, help="a file for the figures")
    options = parser.parse_args()
    from phased_ift_jax import cli

    told, rows = [], [["config", "topology", "rows x tokens", "a chip gets", "peak, GiB", "bound", "state, GiB", "compiled in"]]
    for case in CASES:
        if options.only not in f"{case.config} {case.topology}":
            continue
        found = compiled(case)
        chips = case.slices
        for size in case.topology.partition(":")[2].split("x"):
            chips *= int(size)
        told.append(dataclasses.asdict(case) | {"peak_bytes": found.peak, "state_bytes": found.state, "fits": found.fits, "seconds": round(found.seconds, 1)})
        where = case.topology + (f" x {case.slices}" if case.slices > 1 else "")
        peak = f"{found.peak / 2**30:.2f}" + ("" if found.fits else " (does not fit)")
        tokens, state = f"{case.rows * case.length / chips:,.0f}", f"{found.state / 2**30:.2f}"
        rows.append([case.config, where, f"{case.rows} x {case.length}", tokens, peak, f"{case.bound}", state, f"{found.seconds:.0f} s"])
        print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    print(cli.table(rows))
    if options.json:
        options.json.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()

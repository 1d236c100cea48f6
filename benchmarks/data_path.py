"""How long 52,002 records take from a file to packed batches, and how much of the batches is padding:  python benchmarks/data_path.py --data DATA

DATA is a folder with alpaca/random_9k.json, phasedsft/en-alpaca52k-stage3.jsonl and llama2/tokenizer.model. The real records of the first are repeated,
each with an id of its own, and then go a run's own way, each round in a new process on at most two processors: read, tokenized, put in phases,
planned for Llama-2-7B on TPUs, and packed, every step of an epoch of 128 examples. The second table is the share of real tokens, two epochs of both
files, by how many devices share a step's rows, with at most four compiled shapes; "padded" is one example a row of 2,048 tokens. The last line is
JSON. Exit code 1 where 30 s or a share's bound is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

from phased_ift_jax.config import CurriculumConfig, DataConfig, RunConfig, load
from phased_ift_jax.data import dataset
from phased_ift_jax.data.batches import batches
from phased_ift_jax.data.tokenization import load_tokenizer
from phased_ift_jax.models.decoder import DecoderConfig

ROOT = Path(__file__).resolve().parents[1]
LLAMA2_7B = DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128)
TOKENIZER = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
FILES = {"all of it": "alpaca/random_9k.json", "stage 3": "phasedsft/en-alpaca52k-stage3.jsonl"}
SECONDS = 30.0
LEAST = {1: 0.94, 8: 0.94, 16: 0.85, 32: 0.75}
PARTS = ("tokenizer", "read to phases", "plan", "pack")


def configured(path: Path, epochs: int) -> RunConfig:
    """The paper's settings, all rows at once."""
    config = load(ROOT / "configs/llama2_7b.yaml", [("training.num_train_epochs", str(epochs))])
    data, curriculum = DataConfig(path=str(path), max_length=2048, eval_size=0), CurriculumConfig.model_validate({"arm": "one_off", "bins": {"by": "length", "quantiles": [0.5]}})
    return config.model_copy(update={"data": data, "curriculum": curriculum})


def measure(work: Path) -> dict[str, Any]:
    """One round, in this process: seconds of each part."""
    from phased_ift_jax.training.plan import make_plan

    clock, config = [time.perf_counter()], configured(work / "records.json", 1)
    tokenizer = load_tokenizer(work)
    clock.append(time.perf_counter())
    data = dataset.prepare(config.data, config.curriculum, config.seed, tokenizer)
    clock.append(time.perf_counter())
    [phase] = make_plan(config, data, LLAMA2_7B, 1, "tpu").phases
    clock.append(time.perf_counter())
    tokens = sum(int((batch.segments_BT > 0).sum()) for batch in batches(phase.steps, 0, data.examples, phase.shapes))
    clock.append(time.perf_counter())
    assert tokens == phase.tokens == sum(len(example.tokens) for example in data.examples), "every token is packed once"
    return {"read": data.rows_read, "used": len(data.examples), "tokens": tokens, "seconds": dict(zip(PARTS, [b - a for a, b in pairwise(clock)], strict=True))}


def shares(path: Path, tokenizer: Any) -> list[dict[str, Any]]:
    """Share of real tokens by the number of devices; "padded" under 0."""
    from phased_ift_jax.training.plan import make_plan
    from phased_ift_jax.training.survey import real_token_share

    config = configured(path, 2)
    data = dataset.prepare(config.data, config.curriculum, config.seed, tokenizer)
    found = []
    for devices in LEAST:
        [phase] = make_plan(config, data, LLAMA2_7B, devices, "tpu").phases
        found.append({"devices": devices, "share": real_token_share(phase), "rows": phase.shapes.rows, "lengths": phase.shapes.lengths, "bound": LEAST[devices]})
    padded = sum(len(example.tokens) for example in data.examples) / (2048 * len(data.examples))
    return [{"devices": 0, "share": padded, "rows": 128, "lengths": (2048,), "bound": 0.0}, *found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with alpaca, phasedsft and llama2")
    parser.add_argument("--records", type=int, default=52_002)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--round_in", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.round_in:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        print(json.dumps(measure(args.round_in)))
        return
    if not args.data:
        parser.error("--data is missing")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        shutil.copy(args.data / "llama2/tokenizer.model", work)
        (work / "tokenizer_config.json").write_text(json.dumps(TOKENIZER))
        rows = json.loads((args.data / FILES["all of it"]).read_text(encoding="utf-8"))
        (work / "records.json").write_text(json.dumps([row | {"id": str(number)} for number, row in enumerate(islice(cycle(rows), args.records))]))
        command, rounds = [sys.executable, __file__, "--round_in", folder], []
        for _ in range(args.rounds):
            rounds.append(json.loads(subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True, stdout=subprocess.PIPE, text=True).stdout))
        found = {name: shares(args.data / path, load_tokenizer(work)) for name, path in FILES.items()}
    parts = {name: statistics.median(one["seconds"][name] for one in rounds) for name in PARTS}
    parts["together"] = statistics.median(sum(one["seconds"].values()) for one in rounds)
    print(f"{rounds[0]['read']:,} records read, {rounds[0]['used']:,} used, {rounds[0]['tokens']:,} tokens; seconds")
    print("\n".join(f"  {name:<15}{seconds:>7.2f}" for name, seconds in parts.items()))
    print(f"\n{'data':<11}{'devices':>8}{'real tokens':>13}{'bound':>8}   rows and lengths")
    for name, of_file in found.items():
        for row in of_file:
            print(f"{name:<11}{row['devices'] or 'padded':>8}{row['share']:>13.1%}{row['bound'] or '':>8}   {row['rows']} x {', '.join(map(str, row['lengths']))}")
    facts = {"records": args.records, "rounds": rounds, "seconds": parts, "shares": found, "cores": os.cpu_count(), "load": os.getloadavg()[1], "python": platform.python_version()}
    facts |= {name: version(name) for name in ("tokenizers", "transformers", "numpy", "grain")}
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    held = parts["together"] <= SECONDS and all(row["share"] >= row["bound"] and len(row["lengths"]) <= 4 for of_file in found.values() for row in of_file)
    raise SystemExit(0 if held else 1)


if __name__ == "__main__":
    main()

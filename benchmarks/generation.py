"""How fast responses are generated, beside transformers' generate:  python benchmarks/generation.py --data ../shared/data --out generation.json

Two models: stories260k, and a random Llama of 15 million parameters (288 wide, 6 layers, 6 heads, Llama-2's 32,000 tokens). A hundred real
prompts from the six test sets, greedy, 128 new tokens each and none ends early, float32, the same threads. transformers gets its prompts sorted
by length and is measured at each of several batch sizes; its best counts. The two take turns, and medians are compared. Ours is timed with
everything but compilation, which is told apart. Tokens of both are compared. Prints a table; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import torch
import transformers

from phased_ift_jax.config import MeshConfig
from phased_ift_jax.data import prompts as readers
from phased_ift_jax.data.tokenization import load_tokenizer, prompt_ids
from phased_ift_jax.models.decoder import unrolled
from phased_ift_jax.models.generation import Generator, Prompt, in_batches
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training import answers

NEW = 128
SETS = ("sinstruct", "wizardlm", "koala", "vicuna", "oasst", "anthropic")
LLAMA_15M = {"vocab_size": 32000, "hidden_size": 288, "intermediate_size": 768, "num_hidden_layers": 6, "num_attention_heads": 6, "max_position_embeddings": 1024}


def random_llama(folder: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA_15M, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def real_prompts(data: Path, tokenizer_folder: Path, most: int, count: int) -> list[np.ndarray]:
    """So many, evenly from all sets, of those that leave room for NEW tokens."""
    tokenizer = load_tokenizer(tokenizer_folder)
    every = readers.read([f"{name}={data}/testsets/{name}_test_set.jsonl" for name in SETS])
    ids = [one for one in (prompt_ids(prompt.record, tokenizer, "user_assistant") for prompt in every) if len(one) <= most - NEW]
    return [ids[len(ids) * k // count] for k in range(count)]


def ours(folder: Path, prompts: list[np.ndarray], batch_size: int) -> Callable[[], list[list[int]]]:
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    with answers.opened(str(folder)) as model:
        params = unrolled(model.load("float32", mesh), give_up=True)
    generator = Generator(model.folder.config, (), mesh=mesh, batch_size=batch_size)

    def generate() -> list[list[int]]:
        batches, found = in_batches([len(ids) for ids in prompts], batch_size), {}
        for batch, responses in zip(batches, generator.in_turn(params, [[Prompt(prompts[at], NEW) for at in batch] for batch in batches]), strict=True):
            found |= dict(zip(batch, responses, strict=True))
        return [found[at].ids.tolist() for at in range(len(prompts))]

    return generate


def theirs(folder: Path, prompts: list[np.ndarray], batch_size: int) -> Callable[[], list[list[int]]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def generate() -> list[list[int]]:
        found, order = {}, sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
        for batch in (order[start : start + batch_size] for start in range(0, len(order), batch_size)):
            longest = max(len(prompts[at]) for at in batch)
            ids = torch.tensor([[0] * (longest - len(prompts[at])) + prompts[at].tolist() for at in batch])
            mask = torch.tensor([[0] * (longest - len(prompts[at])) + [1] * len(prompts[at]) for at in batch])
            out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, eos_token_id=-1, pad_token_id=0)
            found |= dict(zip(batch, out[:, longest:].tolist(), strict=True))
        return [found[at] for at in range(len(prompts))]

    return generate


def timed(work: Callable[[], list[list[int]]]) -> tuple[float, float, list[list[int]]]:
    """Seconds on the clock, seconds of the processors, and the result."""
    clock, cpu = time.perf_counter(), time.process_time()
    result = work()
    return time.perf_counter() - clock, time.process_time() - cpu, result


def measure(name: str, folder: Path, prompts: list[np.ndarray], args: argparse.Namespace) -> dict[str, object]:
    our = {size: ours(folder, prompts, size) for size in args.our_batch_sizes}
    their = {size: theirs(folder, prompts, size) for size in args.their_batch_sizes}
    compiling = {size: timed(work)[0] for size, work in our.items()}
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {}
    tokens: dict[str, list[list[int]]] = {}
    for _ in range(args.rounds):
        for who, works in (("ours", our), ("transformers", their)):
            for size, work in works.items():
                clock, cpu, tokens[who] = timed(work)
                seconds.setdefault((who, size), []).append((clock, cpu))
                print(f"  {who} {size}: {clock:.2f} s, {cpu:.2f} s of processors", flush=True)
    count = len(prompts) * NEW
    rows = [
        {"who": who, "batch_size": size, "seconds": statistics.median(clock for clock, _ in all_), "cpu_seconds": statistics.median(cpu for _, cpu in all_)}
        | {"tokens_per_second": count / statistics.median(clock for clock, _ in all_)}
        for (who, size), all_ in seconds.items()
    ]
    best = {who: min((row for row in rows if row["who"] == who), key=lambda row: row["seconds"]) for who in tokens}
    same = sum(a == b for a, b in zip(*tokens.values(), strict=True))
    return {
        "model": name,
        "prompts": len(prompts),
        "prompt_tokens": int(sum(map(len, prompts))),
        "longest": max(map(len, prompts)),
        "rows": rows,
        "compiling_seconds": compiling,
        "times_faster": best["transformers"]["seconds"] / best["ours"]["seconds"],
        "times_less_cpu": best["transformers"]["cpu_seconds"] / best["ours"]["cpu_seconds"],
        "same_responses": same,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k, llama2/tokenizer.model and testsets")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--models", nargs="+", choices=("stories260k", "llama15m"), default=["stories260k", "llama15m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--our_batch_sizes", type=int, nargs="+", default=[12, 16, 32, 64])
    parser.add_argument("--their_batch_sizes", type=int, nargs="+", default=[8, 16, 25, 50, 100])
    args = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    results = []
    with tempfile.TemporaryDirectory() as work:
        for name in args.models:
            folder, tokenizer, most = (args.data / name, args.data / name, 512) if name == "stories260k" else (random_llama(Path(work)), args.data / "llama2", 1024)
            results.append(measure(name, folder, real_prompts(args.data, tokenizer, most, args.prompts), args))
    print(f"\n{'model':<13}{'who':<14}{'batch':>6}{'seconds':>10}{'cpu s':>8}{'tokens/s':>10}")
    for result in results:
        for row in result["rows"]:
            print(f"{result['model']:<13}{row['who']:<14}{row['batch_size']:>6}{row['seconds']:>10.2f}{row['cpu_seconds']:>8.2f}{row['tokens_per_second']:>10,.0f}")
        said = f"{result['times_faster']:.2f} times as fast, {result['times_less_cpu']:.2f} by processor time"
        print(f"{result['model']:<13}{said}; {result['same_responses']} of {result['prompts']} responses the same")
    facts = {"results": results, "new_tokens": NEW, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[1], "python": platform.python_version()}
    facts |= {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


if __name__ == "__main__":
    main()

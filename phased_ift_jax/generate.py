"""Answers of a model to prompts, one JSON line for each:  python -m phased_ift_jax.generate --model RUN --prompts FILE... --out answers.jsonl

MODEL is a run (its newest finished phase), RUN/checkpoints/2-medium or RUN/hf/2-medium, what `convert from-hf` made, a Hugging Face folder
or a hub name. FILE is one of the six test sets as `fetch testsets` brings them, or has rows with `instruction`, perhaps `id` and `input`;
NAME=FILE names its set. The same command again goes on after a kill. --prompt TEXT prints the answer to one question instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from phased_ift_jax import cli, compilation_cache, config
from phased_ift_jax.interrupts import listening
from phased_ift_jax.object_store import is_address
from phased_ift_jax.records import InstructionRecord, Source, Turn, UserError

DTYPES = ("float32", "bfloat16")


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="generate", description=__doc__)
    parser.add_argument("--model", required=True, metavar="MODEL", help="run, checkpoint, folder or hub name")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompts", nargs="+", metavar="[NAME=]FILE", help="files of prompts")
    asked.add_argument("--prompt", metavar="TEXT", help="one prompt, whose answer is printed")
    parser.add_argument("--out", metavar="FILE", help="answers, one line for each prompt, in order")
    parser.add_argument("--max_new_tokens", type=int, default=1024, help="longest response [1024]: a short cap clips the model that writes more")
    parser.add_argument("--max_length", type=int, help="tokens of prompt and response [what the model was made for]; a longer prompt is recorded as too_long")
    parser.add_argument("--dtype", choices=DTYPES, help="of the computation [that of the run, else bfloat16]")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy [0]")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw among the likeliest tokens that together have this share [1]")
    parser.add_argument("--top_k", type=int, default=0, help="draw among so many tokens [0: all]")
    parser.add_argument("--seed", type=int, default=0, help="of samples [0]; each depends on seed, prompt and position alone")
    parser.add_argument("--prompt_template", choices=config.TEMPLATES, help="of a model that no run has trained [user_assistant]; a run's own is taken from it")
    parser.add_argument("--batch_size", type=int, default=32, help="prompts at a time [32]")
    for axis, default in (("data", 1), ("fsdp", 1), ("tensor", -1)):
        parser.add_argument(f"--mesh.{axis}", type=int, default=default, help=f"{config.MeshConfig.model_fields[axis].description} [{default}]")
    args = parser.parse_args(argv)
    _check(args)
    with listening() as stop:  # at whatever moment: what is done is in the part beside the file
        stop.farewell = "stopped; the same command goes on" if args.out else "stopped"
        return _generate(args)


def _check(args: Any) -> None:
    """Refuse at the door what no model could do."""
    wanted: dict[str, tuple[bool, str]] = {
        "max_new_tokens": (args.max_new_tokens >= 1, "at least 1"),
        "max_length": (args.max_length is None or args.max_length >= 2, "at least 2"),
        "temperature": (0 <= args.temperature < float("inf"), "0 (greedy) or more"),
        "top_p": (0 < args.top_p <= 1, "above 0 and at most 1"),
        "top_k": (args.top_k >= 0, "0 (all) or more"),
        "batch_size": (args.batch_size >= 1, "at least 1"),
    }
    for name, (good, words) in wanted.items():
        if not good:
            raise UserError(f"--{name}: {getattr(args, name)} is not {words}")
    if args.temperature == 0 and (args.top_p < 1 or args.top_k):
        raise UserError("--top_p and --top_k choose among samples; give a --temperature above 0, too")
    if (args.out is None) == (args.prompt is None):
        raise UserError("--out: name a file for the answers" if args.prompt is None else "--out: with --prompt the answer is printed; leave it out")
    if args.out and is_address(args.out):
        raise UserError(f"--out: '{args.out}' is in a bucket, where nothing can be added to a file; name one of this machine")


def _generate(args: Any) -> int:
    kept = compilation_cache.choose("", False)

    from phased_ift_jax.data import prompts as readers
    from phased_ift_jax.sharding import make_mesh
    from phased_ift_jax.training import answers

    compilation_cache.ready(kept)
    one = InstructionRecord("1", (Turn(args.prompt or "", ""),), Source("--prompt", 1))
    prompts = readers.read(args.prompts) if args.prompts else [readers.Prompt("prompt", one, {})]
    settings = answers.Settings(**{name: getattr(args, name) for name in answers.Settings.__dataclass_fields__})
    mesh = make_mesh(config.valid(config.MeshConfig, {axis: getattr(args, f"mesh.{axis}") for axis in ("data", "fsdp", "tensor")}, "mesh."))
    with answers.opened(args.model) as model:
        if args.prompt is not None:
            line = answers.answer(model, prompts, settings, mesh, 1, answers.Book(), lambda tokens, ended: None)[0]
            print(line["response"] if line["response"] is not None else f"the prompt is too long: {line['prompt_tokens']} tokens")
            return 0
        with answers.writing(Path(args.out).expanduser()) as book, tqdm(total=len(prompts), unit="prompt", dynamic_ncols=True) as bar:
            written = 0

            def tick(tokens: int, ended: int) -> None:
                nonlocal written
                written += tokens
                bar.set_postfix({"tok/s": f"{written / max(bar.format_dict['elapsed'], 1e-9):,.0f}"}, refresh=False)
                bar.update(ended)

            lines = answers.answer(model, prompts, settings, mesh, args.batch_size, book, tick)
    print(_summary(lines))
    print(f"\ndone: {args.out}")
    return 0


def _summary(lines: Sequence[dict[str, Any]]) -> str:
    """How many prompts of each set were answered, and how."""
    rows: list[list[object]] = [["set", "prompts", "answered", "too_long", "eos", "length", "mean tokens"]]
    for name in dict.fromkeys(line["set"] for line in lines):
        of_set = [line for line in lines if line["set"] == name]
        why = Counter(line["finish_reason"] for line in of_set)
        n = len(of_set) - why["too_long"]
        rows.append([name, len(of_set), n, why["too_long"], why["eos"], why["length"], f"{sum(line['response_tokens'] for line in of_set) / max(n, 1):.1f}"])
    return cli.table(rows)


if __name__ == "__main__":
    cli.run(main)

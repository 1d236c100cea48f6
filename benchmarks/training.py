"""How fast a model is trained, beside what a user would pick instead:  python benchmarks/training.py --data ../shared/data --out training.json

Two models: a random Llama of 15 million parameters (288 wide, 6 layers, 6 heads, Llama-2's 32,000 tokens) and stories260k. The paper's stage 3 of Alpaca, 16
examples a step, float32, AdamW, the same cores. Every side is a process of its own, held between steps; they take turns of some steps each, so that
what else the machine does hits all alike. Counted are real tokens, those of the examples, by the second; medians are compared. Ours is the loop of
`python -m phased_ift_jax.train` with its packing, logging and bookkeeping; compilation is told apart, as are whole processes from start to end.

The bounds are held against the clock, on a machine that does nothing else. Processor time is told as well, yet torch's threads spin while they wait for one
that has no core: where others are at work, two cores flatter us, and one (`taskset -c 0 python benchmarks/training.py ...`) is the fairer comparison. The load is told.

TRL (`pip install -e '.[benchmarks]'`) pads each batch to its longest (16 rows at a time, or 4, or 1, which pads nothing) or packs (best-fit rows of several
lengths, or a whole step flattened into one row); of each kind the fastest counts, and what is much slower in the first round is let go. It gets our token
ids in our order. Ours is one device as JAX finds the machine, and for stories260k also one for each core (`JAX_NUM_CPU_DEVICES`, `mesh.data`): its matmuls
are too small to be shared out among cores. Plain transformers pads all to 2,048, sixteen rows at once as the paper's script does (some 15 GB of memory), which is what
ours is held against, or two at a time, which is faster and told beside. Losses of
TRL's padded run and of ours, from the same weights on the same batches, must agree within 1e-3 at every step.

Tunix and Levanter want environments of their own (pass `--peer_python tunix=DIR/bin/python levanter=...`); without, they are left out:

  python -m venv DIR && DIR/bin/pip install google-tunix==0.1.7                                   (came with jax 0.10.2, flax 0.12.8)
  python -m venv DIR && DIR/bin/pip install levanter==1.2.dev1644 haliax==1.4.dev453 jax==0.7.2 chex    (later versions of jax refuse it)

Tunix cannot pack; Levanter packs by its own `greedy_pack_prompt_completions`. EasyDeL 0.3.0 was tried and left out: its trainers do not import without PyTorch.
Prints a table; the last line is JSON. Exit code 1 where a bound is missed.
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
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from phased_ift_jax.config import RunConfig
from phased_ift_jax.data.tokenization import load_tokenizer
from phased_ift_jax.training.survey import Survey, survey

HERE = Path(__file__).resolve().parent
STAGE_3 = "phasedsft/en-alpaca52k-stage3.jsonl"
EXAMPLES = 16  # of a step
LONGEST = {"llama15m": 2048, "stories260k": 512}
LENGTHS = {"llama15m": (512, 1024, 2048), "stories260k": (512, 1024)}  # of the peers' packed rows; they cut what is longer, which at these is hardly any
GROUPS = ("ours", "trl padded", "trl in parts", "trl packed", "padded to 2048", "2048 in parts", "tunix", "levanter")
PEERS = GROUPS[-2:]  # in environments of their own
# (model, group): how many times as fast ours is to be
BOUNDS = {
    ("llama15m", "trl packed"): 4.0,
    ("llama15m", "trl padded"): 7.0,
    ("llama15m", "padded to 2048"): 50.0,
    ("llama15m", "tunix"): 5.0,
    ("llama15m", "levanter"): 1.3,
    ("stories260k", "trl"): 4.0,
}
AGREE = 1e-3
MUCH_SLOWER = 0.8  # of the fastest of its kind


@dataclass
class Side:
    """One way to train: `group` is the kind whose fastest counts, `words` and the file of its `job` start a process that takes turns."""

    name: str
    group: str
    words: list[str]
    job: dict[str, Any]
    rates: list[float] = field(default_factory=list)  # real tokens per second
    cpu_rates: list[float] = field(default_factory=list)  # real tokens per second of the processors
    facts: dict[str, Any] = field(default_factory=dict)
    most_steps: int = 1000
    most_rounds: int = 1000
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None
    noise: Path = Path()  # what it prints that is not for us

    def start(self, work: Path) -> None:
        began = time.perf_counter()
        folder = work / self.name.replace(" ", "-")
        folder.mkdir()
        (folder / "job.json").write_text(json.dumps(self.job | {"work": str(folder)}))
        self.noise = folder / "noise.txt"
        words, environment = [*self.words, str(folder / "job.json")], os.environ | self.environment
        with open(self.noise, "w") as noise:
            self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=noise, text=True, env=environment)
        self.facts = self.heard()["ready"] | {"start_seconds": time.perf_counter() - began}

    def heard(self) -> dict[str, Any]:
        assert self.process
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} has ended: {self.noise.read_text()[-2000:]}")
        return json.loads(line)

    def turn(self, steps: int) -> dict[str, Any]:
        """Train so many steps; seconds, and the real tokens in them."""
        assert self.process
        assert self.process.stdin
        print(min(steps, self.most_steps), file=self.process.stdin, flush=True)
        taken = self.heard()
        if "tokens" not in taken:
            raise RuntimeError(f"{self.name}: the epoch ended in a turn; fewer --rounds or --steps would do")
        self.rates.append(taken["tokens"] / taken["seconds"])
        self.cpu_rates.append(taken["tokens"] / taken["cpu_seconds"])
        return taken

    def end(self) -> None:
        if self.process:
            self.process.communicate()
            self.process = None

    @property
    def rate(self) -> float:
        return statistics.median(self.rates)


def config_of(model: Path, data: Path, output: Path, longest: int, learning_rate: float = 5e-6, **training: object) -> dict[str, Any]:
    """Our run, as a YAML would say it: one phase of all rows, none held out."""
    return {
        "output_dir": str(output),
        "model": {"model_name_or_path": str(model), "dtype": "float32"},
        "data": {"path": str(data), "max_length": longest, "eval_size": 0},
        "curriculum": {"bins": {"by": "file"}},
        "training": {"num_train_epochs": 1, "global_batch_size": EXAMPLES, "learning_rate": learning_rate, **training},
        "checkpoint": {"save_minutes": None},
    }


def surveyed(config: dict[str, Any]) -> Survey:
    return survey(RunConfig.model_validate(config), {"data": 1, "fsdp": 1, "tensor": 1})


def write_examples(path: Path, seen: Survey) -> None:
    """Token ids, lengths and trained marks of the examples, in the order in which our run trains them."""
    steps, examples = seen.plan.phases[0].steps, seen.dataset.examples
    ordered = [examples[row] for step in range(len(steps)) for row in steps[step]]
    trained = [np.zeros(len(example.tokens), np.int8) for example in ordered]
    for marks, example in zip(trained, ordered, strict=True):
        for begin, end in example.responses:
            marks[begin:end] = 1
    np.savez(path, tokens=np.concatenate([example.tokens for example in ordered]), trained=np.concatenate(trained), lengths=[len(example.tokens) for example in ordered])


def model_of(name: str, data: Path, work: Path) -> Path:
    if name == "stories260k":
        return data / name
    import transformers
    from generation import random_llama

    transformers.utils.logging.disable_progress_bar()
    folder = random_llama(work / name)
    shutil.copy(data / "llama2/tokenizer.model", folder)
    sizes = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(sizes | {"max_position_embeddings": 2048}))
    return folder


def trl_job(common: dict[str, Any], batch: int, accumulate: int, packed: int | None = None, padding_free: bool = False, gradient_checkpointing: bool = False) -> dict[str, Any]:
    ways = {"batch": batch, "accumulate": accumulate, "packed": packed, "padding_free": padding_free, "gradient_checkpointing": gradient_checkpointing}
    return common | ways | {"kind": "trl", "whole": False}


def sides_of(name: str, common: dict[str, Any], config: dict[str, Any], seen: Survey, peers: dict[str, str]) -> list[Side]:
    """Every side that there is for a model."""
    own, other = [sys.executable, str(HERE / "training_ours.py")], [sys.executable, str(HERE / "training_peers.py")]
    mean = float(np.mean(seen.plan.phases[0].lengths))
    sides = [Side("ours", "ours", own, common | {"config": config})]
    if name == "stories260k" and (cores := common["cores"]) > 1:
        apart = config | {"output_dir": config["output_dir"] + "-by-core", "mesh": {"data": cores, "fsdp": 1}}
        sides.append(Side("ours, a device a core", "ours", own, common | {"config": apart}, environment={"JAX_NUM_CPU_DEVICES": str(cores)}))
    if name == "llama15m":  # first of the peers: the memory that it wants is there while few wait
        for group, batch in (("padded to 2048", EXAMPLES), ("2048 in parts", 2)):
            job = common | {"kind": "torch", "length": 2048, "batch": batch}
            sides.append(Side(f"torch padded to 2048, by {batch}", group, other, job, most_steps=1, most_rounds=1))
    sides.append(Side("trl padded", "trl padded", other, trl_job(common, EXAMPLES, 1)))
    sides.append(Side("trl padded, checkpointing", "trl padded", other, trl_job(common, EXAMPLES, 1, gradient_checkpointing=True)))
    sides += [Side(f"trl in parts of {EXAMPLES // parts}", "trl in parts", other, trl_job(common, EXAMPLES // parts, parts)) for parts in (4, EXAMPLES)]
    for length in LENGTHS[name]:
        rows = max(1, round(EXAMPLES * mean / length))
        sides.append(Side(f"trl packed {length}", "trl packed", other, trl_job(common, 1, rows, length)))
    sides.append(Side("trl flattened", "trl packed", other, trl_job(common, EXAMPLES, 1, padding_free=True)))
    sides.append(Side("trl flattened by 4", "trl packed", other, trl_job(common, 4, EXAMPLES // 4, padding_free=True)))
    there = [str(HERE / "training_peers.py")]
    if "tunix" in peers:
        sides.append(Side("tunix padded to 512", "tunix", [peers["tunix"], *there], common | {"kind": "tunix", "length": 512}))
    for length in LENGTHS[name][:2] if "levanter" in peers else ():
        job = common | {"kind": "levanter", "length": length, "mean": mean, "attention": "VANILLA"}
        sides.append(Side(f"levanter packed {length}", "levanter", [peers["levanter"], *there], job))
    return sides


def rounds(sides: list[Side], work: Path, count: int, steps: int) -> None:
    """Start every side, then let them train in turns; whoever is much slower than the best of its kind in the first round has had its last turn."""
    for number in range(count):
        for side in sides:
            if number >= side.most_rounds or (number and side.process is None):
                continue
            if side.process is None:
                side.start(work)
                print(f"  {side.name}: ready after {side.facts['start_seconds']:.1f} s", flush=True)
            taken = side.turn(steps)
            print(f"  {side.name}: {taken['steps']} steps, {taken['tokens']:,} tokens, {taken['seconds']:.2f} s, {taken['cpu_seconds']:.2f} s of processors", flush=True)
            best = max(other.rate for other in sides if other.group == side.group and other.rates)
            for other in sides:
                if other.group == side.group and other.rates and (other.rate < MUCH_SLOWER * best or number + 1 >= min(count, other.most_rounds)):
                    other.end()


def whole(name: str, words: list[str], losses: Callable[[str], list[float]]) -> dict[str, Any]:
    """A process from start to end: seconds, and the loss of every step."""
    began = time.perf_counter()
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise RuntimeError(f"{name} failed: {done.stderr[-2000:]}")
    return {"side": name, "seconds": seconds, "losses": losses(done.stdout)}


def traced(trl: Side, work: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The steps of our config by whole processes, ours and TRL's padded one: how long each takes, and how far their losses are apart."""
    output, steps = Path(config["output_dir"]), config["training"]["max_steps"]
    (work / "run.yaml").write_text(json.dumps(config))
    (work / "job.json").write_text(json.dumps(trl.job | {"whole": True, "steps": steps, "learning_rate": config["training"]["learning_rate"], "work": str(work / "whole")}))

    def our_losses(_: str) -> list[float]:
        return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]

    rows = [
        whole("ours", [sys.executable, "-m", "phased_ift_jax.train", str(work / "run.yaml")], our_losses),
        whole(trl.name, [*trl.words, str(work / "job.json")], lambda said: json.loads(said.splitlines()[-1])["losses"]),
    ]
    apart = [abs(a - b) for a, b in zip(rows[0]["losses"], rows[1]["losses"], strict=True)]
    return {"steps": steps, "learning_rate": config["training"]["learning_rate"], "rows": rows, "largest_difference": max(apart)}


def measure(name: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    work.mkdir()
    data, longest = args.data / STAGE_3, LONGEST[name]
    model = model_of(name, args.data, work)
    load_tokenizer(model).save_pretrained(work / "tokenizer")
    config = config_of(model, data, work / "run", longest)
    seen = surveyed(config)
    write_examples(work / "examples.npz", seen)
    steps = len(seen.plan.phases[0].steps)
    if args.rounds * args.steps >= steps // 2:
        raise SystemExit(f"error: {args.rounds} rounds of {args.steps} steps are more than half of the {steps} of an epoch, and what gets warm comes on top; fewer would do")
    common = {"examples": str(work / "examples.npz"), "model": str(model), "tokenizer": str(work / "tokenizer"), "steps": steps, "learning_rate": 5e-6, "warm": 1}
    common |= {"cores": len(os.sched_getaffinity(0)), "examples_per_step": EXAMPLES}
    sides = [side for side in sides_of(name, common, config, seen, args.peer_python) if args.sides is None or side.group in args.sides]
    try:
        rounds(sides, work, args.rounds, args.steps)
    finally:
        for side in sides:
            side.end()
    result: dict[str, Any] = {"model": name, "sides": []}
    for side in sides:
        result["sides"].append({"side": side.name, "group": side.group, "rates": side.rates, "cpu_rates": side.cpu_rates, "tokens_per_second": side.rate} | side.facts)
    padded = [side for side in sides if side.name == "trl padded"]
    if args.trace_steps and padded and sides[0].name == "ours":
        (work / "whole").mkdir()
        result["trace"] = traced(padded[0], work / "whole", config_of(model, data, work / "whole/run", longest, args.trace_learning_rate, max_steps=args.trace_steps))
    return result


def ratios(result: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """By group, how many times as fast our fastest is as its fastest: by the clock, and by the processors' time. `trl` is the fastest of all that is TRL's."""

    def best(group: str) -> dict[str, Any]:
        return max((side for side in result["sides"] if side["group"].startswith(group)), key=lambda side: side["tokens_per_second"])

    groups = list(dict.fromkeys(side["group"] for side in result["sides"]))
    if "ours" not in groups:
        return {}
    ours, found = best("ours"), {}
    for group in [*groups[1:], *(["trl"] if any(name.startswith("trl") for name in groups) else [])]:
        peer = best(group)
        found[group] = ours["tokens_per_second"] / peer["tokens_per_second"], statistics.median(ours["cpu_rates"]) / statistics.median(peer["cpu_rates"])
    return found


def table(results: list[dict[str, Any]]) -> tuple[list[str], bool]:
    """What was measured, in lines, and whether every bound that could be looked at is kept."""
    lines, kept = [f"{'model':<13}{'side':<28}{'rounds':>7}{'tokens/s':>10}{'of cpu s':>10}{'start s':>9}"], True
    for result in results:
        for side in result["sides"]:
            cells = f"{len(side['rates']):>7}{side['tokens_per_second']:>10,.0f}{statistics.median(side['cpu_rates']):>10,.0f}{side['start_seconds']:>9.1f}"
            lines.append(f"{result['model']:<13}{side['side']:<28}{cells}" + (f"  {side['compile_seconds']:.1f} s of it compiling" if "compile_seconds" in side else ""))
        for group, (clock, cpu) in ratios(result).items():
            bound = BOUNDS.get((result["model"], group))
            good = bound is None or clock >= bound
            kept &= good
            verdict = "" if bound is None else f"; {'at least' if good else 'MISSED: at least'} {bound:g}"
            lines.append(f"{result['model']:<13}ours / {group}: {clock:.2f} ({cpu:.2f} by processor time){verdict}")
        if trace := result.get("trace"):
            good = trace["largest_difference"] <= AGREE
            kept &= good
            took = ", ".join(f"{row['side']} {row['seconds']:.1f} s" for row in trace["rows"])
            losses = [row["losses"] for row in trace["rows"]]
            lines.append(f"{result['model']:<13}whole processes of {trace['steps']} steps: {took}")
            lines.append(
                f"{result['model']:<13}losses {losses[0][0]:.4f} to {losses[0][-1]:.4f} (rate {trace['learning_rate']:g}), apart by {trace['largest_difference']:.1e} at most"
                + ("" if good else f"; MISSED: at most {AGREE:g}")
            )
    return lines, kept


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with stories260k, llama2/tokenizer.model and " + STAGE_3)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--models", nargs="+", choices=tuple(LONGEST), default=list(LONGEST))
    parser.add_argument("--sides", nargs="+", choices=GROUPS, help="only these kinds; default: all that --peer_python allows")
    parser.add_argument("--peer_python", nargs="*", default=[], metavar="NAME=PYTHON", help="tunix=..., levanter=...: Python of an environment that has it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=8, help="of each side and round")
    parser.add_argument("--trace_steps", type=int, default=12, help="of the whole processes whose losses are compared; 0: none")
    parser.add_argument("--trace_learning_rate", type=float, default=1e-3, help="high enough for the losses to move")
    args = parser.parse_args()
    args.data = args.data.resolve()
    if wrong := [pair for pair in args.peer_python if pair.partition("=")[0] not in PEERS or not Path(pair.partition("=")[2]).is_file()]:
        parser.error(f"--peer_python: {wrong[0]!r} is not NAME=PYTHON with NAME of {', '.join(PEERS)} and the path of a Python")
    args.peer_python = dict(pair.split("=", 1) for pair in args.peer_python)
    if missing := {*(args.sides or ())} & {*PEERS} - {*args.peer_python}:
        parser.error(f"--sides: {min(missing)} needs --peer_python {min(missing)}=DIR/bin/python; --help tells how such an environment is made")
    os.environ |= {"OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))), "PYTHONPATH": str(HERE.parent)}
    os.environ |= {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu", "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryDirectory() as work:
        results = [measure(name, args, Path(work) / f"{name}-measured") for name in args.models]
    lines, kept = table(results)
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[1]
    print("\n" + "\n".join(lines) + f"\n{cores} cores, load {load:.1f}" + (": others were at work here" if load > 2 * cores else ""))
    facts = {"results": results, "kept": kept, "cores": cores, "load": load, "python": platform.python_version(), "steps": args.steps, "examples_per_step": EXAMPLES}
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

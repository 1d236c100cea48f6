"""What a step costs as things grow:  python benchmarks/scaling.py [--only records]

The run's own loop (batches packed ahead, metrics, ledgers, checkpoints) on the quickstart's model and synthetic records, record i a pure function of
i, never all in memory: row length, examples a step, phases, virtual devices, each in a process of its own, and records from 10 thousand to 10 million as
phases of one process that take turns, so that whatever else the machine does falls on all of them alike. Seconds are the median step's; a step is
also given in processor seconds. "planning" is what is done once for all records: choosing row shapes, and the length of every step's rows. Prints a
table; the last line is JSON. Exit code 1 where a step on 10 million records takes over 1.1 times that on 10 thousand, or their data path 1 GB more.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from phased_ift_jax.records import InstructionRecord, Phase, Source, TokenizedExample, Turn

ROOT = Path(__file__).resolve().parents[1]
PLAIN = {"length": 64, "batch": 32, "phases": 1, "devices": 1, "records": 100_000}
SWEEPS = {"length": (64, 128, 256, 512), "batch": (16, 64, 256), "phases": (1, 3, 9), "devices": (1, 2, 4, 8)}
RECORDS = (10_000, 100_000, 1_000_000, 10_000_000)
UNTIMED = 5  # steps at the beginning of a phase
SLOWER, BYTES = 1.10, 10**9


class Lazy(Sequence[Any]):
    """A sequence whose items are made when they are asked for."""

    def __init__(self, size: int, item: Callable[[int], Any]) -> None:
        self.size, self.item = size, item

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Any:
        return self.item(int(index))


def lengths_of(index: np.ndarray, length: int) -> np.ndarray:
    """Tokens of these records: from an eighth of a row to under half of one, so that half as many rows as examples hold any step."""
    return length // 8 + (index.astype(np.uint64) * np.uint64(2654435761) % np.uint64(2**32) % np.uint64(3 * length // 8)).astype(np.int64)


def example(index: int, length: int, vocabulary: int) -> TokenizedExample:
    tokens = int(lengths_of(np.array([index]), length)[0])
    return TokenizedExample(((np.arange(tokens) * 7 + index) % vocabulary).astype(np.int32), ((tokens // 2, tokens),))


def resident(key: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def measure(sizes: Sequence[int], length: int, batch: int, devices: int, steps: int, folder: Path) -> dict[str, Any]:
    """A run in this process, one phase for each of `sizes`, the first so many of the records; figures of each phase, and of the process."""
    from phased_ift_jax import config
    from phased_ift_jax.data.batches import Steps
    from phased_ift_jax.data.packing import Shapes, choose_shapes
    from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
    from phased_ift_jax.train import Results
    from phased_ift_jax.training import loop
    from phased_ift_jax.training.plan import PhasePlan, row_price

    words = {"output_dir": folder / "run", "model.model_name_or_path": ROOT / "configs/quickstart/model", "data.path": ROOT / "configs/quickstart/data.jsonl", "data.eval_size": 0}
    words |= {"training.global_batch_size": batch, "checkpoint.save_minutes": "null", "export.after_each_phase": "false", "evaluation.exact_match": "false"}
    read = loop.prepare(config.load(ROOT / "configs/quickstart.yaml", [(name, str(value)) for name, value in words.items()]))
    before, n, vocabulary = resident("VmRSS"), max(sizes), read.plan.model.vocab_size
    tokens = lengths_of(np.arange(n), length)
    phases = tuple(Phase(number, f"{number}-of-{size}", np.arange(size)) for number, size in enumerate(sizes, 1))
    training = read.plan.phases[0].training
    shapes = Shapes(-(-batch // (2 * devices)) * devices, (length,))
    plans = tuple(
        PhasePlan(phase, training, Steps(phase.rows, batch, 1, (0, phase.index), steps), np.full(steps, 1e-3, np.float32), shapes, tokens, tokens - tokens // 2) for phase in phases
    )
    records = Lazy(n, lambda i: InstructionRecord(str(i), (Turn("a", "a"),), Source("synthetic", i + 1)))
    examples = Lazy(n, lambda i: example(i, length, vocabulary))
    bins = {"bin_of": np.ones(n, np.int8), "eval_bin_of": np.ones(n, np.int8), "bin_names": ("all",), "eval_bin_names": ("all",)}
    data = dataclasses.replace(read.dataset, records=records, examples=examples, phases=phases, held_out=np.zeros(n, bool), **bins)
    run = dataclasses.replace(read, dataset=data, plan=dataclasses.replace(read.plan, phases=plans))
    whole = Steps(phases[int(np.argmax(sizes))].rows, batch, 1, (0, 0))
    planning = time.perf_counter()
    choose_shapes([tokens[whole[step]] for step in range(len(whole))], devices, 4, row_price(read.plan.model, "xla", "cpu"))
    _ = dataclasses.replace(plans[0], steps=whole).row_lengths
    planned = time.perf_counter()
    del whole
    busy, real = [], loop._facts

    def facts(*given: Any) -> dict[str, Any]:
        busy.append(time.process_time())
        return real(*given)

    loop._facts = facts  # called once a step
    loop.train(run, Results(ForgettingMatrix(run.output / "forgetting.json")))
    seconds: dict[int, list[float]] = {}
    for line in map(json.loads, (run.output / "seconds.jsonl").read_text().splitlines()):
        seconds.setdefault(line["phase_index"], []).append(line["seconds"])
    of_processors = [np.diff(busy[at * steps + UNTIMED : (at + 1) * steps]) for at in range(len(sizes))]
    return {
        "steps": [{"records": size, "seconds": all_[UNTIMED:], "cpu_seconds": cpu.tolist()} for size, all_, cpu in zip(sizes, seconds.values(), of_processors, strict=True)],
        "planning_seconds": planned - planning,
        "added_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before,
    }


def in_a_process(**point: Any) -> dict[str, Any]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"--xla_force_host_platform_device_count={point['devices']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__, "--point", json.dumps(point)], env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(what: str, value: int, phases: list[dict[str, Any]], told: dict[str, Any]) -> dict[str, Any]:
    seconds, cpu = (statistics.median(one for phase in phases for one in phase[key]) for key in ("seconds", "cpu_seconds"))
    found = {"what": what, "value": value, "step_seconds": seconds, "step_cpu_seconds": cpu, "planning_seconds": told["planning_seconds"], "added_bytes": told["added_bytes"]}
    print(f"{what:<10}{value:>12,}{seconds * 1e3:>11.2f}{cpu * 1e3:>11.2f}{told['planning_seconds']:>10.2f}{told['added_bytes'] / 1e6:>9.0f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=(*SWEEPS, "records"), nargs="+", default=[*SWEEPS, "records"])
    parser.add_argument("--steps", type=int, default=60, help="of each phase")
    parser.add_argument("--rounds", type=int, default=4, help="turns of each number of records")
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.point:
        point = json.loads(args.point)
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            told = measure(**point, folder=Path(folder))
        print(json.dumps(told))
        return
    rows: list[dict[str, Any]] = []
    print(f"{'what':<10}{'':>12}{'ms a step':>11}{'cpu ms':>11}{'planning':>10}{'MB':>9}", flush=True)
    for what in (name for name in SWEEPS if name in args.only):
        for value in SWEEPS[what]:
            at = PLAIN | {what: value}
            told = in_a_process(sizes=[at["records"]] * at["phases"], length=at["length"], batch=at["batch"], devices=at["devices"], steps=args.steps)
            rows.append(row(what, value, told["steps"], told))
    ratio = bytes_added = None
    if "records" in args.only:
        plain = {"length": PLAIN["length"], "batch": PLAIN["batch"], "devices": 1, "steps": args.steps}
        turns = in_a_process(sizes=list(RECORDS) * args.rounds, **plain)["steps"]
        alone = {size: in_a_process(sizes=[size], **plain | {"steps": 2 * UNTIMED}) for size in RECORDS}
        for size in RECORDS:
            rows.append(row("records", size, [phase for phase in turns if phase["records"] == size], alone[size]))
        few, many = ([statistics.median(phase["seconds"]) for phase in turns if phase["records"] == size] for size in (RECORDS[0], RECORDS[-1]))
        ratio = statistics.median(b / a for a, b in zip(few, many, strict=True))
        bytes_added = alone[RECORDS[-1]]["added_bytes"] - alone[RECORDS[0]]["added_bytes"]
        print(f"10 million records to 10 thousand: {ratio:.3f} times the step, the median of {args.rounds} pairs; {bytes_added / 1e6:.0f} MB more")
    facts = {"rows": rows, "ratio": ratio, "bytes_added": bytes_added, "plain": PLAIN, "cores": os.cpu_count(), "load": os.getloadavg()[1], "python": platform.python_version()}
    facts |= {name: version(name) for name in ("jax", "numpy", "grain")}
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    raise SystemExit(0 if ratio is None or (ratio <= SLOWER and bytes_added is not None and bytes_added <= BYTES) else 1)


if __name__ == "__main__":
    main()

"""How long a start takes:  python benchmarks/startup.py

Three figures, each a median, from the start of the process: `train --help`; the first step of a run with an empty compilation cache (cold); the
same with what the cold start has compiled (warm). A run is stopped as soon as its first step is in trained_ids.jsonl, which is while the second is
under way. Beside the seconds, those of processors, which tell more where others use the machine. Prints a table; the last line is JSON. Exit code 1
where a bound is missed: 1 s, 20 s, 8 s.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TRAIN = [sys.executable, "-m", "phased_ift_jax.train"]
BOUNDS = {"help": 1.0, "cold": 20.0, "warm": 8.0}
PATIENCE = 300  # seconds


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """What a process that is not waited for has used."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def helped() -> tuple[float, float]:
    """Seconds, and of processors, until `--help` is printed and its process gone."""
    begin, before = time.perf_counter(), os.times()
    subprocess.run([*TRAIN, "--help"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return time.perf_counter() - begin, after.children_user + after.children_system - before.children_user - before.children_system


def first_step(config: str, output: Path, cache: Path) -> tuple[float, float]:
    """Seconds, and of processors, until the first step is noted."""
    command, noted = [*TRAIN, config, "--output_dir", str(output)], output / "trained_ids.jsonl"
    with tempfile.TemporaryFile() as told:
        begin = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}, stdout=told, stderr=told)
        while not (noted.exists() and noted.stat().st_size):
            if process.poll() is not None or time.perf_counter() - begin > PATIENCE:
                process.kill()
                told.seek(0)
                raise SystemExit(f"no step within {PATIENCE} s:\n{told.read()[-2000:].decode()}")
            time.sleep(0.01)
        figures = time.perf_counter() - begin, processor_seconds(process)
        process.terminate()
        process.wait()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/quickstart.yaml")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the JSON here, too")
    args = parser.parse_args()
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in BOUNDS}
    for number in range(args.rounds):
        with tempfile.TemporaryDirectory() as work:
            seconds["help"].append(helped())
            for name in ("cold", "warm"):
                seconds[name].append(first_step(args.config, Path(work, name), Path(work, "cache")))
        print(f"  round {number + 1}: " + ", ".join(f"{name} {all_[-1][0]:.2f} s" for name, all_ in seconds.items()), flush=True)
    rows = [
        {"what": name, "seconds": statistics.median(clock for clock, _ in all_), "cpu_seconds": statistics.median(cpu for _, cpu in all_), "bound": BOUNDS[name]}
        for name, all_ in seconds.items()
    ]
    print(f"\n{'what':<6}{'seconds':>9}{'cpu s':>8}{'bound':>8}")
    for row in rows:
        print(f"{row['what']:<6}{row['seconds']:>9.2f}{row['cpu_seconds']:>8.2f}{row['bound']:>8.0f}")
    facts = {"config": args.config, "rounds": args.rounds, "rows": rows, "cores": os.cpu_count(), "load": os.getloadavg()[1], "python": platform.python_version()}
    facts |= {name: version(name) for name in ("jax", "flax", "orbax-checkpoint", "transformers", "grain")}
    if args.out:
        args.out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))
    raise SystemExit(0 if all(row["seconds"] <= row["bound"] for row in rows) else 1)


if __name__ == "__main__":
    main()

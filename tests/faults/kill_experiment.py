"""Kill -9 an experiment on its way:  python tests/faults/kill_experiment.py CONFIG --reference DIR [--n 10] [--seconds 1500] [--seed 0] [--KEY VALUE ...]

Law: an experiment that was killed at any moments, verb and cell together, and started again each time, ends with the report of an undisturbed one, but
for what depends on a clock. The undisturbed one's folder is DIR; this one's is DIR-killed beside it, and is deleted first where it is there already. Moments
are drawn over --seconds of running, about as long as the undisturbed one took. Exit code 1 where the reports differ, or where it ended before it was
killed so often; 2 where DIR has no report.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TIMED = {"tokens_per_second"}  # keys of report.json that depend on a clock


def timeless(node: Any) -> Any:
    """A report without what depends on a clock."""
    if isinstance(node, dict):
        return {key: timeless(value) for key, value in node.items() if key not in TIMED}
    return [timeless(value) for value in node] if isinstance(node, list) else node


def told(folder: Path) -> list[str]:
    """The lines of a folder's report that do not depend on a clock or on where the folder is."""
    text = (folder / "report.json").read_text().replace(str(folder), "DIR")
    return json.dumps(timeless(json.loads(text)), indent=1).splitlines()


def killed(words: list[str], moments: list[float]) -> list[str]:
    """Start it again and again until it ends by itself; where it was at each kill, moments in seconds of running."""
    where, ran = list[str](), 0.0
    while True:
        began = time.monotonic()
        process = subprocess.Popen(words, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            said = process.communicate(timeout=moments[len(where)] - ran if len(where) < len(moments) else None)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said = process.communicate()[0]
            ran += time.monotonic() - began
            where.append((said.splitlines() or ["before its first line"])[-1])
            print(f"killed after {ran:.0f} s: {where[-1]}", flush=True)
            continue
        if process.returncode:
            raise SystemExit(f"it ended with {process.returncode}: {said}")
        return where


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--reference", type=Path, required=True, metavar="DIR", help="output_dir of the undisturbed experiment")
    parser.add_argument("--n", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=1500)
    parser.add_argument("--seed", type=int, default=0)
    args, more = parser.parse_known_args()
    try:
        reference = told(args.reference)
    except OSError as error:
        parser.error(f"--reference {args.reference}: {error.strerror}: {error.filename}; run the experiment there first")
    folder = args.reference.with_name(args.reference.name + "-killed")
    shutil.rmtree(folder, ignore_errors=True)
    moments = sorted(np.random.default_rng(args.seed).uniform(0, args.seconds, args.n).tolist())
    words = [sys.executable, "-m", "phased_ift_jax.experiment", args.config, "--output_dir", str(folder), *more]
    where = killed(words, moments)
    mine = told(folder)
    differ = [pair for pair in zip(mine, reference, strict=False) if pair[0] != pair[1]]
    same = not differ and len(mine) == len(reference)
    print(f"{len(where)} of {args.n} kills; {len(mine):,} lines of report.json: " + ("all the same" if same else f"{len(differ)} differ, the first: {differ[:3]}"))
    return 0 if same and len(where) == args.n else 1


if __name__ == "__main__":
    sys.exit(main())

"""Requests to stop at random moments of real runs:  python tests/faults/stop.py --n 20 [--seed 0] [--work DIR]

Law: from a tenth of a second after its start on, whatever it is at, a process that gets SIGTERM or SIGINT ends within 5 seconds with exit
code 75; a second signal on the way changes nothing; every optimizer step that was logged is in the newest checkpoint; and the run, started
again each time, ends as an undisturbed one, bit for bit.

Every other run has no compiled code to load, so that it is compiling for most of its life. Exit code 1 where a law was broken.
"""

from __future__ import annotations

import argparse
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults import micro
from faults.kill import Watch, make_references
from faults.micro import Broken, Life, Reference, Run

FIRST, BOUND = 0.1, 5.0  # seconds after the start from which on a request counts, and until which it is followed
STOPPED = 75
WAYS = ("SIGTERM", "SIGTERM twice", "SIGINT")
STOPS_A_RUN = 3


@dataclass
class Stops:
    """What was stopped, at what, and how long it took."""

    seen: list[tuple[str, str, float]] = field(default_factory=list)  # (way, what it was at, seconds to the end)
    runs: int = 0
    broken: list[str] = field(default_factory=list)


def stop(run: Run, reference: Reference, life: Life, way: str, place: float, generator: np.random.Generator) -> tuple[str, float] | None:
    """Stop a process at a random time before it is so far in the run; what it was at and how long it took, None where it was done before."""
    total, kept = sum(reference.steps), reference.done(micro.newest(run.output))
    longest = life.first + (life.whole - life.first) * max(round(place * total) - kept, 0) / total
    after, second = FIRST + generator.uniform() * (longest - FIRST), generator.uniform() * 0.5
    with run.started() as process:
        watch = Watch(run, reference)
        while process.poll() is None and time.monotonic() - watch.begun < after:
            time.sleep(0.005)
        if process.poll() is not None:
            return ended(run, process.returncode)
        at, logged, last_saved = watch.at(), micro.lines(run.output), micro.newest(run.output) == max(reference.digests)
        asked = time.monotonic()
        process.send_signal(signal.SIGINT if way == "SIGINT" else signal.SIGTERM)
        if way == "SIGTERM twice":
            while process.poll() is None and time.monotonic() - asked < second:
                time.sleep(0.005)
            process.send_signal(signal.SIGTERM)
        code = process.wait(micro.PATIENCE)
        took = time.monotonic() - asked
    about = f"{way} after {after:.2f} s, at {at}"
    if code == 0 and last_saved:  # there was nothing left to stop
        return None
    if code != STOPPED:
        raise Broken(f"{about}: exit code {code}, not {STOPPED}\n{run.tail()}")
    if took > BOUND:
        raise Broken(f"{about}: it took {took:.1f} s to end\n{run.tail()}")
    if watch.planned():
        nothing_lost(run, reference, logged, about)
    return at, took


def ended(run: Run, code: int) -> None:
    if code:
        raise Broken(f"exit code {code} before it was asked to stop\n{run.tail()}")


def nothing_lost(run: Run, reference: Reference, logged: int, about: str) -> None:
    """The newest checkpoint has every step that was ever logged, and no other."""
    saved, lines = reference.done(micro.newest(run.output)), micro.lines(run.output)
    if saved != lines or lines < logged:
        raise Broken(f"{about}: {logged} steps were logged then, {lines} are logged now, {saved} are in the newest checkpoint\n{run.tail()}")
    for position, path in micro.whole(run.output).items():
        if micro.digest(path) != reference.digests[position]:
            raise Broken(f"{about}: '{path}' holds other arrays than the undisturbed run had there")


def stop_all(n: int, seed: int, references: dict[str, Reference], work: Path) -> Stops:
    """`n` stops, a few to a run; what an undisturbed run takes without compiled code is measured first."""
    generator, stops = np.random.default_rng([seed, n]), Stops()
    rows = work / "rows.jsonl"
    compiling = micro.timed(Run(work / "plain-compiling", rows, None, "keep"))
    while len(stops.seen) < n and stops.runs < 2 * n:
        state, cache = ("reset", "keep")[stops.runs // 2 % 2], work / "cache" if stops.runs % 2 else None
        run = Run(work / f"stopped-{stops.runs:03}", rows, cache, state, save_steps=7)
        life = references[state].life if cache else compiling
        stops.runs += 1
        try:
            for place in sorted(generator.uniform(size=min(STOPS_A_RUN, n - len(stops.seen)))):
                way = WAYS[len(stops.seen) % len(WAYS)]
                found = stop(run, references[state], life, way, float(place), generator)
                if found is None:
                    break
                stops.seen.append((way, *found))
                print(f"{way:<14}{'with' if cache else 'without'} compiled code, at {found[0]:<11}: exit code 75 after {found[1]:.2f} s", flush=True)
            run.must_end()
            if found := micro.differences(run.output, references[state].output):
                raise Broken("; ".join(found))
        except Exception as error:  # whatever it is, it is said with the others
            stops.broken.append(f"--n {n} --seed {seed}, kept in '{run.folder}': {type(error).__name__}: {error}")
            print(f"BROKEN {stops.broken[-1]}", flush=True)
            stops.seen.append(("", "broken", 0.0))
            continue
        shutil.rmtree(run.folder)
    return stops


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=20, help="stops that must happen")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=None, help="an empty folder to work in, kept; otherwise a temporary one, kept where a law was broken")
    options = parser.parse_args(argv)
    begun = time.monotonic()
    with micro.workplace(options.work, "stops-") as (work, broken):
        stops = stop_all(options.n, options.seed, make_references(work), work)
        broken += stops.broken
        longest = max((seconds for *_, seconds in stops.seen), default=0.0)
        print(f"\n{len(stops.seen)} stops in {stops.runs} runs, at most {longest:.2f} s to the end", end="")
        print(f", {len(broken)} broken, {time.monotonic() - begun:.0f} s (seed {options.seed})", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

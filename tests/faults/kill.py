"""Hundreds of kill -9 over the whole life of real runs:  python tests/faults/kill.py --n 300 [--runs 20] [--seed 0] [--jobs 2] [--work DIR]

Law: a run that was killed at any moments, however often, and started again each time ends as an undisturbed one, bit for bit, and on the
way no checkpoint that counts as whole ever held another state than the undisturbed run had at that step.

A moment is a kind, a place in the run, and a small delay after its beginning was seen in the run's files, all drawn by a generator of
(seed, run). In every fifth run some kills are followed by damage to a random file of the newest checkpoint: the next start names the file and
goes on from the checkpoint before. A process that ends before its moment came was not killed: the moment is drawn anew, in a new folder. A folder whose run went
wrong is kept. Exit code 1 where a law was broken.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

if not __package__:  # run as a file
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from faults import micro
from faults.micro import Broken, Position, Reference, Run
from phased_ift_jax.training import manifest
from phased_ift_jax.training.status import status

# what is waited for, and the longest delay after it: about as long as it takes
DELAY = {"start": 0.0, "any time": 0.0, "step": 0.03, "save": 0.12, "phase end": 0.6, "evaluation": 0.2, "export": 0.03}
DECK = ("start", "any time", "step", "step", "save", "save", "phase end", "evaluation", "export")
FOUND = ("start", "training", "save", "evaluation", "export", "between")
POLL = 0.001


@dataclass(frozen=True)
class Moment:
    """When to kill: at the first beginning of its kind at or after a place of the run (from 0 to 1)."""

    kind: str
    place: float
    delay: float  # seconds; of kinds that are a time, a share of the time that is to come


@dataclass
class Tally:
    """What came of one share of the kills."""

    kills: Counter[tuple[str, str]] = field(default_factory=Counter)  # (kind drawn, what it was at when it died)
    folders: int = 0
    damages: int = 0
    compared: int = 0  # checkpoints whose arrays were compared
    broken: list[str] = field(default_factory=list)


def deal(kinds: Sequence[str], generator: np.random.Generator) -> list[Moment]:
    """Moments for these kinds, spread over a run, in order; what belongs to the end of a phase is drawn at one."""
    moments = []
    for kind in kinds:
        place = generator.uniform()
        if kind in ("phase end", "export"):
            place = float(generator.integers(1, 4)) / 3
        elif kind == "evaluation":  # the base is evaluated, too
            place = float(generator.integers(0, 4)) / 3
        moments.append(Moment(kind, place, generator.uniform() * (DELAY[kind] or 1.0)))
    return sorted(moments, key=lambda moment: moment.place)


class Watch:
    """Sees in the files of a run what its newest process is at. It reads little, as it looks a thousand times a second."""

    def __init__(self, run: Run, reference: Reference) -> None:
        self.run, self.output, self.reference = run, run.output, reference
        self.begun = time.monotonic()
        self.kept = micro.newest(self.output)
        self._planned = False

    def comes(self, moment: Moment) -> bool:
        """Whether the moment has begun. Before the plan is written, only a time can have come."""
        life, elapsed = self.reference.life, time.monotonic() - self.begun
        total = sum(self.reference.steps)
        target = max(round(moment.place * total), self.reference.done(self.kept) + 1)
        if moment.kind == "start":
            return elapsed >= moment.delay * life.plan
        if moment.kind == "any time":
            return elapsed >= moment.delay * (life.first + (life.whole - life.first) * (target - self.reference.done(self.kept)) / total)
        if not self.planned():
            return False
        phase = round(moment.place * len(self.reference.folders))
        if moment.kind == "step":
            return self.run.touched(self.output / "metrics.jsonl") and micro.lines(self.output) >= target
        if moment.kind == "save":
            return any(self.reference.done(position) >= target for position in self.saving())
        if moment.kind == "phase end":
            ends = [self.end(index) for index in range(max(phase, 1), len(self.reference.folders) + 1)]
            return any(self.run.touched(end / manifest.MANIFEST) for end in ends)
        if moment.kind == "export":
            return any(index >= phase for index in self.exporting())
        at = self.evaluating()
        return at is not None and at >= phase

    def planned(self) -> bool:
        """Whether the process is past its imports, its data and its checks, and has found where to go on."""
        self._planned = self._planned or self.run.touched(self.output / "plan.json")
        return self._planned

    def at(self) -> str:
        """What the process was at, now that it is dead."""
        if not self.planned():
            return "start"
        if any(True for _ in self.saving()):
            return "save"
        if any(True for _ in self.exporting()):
            return "export"
        if self.evaluating() is not None:
            return "evaluation"
        done = [sum(self.reference.steps[:index]) for index in range(1, len(self.reference.steps) + 1)]
        ended = [self.reference.done(position) for position in micro.whole(self.output)]
        return "between" if micro.lines(self.output) in done and micro.lines(self.output) in ended else "training"

    def end(self, phase: int) -> Path:
        """The checkpoint at the end of a phase."""
        return self.output / "checkpoints" / self.reference.folders[phase - 1] / str(self.reference.steps[phase - 1])

    def saving(self) -> Iterator[Position]:
        """Checkpoints that this process has begun to save, and that are not there yet."""
        for index, folder in enumerate(self.reference.folders, 1):
            inside = self.output / "checkpoints" / folder
            for name in os.listdir(inside) if inside.exists() else ():
                if name.endswith(manifest.UNDER_WAY):
                    position = (index, int(name[1:].removesuffix(manifest.UNDER_WAY)))
                    if self.run.touched(inside / name) and position > self.kept and not (inside / str(position[1]) / manifest.MANIFEST).exists():
                        yield position

    def exporting(self) -> Iterator[int]:
        """Phases whose export this process is writing."""
        return (index for index, folder in enumerate(self.reference.folders, 1) if self.run.touched(self.output / "hf" / f".{folder}.part"))

    def evaluating(self) -> int | None:
        """The phase (0: the base) whose weights are there and whose row in the matrix is not, once the process is past its start."""
        if not self.planned():
            return None
        matrix = self.output / "forgetting.json"
        rows = matrix.read_text() if matrix.exists() else ""
        if '"base"' not in rows:
            return 0
        missing = (index for index, folder in enumerate(self.reference.folders, 1) if f'"{folder}"' not in rows and (self.end(index) / manifest.MANIFEST).exists())
        return next(missing, None)


class Killed:
    """A run, what is known of it from outside, and the laws that every death of it is held to."""

    def __init__(self, run: Run, reference: Reference, tally: Tally) -> None:
        self.run, self.reference, self.tally = run, reference, tally
        self.damaged: dict[Path, str] = {}  # by the harness, and not set aside yet: checkpoint, file
        self.aside: set[Path] = set()

    def dies(self, moment: Moment) -> bool:
        """Start a process and kill it; False where it ended, done, before its moment."""
        expected = whole_or_base(self.run)
        with self.run.started() as process:
            watch = Watch(self.run, self.reference)
            while process.poll() is None and not watch.comes(moment):
                time.sleep(POLL if watch.planned() else 10 * POLL)  # importing, it needs the processor more than we do
                if time.monotonic() - watch.begun > micro.PATIENCE:
                    raise Broken(f"no end after {micro.PATIENCE:.0f} s\n{self.run.tail()}")
            if moment.kind not in ("start", "any time"):
                time.sleep(moment.delay)
            process.kill()
            code = process.wait(micro.PATIENCE)
        self.check_start(expected)
        if code == 0:
            return False
        if code != -signal.SIGKILL:
            raise Broken(f"exit code {code} after {moment}\n{self.run.tail()}")
        self.tally.kills[moment.kind, watch.at()] += 1
        self.check_remains()
        return True

    def check_start(self, expected: Path | None) -> None:
        """A start says from where it goes on: the newest whole checkpoint, and what is damaged before it."""
        said = self.run.said()
        going_on = [line for line in said.splitlines() if line.startswith("going on from ")]
        if going_on and not (expected and going_on[0].startswith(f"going on from {expected} ")):
            raise Broken(f"it says {going_on[0]!r}, and the newest whole checkpoint is {expected}")
        if expected and not going_on and self.run.touched(self.run.output / "plan.json"):
            raise Broken(f"it goes on from {expected} and does not say so")
        if going_on:
            for path, file in self.damaged.items():
                if not any(f"'{path}' is damaged" in line and file in line for line in said.splitlines()):
                    raise Broken(f"it does not say that {file} of '{path}' is damaged\n{self.run.tail()}")
        if (aside := set(self.run.output.glob("checkpoints/*/damaged-*"))) != self.aside:
            self.aside, self.damaged = aside, {}

    def check_remains(self) -> None:
        """What counts as whole is what the undisturbed run had there, a kill alone damages nothing, and `status` sees it so."""
        there = micro.whole(self.run.output)
        for position, path in there.items():
            self.tally.compared += 1
            if micro.digest(path) != self.reference.digests[position]:
                raise Broken(f"'{path}' is whole and holds other arrays than the undisturbed run had there")
        if not (self.run.output / "plan.json").exists():
            return
        seen = status(self.run.output, verify=True)
        if seen["checkpoint"] != (str(max(there.items())[1]) if there else None):
            raise Broken(f"status takes {seen['checkpoint']} as the newest whole checkpoint of {[str(path) for path in there.values()]}")
        if set(seen["damaged"]) != {str(path) for path in self.damaged}:
            raise Broken(f"status finds {seen['damaged']}, damaged were {self.damaged}")

    def damage(self, generator: np.random.Generator) -> None:
        """Damage one random file of the newest checkpoint, where there is one before it to fall back to."""
        there = micro.whole(self.run.output)
        if len(there) < 2 or self.damaged:
            return
        newest = max(there.items())[1]
        if manifest.mark(newest).exists():  # a manifest that is damaged then is that of a save that was killed
            return
        files = sorted(path for path in newest.rglob("*") if path.is_file())
        file = files[generator.integers(len(files))]
        content = file.read_bytes()
        way = generator.choice(["truncated", "flipped", "zeroed", "deleted"]) if any(content) else "deleted"
        if way == "deleted":
            file.unlink()
        else:
            at = int(generator.integers(len(content)))
            flipped = content[:at] + bytes([content[at] ^ 1 << int(generator.integers(8))]) + content[at + 1 :]
            file.write_bytes({"truncated": content[: len(content) // 2], "flipped": flipped, "zeroed": bytes(len(content))}[way])
        self.damaged[newest] = file.name
        self.tally.damages += 1


def whole_or_base(run: Run) -> Path | None:
    """The newest whole checkpoint; None where a start begins with the base."""
    there = micro.whole(run.output)
    return max(there.items())[1] if there else None


def kill_share(number: int, kills: int, seed: int, references: dict[str, Reference], work: Path) -> Tally:
    """Kill one run so many times, and let it end; where it ended too early, another one for the rest."""
    generator, tally = np.random.default_rng([seed, number]), Tally()
    kinds = [str(kind) for kind in generator.permutation([DECK[(number * kills + i) % len(DECK)] for i in range(kills)])]
    state = ("reset", "keep")[number % 2]
    rows, warm = references[state].output.parents[1] / "rows.jsonl", references[state].output.parents[1] / "cache"
    while kinds:
        if tally.folders > kills:
            tally.broken.append(f"run {number}: {len(kinds)} moments never came: {kinds}")
            break
        folder = work / f"run-{number:03}.{tally.folders}"
        tally.folders += 1
        cold = number % 7 == 3  # compiles of its own, which are killed as they are made and written
        run = Run(folder, rows, folder / "cache" if cold else warm, state, save_steps=(2, 5, 10)[number % 3])
        killed, begun, left = Killed(run, references[state], tally), time.monotonic(), len(kinds)
        try:
            for moment in deal(kinds, generator):
                if not killed.dies(moment):
                    break
                kinds.remove(moment.kind)
                if number % 5 == 1 and generator.uniform() < 0.3:
                    killed.damage(generator)
            else:
                expected = whole_or_base(run)
                run.must_end()
                killed.check_start(expected)
            if found := micro.differences(run.output, references[state].output):
                raise Broken("; ".join(found))
        except Exception as error:  # whatever it is, the other runs go on
            tally.broken.append(f"run {number} (--seed {seed} --only {number}), kept in '{folder}': {type(error).__name__}: {error}")
            print(f"BROKEN {tally.broken[-1]}", flush=True)
            break
        shutil.rmtree(folder)
        about = f"optimizer {state}, save_steps {run.save_steps}{', own cache' if cold else ''}"
        print(f"run {number:3}.{tally.folders - 1} ({about}): {left - len(kinds)} kills, ended equal, {time.monotonic() - begun:.0f} s", flush=True)
    return tally


def make_references(work: Path) -> dict[str, Reference]:
    """The undisturbed runs of both policies; `rows.jsonl` and the cache of compiled code lie beside them."""
    rows = micro.hundred_rows(work)
    made = {state: micro.reference(work, rows, work / "cache", state) for state in ("reset", "keep")}
    for one in made.values():
        if found := micro.ledger_faults(one.output):
            raise Broken(f"undisturbed: {'; '.join(found)}")
    # what a process takes that finds everything compiled, and with nothing of ours in it
    plain = Run(work / "plain", rows, work / "cache", "keep")
    life = micro.timed(plain)
    if found := micro.differences(plain.output, made["keep"].output):
        raise Broken(f"two undisturbed runs differ: {'; '.join(found)}")
    return {state: dataclasses.replace(one, life=life) for state, one in made.items()}


def kill_all(n: int, runs: int, seed: int, jobs: int, work: Path, references: dict[str, Reference], only: int | None = None) -> Tally:
    """`n` kills over at least so many runs, two or more of them at a time."""
    shares = [n // runs + (number < n % runs) for number in range(runs)]
    chosen = [(number, share) for number, share in enumerate(shares) if share and only in (None, number)]
    with ThreadPoolExecutor(jobs) as pool:
        tallies = list(pool.map(lambda item: kill_share(*item, seed, references, work), chosen))
    total = Tally()
    for tally in tallies:
        total.kills += tally.kills
        total.broken += tally.broken
        total.folders, total.damages, total.compared = total.folders + tally.folders, total.damages + tally.damages, total.compared + tally.compared
    return total


def table(kills: Counter[tuple[str, str]]) -> str:
    """Kills by what was waited for (down) and what the process was at when it died (across)."""
    cells = [["", *FOUND, "kills"]]
    cells += [[kind, *(str(kills[kind, found]) for found in FOUND), str(sum(kills[kind, found] for found in FOUND))] for kind in DELAY]
    cells += [["all", *(str(sum(kills[kind, found] for kind in DELAY)) for found in FOUND), str(kills.total())]]
    return "\n".join("  ".join([row[0].ljust(10), *(cell.rjust(10) for cell in row[1:])]) for row in cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=300, help="kills that must happen")
    parser.add_argument("--runs", type=int, default=20, help="runs over which they are spread, at the least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--only", type=int, default=None, metavar="RUN", help="this run alone, with the moments that it has among all")
    parser.add_argument("--work", type=Path, default=None, help="an empty folder to work in, kept; otherwise a temporary one, kept where a law was broken")
    options = parser.parse_args(argv)
    begun = time.monotonic()
    with micro.workplace(options.work, "kills-") as (work, broken):
        references = make_references(work)
        life = references["keep"].life
        steps = sum(references["keep"].steps)
        print(f"in '{work}': undisturbed, {steps} steps, {life.whole:.1f} s ({life.plan:.1f} s to the plan, {life.first:.1f} s to the first step)", flush=True)
        tally = kill_all(options.n, options.runs, options.seed, options.jobs, work, references, options.only)
        broken += tally.broken
        print(f"\n{table(tally.kills)}\n")
        print(f"{tally.kills.total()} kills in {tally.folders} runs, {tally.damages} files damaged, {tally.compared} checkpoints compared", end="")
        print(f", {len(broken)} broken, {time.monotonic() - begun:.0f} s (seed {options.seed})", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    raise SystemExit(main())

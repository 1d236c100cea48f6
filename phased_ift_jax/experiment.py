"""Arms x seeds of one run, one report, and what the gain is made of:  python -m phased_ift_jax.experiment CONFIG [--plan] [--shard I/N] [--KEY VALUE ...]

  experiment configs/experiments/stories260k_alpaca.yaml --plan                    the grid, budgets side by side, time and cost
  experiment configs/experiments/stories260k_alpaca.yaml                           train, answer and judge what is missing, then report
  experiment configs/experiments/stories260k_alpaca.yaml --shard 0/2               every second cell: another host has --shard 1/2, on the same folder

Each cell (an arm with a seed) is trained in a process of its own. The same command again goes on where it stopped and skips what is done; whoever finds all
cells done judges and reports. --KEY VALUE changes a key of the run that all arms are made from (--output_dir that of the experiment), --evaluation.judging.KEY
who judges. Exit codes: those of train; 1 where a cell has failed (the others are trained all the same).
"""

from __future__ import annotations

import ctypes
import json
import math
import signal
import subprocess
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phased_ift_jax import arms, cli
from phased_ift_jax.arms import Cell, Experiment
from phased_ift_jax.files import write_whole
from phased_ift_jax.interrupts import STOPPED, Stop, Stopped, listening
from phased_ift_jax.processes import DIED_WITH_PARENT
from phased_ift_jax.records import Failure, UserError

if TYPE_CHECKING:
    from phased_ift_jax.training.survey import Survey

HOST = {"data": 1, "fsdp": 1, "tensor": 1}  # a mesh of one device: rows, steps and budgets do not depend on it


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="experiment", description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="YAML of an experiment, such as configs/experiments/stories260k_alpaca.yaml")
    parser.add_argument("--plan", action="store_true", help="show the grid, what each arm trains, time and cost; nothing is trained or written")
    parser.add_argument("--usd_per_hour", type=float, metavar="USD", help="price of the machine, to say what is left will cost (with --plan)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="train every Nth cell only, from the Ith (from 0): one of several hosts")
    parser.add_argument("--report_only", action="store_true", help="train and ask nothing; report on the cells that are done")
    for key, field in arms.Judging.model_fields.items():
        parser.add_argument(f"--{arms.JUDGING}{key}", metavar="VALUE", help=f"{field.description} [the config's]")
    options, overrides = cli.parse_with_keys(parser, argv)
    overrides += [(key, value) for key, value in vars(options).items() if key.startswith(arms.JUDGING) and value is not None]
    shard = _shard(options.shard)
    if options.usd_per_hour is not None and not (options.plan and 0 < options.usd_per_hour < math.inf):
        raise UserError(f"--usd_per_hour: {options.usd_per_hour} is no price, or there is no --plan to tell it")
    if options.plan and options.report_only:
        raise UserError("--plan and --report_only: give one of the two")
    experiment = arms.load(options.config, overrides)
    with listening() as stop:
        stop.farewell = "stopped; the same command goes on"
        phased = _phased(experiment)
        experiment = arms.resolved(experiment, phased)
        if options.plan:
            print(_plan(experiment, options.usd_per_hour))
            return 0
        try:
            return _run(experiment, shard, options.report_only, stop)
        except Stopped:
            print(stop.farewell, flush=True)
            return STOPPED


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError(f"--shard: {text!r} is not I/N with I from 0 to N - 1, such as 0/2")
    return int(index), int(count)


def _phased(experiment: Experiment) -> arms.Phased:
    from phased_ift_jax.training.survey import survey

    found = survey(experiment.base, HOST)
    data, trained = found.dataset, {int(row) for phase in found.dataset.phases for row in phase.rows}
    lengths = found.plan.phases[0].response_lengths[sorted(trained)]
    steps = sum(len(phase.steps) for phase in found.plan.phases)
    return arms.Phased(len(data.bin_names), [len(phase.rows) for phase in data.phases], steps, lengths, len(trained) == int((~data.held_out).sum()))


# --- what is done already ------------------------------------------------------------------------------------------------------------


def _trained(experiment: Experiment, cell: Cell) -> bool:
    """Whether a cell's run is over: trained, measured, exported; raises `UserError` where what lies there is another run."""
    from phased_ift_jax.training.output import check_output
    from phased_ift_jax.training.status import status

    if (cell.run / "config.yaml").exists():
        check_output(arms.run_of(experiment, cell), look=False)
    if not (cell.run / "plan.json").exists():
        return False
    facts = status(cell.run)
    return facts["next_start"] == "finds nothing left to do" and (facts["phases"][-1]["evaluated"] or not experiment.base.data.eval_size)


def _answered(experiment: Experiment, cell: Cell) -> bool:
    return experiment.evaluation is None or (cell.folder / "answers.jsonl").exists()


def _judged(experiment: Experiment, cell: Cell) -> bool:
    """Whether every pair was judged or cannot be: the card is written last."""
    if not (experiment.evaluation and experiment.evaluation.judging) or cell.arm == experiment.evaluation.baseline:
        return True
    card = cell.folder / "judgments.card.json"
    return card.exists() and not json.loads(card.read_text(encoding="utf-8"))["orders"].get("failed")


# --- doing it ------------------------------------------------------------------------------------------------------------------------


def _run(experiment: Experiment, shard: tuple[int, int], report_only: bool, stop: Stop) -> int:
    from phased_ift_jax import config

    cells, failed = experiment.cells, []
    trained = {cell for cell in cells if _trained(experiment, cell)}  # before anything is written: what lies there may be another experiment's
    try:
        experiment.folder.mkdir(parents=True, exist_ok=True)
        _write(experiment.folder / "experiment.yaml", arms.dump(experiment))
    except OSError as error:
        raise UserError(f"output_dir: cannot write '{experiment.folder}': {error.strerror}; name another folder") from None
    for number, cell in enumerate(cells):
        if report_only or number % shard[1] != shard[0]:
            continue
        told = f"{number + 1}/{len(cells)} {cell.name}"
        if cell not in trained:
            cell.folder.mkdir(parents=True, exist_ok=True)
            _write(cell.folder / "run.yaml", config.dump(arms.run_of(experiment, cell)))
            print(f"{told}: training", flush=True)
            if not _child(stop, cell, "train", str(cell.folder / "run.yaml")):
                failed.append(f"{cell.name}/train.log")
                continue
        if not _answered(experiment, cell):
            print(f"{told}: answering", flush=True)
            if not _child(stop, cell, "generate", *_asked(experiment, cell)):
                failed.append(f"{cell.name}/generate.log")
    if failed:
        raise Failure(f"{len(failed)} of {len(cells)} cells have failed, which the same command tries again; why is in {', '.join(failed)} of '{experiment.folder}'")
    done = [cell for cell in cells if _trained(experiment, cell) and _answered(experiment, cell)]
    if len(done) < len(cells) and not report_only:
        print(f"{len(done)} of {len(cells)} cells are done; whoever is last reports")
        return 0
    for cell in done:
        if not (report_only or _judged(experiment, cell)):
            print(f"{cell.name}: judging", flush=True)
            if not _child(stop, cell, "judge", *_put_to_judge(experiment, cell)):
                raise Failure(f"{cell.name} was not judged; why is in '{cell.folder / 'judge.log'}'")
    _report(experiment, done)
    return 0


def _child(stop: Stop, cell: Cell, verb: str, *words: str) -> bool:
    """Run a verb to its end, whose words go to VERB.log; whether it did it all. A request to stop is passed on, and waited for.

    Raises:
        Stopped: it was asked to stop, or has come to the end of its budget.
        UserError: it refuses its input, in its words.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    log = cell.folder / f"{verb}.log"
    with open(log, "ab") as file:
        begin = file.tell()
        stop.began()
        child = subprocess.Popen(
            [sys.executable, "-m", f"phased_ift_jax.{verb}", *words],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            preexec_fn=None if libc is None else lambda: libc.prctl(DIED_WITH_PARENT, signal.SIGKILL),  # nothing goes on behind the back of a next start
        )
        stop.tell = lambda why, leaves: child.terminate()
        if stop:
            child.terminate()
        code = child.wait()
        stop.tell = None
    stop.saved()
    with open(log, "rb") as file:
        file.seek(begin)
        said = file.read().decode(errors="replace").splitlines()
    if code == STOPPED:
        print(next((line for line in reversed(said) if line), ""))
        raise Stopped
    if code == 2:
        raise UserError("\n".join(f"{cell.name}: {line.removeprefix('error: ')}" for line in said if line.startswith("error: ")) or f"{cell.name}: {verb} refuses; see '{log}'")
    if code:
        print(f"{cell.name}: {verb} has failed with exit code {code}; see '{log}'", flush=True)
    return code == 0


def _asked(experiment: Experiment, cell: Cell) -> list[str]:
    asked = experiment.evaluation
    assert asked
    limits = {"max_new_tokens": asked.max_new_tokens, "max_length": asked.max_length, "batch_size": asked.batch_size}
    return ["--model", str(cell.run), "--prompts", *asked.prompts, "--out", str(cell.folder / "answers.jsonl"), *_flags(limits)]


def _put_to_judge(experiment: Experiment, cell: Cell) -> list[str]:
    asked = experiment.evaluation
    assert asked
    assert asked.judging
    of = [Cell(name, cell.seed, experiment.folder / name / f"seed{cell.seed}").folder / "answers.jsonl" for name in (cell.arm, asked.baseline)]
    return [*map(str, of), "--out", str(cell.folder / "judgments.jsonl"), *_flags(asked.judging.model_dump())]


def _flags(values: dict[str, Any]) -> list[str]:
    given = {name: value for name, value in values.items() if value not in (None, ())}
    return [word for name, value in given.items() for word in (f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)]))]


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


def _report(experiment: Experiment, done: Sequence[Cell]) -> None:
    from phased_ift_jax.evaluation import attribution
    from phased_ift_jax.evaluation.judgments import read_judgments
    from phased_ift_jax.evaluation.page import render
    from phased_ift_jax.evaluation.report import gather

    if not done:
        raise UserError(f"--report_only: no cell in '{experiment.folder}' is done")
    order = sorted(done, key=lambda cell: list(experiment.arms).index(cell.arm))
    names = {f"{cell.name}/run": cell.arm for cell in order}
    sheets: dict[str, dict[int, Path]] = {}
    for cell in order:
        if (path := cell.folder / "judgments.jsonl").exists() and _judged(experiment, cell):
            sheets.setdefault(cell.arm, {})[cell.seed] = path
    first = [cell.folder / "answers.jsonl" for cell in order if experiment.evaluation and cell.seed == experiment.seeds[0]]
    found = gather([(f"{cell.name}/run", cell.run) for cell in order], [list(of.values()) for of in sheets.values()], first, named=names)
    judged = {arm: {seed: read_judgments(path, "") for seed, path in of.items()} for arm, of in sheets.items()}
    told = attribution.of_report(found, judged, experiment.evaluation.baseline if experiment.evaluation else "one_off")
    found |= {"attribution": told, "words": told["words"]}
    texts = {"attribution.json": json.dumps(told, indent=1) + "\n", "report.json": json.dumps(found, indent=1) + "\n", "report.html": render(found)}
    for name, text in texts.items():
        _write(experiment.folder / name, text)
    print("\n".join(told["words"]) + f"\n\n{experiment.folder / 'report.html'}; its numbers: report.json and attribution.json beside it")


# --- before it is done ---------------------------------------------------------------------------------------------------------------


def _plan(experiment: Experiment, usd_per_hour: float | None) -> str:
    """What each arm trains (of its first seed; the others' budgets are alike), what differs from the first arm's, and what is left to do."""
    from phased_ift_jax.evaluation.statistics import ALIKE
    from phased_ift_jax.training.survey import survey

    surveys = {name: survey(arms.run_of(experiment, next(cell for cell in experiment.cells if cell.arm == name)), HOST) for name in experiment.arms}
    ledgers = {name: found.plan.ledger() for name, found in surveys.items()}
    (first, reference), *_ = ledgers.items()
    rows: list[list[object]] = [["arm", "phases", *(measure.replace("_", " ") for measure in reference)]]
    notes = []
    for name, ledger in ledgers.items():
        unlike = {measure: value / reference[measure] - 1 for measure, value in ledger.items() if abs(value - reference[measure]) > ALIKE * reference[measure]}
        notes += [f"note: {name} differs from {first}: " + ", ".join(f"{measure.replace('_', ' ')} {share:+.1%}" for measure, share in unlike.items())] if unlike else []
        rows.append([name, _phases(surveys[name]), *(f"{v:,.4g}" if isinstance(v, float) else f"{v:,}" for v in ledger.values())])
    left = [cell for cell in experiment.cells if not _trained(experiment, cell)]
    seeds = ", ".join(map(str, experiment.seeds))
    grid = f"grid: {len(experiment.arms)} arms x {len(experiment.seeds)} seeds ({seeds}) = {len(experiment.cells)} cells, {len(left)} of them left to train"
    return "\n".join([cli.table(rows), "", *notes, grid, _time(experiment, left, {name: ledger["tokens"] for name, ledger in ledgers.items()}, usd_per_hour)])


def _phases(found: Survey) -> str:
    return ", ".join(f"{phase.phase.name} {len(phase.phase.rows):,}" for phase in found.plan.phases)


def _time(experiment: Experiment, left: Sequence[Cell], tokens: dict[str, float], usd_per_hour: float | None) -> str:
    """Seconds for what is left, by the speed of cells that are done here, else by the one that the experiment names."""
    from phased_ift_jax.training.goodput import goodput

    ended = [(cell, good) for cell in experiment.cells if cell not in left and (good := goodput(cell.run, (10**9, 0))) and good["ended"] and good["starts"] == 1]
    speed = sum(tokens[cell.arm] for cell, _ in ended) / sum(good["wall_seconds"] for _, good in ended) if ended else experiment.tokens_per_second
    if not speed:
        return "time: not known; it is told from the first cell that is done, or from tokens_per_second, if the experiment has it"
    seconds = sum(tokens[cell.arm] for cell in left) / speed
    source = f"measured over {len(ended)} cells here" if ended else "tokens_per_second of the experiment"
    cost = f", ${seconds / 3600 * usd_per_hour:,.2f} at ${usd_per_hour:g} an hour" if usd_per_hour else ""
    speed_said = f"{speed:,.0f} tokens a second, start and evaluation included ({source})"
    return f"time: about {timedelta(seconds=round(seconds))} for what is left to train, one cell after another{cost}; by {speed_said}"


if __name__ == "__main__":
    cli.run(main)

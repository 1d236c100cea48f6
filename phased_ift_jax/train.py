"""Train a model in phases of rising difficulty:  python -m phased_ift_jax.train CONFIG [--training.learning_rate 1e-5 ...]

The same command again goes on where it stopped. Exit codes: 0 done, 1 a failure inside, 2 the input is at fault, 75 stopped on request.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from phased_ift_jax import cli, processes
from phased_ift_jax.interrupts import STOPPED, Stop, Stopped, hold, listening, unbroken
from phased_ift_jax.object_store import SCHEME
from phased_ift_jax.records import UserError
from phased_ift_jax.xla_flags import AGAIN, lasting_memory, set_flags

if TYPE_CHECKING:
    from phased_ift_jax.config import RunConfig
    from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
    from phased_ift_jax.training.held_out import Evaluation


def main(argv: Sequence[str]) -> int:
    """Parse, prepare, print the plan, train, print what was learnt and forgotten."""
    with listening() as stop, unbroken():  # before anything heavy is imported: a machine may be taken away at once
        from phased_ift_jax import compilation_cache

        run_config, fresh, profile = parse(argv)
        flags = set_flags(run_config.training.deterministic)
        compiled = compilation_cache.choose(run_config.output_dir, processes.several())
        try:
            with processes.joined(stop):
                _train(run_config, fresh, profile, flags, compiled, stop)
        except Stopped:
            print(stop.farewell, flush=True)
            return STOPPED
    return 0


def before() -> None:
    """In a process of its own."""
    hold()  # reading the config takes a while, and so does starting again
    if AGAIN not in os.environ:
        lasting_memory(parse(cli.underscored(sys.argv[1:]))[0].model.model_name_or_path)
    processes.supervise()


def _train(run_config: RunConfig, fresh: bool, profile: tuple[int, int] | None, flags: list[str], compiled: Path | None, stop: Stop) -> None:
    from phased_ift_jax import compilation_cache
    from phased_ift_jax.config import dump
    from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
    from phased_ift_jax.training import loop  # jax and what it brings: not before the command line is known to be sound
    from phased_ift_jax.training.output import begin_afresh
    from phased_ift_jax.training.survey import describe

    processes.check_same("the command line", json.dumps([dump(run_config), fresh, profile]))
    run = loop.prepare(run_config, fresh)
    if run_config.output_dir.startswith(SCHEME):
        importlib.import_module("phased_ift_jax.training.gs_path")  # where JAX finds its way to what it has compiled
    steps = sum(len(phase.steps) for phase in run.plan.phases)
    if profile and profile[1] > steps:
        raise UserError(f"--profile: the run has {steps} steps, {profile[0]}:{profile[1]} goes beyond them")
    if fresh:
        if before := processes.agree(lambda: str(begin_afresh(run_config) or "")):
            print(f"the run that was in '{run_config.output_dir}' is now in '{before}'", flush=True)
        stop.farewell = "stopped with everything saved; the same command without --fresh goes on"
    device = run.mesh.devices.flat[0]
    told = [describe(run, device.device_kind), *(f"flags   {line}" for line in flags), f"cache   {compilation_cache.ready(compiled)}"]
    print("\n".join(told), flush=True)
    results = Results(ForgettingMatrix(run.output / "forgetting.json"))
    loop.train(run, results, stop, profile)
    for measure, form in (("loss", ".3f"), ("exact_match", ".1%")):
        if rows := results.matrix.table(measure, form):
            print("\n" + cli.table(rows))
    for name, answers in results.last.answers.items() if results.last else ():
        for answer in answers[: run_config.evaluation.show_answers]:
            print(f"\n{name}: {answer.prompt}\n  expected {answer.response!r}\n  answered {answer.answer!r}")
    print(f"\ndone: {run.last_export} loads with transformers.AutoModelForCausalLM", flush=True)
    if run_config.output_dir.startswith(SCHEME):
        print(f"all of it lies in {run_config.output_dir}")
    if address := processes.agree(lambda: loop.publish(run)):
        print(f"uploaded: {address}")


class Results:
    """The forgetting matrix of a run, and what is said when a row is added; `last` is what was measured last."""

    def __init__(self, matrix: ForgettingMatrix) -> None:
        self.matrix = matrix
        self.last: Evaluation | None = None

    def __contains__(self, after: object) -> bool:
        return after in self.matrix

    def add(self, after: str, evaluation: Evaluation) -> None:
        from phased_ift_jax.evaluation.forgetting import exact_match

        self.last = evaluation
        matches = {name: exact_match([(a.response, a.answer) for a in answers]) for name, answers in evaluation.answers.items()}
        answers = [{"bin": name} | asdict(answer) for name, answers in evaluation.answers.items() for answer in answers]
        self.matrix.add(after, answers, loss=evaluation.losses, exact_match=matches)
        shown = [f"{name} {loss:.3f}" + (f" ({matches[name]:.0%} right)" if matches else "") for name, loss in evaluation.losses.items()]
        print(f"{'before training' if after == 'base' else f'after {after}'}, held-out loss: {', '.join(shown)}", flush=True)

    def drop(self, after: str) -> None:
        self.matrix.drop(after)


def parse(argv: Sequence[str]) -> tuple[RunConfig, bool, tuple[int, int] | None]:
    from phased_ift_jax import config

    usage = "python -m phased_ift_jax.train CONFIG [--fresh] [--profile START:STOP] [--KEY VALUE ...]"
    parser = cli.Parser(prog="phased_ift_jax.train", usage=usage, description=__doc__)
    parser.add_argument("config", metavar="CONFIG", help="YAML of one run, such as configs/quickstart.yaml")
    parser.add_argument("--fresh", action="store_true", help="start at zero; a run that is in output_dir is renamed, not removed")
    parser.add_argument("--profile", metavar="START:STOP", help="trace these optimizer steps of the run (from 0) for xprof")
    options, overrides = cli.parse_with_keys(parser, argv)
    return config.load(options.config, overrides), options.fresh, _profile(options.profile)


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise UserError(f"--profile: {text!r} is not START:STOP, such as 10:15")
    return int(start), int(stop)


if __name__ == "__main__":
    cli.run(main, before=before)

"""Train a model in phases of rising difficulty:  python -m phased_ift_jax.train CONFIG [--training.learning_rate 1e-5 ...]

The same command again goes on where it stopped. Exit codes: 0 done, 1 a failure inside, 2 the input is at fault, 75 stopped on request.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import TYPE_CHECKING

from phased_ift_jax import cli, config
from phased_ift_jax.object_store import SCHEME
from phased_ift_jax.records import UserError

if TYPE_CHECKING:
    from phased_ift_jax.training.loop import Run


def main(argv: Sequence[str]) -> int:
    """Parse, prepare, print the plan, train, print what was learnt and forgotten."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    _refuse_unknown(parser, rest)
    overrides = [(key, value) for key, value in vars(options).items() if key not in ("config", "profile", "fresh")]
    run_config = config.load(options.config, overrides)
    profile = _profile(options.profile)

    from phased_ift_jax.evaluation.forgetting import ForgettingMatrix, exact_match
    from phased_ift_jax.training import loop  # jax and what it brings: not before the command line is known to be sound
    from phased_ift_jax.training.output import begin_afresh

    run = loop.prepare(run_config, options.fresh)
    steps = sum(len(phase.steps) for phase in run.plan.phases)
    if profile and profile[1] > steps:
        raise UserError(f"--profile: the run has {steps} steps, {profile[0]}:{profile[1]} goes beyond them")
    if options.fresh and (before := begin_afresh(run_config)):
        print(f"the run that was in '{run_config.output_dir}' is now in '{before}'", flush=True)
    print(describe(run), flush=True)
    matrix = ForgettingMatrix(run.output / "forgetting.json")
    last: loop.Evaluation | None = None

    def report(after: str, evaluation: loop.Evaluation) -> None:
        nonlocal last
        last = evaluation
        matches = {name: exact_match([(a.response, a.answer) for a in answers]) for name, answers in evaluation.answers.items()}
        matrix.add(after, loss=evaluation.losses, exact_match=matches)
        shown = [f"{name} {loss:.3f}" + (f" ({matches[name]:.0%} right)" if matches else "") for name, loss in evaluation.losses.items()]
        print(f"{'before training' if after == 'base' else f'after {after}'}, held-out loss: {', '.join(shown)}", flush=True)

    try:
        loop.train(run, report, matrix.__contains__, profile)
    except loop.Stopped:
        print("stopped with everything saved; the same command" + (" without --fresh" if options.fresh else "") + " goes on", flush=True)
        return cli.STOPPED
    for measure, form in (("loss", ".3f"), ("exact_match", ".1%")):
        if rows := matrix.table(measure, form):
            print("\n" + cli.table(rows))
    if last is not None:
        for name, answers in last.answers.items():
            for answer in answers[: run_config.evaluation.show_answers]:
                print(f"\n{name}: {answer.prompt}\n  expected {answer.response!r}\n  answered {answer.answer!r}")
    print(f"\ndone: {run.last_export} loads with transformers.AutoModelForCausalLM", flush=True)
    if run.config.output_dir.startswith(SCHEME):
        print(f"all of it lies in {run.config.output_dir}")
    if address := loop.publish(run):
        print(f"uploaded: {address}")
    return 0


def describe(run: Run) -> str:
    """What will be trained, in tables: rows by bin, phases, row shapes, budget, and the policy between phases."""
    data, plan, curriculum = run.dataset, run.plan, run.config.curriculum
    binless = data.rows_read - sum(count.read for count in data.counts)
    truncated = sum(count.truncated for count in data.counts)
    bins = [["bin", "rows", "used", "truncated", "quarantined", "held out"]]
    bins += [[c.name, c.read, c.used, c.truncated, c.quarantined, c.held_out] for c in data.counts]  # type: ignore[list-item]
    phases = [["phase", "rows", "epochs", "steps", "tokens", "response tokens", "lr first", "lr peak", "lr last"]]
    for row in plan.rows():
        rates = [f"{row[name]:.3g}" for name in ("lr_first", "lr_peak", "lr_last")]
        phases.append([row["phase"], row["rows"], row["epochs"], row["steps"], f"{row['tokens']:,}", f"{row['response_tokens']:,}", *rates])  # type: ignore[list-item]
    ledger = plan.ledger()
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    lines = [
        f"model   {run.folder.path} ({run.config.model.init}), {run.config.model.dtype} over {run.config.model.param_dtype}, attention {run.attention}",
        f"mesh    {mesh} on {run.mesh.devices.flat[0].device_kind}",
        f"data    {data.rows_read} rows read = {data.rows_read - len(data.quarantined) - truncated} used whole + {truncated} truncated + {len(data.quarantined)} quarantined"
        + (f" ({binless} of them in no bin)" if binless else ""),
        "",
        cli.table(bins),
        "",
        cli.table(phases),
        "",
        *(f"rows    {s.rows} a step, of {', '.join(map(str, s.lengths))} tokens{' (packed)' if s.packed else ' (one example each)'}" for s in plan.all_shapes),
        f"between phases: weights go on, optimizer {curriculum.optimizer_state}, schedule {'restarts' if curriculum.restarts_schedule else 'continues'}",
        f"budget  {ledger['examples']:,} examples, {ledger['response_tokens']:,} response tokens, {ledger['optimizer_steps']:,} steps, "
        f"sum of learning rates {ledger['sum_of_learning_rates']:.4g}, {ledger['flops']:.3g} FLOPs",
    ]
    if curriculum.arm == "one_off" and any(phase.overrides or phase.replay for phase in curriculum.phases or ()):
        lines.append("note    one_off trains with the settings of `training`: overrides and replay of `curriculum.phases` belong to phases")
    return "\n".join(lines)


def _parser() -> cli.Parser:
    usage = "python -m phased_ift_jax.train CONFIG [--fresh] [--profile START:STOP] [--KEY VALUE ...]"
    parser = cli.Parser(prog="phased_ift_jax.train", usage=usage, description=__doc__, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", metavar="CONFIG", help="YAML of one run, such as configs/quickstart.yaml")
    parser.add_argument("--fresh", action="store_true", default=False, help="start at zero; a run that is in output_dir is renamed, not removed")
    parser.add_argument("--profile", metavar="START:STOP", default=None, help="trace these optimizer steps of the run (from 0) for xprof")
    keys = parser.add_argument_group("keys of the configuration, each of which may be given as a flag with a YAML value")
    for key, default, description in config.fields():
        keys.add_argument(f"--{key}", metavar="VALUE", help=f"{description} [{default}]".replace("%", "%%"))
    # its keys exclude each other, so that one of them alone could not be overridden
    keys.add_argument("--curriculum.bins", metavar="MAPPING", help="all of curriculum.bins at once, such as '{by: length, quantiles: [0.5]}'")
    return parser


def _refuse_unknown(parser: cli.Parser, rest: list[str]) -> None:
    if not rest:
        return
    if not rest[0].startswith("--"):
        raise UserError(f"{parser.prog}: what is {rest[0]!r}? One CONFIG is expected, then flags such as --training.learning_rate 1e-5")
    key = rest[0][2:].partition("=")[0]
    known = [name for name, _, _ in config.fields()] + ["profile", "fresh"]
    section, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    if siblings:
        raise UserError(config.unknown_key_message(last, siblings, f"{section}." if section else ""))
    near = difflib.get_close_matches(key, known, n=1)
    raise UserError(f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; --help lists all"))


def _profile(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, colon, stop = text.partition(":")
    if not (colon and start.isdigit() and stop.isdigit() and int(start) < int(stop)):
        raise UserError(f"--profile: {text!r} is not START:STOP, such as 10:15")
    return int(start), int(stop)


if __name__ == "__main__":
    cli.run(main)

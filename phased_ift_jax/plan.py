"""What a run will do, before it does it:  python -m phased_ift_jax.plan CONFIG... [--topology v5e:4x4] [--show 3] [--json] [--KEY VALUE ...]

Reads data, tokenizer and the model's sizes, no weights, and writes nothing: rows and bins, phases, steps, learning rates, packed shapes,
parameters, FLOPs, bytes of disk; of several configs the budgets side by side; and what a doctor would warn of. With --topology the train
step is compiled for TPUs that need not be here (a minute or two): whether it fits, what it sends, a roofline, and what would make it fit.
Exit code 2 where the run cannot do.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from phased_ift_jax import cli
from phased_ift_jax.records import UserError

if TYPE_CHECKING:
    from phased_ift_jax.training.survey import Survey

DIM, BRIGHT, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
ALIKE = 0.01  # difference of budgets above which two arms are no fair comparison


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="plan", description=__doc__)
    parser.add_argument("configs", nargs="+", metavar="CONFIG", help="YAML of a run; of several, budgets are compared")
    parser.add_argument("--devices", type=int, metavar="N", help="plan for so many devices, taken to be TPUs or GPUs, instead of those of this machine")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="compile for these TPUs: v4, v5e, v5p or v6e, such as v5e:4x4 or v5p:2x2x4")
    parser.add_argument("--num_slices", type=int, default=1, metavar="N", help="so many slices of that topology; mesh.data goes over them")
    parser.add_argument("--usd_per_chip_hour", type=float, metavar="USD", help="price of a chip for an hour, to say what the run costs at least")
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print N examples of each phase; what is trained is bright, or in [ ] where there are no colours")
    parser.add_argument("--json", action="store_true", help="print one JSON object, as docs/formats.md says, instead of tables")
    options, overrides = cli.parse_with_keys(parser, argv)

    from phased_ift_jax import config
    from phased_ift_jax.training import topology as topologies

    target = topologies.topology_of(options.topology, options.num_slices) if options.topology else None
    if target is None and (options.num_slices != 1 or options.usd_per_chip_hour is not None):
        raise UserError("--num_slices and --usd_per_chip_hour go with --topology")
    if options.usd_per_chip_hour is not None and not 0 < options.usd_per_chip_hour < float("inf"):
        raise UserError(f"--usd_per_chip_hour: {options.usd_per_chip_hour} is no price")
    if target and options.devices:
        raise UserError("--devices: the topology says how many; leave one of the two out")

    from phased_ift_jax.sharding import mesh_sizes
    from phased_ift_jax.training.doctor import examine
    from phased_ift_jax.training.survey import describe, facts, survey

    for name, least in (("devices", 1), ("show", 0)):
        if (given := vars(options)[name]) is not None and given < least:
            raise UserError(f"--{name}: {given} is less than {least}")
    where = str(target or (f"{options.devices} devices" if options.devices else "this machine"))
    surveys, findings, fitted = [], [], []
    for path in options.configs:
        loaded = config.load(path, overrides)
        devices, platform = (len(target.devices), "tpu") if target else (options.devices, None) if options.devices else _devices()
        surveys.append(survey(loaded, mesh_sizes(loaded.mesh, devices), platform))
        findings.append(examine(surveys[-1]))
        if target:
            compiled, found = topologies.examine(surveys[-1], target, options.usd_per_chip_hour, lambda line: print(line, file=sys.stderr, flush=True))
            fitted.append(compiled)
            findings[-1] += found
    if options.json:
        told = [facts(run) | {"findings": [vars(finding) for finding in found]} for run, found in zip(surveys, findings, strict=True)]
        print(json.dumps({"runs": [run | ({"topology": fitted[number]} if target else {}) for number, run in enumerate(told)]}))
    else:
        for number, (path, run, found) in enumerate(zip(options.configs, surveys, findings, strict=True)):
            print(("\n" if number else "") + (f"{path}\n" if len(surveys) > 1 else "") + describe(run, where))
            print(_sizes(facts(run)))
            if target:
                print("\n" + topologies.describe(fitted[number]))
            for example in _examples(run, options.show):
                print(f"\n{example}")
            if found:
                print("\n" + "\n".join(f"{'serious' if finding.serious else 'note'}: {finding.text}" for finding in found))
        if len(surveys) > 1:
            print("\n" + _comparison(surveys))
    if serious := [finding.text for found in findings for finding in found if finding.serious]:
        raise UserError("\n".join(serious))
    return 0


def _devices() -> tuple[int, str]:
    """How many devices this machine has, and what they are."""
    import jax

    try:
        return jax.device_count(), jax.default_backend()
    except RuntimeError as error:
        raise UserError(f"this machine's devices cannot be asked ({' '.join(str(error).split())[:120]}); say how many to plan for with --devices") from None


def _sizes(told: dict[str, Any]) -> str:
    state, gradients, disk = (cli.size(told[name]) for name in ("state_bytes", "gradient_bytes", "disk_bytes"))
    return (
        f"size    {told['parameters']:,} parameters; over all devices {state} of weights and moments and {gradients} of gradients\n"
        f"disk    {disk} at most: checkpoints and exports"
    )


def _examples(run: Survey, count: int) -> list[str]:
    """The first examples that each phase trains, token by token, as the model gets them."""
    colours = sys.stdout.isatty()
    shown = []
    for row in [row for phase in run.plan.phases for row in phase.steps[0][:count]]:
        example = run.dataset.examples[row]
        trained = [any(start <= i < end for start, end in example.responses) for i in range(len(example.tokens))]
        words = run.tokenizer.convert_ids_to_tokens(example.tokens.tolist())
        text, before = "", None
        for word, bright in zip(words, trained, strict=True):
            if bright != before:
                text += (BRIGHT if bright else PLAIN + DIM) if colours else "[" if bright else "]" if before else ""
            text, before = text + word.replace("▁", " ").replace("<0x0A>", "\n").replace("Ġ", " ").replace("Ċ", "\n"), bright
        text += PLAIN if colours else "]" if before else ""
        source = run.dataset.records[row].source
        shown.append(f"{source}: {len(example.tokens)} tokens, {example.response_tokens} of them trained{' (truncated)' if example.truncated else ''}\n{text}")
    return shown


def _comparison(surveys: list[Survey]) -> str:
    ledgers = [run.plan.ledger() for run in surveys]
    rows: list[list[str]] = [["budget", *(run.config.output_dir for run in surveys)]]
    warnings = []
    for name in ledgers[0]:
        values = [ledger[name] for ledger in ledgers]
        rows.append([name, *(f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" for value in values)])
        if max(values) - min(values) > ALIKE * max(values):
            warnings.append(f"note: {name} differs by {(max(values) - min(values)) / max(values):.1%}: no like for like")
    return "\n".join([cli.table(rows), *warnings])


if __name__ == "__main__":
    cli.run(main)

"""Score how difficult records are, once, and never pay twice:

    python -m phased_ift_jax.score data/alpaca_data.json --out scored.jsonl --model gpt-5.6-luna --pilot 200
    python -m phased_ift_jax.score data/alpaca_data.json --out scored.jsonl --model gpt-5.6-luna --budget_usd 20
    python -m phased_ift_jax.score data/alpaca_data.json --out by-ifd.jsonl --scorer ifd --ifd_model meta-llama/Llama-2-7b-hf
    python -m phased_ift_jax.score scored.jsonl --push_to_hub your-name/alpaca-scored

Every reply is kept in scored.ledger.jsonl, so that the same command goes on where it was stopped, and asks only what is not answered.
Records without a number are listed in scored.unscored.jsonl with the reason; scored.card.json says who scored and how.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from phased_ift_jax import cli, config
from phased_ift_jax.data import readers
from phased_ift_jax.data.row_kinds import row_of
from phased_ift_jax.records import InstructionRecord, Quarantined, ScoredRecord, UserError
from phased_ift_jax.scoring import difficulty, measures, outputs, paid, publication, scored_file
from phased_ift_jax.scoring.ledger import read_lines
from phased_ift_jax.scoring.request import Parse, Request
from phased_ift_jax.scoring.run_card import Tally
from phased_ift_jax.scoring.scored_file import Unscored

AGREEMENT = ("exact", "quadratic_weighted_kappa", "spearman", "changes_phase")
PAPER_THRESHOLDS = (1.5, 3.5)
before = paid.before


@dataclass(frozen=True)
class RecordQuestions(paid.Questions):
    """How difficult is each record of some data? The data are read anew each time."""

    data: Sequence[str]
    repeat: float
    limit: int | None

    def __iter__(self) -> Iterator[Request]:
        return (request for row in self.rows() if not isinstance(row, Quarantined) for request in row[1])

    @property
    def parse(self) -> Parse:
        return difficulty.parser(self.settings)

    def none(self) -> str:
        return f"data.path: {', '.join(self.data)}: no row is usable; `plan` or `train` would say why of each"

    def rows(self) -> Iterator[Quarantined | tuple[InstructionRecord, list[Request]]]:
        taken = 0
        for row in readers.stream(self.data):
            if isinstance(row, Quarantined):
                yield row
                continue
            if taken == self.limit:
                return
            taken += 1
            record = row.record if isinstance(row, ScoredRecord) else row
            yield record, list(difficulty.requests_for([record], self.settings, self.repeat))

    def write(self, start: paid.Paid) -> int:
        tally, unscored, parse = Tally(), list[Unscored](), self.parse
        made_by = {"scorer": self.settings.model, "prompt_version": self.settings.prompt.version}

        def rows() -> Iterator[dict[str, Any]]:
            for row in self.rows():
                if isinstance(row, Quarantined):
                    unscored.append(Unscored.of(row))
                    continue
                record, requests = row
                values = []
                for request in requests:
                    lines = list(start.ledger.lines(request.key))
                    reading = read_lines(lines, parse)
                    tally.add(request.key, lines, reading)
                    values.append(difficulty.columns(reading.value) if reading and reading.outcome == "ok" else None)
                    if request.sample == 0 and values[0] is None:
                        unscored.append(Unscored(record.id, record.source, *((reading.outcome, reading.reason) if reading else ("failed", "what became of it is not known yet"))))
                if values[0] is not None:
                    tally.repeats += [(values[0]["difficulty"], other["difficulty"]) for other in values[1:] if other]
                    yield row_of(record) | values[0] | made_by

        card: dict[str, Any] = {"scorer": "llm", "model": self.settings.model, "data": self.data, "mode": start.args.mode, "settings": self.settings.card()}
        whole = scored_file.write(start.out, rows(), unscored, lambda: card | tally.card(start.budget(), start.server, PAPER_THRESHOLDS))
        print(scored_file.told(start.out, whole))
        print(f"{start.ledger.answers:,} replies in '{start.ledger.path.name}'{start.spent()}")
        if whole["unscored"].get("failed"):
            print("the same command asks again what has failed")
        if again := whole["repeats"]:
            figures = ", ".join(f"{name.replace('_', ' ')} {again[name]:.3f}" for name in AGREEMENT if again[name] is not None)
            print(f"asked twice: {figures} (n = {again['n']:,})")
        return 0


def by_model(args: argparse.Namespace, out: Path) -> int:
    """`--scorer llm`: a language model is asked about every record."""
    settings = paid.settings_of(args, difficulty.Settings, difficulty.load_prompt(args.prompt_file), expected_score=args.expected_score)
    return paid.run(args, out, RecordQuestions(settings, args.data, args.repeat, args.limit))


def by_measure(args: argparse.Namespace, out: Path) -> int:
    """`--scorer import`, `length` or `ifd`: nothing is asked, nothing is paid."""
    if args.scorer == "ifd" and not args.ifd_model:
        raise UserError("--ifd_model: name the model that measures, a folder or hub name such as meta-llama/Llama-2-7b-hf")

    def ratios(records: Sequence[InstructionRecord]) -> tuple[list[float | Quarantined], dict[str, Any]]:
        from phased_ift_jax.training import ifd  # the one door to JAX

        return ifd.ratios(records, args.ifd_model, args.prompt_template, args.max_length)

    reading = readers.read(args.data)
    reading = replace(reading, records=reading.records[: args.limit])
    made = measures.score(args.scorer, reading, row_of, ratios)
    print(scored_file.told(out, scored_file.write(out, made.rows, made.unscored, made.card | {"data": args.data})))
    return 0


SCORERS: dict[str, Callable[[argparse.Namespace, Path], int]] = {"llm": by_model, **dict.fromkeys(measures.SCORERS, by_measure)}


def publish(out: Path, args: argparse.Namespace) -> int:
    from phased_ift_jax.models import hub

    print(f"uploaded: {hub.push_dataset(publication.files_of(out, args.push_to_hub, args.with_ledger), args.push_to_hub)}")
    return 0


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="score", description=__doc__)
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA", help="files, folders, globs, hub names: whatever `data.path` of a run takes")
    add("--out", metavar="FILE", help="the scored file, .jsonl; ledger, card and what is unscored lie beside it")
    add("--scorer", choices=list(SCORERS), default="llm", help="a model that is asked (llm), scores in DATA, characters of the response, or instruction-following difficulty [llm]")
    add("--push_to_hub", metavar="NAME", help="then upload the scored file as a dataset with its card as the page; without --out, DATA is a scored file already")
    add("--with_ledger", action="store_true", help="upload the ledger, too, which holds every raw reply")
    add("--limit", type=paid.count, metavar="N", help="only the first N records")
    ifd = parser.add_argument_group("instruction-following difficulty (--scorer ifd)")
    ifd.add_argument("--ifd_model", metavar="MODEL", help="the model that measures: folder, gs:// or hub name; needed")
    ifd.add_argument("--prompt_template", choices=config.TEMPLATES, default=config.TEMPLATES[0], help=f"how a record becomes text [{config.TEMPLATES[0]}]")
    ifd.add_argument("--max_length", type=paid.count, metavar="N", help="tokens of one record; a longer response is cut [2048, or what the model takes]")
    add = paid.add_flags(parser, "--scorer llm")
    add("--repeat", type=_share, default=0.0, metavar="5%", help="ask such a share twice, and tell how far the model agrees with itself")
    add("--expected_score", action="store_true", help="the mean of the scores that the model might have given, from its log-probabilities")
    args = parser.parse_args(argv)
    if args.push_to_hub is not None and args.push_to_hub.count("/") != 1:
        raise UserError(f"--push_to_hub: '{args.push_to_hub}' is not a name such as your-name/alpaca-scored")
    if args.out is None and args.push_to_hub and len(args.data) == 1:
        return publish(Path(args.data[0]).expanduser(), args)
    if args.out is None:
        raise UserError("--out: name the scored file, such as scored.jsonl")
    out = outputs.check(args.out, args.data)

    def work() -> int:
        code = SCORERS[args.scorer](args, out)
        return publish(out, args) if args.push_to_hub and not (code or args.dry_run or args.pilot) else code

    return paid.stoppable(work) if args.scorer == "llm" else work()


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, such as 5% or 0.05")
    return share


if __name__ == "__main__":
    cli.run(main, before=before)

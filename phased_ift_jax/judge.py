"""Which of two models answers better? A judge sees each pair of answers in both orders, and is never paid twice:

    python -m phased_ift_jax.judge phased.jsonl one-off.jsonl --out judgments.jsonl --model gpt-5.6-terra --budget_usd 20
    python -m phased_ift_jax.judge phased.jsonl one-off.jsonl --out judgments.jsonl --judge exact --references tasks.jsonl
    python -m phased_ift_jax.judge --judge replay --recorded vicuna_reviews.json koala_reviews.json --out judgments.jsonl

Answers are those of `generate`, matched by set and id. Every reply is kept in judgments.ledger.jsonl, so that the same command goes on where it
was stopped; judgments.jsonl has a line for every prompt, judged or not, and judgments.card.json says who judged and how. Two equal answers are
shown to a model once, and can come to a tie at most.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_ift_jax import cli
from phased_ift_jax.data import answers, readers
from phased_ift_jax.data.answers import Pair
from phased_ift_jax.records import Judgment, ScoredRecord, UserError
from phased_ift_jax.scoring import outputs, paid, preference
from phased_ift_jax.scoring.ledger import read_lines
from phased_ift_jax.scoring.request import Parse, Reading, Request
from phased_ift_jax.scoring.run_card import Tally

NAMED = 10  # pairs without an answer, of each reason; all of them are in the file
COUNTS = ("win", "tie", "lose", "invalid")
before = paid.before


@dataclass(frozen=True)
class Work:
    """Two models' answers, and where their judgments go."""

    args: argparse.Namespace
    out: Path
    models: tuple[str, str]
    pairs: Sequence[Pair]

    def write(self, judge: str, orders: Callable[[Pair], tuple[Any, Any]], card: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> int:
        """Judge all pairs by what gives both orders of one, and write and tell what comes of it."""
        from phased_ift_jax.evaluation.judging import judgment_of

        return conclude(self.args, self.out, [judgment_of(pair, *self.models, judge, orders(pair)) for pair in self.pairs], card)


@dataclass(frozen=True)
class PairQuestions(paid.Questions):
    """Which answer is better? Each pair in both orders."""

    work: Work
    skip_equal: bool

    def __iter__(self) -> Iterator[Request]:
        return (request for pair in self.work.pairs if self.asks(pair) for request in self.both(pair))

    @property
    def parse(self) -> Parse:
        return preference.parse

    def asks(self, pair: Pair) -> bool:
        return not pair.missing and not (self.skip_equal and pair.candidate == pair.baseline)

    def both(self, pair: Pair) -> tuple[Request, Request]:
        assert isinstance(self.settings, preference.Settings)
        return preference.requests_of(pair.prompt.instruction, pair.prompt.input, pair.candidate, pair.baseline, self.settings)

    def write(self, start: paid.Paid) -> int:
        from phased_ift_jax.evaluation.judging import EQUAL, Orders, nothing

        tally = Tally()

        def read(request: Request) -> Reading:
            lines = list(start.ledger.lines(request.key))
            reading = read_lines(lines, self.parse)
            tally.add(request.key, lines, reading)
            return reading or Reading("failed", reason="what became of it is not known yet")

        def orders(pair: Pair) -> Orders:
            if not self.asks(pair):
                return nothing(pair.missing) if pair.missing else (EQUAL, EQUAL)
            requests = self.both(pair)
            return preference.judged(requests, (read(requests[0]), read(requests[1])))

        card = {"model": self.settings.model, "mode": start.args.mode, "skip_equal": self.skip_equal, "settings": self.settings.card()}
        code = self.work.write(self.settings.model, orders, lambda: card | tally.card(start.budget(), start.server, ()))
        print(f"{start.ledger.answers:,} replies in '{start.ledger.path.name}'{start.spent()}", file=sys.stderr)
        if tally.outcomes["failed"]:
            print("the same command asks again what has failed", file=sys.stderr)
        return code


def by_model(args: argparse.Namespace, out: Path) -> int:
    """`--judge llm`: a language model is asked about every pair, in both orders."""
    settings = paid.settings_of(args, preference.Settings, preference.load_prompt(args.prompt_file))
    return paid.stoppable(lambda: paid.run(args, out, PairQuestions(settings, work_of(args, out), args.skip_equal)))


def by_reference(args: argparse.Namespace, out: Path) -> int:
    """`--judge exact`: an answer is right or wrong."""
    from phased_ift_jax.evaluation.judging import exact

    records = (row.record if isinstance(row, ScoredRecord) else row for row in (readers.read(args.references).records if args.references else ()))
    references = {(record.id, record.turns[-1].instruction): record.turns[-1].response for record in records}
    work = work_of(args, out)
    if not any(pair.prompt.reference is not None or (pair.prompt.id, pair.prompt.instruction) in references for pair in work.pairs):
        raise UserError("--judge exact: no prompt has a reference (`output`, or `reference`); name the data that have them with --references")
    return work.write("exact", lambda pair: exact(pair, references), {})


def by_record(args: argparse.Namespace, out: Path) -> int:
    """`--judge replay`: judgments that are there already."""
    from phased_ift_jax.evaluation.judging import replayed
    from phased_ift_jax.evaluation.judgments import read_judgments

    if not args.recorded:
        raise UserError("--recorded: name the recorded judgments, a judgments.jsonl or logs with both orders")
    recorded = [judgment for path in args.recorded for judgment in read_judgments(Path(path).expanduser(), args.model or "recorded")]
    if not args.answers:
        return conclude(args, out, recorded[: args.limit], {"recorded": args.recorded})
    work, (first, *_) = work_of(args, out), recorded
    if not {(judgment.test_set, judgment.id) for judgment in recorded} & {(pair.prompt.test_set, pair.prompt.id) for pair in work.pairs}:
        raise UserError(f"--recorded: judgments of other prompts, such as '{first.test_set}/{first.id}'; these answers are to prompts such as '{work.pairs[0].name}'")
    return work.write(first.judge, replayed(recorded, work.models), {"recorded": args.recorded})


JUDGES = {"llm": by_model, "exact": by_reference, "replay": by_record}


def work_of(args: argparse.Namespace, out: Path) -> Work:
    """The two files' answers in pairs; what cannot be judged in them is told.

    Raises:
        UserError: a file is none of answers, or they are of other prompts.
    """
    candidate, baseline = (answers.read(Path(path).expanduser()) for path in args.answers)
    pairs = answers.pairs_of(candidate, baseline)[: args.limit]
    for name, value in candidate.decoding.items():
        if (other := baseline.decoding.get(name, value)) != value:
            _note(f"the answers were made with {name} {value!r} and {other!r}: what differs may be that")
    reasons: dict[str, list[str]] = {}
    for pair in pairs:
        if pair.missing:
            reasons.setdefault(pair.missing, []).append(pair.name)
    for reason, names in reasons.items():
        more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
        _note(f"{len(names):,} of {len(pairs):,} prompts have nothing to judge ({reason}): {', '.join(names[:NAMED])}{more}")
    judged = {pair.prompt.test_set for pair in pairs if not pair.missing}
    for test_set in dict.fromkeys(pair.prompt.test_set for pair in pairs if pair.prompt.test_set not in judged):
        _note(f"no prompt of the set '{test_set}' can be judged")
    if unnamed := sum(not pair.prompt.test_set for pair in pairs):
        _note(f"{unnamed:,} prompts name no set; they are judged as one of their own")
    models = (candidate.model, baseline.model) if candidate.model != baseline.model else tuple(map(str, args.answers))
    if models[0] == models[1]:
        raise UserError(f"'{models[0]}' is both the candidate's file and the baseline's; name two")
    return Work(args, out, (models[0], models[1]), pairs)


def _note(words: str) -> None:
    print(f"note: {words}", file=sys.stderr)


def conclude(args: argparse.Namespace, out: Path, judgments: Sequence[Judgment], card: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> int:
    """Write judgments and their card, and tell the verdict."""
    from phased_ift_jax.evaluation.comparison import compare
    from phased_ift_jax.evaluation.judgments import write_judgments

    found = compare(judgments)
    write_judgments(out, judgments)
    first = judgments[0]
    counted = {"pairs": found["prompts"], "orders": dict(Counter(order.outcome for judgment in judgments for order in judgment.orders))}
    counted |= {"no_answer": dict(Counter(judgment.orders[0].reason for judgment in judgments if judgment.orders[0].outcome == "no_answer"))}
    names = {"judge": args.judge, "candidate": first.candidate, "baseline": first.baseline, "answers": args.answers}
    outputs.write_card(out, names | dict(card() if callable(card) else card) | counted | {"sha256": hashlib.sha256(out.read_bytes()).hexdigest()})
    print(json.dumps(found, indent=2) if args.json else verdict(found))
    return 0


def verdict(found: Mapping[str, Any]) -> str:
    """A comparison as text: each set by the paper's rule, all sets by each rule, and what that says."""
    level, rules = f"{found['level']:.0%} interval", found["rules"]

    def row(name: str, figures: Mapping[str, Any]) -> list[str]:
        between = "" if figures["interval"] is None else "{:+.1f} to {:+.1f}".format(*figures["interval"])
        rate = "-" if figures["win_rate"] is None else f"{figures['win_rate']:+.1f}"
        return [name, f"{figures['pairs']:,}", *(f"{figures[count]:,}" for count in COUNTS), rate, between, figures["conclusion"].replace("_", " ")]

    heads = ["pairs", *COUNTS, "win rate", level, "candidate is"]
    sets = [row(name or "(no set)", figures) for name, figures in rules["paper"]["sets"].items()]
    by_rule = [row(name, figures) for name, figures in rules.items()]
    return "\n".join(
        [
            f"candidate {found['candidate']}, baseline {found['baseline']}, judge {found['judge']}",
            "",
            cli.table([["rule", *heads], *by_rule, *([["", *[""] * len(heads)], ["set (rule: paper)", *heads], *sets])]),
            "",
            "win rate: points above 50 %, (win + tie/2) / valid pairs of a set; of all, the sets' by their number of prompts, invalid ones too;",
            "official_script drops pairs with a score of 0 and divides by all",
            "better or worse: the interval leaves out zero, and so does a sign test (p < 0.05; of sets with Holm's correction)",
            *found["words"],
        ]
    )


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="judge", description=__doc__)
    add = parser.add_argument
    add("answers", nargs="*", metavar="CANDIDATE.jsonl BASELINE.jsonl", help="two files of answers to the same prompts; replay can do without")
    add("--out", metavar="FILE", help="the judgments, .jsonl; ledger and card lie beside it")
    add("--judge", choices=list(JUDGES), default="llm", help="a model that is asked (llm), references (exact), or recorded judgments (replay) [llm]")
    add("--references", nargs="+", metavar="DATA", help="of --judge exact, where answers have none (`output`): records whose response is right, by id")
    add("--recorded", nargs="+", metavar="FILE", help="of --judge replay: a judgments.jsonl, or logs with both orders, whose judge --model may name")
    add("--skip_equal", action="store_true", help="call two equal answers a tie without asking; the judge's agreement with itself then looks better")
    add("--limit", type=paid.count, metavar="N", help="only the first N pairs")
    add("--json", action="store_true", help="print the comparison as one JSON object")
    paid.add_flags(parser, "--judge llm")
    args = parser.parse_args(argv)
    if len(args.answers) != 2 and not (args.judge == "replay" and not args.answers):
        raise UserError(f"judge: {len(args.answers)} files of answers; give two, the candidate's and the baseline's")
    if args.out is None:
        raise UserError("--out: name the judgments' file, such as judgments.jsonl")
    for flag, judge in (("references", "exact"), ("recorded", "replay")):
        if getattr(args, flag) and args.judge != judge:
            raise UserError(f"--{flag}: of use to --judge {judge} only; leave it out, or give that")
    return JUDGES[args.judge](args, outputs.check(args.out, [*args.answers, *(args.recorded or ())], "judgments.jsonl"))


if __name__ == "__main__":
    cli.run(main, before=before)

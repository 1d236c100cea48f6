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
import asyncio
import heapq
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from phased_ift_jax import cli, config
from phased_ift_jax.data import readers
from phased_ift_jax.data.row_kinds import row_of
from phased_ift_jax.interrupts import STOPPED
from phased_ift_jax.records import InstructionRecord, Quarantined, ScoredRecord, UserError
from phased_ift_jax.scoring import difficulty, live, measures, money, publication, scored_file
from phased_ift_jax.scoring.ledger import Ledger, read_lines
from phased_ift_jax.scoring.progress import Progress
from phased_ift_jax.scoring.request import Parse, Reading, Request, Settings, Summary
from phased_ift_jax.scoring.run_card import Tally
from phased_ift_jax.scoring.scored_file import Unscored, beside

PILOT = 200
LEAST = 30  # answers, from which a forecast is made
AGREEMENT = ("exact", "quadratic_weighted_kappa", "spearman", "changes_phase")
PAPER_THRESHOLDS = (1.5, 3.5)
BYTES_PER_TOKEN = 3.0, 5.0  # of English text, with any tokenizer that is in use


class Stopped(Exception):
    """Nothing more may be asked: "signal" or "budget"."""


def by_model(args: argparse.Namespace, out: Path) -> int:
    """`--scorer llm`: a language model is asked about every record."""
    if not args.model:
        raise UserError("--model: name the model that scores, such as gpt-5.6-luna")
    question = difficulty.Settings(args.model, difficulty.modes(args.structured)[0], args.expected_score, args.temperature, args.reasoning_effort, args.max_completion_tokens)
    question = replace(question, prompt=difficulty.load_prompt(args.prompt_file))
    key = os.environ.get(args.api_key_env, "").strip()
    server = Settings(key, args.base_url, args.concurrency, args.timeout_seconds, args.settle_seconds, not args.no_store)
    price = money.Price(args.price[0], *args.price) if args.price else money.price_of(args.model)
    money.Budget(args.budget_usd, price)
    with Ledger(beside(out, "ledger.jsonl"), key) as ledger:
        scoring = Scoring(args, out, ledger, server, price)
        try:
            return scoring.forecast_only(question) if args.dry_run else scoring.score(question)
        except Stopped as why:
            more = "the same command with a larger --budget_usd goes on" if str(why) == "budget" else "the same command goes on"
            print(f"stopped{' by the budget' if str(why) == 'budget' else ''} with everything saved, {ledger.answers:,} replies in '{ledger.path}'{scoring.spent()}; {more}")
            return STOPPED


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
    add("--limit", type=_count, metavar="N", help="only the first N records")
    ifd = parser.add_argument_group("instruction-following difficulty (--scorer ifd)")
    ifd.add_argument("--ifd_model", metavar="MODEL", help="the model that measures: folder, gs:// or hub name; needed")
    ifd.add_argument("--prompt_template", choices=config.TEMPLATES, default=config.TEMPLATES[0], help=f"how a record becomes text [{config.TEMPLATES[0]}]")
    ifd.add_argument("--max_length", type=_count, metavar="N", help="tokens of one record; a longer response is cut [2048, or what the model takes]")
    model = parser.add_argument_group("asking a model (--scorer llm)")
    add = model.add_argument
    add("--model", metavar="NAME", help="the model that is asked; needed")
    add("--base_url", metavar="URL", help="a server that speaks the same protocol, such as http://127.0.0.1:8000/v1 [OpenAI's]")
    add("--api_key_env", metavar="NAME", default="OPENAI_API_KEY", help="the environment variable with the key [OPENAI_API_KEY]")
    add("--mode", choices=["live", "batch"], default="live", help="one by one, or in batches at half the price, answered within a day [live]")
    add("--budget_usd", type=float, metavar="X", help="never spend more, all starts on this ledger together; stops with exit code 75 before it could")
    add("--price", type=float, nargs=2, metavar=("INPUT", "OUTPUT"), help=f"USD per million tokens [those published by {money.PRICES_OF}]")
    add("--dry_run", action="store_true", help="say what would be asked and what it would cost; nothing is sent")
    add("--pilot", type=_count, nargs="?", const=PILOT, metavar="N", help=f"ask N records drawn at random and forecast the rest [{PILOT}]")
    add("--repeat", type=_share, default=0.0, metavar="5%", help="ask such a share twice, and tell how far the model agrees with itself")
    add("--prompt_file", metavar="FILE", help="a prompt of one's own, with {record} where the record goes [ours]")
    add("--structured", choices=["auto", "json_schema", "json_object", "none"], default="auto", help="how the reply's form is asked for; auto: as the server can")
    add("--expected_score", action="store_true", help="the mean of the scores that the model might have given, from its log-probabilities")
    add("--temperature", type=_number_or_none, default=0.0, metavar="T", help="or none, to send no temperature [0]")
    add("--reasoning_effort", metavar="EFFORT", help="for models that reason: none, minimal, low ... [not sent]")
    add("--max_completion_tokens", type=_count, metavar="N", help="limit of an answer, reasoning included [64; 4096 with reasoning]")
    add("--concurrency", type=_count, default=32, metavar="N", help="requests under way at a time [32]")
    add("--timeout_seconds", type=float, default=300.0, metavar="S", help="how long a reply may take [300]")
    add("--settle_seconds", type=float, default=30.0, metavar="S", help="how long the server may take to list a reply that did not come through [30]")
    add("--no_store", action="store_true", help="do not have the server keep replies; one that is lost on the way is then paid for again")
    args = parser.parse_args(argv)
    if args.push_to_hub is not None and args.push_to_hub.count("/") != 1:
        raise UserError(f"--push_to_hub: '{args.push_to_hub}' is not a name such as your-name/alpaca-scored")
    if args.out is None and args.push_to_hub and len(args.data) == 1:
        return publish(Path(args.data[0]).expanduser(), args)
    if args.out is None:
        raise UserError("--out: name the scored file, such as scored.jsonl")
    out = scored_file.check(args.out, args.data)
    try:
        code = SCORERS[args.scorer](args, out)
        return publish(out, args) if args.push_to_hub and not (code or args.dry_run or args.pilot) else code
    except KeyboardInterrupt:
        if args.scorer != "llm":
            raise
        print("stopped with everything saved; the same command goes on")
        return STOPPED


def before() -> None:
    """A polite kill is a Ctrl-C, from the start."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@dataclass(frozen=True)
class Questions:
    """The questions about some data, which are read anew each time: not even a million of them need memory."""

    data: Sequence[str]
    settings: difficulty.Settings
    repeat: float
    limit: int | None

    def __iter__(self) -> Iterator[Request]:
        return (request for row in self.rows() if not isinstance(row, Quarantined) for request in row[1])

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


@dataclass
class Missing:
    """How much is to be asked."""

    questions: int = 0
    count: int = 0  # of them not settled
    size: float = 0.0  # the sum of their prompts' bounds, in tokens
    worst: float | None = 0.0  # USD


class Scoring:
    """One start of `--scorer llm`."""

    def __init__(self, args: argparse.Namespace, out: Path, ledger: Ledger, server: Settings, price: money.Price | None) -> None:
        self.args, self.out, self.ledger, self.server, self.price = args, out, ledger, server, price
        if args.budget_usd is not None and ledger.unpriced:
            print(f"note: {ledger.unpriced:,} attempts in '{ledger.path}' had no known price and are not counted against the budget", file=sys.stderr)

    def score(self, question: difficulty.Settings) -> int:
        if any(sent.via != live.VIA for sent in self.ledger.pending.values()) and self.args.mode == "live":
            raise UserError(f"--mode live: batches with questions of '{self.ledger.path}' are under way; fetch them with --mode batch first")
        if any(sent.via == live.VIA for sent in self.ledger.pending.values()):
            self.ask([], 0, difficulty.parser(question))
        question = self.form_that_is_taken(question)
        questions, parse = self.questions(question), difficulty.parser(question)
        if self.args.pilot:
            return self.pilot(questions, parse)
        missing = self.missing(questions, parse)
        if missing.count or self.ledger.pending:
            told = "" if missing.worst is None else f", ${missing.worst * self.share:,.2f} at most"
            print(f"{missing.questions:,} questions, {missing.count:,} of them to be asked{told}", file=sys.stderr)
            self.ask(questions, missing.count, parse, self.args.mode)
        return self.write(questions, parse)

    @property
    def share(self) -> float:
        """Of the live price."""
        return money.BATCH if self.args.mode == "batch" else 1.0

    def questions(self, question: difficulty.Settings) -> Questions:
        return Questions(self.args.data, question, self.args.repeat, self.args.limit)

    def budget(self) -> money.Budget:
        return money.Budget(self.args.budget_usd, self.price, self.ledger.spent_usd, {key: sent.reserved_usd for key, sent in self.ledger.pending.items()})

    def spent(self) -> str:
        return f", ${self.ledger.spent_usd:,.4f}" if self.price else ""

    def ask(self, requests: Iterable[Request], total: int, parse: Parse, mode: str = "live") -> Summary:
        if not self.server.api_key:
            raise UserError(f"no API key: set the environment variable {self.args.api_key_env} (to any word for a server without keys), or name another with --api_key_env")
        if mode == "batch":
            from phased_ift_jax.scoring.batch import ask_in_batches

            summary = ask_in_batches(requests, self.ledger, self.budget(), self.server, parse)
        else:
            with Progress(total) as progress:
                summary = asyncio.run(live.ask(requests, self.ledger, self.budget(), self.server, parse, progress))
        if summary.stopped:
            raise Stopped(summary.stopped)
        return summary

    def form_that_is_taken(self, question: difficulty.Settings) -> difficulty.Settings:
        """The settings with the first of the forms of reply that the server takes, found with the first question, which it is asked live."""
        for structured in difficulty.modes(self.args.structured):
            question = replace(question, structured=structured)
            parse = difficulty.parser(question)
            first = next(iter(self.questions(question)), None)
            if first is None:
                raise UserError(f"data.path: {', '.join(self.args.data)}: no row is usable; `plan` or `train` would say why of each")
            reading = self.ledger.reading(first.key, parse)
            if not (refusal(reading) or live.is_settled(self.ledger, first.key, parse) or first.key in self.ledger.pending):
                self.ask([first], 1, parse)
                reading = self.ledger.reading(first.key, parse)
            if not (remedy := refusal(reading)):
                return question
        raise UserError(f"the server refuses the question: {remedy}")

    def missing(self, questions: Questions, parse: Parse) -> Missing:
        missing, seen = Missing(worst=0.0 if self.price else None), set[str]()
        for request in questions:
            missing.questions += 1
            if request.key not in seen and request.key not in self.ledger.pending and not live.is_settled(self.ledger, request.key, parse):
                seen.add(request.key)
                missing.count += 1
                missing.size += money.prompt_bound(request.body)
                if missing.worst is not None and self.price:
                    missing.worst += self.price.worst_case(request.body)
        return missing

    # --- what it would cost

    def pilot(self, questions: Questions, parse: Parse) -> int:
        sample = drawn(questions, self.args.pilot)
        asked = sum(not live.is_settled(self.ledger, request.key, parse) for request in sample)
        began = time.monotonic()
        self.ask(sample, asked, parse) if asked else None
        self.tell_forecast(questions, parse, sample, (time.monotonic() - began) / asked if asked else None)
        return 0

    def forecast_only(self, question: difficulty.Settings) -> int:
        chosen = self.questions(question)
        for structured in difficulty.modes(self.args.structured):  # the form in which an earlier start has asked
            questions = self.questions(replace(question, structured=structured))
            sample = drawn(questions, PILOT)
            if any(self.ledger.replies(request.key) for request in sample):
                chosen = questions
                break
        self.tell_forecast(chosen, difficulty.parser(chosen.settings), drawn(chosen, PILOT), None)
        if not self.ledger.size:
            self.ledger.path.unlink()
        return 0

    def tell_forecast(self, questions: Questions, parse: Parse, sample: Sequence[Request], seconds: float | None) -> None:
        """Print what is left to be asked, and what that costs: from the sample's answers, where there are enough, else from sizes alone."""
        missing = self.missing(questions, parse)
        print(f"questions    {missing.questions:,}, of which {missing.count:,} are not answered")
        if not missing.count:
            return
        bodies, usages = [], []
        for request in sample:  # by their keys' order: those that a smaller pilot has asked come first
            replies = [line["reply"] for line in self.ledger.lines(request.key) if line["reply"]]
            if not replies:
                break
            bodies.append(request.body)
            usages.append([reply.get("usage") or {} for reply in replies])
        sizes = [money.prompt_bound(body) for body in bodies]
        if len(sizes) < min(LEAST, len(sample)) or len(sizes) < 2:
            self.tell_bounds(missing, sample)
            return
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = money.forecast(sizes, [sum(usage.get(name) or 0 for usage in of_one) for of_one in usages], missing.count, missing.size)
            print(f"{name.replace('_', ' '):<19}{tokens.value:>15,.0f}  95 %: {tokens.low:,.0f} to {tokens.high:,.0f}")
        if self.price:
            usd = money.forecast(sizes, [sum(self.price.cost(usage) * self.share for usage in of_one if usage) for of_one in usages], missing.count, missing.size)
            print(f"{'USD':<19}{usd.value:>15,.2f}  95 %: {usd.low:,.2f} to {usd.high:,.2f}; {(missing.worst or 0) * self.share:,.2f} at most")
        if seconds and self.args.mode == "live":
            print(f"{'time':<19}{timedelta(seconds=round(seconds * missing.count))!s:>15}  at this pace")
        print(f"from {len(sizes):,} questions drawn at random, already asked{self.spent()}")

    def tell_bounds(self, missing: Missing, sample: Sequence[Request]) -> None:
        low, high = (missing.size / each for each in BYTES_PER_TOKEN[::-1])
        answer = sample[0].body["max_completion_tokens"]
        print(f"prompt tokens      {low:,.0f} to {high:,.0f}; a bound: {missing.size:,.0f}")
        print(f"completion tokens  {answer * missing.count:,} at most, {answer} a question")
        if self.price and missing.worst is not None:
            cheap, dear = (self.share * (tokens * self.price.input + of_answer * missing.count * self.price.output) / 1e6 for tokens, of_answer in ((low, 15), (high, answer)))
            print(f"USD                {cheap:,.2f} to {dear:,.2f}; {missing.worst * self.share:,.2f} at most")
        else:
            print("USD                unknown: give --price INPUT OUTPUT, in USD per million tokens")
        print(f"from the sizes alone; --pilot {PILOT} asks so many and forecasts the rest")

    # --- what came of it

    def write(self, questions: Questions, parse: Parse) -> int:
        tally, unscored = Tally(), list[Unscored]()
        made_by = {"scorer": self.args.model, "prompt_version": questions.settings.prompt.version}

        def rows() -> Iterator[dict[str, Any]]:
            for row in questions.rows():
                if isinstance(row, Quarantined):
                    unscored.append(Unscored.of(row))
                    continue
                record, requests = row
                values = []
                for request in requests:
                    lines = list(self.ledger.lines(request.key))
                    reading = read_lines(lines, parse)
                    tally.add(lines, reading)
                    values.append(difficulty.columns(reading.value) if reading and reading.outcome == "ok" else None)
                    if request.sample == 0 and values[0] is None:
                        unscored.append(Unscored(record.id, record.source, *((reading.outcome, reading.reason) if reading else ("failed", "what became of it is not known yet"))))
                if values[0] is not None:
                    tally.repeats += [(values[0]["difficulty"], other["difficulty"]) for other in values[1:] if other]
                    yield row_of(record) | values[0] | made_by

        card: dict[str, Any] = {"scorer": "llm", "model": self.args.model, "data": self.args.data, "mode": self.args.mode, "settings": questions.settings.card()}
        whole = scored_file.write(self.out, rows(), unscored, lambda: card | tally.card(self.budget(), self.server, PAPER_THRESHOLDS))
        print(scored_file.told(self.out, whole))
        print(f"{self.ledger.answers:,} replies in '{self.ledger.path.name}'{self.spent()}")
        if again := whole["repeats"]:
            figures = ", ".join(f"{name.replace('_', ' ')} {again[name]:.3f}" for name in AGREEMENT if again[name] is not None)
            print(f"asked twice: {figures} (n = {again['n']:,})")
        return 0


def refusal(reading: Reading | None) -> str | None:
    """What a server says against a question, and what would do, where that is something that settings can change."""
    told = difficulty.remedy(reading.reason) if reading and reading.outcome == "failed" and reading.reason[:4] in ("400 ", "422 ") else None
    return f"{reading.reason}; what would do: {told[1]}" if reading and told else None


def drawn(requests: Iterable[Request], count: int) -> list[Request]:
    """So many questions at random, whatever their order: a key is a hash. A larger draw begins with a smaller one."""
    return heapq.nsmallest(count, (request for request in requests if request.sample == 0), key=lambda request: request.key)


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share, such as 5% or 0.05")
    return share


def _number_or_none(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not none") from None


if __name__ == "__main__":
    cli.run(main, before=before)

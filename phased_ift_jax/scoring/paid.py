"""What verbs that ask a model have in common: their flags, and one start from the first question to the file that is written.

A verb hands in its `Questions`, which say what is asked, how a reply is read, and what is made of the replies.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self, TypeVar

from phased_ift_jax.interrupts import STOPPED
from phased_ift_jax.records import UserError
from phased_ift_jax.scoring import difficulty, forecast, live, money
from phased_ift_jax.scoring.forecast import Missing, drawn
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.outputs import beside
from phased_ift_jax.scoring.progress import Progress
from phased_ift_jax.scoring.request import CUT, Parse, Reading, Request, Settings, Summary

PILOT = 200
S = TypeVar("S", bound=difficulty.Settings)


class Stopped(Exception):
    """Nothing more may be asked: "signal" or "budget"."""


@dataclass(frozen=True)
class Questions(ABC):
    """All the questions of a verb, made anew each time that they are gone through: not even a million of them need memory."""

    settings: difficulty.Settings

    @abstractmethod
    def __iter__(self) -> Iterator[Request]: ...

    @property
    @abstractmethod
    def parse(self) -> Parse: ...

    @abstractmethod
    def write(self, start: Paid) -> int:
        """Write and tell what came of it, once all has been asked; the exit code."""

    def none(self) -> str | None:
        """What is wrong where there is no question at all; None: nothing is."""
        return None

    def in_form(self, structured: difficulty.Structured) -> Self:
        return replace(self, settings=replace(self.settings, structured=structured))


def add_flags(parser: argparse.ArgumentParser, when: str) -> Callable[..., Any]:
    """The flags of asking, in a group of their own; returns what adds further ones to it."""
    add = parser.add_argument_group(f"asking a model ({when})").add_argument
    add("--model", metavar="NAME", help="the model that is asked; needed")
    add("--base_url", metavar="URL", help="a server that speaks the same protocol, such as http://127.0.0.1:8000/v1 [OpenAI's]")
    add("--api_key_env", metavar="NAME", default="OPENAI_API_KEY", help="the environment variable with the key [OPENAI_API_KEY]")
    add("--mode", choices=["live", "batch"], default="live", help="one by one, or in batches at half the price, answered within a day [live]")
    add("--budget_usd", type=float, metavar="X", help="never spend more, all starts on this ledger together; stops with exit code 75 before it could")
    add("--price", type=float, nargs=2, metavar=("INPUT", "OUTPUT"), help=f"USD per million tokens [those published by {money.PRICES_OF}]")
    add("--dry_run", action="store_true", help="say what would be asked and what it would cost; nothing is sent")
    add("--pilot", type=count, nargs="?", const=PILOT, metavar="N", help=f"ask N questions drawn at random and forecast the rest [{PILOT}]")
    add("--prompt_file", metavar="FILE", help="a prompt of one's own, with {record} where the record or the pair goes [ours]")
    add("--structured", choices=["auto", "json_schema", "json_object", "none"], default="auto", help="how the reply's form is asked for; auto: as the server can")
    add("--temperature", type=_number_or_none, default=0.0, metavar="T", help="or none, to send no temperature [0]")
    add("--reasoning_effort", metavar="EFFORT", help="for models that reason: none, minimal, low ... [not sent]")
    add("--max_completion_tokens", type=count, metavar="N", help="limit of an answer, reasoning included [64; 4096 with reasoning, or where no temperature is sent]")
    add("--concurrency", type=count, default=32, metavar="N", help="requests under way at a time [32]")
    add("--timeout_seconds", type=float, default=300.0, metavar="S", help="how long a reply may take [300]")
    add("--settle_seconds", type=float, default=30.0, metavar="S", help="how long the server may take to list a reply that did not come through [30]")
    add("--no_store", action="store_true", help="do not have the server keep replies; one that is lost on the way is then paid for again")
    return add


def settings_of(args: argparse.Namespace, kind: type[S], prompt: difficulty.Prompt, **more: Any) -> S:
    """What the flags say of a question.

    Raises:
        UserError: no model is named, or the values do not go together.
    """
    if not args.model:
        raise UserError("--model: name the model that is asked, such as gpt-5.6-luna")
    options = {name: getattr(args, name) for name in ("temperature", "reasoning_effort", "max_completion_tokens")}
    return kind(args.model, difficulty.modes(args.structured)[0], prompt=prompt, **options, **more)


def run(args: argparse.Namespace, out: Path, questions: Questions) -> int:
    """Ask what is not answered and write what came of it; or forecast, with --dry_run and --pilot. Returns the exit code.

    Raises:
        UserError, Failure: as `live.ask` and `ask_in_batches`; or the budget or a flag makes no sense.
    """
    if not re.fullmatch(r"[A-Za-z_]\w*", args.api_key_env):
        raise UserError("--api_key_env: that is no name of an environment variable; give the name, not the key")
    key = os.environ.get(args.api_key_env, "").strip()
    server = Settings(key, args.base_url, args.concurrency, args.timeout_seconds, args.settle_seconds, not args.no_store)
    price = money.Price(args.price[0], *args.price) if args.price else money.price_of(args.model)
    money.Budget(args.budget_usd, price)
    with Ledger(beside(out, "ledger.jsonl"), key) as ledger:
        paid = Paid(args, out, ledger, server, price)
        try:
            return paid.forecast_only(questions) if args.dry_run else paid.all(questions)
        except Stopped as why:
            more = "the same command with a larger --budget_usd goes on" if str(why) == "budget" else "the same command goes on"
            print(f"stopped{' by the budget' if str(why) == 'budget' else ''} with everything saved, {ledger.answers:,} replies in '{ledger.path}'{paid.spent()}; {more}")
            return STOPPED


def stoppable(work: Callable[[], int]) -> int:
    """Exit code of work that a Ctrl-C may end at any moment, since all that is paid for is in the ledger."""
    try:
        return work()
    except KeyboardInterrupt:
        print("stopped with everything saved; the same command goes on")
        return STOPPED


def before() -> None:
    """A polite kill is a Ctrl-C, from the start."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Paid:
    """One start."""

    def __init__(self, args: argparse.Namespace, out: Path, ledger: Ledger, server: Settings, price: money.Price | None) -> None:
        self.args, self.out, self.ledger, self.server, self.price = args, out, ledger, server, price
        if args.budget_usd is not None and ledger.unpriced:
            print(f"note: {ledger.unpriced:,} attempts in '{ledger.path}' had no known price and are not counted against the budget", file=sys.stderr)

    def all(self, questions: Questions) -> int:
        if any(sent.via != live.VIA for sent in self.ledger.pending.values()) and self.args.mode == "live":
            raise UserError(f"--mode live: batches with questions of '{self.ledger.path}' are under way; fetch them with --mode batch first")
        if any(sent.via == live.VIA for sent in self.ledger.pending.values()):
            self.ask([], 0, questions.parse)
        questions = self.in_the_form_that_is_taken(questions)
        if self.args.pilot:
            return self.pilot(questions)
        missing = self.missing(questions)
        if missing.count or self.ledger.pending:
            told = f", ${missing.worst:,.2f} at most" if self.price else ""
            print(f"{missing.questions:,} questions, {missing.count:,} of them to be asked{told}", file=sys.stderr)
            # what a batch under way ends without is asked again in this start, so that it must know all questions
            known = len(missing.kept) == missing.count and not self.ledger.pending
            self.ask(missing.kept if known else questions, missing.count, questions.parse, self.args.mode)
        return questions.write(self)

    def budget(self) -> money.Budget:
        return money.Budget(self.args.budget_usd, self.price, self.ledger.spent_usd, {key: sent.reserved_usd for key, sent in self.ledger.pending.items()})

    def spent(self) -> str:
        return f", ${self.ledger.spent_usd:,.4f}" if self.price else ""

    def ask(self, requests: Iterable[Request], total: int, parse: Parse, mode: str = "live") -> Summary:
        if not self.server.api_key.isascii() or not self.server.api_key.isprintable():
            raise UserError(f"{self.args.api_key_env}: holds characters that no key has; was it copied whole, and alone?")
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

    def in_the_form_that_is_taken(self, questions: Questions) -> Questions:
        """The questions in the first of the forms of reply that the server takes, found with the first of them, which it is asked live."""
        for structured in difficulty.modes(self.args.structured):
            questions = questions.in_form(structured)
            first = next(iter(questions), None)
            if first is None:
                if wrong := questions.none():
                    raise UserError(wrong)
                return questions
            reading = self.ledger.reading(first.key, questions.parse)
            if not (refusal(reading) or live.is_settled(self.ledger, first.key, questions.parse) or first.key in self.ledger.pending):
                self.ask([first], 1, questions.parse)
                reading = self.ledger.reading(first.key, questions.parse)
            if reading and reading.outcome == "unparseable" and reading.reason.startswith(CUT):
                would_do = "--max_completion_tokens 4096, or --reasoning_effort none where the model has it"
                raise UserError(f"the first answer was cut at its limit of {first.body['max_completion_tokens']} tokens, as all would be; what would do: {would_do}")
            if not (remedy := refusal(reading)):
                return questions
        raise UserError(f"the server refuses the question: {remedy}")

    def missing(self, questions: Questions) -> Missing:
        missing, seen, parse = Missing(self.price, money.BATCH if self.args.mode == "batch" else 1.0), set[str](), questions.parse
        for request in questions:
            settled = request.key in seen or request.key in self.ledger.pending or live.is_settled(self.ledger, request.key, parse)
            missing.add(request, settled)
            if not settled:
                seen.add(request.key)
        return missing

    def pilot(self, questions: Questions) -> int:
        sample = drawn(questions, self.args.pilot)
        asked = sum(not live.is_settled(self.ledger, request.key, questions.parse) for request in sample)
        began = time.monotonic()
        self.ask(sample, asked, questions.parse) if asked else None
        seconds = (time.monotonic() - began) / asked if asked and self.args.mode == "live" else None
        self.tell(self.missing(questions), sample, seconds)
        return 0

    def forecast_only(self, questions: Questions) -> int:
        for structured in difficulty.modes(self.args.structured) if self.ledger.answers else ():  # the form in which an earlier start has asked
            in_form = questions.in_form(structured)
            if any(self.ledger.replies(request.key) for request in drawn(in_form, PILOT)):
                questions = in_form
                break
        self.tell(self.missing(questions), drawn(questions, PILOT))
        if not self.ledger.size:
            self.ledger.path.unlink()
        return 0

    def tell(self, missing: Missing, sample: Sequence[Request], seconds: float | None = None) -> None:
        print(forecast.told(missing, sample, self.ledger, seconds))
        if self.price and missing.count:
            in_batches = ", half of that in batches" if self.args.mode == "batch" else ""
            print(f"at ${self.price.input:g} of input and ${self.price.output:g} of output a million tokens{in_batches}")
        if self.args.budget_usd is not None and missing.worst > self.args.budget_usd - self.ledger.spent_usd:
            print(f"--budget_usd {self.args.budget_usd:g} may end before all is asked: each question needs its worst case to be free")


def refusal(reading: Reading | None) -> str | None:
    """What a server says against a question, and what would do, where that is something that settings can change."""
    told = difficulty.remedy(reading.reason) if reading and reading.outcome == "failed" and reading.reason[:4] in ("400 ", "422 ") else None
    return f"{reading.reason}; what would do: {told[1]}" if reading and told else None


def count(text: str) -> int:
    """A flag's value that is a number from 1 on."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 on")
    return int(text)


def _number_or_none(text: str) -> float | None:
    try:
        return None if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number, and not none") from None

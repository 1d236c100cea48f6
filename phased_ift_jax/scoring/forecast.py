"""What the questions that are left will cost: from the answers to a random sample of them, or from their sizes alone."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.money import Price, prompt_bound
from phased_ift_jax.scoring.request import Request

LEAST = 30  # answers, from which a forecast is made
KEPT = 50_000  # questions that memory may hold
BYTES_PER_TOKEN = 3.0, 5.0  # of English text, with any tokenizer that is in use
SHORT_ANSWER = 10  # tokens


class Missing:
    """How much is to be asked, at which price; `share` of the live one is what the mode costs."""

    def __init__(self, price: Price | None, share: float) -> None:
        self.price, self.share = price, share
        self.questions = self.count = self.size = 0  # all questions; those that are not settled, and the sum of their prompts' bounds in tokens
        self.worst = 0.0  # USD
        self.kept: list[Request] = []  # the first of them

    def add(self, request: Request, settled: bool) -> None:
        self.questions += 1
        if not settled:
            self.count += 1
            self.size += prompt_bound(request.body)
            self.worst += self.price.worst_case(request.body) * self.share if self.price else 0.0
            if len(self.kept) < KEPT:
                self.kept.append(request)


class Forecast(NamedTuple):
    """A sum over many requests, with a 95 % interval."""

    value: float
    low: float
    high: float


def forecast(sizes: Sequence[float], values: Sequence[float], count: int, total_size: float) -> Forecast:
    """What `count` further requests of a total size come to, from a random sample: a ratio estimate, which knows how large those are.

    Nothing is known of the spread of one, so that two are the least.
    """
    from scipy import stats

    n, ratio = len(sizes), sum(values) / sum(sizes)
    squares = sum((value - ratio * size) ** 2 for size, value in zip(sizes, values, strict=True))
    error = count * math.sqrt((1 / n + 1 / count) * squares / (n - 1)) * float(stats.t.ppf(0.975, n - 1))
    return Forecast(ratio * total_size, max(ratio * total_size - error, 0.0), ratio * total_size + error)


def drawn(requests: Iterable[Request], count: int) -> list[Request]:
    """So many questions at random, whatever their order: a key is a hash. A larger draw begins with a smaller one."""
    return heapq.nsmallest(count, (request for request in requests if request.sample == 0), key=lambda request: request.key)


def told(missing: Missing, sample: Sequence[Request], ledger: Ledger, seconds: float | None = None) -> str:
    """A forecast in lines; `sample` is `drawn`, and `seconds` are those of one question."""
    lines = [f"questions    {missing.questions:,}, of which {missing.count:,} are not answered"]
    if not missing.count:
        return lines[0]
    sizes, usages = [], []
    for request in sample:  # those that a smaller pilot has asked come first
        noted = list(ledger.lines(request.key))
        if not noted:
            break
        replied = [_usage(line["reply"]) for line in noted if line["reply"]]
        if ledger.replies(request.key) and None not in replied:  # what a filter has stopped cost nothing; what failed tells nothing
            sizes.append(prompt_bound(request.body))
            usages.append([usage for usage in replied if usage])
    if len(sizes) < max(min(LEAST, len(sample)), 2):
        return "\n".join(lines + _bounds(missing, sample))
    for name in ("prompt_tokens", "completion_tokens"):
        tokens = forecast(sizes, [sum(usage[name] for usage in of_one) for of_one in usages], missing.count, missing.size)
        lines.append(f"{name.replace('_', ' '):<19}{tokens.value:>15,.0f}  95 %: {tokens.low:,.0f} to {tokens.high:,.0f}")
    if price := missing.price:
        usd = forecast(sizes, [sum(price.cost(usage) * missing.share for usage in of_one) for of_one in usages], missing.count, missing.size)
        lines.append(f"{'USD':<19}{usd.value:>15,.2f}  95 %: {usd.low:,.2f} to {usd.high:,.2f}; {missing.worst:,.2f} at most")
    if seconds is not None:
        lines.append(f"{'time':<19}{timedelta(seconds=round(seconds * missing.count))!s:>15}  at this pace")
    return "\n".join([*lines, f"from {len(sizes):,} questions drawn at random and asked" + (f"; the ledger's cost is ${ledger.spent_usd:,.4f}" if missing.price else "")])


def _usage(reply: Mapping[str, Any]) -> dict[str, Any] | None:
    """A reply's `usage`; None where the server does not say how many tokens there were."""
    usage = reply.get("usage")
    whole = isinstance(usage, dict) and all(isinstance(usage.get(name), int) for name in ("prompt_tokens", "completion_tokens"))
    return usage if whole else None


def _bounds(missing: Missing, sample: Sequence[Request]) -> list[str]:
    low, high = (missing.size / each for each in BYTES_PER_TOKEN[::-1])
    most = sample[0].body["max_completion_tokens"]
    lines = [f"prompt tokens      {low:,.0f} to {high:,.0f}; {missing.size:,} at most", f"completion tokens  {most * missing.count:,} at most, {most} a question"]
    if price := missing.price:
        cheap, dear = (missing.share * (tokens * price.input + answer * missing.count * price.output) / 1e6 for tokens, answer in ((low, SHORT_ANSWER), (high, most)))
        lines.append(f"USD                {cheap:,.2f} to {dear:,.2f}; {missing.worst:,.2f} at most")
    else:
        lines.append("USD                unknown: give --price INPUT OUTPUT, in USD per million tokens")
    return [*lines, "from the sizes alone; --pilot asks some and forecasts the rest"]

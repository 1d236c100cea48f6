"""What is left to be asked, and what it would cost: from a random sample's answers, or from sizes alone."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

from phased_ift_jax.scoring import live, money
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.request import Parse, Request

PILOT = 200
LEAST = 30  # answers, from which a forecast is made
BYTES_PER_TOKEN = 3.0, 5.0  # of English text, with any tokenizer that is in use


@dataclass
class Missing:
    """How much is to be asked."""

    questions: int = 0
    count: int = 0  # of them not settled
    size: float = 0.0  # the sum of their prompts' bounds, in tokens
    worst: float | None = 0.0  # USD


def drawn(requests: Iterable[Request], count: int) -> list[Request]:
    """So many questions at random, whatever their order: a key is a hash. A larger draw begins with a smaller one."""
    return heapq.nsmallest(count, (request for request in requests if request.sample == 0), key=lambda request: request.key)


@dataclass(frozen=True)
class Forecast:
    """What a ledger lets one say; `share` is how much of the live price is paid."""

    ledger: Ledger
    price: money.Price | None
    share: float

    def missing(self, requests: Iterable[Request], parse: Parse) -> Missing:
        missing, seen = Missing(worst=0.0 if self.price else None), set[str]()
        for request in requests:
            missing.questions += 1
            if request.key not in seen and request.key not in self.ledger.pending and not live.is_settled(self.ledger, request.key, parse):
                seen.add(request.key)
                missing.count += 1
                missing.size += money.prompt_bound(request.body)
                if missing.worst is not None and self.price:
                    missing.worst += self.price.worst_case(request.body)
        return missing

    def tell(self, missing: Missing, sample: Sequence[Request], seconds: float | None, spent: str) -> None:
        """Print it; `seconds` is how long a question took, where that was measured."""
        print(f"questions    {missing.questions:,}, of which {missing.count:,} are not answered")
        if not missing.count:
            return
        bodies, usages = [], []
        for request in sample:  # by their keys' order: those that a smaller pilot has asked come first
            lines = list(self.ledger.lines(request.key))
            if not lines:
                break
            if self.ledger.replies(request.key):  # one that a filter has stopped cost nothing; one that failed tells nothing
                bodies.append(request.body)
                usages.append([line["reply"].get("usage") or {} for line in lines if line["reply"]])
        sizes = [money.prompt_bound(body) for body in bodies]
        if len(sizes) < min(LEAST, len(sample)) or len(sizes) < 2:
            self._tell_bounds(missing, sample)
            return
        for name in ("prompt_tokens", "completion_tokens"):
            tokens = money.forecast(sizes, [sum(usage.get(name) or 0 for usage in of_one) for of_one in usages], missing.count, missing.size)
            print(f"{name.replace('_', ' '):<19}{tokens.value:>15,.0f}  95 %: {tokens.low:,.0f} to {tokens.high:,.0f}")
        if self.price:
            usd = money.forecast(sizes, [sum(self.price.cost(usage) * self.share for usage in of_one if usage) for of_one in usages], missing.count, missing.size)
            print(f"{'USD':<19}{usd.value:>15,.2f}  95 %: {usd.low:,.2f} to {usd.high:,.2f}; {(missing.worst or 0) * self.share:,.2f} at most")
        if seconds:
            print(f"{'time':<19}{timedelta(seconds=round(seconds * missing.count))!s:>15}  at this pace")
        print(f"from {len(sizes):,} questions drawn at random, already asked{spent}")

    def _tell_bounds(self, missing: Missing, sample: Sequence[Request]) -> None:
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

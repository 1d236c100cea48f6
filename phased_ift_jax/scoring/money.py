"""What a question costs at most, what it did cost, and a budget that is never exceeded."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from phased_ift_jax.records import UserError
from phased_ift_jax.scoring.request import Request

BATCH = 0.5  # the price of a token in a batch, of one asked live
LONG_PROMPT = 272_000  # tokens, above which newer models cost twice as much: so all are counted, since such a prompt is no use here
OVERHEAD = 256  # tokens that a server may put around the messages
PER_MESSAGE = 16


class Price(NamedTuple):
    """USD per million tokens. `written` is what input costs that the server keeps in its cache, in parts of `input`."""

    input: float
    cached: float
    output: float
    written: float = 1.0

    def table(self) -> dict[str, Any]:
        """For people: USD per million tokens, and the day of our table (None: the user's own); `written` is what input counts at that was not read from the cache."""
        return {"input": self.input, "cached": self.cached, "written": self.input * self.written, "output": self.output, "of": PRICES_OF if self in PRICES.values() else None}

    def cost(self, usage: Mapping[str, Any]) -> float:
        """USD of a reply, from its `usage`; what was not cached counts as written.

        Raises:
            KeyError, TypeError: it is none.
        """
        prompt, output = usage["prompt_tokens"], usage["completion_tokens"]
        cached = min((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0, prompt)
        return self._usd(prompt - cached, cached, output)

    def worst_case(self, body: Mapping[str, Any]) -> float:
        """USD that a request costs at most.

        A tokenizer of bytes makes no more tokens than there are bytes; so the bytes of all that is sent, and something for what a server puts
        around it, bound the prompt, and the request's own limit bounds the answer.

        Raises:
            UserError: the request has no such limit.
        """
        limit = body.get("max_completion_tokens", body.get("max_tokens"))
        if limit is None:
            raise UserError("a budget needs requests with max_completion_tokens: without it an answer may cost anything")
        return self._usd(prompt_bound(body), 0, limit * body.get("n", 1))

    def _usd(self, prompt: float, cached: float, output: float) -> float:
        long = 2 if prompt + cached > LONG_PROMPT else 1
        return long * (prompt * self.input * self.written + cached * self.cached + output * self.output) / 1e6


PRICES_OF = "2026-08-01"  # the day of the table; a price of another day is given with --price
PRICES = {
    "gpt-3.5-turbo": Price(0.5, 0.5, 1.5),
    "gpt-4": Price(30, 30, 60),
    "gpt-4-0613": Price(30, 30, 60),
    "gpt-4-turbo": Price(10, 10, 30),
    "gpt-4.1": Price(2, 0.5, 8),
    "gpt-4.1-mini": Price(0.4, 0.1, 1.6),
    "gpt-4.1-nano": Price(0.1, 0.025, 0.4),
    "gpt-4o-2024-05-13": Price(5, 5, 15),
    "gpt-4o": Price(2.5, 1.25, 10),
    "gpt-4o-mini": Price(0.15, 0.075, 0.6),
    "gpt-5": Price(1.25, 0.125, 10),
    "gpt-5-mini": Price(0.25, 0.025, 2),
    "gpt-5-nano": Price(0.05, 0.005, 0.4),
    "gpt-5.1": Price(1.25, 0.125, 10),
    "gpt-5.2": Price(1.75, 0.175, 14),
    "gpt-5.4": Price(2.5, 0.25, 15),
    "gpt-5.4-mini": Price(0.75, 0.075, 4.5),
    "gpt-5.4-nano": Price(0.2, 0.02, 1.25),
    "gpt-5.5": Price(5, 0.5, 30),
    "gpt-5.6-luna": Price(0.2, 0.02, 1.2, written=1.25),
    "gpt-5.6-terra": Price(2, 0.2, 12, written=1.25),
    "gpt-5.6-sol": Price(5, 0.5, 30, written=1.25),
}


def price_of(model: str) -> Price | None:
    """The price of a model, also where its name is that of a dated snapshot; None for one that is not in the table."""
    return PRICES.get(model) or PRICES.get(re.sub(r"-\d{4}-\d\d-\d\d$", "", model))


def prompt_bound(body: Mapping[str, Any]) -> int:
    """Tokens of a prompt, at most."""
    return len(json.dumps(body, ensure_ascii=False).encode("utf-8", "backslashreplace")) + OVERHEAD + PER_MESSAGE * len(body["messages"])


class Budget:
    """Counts what is spent and what may yet be, in USD; both together never exceed `limit`. Without a price nothing is counted.

    Raises:
        UserError: there is a limit, but no price, or one of them is no amount.
    """

    def __init__(self, limit: float | None, price: Price | None, spent: float = 0.0, reserved: Mapping[str, float | None] | None = None) -> None:
        if limit is not None and not 0 < limit < math.inf:
            raise UserError(f"--budget_usd: {limit} is no amount; give one in USD, such as 20")
        if limit is not None and price is None:
            raise UserError("--budget_usd: the price of this model is not known; give it with --price INPUT OUTPUT, in USD per million tokens")
        if price is not None and not all(0 <= usd < math.inf for usd in price):
            raise UserError(f"--price: {price.input} {price.output} are no prices; give USD per million tokens of input and of output")
        self.limit, self.price, self.spent, self.reserved = limit, price, spent, 0.0
        self._reserved: dict[str, float] = {}
        for key, usd in (reserved or {}).items():  # by an earlier start, of whose requests nobody knows yet what became of them
            self._set_aside(key, usd)

    def worst_case(self, request: Request) -> float | None:
        return self.price.worst_case(request.body) if self.price else None

    def fits(self, usd: float | None) -> bool:
        """Whether so much may yet be spent, whatever what is under way costs. The limit itself is left by what rounding may hide."""
        return self.limit is None or self.spent + self.reserved + (usd or 0.0) <= self.limit * (1 - 1e-9)

    def reserve(self, key: str, usd: float | None) -> bool:
        """Set a request's worst case aside, before it is sent; False where that could exceed the limit."""
        if not self.fits(usd):
            return False
        self._set_aside(key, usd)
        return True

    def settle(self, key: str, usd: float | None) -> None:
        """What a request did cost, in place of what was set aside for it."""
        self.reserved -= self._reserved.pop(key, 0.0)
        self.spent += usd or 0.0

    def _set_aside(self, key: str, usd: float | None) -> None:
        assert key not in self._reserved, "a request is under way once"
        self._reserved[key] = usd or 0.0
        self.reserved += usd or 0.0

    def cost(self, reply: Mapping[str, Any], reserved: float | None) -> float | None:
        """USD of a raw reply; one that does not tell its tokens counts at its worst case."""
        if self.price is None:
            return None
        try:
            return max(self.price.cost(reply["usage"]), 0.0)
        except (KeyError, TypeError, AttributeError):
            return reserved

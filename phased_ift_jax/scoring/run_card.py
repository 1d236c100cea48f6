"""Who answered, how often and at what price: what a run card takes from the ledger's lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from phased_ift_jax.scoring import agreement
from phased_ift_jax.scoring.money import Budget
from phased_ift_jax.scoring.request import Reading, Settings


class Tally:
    """Counts over the replies that a scored file rests on."""

    def __init__(self) -> None:
        self.outcomes, self.models, self.fingerprints, self.tokens = (Counter[str]() for _ in range(4))
        self.first = self.last = ""
        self._counted = set[str]()
        self.repeats: list[tuple[float, float]] = []  # a score, and the one that the same question got when it was asked again

    def add(self, key: str, lines: Iterable[Mapping[str, Any]], reading: Reading | None) -> None:
        """The answer lines of one question, and what they come to; one that stands for several records counts once."""
        if key in self._counted:
            return
        self._counted.add(key)
        self.outcomes[reading.outcome if reading else "not asked"] += 1
        for line in lines:
            self.first, self.last = min(self.first or line["at"], line["at"]), max(self.last, line["at"])
            if reply := line["reply"]:
                self.models[str(reply.get("model") or "not told")] += 1
                self.fingerprints[str(reply.get("system_fingerprint") or "not told")] += 1
                usage = reply.get("usage") or {}
                self.tokens["input"] += usage.get("prompt_tokens") or 0
                self.tokens["input, cached"] += (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
                self.tokens["output"] += usage.get("completion_tokens") or 0

    def card(self, budget: Budget, server: Settings, thresholds: Sequence[float]) -> dict[str, Any]:
        """As JSON. `usd` is what the whole ledger has cost, other data and prompts included; null without a price."""
        price, (firsts, seconds) = budget.price, zip(*self.repeats, strict=True) if self.repeats else ((), ())
        return {
            "questions": dict(self.outcomes),
            "models": dict(self.models),
            "system_fingerprints": dict(self.fingerprints),
            "tokens": dict(self.tokens),
            "usd": round(budget.spent, 6) if price else None,
            "price_usd_per_million_tokens": price and price.table(),
            "base_url": server.place,
            "first_answer": self.first or None,
            "last_answer": self.last or None,
            "repeats": agreement.summary(firsts, seconds, thresholds) if self.repeats else None,
        }

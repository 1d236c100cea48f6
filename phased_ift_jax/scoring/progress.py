"""How far the asking is, on standard error: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from phased_ift_jax.scoring.money import Budget
from phased_ift_jax.scoring.request import Summary

EVERY = 30.0  # seconds between two lines


class Progress:
    """What `live.ask` tells, shown: questions that have ended of `total`, what the ledger has cost, and the time left."""

    def __init__(self, total: int) -> None:
        self.total, self._bar, self._began = total, None, time.monotonic()  # type: ignore[var-annotated]
        self._shown = self._began
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, unit="questions", dynamic_ncols=True)

    def __call__(self, summary: Summary, budget: Budget) -> None:
        done, now = sum(summary.outcomes.values()), time.monotonic()
        if self._bar is not None:
            self._bar.set_postfix_str(self._words(summary, budget), refresh=False)
            self._bar.update(done - self._bar.n)
        elif now - self._shown > EVERY:
            left = timedelta(seconds=round((now - self._began) / done * max(self.total - done, 0)))
            print(f"{done:,} of {self.total:,} questions, {self._words(summary, budget)}, about {left} left", file=sys.stderr)
            self._shown = now

    @staticmethod
    def _words(summary: Summary, budget: Budget) -> str:
        without = sum(summary.outcomes.values()) - summary.outcomes["ok"]
        return (f"${budget.spent:,.4f}" if budget.price else "price unknown") + (f", {without:,} without a number" if without else "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | Any) -> None:
        if self._bar is not None:
            self._bar.close()

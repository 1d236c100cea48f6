"""A process that asks numbered questions in batches and writes what came of each: `python tests/batch_asker.py '{"url": ..., "out": ...}'`."""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from phased_ift_jax.records import Failure
from phased_ift_jax.scoring.batch import Limits, ask_in_batches
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.money import Budget, Price
from phased_ift_jax.scoring.request import Reading, Request, Settings, Summary, read_reply

MODEL, KEY = "small-1", "sk-of-nobody-in-particular"
PRICE = (0.15, 0.075, 0.6)


def questions(n: int, padding: int = 0) -> list[Request]:
    text = "How hard is number {}?" + " " * padding
    return [Request({"model": MODEL, "messages": [{"role": "user", "content": text.format(i)}], "max_completion_tokens": 64}) for i in range(n)]


def parse(reply: Mapping[str, Any]) -> Reading:
    def numbers(text: str) -> Reading:
        found = re.fullmatch(r'\{"instruction_difficulty": ([\d.]+), "response_difficulty": ([\d.]+)\}', text)
        if not found:
            return Reading("unparseable", reason=text)
        values = float(found[1]), float(found[2])
        return Reading("ok", values) if max(values) <= 5 else Reading("out_of_range", reason=text)

    return read_reply(reply, numbers)


def ask(url: str, out: str, n: int, *, usd: float | None = None, requests: int = 50_000, size: int = 200_000_000, padding: int = 0, settle_seconds: float = 1.0) -> Summary:
    """Ask `n` questions, with the ledger `<out>.ledger.jsonl`, and write what came of them to `out`, in their order."""
    asked = questions(n, padding)
    with Ledger(Path(out + ".ledger.jsonl"), KEY) as ledger:
        settings = Settings(KEY, url, timeout_seconds=20, settle_seconds=settle_seconds)
        try:
            pending = {key: sent.reserved_usd for key, sent in ledger.pending.items()}
            budget = Budget(usd, Price(*PRICE), ledger.spent_usd, pending)
            return ask_in_batches(asked, ledger, budget, settings, parse, Limits(requests, size, poll_seconds=0.02))
        finally:
            readings = [ledger.reading(request.key, parse) for request in asked]
            lines = [json.dumps([i, reading.outcome, reading.value] if reading else [i, None, None]) for i, reading in enumerate(readings)]
            Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import openai  # noqa: F401 - what takes a second is done before a kill is due

    for number in (signal.SIGTERM, signal.SIGINT):  # as the verb has it; whoever starts tests in the background has them ignore the second
        signal.signal(number, signal.default_int_handler)
    print("ready", flush=True)
    try:
        print(ask(**json.loads(sys.argv[1])))
    except Failure as failure:
        sys.exit(str(failure))

"""The scored file and the two that lie beside it, the same for every source of difficulty.

    scored.jsonl             the records that have a number, in the data's order: `row_of(record)`, then difficulty, its parts, scorer ...
    scored.unscored.jsonl    the others: id, file, line, outcome, reason
    scored.card.json         the run card: who scored and how, and what this module counts
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phased_ift_jax.files import write_whole
from phased_ift_jax.records import Quarantined, Source
from phased_ift_jax.scoring.outputs import beside, line_of, write_card


@dataclass(frozen=True, slots=True)
class Unscored:
    """A record without a number, and why. `outcome` is that of its last question, or `unusable` where nothing could be made of the row."""

    id: str | None
    source: Source
    outcome: str
    reason: str

    @classmethod
    def of(cls, row: Quarantined) -> Unscored:
        return cls(row.id, row.source, "unusable", row.reason)


def write(out: Path, rows: Iterable[Mapping[str, Any]], unscored: Iterable[Unscored], card: Mapping[str, Any] | Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
    """Write the three files, each whole or not at all, the card last (a function is called when the others are written); returns the card with what is counted here added.

    That is `scored`, `unscored` (of each outcome), `mean_difficulty`, `sha256` of the scored file, `version` of this package and `written`.
    """
    digest, total, count, outcomes = hashlib.sha256(), 0.0, 0, Counter[str]()

    def lines() -> Iterator[str]:
        nonlocal total, count
        for row in rows:
            assert 1 <= row["difficulty"] <= 5, f"{row['id']}: a difficulty of {row['difficulty']}"
            total, count = total + row["difficulty"], count + 1
            digest.update((line := line_of(row)).encode())
            yield line

    def others() -> Iterator[str]:
        for record in unscored:
            outcomes[record.outcome] += 1
            yield line_of({"id": record.id, "file": record.source.path, "line": record.source.line, "outcome": record.outcome, "reason": record.reason})

    write_whole(out, lines())
    write_whole(beside(out, "unscored.jsonl"), others())
    counted = {"scored": count, "unscored": dict(outcomes), "mean_difficulty": total / count if count else None, "sha256": digest.hexdigest()}
    return write_card(out, dict(card() if callable(card) else card) | counted)


def told(out: Path, card: Mapping[str, Any]) -> str:
    """One line: how many records are scored, where, and how many are not."""
    without = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(card["unscored"].items()))
    mean = f", mean difficulty {card['mean_difficulty']:.3f}" if card["scored"] else ""
    return f"{card['scored']:,} records scored in '{out}'{mean}" + (f"; without a number: {without} ('{beside(out, 'unscored.jsonl').name}')" if without else "")

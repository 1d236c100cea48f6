"""The forgetting matrix: after each phase, how well every difficulty is known. Rows: "base", then each phase; columns: bins.

Kept in `forgetting.json` in the run's folder, one entry a row, rewritten whole when a row is added; where answers were asked for, they are in
`held_out_answers.jsonl` beside it, one a line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

from phased_ift_jax.files import write_whole

ANSWERS = "held_out_answers.jsonl"


def is_exact(expected: str, given: str) -> bool:
    """Whether an answer is the expected one to the letter: the same words, however much white space is between and around them."""
    return expected.split() == given.split()


def exact_match(answers: Sequence[tuple[str, str]]) -> float:
    """Share of (expected, given) pairs of which the answer is exact."""
    return sum(is_exact(expected, given) for expected, given in answers) / len(answers)


class ForgettingMatrix:
    """Rows of measurements by bin: {"after": name, "loss": {bin: nats per token}, "exact_match": {bin: share} where measured}."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def rows(self) -> list[dict]:
        """Read when they are first asked for: a run may have to bring the file in before."""
        return list(json.loads(self.path.read_text(encoding="utf-8"))["rows"]) if self.path.exists() else []

    def __contains__(self, after: object) -> bool:
        return any(row["after"] == after for row in self.rows)

    def add(self, after: str, answers: Sequence[Mapping[str, str]] = (), **measures: Mapping[str, float]) -> None:
        """Add a row and save the matrix, and before it the answers that it counts; a measure without values is left out."""
        self._keep(after, answers)
        self.rows.append({"after": after} | {name: dict(values) for name, values in measures.items() if values})
        self._save()

    def drop(self, after: str) -> None:
        """Remove a row, if it is there, and save the matrix: what it was measured on will be trained again."""
        self.rows = [row for row in self.rows if row["after"] != after]
        self._save()
        self._keep(after, ())

    def _keep(self, after: str, answers: Sequence[Mapping[str, str]]) -> None:
        """Have these be the answers after it, and no others."""
        path = self.path.with_name(ANSWERS)
        before = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        lines = [line for line in before if json.loads(line)["after"] != after] + [json.dumps({"after": after} | dict(answer)) + "\n" for answer in answers]
        if lines != before:
            write_whole(path, "".join(lines))

    def _save(self) -> None:
        write_whole(self.path, json.dumps({"rows": self.rows}, indent=1) + "\n")

    def table(self, measure: str, form: str) -> list[list[str]]:
        """Cells of one measure, with a header; `form` is a format such as ".3f" or ".0%". Empty where nothing was measured."""
        rows = [row for row in self.rows if measure in row]
        if not rows:
            return []
        bins = list(rows[0][measure])
        return [[f"{measure.replace('_', ' ')} after", *bins]] + [[row["after"], *(format(row[measure][name], form) for name in bins)] for row in rows]

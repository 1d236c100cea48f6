"""Prompts to be answered: the six test sets as published, and plain ones (floor 1: knows no JAX).

A file's set is declared, `vicuna=FILE`, or found from the keys that its rows have; its name is a label and means nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from phased_ift_jax.data import readers
from phased_ift_jax.data.row_kinds import BadRow, Ids
from phased_ift_jax.records import InstructionRecord, Source, Turn, UserError

KEY = "--prompts"


@dataclass(frozen=True)
class Layout:
    """Which key of a row is what; `input` says where in the row its input is."""

    id: str
    instruction: str
    input: Callable[[dict[str, Any]], Any] = lambda row: row.get("input")
    beside: tuple[str, ...] = ()  # keys that rows of this layout have, too, and by which it is known


def _first_instance(row: dict[str, Any]) -> Any:
    try:
        return row["instances"][0]["input"]
    except (LookupError, TypeError):
        raise BadRow("`instances` is not a list of objects with an `input`") from None


LAYOUTS = {
    "sinstruct": Layout("id", "instruction", _first_instance, ("instances",)),
    "wizardlm": Layout("idx", "Instruction"),
    "vicuna": Layout("question_id", "text"),
    "koala": Layout("id", "prompt"),
    "oasst": Layout("id", "instruction"),  # as plain prompts are
    "anthropic": Layout("id", "instruction"),
}


@dataclass(frozen=True)
class Prompt:
    """One prompt of a set; `fields` is its row as it was read."""

    set: str
    record: InstructionRecord  # of one turn, whose response is empty
    fields: dict[str, Any]

    @property
    def name(self) -> str:
        """What tells it from all others of a call."""
        return f"{self.set}/{self.record.id}"


def read(places: Sequence[str]) -> list[Prompt]:
    """Every row of `FILE`s and `SET=FILE`s, in order.

    Raises:
        UserError: a file that cannot be read, a row that is no prompt, of another layout than declared, or whose id was used before in its set.
    """
    prompts: list[Prompt] = []
    ids: dict[str, Ids] = {}
    for place in places:
        declared, path = re.fullmatch(r"(?:([\w.-]+)=)?(.+)", place, re.DOTALL).groups()  # type: ignore[union-attr]
        name = declared or PurePath(path).stem
        try:
            rows = list(readers.rows(path))
        except UserError as error:
            raise UserError(str(error).replace(readers.KEY, KEY, 1)) from None
        if not rows:
            raise UserError(f"{KEY}: '{path}' has no rows")
        for line, row in rows:
            source = readers.source_of(path, line)
            try:
                record = _record(row, LAYOUTS.get(declared), source, ids.setdefault(name, Ids()))
            except BadRow as reason:
                raise UserError(f"{KEY}: {source}: {reason}") from None
            prompts.append(Prompt(name, record, row))
    return prompts


def _record(row: Any, layout: Layout | None, source: Source, ids: Ids) -> InstructionRecord:
    if isinstance(row, BadRow):
        raise row
    if not isinstance(row, dict):
        raise BadRow("is not an object")
    known = [layout] if layout else LAYOUTS.values()
    layout = next((one for one in known if isinstance(row.get(one.instruction), str) and row.keys() >= {*one.beside}), None)
    if layout is None:
        wanted = " or ".join(dict.fromkeys(f"`{' + '.join([one.instruction, *one.beside])}`" for one in known))
        raise BadRow(f"keys {', '.join(list(row)[:8])}; wanted: {wanted}")
    given, written = row.get(layout.id), layout.input(row)
    if given is not None and (isinstance(given, bool) or not isinstance(given, str | int)):
        raise BadRow(f"`{layout.id}` is {given!r}; wanted: text or a whole number")
    if not isinstance(written, str | None):
        raise BadRow("the input is not text")
    turns = (Turn(row[layout.instruction], "", written or ""),)
    if not turns[0].instruction.strip() and not turns[0].input.strip():
        raise BadRow("no text: instruction and input are empty")
    return InstructionRecord(ids.claim(None if given in (None, "") else str(given), "", turns, source), turns, source)

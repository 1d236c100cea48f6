"""The types that travel between rooms, one per stage of the data (floor 0: imports nothing).

Every stage has its own type, and no field is "not yet filled in": a record without a score is an
`InstructionRecord`, one with a score is a `ScoredRecord`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Failure(Exception):
    """Something went wrong inside, and one line says what: exit code 1."""


class UserError(Exception):
    """The user's input is at fault. One line: the thing, its value, what would do. Verbs print it and exit 2."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where a row was read: a file (or hub name) and its 1-based line, or its 1-based row where a format has no lines."""

    path: str
    line: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}"


@dataclass(frozen=True, slots=True)
class Turn:
    """One exchange. `input` is the second part of an Alpaca triple, empty everywhere else."""

    instruction: str
    response: str
    input: str = ""


@dataclass(frozen=True, slots=True)
class InstructionRecord:
    """A conversation as read: at least one turn; `system` is empty where the data has none."""

    id: str
    turns: tuple[Turn, ...]
    source: Source
    system: str = ""

    @property
    def has_responses(self) -> bool:
        """Whether every turn has a response to learn: spaces are none."""
        return all(turn.response.strip() for turn in self.turns)


@dataclass(frozen=True, slots=True)
class ScoredRecord:
    """A record with a difficulty from 1 (easy) to 5 (hard)."""

    record: InstructionRecord
    difficulty: float


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A row that is not used, and why. `id` is None where none could be read."""

    source: Source
    id: str | None
    reason: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What the readers made of some files; `rows == len(records) + len(quarantined)` always holds."""

    records: tuple[InstructionRecord | ScoredRecord, ...]
    quarantined: tuple[Quarantined, ...]

    @property
    def rows(self) -> int:
        return len(self.records) + len(self.quarantined)


@dataclass(frozen=True, slots=True, eq=False)
class TokenizedExample:
    """Token ids of one conversation and the half-open spans `[start, end)` of them that are trained.

    A span holds one response and its end-of-sequence token. In a `truncated` example the last span may be a prefix of its response,
    without that token; turns that do not fit at all are gone.
    """

    tokens: np.ndarray  # int32, shape (T,)
    responses: tuple[tuple[int, int], ...]
    truncated: bool = False

    @property
    def response_start(self) -> int:
        """The last response's first token: `tokens[:response_start]` is what generation is given as its prompt."""
        return self.responses[-1][0]

    @property
    def response_tokens(self) -> int:
        """How many tokens are trained."""
        return sum(end - start for start, end in self.responses)


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run: the rows it trains (positions in the dataset, ascending) and the training keys it changes."""

    index: int  # 1-based, as in folder names
    name: str
    rows: np.ndarray = field(repr=False)  # int64, shape (n,)
    overrides: dict[str, object] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return f"{self.index}-{self.name}"


@dataclass(frozen=True, slots=True, eq=False)
class PackedBatch:
    """The examples of one optimizer step in B rows of T tokens: numpy arrays on the host, `jax.Array` on the device.

    `segments_BT` numbers the examples of a row from 1 (0 is padding); `positions_BT` restarts at 0 in each of them.
    `targets_BT` is the next token of the same example, and `weights_BT` is 1.0 where that token is trained, else 0.0.
    """

    tokens_BT: Any
    targets_BT: Any
    weights_BT: Any
    segments_BT: Any
    positions_BT: Any


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge made of one pair of answers in one order: (candidate's, baseline's) scores, whichever came first, or None and why there are none.

    `key` is the question's in the ledger, where the raw reply is; empty where no model was asked.
    """

    outcome: str  # "ok" with scores; else refused, filtered, unparseable, out_of_range, failed, or no_answer where there was nothing to judge
    scores: tuple[float, float] | None = None
    reason: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True)
class Judgment:
    """A judge's view of two answers to one prompt, seen with the candidate's first and with the baseline's first.

    `lengths` are (candidate's, baseline's), by unit: characters, words, tokens; a unit that was not measured is missing.
    """

    id: str
    test_set: str
    candidate: str
    baseline: str
    judge: str
    orders: tuple[Judged, Judged]
    lengths: dict[str, tuple[int, int]] = field(default_factory=dict)

"""What `split` makes of scored rows: who is in which bin, the facts of each bin, and the files that say so (floor 1: knows no JAX)."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phased_ift_jax import __version__, pictures
from phased_ift_jax.data.dataset import write_quarantine
from phased_ift_jax.data.phases import hash_of_ids, plain
from phased_ift_jax.data.row_kinds import row_of
from phased_ift_jax.data.splitting import Scores
from phased_ift_jax.data.templates import join_input
from phased_ift_jax.files import LOCK, sole_writer, write_whole
from phased_ift_jax.records import InstructionRecord, Quarantined, Reading, ScoredRecord, UserError

MAKER = "phased_ift_jax split"
LIST, UNSCORED, PICTURE, TFDS = "phases.json", "unscored.jsonl", "distribution", "tfds"
DERIVED = (UNSCORED, f"{PICTURE}.png", f"{PICTURE}.svg", TFDS, f".{TFDS}.part")  # made after the list, so that nothing contradicts it
NO_SCORE = "no score"
Encode = Callable[[Sequence[str]], Sequence[Any]]  # texts as lists of token ids


@dataclass(frozen=True, eq=False)
class Split:
    """Bins over all records read: `bin_of` counts from 1; 0 is a record without a score."""

    reading: Reading
    names: tuple[str, ...]
    thresholds: tuple[float, ...]
    bin_of: np.ndarray

    def rows(self, number: int) -> list[int]:
        """Positions of a bin's records, in reading order."""
        return np.flatnonzero(self.bin_of == number).tolist()

    @property
    def left_out(self) -> tuple[Quarantined, ...]:
        """Every row that is in no bin: those without a score, and those that could not be read."""
        unscored = [plain(self.reading.records[row]) for row in self.rows(0)]
        return (*(Quarantined(record.source, record.id, NO_SCORE) for record in unscored), *self.reading.quarantined)


def scores_of(reading: Reading, path: str) -> Scores:
    """The scores of what was read; raises `UserError` where there is none."""
    scores = [record.difficulty for record in reading.records if isinstance(record, ScoredRecord)]
    if not scores:
        raise UserError(f"split: no row of '{path}' has a score (`difficulty` or `score`, from 1 to 5); score the data first")
    return Scores.of(scores)


def split(reading: Reading, names: Sequence[str], thresholds: Sequence[float]) -> Split:
    """Put every scored record in the bin between its thresholds: half-open, the last bin closed."""
    values = np.array([record.difficulty if isinstance(record, ScoredRecord) else np.nan for record in reading.records])
    bin_of = np.where(np.isnan(values), 0, np.searchsorted(thresholds, values, side="right") + 1)
    return Split(reading, tuple(names), tuple(thresholds), bin_of)


def facts(made: Split, encode: Encode | None) -> list[dict[str, Any]]:
    """Of each bin: rows and their share, scores, rows with an empty response, which training leaves out, mean words and characters of the
    responses, and with `encode` mean tokens of prompt and response.
    """
    told, scored = [], int((made.bin_of > 0).sum())
    for number, name in enumerate(made.names, 1):
        records = [record for row in made.rows(number) if isinstance(record := made.reading.records[row], ScoredRecord)]
        scores = [record.difficulty for record in records]
        responses = ["\n".join(turn.response for turn in record.record.turns) for record in records]
        told.append(
            {"name": name, "rows": len(records), "share": len(records) / scored, "lowest": min(scores), "highest": max(scores), "mean_score": float(np.mean(scores))}
            | {"empty_responses": sum(not record.record.has_responses for record in records)}
            | {"mean_words": float(np.mean([len(text.split()) for text in responses])), "mean_characters": float(np.mean([len(text) for text in responses]))}
            | ({"mean_tokens": _tokens([record.record for record in records], encode) / len(records)} if encode else {})
        )
    return told


def _tokens(records: Sequence[InstructionRecord], encode: Encode) -> int:
    """Tokens of prompts and responses, each encoded by itself, without a template: what the paper's means count."""
    texts = [text for record in records for turn in record.turns for text in (join_input(turn), turn.response)]
    return sum(map(len, encode(texts + [record.system for record in records if record.system])))


def run_card(path: str) -> dict[str, Any] | None:
    """What `score` says of a scored file in the run card beside it (scored.card.json beside scored.jsonl); None where there is none for this file."""
    if not path.endswith(".jsonl"):
        return None
    places = (path, path.removesuffix(".jsonl") + ".card.json")
    try:
        scored, text = ((pictures.copy(place, "split") if pictures.is_ours(place) else Path(place).expanduser()).read_bytes() for place in places)
        card = json.loads(text)
    except (OSError, ValueError, UserError):
        return None
    return card if isinstance(card, dict) and card.get("sha256") == hashlib.sha256(scored).hexdigest() else None


@contextmanager
def claimed(out: str) -> Iterator[Path]:
    """The folder to write in, made where it is not there, and rid of what an earlier split derived from its list; held for this process.

    Raises:
        UserError: it cannot be written, another process is at it, or it holds what no split has written.
    """
    folder = Path(out).expanduser()
    if pictures.is_ours(out):
        raise UserError(f"--out: '{out}' is in a bucket; name a folder of this machine, and copy it there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        strangers = sorted(set(os.listdir(folder)) - {LOCK, f".{LIST}.part"})
        if strangers and not _is_ours(folder / LIST):
            raise UserError(f"--out: '{out}' holds '{strangers[0]}', and no {LIST} of a split; name another folder, or an empty one")
        with sole_writer(folder):
            for path in (folder / name for name in DERIVED):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
            yield folder
    except OSError as error:
        raise UserError(f"--out: cannot write in '{out}': {error.strerror or error}; name another folder") from error


def _is_ours(path: Path) -> bool:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(told, dict) and str(told.get("made_by", "")).startswith(MAKER)


def write_list(made: Split, told: Mapping[str, Any], bins: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """phases.json, whole, before all that is derived from it; and the list of the rows that are in no bin."""
    ids = [[plain(made.reading.records[row]).id for row in made.rows(number)] for number in range(1, len(made.names) + 1)]
    listed = [{**facts, "ids_sha256": hash_of_ids(some), "ids": some} for facts, some in zip(bins, ids, strict=True)]
    write_whole(folder / LIST, json.dumps({"made_by": f"{MAKER} {__version__}", **told, "bins": listed}, ensure_ascii=False, indent=1) + "\n")
    write_quarantine(made.left_out, folder / UNSCORED)


def write_tfds(made: Split, folder: Path) -> Path:
    """The phases as a TFDS dataset, one split each, and one of the records without a score where there are such."""
    from phased_ift_jax.data import phase_builder

    names = {0: phase_builder.UNSCORED} | dict(enumerate(made.names, 1))
    splits = {names[number]: [_tfds_row(made.reading.records[row], row) for row in made.rows(number)] for number in (*range(1, len(names)), 0)}
    phase_builder.write(folder / TFDS, {name: rows for name, rows in splits.items() if rows})
    return folder / TFDS


def _tfds_row(record: InstructionRecord | ScoredRecord, position: int) -> dict[str, Any]:
    return row_of(plain(record)) | {"position": position, "difficulty": repr(record.difficulty) if isinstance(record, ScoredRecord) else ""}

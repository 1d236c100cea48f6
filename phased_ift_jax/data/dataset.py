"""Everything a run trains and evaluates on, from files to phases; every row read is used, truncated or quarantined, and they add up."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from phased_ift_jax.config import CurriculumConfig, DataConfig
from phased_ift_jax.data import readers
from phased_ift_jax.data.phases import Curriculum, assign_bins, curriculum_of, draw_phases, draw_sample, hold_out, plain
from phased_ift_jax.data.tfds_folders import in_order
from phased_ift_jax.data.tokenization import tokenize
from phased_ift_jax.files import write_whole
from phased_ift_jax.records import InstructionRecord, Phase, Quarantined, ScoredRecord, TokenizedExample, UserError


@dataclass(frozen=True)
class BinCount:
    """What became of the rows of one bin; `read == used + left_out + quarantined`, and `truncated` and `held_out` are parts of `used`."""

    name: str
    read: int
    used: int
    truncated: int
    quarantined: int
    held_out: int
    left_out: int  # of the sample


@dataclass(frozen=True, eq=False)
class Dataset:
    """The usable rows in reading order, their bins, and the phases over them."""

    records: tuple[InstructionRecord, ...]
    examples: tuple[TokenizedExample, ...]
    bin_of: np.ndarray  # from 1
    bin_names: tuple[str, ...]
    eval_bin_of: np.ndarray  # the bins by which held-out rows are measured
    eval_bin_names: tuple[str, ...]
    held_out: np.ndarray  # bool
    phases: tuple[Phase, ...]
    curriculum: Curriculum
    phased: tuple[Phase, ...]  # the phased arm's phases, whatever the arm: where one_off may restart its schedule
    counts: tuple[BinCount, ...]
    quarantined: tuple[Quarantined, ...]
    rows_read: int
    data_hash: str
    difficulties: dict[float, int]  # usable rows by their difficulty in tenths, rounded down; empty where there are no scores

    @property
    def identity(self) -> str:
        """SHA-256 of the data and of what is done with it: rows, their bins, and which are held out. A run is continued on the same only."""
        return hashlib.sha256(self.data_hash.encode() + self.bin_of.tobytes() + self.held_out.tobytes()).hexdigest()

    def held_out_rows(self, bin_number: int) -> np.ndarray:
        """Positions of the held-out rows of one of the bins by which they are measured (from 1)."""
        return np.flatnonzero(self.held_out & (self.eval_bin_of == bin_number))


def prepare(data: DataConfig, curriculum: CurriculumConfig, seed: int, tokenizer: Any) -> Dataset:
    """Read, tokenize, bin, hold out and draw phases. Writes nothing.

    Raises:
        UserError: unreadable data, more rows quarantined than `data.max_quarantined` allows, or a curriculum that does not fit the data.
    """
    reading = readers.read(data.path, data.split, data.append_period)
    records = reading.records
    results = list(tokenize([plain(record) for record in records], tokenizer, data.prompt_template, data.max_length, data.truncation))
    examples = [result if isinstance(result, TokenizedExample) else None for result in results]
    if not any(examples):  # nothing to put in bins: the first row's fault says more than a complaint about scores or lengths
        _refuse_if_many([*reading.quarantined, *(result for result in results if isinstance(result, Quarantined))], reading.rows, data.max_quarantined)
    files = in_order(plain(record).source.path for record in records)
    binning = assign_bins(curriculum.bins, records, examples, files)
    measured = assign_bins(data.eval_bins, records, examples, files, "data.eval_bins") if data.eval_bins else binning
    measurable = np.array([example is not None for example in examples]) & (measured.bin_of > 0)
    usable = measurable & (binning.bin_of > 0)
    truncated = np.array([example is not None and example.truncated for example in examples])

    quarantined = list(reading.quarantined)
    for record, result, *numbers in zip(records, results, binning.bin_of, measured.bin_of, strict=True):
        if isinstance(result, Quarantined):
            quarantined.append(result)
        elif 0 in numbers:
            quarantined.append(Quarantined(plain(record).source, plain(record).id, measured.unbinned if numbers[0] else binning.unbinned))
    _refuse_if_many(quarantined, reading.rows, data.max_quarantined)

    data_hash = hash_of(records)
    # from what the arm's own bins have no say in, so that they are the same rows for every arm
    held = hold_out(measured.bin_of, measurable, data_hash, data.eval_size, data.eval_seed)
    used = held | draw_sample(measured.bin_of, measurable & ~held, data_hash, data.sample_size, data.eval_seed)
    if data.eval_bins and (lacking := np.flatnonzero((used if data.sample_size else held) & ~usable)).size:
        row = plain(records[lacking[0]]).id
        raise UserError(f"curriculum.bins: {len(lacking)} of the rows that data.eval_bins draws are in none of its bins, such as {row!r}; put them in, or leave data.eval_bins out")
    used &= usable
    counts = tuple(
        BinCount(
            name=name,
            read=int((binning.bin_of == b).sum()),
            used=int(((binning.bin_of == b) & used).sum()),
            truncated=int(((binning.bin_of == b) & used & truncated).sum()),
            quarantined=int(((binning.bin_of == b) & ~usable).sum()),
            held_out=int(((binning.bin_of == b) & held).sum()),
            left_out=int(((binning.bin_of == b) & usable & ~used).sum()),
        )
        for b, name in enumerate(binning.names, 1)
    )
    kept = np.flatnonzero(used)
    bin_of, held = binning.bin_of[kept], held[kept]
    phased = curriculum_of(curriculum.model_copy(update={"arm": "phased"}), binning.names)
    matrix = curriculum_of(curriculum, binning.names)
    return Dataset(
        records=tuple(plain(records[row]) for row in kept),
        examples=tuple(example for example, good in zip(examples, used, strict=True) if example is not None and good),
        bin_of=bin_of,
        bin_names=binning.names,
        eval_bin_of=measured.bin_of[kept],
        eval_bin_names=measured.names,
        held_out=held,
        phases=draw_phases(matrix, curriculum.arm, bin_of, ~held, seed),
        curriculum=matrix,
        phased=draw_phases(phased, "phased", bin_of, ~held, seed),
        counts=counts,
        quarantined=tuple(quarantined),
        rows_read=reading.rows,
        data_hash=data_hash,
        difficulties=_by_tenths([record.difficulty for row in kept if isinstance(record := records[row], ScoredRecord)]),
    )


def write_quarantine(quarantined: tuple[Quarantined, ...], path: Path) -> None:
    """One JSON line for each row that is not used: file, line, id, reason."""
    lines = (json.dumps({"file": row.source.path, "line": row.source.line, "id": row.id, "reason": _reason(row)}, ensure_ascii=False) for row in quarantined)
    # some names of files are not Unicode; what stands for their bytes is written as JSON escapes it
    write_whole(path, "".join(line.encode(errors="backslashreplace").decode() + "\n" for line in lines))


def _by_tenths(difficulties: list[float]) -> dict[float, int]:
    tenths, counts = np.unique(np.floor(np.round(np.array(difficulties) * 10, 6)) / 10, return_counts=True)
    return dict(zip(tenths.tolist(), counts.tolist(), strict=True))


def _reason(row: Quarantined) -> str:
    """A reason as long as one reads: some quote the text that is at fault."""
    return row.reason if len(row.reason) <= 300 else row.reason[:300] + " ..."


def hash_of(records: Any) -> str:
    """SHA-256 of ids and contents in reading order: the identity of the data, whatever file it came from."""
    digest = hashlib.sha256()
    for record in map(plain, records):
        turns = [[turn.instruction, turn.input, turn.response] for turn in record.turns]
        digest.update(json.dumps([record.id, record.system, turns], ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()


def _refuse_if_many(quarantined: list[Quarantined], rows: int, allowed: float) -> None:
    if len(quarantined) > allowed * rows:
        first = quarantined[0]
        raise UserError(
            f"data: {len(quarantined)} of {rows} rows cannot be used, more than data.max_quarantined {allowed:g} allows; "
            f"the first is {first.source} (id {short(first.id)}): {_reason(first)}"
        )
    if len(quarantined) == rows:
        raise UserError("data.path: no row can be used")

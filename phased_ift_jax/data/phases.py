"""Bins of difficulty, and the matrix phase x bin behind every arm.

A curriculum is a matrix of shares: its row k says which share of each bin phase k trains. The identity is "phased", one row of ones is
"one_off", the anti-diagonal is the reversed order, a lower triangle is replay. The `random` arm keeps the phased arm's sizes and draws
the rows.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from phased_ift_jax import pictures
from phased_ift_jax.config import NAME, Bins, CurriculumConfig, PhaseConfig
from phased_ift_jax.data.batches import generator
from phased_ift_jax.records import InstructionRecord, Phase, ScoredRecord, TokenizedExample, UserError

Record = InstructionRecord | ScoredRecord


@dataclass(frozen=True, eq=False)
class Binning:
    """Bin names, and each record's bin: 0 is none, with the reason in `unbinned`."""

    names: tuple[str, ...]
    bin_of: np.ndarray  # int, from 1, one for each record
    unbinned: str = ""


@dataclass(frozen=True)
class Curriculum:
    """The matrix, one row a phase, with names and overrides; `shares[k][j]` is the share of bin j+1 that phase k+1 trains."""

    names: tuple[str, ...]
    shares: tuple[tuple[float, ...], ...]
    overrides: tuple[dict[str, object], ...]


def assign_bins(bins: Bins, records: Sequence[Record], examples: Sequence[TokenizedExample | None], files: Sequence[str], key: str = "curriculum.bins") -> Binning:
    """Put every record in a bin. `examples` has None where tokenization refused a row; `files` are the data's files in order; `key` is that of the bins.

    Raises:
        UserError: nothing to measure by, or a phases.json that cannot be used.
    """
    if bins.from_ is not None:
        return _listed(bins.from_, records, f"{key}.from")
    if bins.by == "file":
        number = {file: i for i, file in enumerate(files, 1)}
        names = _names(bins, key, [re.sub(r"[^A-Za-z0-9_.+-]+", "_", Path(file).stem).lstrip("_.+-") or "file" for file in files])
        return Binning(names, np.array([number.get(plain(record).source.path, 0) for record in records], np.int64), "it is in no phase of its TFDS folder")
    if bins.by == "score":
        values = [record.difficulty if isinstance(record, ScoredRecord) else None for record in records]
        if not any(value is not None for value in values):
            raise UserError(f"{key}: by score, but no row has a score; score the data first, or use `by: file` or `by: length`")
        unbinned = f"no score, and {key} goes by score"
    else:
        values = [None if example is None else float(example.response_tokens) for example in examples]
        unbinned = "no length"
    known = np.array([value for value in values if value is not None], np.float64)
    bounds = bins.thresholds if bins.thresholds is not None else tuple(np.quantile(known, bins.quantiles or (), method="higher"))
    # half-open on the right, the last bin closed: a value equal to a bound belongs to the bin above
    bin_of = [0 if value is None else int(np.searchsorted(bounds, value, side="right")) + 1 for value in values]
    return Binning(_names(bins, key, [f"stage{i}" for i in range(1, len(bounds) + 2)]), np.array(bin_of, np.int64), unbinned)


def plain(record: Record) -> InstructionRecord:
    """The record without its score."""
    return record.record if isinstance(record, ScoredRecord) else record


def hold_out(bin_of: np.ndarray, usable: np.ndarray, data_hash: str, eval_size: int, eval_seed: int) -> np.ndarray:
    """Mark `eval_size` usable rows of each bin as held out. Drawn from (data hash, eval_seed) alone: arms, orders and seeds share them."""
    rank = generator("held out", data_hash, eval_seed).permutation(len(bin_of))
    held = np.zeros(len(bin_of), bool)
    for number in np.unique(bin_of[bin_of > 0]):
        rows = np.flatnonzero((bin_of == number) & usable)
        held[rows[np.argsort(rank[rows])][:eval_size]] = True
    return held


def draw_sample(bin_of: np.ndarray, free: np.ndarray, data_hash: str, size: int | None, seed: int) -> np.ndarray:
    """Mark `size` of the free rows (None: all), of each bin its share, from (data hash, seed) alone.

    Raises:
        UserError: there are fewer.
    """
    if size is None:
        return free
    if size > free.sum():
        raise UserError(f"data.sample_size: {size:,} rows, and there are {free.sum():,} to train; give no more, or null for all")
    rank, place = generator("sample", data_hash, seed).permutation(len(bin_of)), np.full(len(bin_of), np.inf)
    for number in np.unique(bin_of[free]):
        rows = np.flatnonzero((bin_of == number) & free)
        place[rows[np.argsort(rank[rows])]] = (np.arange(len(rows)) + 0.5) / len(rows)  # how far into its bin: the first `size` of all are each bin's share
    drawn = np.zeros(len(bin_of), bool)
    drawn[np.lexsort((rank, place))[:size]] = True
    return drawn


def curriculum_of(config: CurriculumConfig, names: Sequence[str]) -> Curriculum:
    """The matrix of the phased arm, or its one row of ones for one_off.

    Raises:
        UserError: a bin that does not exist, or one that two phases train in full.
    """
    listed = config.phases or tuple(
        PhaseConfig(name="+".join(names[b - 1] for b in bins if 0 < b <= len(names)) or "none", bins=bins)
        for bins in (entry if isinstance(entry, tuple) else (entry,) for entry in config.order or range(1, len(names) + 1))
    )
    shares: list[tuple[float, ...]] = []
    for number, phase in enumerate(listed, 1):
        for b in phase.bins:
            if not 1 <= b <= len(names):
                raise UserError(f"curriculum: phase {number} names bin {b}; there are bins 1 to {len(names)} ({', '.join(names)})")
            if any(row[b - 1] == 1.0 for row in shares):
                raise UserError(f"curriculum: bin {b} ({names[b - 1]}) is trained in two phases; use `replay` to train a share of it again")
        before = [max(column) for column in zip(*shares, strict=True)] if shares else [0.0] * len(names)
        shares.append(tuple(1.0 if b in phase.bins else phase.replay * (before[b - 1] > 0) for b in range(1, len(names) + 1)))
    if config.arm == "one_off":
        return Curriculum(("one_off",), (tuple(max(column) for column in zip(*shares, strict=True)),), ({},))
    return Curriculum(tuple(phase.name for phase in listed), tuple(shares), tuple(phase.overrides for phase in listed))


def draw_phases(curriculum: Curriculum, arm: str, bin_of: np.ndarray, trainable: np.ndarray, seed: int) -> tuple[Phase, ...]:
    """The rows of each phase, by the matrix; for `random`, as many rows, drawn from all that the matrix trains.

    Raises:
        UserError: a phase without a row.
    """
    rows_of = [np.flatnonzero((bin_of == b) & trainable) for b in range(1, len(curriculum.shares[0]) + 1)]
    chosen = []
    for number, shares in enumerate(curriculum.shares, 1):
        parts = [_part(rows, share, ("replay", seed, number, b)) for b, (rows, share) in enumerate(zip(rows_of, shares, strict=True), 1)]
        chosen.append(np.sort(np.concatenate(parts)))
    if arm == "random":
        pool = generator("random arm", seed).permutation(np.unique(np.concatenate(chosen)))
        edges = np.cumsum([0, *map(len, chosen)])
        chosen = [np.sort(np.take(pool, range(start, stop), mode="wrap")) for start, stop in pairwise(edges)]
    for name, rows in zip(curriculum.names, chosen, strict=True):
        if not len(rows):
            left = [b for b, of_bin in enumerate(rows_of, 1) if len(of_bin)]
            raise UserError(
                f"curriculum: phase {name!r} is empty: no usable row is in its bins after held-out rows are taken; change bins, data.eval_size or data.sample_size"
                + f", or train the bins that have rows: --curriculum.order '{left}'" * bool(left)
            )
    names = [f"random{number}" if arm == "random" else name for number, name in enumerate(curriculum.names, 1)]
    return tuple(Phase(i, name, rows, overrides) for i, (name, rows, overrides) in enumerate(zip(names, chosen, curriculum.overrides, strict=True), 1))


def _part(rows: np.ndarray, share: float, name: tuple[object, ...]) -> np.ndarray:
    if share in (0.0, 1.0):
        return rows if share else rows[:0]
    return generator(*name).permutation(rows)[: round(share * len(rows))]


def _names(bins: Bins, key: str, default: list[str]) -> tuple[str, ...]:
    if bins.names is None:
        return tuple(default if len(set(default)) == len(default) else [f"{i}-{name}" for i, name in enumerate(default, 1)])
    if len(bins.names) != len(default):
        raise UserError(f"{key}.names: {len(bins.names)} names for {len(default)} bins")
    return bins.names


def hash_of_ids(ids: Sequence[str]) -> str:
    """SHA-256 of ids in their order, as a JSON array."""
    return hashlib.sha256(json.dumps(ids).encode()).hexdigest()


def _listed(path: str, records: Sequence[Record], key: str) -> Binning:
    try:
        local = pictures.copy(path, key) if pictures.is_ours(path) else Path(path)
        listed = json.loads(local.read_text(encoding="utf-8"))["bins"]
        named = [(str(entry["name"]), [str(i) for i in entry["ids"]]) for entry in listed]
        changed = [entry["name"] for entry, (_, ids) in zip(listed, named, strict=True) if entry.get("ids_sha256", hash_of_ids(ids)) != hash_of_ids(ids)]
        if not all(isinstance(entry["ids"], list) for entry in listed):
            raise TypeError
    except OSError as error:
        raise UserError(f"{key}: cannot read '{path}': {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f'{key}: \'{path}\' is not of the form {{"bins": [{{"name": "easy", "ids": ["1", "2"]}}]}}') from None
    if changed:
        raise UserError(f"{key}: the ids of bin {changed[0]!r} of '{path}' are not those that its ids_sha256 is of; split again, or leave ids_sha256 out")
    names = tuple(name for name, _ in named)
    if len(set(names)) < len(names) or not all(re.fullmatch(NAME, name) for name in names):
        raise UserError(f"{key}: the names of '{path}', {', '.join(map(repr, names))}, must be distinct and made of letters, digits and _.+-")
    number: dict[str, int] = {}
    for b, (name, ids) in enumerate(named, 1):
        for i in ids:
            if number.setdefault(i, b) != b:
                raise UserError(f"{key}: id {i!r} is in bins {named[number[i] - 1][0]!r} and {name!r} of '{path}'; bins are disjoint")
    unknown = number.keys() - {plain(record).id for record in records}
    if unknown:
        raise UserError(f"{key}: '{path}' lists {len(unknown)} ids that the data does not have, such as {min(unknown)[:80]!r}")
    bin_of = np.array([number.get(plain(record).id, 0) for record in records], np.int64)
    return Binning(names, bin_of, f"its id is not in '{path}'")

"""Packing the examples of one step into rows: pure functions of lengths, and a small fixed set of row shapes for a whole run.

A step trains the same examples packed or not; packing only changes how many rows they fill. All steps share one row count, and each
takes the shortest of a few row lengths that holds it, so that the train step is compiled once per length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from phased_ift_jax.records import PackedBatch, TokenizedExample

GRANULE = 32  # row lengths are multiples of this: of 64, a step that is spread over many devices would waste twice as much
SAMPLED_STEPS = 4096  # steps looked at to choose shapes; the longest row is made to hold all others too


@dataclass(frozen=True)
class Shapes:
    """The row shapes of a run: `rows` per step and the row lengths in tokens, rising. `packed` is False for one example a row."""

    rows: int
    lengths: tuple[int, ...]
    packed: bool = True


def first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """First-fit decreasing: rows of at most `capacity` tokens as lists of indices; ties keep their order.

    Raises:
        ValueError: an example is longer than the capacity.
    """
    rows, free = list[list[int]](), list[int]()
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"an example of {length} tokens does not fit in a row of {capacity}")
        row = next((row for row, space in enumerate(free) if space >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(index)
        free[row] -= length
    return rows


def balanced(lengths: Sequence[int], capacity: int, count: int) -> list[list[int]]:
    """At most `count` rows of at most `capacity` tokens, as even as is easily had: matmuls cost all rows the same, attention costs the square of each
    example, and a step waits for the slowest row. Longest first, each goes into the row that has the least to do, tokens counted in as far as is
    needed for all to fit; first-fit decreasing where that is no less even.
    """
    ways = [first_fit(lengths, capacity), *(_least_first(lengths, capacity, count, share * max(lengths)) for share in (0, 0.5, 2, 8))]
    return min(filter(None, ways), key=lambda rows: max(sum(int(lengths[index]) ** 2 for index in row) for row in rows))


def _least_first(lengths: Sequence[int], capacity: int, count: int, extra: float) -> list[list[int]]:
    """Longest first, each into the row whose examples weigh the least, a length L its square and `extra` * L; empty where one does not fit."""
    rows, free, weights = list[list[int]]([] for _ in range(count)), np.full(count, capacity), np.zeros(count)
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = int(lengths[index])
        row = int(np.where(free >= length, weights, np.inf).argmin())
        if free[row] < length:
            return []
        rows[row].append(index)
        free[row] -= length
        weights[row] += length * (length + extra)
    return rows


def fits(lengths_SB: np.ndarray, capacity_S: np.ndarray, rows: int) -> np.ndarray:
    """Whether first-fit decreasing packs each of S steps into `rows` rows of its capacity: `first_fit`, for many steps at once.

    `lengths_SB` falls along B and is padded with zeros.
    """
    free_SR = np.repeat(capacity_S[:, None], rows, axis=1)
    every = np.arange(len(capacity_S))
    fitting_S = np.ones(len(capacity_S), bool)
    for length_S in lengths_SB.T:
        holds_SR = free_SR >= length_S[:, None]
        row_S = holds_SR.argmax(axis=1)
        fitting_S &= holds_SR[every, row_S]
        free_SR[every, row_S] -= length_S
    return fitting_S


def shortest_rows(lengths_SB: np.ndarray, rows: int) -> np.ndarray:
    """For each step the shortest row length, a multiple of `GRANULE`, at which its examples fit in `rows` rows."""
    needed_S = np.maximum(lengths_SB.max(axis=1), -(-lengths_SB.sum(axis=1) // rows))
    needed_S = -(-needed_S // GRANULE) * GRANULE
    open_S = np.arange(len(needed_S))
    while len(open_S):
        open_S = open_S[~fits(lengths_SB[open_S], needed_S[open_S], rows)]
        needed_S[open_S] += GRANULE
    return needed_S


def group(needed_S: np.ndarray, shapes: int, tau: float) -> tuple[tuple[int, ...], float]:
    """At most `shapes` row lengths that cover every step at the least cost, and that cost; exact, by dynamic programming.

    A row of T tokens costs T * (1 + T / tau): matmuls grow with its tokens, attention with their square.
    """
    values, counts = np.unique(needed_S, return_counts=True)
    price = values * (1 + values / tau)
    below = np.concatenate([[0], np.cumsum(counts)])
    n = len(values)
    best = np.full((min(shapes, n) + 1, n + 1), np.inf)
    best[:, 0] = 0.0
    cut = np.zeros_like(best, dtype=np.int64)
    for k in range(1, len(best)):
        for end in range(1, n + 1):
            costs = best[k - 1, :end] + (below[end] - below[:end]) * price[end - 1]
            cut[k, end] = costs.argmin()
            best[k, end] = costs[cut[k, end]]
    k, end, chosen = len(best) - 1, n, []
    while end:
        chosen.append(int(values[end - 1]))
        k, end = k - 1, int(cut[k, end])
    return tuple(reversed(chosen)), float(best[-1, -1])


def choose_shapes(steps: Sequence[np.ndarray], rows_multiple: int, shapes: int, tau: float, packed: bool = True) -> Shapes:
    """The row count and row lengths with the least cost over these steps (each an array of its examples' lengths).

    `rows_multiple` is what the row count must divide by: devices that share rows x accumulation steps. `tau` is the row length, in
    tokens, at which attention costs as much as all matmuls.
    """
    most = -(-max(map(len, steps)) // rows_multiple)
    sample = steps if len(steps) <= SAMPLED_STEPS else [steps[i] for i in np.linspace(0, len(steps) - 1, SAMPLED_STEPS).astype(int)]

    multiples = {*range(1, min(most, 8) + 1), *(round(1.25**i) for i in range(8, 64) if 1.25**i < most), most} if packed else {most}
    costs = {}
    for rows in sorted(multiple * rows_multiple for multiple in multiples):
        lengths, cost = group(_needed(sample, rows, packed), shapes, tau)
        costs[rows * cost, rows] = lengths
    (_, rows), lengths = min(costs.items())
    if sample is not steps:
        lengths = (*lengths[:-1], max(lengths[-1], int(_needed(steps, rows, packed).max())))
    return Shapes(rows, lengths, packed)


def row_lengths(steps: Sequence[np.ndarray], shapes: Shapes) -> np.ndarray:
    """The T that `pack` gives each of these steps (arrays of their examples' lengths)."""
    needed_S, lengths = _needed(steps, shapes.rows, shapes.packed), np.array(shapes.lengths)
    place_S = np.searchsorted(lengths, needed_S)
    return np.where(place_S < len(lengths), lengths[np.minimum(place_S, len(lengths) - 1)], needed_S)


def _needed(steps: Sequence[np.ndarray], rows: int, packed: bool) -> np.ndarray:
    """For each step the shortest row length that holds it, some thousand steps at once."""
    found = []
    for at in range(0, len(steps), SAMPLED_STEPS):
        some = steps[at : at + SAMPLED_STEPS]
        lengths_SB = np.zeros((len(some), max(map(len, some))), np.int64)
        for row, step in zip(lengths_SB, some, strict=True):
            row[: len(step)] = np.sort(step)[::-1]
        found.append(shortest_rows(lengths_SB, rows) if packed else -(-lengths_SB.max(axis=1) // GRANULE) * GRANULE)
    return np.concatenate(found)


def placed(lengths: Sequence[int], shapes: Shapes) -> tuple[list[list[int]], int]:
    """Which examples of one step lie in each row, by index and in order (their segments are 1, 2, ...), and the shortest row length that holds them."""
    if shapes.packed:
        ordered = np.sort(np.array(lengths, np.int64))[::-1][None]
        fitted = int(shortest_rows(ordered, shapes.rows)[0])
        return balanced(lengths, fitted, shapes.rows), fitted
    return [[index] for index in range(len(lengths))], -(-max(lengths) // GRANULE) * GRANULE


def pack(examples: Sequence[TokenizedExample], shapes: Shapes, accumulation: int = 1) -> PackedBatch:
    """The batch of one step: arrays (A, rows / A, T), T the shortest of the shapes' lengths that holds these examples.

    Examples are packed at the length that fits them best and then padded up to T, so that they lie the same whatever lengths were chosen.
    """
    rows, fitted = placed([len(example.tokens) for example in examples], shapes)
    T = next((length for length in shapes.lengths if length >= fitted), fitted)
    tokens, targets, segments, positions = (np.zeros((shapes.rows, T), np.int32) for _ in range(4))
    weights = np.zeros((shapes.rows, T), np.float32)
    for row, indices in enumerate(rows):
        start = 0
        for segment, index in enumerate(indices, 1):
            example = examples[index]
            n = len(example.tokens)
            place = slice(start, start + n)
            tokens[row, place] = example.tokens
            targets[row, start : start + n - 1] = example.tokens[1:]
            segments[row, place] = segment
            positions[row, place] = np.arange(n)
            for begin, end in example.responses:
                weights[row, start + begin - 1 : start + end - 1] = 1.0
            start += n
    return PackedBatch(*(array.reshape(accumulation, -1, T) for array in (tokens, targets, weights, segments, positions)))

"""Which examples each step trains: index arithmetic over (seed, phase, epoch), so that resuming is arithmetic too."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from phased_ift_jax.data.packing import Shapes, pack
from phased_ift_jax.records import PackedBatch, TokenizedExample


def generator(*name: object) -> np.random.Generator:
    """A random generator named by values, not by history: the same name draws the same numbers, on any host, in any order."""
    digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest[:16], np.uint64)))


@dataclass(frozen=True, eq=False)
class Steps:
    """The optimizer steps of one phase, by index.

    Every row once an epoch, in an order drawn anew for each; the last step of an epoch has the n mod B rows that remain.
    """

    rows: np.ndarray  # positions in the dataset, (n,)
    batch_size: int
    epochs: int
    name: tuple[object, ...]  # (seed, phase index)
    max_steps: int = -1

    @property
    def per_epoch(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __len__(self) -> int:
        return self.max_steps if self.max_steps > 0 else self.epochs * self.per_epoch

    def __getitem__(self, step: int) -> np.ndarray:
        """Positions in the dataset of the examples that step `step` (from 0) trains, in order."""
        if not 0 <= step < len(self):
            raise IndexError(step)
        epoch, within = divmod(step, self.per_epoch)
        start = within * self.batch_size
        return self.rows[self._order(epoch)[start : start + self.batch_size]]

    @cached_property
    def _order(self) -> Callable[[int], np.ndarray]:
        """The order of an epoch. Two are kept: batches of one epoch are made while the last steps of the one before are noted."""
        return lru_cache(2)(lambda epoch: generator("order", *self.name, epoch).permutation(len(self.rows)))


def batches(steps: Steps, start: int, examples: Sequence[TokenizedExample], shapes: Shapes, accumulation: int = 1) -> Iterator[PackedBatch]:
    """Packed batches of the steps from `start` on, made ahead in a thread of grain's while the device works."""
    import grain

    source = grain.MapDataset.range(start, len(steps)).map(lambda step: pack([examples[row] for row in steps[int(step)]], shapes, accumulation))
    return iter(source.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))

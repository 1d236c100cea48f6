"""Checkpoints of a run: `checkpoints/<index>-<phase>/<step>/`, each whole or not there, saved while training goes on.

Orbax writes to a folder aside and renames it; the position (phase, epoch, step, complete) travels in the same commit. The checkpoint at
the end of a phase is marked complete and, where the optimizer is reset, holds the weights alone: it can only start the next phase.
"""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import owned
from phased_ift_jax.training.stored import COMMITTED, saving_options

Tree = TypeVar("Tree")
LIBRARIES = ("phased_ift_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is: `step` optimizer steps of phase `phase` (from 1) are done, in epoch `epoch` (from 0)."""

    phase: int
    step: int
    epoch: int
    complete: bool


class Checkpoints:
    """The checkpoints under one run's folder. At most one save is under way; what is old goes when the new one is committed."""

    def __init__(self, root: Path, identity: str, keep: int, base: Path | None = None) -> None:
        """`base` is the folder whose config and tokenizer an export takes; it is noted with every save."""
        self.root, self.identity, self.keep, self.base = root, identity, keep, base
        self._saving: Any = None

    def committed(self) -> list[tuple[Position, Path]]:
        """Every whole checkpoint, oldest first."""
        return sorted(self._committed(), key=lambda found: found[0])

    def newest(self) -> tuple[Position, Path] | None:
        """The checkpoint to go on from; None where no save was ever committed.

        Raises:
            UserError: the newest one was made from other data (rows, scores or bins: its identity is another).
        """
        found = self.committed()
        if not found:
            return None
        position, path = found[-1]
        if metadata_of(path)["identity"] != self.identity:
            raise UserError(f"data.path: rows, scores or bins have changed since '{path}' was saved; restore them, or choose another output_dir")
        return position, path

    def clear_remains(self) -> None:
        """Remove what a save that was killed has left: orbax would do so only if the same step were saved again."""
        for path in self.root.glob("*/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path, ignore_errors=True)

    def of_phase(self, folder: str) -> Path | None:
        """The checkpoint that ended a phase, if it did."""
        return next((path for position, path in self.committed() if position.complete and path.parent.name == folder), None)

    def save(self, folder: str, position: Position, tree: Any) -> None:
        """Start saving; the arrays are copied before this returns, so the next step may give up their buffers.

        Raises:
            Exception: the save before this one failed.
        """
        self.wait()
        path = self.root / folder / str(position.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = asdict(position) | {"identity": self.identity, "versions": versions(), "base": str(self.base.absolute()) if self.base else None}
        with saving_options():
            self._saving = ocp.save_async(path.absolute(), tree, overwrite=True, custom_metadata=metadata)

    def wait(self) -> None:
        """Wait until the save under way is committed, then remove what it made old."""
        if self._saving is None:
            return
        saving, self._saving = self._saving, None
        saving.result()
        phases: dict[int, list[tuple[Position, Path]]] = {}
        for position, path in self.committed():
            phases.setdefault(position.phase, []).append((position, path))
        for found in phases.values():
            ended = [path for position, path in found if position.complete]
            within = [path for position, path in found if not position.complete]
            for path in within if ended else within[: -self.keep]:
                (path / COMMITTED).unlink()  # first: half removed, it is no checkpoint
                shutil.rmtree(path)

    def _committed(self) -> Iterator[tuple[Position, Path]]:
        for path in self.root.glob("*/*"):
            if re.fullmatch(r"[0-9]+", path.name) and (path / COMMITTED).exists():
                metadata = metadata_of(path)
                yield Position(**{name: metadata[name] for name in Position.__dataclass_fields__}), path


def load_arrays(path: Path, shapes: Tree, shardings: Tree) -> Tree:
    """The arrays of a checkpoint (or of the part of it that `shapes` spells) under these shardings."""
    abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        restored = ocp.load(path.absolute(), abstract)
    return owned(restored, shardings)


def metadata_of(checkpoint: Path) -> dict[str, Any]:
    """What was saved with a checkpoint: its position, the identity of its data, its base, and the versions of the libraries that made it.

    Raises:
        UserError: it was not saved by a run, or is damaged.
    """
    try:
        found = ocp.metadata(checkpoint.absolute()).custom_metadata
    except Exception as error:  # orbax raises many kinds for what it cannot read
        raise UserError(f"'{checkpoint}' is damaged: {' '.join(str(error).split())[:120]}; name another checkpoint") from None
    if not found or "identity" not in found:
        raise UserError(f"'{checkpoint}' was not saved by a run; with --base MODEL its weights alone can be exported")
    return dict(found)


@functools.cache
def versions() -> dict[str, str]:
    """Python and the libraries that a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}

"""Checkpoints of a run: `checkpoints/<index>-<phase>/<step>/`, each whole or not there, saved while training goes on.

Orbax writes to a folder aside and renames it; then the manifest is written, which holds the position (phase, epoch, step, complete) and a
hash of every file, and makes it a checkpoint. The checkpoint at the end of a phase is marked complete and, where the optimizer is reset,
holds the weights alone: it can only start the next phase.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
from orbax.checkpoint import v1 as ocp

from phased_ift_jax import processes
from phased_ift_jax.files import is_full, set_aside, write_whole
from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.sharding import owned
from phased_ift_jax.training import manifest, mirror
from phased_ift_jax.training.stored import place_of, saving_options

logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax raises what it logs, and a run says it in a line

Tree = TypeVar("Tree")
NOTE = "newest_checkpoint"  # beside checkpoints/: what was saved last, so that a folder that is gone is no fresh start
LIBRARIES = ("phased_ift_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "numpy")


class SaveFailed(Failure):
    """A checkpoint could not be saved; the one before it is whole."""


@dataclass(frozen=True, order=True)
class Position:
    """How far a run is: `step` optimizer steps of phase `phase` (from 1) are done, in epoch `epoch` (from 0)."""

    phase: int
    step: int
    epoch: int
    complete: bool


class Checkpoints:
    """The checkpoints under one run's folder. At most one save is under way; what is old goes when the new one is committed.

    Of several processes each saves and loads its own slices; process 0 verifies, commits and removes, and the others take its word.
    """

    def __init__(self, root: Path, identity: str, keep: int, base: str | None = None) -> None:
        """`base` is the folder or address whose config and tokenizer an export takes; it is noted with every save."""
        self.root, self.identity, self.keep, self.base = root, identity, keep, base
        self._note = root.parent / NOTE
        self.damaged: dict[Path, str] = {}  # found so, and why
        self._sound: set[Path] = set()  # found to be as saved
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="commit")
        self._saving: Future[None] | None = None

    def committed(self) -> list[tuple[Position, Path]]:
        """Every checkpoint with a manifest, oldest first."""
        return sorted(self._committed(), key=lambda found: found[0])

    def newest(self) -> tuple[Position, Path] | None:
        """The newest checkpoint of which every byte is as it was saved; None where no save was ever committed. `damaged` tells of newer ones.

        Raises:
            UserError: it was made from other data (rows, scores or bins: its identity is another), or every checkpoint is damaged.
        """
        found = processes.agree(self._newest)
        return (Position(**found[0]), self.root / found[1]) if found else None

    def _newest(self) -> tuple[dict[str, Any], str] | None:
        for path in manifest.unreadable(self.root):
            self._is_sound(path)
        for position, path in reversed(self.committed()):
            if self._is_sound(path):
                if metadata_of(path)["identity"] != self.identity:
                    raise UserError(f"data.path: rows, scores or bins have changed since '{path}' was saved; restore them, or choose another output_dir")
                return asdict(position), str(path.relative_to(self.root))  # of a mirror, another host may have another
        for path, fault in self.damaged.items():
            raise UserError(f"output_dir: no whole checkpoint is left: in '{path}' {fault}; restore it, or start again with --fresh")
        if self._note.exists():
            raise UserError(f"output_dir: '{self._note.read_text(encoding='utf-8').strip()}' was saved and is gone; restore '{self.root}', or start again with --fresh")
        return None

    def set_aside(self) -> None:
        """Rename what was found damaged, and remove what a save or a removal that was killed has left."""
        for path in self.damaged:
            if path.exists():
                set_aside(path, "damaged")
        for path in self.root.glob("*/*.orbax-checkpoint-tmp*"):
            shutil.rmtree(path)
        for mark in self.root.glob(f"*/.*{manifest.UNDER_WAY}"):
            path = mark.with_name(mark.name.removeprefix(".").removesuffix(manifest.UNDER_WAY))
            if path.exists() and manifest.facts_of(path) is None:
                shutil.rmtree(path)
            mark.unlink()

    def of_phase(self, folder: str) -> Path | None:
        """The checkpoint that ended a phase, if it did.

        Raises:
            UserError: it is damaged.
        """
        found = processes.agree(lambda: self._of_phase(folder))
        return self.root / found if found else None

    def _of_phase(self, folder: str) -> str | None:
        path = next((path for position, path in self.committed() if position.complete and path.parent.name == folder), None)
        if path is None:
            return None
        if not self._is_sound(path):
            raise UserError(f"output_dir: in '{path}' {self.damaged[path]}; restore it, or start again with --fresh")
        return str(path.relative_to(self.root))

    def save(self, folder: str, position: Position, tree: Any) -> None:
        """Start saving; the arrays are copied before this returns, so the next step may give up their buffers.

        Raises:
            SaveFailed: the save before this one failed, or this one cannot begin.
        """
        self.wait()
        path = self.root / folder / str(position.step)
        try:
            if processes.first():
                path.parent.mkdir(parents=True, exist_ok=True)
                manifest.mark(path).touch()
            with saving_options():
                saving = ocp.save_async(place_of(path, begin=True), tree, overwrite=True)
        except Exception as error:
            raise _failed(path, error) from error
        facts = asdict(position) | {"identity": self.identity, "versions": versions(), "base": self.base}
        self._saving = self._thread.submit(self._commit, saving, path, facts)

    def check(self) -> None:
        """Raise `SaveFailed` as soon as the save under way is known to have failed, rather than with the next one, and `LeaseLost` likewise."""
        mirror.check(self.root)
        if self._saving is not None and self._saving.done():
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is committed and what it made old is removed; raises `SaveFailed`."""
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.result()

    def _commit(self, saving: Any, path: Path, facts: dict[str, Any]) -> None:
        try:
            saving.result()
            if processes.first():
                manifest.seal(path, facts)
                manifest.mark(path).unlink()
                write_whole(self._note, f"{path}\n")
            processes.await_all(f"committed {path.parent.name}/{path.name}")
        except Exception as error:
            raise _failed(path, error) from error
        self._sound.add(path)
        if not processes.first():
            return
        try:
            self._prune()
        except (OSError, Failure) as error:  # the new one is whole; what is old goes with the next one
            print(f"warning: an old checkpoint cannot be removed: {error}", file=sys.stderr)

    def _prune(self) -> None:
        """Remove what newer checkpoints have made old."""
        phases: dict[int, list[tuple[Position, Path]]] = {}
        for position, found in self.committed():
            phases.setdefault(position.phase, []).append((position, found))
        for of_phase in phases.values():
            ended = [found for position, found in of_phase if position.complete]
            within = [found for position, found in of_phase if not position.complete]
            for old in within if ended else within[: -self.keep]:
                manifest.mark(old).touch()
                manifest.unseal(old)
                shutil.rmtree(old)
                manifest.mark(old).unlink()

    def _is_sound(self, path: Path) -> bool:
        if path not in self._sound and path not in self.damaged:
            fault = manifest.fault(path)
            if fault is None:
                self._sound.add(path)
            else:
                self.damaged[path] = fault
        return path in self._sound

    def _committed(self) -> Iterator[tuple[Position, Path]]:
        for path in self.root.glob("*/*"):
            if re.fullmatch(r"[0-9]+", path.name) and (facts := manifest.facts_of(path)) is not None:
                yield Position(**{name: facts[name] for name in Position.__dataclass_fields__}), path


def _failed(path: Path, error: Exception) -> SaveFailed:
    cause = "no space is left on the disk" if is_full(error) else " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return SaveFailed(f"saving '{path}' failed: {cause}; the checkpoint before it is whole, and the same command goes on from there")


def load_arrays(path: Path, shapes: Tree, shardings: Tree) -> Tree:
    """The arrays of a checkpoint (or of the part of it that `shapes` spells) under these shardings."""
    abstract = jax.tree.map(lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings)
    context = ocp.Context()
    context.pytree.loading.partial_load = True
    with context:
        restored = ocp.load(place_of(path), abstract)
    return owned(restored, shardings)


def load_params(path: Path, shapes: Tree, shardings: Tree) -> Tree:
    """The parameters alone of a checkpoint, as `load_arrays` has them."""
    return load_arrays(path, {"params": shapes}, {"params": shardings})["params"]


def metadata_of(checkpoint: Path) -> dict[str, Any]:
    """What was saved with a checkpoint: its position, the identity of its data, its base, and the versions of the libraries that made it.

    Raises:
        UserError: it was not saved by a run, or is damaged.
    """
    facts = manifest.facts_of(checkpoint)
    if facts is None:
        raise UserError(f"'{checkpoint}' has no whole {manifest.MANIFEST}, so no run has saved it; with --base MODEL its weights alone can be exported")
    return facts


@functools.cache
def versions() -> dict[str, str]:
    """Python and the libraries that a result depends on."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in LIBRARIES}

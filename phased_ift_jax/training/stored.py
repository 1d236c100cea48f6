"""The arrays of an orbax checkpoint, read and written by slices, so that a model that fits no memory can be converted.

Orbax keeps each array as zarr, in a folder of its own or inside an OCDBT store, under the names of its path joined by dots; tensorstore,
with which orbax writes them, opens them one by one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from phased_ift_jax import pictures
from phased_ift_jax.object_store import split
from phased_ift_jax.records import UserError
from phased_ift_jax.training import mirror

COMMITTED = "commit_success.txt"  # orbax writes it last
CHUNK_BYTES = 128 << 20  # what a reader of one slice has to hold at most, beside the slice


def saving_options() -> ocp.Context:
    """How checkpoints are saved: one layer (or less) to a chunk, so that a slice can be read alone, and as it is: weights do not compress."""

    def options(path: Any, value: Any) -> Any:
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if np.ndim(value) else None)

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = options
    return context


def place_of(checkpoint: Path, begin: bool = False) -> Any:
    """Where orbax writes (after `begin`) and reads a checkpoint: its folder, or the bucket that it is mirrored from."""
    bucket = mirror.of(checkpoint)
    address = bucket.begin(checkpoint) if bucket and begin else address_of(checkpoint)
    if address is None:
        return checkpoint.absolute()
    from phased_ift_jax.training.gs_path import GsPath

    return GsPath(address)


def address_of(path: Path) -> str | None:
    """Where in a bucket the arrays lie of which a folder of this machine shows the rest; None where they lie there, too."""
    if bucket := mirror.of(path):
        return bucket.address(path)
    return pictures.shown(path) if pictures.of(path) else None


class Stored:
    """The arrays under `params` of a checkpoint, by path such as layers/mlp/gate."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises `UserError` where there is no whole orbax checkpoint of ours."""
        self.checkpoint = checkpoint
        self._opened: dict[str, ts.TensorStore] = {}
        found = sorted(checkpoint.glob("*/_METADATA"))
        if len(found) != 1 or not (checkpoint / COMMITTED).exists():
            raise UserError(f"'{mirror.shown(checkpoint)}' is not a whole orbax checkpoint; name a folder such as RUN/checkpoints/3-hard/1200")
        self.folder = found[0].parent
        try:
            metadata = json.loads(found[0].read_text(encoding="utf-8"))
            self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
            self._in_ocdbt = metadata["use_ocdbt"]
            keys = [[key["key"] for key in entry["key_metadata"]] for entry in metadata["tree_metadata"].values()]
            self.paths = {"/".join(parts) for first, *parts in keys if first == "params"}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{mirror.shown(checkpoint)}' is damaged: '{found[0]}' cannot be read; name another checkpoint") from None

    def shape(self, path: str) -> tuple[int, ...]:
        """The shape of an array; raises `UserError` where it is damaged."""
        with self._one_line(path):
            return tuple(self._open(path).shape)

    def read(self, path: str, layer: int | None) -> np.ndarray:
        """An array, or one layer of it; raises `UserError` where a part of it is damaged or gone."""
        with self._one_line(path):
            array = self._open(path)
            return np.asarray((array if layer is None else array[layer]).read().result())

    def has(self, path: str, layer: int, rank: int) -> bool:
        """Whether `create`'s array holds this layer: tensorstore writes a chunk aside and renames it, so that one that is there is whole."""
        folder = self.folder / self._name(path)
        return pictures.exists(folder / ".zarray") and pictures.exists(folder / ".".join([str(layer)] + ["0"] * (rank - 1)))

    def create(self, path: str, shape: tuple[int, ...], dtype: np.dtype, stacked: bool) -> ts.TensorStore:
        """An array to be written, with a chunk for each layer where layers are stacked; one that is there already is kept."""
        metadata = {
            "zarr_format": 2,
            "shape": shape,
            "chunks": (1, *shape[1:]) if stacked else shape,
            "dtype": dtype.name if dtype.name == "bfloat16" else dtype.str,
            "compressor": None,
        }
        # chunks of zeros are written like others: orbax takes a chunk that is not there for lost
        spec = self._spec(path) | {"metadata": metadata, "store_data_equal_to_fill_value": True}
        return ts.open(spec, open=True, create=True).result()

    def _open(self, path: str) -> ts.TensorStore:
        if path not in self._opened:
            # what is missing is an error, as it is to orbax, not zeros
            self._opened[path] = ts.open(self._spec(path) | {"fill_missing_data_reads": False}, open=True, read=True).result()
        return self._opened[path]

    @contextmanager
    def _one_line(self, path: str) -> Iterator[None]:
        try:
            yield
        except (ValueError, OSError, RuntimeError) as error:  # tensorstore's, of several hundred characters
            raise UserError(f"'{mirror.shown(self.checkpoint)}' is damaged: {path} cannot be read ({' '.join(str(error).split())[:120]}...); name another checkpoint") from None

    def _spec(self, path: str) -> dict[str, Any]:
        name = self._name(path) + "/"
        base = {"driver": "file", "path": f"{self.folder}/"}
        if address := address_of(self.folder):
            base = dict(zip(("driver", "bucket", "path"), ("gcs", *split(address)), strict=True))
            base["path"] += "/"
        if self._in_ocdbt:
            return {"driver": self._driver, "kvstore": {"driver": "ocdbt", "base": base, "path": name}}
        return {"driver": self._driver, "kvstore": base | {"path": base["path"] + name}}

    @staticmethod
    def _name(path: str) -> str:
        return ".".join(["params", *path.split("/")])

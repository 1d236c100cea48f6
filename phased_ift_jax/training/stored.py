"""The arrays of an orbax checkpoint, read and written by slices, so that a model that fits no memory can be converted.

Orbax keeps each array as zarr, in a folder of its own or inside an OCDBT store, under the names of its path joined by dots; tensorstore,
with which orbax writes them, opens them one by one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from phased_ift_jax.records import UserError

CHUNK_BYTES = 128 << 20  # what a reader of one slice has to hold at most, beside the slice


def saving_options() -> ocp.Context:
    """How checkpoints are saved: one layer (or less) to a chunk, so that a slice can be read alone, and as it is: weights do not compress."""

    def options(path: Any, value: Any) -> Any:
        return ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if np.ndim(value) else None)

    context = ocp.Context()
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = options
    return context


class Stored:
    """The arrays under `params` of a checkpoint, by path such as layers/mlp/gate."""

    def __init__(self, checkpoint: Path) -> None:
        """Raises `UserError` where there is no orbax checkpoint of ours."""
        found = sorted(checkpoint.glob("*/_METADATA"))
        if len(found) != 1:
            raise UserError(f"'{checkpoint}' is not an orbax checkpoint; name a folder such as RUN/checkpoints/3-hard/1200")
        self.folder = found[0].parent
        metadata = json.loads(found[0].read_text(encoding="utf-8"))
        self._driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        self._in_ocdbt = metadata["use_ocdbt"]
        keys = [[key["key"] for key in entry["key_metadata"]] for entry in metadata["tree_metadata"].values()]
        self.paths = {"/".join(parts) for first, *parts in keys if first == "params"}

    def open(self, path: str) -> ts.TensorStore:
        """The array at a path; `[layer].read()` of it reads that layer alone."""
        return ts.open(self._spec(path), open=True, read=True).result()

    def has(self, path: str, layer: int, rank: int) -> bool:
        """Whether `create`'s array holds this layer: tensorstore writes a chunk aside and renames it, so that one that is there is whole."""
        return (self.folder / self._name(path) / ".".join([str(layer)] + ["0"] * (rank - 1))).exists()

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

    def _spec(self, path: str) -> dict[str, Any]:
        name = self._name(path) + "/"
        if self._in_ocdbt:
            return {"driver": self._driver, "kvstore": {"driver": "ocdbt", "base": {"driver": "file", "path": f"{self.folder}/"}, "path": name}}
        return {"driver": self._driver, "kvstore": {"driver": "file", "path": f"{self.folder}/{name}"}}

    @staticmethod
    def _name(path: str) -> str:
        return ".".join(["params", *path.split("/")])

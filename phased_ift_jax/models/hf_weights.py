"""Weights between Hugging Face safetensors and our parameters, tensor by tensor, by the family's table read both ways.

Import reads only the slices that a device holds, straight into its shard; export holds one tensor at a time and writes to a folder
aside that is renamed when whole. A model is never in host memory at once.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from phased_ift_jax.models.decoder import Params, parameter_shapes
from phased_ift_jax.models.hf_folder import Folder
from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import owned

DTYPES = {"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
SHARD_BYTES = 5_000_000_000
Index = tuple[slice, ...]


@dataclass(frozen=True)
class Layout:
    """A rule such as `(NH)D->DNH`: their dims on the left (brackets flatten), ours on the right."""

    theirs: tuple[str, ...]
    ours: str

    @classmethod
    def parse(cls, rule: str) -> Layout:
        left, ours = rule.split("->")
        groups = left.replace("(", " (").replace(")", ") ").split()
        return cls(tuple(part for group in groups for part in ([group[1:-1]] if group.startswith("(") else group)), ours)

    def their_index(self, index: Index, shape: tuple[int, ...]) -> Index:
        """Their slices of a piece of ours; inside brackets only the outer dim may be cut, which is how heads are sharded."""
        cut = {letter: piece.indices(size) for letter, piece, size in zip(self.ours, index, shape, strict=True)}
        size = dict(zip(self.ours, shape, strict=True))
        result = []
        for group in self.theirs:
            inner = math.prod(size[letter] for letter in group[1:])
            start, stop, _ = cut[group[0]]
            result.append(slice(start * inner, stop * inner))
        return tuple(result)

    def to_ours(self, piece: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Their piece in our dims, whose sizes are `shape`."""
        letters = "".join(self.theirs)
        size = dict(zip(self.ours, shape, strict=True))
        return piece.reshape([size[letter] for letter in letters]).transpose([letters.index(letter) for letter in self.ours])

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Our whole parameter in their dims."""
        size = dict(zip(self.ours, array.shape, strict=True))
        letters = "".join(self.theirs)
        return array.transpose([self.ours.index(letter) for letter in letters]).reshape([math.prod(size[letter] for letter in group) for group in self.theirs])

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(size[letter] for letter in group) for group in self.theirs)


class Tensors:
    """The tensors of a safetensors folder, one file or many, mapped and read by slices."""

    def __init__(self, folder: Path) -> None:
        files = _weight_files(folder)
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in files:
            for name, (start, entry) in _header(file).items():
                self._where[name] = (file, start, entry)

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name][2]["shape"])

    def read(self, name: str, index: Index) -> np.ndarray:
        file, start, entry = self._where[name]
        return np.array(np.memmap(file, DTYPES[entry["dtype"]], "r", start, self.shape(name))[index])


def check(folder: Folder) -> Tensors:
    """The checkpoint's tensors, found to be those that config.json asks for; reads headers only.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a file is missing, cut off or no safetensors file.
    """
    tensors = Tensors(folder.path)
    shapes, rows = parameter_shapes(folder.config, np.dtype(np.float32)), folder.weights
    layers = range(folder.config.num_layers)
    expected = {name.format(layer): path for path, name, _ in rows for layer in (layers if "{}" in name else [0])}
    missing = sorted(set(expected) - tensors.names())
    ignored = {name for name in tensors.names() if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and folder.config.tie_word_embeddings)}
    unknown = sorted(tensors.names() - set(expected) - ignored)
    for fault, names in (("has no tensor", missing), ("holds an unknown tensor", unknown)):
        if names:
            raise UserError(f"model.model_name_or_path: '{folder.path}' {fault} {names[0]}" + (f" (and {len(names) - 1} more)" if names[1:] else ""))
    for path, name, rule in rows:
        shape = _get(shapes, path).shape
        wanted = Layout.parse(rule).their_shape(shape[1:] if "{}" in name else shape)
        for each in {name.format(layer) for layer in layers}:
            if tensors.shape(each) != wanted:
                raise UserError(f"model.model_name_or_path: {each} has shape {tensors.shape(each)}, config.json says {wanted}")
    return tensors


def load(folder: Folder, shardings: Any, dtype: Any) -> Params:
    """The checkpoint's parameters in `dtype`, each made shard by shard under its sharding; raises `UserError` as `check` does."""
    tensors, shapes = check(folder), parameter_shapes(folder.config, dtype)

    def one(path: str, name: str, rule: str) -> jax.Array:
        layout, shape = Layout.parse(rule), _get(shapes, path).shape
        stacked = "{}" in name
        each = shape[1:] if stacked else shape

        def piece(index: Index | None) -> np.ndarray:
            assert index is not None, "jax asks for slices of every dim"
            inner = index[1:] if stacked else index
            sizes = tuple(len(range(*part.indices(size))) for part, size in zip(inner, each, strict=True))
            pieces = [
                layout.to_ours(tensors.read(name.format(layer), layout.their_index(inner, each)), sizes).astype(dtype)
                for layer in (range(*index[0].indices(shape[0])) if stacked else [0])
            ]
            return np.stack(pieces) if stacked else pieces[0]

        return jax.make_array_from_callback(shape, _get(shardings, path), piece)

    return owned(_tree({path: one(path, name, rule) for path, name, rule in folder.weights}), shardings)


def export(params: Params, folder: Folder, destination: Path, dtype: str | None = None) -> None:
    """Write parameters as a Hugging Face folder with the base's names, config and tokenizer; whole, or not there.

    An earlier folder of that name is replaced. `dtype` is a name such as bfloat16; by default the base's.
    """
    target = np.dtype(getattr(ml_dtypes, name) if (name := dtype or folder.dtype) == "bfloat16" else name)
    aside = destination.with_name(f".{destination.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    attributes = dict(folder.attributes)
    if dtype is not None and dtype != folder.dtype:
        attributes |= {("dtype" if "dtype" in attributes else "torch_dtype"): dtype}
        (aside / "config.json").write_text(json.dumps(attributes, indent=2) + "\n", encoding="utf-8")
    else:
        shutil.copyfile(folder.path / "config.json", aside / "config.json")
    for file in folder.beside():
        shutil.copyfile(file, aside / file.name)
    _write_shards(aside, list(_their_tensors(params, folder)), target)
    shutil.rmtree(destination, ignore_errors=True)
    os.replace(aside, destination)


def _their_tensors(params: Params, folder: Folder) -> Iterator[tuple[str, tuple[int, ...], Any]]:
    for path, name, rule in folder.weights:
        layout, array = Layout.parse(rule), _get(params, path)
        stacked = "{}" in name
        for layer in range(folder.config.num_layers) if stacked else [0]:

            def read(array: jax.Array = array, layer: int = layer, layout: Layout = layout, stacked: bool = stacked) -> np.ndarray:
                return layout.to_theirs(np.asarray(array[layer] if stacked else array))

            yield name.format(layer), layout.their_shape(array.shape[1:] if stacked else array.shape), read


def _write_shards(folder: Path, tensors: list[tuple[str, tuple[int, ...], Any]], dtype: np.dtype) -> None:
    shards: list[list[tuple[str, tuple[int, ...], Any]]] = [[]]
    filled = 0
    for tensor in tensors:
        size = math.prod(tensor[1]) * dtype.itemsize
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(tensor)
        filled += size
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        index |= {tensor[0]: name for tensor in shard}
        _write_safetensors(folder / name, shard, dtype)
    if len(shards) > 1:
        total = sum(math.prod(shape) * dtype.itemsize for _, shape, _ in tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def _write_safetensors(file: Path, tensors: list[tuple[str, tuple[int, ...], Any]], dtype: np.dtype) -> None:
    """The safetensors format: 8 bytes of header length, a JSON header padded to 8 bytes, then the tensors' bytes in its order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape, _ in tensors:
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": CODES[dtype.name], "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for _, _, read in tensors:
            out.write(np.ascontiguousarray(read().astype(dtype)).tobytes())
        out.flush()
        os.fsync(out.fileno())


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read; others may lie beside them (Mistral's repositories hold a consolidated.safetensors, too)."""
    one, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if one.exists():
        return [one]
    if not index.exists():
        raise UserError(f"model.model_name_or_path: '{folder}' has no model.safetensors and no {index.name}; init: random starts without weights")
    try:
        files = sorted({folder / name for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"model.model_name_or_path: '{index}' is not an index of safetensors; fetch it again") from None
    missing = [file.name for file in files if not file.exists()]
    if missing:
        raise UserError(f"model.model_name_or_path: '{folder}' lacks {missing[0]}" + (f" (and {len(missing) - 1} more)" if missing[1:] else "") + "; fetch it again")
    return files


def _header(file: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Each tensor's first byte in the file and its header entry."""
    size = file.stat().st_size
    try:
        with open(file, "rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if not 0 < length <= size - 8:
                raise ValueError
            header = json.loads(handle.read(length))
        entries = {name: (8 + length + entry["data_offsets"][0], entry) for name, entry in header.items() if name != "__metadata__"}
        whole = size == 8 + length + max((entry["data_offsets"][1] for _, entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError):
        raise UserError(f"model.model_name_or_path: '{file}' is not a safetensors file; fetch it again") from None
    if not whole:
        raise UserError(f"model.model_name_or_path: '{file}' is cut off or damaged (its size is not what its header says); fetch it again")
    wrong = next((name for name, (_, entry) in entries.items() if entry["dtype"] not in DTYPES), None)
    if wrong is not None:
        raise UserError(f"model.model_name_or_path: {wrong} has dtype {entries[wrong][1]['dtype']}; only {', '.join(DTYPES)} are read")
    return entries


def _get(tree: Any, path: str) -> Any:
    for part in path.split("/"):
        tree = tree[part]
    return tree


def _tree(flat: dict[str, Any]) -> Params:
    root: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root

"""The safetensors format: a checkpoint's tensors read by slices, and written one at a time into shards.

A file is 8 bytes of header length, a JSON header, and the tensors' bytes (huggingface/safetensors, README "Format").
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import ml_dtypes
import numpy as np

from phased_ift_jax import pictures
from phased_ift_jax.object_store import StoreError
from phased_ift_jax.records import UserError

Index = tuple[slice, ...]
Item = TypeVar("Item")
Result = TypeVar("Result")

DTYPES = {"F64": np.dtype("float64"), "F32": np.dtype("float32"), "F16": np.dtype("float16"), "BF16": np.dtype(ml_dtypes.bfloat16)}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}
ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
HEADER_BYTES = 100_000_000  # the format's own limit
MAPPED_BYTES = 8 << 20
FETCHED_BYTES = 64 << 20  # of rows of which only some columns are kept
BLOCK = 256  # elements a side: two such blocks of any dtype lie in the cache


@dataclass(frozen=True)
class Tensor:
    """A tensor to be written: `read()` makes it, once, in any dtype that is then rounded to `dtype`."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class Tensors:
    """The tensors of a checkpoint folder, one file or many, on a disk or in a bucket, read by slices; opening it reads headers only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in self.files:
            for name, (start, entry) in read_header(file).items():
                if name in self._where:
                    raise UserError(f"model.model_name_or_path: {name} is in '{self._where[name][0]}' and in '{file.name}'; fetch both again")
                self._where[name] = (file, start, entry)
        for name, stated in _weight_map(folder).items():
            if name not in self._where or self._where[name][0].name != stated:
                raise UserError(f"model.model_name_or_path: '{pictures.shown(folder / INDEX)}' says that {name} is in {stated}, and it is not; fetch both again")

    def names(self) -> set[str]:
        return set(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name][2]["shape"])

    def code(self, name: str) -> str:
        return str(self._where[name][2]["dtype"])

    def dtype(self, name: str) -> np.dtype:
        return DTYPES[self.code(name)]

    def read(self, name: str, index: Index) -> np.ndarray:
        """A copy of a slice. Whole rows are read; columns are mapped, some rows at a time, so that only they are touched and few are resident.

        From a bucket whole rows come, of which the columns are kept.
        """
        (file, start, _), shape, dtype = self._where[name], self.shape(name), self.dtype(name)
        row = math.prod(shape[1:])
        first, stop, _ = index[0].indices(shape[0])
        if all(part.indices(size) == (0, size, 1) for part, size in zip(index[1:], shape[1:], strict=True)):
            return _rows(file, dtype, start + first * row * dtype.itemsize, (stop - first, *shape[1:]))
        result = np.empty((stop - first, *(len(range(*part.indices(size))) for part, size in zip(index[1:], shape[1:], strict=True))), dtype)
        fetched = pictures.of(file) is not None
        step = max(1, (FETCHED_BYTES if fetched else MAPPED_BYTES) // (row * dtype.itemsize))
        for at in range(first, stop, step):
            until = min(at + step, stop)
            place, size = start + at * row * dtype.itemsize, (until - at, *shape[1:])
            rows = _rows(file, dtype, place, size) if fetched else np.memmap(file, dtype, "r", place, size)
            result[at - first : until - first] = rows[(slice(None), *index[1:])]
        return result

    def reader(self, name: str, indices: Sequence[Index]) -> Callable[[Index], np.ndarray]:
        """What reads these slices of a tensor: from a bucket all of them at once, since many of them are columns of the same rows."""
        if pictures.of(self._where[name][0]) is None:
            return partial(self.read, name)
        ends = [[part.indices(size)[:2] for part, size in zip(index, self.shape(name), strict=True)] for index in indices]
        box = [(min(start for start, _ in parts), max(stop for _, stop in parts)) for parts in zip(*ends, strict=True)]
        inside = self.read(name, tuple(slice(*part) for part in box))
        return lambda index: inside[tuple(slice(*(end - at for end in part.indices(size)[:2])) for part, (at, _), size in zip(index, box, self.shape(name), strict=True))]


def _rows(file: Path, dtype: np.dtype, start: int, shape: tuple[int, ...]) -> np.ndarray:
    """An array that lies in one piece in a file."""
    result = np.empty(shape, dtype)
    pictures.fill(file, start, result.reshape(-1).view(np.uint8).data)
    return result


def reordered(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The array in C order and of this dtype, itself where it is so; a permutation of dims goes by blocks, two to four times as fast as numpy's copy."""
    if array.flags.c_contiguous:
        return array.astype(dtype, copy=False)
    result = np.empty(array.shape, dtype)
    source, target = array, result
    if array.dtype == dtype:  # moved as plain integers, which numpy copies without asking the dtype
        plain = np.dtype(f"u{dtype.itemsize}")
        source, target = array.view(plain), result.view(plain)
    nearest = int(np.argmin(array.strides))  # the dim along which the source lies in one piece
    blocks = [range(0, size, BLOCK if dim in (nearest, array.ndim - 1) else 1) for dim, size in enumerate(array.shape)]
    for corner in np.ndindex(*(len(block) for block in blocks)):
        at = tuple(slice(block[i], block[i] + block.step) for block, i in zip(blocks, corner, strict=True))
        target[at] = source[at]
    return result


def ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int = 2) -> Iterator[Result]:
    """`map` in threads that stay at most `workers` results ahead, so that memory holds only a few of them."""
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Result]] = []
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def shards(tensors: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """Tensors by the file that they go to: files of at most SHARD_BYTES (or one tensor), named as transformers names them."""
    groups: list[list[Tensor]] = [[]]
    filled = 0
    for tensor in tensors:
        if groups[-1] and filled + tensor.nbytes > SHARD_BYTES:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += tensor.nbytes
    if len(groups) == 1:
        return {ONE: groups[0]}
    return {f"model-{number:05d}-of-{len(groups):05d}.safetensors": group for number, group in enumerate(groups, 1)}


def index_text(files: dict[str, list[Tensor]]) -> str:
    """The index that transformers reads: which file holds which tensor."""
    total = sum(tensor.nbytes for group in files.values() for tensor in group)
    where = {tensor.name: file for file, group in files.items() for tensor in group}
    return json.dumps({"metadata": {"total_size": total}, "weight_map": where}, indent=2) + "\n"


def write_tensors(file: Path, tensors: Sequence[Tensor], done: Callable[[int], object] = lambda size: None) -> None:
    """Write one safetensors file, whole or not there; `done` is told the bytes of each tensor written."""
    aside = file.with_name(f".{file.name}.part")
    with open(aside, "wb") as out:
        stream_tensors(out.write, tensors, done)
        out.flush()
        os.fsync(out.fileno())
    os.replace(aside, file)


def stream_tensors(write: Callable[[memoryview], object], tensors: Sequence[Tensor], done: Callable[[int], object] = lambda size: None) -> None:
    """Hand the bytes of a safetensors file to `write`, in order; `done` as in `write_tensors`."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        header[tensor.name] = {"dtype": CODES[tensor.dtype.name], "shape": list(tensor.shape), "data_offsets": [offset, offset + tensor.nbytes]}
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write(memoryview(len(text).to_bytes(8, "little") + text))
    for array in ahead(_made, tensors):
        write(array.reshape(-1).view(np.uint8).data)
        done(array.nbytes)


def _made(tensor: Tensor) -> np.ndarray:
    """The tensor's array in its dtype; an error, rather than an infinity, where a number is too large for that."""
    array = tensor.read()
    with np.errstate(over="ignore", invalid="ignore"):
        result = reordered(array, tensor.dtype)
    if result.dtype != array.dtype and np.isinf(result).sum() > np.isinf(array).sum():
        raise UserError(f"{tensor.name} has numbers beyond {tensor.dtype.name}'s {ml_dtypes.finfo(tensor.dtype).max:g}; export it in a wider dtype")
    return result


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read; others may lie beside them (Mistral's repositories hold a consolidated.safetensors, too).

    Raises:
        UserError: there are none, or some are missing, or the index is none.
    """
    there = pictures.names(folder)
    if ONE in there:
        return [folder / ONE]
    if INDEX not in there:
        others = next((name for ending in (".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5") for name in there if name.endswith(ending)), None)
        advice = f"it has '{others}'; save it again with transformers' save_pretrained, which writes safetensors" if others else "init: random starts without weights"
        raise UserError(f"model.model_name_or_path: '{pictures.shown(folder)}' has no {ONE} and no {INDEX}; {advice}")
    files = sorted({folder / name for name in _weight_map(folder).values()})
    missing = [file.name for file in files if file.name not in there]
    if missing:
        raise UserError(f"model.model_name_or_path: '{pictures.shown(folder)}' lacks {missing[0]}{f' (and {len(missing) - 1} more)' if missing[1:] else ''}; fetch it again")
    return files


def _weight_map(folder: Path) -> dict[str, str]:
    index = folder / INDEX
    if ONE in pictures.names(folder):
        return {}
    try:
        where = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if not (where and all(isinstance(name, str) and isinstance(file, str) and Path(file).name == file for name, file in where.items())):
            raise ValueError
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"model.model_name_or_path: '{pictures.shown(index)}' is not an index of safetensors; fetch it again") from None
    return dict(where)


def read_header(file: Path) -> dict[str, tuple[int, dict[str, Any]]]:
    """Each tensor's first byte in the file and its header entry.

    Raises:
        UserError: not a safetensors file, cut off, or of a dtype that we do not read.
    """
    try:
        size = pictures.size(file)
        length = int.from_bytes(_rows(file, np.dtype(np.uint8), 0, (min(size, 8),)).tobytes(), "little")
        if not 0 < length <= min(size - 8, HEADER_BYTES):
            raise ValueError
        header = json.loads(_rows(file, np.dtype(np.uint8), 8, (length,)).tobytes())
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = 0
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            if entry["dtype"] not in DTYPES:
                raise UserError(f"model.model_name_or_path: {name} has dtype {entry['dtype']}; only {', '.join(DTYPES)} are read, no quantized weights")
            start, stop = entry["data_offsets"]
            if start != end or stop - start != math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize:  # a gap, an overlap, or another size
                raise ValueError
            end = stop
    except StoreError as error:
        raise UserError(f"model.model_name_or_path: {error}") from None
    except OSError as error:
        raise UserError(f"model.model_name_or_path: cannot read '{file}': {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        raise UserError(f"model.model_name_or_path: '{pictures.shown(file)}' is not a safetensors file; fetch it again") from None
    if size != 8 + length + end:
        raise UserError(f"model.model_name_or_path: '{pictures.shown(file)}' is cut off or damaged (its size is not what its header says); fetch it again")
    return {name: (8 + length + entry["data_offsets"][0], entry) for name, entry in entries.items()}

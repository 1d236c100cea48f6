"""Weights between Hugging Face tensors and our parameters, tensor by tensor, by the family's table read both ways.

Import reads only the slices that a device holds, straight into its shard; export makes one tensor at a time. A model is never in host
memory at once.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from phased_ift_jax.models.decoder import Params, parameter_shapes
from phased_ift_jax.models.hf_folder import Folder
from phased_ift_jax.models.tensor_files import DTYPES, Index, Tensor, Tensors, reordered
from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import owned


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
        letters = "".join(self.theirs)
        ordered = array.transpose([self.ours.index(letter) for letter in letters])
        return reordered(ordered, array.dtype).reshape(self.their_shape(array.shape))

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        size = dict(zip(self.ours, shape, strict=True))
        return tuple(math.prod(size[letter] for letter in group) for group in self.theirs)


@dataclass(frozen=True)
class Weight:
    """One parameter of ours and the tensors that make it: one of each layer where it is stacked, else a single one."""

    path: str
    layout: Layout
    names: tuple[str, ...]
    stacked: bool
    shape: tuple[int, ...]  # of the parameter, in our dims

    @property
    def each(self) -> tuple[int, ...]:
        """The shape of one layer's part of the parameter, in our dims."""
        return self.shape[1:] if self.stacked else self.shape


def weights(folder: Folder) -> list[Weight]:
    """What a model of this folder's sizes consists of, in the order of an export."""
    shapes = parameter_shapes(folder.config, jnp.dtype(jnp.float32))
    found = []
    for path, name, rule in folder.weights:
        stacked = "{}" in name
        names = tuple(name.format(layer) for layer in range(folder.config.num_layers)) if stacked else (name,)
        found.append(Weight(path, Layout.parse(rule), names, stacked, get(shapes, path).shape))
    return found


def check(folder: Folder) -> Tensors:
    """The checkpoint's tensors, found to be those that config.json asks for; reads headers only.

    Raises:
        UserError: a tensor is missing, unknown or of another shape, or a file is missing, cut off or no safetensors file.
    """
    tensors = Tensors(folder.path)
    check_shapes(folder, {name: tensors.shape(name) for name in tensors.names()})
    return tensors


def check_shapes(folder: Folder, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise `UserError` unless a checkpoint with these tensors is what config.json asks for."""
    expected = {name: weight for weight in weights(folder) for name in weight.names}
    missing = sorted(set(expected) - set(shapes))
    ignored = {name for name in shapes if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and folder.config.tie_word_embeddings)}
    unknown = sorted(set(shapes) - set(expected) - ignored)
    for fault, names in (("has no tensor", missing), ("holds an unknown tensor", unknown)):
        if names:
            raise UserError(f"model.model_name_or_path: '{folder.name}' {fault} {names[0]}" + (f" (and {len(names) - 1} more)" if names[1:] else ""))
    for name, weight in expected.items():
        wanted = weight.layout.their_shape(weight.each)
        if shapes[name] != wanted:
            raise UserError(f"model.model_name_or_path: {name} has shape {shapes[name]}, config.json says {wanted}")


def load(folder: Folder, shardings: Any, dtype: Any) -> Params:
    """The checkpoint's parameters in `dtype`, each filled layer by layer under its sharding; raises `UserError` as `check` does.

    A host reads its own slices only, once each, and holds one layer's part of one parameter beside what it has loaded. The buffers are
    XLA's own, so that the first train step may reuse them.
    """
    tensors, dtype = check(folder), jnp.dtype(dtype)
    leaves = {}
    _trim()
    # first what is copied whole, then the largest layers: the less room is left, the less is in flight
    for weight in sorted(weights(folder), key=lambda weight: (weight.stacked, -math.prod(weight.each))):
        sharding: NamedSharding = get(shardings, weight.path)
        if weight.stacked:
            assert sharding.spec[:1] in ((), (None,)), "layers are scanned, and so not sharded"
            inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
            empty, put = _filling(weight.shape, sharding, dtype)
            whole = empty()
            for layer, name in enumerate(weight.names):
                # waiting for each keeps parts from piling up behind the transfers
                whole = put(whole, _part(tensors, weight, name, inner, dtype), layer).block_until_ready()
                _trim()
            leaves[weight.path] = whole
        else:
            leaves[weight.path] = owned(_part(tensors, weight, weight.names[0], sharding, dtype), sharding)
            _trim()
    return tree(leaves)


def _part(tensors: Tensors, weight: Weight, name: str, sharding: NamedSharding, dtype: np.dtype) -> jax.Array:
    """One tensor of a weight in our dims: each slice read once from the file, for all devices that hold it, and gone from the host with the next."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(weight.each).items():
        assert index is not None, "jax says which slice of every dim"
        holders.setdefault(tuple(part.indices(size)[:2] for part, size in zip(index, weight.each, strict=True)), []).append(device)
    pieces = []
    indices = {cut: weight.layout.their_index(tuple(slice(*part) for part in cut), weight.each) for cut in holders}
    read = tensors.reader(name, list(indices.values()))
    for cut, devices in holders.items():
        theirs = read(indices[cut])
        ours = reordered(weight.layout.to_ours(theirs, tuple(stop - start for start, stop in cut)), dtype)
        pieces += [jax.device_put(ours, device).block_until_ready() for device in devices]
    return jax.make_array_from_single_device_arrays(weight.each, sharding, pieces)


def _trim() -> None:
    """Give back what malloc has kept of freed parts: otherwise half a gigabyte stays with a 7B model for good (glibc only)."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


@cache
def _filling(shape: tuple[int, ...], sharding: NamedSharding, dtype: np.dtype) -> tuple[Callable[[], jax.Array], Callable[[jax.Array, jax.Array, int], jax.Array]]:
    """Compiled once for parameters of one shape: an array of zeros, and its change in one layer."""
    empty = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)
    put = jax.jit(lambda whole, part, layer: jax.lax.dynamic_update_index_in_dim(whole, part, layer, 0), donate_argnums=0, out_shardings=sharding)
    return empty, put


def tensors_of(folder: Folder, read: Callable[[str, int | None], np.ndarray], dtype: str | None = None) -> list[Tensor]:
    """The tensors of an export in order, each made when it is read, in the dtype of this name or, without one, in that of the base.

    `read(path, layer)` gives one layer of our parameter at a path, or all of one that is not stacked (layer None).
    """
    dtypes = stored_dtypes(folder, dtype)

    def make(weight: Weight, layer: int | None) -> np.ndarray:
        return weight.layout.to_theirs(read(weight.path, layer))

    return [
        Tensor(name, weight.layout.their_shape(weight.each), dtypes(name), partial(make, weight, layer if weight.stacked else None))
        for weight in weights(folder)
        for layer, name in enumerate(weight.names)
    ]


def stored_dtypes(folder: Folder, dtype: str | None = None) -> Callable[[str], np.dtype]:
    """The dtype that a tensor of this name gets on export: the one asked for, else the base's own, else what its config.json states."""
    if dtype is None and folder.has_weights:
        return Tensors(folder.path).dtype
    if dtype is None and folder.converted:
        codes = folder.converted_dtypes()
        return lambda name: DTYPES[codes[name]]
    return lambda name: jnp.dtype(dtype or folder.dtype)


def get(params: Any, path: str) -> Any:
    """The leaf of a tree at a path such as layers/mlp/gate."""
    for part in path.split("/"):
        params = params[part]
    return params


def tree(flat: dict[str, Any]) -> Params:
    """A tree of nested dicts from leaves by path; the inverse of `get`."""
    root: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = root
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = leaf
    return root

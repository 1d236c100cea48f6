"""The device mesh, and the one table from the legend of letters to its axes (floor 0).

Every array dim has a letter (`q_BTNH`); `AXES` says over which mesh axis a dim of that letter is split. Layout is applied at the
borders only: parameters by `tree_shardings`, batches by `put`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phased_ift_jax.records import UserError

if TYPE_CHECKING:
    from phased_ift_jax.config import MeshConfig

Tree = TypeVar("Tree")

AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "A": None,  # accumulation steps
    "B": ("data", "fsdp"),  # rows of a batch
    "T": None,  # tokens of a row
    "L": None,  # layers, scanned
    "V": "tensor",  # vocabulary
    "D": "fsdp",  # model width
    "E": None,  # model width of a norm's scale: too small to be worth a gather
    "N": "tensor",  # query heads
    "K": "tensor",  # key/value heads
    "H": None,  # head width
    "F": "tensor",  # feed-forward width
}


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """The sizes of the axes data, fsdp and tensor over so many devices.

    Raises:
        UserError: they do not multiply to the number of devices.
    """
    sizes = {"data": config.data, "fsdp": config.fsdp, "tensor": config.tensor}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        asked = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise UserError(f"mesh: {asked} does not make {devices} devices; set one axis to -1 to take those that remain")
    return {name: devices // fixed if size == -1 else size for name, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices (or those given); raises `UserError` as `mesh_sizes` does."""
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(config, len(devices))
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Auto,) * 3, devices=devices)


def batch_rows(sizes: Mapping[str, int]) -> int:
    """How many devices share the rows of a batch, given the sizes of the mesh's axes: its row count must be a multiple of this."""
    return sizes["data"] * sizes["fsdp"]


def spec(dims: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """The partition of an array with these dims; a dim that its axis does not divide is held whole on each device."""

    def axis(letter: str, size: int) -> str | tuple[str, ...] | None:
        names = AXES[letter]
        devices = np.prod([mesh.shape[name] for name in ([names] if isinstance(names, str) else names or [])])
        return names if size % devices == 0 else None

    return PartitionSpec(*(axis(letter, size) for letter, size in zip(dims, shape, strict=True)))


def tree_shardings(dims: Tree, shapes: Any, mesh: Mesh) -> Tree:
    """Shardings, leaf by leaf, of a tree of arrays (or shapes) whose dims are spelt by a tree of strings."""
    return jax.tree.map(lambda letters, leaf: NamedSharding(mesh, spec(letters, leaf.shape, mesh)), dims, shapes)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of a scalar or of anything small: whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def owned(tree: Tree, shardings: Any) -> Tree:
    """The same arrays in buffers that XLA itself made; those given are given up, one after another.

    Arrays that came from a file may share the host's memory or be held otherwise: they can be donated and yet not reused, so that the
    first step after a restore would hold the state twice (jax issue 18617).
    """

    def one(array: jax.Array, sharding: NamedSharding) -> jax.Array:
        copy = _copying(sharding)(array).block_until_ready()
        array.delete()
        return copy

    return jax.tree.map(one, tree, shardings)


def highest(numbers: Sequence[float], mesh: Mesh) -> jax.Array:
    """The elementwise largest of what the processes give, the same on all of them. It is computed after the steps before it, and holds up none."""
    mine = np.asarray(numbers, np.float32)
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    given = jax.make_array_from_callback((mesh.size, len(mine)), sharding, lambda _: mine[None])
    return _maximum(mesh)(given)


@cache
def _maximum(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda given: jnp.max(given, axis=0), out_shardings=replicated(mesh))


@cache
def _copying(sharding: NamedSharding) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(jnp.copy, out_shardings=sharding)


def put(tree: Any, dims: str, mesh: Mesh) -> Any:
    """Move a tree of equally shaped host arrays to the mesh; a host hands over only the slices of its own devices."""

    def one(array: np.ndarray) -> jax.Array:
        sharding = NamedSharding(mesh, spec(dims, array.shape, mesh))
        return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

    return jax.tree.map(one, tree)

"""The device mesh, and the one table from the legend of letters to its axes (floor 0).

Every array dim has a letter (`q_BTNH`); `AXES` says over which mesh axis a dim of that letter is split. Parameters lie so
(`tree_shardings`), batches come so (`put`), and inside a step `constrain` holds activations and `gather` brings one layer's weights
together where they are used. Axes of several TPU slices: `data` is the outermost, so that only it crosses the slow network between them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from phased_ift_jax.records import UserError

if TYPE_CHECKING:
    from phased_ift_jax.config import MeshConfig

Tree = TypeVar("Tree")

AXES: Mapping[str, str | tuple[str, ...] | None] = {
    "A": None,  # accumulation steps
    "B": ("data", "fsdp"),  # rows of a batch
    "R": "data",  # rows of a batch where each shard looks at those of all: in the embedding, whose width is split
    "T": None,  # tokens of a row
    "S": None,  # slots of a cache
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
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if sizes["data"] % slices:
        raise UserError(f"mesh.data: {sizes['data']} copies of the model do not go over {slices} slices, between which the network is slow; set mesh.data {slices}")
    types = (AxisType.Auto,) * 3
    if slices == 1:
        return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)
    within = (sizes["data"] // slices, sizes["fsdp"], sizes["tensor"])
    return Mesh(create_hybrid_device_mesh(within, (slices, 1, 1), devices, allow_split_physical_axes=True), tuple(sizes), axis_types=types)


def batch_rows(sizes: Mapping[str, int]) -> int:
    """How many devices share the rows of a batch, given the sizes of the mesh's axes: its row count must be a multiple of this."""
    return sizes["data"] * sizes["fsdp"]


def spec(dims: str, shape: tuple[int, ...], mesh: Mesh, whole: frozenset[str] = frozenset()) -> PartitionSpec:
    """The partition of an array with these dims, over the axes that are not in `whole`.

    A dim that its axis does not divide is held whole on each device, and so is one whose axis an earlier dim has taken: the width D of
    an activation (B, T, D), whose rows are split over fsdp already.
    """
    taken = set(whole)

    def axis(letter: str, size: int) -> str | tuple[str, ...] | None:
        names = AXES[letter]
        each = [names] if isinstance(names, str) else names or []
        if taken.intersection(each) or size % int(np.prod([mesh.shape[name] for name in each])):
            return None
        taken.update(each)
        return names

    return PartitionSpec(*(axis(letter, size) for letter, size in zip(dims, shape, strict=True)))


def constrain(array: jax.Array, dims: str, mesh: Mesh | None) -> jax.Array:
    """The same array, laid out by its dims; its gradient is laid out so, too. Without a mesh, as it was."""
    return array if mesh is None else jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(dims, array.shape, mesh)))


def gathered(stored: jax.Array, dims: str, dtype: jnp.dtype, mesh: Mesh | None) -> jax.Array:
    """A parameter in `dtype` with the shards of `fsdp` brought together, as a matmul needs it; they travel in `dtype`."""
    if mesh is None:
        return stored.astype(dtype)
    array = constrain(stored.astype(dtype), dims, mesh)
    return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec(dims, array.shape, mesh, frozenset({"fsdp"}))))


def gather(stored: jax.Array, dims: str, dtype: jnp.dtype, mesh: Mesh | None) -> jax.Array:
    """`gathered` for a model that is trained: each device's part of the gradient is added up straight into the shards, and none ever holds
    the whole sum. Named "gathered", so that a policy can tell the backward pass to gather again instead of keeping all of it.
    """

    @jax.custom_vjp
    def together(stored: jax.Array) -> jax.Array:
        return gathered(stored, dims, dtype, mesh)

    together.defvjp(lambda stored: (together(stored), None), lambda _, gradient: (constrain(gradient, dims, mesh).astype(stored.dtype),))
    return checkpoint_name(together(stored), "gathered")


def per_device(function: Callable[..., jax.Array], arrays: Sequence[jax.Array], dims: Sequence[str], mesh: Mesh | None) -> jax.Array:
    """A function of arrays, each device's part of it computed there alone: for kernels that the compiler cannot divide. The result is laid
    out as the first array. Heads are divided only where the key/value heads can be, too.
    """
    if mesh is None:
        return function(*arrays)
    sizes = {letter: size for letters, array in zip(dims, arrays, strict=True) for letter, size in zip(letters, array.shape, strict=True)}
    whole = frozenset({"tensor"} if sizes.get("K", 0) % mesh.shape["tensor"] else ())
    specs = tuple(spec(letters, array.shape, mesh, whole) for letters, array in zip(dims, arrays, strict=True))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arrays)  # pallas cannot say what varies


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
    """Move a tree of equally shaped host arrays to the mesh. Every process has the whole of them, and hands over what its own devices hold."""

    def one(array: np.ndarray) -> jax.Array:
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec(dims, array.shape, mesh)), array, array.shape)

    return jax.tree.map(one, tree)

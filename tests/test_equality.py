"""Laws of equality: packing, accumulation, devices, chunks and recomputation change where terms are added up, never the result."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from phased_ift_jax.config import MeshConfig, TrainingConfig
from phased_ift_jax.data.packing import Shapes, pack
from phased_ift_jax.models import decoder
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import PackedBatch, TokenizedExample
from phased_ift_jax.sharding import batch_rows, make_mesh, put
from phased_ift_jax.training import loss as loss_module
from phased_ift_jax.training.checkpoint import Checkpoints, Position, load_arrays, load_params
from phased_ift_jax.training.loss import summed_loss
from phased_ift_jax.training.optimizer import apply, make_optimizer
from phased_ift_jax.training.step import BATCH_DIMS, Trainer, TrainState

MODEL = DecoderConfig(96, 32, 48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=7, qkv_bias=True, initializer_range=0.3)
TRAINING = TrainingConfig(learning_rate=1e-3)
MESHES = [(8, 1, 1), (1, 8, 1), (1, 4, 2), (2, 2, 2)]
Result = tuple[float, dict[str, np.ndarray]]


def mesh_of(sizes: tuple[int, int, int] = (1, 1, 1)) -> jax.sharding.Mesh:
    data, fsdp, tensor = sizes
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor])


@functools.cache
def trainer_of(sizes: tuple[int, int, int] = (1, 1, 1), dtype: str = "float64", gradient_checkpointing: str = "none") -> Trainer:
    return Trainer(MODEL, TRAINING, mesh_of(sizes), dtype, dtype, gradient_checkpointing)


@functools.cache
def examples() -> tuple[TokenizedExample, ...]:
    """Sixteen of very different lengths and shares of trained tokens, so that a mean of means is far from the mean."""
    rng = np.random.default_rng(0)
    lengths = [60, 4, 31, 5, 44, 6, 17, 4, 25, 9, 4, 52, 12, 7, 38, 5]
    starts = [2, 3, 29, 2, 40, 1, 3, 3, 5, 8, 1, 50, 6, 2, 1, 4]
    return tuple(TokenizedExample(rng.integers(3, 96, n, dtype=np.int32), ((start, n),)) for n, start in zip(lengths, starts, strict=True))


PACKED, ONE_A_ROW = Shapes(8, (64,)), Shapes(16, (64,), packed=False)


def parts_on(trainer: Trainer) -> int:
    """Accumulation parts for eight rows: two where four devices share the rows, else one."""
    return 2 if batch_rows(trainer.mesh.shape) == 4 else 1


def computed(trainer: Trainer, batch: PackedBatch) -> Result:
    """Loss and gradients by name, from the same weights whatever the trainer. In float32 no dtype is promoted on the way."""
    weights = host_params(trainer.param_dtype)
    params = jax.tree.map(lambda array, sharding: jax.make_array_from_callback(array.shape, sharding, lambda index: array[index]), weights, trainer.shardings.params)
    with jax.numpy_dtype_promotion("strict" if trainer.param_dtype == "float32" else "standard"):  # strict refuses jnp.promote_types itself
        loss, gradients = trainer.loss_and_gradients(params, put(batch, BATCH_DIMS, trainer.mesh))
    assert loss.dtype == trainer.param_dtype
    return float(loss), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(gradients)}


@functools.cache
def host_params(dtype: str) -> Any:
    rng = np.random.default_rng(1)
    dims = decoder.parameter_dims(MODEL)
    shapes = decoder.parameter_shapes(MODEL, jnp.dtype("float32"))
    return jax.tree.map(lambda letters, leaf: ((1.0 if letters.endswith("E") else 0.0) + 0.3 * rng.standard_normal(leaf.shape)).astype(dtype), dims, shapes)


@functools.cache
def reference(dtype: str) -> Result:
    """One example a row, one part, one device, nothing recomputed: what all others are compared with."""
    return computed(trainer_of(dtype=dtype), pack(examples(), ONE_A_ROW))


@pytest.fixture(autouse=True)
def x64(request: pytest.FixtureRequest) -> Any:
    """float64 is allowed; what asks for float32 still gets it. Compiled quickly, but for the laws of bits, which are put to users' code."""
    jax.config.update("jax_disable_most_optimizations", "bit" not in request.node.name)
    try:
        with jax.enable_x64(True):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def same(measured: Callable[[str, float], None]) -> Callable[[str, Trainer, PackedBatch], None]:
    """The law of this page: 1e-10 in float64; in float32, 1e-5 of each tensor's norm."""

    def check(what: str, trainer: Trainer, batch: PackedBatch) -> None:
        loss, gradients = computed(trainer, batch)
        expected_loss, expected = reference(trainer.param_dtype)
        assert gradients.keys() == expected.keys()
        assert all(np.abs(gradient).max() > 1e-4 for gradient in expected.values())
        if trainer.param_dtype == "float64":
            worst = max(np.abs(gradients[name] - gradient).max() for name, gradient in expected.items())
            measured(f"{what}: loss in float64 (<= 1e-10)", abs(loss - expected_loss))
            measured(f"{what}: gradients in float64 (<= 1e-10)", worst)
            assert abs(loss - expected_loss) <= 1e-10
            assert worst <= 1e-10
        else:
            ratios = {name: np.linalg.norm(gradients[name] - gradient) / np.linalg.norm(gradient) for name, gradient in expected.items()}
            measured(f"{what}: gradients in float32, ||dg|| / ||g|| (<= 1e-5)", max(ratios.values()))
            assert abs(loss - expected_loss) <= 1e-5 * expected_loss
            assert max(ratios.values()) <= 1e-5, ratios

    return check


# --- where the terms are added up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_packed_is_unpacked(dtype: str, same: Callable[..., None]) -> None:
    """Law: the examples of a step, packed or one a row, give one loss and one gradient."""
    batch = pack(examples(), PACKED)
    assert batch.segments_BT.max() > 2
    same("packed == unpacked", trainer_of(dtype=dtype), batch)


def test_positions_restart_with_each_example() -> None:
    """Law: within a segment positions are 0, 1, 2, ... (rotary attention itself only feels their differences)."""
    batch = pack(examples(), PACKED)
    for segments, positions in zip(batch.segments_BT[0], batch.positions_BT[0], strict=True):
        for segment in range(1, segments.max() + 1):
            np.testing.assert_array_equal(positions[segments == segment], np.arange((segments == segment).sum()))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("parts", [2, 8])
def test_accumulation_changes_nothing(parts: int, dtype: str, same: Callable[..., None]) -> None:
    """Law: 8x1 == 1x8, with parts of very different token counts; a mean of the parts' means is another number (trap 9)."""
    batch = pack(examples(), PACKED, parts)
    counts = batch.weights_BT.sum((1, 2))
    assert batch.tokens_BT.shape[0] == parts
    if parts == 8:
        assert counts.max() > 3 * counts.min()
    same("accumulation", trainer_of(dtype=dtype), batch)


def test_a_part_without_trained_tokens_weighs_nothing(same: Callable[..., None]) -> None:
    """Law: rows of padding, and whole parts of it, change nothing (the last step of an epoch has few examples)."""
    same("empty parts", trainer_of(), pack(examples(), Shapes(32, (128,)), 4))


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_eight_devices_are_one_device(sizes: tuple[int, int, int], dtype: str, same: Callable[..., None]) -> None:
    """Law: on any mesh, loss and gradients are one device's; two accumulation parts where rows allow it."""
    trainer = trainer_of(sizes, dtype)
    same(f"mesh {sizes} == one device", trainer, pack(examples(), PACKED, parts_on(trainer)))


def test_rows_that_the_mesh_does_not_divide(same: Callable[..., None]) -> None:
    """Law: a batch of 9 rows on 8 devices is held whole by each, and gives the same."""
    trainer = trainer_of((8, 1, 1))
    batch = pack(examples(), Shapes(9, (64,)))
    assert put(batch, BATCH_DIMS, trainer.mesh).tokens_BT.sharding.is_fully_replicated
    same("rows not divisible", trainer, batch)


def cut_into(chunk: int, on_cpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of so many tokens, on CPUs smaller ones where fewer are left, and the loss as it is computed on CPUs or elsewhere."""
    monkeypatch.setattr(loss_module, "CHUNK", chunk)
    monkeypatch.setattr(loss_module, "CPU_CHUNKS", (chunk, chunk // 2, chunk // 3))
    monkeypatch.setattr(loss_module, "_on_cpu", lambda mesh: on_cpu)


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("chunk", [16, 24])
def test_a_chunked_loss_is_the_loss(chunk: int, on_cpu: bool, same: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: logits made in chunks of positions (24 does not divide the row) give the same loss and gradient."""
    cut_into(chunk, on_cpu, monkeypatch)
    same("chunked loss", dataclasses.replace(trainer_of()), pack(examples(), PACKED))


def test_chunks_without_a_trained_position_are_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two rows of 64 with 5 and 28 trained positions chunks of 16, 8 and 5 each are computed, wherever these lie: what is not a number in the others is not seen."""
    cut_into(32, True, monkeypatch)
    rng = np.random.default_rng(0)
    weights_BT = np.zeros((2, 64), np.float32)
    weights_BT[0, rng.choice(64, 5, replace=False)], weights_BT[1, rng.choice(64, 28, replace=False)] = 1, 1
    hidden_BTD, head_DV = rng.normal(size=(2, 64, 8)).astype(np.float32), rng.normal(size=(8, 11)).astype(np.float32)
    targets_BT = rng.integers(0, 11, (2, 64), np.int32)
    beyond_BT = np.cumsum(weights_BT == 0, axis=1) > 29 - weights_BT.sum(axis=1, keepdims=True)  # those that come after three chunks of the row
    loss = jax.value_and_grad(lambda hidden_BTD: loss_module.cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, "DV", None))
    whole, gradient_BTD = loss(hidden_BTD)
    other, other_BTD = loss(np.where((beyond_BT & (weights_BT == 0))[..., None], np.nan, hidden_BTD))
    assert float(whole) == float(other)
    assert (gradient_BTD == other_BTD).all()
    assert (np.asarray(gradient_BTD)[weights_BT == 0] == 0).all()


@pytest.mark.parametrize("policy", [*decoder.POLICIES])
def test_recomputation_changes_nothing(policy: str, same: Callable[..., None]) -> None:
    """Law: whatever the backward pass recomputes, the gradient is the same."""
    same("gradient_checkpointing", trainer_of(gradient_checkpointing=policy), pack(examples(), PACKED))


def test_scanned_layers_are_the_layers(same: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: one after another, as a CPU computes few layers, or in a loop, as all else does: the same."""
    assert trainer_of().model.num_layers <= decoder.UNROLLED
    monkeypatch.setattr(decoder, "UNROLLED", 0)
    same("scanned layers", dataclasses.replace(trainer_of()), pack(examples(), PACKED))


def test_evaluation_is_the_training_loss() -> None:
    """Law: summed loss / count of `evaluate` is the loss that the step reports, over parts and devices."""
    trainer = trainer_of((2, 2, 2))
    params = jax.device_put(host_params("float64"), trainer.shardings.params)
    total, count = trainer.evaluate(params, put(pack(examples(), PACKED, 2), BATCH_DIMS, trainer.mesh))
    assert float(count) == sum(example.response_tokens for example in examples())
    assert abs(float(total) / float(count) - reference("float64")[0]) <= 1e-10


@pytest.mark.parametrize("sizes", [None, (2, 2, 2)], ids=str)
@pytest.mark.parametrize("dims", ["DV", "VD"])
@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize(("T", "chunk"), [(30, 1024), (30, 24), (31, 24)])
def test_the_gradient_that_the_loss_makes_is_the_plain_formulas(
    T: int, chunk: int, on_cpu: bool, dims: str, sizes: tuple[int, int, int] | None, measured: Callable[[str, float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Law: what `cross_entropy` gives as its gradient, scaled, is what JAX derives from sum(weight * -log softmax(scores)[target]): with a
    head of its own or the embedding's, whole or in chunks (of one position where T is prime), three rows on devices that share four."""
    cut_into(chunk, on_cpu, monkeypatch)
    B, D, V = 3, 6, 11
    assert (loss_module.chunks_of(T, B) > 1) == (chunk < 1024)
    rng = np.random.default_rng(T)
    hidden_BTD, head_DV = rng.standard_normal((B, T, D)), rng.standard_normal((D, V))
    targets_BT, weights_BT = rng.integers(0, V, (B, T)), rng.random((B, T)) * (rng.random((B, T)) < 0.7)

    def plain(hidden_BTD: jax.Array, head: jax.Array) -> jax.Array:
        scores_BTV = jnp.einsum(f"BTD,{dims}->BTV", hidden_BTD, head)
        return 0.3 * jnp.sum(weights_BT * -jnp.take_along_axis(jax.nn.log_softmax(scores_BTV), targets_BT[..., None], -1)[..., 0])

    def ours(hidden_BTD: jax.Array, head: jax.Array) -> jax.Array:
        total = loss_module.cross_entropy(hidden_BTD, head, jnp.asarray(targets_BT, jnp.int32), jnp.asarray(weights_BT, jnp.float32), dims, sizes and mesh_of(sizes))
        return jnp.asarray(0.3, total.dtype) * total

    weights_BT = weights_BT.astype(np.float32).astype(np.float64)
    inputs = (hidden_BTD, head_DV if dims == "DV" else head_DV.T)
    expected_loss, expected = jax.value_and_grad(plain, (0, 1))(*inputs)
    for dtype, bound in (("float64", 1e-10), ("float32", 1e-5)):
        narrow = [jnp.asarray(array, dtype) for array in inputs]
        loss, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*narrow)
        assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
        worst = max(float(np.linalg.norm(got - want) / np.linalg.norm(want)) for got, want in zip(gradients, expected, strict=True))
        measured(f"cross_entropy's own gradient in {dtype}, ||dg|| / ||g|| (<= {bound:g})", worst)
        assert worst <= bound
        assert abs(float(loss) - float(expected_loss)) <= bound * float(expected_loss)
        assert abs(float(jax.jit(ours)(*narrow)) - float(loss)) <= bound * float(loss), "with or without a gradient"


@pytest.mark.parametrize("tokens", [87, 128, 255])
def test_a_mean_turns_no_gradient_by_the_rounding_of_its_count(tokens: int) -> None:
    """Law: in bfloat16 the gradients of a mean over n tokens, seen along the float32 ones, are as long as those: 1 / n comes in unrounded,
    before the gradients are rounded."""
    rng = np.random.default_rng(tokens)
    hidden_BTD, head_DV = (jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in ((2, 128, 64), (64, 96)))
    targets_BT = jnp.asarray(rng.integers(0, 96, (2, 128)), jnp.int32)
    weights_BT = jnp.asarray((np.arange(256) < tokens).reshape(2, 128), jnp.float32)

    def gradients(dtype: str) -> list[np.ndarray]:
        loss = lambda hidden, head: loss_module.cross_entropy(hidden, head, targets_BT, weights_BT, "DV", None) / tokens  # noqa: E731
        return [np.asarray(gradient, np.float64) for gradient in jax.grad(loss, (0, 1))(hidden_BTD.astype(dtype), head_DV.astype(dtype))]

    for got, want in zip(gradients("bfloat16"), gradients("float32"), strict=True):
        assert abs(float((got * want).sum() / (want * want).sum()) - 1) < 5e-4


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moment", [None, "bfloat16"])
def test_a_step_keeps_the_dtypes_of_its_state(param_dtype: str, moment: str | None) -> None:
    """Law: what a step gives back is as `shapes` says, so that its buffers are taken over and nothing is compiled again."""
    trainer = Trainer(MODEL, TrainingConfig(adam_mu_dtype=moment), mesh_of((1, 1, 1)), param_dtype, "bfloat16")
    ids = jax.ShapeDtypeStruct((1, 2, 32), jnp.int32)
    batch = PackedBatch(ids, ids, jax.ShapeDtypeStruct((1, 2, 32), jnp.float32), ids, ids)
    after, _ = jax.eval_shape(trainer.step, trainer.shapes, batch, jax.ShapeDtypeStruct((), jnp.float32))
    assert jax.tree.map(lambda leaf: leaf.dtype, after) == jax.tree.map(lambda leaf: leaf.dtype, trainer.shapes)


# --- who sees whom -------------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def row_logits(config: DecoderConfig, params: Any, batch: PackedBatch) -> jax.Array:
    return decoder.logits(config, params, decoder.hidden_states(config, params, batch.tokens_BT, batch.segments_BT, batch.positions_BT))


@pytest.mark.parametrize("window", [7, None])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_another_example_says_changes_no_bit(dtype: str, window: int | None) -> None:
    """Law: change example A's tokens, not its length, and the logits of B do not change in one bit: after A or before it in the same
    row, or in another row; A's own do change (trap 10)."""
    config = dataclasses.replace(MODEL, sliding_window=window)
    params = jax.tree.map(lambda p: jnp.asarray(p, dtype), host_params("float32"))
    rng = np.random.default_rng(3)
    a, b = rng.integers(3, 96, 40, dtype=np.int32), rng.integers(3, 96, 50, dtype=np.int32)

    def run(a: np.ndarray) -> np.ndarray:
        tokens = np.zeros((3, 128), np.int32)
        segments, positions = tokens.copy(), tokens.copy()
        for row, parts in enumerate([(a, b), (b, a), (b, b)]):
            start = 0
            for number, part in enumerate(parts, 1):
                place = slice(start, start + len(part))
                tokens[row, place], segments[row, place], positions[row, place] = part, number, np.arange(len(part))
                start += len(part)
        nothing = np.zeros_like(tokens)
        return np.asarray(row_logits(config, params, PackedBatch(tokens, nothing, nothing, segments, positions)).astype(jnp.float32))

    one, other = run(a), run((a + 11) % 96)
    assert one[0, 40:90].tobytes() == other[0, 40:90].tobytes()
    assert one[1, :50].tobytes() == other[1, :50].tobytes()
    assert one[2, :100].tobytes() == other[2, :100].tobytes()
    assert (one[0, :40] != other[0, :40]).any(axis=-1).all()
    assert (one[1, 50:90] != other[1, 50:90]).any(axis=-1).all()


@pytest.mark.parametrize("window", [5, None])
def test_a_query_sees_its_example_up_to_itself_and_no_further_than_the_window(window: int | None) -> None:
    """Law: the gradient of position t's logits in the embedding of token s is exactly zero unless s is in t's example and
    0 <= t - s <= layers * (window - 1), and is not zero there: causality, segments and window to the position (trap 14)."""
    T = 90
    config = dataclasses.replace(MODEL, vocab_size=T, sliding_window=window, num_kv_heads=4)
    params = decoder.init_params(config, jax.random.key(0), jnp.float64)
    segments = np.repeat([1, 2, 3, 0], [20, 30, 33, 7])[None]
    positions = np.concatenate([np.arange(n) for n in (20, 30, 33, 7)])[None].astype(np.int32)

    def states(embed: jax.Array) -> jax.Array:
        projection = jax.random.normal(jax.random.key(1), (config.hidden_size,), jnp.float64)
        return decoder.hidden_states(config, params | {"embed": embed}, jnp.arange(T)[None], jnp.asarray(segments), jnp.asarray(positions))[0] @ projection

    influence_TS = np.abs(np.asarray(jax.jit(jax.jacrev(states))(params["embed"]))).sum(-1)  # token s is row s of the embedding
    distance_TS = np.arange(T)[:, None] - np.arange(T)
    reach = T if window is None else config.num_layers * (window - 1)
    expected_TS = (distance_TS >= 0) & (distance_TS <= reach) & (segments == segments.T)
    trained = segments[0] > 0
    np.testing.assert_array_equal(influence_TS[trained] != 0, expected_TS[trained])


# --- the state and its shardings -----------------------------------------------------------------------------------------------


def some_state(trainer: Trainer) -> TrainState:
    return trainer.fresh(trainer.init_params(0))


def moments(state: TrainState) -> list[Any]:
    return [part for part in state.opt_state if isinstance(part, optax.ScaleByAdamState)]


@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2)], ids=str)
def test_moments_and_gradients_lie_as_their_parameters(sizes: tuple[int, int, int]) -> None:
    """Law: specs of parameters, both moments and gradients are equal leaf by leaf, as planned, after `fresh` and after a step (trap 44)."""
    trainer = trainer_of(sizes, "float32")
    batch = put(pack(examples(), PACKED, parts_on(trainer)), BATCH_DIMS, trainer.mesh)
    state = some_state(trainer)
    planned = jax.tree.map(lambda sharding: sharding.spec, trainer.shardings.params)
    assert len(set(jax.tree.leaves(planned, is_leaf=lambda s: isinstance(s, jax.P)))) > 4
    for when in ("fresh", "stepped"):
        for tree in [state.params, *((m.mu, m.nu)[i] for m in moments(state) for i in (0, 1))]:
            assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding and isinstance(leaf.sharding, NamedSharding), tree, trainer.shardings.params)), when
        assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, state, trainer.shardings)), when
        gradients = trainer.loss_and_gradients(state.params, batch)[1]
        assert jax.tree.all(jax.tree.map(lambda leaf, sharding: leaf.sharding == sharding, gradients, trainer.shardings.params)), when
        state, metrics = trainer.step(state, batch, jnp.float32(1e-3))
        assert metrics["loss"].sharding.is_fully_replicated
    gate = moments(state)[0].mu["layers"]["mlp"]["gate"]
    assert gate.size == gate.addressable_shards[0].data.size * sizes[1] * sizes[2], "each device holds its share only"


def buffers(tree: Any) -> list[list[int]]:
    return [[shard.data.unsafe_buffer_pointer() for shard in leaf.addressable_shards] for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("origin", ["fresh", "restored", "restored weights"])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 4, 2)], ids=str)
def test_a_step_takes_over_the_buffers_of_its_state(sizes: tuple[int, int, int], origin: str, tmp_path: Path) -> None:
    """Law: a step's old state is given up and its memory reused by the new one, be the state new or a checkpoint's, where jax by itself
    holds it twice (trap 25)."""
    trainer = trainer_of(sizes, "float32")
    batch = put(pack(examples(), PACKED, parts_on(trainer)), BATCH_DIMS, trainer.mesh)
    state = some_state(trainer)
    if origin != "fresh":
        before, store = state, Checkpoints(tmp_path / "checkpoints", "hash", 2)
        store.save("1-a", Position(1, 1, 0, False), {"params": state.params} if "weights" in origin else state)
        store.wait()
        path = tmp_path / "checkpoints" / "1-a" / "1"
        state = trainer.fresh(load_params(path, trainer.shapes.params, trainer.shardings.params)) if "weights" in origin else load_arrays(path, trainer.shapes, trainer.shardings)
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(np.asarray(a), np.asarray(b)) and a.sharding == b.sharding, state, before))
    old, leaves = buffers(state.params) + buffers([m[1:] for m in moments(state)]), jax.tree.leaves(state)
    state, _ = trainer.step(state, batch, jnp.float32(1e-3))
    new = buffers(state.params) + buffers([m[1:] for m in moments(state)])
    assert all(leaf.is_deleted() for leaf in leaves)
    for device in range(trainer.mesh.size):
        assert {leaf[device] for leaf in new} == {leaf[device] for leaf in old}


def test_fresh_parameters_are_drawn_as_transformers_draws_them() -> None:
    """Law: norms are one, biases zero, all else is normal with a deviation of `initializer_range`."""
    for path, leaf in jax.tree.leaves_with_path(trainer_of(dtype="float32").init_params(0)):
        name, array = jax.tree_util.keystr(path), np.asarray(leaf)
        if "norm" in name or "bias" in name:
            assert (array == ("norm" in name)).all(), name
        else:
            assert array.std() == pytest.approx(MODEL.initializer_range, rel=0.1), name


# --- the optimizer -------------------------------------------------------------------------------------------------------------


def test_only_norms_and_biases_escape_decay() -> None:
    """Law: with a zero gradient an update multiplies every weight by 1 - rate * decay, and leaves every norm and bias as it is."""
    training = TrainingConfig(weight_decay=0.1)
    optimizer = make_optimizer(training, decoder.parameter_dims(MODEL))
    params = host_params("float64")
    after = jax.jit(lambda params: apply(optimizer, params, optimizer.init(params), jax.tree.map(jnp.zeros_like, params), jnp.float64(0.5))[0])(params)
    for (path, old), new in zip(jax.tree.leaves_with_path(params), jax.tree.leaves(after), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(new, old if "norm" in name or "bias" in name else 0.95 * old, rtol=1e-14, err_msg=name)


@pytest.mark.parametrize("scale", [1e-3, 10.0], ids=["below the clip", "clipped"])
def test_adamw_is_torchs(scale: float) -> None:
    """Law: clip, moments, bias correction, decay and rate are `clip_grad_norm_` and `torch.optim.AdamW`, in float64, step by step
    (torch divides by norm + 1e-6, hence 1e-5 of an update, which is at most the rate)."""
    torch = pytest.importorskip("torch", reason="the optimizer is compared with torch's")
    training = TrainingConfig(weight_decay=0.1, max_grad_norm=1.0, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1e-4)
    dims = decoder.parameter_dims(MODEL)
    optimizer, params = make_optimizer(training, dims), host_params("float64")
    state, update = optimizer.init(params), jax.jit(functools.partial(apply, optimizer))
    tensors = [torch.nn.Parameter(torch.from_numpy(leaf.copy())) for leaf in jax.tree.leaves(params)]
    kept = {"E", "LE", "LNH", "LKH"}  # norms and biases
    groups = [{"params": [t], "weight_decay": 0.0 if letters in kept else 0.1} for t, letters in zip(tensors, jax.tree.leaves(dims), strict=True)]
    their = torch.optim.AdamW(groups, lr=1.0, betas=(0.8, 0.9), eps=1e-4)
    rng = np.random.default_rng(4)
    for rate in (0.0, 1e-2, 2e-2, 5e-3):
        gradients = jax.tree.map(lambda leaf: scale * rng.standard_normal(leaf.shape) / 30, params)
        for tensor, gradient in zip(tensors, jax.tree.leaves(gradients), strict=True):
            tensor.grad = torch.from_numpy(gradient.copy())
        for group in their.param_groups:
            group["lr"] = rate
        norm = float(torch.nn.utils.clip_grad_norm_(tensors, 1.0))
        assert (norm > 1.0) == (scale > 1)
        their.step()
        params, state = update(params, state, gradients, jnp.float64(rate))
        for ours, tensor in zip(jax.tree.leaves(params), tensors, strict=True):
            np.testing.assert_allclose(ours, tensor.detach().numpy(), rtol=0, atol=1e-5 * 2e-2)


def test_summed_loss_counts_trained_tokens_only() -> None:
    """Law: the target of a token that is not trained, padding included, does not matter in one bit."""
    batch = jax.tree.map(lambda x: x[0], pack(examples(), PACKED))
    other = dataclasses.replace(batch, targets_BT=np.where(batch.weights_BT > 0, batch.targets_BT, 7).astype(np.int32))
    compute = jax.jit(functools.partial(summed_loss, MODEL))
    assert float(compute(host_params("float64"), batch)) == float(compute(host_params("float64"), other))

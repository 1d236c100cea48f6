"""Attention kernels: each computes what the plainest one computes, and no example of a row sees another.

Splash attention runs interpreted here, and is compiled for a TPU that is not here. cuDNN's kernel needs a GPU: what is tested is which
mask it is handed, and that the call is lowered for CUDA with it.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from phased_ift_jax.config import ModelConfig
from phased_ift_jax.models import attention, decoder
from phased_ift_jax.models.attention import attend_packed, attend_reference, implementation, kernel
from phased_ift_jax.models.kernels import attend_cudnn, attend_splash

ROOT = Path(__file__).resolve().parents[1]
SPLASH = functools.partial(attend_splash, interpret=True, block=128)
KERNELS = {
    "splash": SPLASH,
    "splash in large blocks": functools.partial(attend_splash, interpret=True),
    "xla": attend_packed,
    "cudnn's mask": functools.partial(attend_cudnn, implementation="xla"),
}
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # most of the time here is the compiler's
TINY = decoder.DecoderConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, sliding_window=20)


def drawn(rng: np.random.Generator, T: int, N: int, K: int, H: int, B: int = 1) -> tuple[jax.Array, ...]:
    """Queries, keys, values, and segments as a packed batch has them: examples numbered from 1, then padding."""
    q, k, v = (jnp.asarray(rng.standard_normal((B, T, heads, H)), jnp.float32) for heads in (N, K, K))
    segments = np.zeros((B, T), np.int32)
    for row in segments:
        cuts = np.sort(rng.choice(np.arange(1, T), size=rng.integers(1, 6), replace=False))
        for number, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True), 1):
            row[start:stop] = number
    return q, k, v, jnp.asarray(segments)


def case(number: int) -> tuple[tuple[jax.Array, ...], int | None]:
    """One of the drawn cases: inputs and window. Lengths are those of runs, multiples of 64, and some that are not."""
    rng = np.random.default_rng(number)
    T = int(rng.choice([64, 128, 192, 256, 320, 384, rng.integers(65, 300)]))
    N, K = [(2, 2), (4, 2), (4, 1), (3, 1)][rng.integers(4)]
    window = None if rng.random() < 0.4 else int(rng.integers(1, T + 20))
    return drawn(rng, T, N, K, (64, 96, 128, 8)[number % 4], int(rng.integers(1, 3))), window


@functools.cache
def differentiated(attend, window):
    def weighed(q, k, v, segments, cotangent):
        y = attend(q, k, v, segments, window)
        return jnp.sum(y.astype(jnp.float32) * cotangent), y

    return jax.jit(jax.grad(weighed, argnums=(0, 1, 2), has_aux=True), compiler_options=QUICKLY)


def output_and_gradients(attend, inputs, window, cotangent):
    """Outputs, zero where there is padding, whose own mean nothing, and the gradients of what is left."""
    real = (inputs[3] != 0)[..., None, None]
    gradients, y = differentiated(attend, window)(*inputs, cotangent * real)
    return jnp.where(real, y, 0), gradients


def off(got: jax.Array, want: jax.Array) -> float:
    """Largest difference, as a share of the largest absolute value."""
    return float(jnp.max(jnp.abs(got - want)) / jnp.max(jnp.abs(want)))


@pytest.mark.parametrize("number", range(20))
def test_every_kernel_computes_what_the_plainest_one_does(number, measured):
    """Outputs within 1e-5 and gradients within 1e-4 of the largest absolute value, float32."""
    inputs, window = case(number)
    cotangent = jnp.asarray(np.random.default_rng(number).standard_normal(inputs[0].shape), jnp.float32)
    want, wanted = output_and_gradients(attend_reference, inputs, window, cotangent)
    for name in ("splash in large blocks" if number % 5 == 4 else "splash", "xla", *(["cudnn's mask"] if number % 2 else [])):
        got, gradients = output_and_gradients(KERNELS[name], inputs, window, cotangent)
        measured(f"{name}, output (1e-5)", off(got, want))
        assert off(got, want) < 1e-5, name
        for letter, g, w in zip("qkv", gradients, wanted, strict=True):
            measured(f"{name}, gradients (1e-4)", off(g, w))
            assert off(g, w) < 1e-4, (name, letter)


def test_the_drawn_cases_differ_in_what_matters():
    cases = [case(number) for number in range(20)]
    shapes = [inputs[0].shape for inputs, _ in cases]
    assert {H for *_, H in shapes} == {8, 64, 96, 128}
    assert {inputs[0].shape[2] // inputs[1].shape[2] for inputs, _ in cases} == {1, 2, 3, 4}
    assert any(T % 128 for _, T, _, _ in shapes) and any(T > 256 for _, T, _, _ in shapes)  # noqa: PT018
    assert any(window is None for _, window in cases)
    assert any(window and window < 64 for _, window in cases)
    assert any(window and 128 < window < inputs[0].shape[1] for inputs, window in cases)
    assert all((inputs[3] == 0).any() and len(np.unique(inputs[3])) > 1 for inputs, _ in cases)


@pytest.mark.parametrize("window", [None, 700])
def test_splash_in_more_blocks_than_the_fused_backward_kernel_takes(window, measured):
    inputs = drawn(np.random.default_rng(0), 1100, 2, 1, 64)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    want, wanted = output_and_gradients(attend_reference, inputs, window, cotangent)
    for block in (256, 1024):
        got, gradients = output_and_gradients(functools.partial(SPLASH, block=block), inputs, window, cotangent)
        errors = [off(got, want) * 10, *map(off, gradients, wanted)]
        measured("splash, 1,100 tokens, gradients (1e-4)", max(errors[1:]))
        assert max(errors) < 1e-4


@pytest.mark.parametrize("name", ["splash", "xla", "cudnn's mask"])
def test_bfloat16(name, measured):
    """As far from the truth in float32 as the plainest kernel in bfloat16 is, within a factor of 2."""
    inputs, window = case(1)
    cotangent = jnp.asarray(np.random.default_rng(1).standard_normal(inputs[0].shape), jnp.float32)
    half = (*(x.astype(jnp.bfloat16) for x in inputs[:3]), inputs[3])
    truth = output_and_gradients(attend_reference, (*(x.astype(jnp.float32) for x in half[:3]), inputs[3]), window, cotangent)
    plain, got = (output_and_gradients(attend, half, window, cotangent) for attend in (attend_reference, KERNELS[name]))
    for g, p, t in zip(jax.tree.leaves(got), jax.tree.leaves(plain), jax.tree.leaves(truth), strict=True):
        assert g.dtype == jnp.bfloat16
        measured(f"{name}, bfloat16 over the plainest kernel's own error (2)", off(g, t) / off(p, t))
        assert off(g, t) < 2 * off(p, t)


@pytest.mark.parametrize("name", KERNELS)
def test_no_example_sees_another(name):
    """Other tokens in one example change no bit of the others' outputs and gradients, and do change its own."""
    rng = np.random.default_rng(3)
    q, k, v, _ = drawn(rng, 300, 4, 2, 64)
    segments = jnp.asarray(np.repeat([1, 2, 3, 0], [70, 110, 100, 20])[None])
    cotangent = jnp.asarray(rng.standard_normal(q.shape), jnp.float32)
    there = (segments == 2)[..., None, None]
    other = [jnp.where(there, 3 * jnp.asarray(rng.standard_normal(x.shape), jnp.float32), x) for x in (q, k, v)]
    for window in (None, 90):
        before = output_and_gradients(KERNELS[name], (q, k, v, segments), window, cotangent)
        after = output_and_gradients(KERNELS[name], (*other, segments), window, cotangent)
        for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            changed = np.any(np.asarray(x) != np.asarray(y), axis=(0, 2, 3))
            assert not changed[np.asarray(segments[0] != 2)].any()
            assert changed[np.asarray(segments[0] == 2)][1:].all()  # the first query sees one key: its gradient is 0


@pytest.mark.parametrize(("window", "T"), [(1, 64), (63, 64), (127, 128), (128, 129), (100, 300), (256, 300)])
@pytest.mark.parametrize("name", ["splash", "xla", "cudnn's mask"])
def test_a_window_of_w_is_w_keys_the_own_included(name, window, T):
    """Another key and value at a position change the outputs from there on for `window` positions, and no bit of any other."""
    rng = np.random.default_rng(4)
    q, k, v, _ = drawn(rng, T, 2, 1, 8)
    segments = jnp.ones((1, T), jnp.int32)
    attend = jax.jit(functools.partial(KERNELS[name], window=window), compiler_options=QUICKLY)
    before = np.asarray(attend(q, k, v, segments))
    for position in (0, 1, T - window - 1, T - 1):
        after = np.asarray(attend(q, k.at[:, position].add(2.0), v.at[:, position].add(2.0), segments))
        assert np.flatnonzero(np.any(before != after, axis=(0, 2, 3))).tolist() == list(range(position, min(T, position + window))), position


@pytest.mark.parametrize("name", KERNELS)
def test_a_row_of_padding_gives_finite_numbers(name):
    q, k, v, segments = drawn(np.random.default_rng(5), 200, 2, 1, 8, B=2)
    q, k, v, segments = (x.at[1].set(0) for x in (q, k, v, segments))
    for leaf in jax.tree.leaves(differentiated(KERNELS[name], 50)(q, k, v, segments, jnp.ones(q.shape))):
        assert np.isfinite(leaf).all()


def test_blocks_that_no_query_sees_are_not_computed():
    """Examples of at most 64 tokens in a row of 1,024: of each block of queries two blocks of keys, not all before it, whatever these hold."""
    q, k, v, _ = drawn(np.random.default_rng(9), 1024, 2, 1, 8)
    segments = jnp.asarray(np.arange(1024)[None] // 50 + 1)
    far = jnp.arange(1024)[None, :, None, None] < 1024 - 3 * 64
    attend = jax.jit(functools.partial(attend_packed, window=None))
    wrong = attend(q, jnp.where(far, jnp.nan, k), jnp.where(far, jnp.nan, v), segments)  # a masked NaN is no longer 0 times something, where it is computed with
    assert (wrong[:, -64:] == attend(q, k, v, segments)[:, -64:]).all()
    assert np.isnan(wrong[:, :64]).all()


def tiny(gradient_checkpointing: str, attn_implementation: str):
    """A function of a tiny decoder's parameters: the sum of its states' squares. Head width, window and length fit no block."""
    rng = np.random.default_rng(6)
    tokens = jnp.asarray(rng.integers(0, TINY.vocab_size, (2, 72)))
    segments = jnp.asarray(np.repeat([[1, 2, 0], [1, 2, 3]], [40, 25, 7], axis=1))
    positions = jnp.asarray(np.concatenate([np.arange(n) for n in (40, 25, 7)])[None].repeat(2, 0))
    compute = decoder.Compute(None, gradient_checkpointing, attn_implementation)
    return lambda params: jnp.sum(decoder.hidden_states(TINY, params, tokens, segments, positions, compute) ** 2)


def calls(jaxpr) -> int:
    """How many pallas kernels a program runs: a scan's body counts once, and what has no outputs, which no compiler keeps, not at all."""
    count = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            count += 1
        elif equation.outvars:
            inner = jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
            count += sum(calls(getattr(x, "jaxpr", x)) for x in inner if hasattr(x, "eqns"))
    return count


@pytest.fixture
def scanned(monkeypatch):
    """Layers are scanned, as they are where a CPU does not compute few of them."""
    monkeypatch.setattr(decoder, "UNROLLED", 0)


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize(("gradient_checkpointing", "kernels"), [("none", 2), ("save_attention", 2), ("full", 3)])
def test_what_is_saved_of_splash_attention_is_not_computed_again(gradient_checkpointing, kernels):
    """Forward and fused backward kernel; the forward kernel a second time only where nothing is saved."""
    params = decoder.parameter_shapes(TINY, jnp.dtype("float32"))
    assert calls(jax.make_jaxpr(jax.grad(tiny(gradient_checkpointing, "splash")))(params).jaxpr) == kernels


@pytest.mark.usefixtures("scanned")
def test_save_attention_saves_one_output_of_each_kernel(capsys):
    """Not the kernel's and its copy in another order: with splash that is its output and its log-sum-exp, with others the output."""
    params = decoder.parameter_shapes(TINY, jnp.dtype("float32"))
    for name, saved in {"splash": ["f32[2,2,4,128,64]", "f32[2,2,4,128]"], "xla": ["f32[2,2,2,2,128,8]", "f32[2,2,2,2,128]"], "reference": ["f32[2,2,72,4,8]"]}.items():
        jax.ad_checkpoint.print_saved_residuals(tiny("save_attention", name), params)
        lines = capsys.readouterr().out.splitlines()
        kept = [line.split()[0] for line in lines if line.startswith("f32[2,2,") and "argument" not in line]
        assert sorted(kept) == sorted([*saved, "f32[2,2,72,16]"]), lines  # and each layer's input


@pytest.mark.usefixtures("scanned")
def test_save_dots_saves_the_matmuls_of_a_layer(capsys):
    """Queries, keys, values, what heads add to the states, gate and up, not one of them only; what is between them is computed again."""
    params = decoder.parameter_shapes(TINY, jnp.dtype("float32"))
    jax.ad_checkpoint.print_saved_residuals(tiny("save_dots", "reference"), params)
    kept = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("f32[2,2,72,") and "argument" not in line]
    assert sorted(kept) == sorted(["f32[2,2,72,32]", *["f32[2,2,72,16]"] * 6])  # q is 32 wide; k, v, o, gate and up 16, as the layer's input


@pytest.mark.usefixtures("scanned")
@pytest.mark.parametrize("gradient_checkpointing", ["save_attention", "full"])
def test_a_scanned_decoder_computes_the_same_with_splash(gradient_checkpointing, measured):
    params = decoder.init_params(TINY, jax.random.key(0), jnp.float32)
    want, got = (jax.jit(jax.value_and_grad(tiny(gradient_checkpointing, name)), compiler_options=QUICKLY)(params) for name in ("reference", "splash"))
    worst = max(off(g, w) for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    measured("decoder with splash, gradients (1e-4)", worst)
    assert worst < 1e-4


@pytest.mark.parametrize("name", ["splash", "xla", "cudnn's mask"])
def test_inside_shard_map_over_rows_and_heads(name):
    """Eight devices, rows over four and heads over two, in a scan: the same numbers as one device."""
    mesh = jax.make_mesh((4, 2), ("rows", "heads"), axis_types=(AxisType.Auto,) * 2)
    q, k, v, segments = drawn(np.random.default_rng(7), 130, 4, 2, 64, B=4)
    cotangent = jnp.asarray(np.random.default_rng(8).standard_normal(q.shape), jnp.float32)
    heads, rows = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")

    def sharded(q, k, v, segments, window):
        inside = jax.shard_map(functools.partial(KERNELS[name], window=window), mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        return jax.lax.scan(lambda x, _: (jax.checkpoint(inside)(x, k, v, segments), None), q, None, length=1)[0]

    got, want = (output_and_gradients(attend, (q, k, v, segments), 60, cotangent) for attend in (sharded, attend_reference))
    assert max(map(off, jax.tree.leaves(got), jax.tree.leaves(want))) < 1e-4


CHOICES = [
    ("auto", "tpu", 128, "bfloat16", "splash", ""),
    ("auto", "tpu", 8, "float32", "splash", ""),
    ("auto", "tpu", 128, "float64", "xla", "splash computes in bfloat16 or float32, not in float64"),
    ("auto", "gpu", 128, "bfloat16", "cudnn", ""),
    ("auto", "cuda", 64, "float16", "cudnn", ""),
    ("auto", "gpu", 128, "float32", "xla", "cudnn computes in bfloat16 or float16, not in float32"),
    ("auto", "gpu", 100, "bfloat16", "xla", "cudnn takes heads of 8, 16, ... 128 numbers, not of 100"),
    ("auto", "gpu", 256, "bfloat16", "xla", "cudnn takes heads of 8, 16, ... 128 numbers, not of 256"),
    ("auto", "cpu", 128, "bfloat16", "xla", ""),
    ("cudnn", "cpu", 128, "bfloat16", "xla", "cudnn is for NVIDIA GPUs, and this is cpu"),
    ("cudnn", "tpu", 128, "bfloat16", "xla", "cudnn is for NVIDIA GPUs, and this is tpu"),
    ("splash", "cpu", 96, "float32", "splash", ""),
    ("splash", "gpu", 96, "bfloat16", "splash", ""),
    ("xla", "tpu", 128, "bfloat16", "xla", ""),
    ("reference", "gpu", 128, "float32", "reference", ""),
]


@pytest.mark.parametrize(("name", "platform", "head_dim", "dtype", "used", "why"), CHOICES)
def test_which_kernel_is_used_and_why(name, platform, head_dim, dtype, used, why):
    assert implementation(name, platform, head_dim, dtype) == (used, why)
    chosen = kernel(name, platform, head_dim, jnp.dtype(dtype))
    if used == "splash":
        assert (chosen.func, chosen.keywords) == (attend_splash, {"interpret": platform != "tpu"})
    else:
        assert chosen is attention.IMPLEMENTATIONS[used]


def test_every_kernel_can_be_configured():
    assert set(get_args(ModelConfig.model_fields["attn_implementation"].annotation)) == {"auto", *attention.IMPLEMENTATIONS}


def test_cudnn_is_handed_the_mask(monkeypatch):
    """Lowered for CUDA, forward and backward: cuDNN's call with a bias, and no array of keys repeated. No GPU runs it here."""
    fused = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo", reason="where jax keeps its cuDNN calls")
    monkeypatch.setattr(fused, "check_cudnn_version", lambda: 91200)  # what jax asks the GPU's libraries, which are not here
    q, k, v, segments = (jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if x.dtype == jnp.float32 else x.dtype) for x in drawn(np.random.default_rng(9), 63, 4, 2, 64))

    def weighed(q, k, v, segments):
        return jnp.sum(attend_cudnn(q, k, v, segments, 20).astype(jnp.float32))

    text = jax.jit(jax.grad(weighed, argnums=(0, 1, 2))).trace(q, k, v, segments).lower(lowering_platforms=("cuda",)).as_text()
    lines = [line for line in text.splitlines() if "__cudnn$fmha" in line]
    assert [next(word for word in line.split() if "__cudnn$" in word).split("(")[0] for line in lines] == ["@__cudnn$fmhaScaleBiasSoftmax", "@__cudnn$fmhaScaleBiasSoftmaxBackward"]
    for line in lines:
        operands = line.rsplit(" : (", 1)[1].split(" -> ")[0]
        assert "tensor<1x1x64x64xbf16>" in operands  # the mask, of even length
        assert operands.count("tensor<1x64x2x64xbf16>") == 2  # keys and values


COMPILE = """
import re
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from phased_ift_jax.config import MeshConfig
from phased_ift_jax.models import decoder
from phased_ift_jax.models.attention import kernel
from phased_ift_jax.sharding import make_mesh
devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = Mesh(np.array(devices).reshape(2, 2), ("rows", "heads"))
heads, rows = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")
def kernels(text): return [len(re.findall(f"%splash_mha_{phase}_segmented[^ ]* = .* custom-call[(]", text)) for phase in ("fwd", "dkv", "dq")]
def whole(x, spec, dtype): return jax.ShapeDtypeStruct(x, dtype, sharding=NamedSharding(mesh, spec))
for T, window, widths in ((2048, 1000, (64, 96, 128)), (576, 100, (64, 96, 128, 8)), (8192, 4096, (128,))):
    for H in widths:
        attend = kernel("auto", devices[0].platform, H, jnp.bfloat16)
        inside = jax.shard_map(lambda q, k, v, s: attend(q, k, v, s, window), mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)
        gradient = jax.jit(jax.grad(lambda q, k, v, s: jnp.sum(jnp.square(inside(q, k, v, s).astype(jnp.float32))), argnums=(0, 1, 2)))
        q, k, v = (whole((2, T, n, H), heads, jnp.bfloat16) for n in (8, 4, 4))
        text = gradient.lower(q, k, v, whole((2, T), rows, jnp.int32)).compile().as_text()
        print("KERNELS", T, H, *kernels(text))
config = decoder.DecoderConfig(vocab_size=256, hidden_size=256, intermediate_size=256, num_layers=3, num_heads=4, num_kv_heads=2, head_dim=64)
one = make_mesh(MeshConfig(), devices[:1])
alone = NamedSharding(one, PartitionSpec())
params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=alone), decoder.parameter_shapes(config, jnp.bfloat16))
ids = jax.ShapeDtypeStruct((2, 256), jnp.int32, sharding=alone)
for kept in ("none", "save_attention", "full"):
    compute = decoder.Compute(None, kept, "auto", one)
    states = lambda params, ids: jnp.sum(decoder.hidden_states(config, params, ids, ids, ids, compute).astype(jnp.float32))
    print("KERNELS", kept, *kernels(jax.jit(jax.grad(states)).lower(params, ids).compile().as_text()))
"""


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the compiler for TPUs is in libtpu, which is not installed")
def test_splash_compiles_for_a_tpu_that_is_not_here():
    """Forward and backward in bfloat16 with segments, window and shared keys, on four chips, in all head widths; fused unless rows are long.

    And in a decoder of three scanned layers: with `save_attention` the forward kernel is there once.
    """
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    wanted = [f"KERNELS {T} {H} 1 1 0" for T, H in ((2048, 64), (2048, 96), (2048, 128), (576, 64), (576, 96), (576, 128), (576, 8))]
    wanted += ["KERNELS 8192 128 1 1 1"]
    wanted += ["KERNELS none 1 1 0", "KERNELS save_attention 1 1 0", "KERNELS full 2 1 0"]
    assert [line for line in done.stdout.splitlines() if line.startswith("KERNELS")] == wanted

"""Laws of the plan for TPUs that are not here: what is compiled fits where it is said to fit, no chip ever holds the whole model, and
gradients are added up where they lie. They are read from what libtpu's compiler made of the real train step.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec
from test_run import ROOT, make_config, rows  # noqa: F401

from phased_ift_jax import chips
from phased_ift_jax import plan as plan_verb
from phased_ift_jax.config import MeshConfig, TrainingConfig, dump
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training import hlo
from phased_ift_jax.training import topology as topologies
from phased_ift_jax.training.hlo import ARRAY, WIDTHS, collectives
from phased_ift_jax.training.step import Trainer
from phased_ift_jax.training.survey import survey

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install 'jax[tpu]'")
specification = importlib.util.spec_from_file_location("tpu_memory", ROOT / "benchmarks/tpu_memory.py")
tpu_memory = importlib.util.module_from_spec(specification)
sys.modules["tpu_memory"] = tpu_memory
specification.loader.exec_module(tpu_memory)
CASES = {f"{case.config} {case.topology} x{case.slices} {case.rows}x{case.length}": case for case in tpu_memory.CASES}

# large enough that every weight is worth an exchange of its own, small enough to be compiled in half a minute
SMALL = DecoderConfig(8192, 1024, 2816, 6, 8, 4, 128, sliding_window=1024)
ROWS, LENGTH = 32, 2048  # of a step: 4,096 tokens a chip


def exchanged(function, *shapes: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """By kind: how often, and the bytes that come into each device."""
    text = jax.jit(function).lower(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).compile().as_text()
    found: dict[str, tuple[int, int]] = {}
    for one in collectives(text, 8):
        times, size = found.get(one.kind, (0, 0))
        found[one.kind] = (times + one.times, size + one.times * one.bytes)
    return found


def test_exchanges_in_loops_are_counted_as_often_as_they_run():
    """Each kind in a loop of 5 inside one of 3, and one outside, against what a ring must move."""
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))

    def once(x):
        gathered = jax.lax.all_gather(x, "fsdp", tiled=True)  # 8 x 1024 floats
        summed = jax.lax.psum(jnp.sin(gathered), "fsdp")
        turned = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 8) for i in range(8)])
        return jax.lax.all_to_all(turned + summed[: x.shape[0]], "fsdp", 0, 0, tiled=True)

    def body(x):
        def inner(carry, _):
            return once(carry), None

        def outer(carry, _):
            return jax.lax.scan(inner, carry, None, length=5)[0], None

        return once(jax.lax.scan(outer, x, None, length=3)[0])

    found = exchanged(jax.shard_map(body, mesh=mesh, in_specs=PartitionSpec("fsdp"), out_specs=PartitionSpec("fsdp"), check_vma=False), (8 * 1024,))
    part, whole = 4 * 1024, 4 * 8 * 1024
    assert found["all-gather"] == (16, 16 * whole * 7 // 8)
    assert found["all-reduce"] == (16, 16 * 2 * whole * 7 // 8)
    assert found["collective-permute"] == (16, 16 * part)
    assert found["all-to-all"] == (16, 16 * part * 7 // 8)


# as HLO writes who exchanges with whom, and the groups that this means
GROUPS = [
    ("replica_groups={{0,1},{2,3}}", [[0, 1], [2, 3]]),
    ("replica_groups={}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
    ("replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=2], device_ids=([2,2]T(1,0)) {'axis_1'}", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
]


@pytest.mark.parametrize(("written", "meant"), GROUPS)
def test_who_exchanges_with_whom(written, meant):
    assert hlo._groups(f"  %x = f32[8]{{0}} all-gather(%y), channel_id=1, {written}, dimensions={{0}}", 8) == meant


def test_an_exchange_that_is_not_understood_is_no_small_one():
    with pytest.raises(Failure, match="an exchange in a way that is not known here"):
        collectives("HloModule x, num_partitions=8\n\nENTRY %main (p: f32[8]) -> f32[8] {\n  ROOT %x = f32[8]{0} all-reduce(%p), replica_groups=new<8>\n}\n", 8)


def test_a_sum_that_leaves_each_its_part_is_a_reduce_scatter():
    """libtpu fuses an all-reduce with the slice taken of it: half the bytes of an all-reduce come in."""
    fused = "%all-reduce-scatter.1 (p: f32[1024]) -> f32[128] {\n  %s = f32[1024]{0} all-reduce(%p), replica_groups={}, to_apply=%add\n}\n"
    entry = "ENTRY %main (p: f32[1024]) -> f32[128] {\n  ROOT %x = f32[128]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1\n}\n"
    [one] = collectives(f"HloModule x, num_partitions=8\n\n{fused}\n{entry}", 8)
    assert (one.kind, one.bytes, one.largest, one.group) == ("reduce-scatter", 4096 * 7 // 8, 4096, 8)


@needs_libtpu
def test_of_a_mesh_of_two_axes_every_exchange_is_understood():
    """Of data 4 x fsdp 4 each gradient is added up along both, and no exchange is left with a group of one."""
    topology = topologies.topology_of("v5e:4x4")
    trainer = Trainer(dataclasses.replace(SMALL, num_layers=2), TrainingConfig(), make_mesh(MeshConfig(data=4, fsdp=4), topology.devices), dtype="bfloat16")
    step = topologies.compile_shape(trainer, topology, 16, 512)
    assert {one.group for one in step.exchanges} <= {2, 4, 16}  # pairs are the steps of a ring
    layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.shapes.params["layers"]) if len(leaf.shape) > 2)
    summed = sum(one.times * one.bytes for one in step.exchanges if one.kind in ("reduce-scatter", "all-reduce", "collective-permute"))
    assert summed >= 2 * layers * (3 / 4 + 2 * 3 / 4 / 4)  # over fsdp into shards, and those over data


@functools.cache
def small_step(**training: str) -> tuple[Trainer, topologies.Compiled]:
    topology = topologies.topology_of("v5e:4x4")
    mesh = make_mesh(MeshConfig(), topology.devices)
    trainer = Trainer(SMALL, TrainingConfig(**training), mesh, dtype="bfloat16", gradient_checkpointing="full")
    return trainer, topologies.compile_shape(trainer, topology, ROWS, LENGTH)


def sizes(text: str) -> set[tuple[int, tuple[int, ...]]]:
    """(bytes, dims) of every array that the program names."""
    found = {(dtype, dims) for dtype, dims in ARRAY.findall(text) if dtype in WIDTHS}
    shapes = {(dtype, tuple(int(dim) for dim in dims.split(",") if dim)) for dtype, dims in found}
    return {(WIDTHS[dtype] * math.prod(dims), dims) for dtype, dims in shapes}


@needs_libtpu
def test_no_chip_ever_holds_the_weights_of_all_layers():
    """Not of one matrix of all layers: the largest array of a chip is smaller than a whole stack, and no exchange brings more than a layer's."""
    trainer, step = small_step()
    layers = trainer.shapes.params["layers"]
    stacks = sorted({2 * math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2})
    largest_layer = max(4 * math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(layers))
    head = 4 * SMALL.vocab_size * SMALL.hidden_size
    assert step.fits
    assert max(one.largest for one in step.exchanges) <= max(largest_layer, head)
    gathered = [one for one in step.exchanges if one.kind == "all-gather"]
    assert {one.largest for one in gathered} & set(stacks) == set()
    whole = {tuple(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2}
    assert not {dims for _, dims in sizes(step.text)} & whole
    # every layer's weights come together twice, forward and backward, in bfloat16, and the head once
    weights = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(layers) if len(leaf.shape) > 2)
    expected = (2 * 2 * weights + 2 * SMALL.vocab_size * SMALL.hidden_size) * 15 / 16
    assert sum(one.times * one.bytes for one in gathered) == pytest.approx(expected, rel=0.02)


@needs_libtpu
def test_gradients_are_added_up_where_they_lie():
    """As much comes in as a reduce-scatter of every layer's gradient must bring, and nothing larger than norms and scalars by all-reduce."""
    trainer, step = small_step()
    layers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.shapes.params["layers"]) if len(leaf.shape) > 2)
    scattered = sum(one.times * one.bytes for one in step.exchanges if one.kind in ("reduce-scatter", "collective-permute"))
    assert scattered >= 2 * layers * 15 / 16
    norms = 4 * SMALL.hidden_size * (2 * SMALL.num_layers + 1)
    assert sum(one.times * one.bytes for one in step.exchanges if one.kind == "all-reduce") <= 2 * norms + 4096


@needs_libtpu
def test_the_logits_of_a_batch_never_exist():
    """A chip has 4,096 tokens; no array over the vocabulary has more than the 1,024 of a chunk."""
    _, step = small_step()
    over_vocabulary = [math.prod(dims) // SMALL.vocab_size for _, dims in sizes(step.text) if SMALL.vocab_size in dims and len(dims) > 1]
    over_vocabulary = [positions for positions in over_vocabulary if positions not in (SMALL.hidden_size, SMALL.hidden_size // 16)]  # the head, whole and in shards
    assert over_vocabulary
    assert max(over_vocabulary) <= 1024


@needs_libtpu
def test_the_state_is_donated_and_taken_over():
    """Every array of weights and moments lies where the one before it lay."""
    trainer, step = small_step()
    aliased = re.search(r"input_output_alias=\{(.*?)\}, entry_computation_layout", step.text.splitlines()[0])[1]
    leaves = len(jax.tree.leaves(trainer.shapes))
    pairs = re.findall(r"\{(\d+)\}: \((\d+), \{\}, \w+-alias\)", aliased)
    assert [int(output) for output, _ in pairs] == list(range(leaves))


@needs_libtpu
def test_a_first_moment_in_bfloat16_saves_what_it_should():
    trainer, step = small_step()
    _, lean = small_step(adam_mu_dtype="bfloat16")
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(trainer.shapes.params))
    assert step.state - lean.state == pytest.approx(2 * count / 16, rel=0.01)
    assert step.peak - lean.peak == pytest.approx(2 * count / 16, rel=0.1)


@needs_libtpu
def test_slices_are_the_outermost_axis():
    """A mesh over two slices: only `data` crosses the network between them, and a mesh that would cross otherwise is refused."""
    topology = topologies.topology_of("v5e:4x4", 2)
    mesh = make_mesh(MeshConfig(data=2), topology.devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {1}]
    mesh = make_mesh(MeshConfig(data=4, fsdp=-1, tensor=2), topology.devices)
    assert [{device.slice_index for device in part.flat} for part in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match=r"mesh\.data: 1 copies of the model do not go over 2 slices.*set mesh.data 2"):
        make_mesh(MeshConfig(), topology.devices)


@pytest.mark.parametrize(
    ("name", "slices", "refusal"),
    [
        ("v5e", 1, "is not CHIP:SHAPE"),
        ("v9:4x4", 1, "chips are v4, v5e, v5p, v6e"),
        ("v5e:0x4", 1, "is not CHIP:SHAPE"),
        ("v5e:4x4x4", 1, "slices of v5e have 2 axes, and 4x4x4 has 3"),
        ("v5p:2x2", 1, "slices of v5p have 3 axes"),
        ("v5e:4x4", 0, "--num_slices: 0 is less than 1"),
        pytest.param("v5e:5x4", 1, "libtpu knows no v5e:5x4", marks=needs_libtpu),
    ],
)
def test_a_topology_that_is_none_is_refused(name, slices, refusal):
    with pytest.raises(UserError, match=refusal):
        topologies.topology_of(name, slices)


@needs_libtpu
def test_chips_of_every_kind():
    """A device is a chip: two cores of a v4 are one; and each generation is found in the table by JAX's name of it."""
    for name, count in (("v4:2x2x2", 8), ("v5e:1x1", 1), ("v5e:2x4", 8), ("v5p:2x2x4", 16), ("v6e:4x4", 16)):
        topology = topologies.topology_of(name)
        assert len(topology.devices) == count
        assert topology.chip.links(topology.shape) > 0
        assert chips.peak_flops(topology.devices[0].device_kind, count) == count * topology.chip.flops


@needs_libtpu
def test_what_does_not_fit_is_said_before_anything_is_compiled_in_vain(rows, tmp_path):  # noqa: F811
    """Weights and moments that are too large for the slice: no setting is tried that cannot help, and the line says what would do."""
    run = survey(make_config(rows, tmp_path / "run"), {"data": 1, "fsdp": 4, "tensor": 1})
    large = dataclasses.replace(run, plan=dataclasses.replace(run.plan, model=DecoderConfig(32000, 8192, 28672, 80, 64, 8, 128)))
    lines: list[str] = []
    assert topologies.what_fits(large, topologies.topology_of("v5e:2x2"), lines.append) is None
    assert len(lines) >= 5
    assert all("weights, moments and gradients alone take" in line for line in lines)


def test_a_refusal_for_want_of_memory_is_understood():
    """In both ways in which libtpu says it; any other refusal is none of memory."""
    of_all = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.50G of 15.75G hbm. Exceeded hbm capacity by 1.75G."
    of_temporaries = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (28.84G) exceeds available HBM (15.75G)."
    assert topologies.memory_needed(of_all, 5) == int(17.5 * 2**30)
    assert topologies.memory_needed(of_temporaries, 5) == int(28.84 * 2**30) + 5
    assert topologies.memory_needed("INTERNAL: Mosaic failed to compile TPU kernel", 5) is None


@needs_libtpu
def test_rows_too_long_for_a_chip_are_told_so():
    """libtpu's own refusal, of a step whose temporaries alone are too many."""
    topology = topologies.topology_of("v5e:2x2")
    trainer = Trainer(SMALL, TrainingConfig(), make_mesh(MeshConfig(), topology.devices), dtype="bfloat16")
    found = topologies.compile_shape(trainer, topology, 256, 2048)
    assert not found.fits
    assert found.peak > topology.chip.memory


def planned(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "phased_ift_jax.plan", *map(str, words)], capture_output=True, text=True, timeout=900, cwd=ROOT, check=False)


@needs_libtpu
def test_the_plan_for_a_topology(rows, tmp_path):  # noqa: F811
    """From the command line: the step at the run's own longest rows, its bytes, what it sends, a roofline and a price; as JSON."""
    path = tmp_path / "run.yaml"
    path.write_text(dump(make_config(rows, tmp_path / "run")))
    done = planned(path, "--topology", "v5e:2x2", "--usd_per_chip_hour", "1.2", "--json")
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if not line.startswith("compiling the step")] == []
    [run] = json.loads(done.stdout)["runs"]
    told, estimate = run["topology"], run["topology"]["estimate"]
    assert run["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    assert told["step"]["length"] == max(length for shapes in run["shapes"] for length in shapes["lengths"])
    assert (told["chips"], told["fits"], told["would_fit"]) == (4, True, None)
    assert 0 < told["state_bytes_per_chip"] < told["peak_bytes"] < told["memory_bytes"]
    assert {one["kind"] for one in told["collectives"]} >= {"all-gather"}
    assert set(estimate["step_seconds"]) == {"compute", "memory", "links", "network"}
    assert estimate["step_seconds"]["network"] == 0
    assert 0 < estimate["mfu"] < 1
    assert estimate["usd"] == pytest.approx(estimate["run_seconds"] / 3600 * 4 * 1.2)
    assert estimate["expected_seconds"] == [estimate["run_seconds"]] * 2  # no guess is below the bound, and the links bind a toy
    assert any("fewer chips would cost less" in finding["text"] for finding in run["findings"])  # a toy on four chips


@needs_libtpu
def test_the_time_to_expect_is_that_at_a_usual_mfu(rows, tmp_path):  # noqa: F811
    """All FLOPs of the run at that share of the chips' peak, wherever the bound is below; more of them take longer than fewer."""
    run, topology = survey(make_config(rows, tmp_path / "run"), {"data": 1, "fsdp": 4, "tensor": 1}), topologies.topology_of("v5e:2x2")
    large = dataclasses.replace(run, plan=dataclasses.replace(run.plan, model=DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128)))
    compiled = topologies.Compiled(rows=8, length=64, parts=1, peak=1, state=1, fits=True, seconds=0.0)  # that sends nothing
    free = dataclasses.replace(topology.chip, bandwidth=float("inf"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(topologies.TPUS, "v5e", free)
        told = topologies.estimate(large, topology, compiled, None)
    flops = sum(phase.flops(large.plan.model) for phase in large.plan.phases)
    assert told["expected_seconds"] == pytest.approx([flops / (share * 4 * free.flops) for share in (0.5, 0.3)])
    assert told["run_seconds"] < told["expected_seconds"][0]
    soon, late = (f"{seconds / 60:,.1f}" for seconds in told["expected_seconds"])
    shown = topologies.describe(topologies.facts(large, topology, compiled) | {"estimate": told})
    assert f"  expect  {soon} to {late} minutes, a guess: 50% to 30% MFU if the bound allows\n" in shown
    assert "step of 8 sequences of 64 tokens" in shown


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("--topology", "v5e:4x4", "--devices", 4), "--devices: the topology says how many"),
        (("--num_slices", 2), "--num_slices and --usd_per_chip_hour go with --topology"),
        (("--usd_per_chip_hour", 1.0), "--num_slices and --usd_per_chip_hour go with --topology"),
        (("--topology", "v5e:4x4", "--usd_per_chip_hour", -1.0), "--usd_per_chip_hour: -1.0 is no price"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(rows, tmp_path, words, refusal):  # noqa: F811
    path = tmp_path / "run.yaml"
    path.write_text(dump(make_config(rows, tmp_path / "run")))
    if words[0] == "--topology":
        pytest.importorskip("libtpu")
    with pytest.raises(UserError, match=refusal):
        plan_verb.main([str(path), *map(str, words)])


def test_links_of_a_slice():
    """An axis brings data from both sides where it is a ring: on a v5e only the 16 chips of a whole row, on a v5p any multiple of 4."""
    v5e, v5p = chips.CHIPS["v5e"], chips.CHIPS["v5p"]
    assert v5e.links((16, 16)) == 2 * v5e.links((4, 4)) == 4 * v5e.link
    assert v5p.links((4, 4, 4)) == 2 * v5p.links((2, 2, 2)) == 6 * v5p.link
    assert v5p.links((2, 2, 1)) == 2 * v5p.link


def test_recomputation_is_counted():
    """What each policy computes again is what it does not keep: nothing, attention, the layers' matmuls, both."""
    own, none = topologies.step_flops(SMALL, 4, 512, "none")
    assert own == none
    again = {policy: topologies.step_flops(SMALL, 4, 512, policy)[1] - own for policy in topologies.POLICIES}
    assert again["none"] == 0 < again["save_dots"] < again["save_attention"] < again["full"]
    assert again["full"] == again["save_dots"] + again["save_attention"]
    layers = SMALL.matmul_parameters - SMALL.vocab_size * SMALL.hidden_size
    assert again["save_attention"] == 2 * layers * 4 * 512
    pairs = 512 * 513 // 2
    assert again["save_dots"] == 4 * pairs * 4 * SMALL.num_layers * SMALL.num_heads * SMALL.head_dim


IN_CI = {"llama2_7b v5e:4x4 x1 16x2048", "llama2_70b v5p:4x4x4 x1 64x4096", "llama2_7b v5e:4x4 x2 32x2048"}
assert set(CASES) >= IN_CI


@needs_libtpu
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.aot) for name in CASES])
def test_shipped_configs_fit_their_slices(name, measured):
    """The real step of each, at the rows of benchmarks/tpu_memory.py, compiled for its topology: within the bound that stands there."""
    found = tpu_memory.compiled(CASES[name])
    measured(f"{name}: peak, GiB a chip (<= {CASES[name].bound})", found.peak / 2**30)
    assert found.fits
    assert found.peak / 2**30 <= CASES[name].bound
    sizes = tpu_memory.MODELS[CASES[name].model]  # a whole stack is never brought together: the smallest is that of the keys or values
    width = sizes["hidden_size"] // sizes["num_attention_heads"] * sizes["num_key_value_heads"]
    stack = 2 * sizes["num_hidden_layers"] * sizes["hidden_size"] * width
    layers = [one for one in found.exchanges if str(sizes["vocab_size"]) not in one.shape]
    # on a torus, libtpu 0.0.50 adds up zeros and shards instead of gathering
    assert max(one.largest for one in [one for one in layers if one.kind == "all-gather"] or layers) < stack


@needs_libtpu
@pytest.mark.slow
def test_what_would_fit_is_tried(shared_data, tmp_path):
    """Llama-2-7B with rows that keep too much on a v5e 4x4: the next policy that fits is found, by compiling it, and told with exit code 2."""
    (tmp_path / "config.json").write_text(json.dumps(dict(tpu_memory.MODELS["llama2_7b"]) | {"bos_token_id": 1, "eos_token_id": 2}))
    (tmp_path / "tokenizer.model").symlink_to(shared_data / "llama2/tokenizer.model")
    data = ("--data.path", shared_data / "phasedsft/en-alpaca52k-stage3.jsonl", "--curriculum.order", "[3]", "--training.global_batch_size", "1024")
    done = planned(
        *(ROOT / "configs/llama2_7b.yaml", "--model.model_name_or_path", tmp_path, *data, "--model.gradient_checkpointing", "save_dots", "--topology", "v5e:4x4", "--json")
    )
    assert done.returncode == 2, done.stderr
    [run] = json.loads(done.stdout)["runs"]
    would = run["topology"]["would_fit"]
    assert not run["topology"]["fits"]
    assert would["peak_bytes"] <= run["topology"]["memory_bytes"]
    assert set(would["changes"]) & {"model.gradient_checkpointing", "training.gradient_accumulation_steps"}
    assert "would do" in done.stderr
    assert Path(tmp_path / "runs").exists() is False

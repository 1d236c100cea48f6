"""A run on TPUs that are not here: its train step compiled for their topology, with its bytes, exchanges and a roofline.

libtpu compiles for a slice without one. What it says of memory is what it will allocate; times are estimates from published rates.
"""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phased_ift_jax import cli
from phased_ift_jax.chips import CHIPS, GIB, Chip
from phased_ift_jax.config import changed
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.sharding import batch_rows, make_mesh, mesh_sizes
from phased_ift_jax.training.doctor import Finding
from phased_ift_jax.training.hlo import Collective, collectives
from phased_ift_jax.training.plan import attended_pairs, make_plan
from phased_ift_jax.training.step import Trainer, differentiated, trainer_of
from phased_ift_jax.training.survey import Survey
from phased_ift_jax.xla_flags import flags_for

TPUS = {name: chip for name, chip in CHIPS.items() if chip.axes}
USUAL_MFU = (0.5, 0.3)  # short packed examples do less well than the 57 to 65 % that MaxText publishes for Llama-2-70B at full length
POLICIES = ("none", "save_dots", "save_attention", "full")  # each keeps less than the one before


@dataclass(frozen=True, eq=False)
class Topology:
    """So many slices of TPU chips, each of this shape."""

    name: str  # of the chip
    shape: tuple[int, ...]
    slices: int
    devices: list[jax.Device]

    @property
    def chip(self) -> Chip:
        return TPUS[self.name]

    def __str__(self) -> str:
        return f"{self.name}:{'x'.join(map(str, self.shape))}" + (f" x {self.slices} slices" if self.slices > 1 else "")


@dataclass(frozen=True)
class Compiled:
    """A train step for the rows of one shape, and what XLA made of it."""

    rows: int
    length: int
    parts: int
    peak: int  # bytes of a chip's memory
    state: int  # bytes of it that hold weights and moments
    fits: bool
    seconds: float  # that compiling took
    exchanges: tuple[Collective, ...] = ()  # none where it does not fit
    text: str = field(default="", repr=False)  # its HLO


def topology_of(text: str, slices: int = 1) -> Topology:
    """The topology of a name such as v5e:4x4. From then on this process has CPUs only, whatever the machine has.

    Raises:
        UserError: no such chip, shape or number of slices, or no libtpu.
    """
    name, _, sizes = text.lower().partition(":")
    if name not in TPUS or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes):
        raise UserError(f"--topology: {text!r} is not CHIP:SHAPE, such as v5e:4x4 (gcloud's v5litepod-16) or v5p:2x2x2 (its v5p-16); chips are {', '.join(TPUS)}")
    shape = tuple(map(int, sizes.split("x")))
    if len(shape) != TPUS[name].axes:
        raise UserError(f"--topology: slices of {name} have {TPUS[name].axes} axes, and {sizes} has {len(shape)}; {'2x2x4' if TPUS[name].axes == 3 else '4x4'} would do")
    if slices < 1:
        raise UserError(f"--num_slices: {slices} is less than 1")
    if find_spec("libtpu") is None:
        raise UserError("--topology: compiling for a TPU needs libtpu; pip install 'jax[tpu]', which works on any Linux machine")
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": f"{name}-{np.prod(shape)}"}
    os.environ.update(quiet | {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1"})  # it takes no chip that another process could want
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental.topologies import get_topology_desc

    more: dict[str, Any] = ({"num_slices": slices} if slices > 1 else {}) | ({"chip_config_name": "megacore"} if name == "v4" else {})
    more |= {"chips_per_host_bounds": (1, 1, 1)} if max(shape) == 1 else {}  # else libtpu takes hosts for whole
    try:
        devices = get_topology_desc(platform="tpu", topology_name=f"{name}:{sizes}", **more).devices
    except jax.errors.JaxRuntimeError as error:
        such = "2x2x2, 2x2x4 or 4x4x4" if TPUS[name].axes == 3 else "1x1, 2x2, 2x4 or 4x4"
        raise UserError(f"--topology: libtpu knows no {text}: {str(error).splitlines()[0]}; slices are such as {such}") from None
    return Topology(name, shape, slices, list(devices))


def examine(run: Survey, topology: Topology, usd_per_chip_hour: float | None, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Finding]]:
    """The facts of a run on a topology, for `plan`, and what does not do there. `say` is told what is being compiled."""
    say(f"compiling the step of {run.config.output_dir} for {topology}: a minute or two")
    compiled = compile_step(run, topology)
    told = facts(run, topology, compiled, usd_per_chip_hour) | {"would_fit": None}
    if not compiled.fits:
        text = f"the step needs {'' if compiled.seconds else 'at least '}{_gib(compiled.peak)} of a {topology.name} chip's {_gib(topology.chip.memory)}"
        say(f"{text}; trying what would fit, one compilation each")
        found = what_fits(run, topology, say)
        if found is None:
            return told, [Finding(True, f"{text}; nothing that was tried makes it fit: take more chips, or such with more memory")]
        changes, fitting = found
        told["would_fit"] = {"changes": changes, "peak_bytes": fitting.peak}
        return told, [Finding(True, f"{text}; {' '.join(f'--{key} {value}' for key, value in changes.items())} would do, with {_gib(fitting.peak)}")]
    estimate = told["estimate"]
    tokens, enough = estimate["tokens_per_chip"], estimate["tokens_per_chip_compute_bound"]
    text = f"a chip gets {tokens:,.0f} tokens each time its weights come together; below about {enough:,.0f} it waits for them: fewer chips would cost less"
    return told, [Finding(False, text)] if tokens < enough else []


def compile_step(run: Survey, topology: Topology) -> Compiled:
    """Compile the run's step of its longest rows (raises as `compile_shape` does), unless weights, moments and gradients alone are too large."""
    if (least := state_and_gradients(run, topology)) > topology.chip.memory:  # nothing to compile for
        return Compiled(0, 0, 1, least, least, False, 0.0)
    longest = max(run.plan.phases, key=lambda phase: phase.shapes.lengths[-1] * phase.shapes.rows / phase.training.gradient_accumulation_steps)
    trainer = trainer_of(run.config.model, run.plan.model, longest.training, make_mesh(run.config.mesh, topology.devices))
    return compile_shape(trainer, topology, longest.shapes.rows, longest.shapes.lengths[-1], longest.training.gradient_accumulation_steps)


def compile_shape(trainer: Trainer, topology: Topology, rows: int, length: int, parts: int = 1) -> Compiled:
    """Compile a step of `rows` rows of `length` tokens, computed in so many parts, with the flags that `train` sets on such chips.

    Raises:
        Failure: libtpu cannot compile it, for another reason than memory.
    """
    started = time.monotonic()
    state = sum(_shard_bytes(leaf, sharding) for leaf, sharding in zip(jax.tree.leaves(trainer.shapes), jax.tree.leaves(trainer.shardings), strict=True))
    try:
        program = trainer.lower_step(rows, length, parts).compile(compiler_options={**flags_for(topology.name)})
    except jax.errors.JaxRuntimeError as error:
        needed = memory_needed(str(error), state)
        if needed is None:
            raise Failure(f"libtpu cannot compile the step for {topology}: {' '.join(str(error).split())[:600]}") from error
        return Compiled(rows, length, parts, needed, state, False, time.monotonic() - started)
    seconds, memory, text = time.monotonic() - started, program.memory_analysis(), program.as_text()
    assert memory is not None
    assert text is not None
    return Compiled(rows, length, parts, memory.peak_memory_in_bytes, state, True, seconds, tuple(collectives(text, trainer.mesh.size // topology.slices)), text)


def memory_needed(refusal: str, state: int) -> int | None:
    """Bytes of a chip that libtpu's refusal to compile says are needed, or None where it refuses for another reason than memory."""
    if used := re.search(r"Used ([\d.]+)([KMGT]) of [\d.]+[KMGT] hbm", refusal):
        return int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2])))
    if used := re.search(r"HLO temporaries \(([\d.]+)([KMGT])\) exceeds available HBM", refusal):  # what is handed over comes on top
        return int(float(used[1]) * 1024 ** (1 + "KMGT".index(used[2]))) + state
    return None


def _shard_bytes(leaf: jax.ShapeDtypeStruct, sharding: jax.sharding.Sharding) -> int:
    return int(np.prod(sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize


def what_fits(run: Survey, topology: Topology, say: Callable[[str], None]) -> tuple[dict[str, Any], Compiled] | None:
    """The first of some changes, each added to those before, with which the step fits: tried, one compilation each. None where none does."""
    given: dict[str, Any] = {}
    for change in _changes(run):
        candidate = changed(run.config, given | dict(change))
        try:
            sizes = mesh_sizes(candidate.mesh, len(topology.devices))
            other = dataclasses.replace(run, config=candidate, mesh_sizes=sizes, plan=make_plan(candidate, run.dataset, run.plan.model, batch_rows(sizes), run.platform))
        except UserError:
            continue
        given |= change
        flags = " ".join(f"--{key} {value}" for key, value in given.items())
        found = compile_step(other, topology)
        say(f"{flags}: {'' if found.seconds else 'weights, moments and gradients alone take '}{_gib(found.peak)} a chip")
        if found.fits:
            return given, found
    return None


def state_and_gradients(run: Survey, topology: Topology) -> int:
    """Bytes that a chip holds between the backward pass and the update, whatever the rows."""
    trainer = trainer_of(run.config.model, run.plan.model, run.config.training, make_mesh(run.config.mesh, topology.devices))
    training = run.config.training
    dtype = training.gradient_dtype if training.gradient_accumulation_steps == 1 else None  # the sum of several parts is wide
    gradients = jax.eval_shape(partial(differentiated, gradient_dtype=dtype), trainer.shapes.params)
    held = [(trainer.shapes, trainer.shardings), (gradients, trainer.shardings.params)]
    return sum(_shard_bytes(leaf, sharding) for shapes, shardings in held for leaf, sharding in zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True))


def _changes(run: Survey) -> Iterator[Mapping[str, Any]]:
    """What saves memory, what costs least first."""
    model, training, sizes = run.config.model, run.config.training, run.mesh_sizes
    for policy in POLICIES[POLICIES.index(model.gradient_checkpointing) + 1 :]:
        yield {"model.gradient_checkpointing": policy}
    if training.optim == "adamw" and training.adam_mu_dtype is None:
        yield {"training.adam_mu_dtype": "bfloat16"}
    for factor in (2, 4, 8):
        yield {"training.gradient_accumulation_steps": training.gradient_accumulation_steps * factor}
    for factor in (2, 4):
        yield {"mesh.data": sizes["data"], "mesh.fsdp": -1, "mesh.tensor": sizes["tensor"] * factor}
    if training.gradient_dtype is None and model.dtype == "bfloat16":
        yield {"training.gradient_accumulation_steps": 1, "training.gradient_dtype": "bfloat16"}  # the sum of parts would be wide


def step_flops(model: DecoderConfig, rows: int, length: int, policy: str) -> tuple[float, float]:
    """FLOPs of a step of full rows, attention counted causally: the model's own, and with what the backward pass computes again."""
    positions, pairs = rows * length, rows * int(attended_pairs(np.array([length]), model.sliding_window)[0])
    layers = 2.0 * (model.matmul_parameters - model.vocab_size * model.hidden_size) * positions
    attention = 4.0 * model.num_layers * model.num_heads * model.head_dim * pairs
    again = {"none": 0.0, "save_dots": attention, "save_attention": layers, "full": layers + attention}[policy]
    own = model.train_flops(positions, pairs)
    return own, own + again


def estimate(run: Survey, topology: Topology, compiled: Compiled, usd_per_chip_hour: float | None) -> dict[str, Any]:
    """A roofline of the run: each step as long as the slowest of compute, memory and links would take at published peak rates, were the
    others free. A bound from below, not a prediction; what to expect beside it is a guess from what trainers commonly reach (`USUAL_MFU`).
    """
    chip, model, policy = topology.chip, run.plan.model, run.config.model.gradient_checkpointing
    chips, tensor, links = len(topology.devices), run.mesh_sizes["tensor"], chip.links(topology.shape)
    moved = {crosses: sum(one.bytes * one.times for one in compiled.exchanges if one.slices == crosses) for crosses in (False, True)}
    width = jnp.dtype(run.config.model.dtype).itemsize
    # state and gradients are read and written; each layer's weights written as they are gathered and read by each matmul, forward, again and backward
    streamed = 2.0 * state_and_gradients(run, topology) + compiled.parts * 6.0 * width * model.matmul_parameters / tensor

    def seconds(rows: int, length: int) -> dict[str, float]:
        kept = 2.0 * width * model.num_layers * model.hidden_size * rows * length / chips  # activations saved for the backward pass
        return {
            "compute": step_flops(model, rows, length, policy)[1] / (chips * chip.flops),
            "memory": (streamed + kept) / chip.bandwidth,
            "links": moved[False] / links,
            "network": moved[True] / chip.network,
        }

    per_step = seconds(compiled.rows, compiled.length)
    total = own = 0.0
    for phase in run.plan.phases:
        lengths, counts = np.unique(phase.row_lengths, return_counts=True)
        for length, count in zip(lengths.tolist(), counts.tolist(), strict=True):
            total += count * max(seconds(phase.shapes.rows, length).values())
        own += phase.flops(model)
    return {
        "step_seconds": per_step,
        "bound_by": max(per_step, key=lambda name: per_step[name]),
        "mfu": step_flops(model, compiled.rows, compiled.length, policy)[0] / (max(per_step.values()) * chips * chip.flops),
        "run_seconds": total,
        "run_mfu": own / (total * chips * chip.flops),
        "expected_seconds": [max(total, own / (mfu * chips * chip.flops)) for mfu in USUAL_MFU],
        "usd": None if usd_per_chip_hour is None else total / 3600 * chips * usd_per_chip_hour,
        "tokens_per_chip": compiled.rows * compiled.length / chips / compiled.parts,
        "tokens_per_chip_compute_bound": chip.flops / links,
    }


def facts(run: Survey, topology: Topology, compiled: Compiled, usd_per_chip_hour: float | None = None) -> dict[str, Any]:
    """What `plan` tells of a topology, for machines: docs/formats.md says what each is."""
    sums: dict[tuple[str, bool], dict[str, Any]] = {}
    for one in compiled.exchanges:
        entry = sums.setdefault((one.kind, one.slices), {"kind": one.kind, "between_slices": one.slices, "count": 0, "bytes": 0, "largest": 0})
        entry["count"] += one.times
        entry["bytes"] += one.bytes * one.times
        entry["largest"] = max(entry["largest"], one.largest)
    return {
        "topology": str(topology),
        "chips": len(topology.devices),
        "memory_bytes": int(topology.chip.memory),
        "step": {"rows": compiled.rows, "length": compiled.length, "parts": compiled.parts},
        "peak_bytes": compiled.peak,
        "state_bytes_per_chip": compiled.state,
        "fits": compiled.fits,
        "compile_seconds": round(compiled.seconds, 1),
        "collectives": sorted(sums.values(), key=lambda entry: -entry["bytes"]),
        "estimate": estimate(run, topology, compiled, usd_per_chip_hour) if compiled.fits else None,
    }


def describe(told: dict[str, Any]) -> str:
    """The facts of a topology, for people."""
    step, estimate = told["step"], told["estimate"]
    parts = f" in {step['parts']} parts" if step["parts"] > 1 else ""
    if not step["rows"]:
        return f"{told['topology']}: {told['chips']} chips of {_gib(told['memory_bytes'])}; weights, moments and gradients alone take {_gib(told['peak_bytes'])} of each"
    lines = [
        f"{told['topology']}: {told['chips']} chips; step of {step['rows']} sequences of {step['length']} tokens{parts} compiled in {told['compile_seconds']:.0f} s",
        f"memory  {_gib(told['peak_bytes'])} of {_gib(told['memory_bytes'])} a chip, {_gib(told['state_bytes_per_chip'])} of it weights and moments: "
        + ("fits" if told["fits"] else "DOES NOT FIT"),
    ]
    if estimate is None:
        return "\n".join(lines)
    rows = [["sent a step", "times", "bytes into a chip", "largest"]]
    for one in told["collectives"]:
        kind = one["kind"] + (", between slices" if one["between_slices"] else "")
        rows.append([kind, f"{one['count']:,}", cli.size(one["bytes"]), cli.size(one["largest"])])
    seconds = ", ".join(f"{name} {value:.3g} s" for name, value in estimate["step_seconds"].items() if value)
    cost = "" if estimate["usd"] is None else f" and ${estimate['usd']:,.2f}"
    lines += [
        cli.table(rows),
        "estimate: a roofline from published peak rates, a bound and no prediction; start, evaluation and saving not counted",
        f"  a step  {seconds}; bound by {estimate['bound_by']}, MFU at most {estimate['mfu']:.0%}",
        f"  the run at least {estimate['run_seconds'] / 60:,.1f} minutes{cost}; its real tokens at {estimate['run_mfu']:.0%} MFU at most",
        f"  expect  {' to '.join(f'{one / 60:,.1f}' for one in estimate['expected_seconds'])} minutes, a guess: {USUAL_MFU[0]:.0%} to {USUAL_MFU[1]:.0%} MFU if the bound allows",
        f"  tokens  {estimate['tokens_per_chip']:,.0f} a chip each time its weights come together; compute-bound above about {estimate['tokens_per_chip_compute_bound']:,.0f}",
    ]
    return "\n".join(lines)


def _gib(count: float) -> str:
    return f"{count / GIB:.2f} GiB"

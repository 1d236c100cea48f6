"""What a run is to be, from its config, data and tokenizer alone: no weights are read, no device is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from phased_ift_jax import cli
from phased_ift_jax.config import RunConfig
from phased_ift_jax.data.dataset import Dataset, prepare
from phased_ift_jax.data.tokenization import load_tokenizer
from phased_ift_jax.models.attention import implementation
from phased_ift_jax.models.decoder import parameter_shapes
from phased_ift_jax.models.hf_folder import Folder, open_folder
from phased_ift_jax.sharding import batch_rows
from phased_ift_jax.training.plan import PhasePlan, Plan, make_plan
from phased_ift_jax.training.step import differentiated


@dataclass(frozen=True, eq=False)
class Survey:
    """A run's config and what is made of it."""

    config: RunConfig
    folder: Folder
    tokenizer: Any
    dataset: Dataset
    plan: Plan
    mesh_sizes: Mapping[str, int]  # of the axes data, fsdp, tensor
    platform: str | None

    @property
    def attention(self) -> str:
        """The attention kernel that is used, and why where it is not the one meant; as configured where the platform is not known."""
        model = self.config.model
        if self.platform is None:
            return model.attn_implementation
        name, why = implementation(model.attn_implementation, self.platform, self.folder.config.head_dim, model.dtype)
        return f"{name} ({why})" if why else name


def survey(config: RunConfig, mesh_sizes: Mapping[str, int], platform: str | None = None) -> Survey:
    """Read model sizes, tokenizer and data, and plan the run for a mesh of these sizes; `platform`: "tpu", "gpu" or "cpu", where it is known.

    Raises:
        UserError: of whatever is at fault in them.
    """
    folder = open_folder(config.model.model_name_or_path, config.model.revision, weights=False)
    tokenizer = load_tokenizer(folder.path, folder.config.vocab_size)
    dataset = prepare(config.data, config.curriculum, config.seed, tokenizer)
    return Survey(config, folder, tokenizer, dataset, make_plan(config, dataset, folder.config, batch_rows(mesh_sizes), platform), mesh_sizes, platform)


def describe(run: Survey, device: str) -> str:
    """What will be trained, in tables: rows by bin, phases, batch shapes, budget, and the policy between phases."""
    data, plan, curriculum = run.dataset, run.plan, run.config.curriculum
    binless = data.rows_read - sum(count.read for count in data.counts)
    truncated, left_out = (sum(getattr(count, name) for count in data.counts) for name in ("truncated", "left_out"))
    columns = ["name", "read", "used", "truncated", "quarantined", "held_out", *["left_out"] * bool(left_out)]
    bins = [["bin", "rows", *(name.replace("_", " ") for name in columns[2:])], *([getattr(count, name) for name in columns] for count in data.counts)]
    phases = [["phase", "rows", "epochs", "steps", "tokens", "response tokens", "real tokens", "lr first", "lr peak", "lr last"]]
    for row, share in zip(plan.rows(), map(real_token_share, plan.phases), strict=True):
        rates = [f"{row[name]:.3g}" for name in ("lr_first", "lr_peak", "lr_last")]
        phases.append([row["phase"], row["rows"], row["epochs"], row["steps"], f"{row['tokens']:,}", f"{row['response_tokens']:,}", f"{share:.1%}", *rates])  # type: ignore[list-item]
    ledger = plan.ledger()
    mesh = " x ".join(f"{name} {size}" for name, size in run.mesh_sizes.items())
    lines = [
        f"model   {run.folder.name} ({run.config.model.init}), {run.config.model.dtype} over {run.config.model.param_dtype}, attention {run.attention}"
        + (", deterministic" if run.config.training.deterministic else ""),
        f"held    {_held(run.config)}; for the backward pass {KEPT[run.config.model.gradient_checkpointing]} (gradient_checkpointing {run.config.model.gradient_checkpointing})",
        f"mesh    {mesh} on {device}",
        f"data    {data.rows_read} rows read = {data.rows_read - len(data.quarantined) - truncated - left_out} used whole + {truncated} truncated + "
        + (f"{left_out} left out of the sample + " if left_out else "")
        + f"{len(data.quarantined)} quarantined"
        + "".join(f" (the first, {row.source}: {row.reason[:80]})" for row in data.quarantined[:1])
        + (f" ({binless} of them in no bin)" if binless else ""),
        "",
        cli.table(bins),
        "",
        cli.table(phases),
        "",
        *(f"batch   {s.rows} sequences of {', '.join(map(str, s.lengths))} tokens ({'examples packed into each' if s.packed else 'one example each'})" for s in plan.all_shapes),
        f"between phases: weights go on, optimizer {curriculum.optimizer_state}, schedule {'restarts' if curriculum.restarts_schedule else 'continues'}",
        f"budget  {ledger['examples']:,} examples, {ledger['response_tokens']:,} response tokens, {ledger['optimizer_steps']:,} steps, "
        f"sum of learning rates {ledger['sum_of_learning_rates']:.4g}, {ledger['flops']:.3g} FLOPs",
    ]
    if curriculum.arm == "one_off" and any(phase.overrides or phase.replay for phase in curriculum.phases or ()):
        lines.append("note    one_off trains with the settings of `training`: overrides and replay of `curriculum.phases` belong to phases")
    return "\n".join(lines)


KEPT = {"none": "all activations", "save_dots": "what the matmuls make", "save_attention": "attention's outputs and each layer's input", "full": "each layer's input"}


def _held(config: RunConfig) -> str:
    """In which dtype a device holds what it trains."""
    held, training = config.model.param_dtype, config.training
    moments = f", first moment {training.adam_mu_dtype or held}, second {held}" if training.optim == "adamw" else ""
    return f"weights {held}{moments}, gradients {training.gradient_dtype or held}" + (f" (the embedding's {held})" if training.gradient_dtype else "")


def facts(run: Survey) -> dict[str, Any]:
    """The numbers of a survey, for machines: docs/formats.md says what each is."""
    config, model = run.config, run.folder.config
    training, held = config.training, config.model.param_dtype
    params = parameter_shapes(model, jnp.dtype(held))
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    gradients = jax.tree.leaves(jax.eval_shape(partial(differentiated, gradient_dtype=training.gradient_dtype), params))
    wide, first = (jnp.dtype(dtype or held).itemsize for dtype in (None, training.adam_mu_dtype))
    weights, state = count * wide, count * (wide + (first + wide if training.optim == "adamw" else 0))
    exported = count * jnp.dtype(config.export.dtype or config.model.param_dtype).itemsize
    ends = len(run.plan.phases) * (state if config.curriculum.optimizer_state == "keep" else weights)
    exports = exported * (len(run.plan.phases) if config.export.after_each_phase else 1)
    return {
        "output_dir": config.output_dir,
        "rows": {"read": run.dataset.rows_read, "used": len(run.dataset.examples), "quarantined": len(run.dataset.quarantined)},
        "bins": [asdict(count) for count in run.dataset.counts],
        "phases": [row | {"real_token_share": share} for row, share in zip(run.plan.rows(), map(real_token_share, run.plan.phases), strict=True)],
        "shapes": [{"rows": shapes.rows, "lengths": list(shapes.lengths), "packed": shapes.packed} for shapes in run.plan.all_shapes],
        "mesh": dict(run.mesh_sizes),
        "budget": run.plan.ledger(),
        "parameters": count,
        "state_bytes": state,
        "gradient_bytes": sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in gradients),
        # one more than is kept lies there while the next is saved
        "disk_bytes": ends + exports + state * (config.checkpoint.save_total_limit + 1),
    }


def outline(run: Survey) -> dict[str, Any]:
    """A survey for plan.json: phases, from which `status` tells how much is left, and what a report compares arms by."""
    return {
        "phases": [
            {"name": plan.phase.name, "folder": plan.phase.folder, "index": plan.phase.index, "rows": len(plan.phase.rows), "steps": len(plan.steps)} for plan in run.plan.phases
        ],
        "budget": run.plan.ledger(),
        "bins": [asdict(count) for count in run.dataset.counts],
        "difficulties": {str(tenth): rows for tenth, rows in run.dataset.difficulties.items()},
    }


def real_token_share(phase: PhasePlan) -> float:
    """Share of the positions of a phase's packed rows that are no padding."""
    return phase.tokens / (phase.shapes.rows * int(phase.row_lengths.sum()))

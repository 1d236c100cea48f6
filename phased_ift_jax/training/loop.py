"""The run: phases one after another, each started from the checkpoint that ended the one before.

`prepare` reads everything and writes nothing; `train` does the rest, and goes on where an earlier call of it was stopped.
"""

from __future__ import annotations

import json
import math
import reprlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from phased_ift_jax.config import RunConfig, dump
from phased_ift_jax.data.batches import Steps, batches
from phased_ift_jax.data.dataset import Dataset, write_quarantine
from phased_ift_jax.data.dataset import prepare as prepare_data
from phased_ift_jax.data.packing import choose_shapes
from phased_ift_jax.data.tokenization import decode, load_tokenizer
from phased_ift_jax.files import is_full, sole_writer, write_whole
from phased_ift_jax.models import generation, hf_weights, hub
from phased_ift_jax.models.attention import implementation
from phased_ift_jax.models.decoder import Params
from phased_ift_jax.models.hf_folder import Folder, open_folder
from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.sharding import batch_rows, make_mesh, put
from phased_ift_jax.training import conversion, mirror
from phased_ift_jax.training.checkpoint import Checkpoints, Position, SaveFailed, load_arrays
from phased_ift_jax.training.interrupts import stop_requests, watchdog
from phased_ift_jax.training.metrics import MetricsLog, Rate, check_reporters, peak_flops
from phased_ift_jax.training.output import check_output
from phased_ift_jax.training.plan import PhasePlan, Plan, attended_pairs, make_plan, row_price
from phased_ift_jax.training.step import BATCH_DIMS, Trainer, TrainState


class NonFinite(Failure):
    """A loss or a gradient was no finite number; the last checkpoint has none such."""


class Stopped(Exception):
    """The run was asked to stop, and has saved everything; the same command goes on."""


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, the response of the data, and the model's."""

    id: str
    prompt: str
    response: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of each bin and, where asked for, greedy answers; both keyed by bin name."""

    losses: dict[str, float]
    answers: dict[str, list[Answer]]


@dataclass(frozen=True, eq=False)
class Run:
    """Everything that a run is made of, read and checked, before anything is written."""

    config: RunConfig
    folder: Folder
    tokenizer: Any
    dataset: Dataset
    mesh: Mesh
    plan: Plan
    trainers: dict[str, Trainer] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return mirror.folder_of(self.config.output_dir)

    @property
    def last_export(self) -> Path:
        """Where the Hugging Face folder of the last phase lies when the run is done."""
        return self.output / "hf" / self.plan.phases[-1].phase.folder

    @property
    def attention(self) -> str:
        """The attention kernel that is used: what `auto` stands for on this backend."""
        return implementation(self.config.model.attn_implementation)

    def trainer(self, phase: PhasePlan) -> Trainer:
        """One trainer, and so one compilation, for all phases whose optimizer is the same."""
        optimizer = phase.training.model_dump(include={"optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "on_nonfinite"})
        model = self.config.model
        return self.trainers.setdefault(
            str(optimizer),
            Trainer(self.plan.model, phase.training, self.mesh, model.param_dtype, model.dtype, model.gradient_checkpointing, model.attn_implementation),
        )

    def base_params(self) -> Params:
        """The weights that training starts from, sharded as they are made or read."""
        trainer = self.trainer(self.plan.phases[0])
        if self.config.model.init == "random":
            return trainer.init_params(self.config.seed)
        if self.folder.converted:
            return load_arrays(self.folder.converted, {"params": trainer.shapes.params}, {"params": trainer.shardings.params})["params"]
        return hf_weights.load(self.folder, trainer.shardings.params, trainer.param_dtype)

    @cached_property
    def held_out(self) -> list[tuple[str, np.ndarray]]:
        """(bin name, positions of its held-out rows), bins without any left out."""
        rows = [(name, self.dataset.held_out_rows(b)) for b, name in enumerate(self.dataset.bin_names, 1)]
        return [(name, held) for name, held in rows if len(held)]


def prepare(config: RunConfig, fresh: bool = False) -> Run:
    """Read and check everything that a run needs, and plan it. Writes nothing.

    Raises:
        UserError: of whatever is at fault in configuration, model folder, data, or an earlier run in output_dir.
    """
    if jax.process_count() > 1:
        raise UserError(f"mesh: {jax.process_count()} processes; a run uses the devices of one")
    check_output(config, same_settings=not fresh)
    check_reporters(config.logging)
    folder = open_folder(config.model.model_name_or_path, config.model.revision, weights=config.model.init == "pretrained")
    if config.model.init == "pretrained" and folder.converted:
        conversion.check(conversion.Source(folder.converted, folder, None))
    elif config.model.init == "pretrained":
        hf_weights.check(folder)
    tokenizer = load_tokenizer(folder.path, folder.config.vocab_size)
    dataset = prepare_data(config.data, config.curriculum, config.seed, tokenizer)
    mesh = make_mesh(config.mesh)
    return Run(config, folder, tokenizer, dataset, mesh, make_plan(config, dataset, folder.config, batch_rows(mesh)))


def train(run: Run, report: Callable[[str, Evaluation], None], reported: Callable[[str], bool], profile: tuple[int, int] | None = None) -> None:
    """Train what remains of the run, phase by phase, and export.

    `report(after, evaluation)` is told of the held-out rows before training ("base") and after each phase (its folder name), unless
    `reported(after)` says that it was told by an earlier call. `profile` is a range of optimizer steps to trace.

    Raises:
        Stopped: SIGINT or SIGTERM came, and everything is saved.
        SaveFailed, NonFinite: a checkpoint could not be saved, or a step went wrong; what was saved before is whole.
        UserError: the run in output_dir was made with other settings or other data, is damaged, or another process is at it.
    """
    run.output.mkdir(parents=True, exist_ok=True)
    with sole_writer(run.output), mirror.held(run.config.output_dir, run.output), watchdog(run.config.logging.hang_minutes) as alive:
        check_output(run.config, look=False)  # again: another process may have been here since `prepare`
        try:
            _train(run, report, reported, profile, alive)
        except OSError as error:
            if is_full(error):
                raise Failure(f"no space is left for '{run.output}': {error}; make room, then the same command goes on") from error
            raise


def _train(run: Run, report: Callable[[str, Evaluation], None], reported: Callable[[str], bool], profile: tuple[int, int] | None, alive: Callable[[], None]) -> None:
    store = Checkpoints(run.output / "checkpoints", run.dataset.identity, run.config.checkpoint.save_total_limit, run.folder.path)
    if found := store.newest():
        mirror.restore(found[1])
    if found is None and (any((run.output / "hf").glob("*")) or any(reported(phase.phase.folder) for phase in run.plan.phases)):
        raise UserError(f"output_dir: '{run.output}' holds results but no whole checkpoint to go on from; name another folder, or start again with --fresh")
    for path, fault in store.damaged.items():
        print(f"'{mirror.shown(path)}' is damaged: {fault}; it is set aside, and the checkpoint before it is used", flush=True)
    position = found[0] if found else Position(0, 0, 0, complete=True)
    if found:
        print(f"going on from {mirror.shown(found[1])} ({'phase complete' if position.complete else f'epoch {position.epoch + 1}'})", flush=True)
    store.set_aside()
    write_whole(run.output / "config.yaml", dump(run.config))
    write_whole(run.output / "plan.json", json.dumps({"phases": [_outline(phase) for phase in run.plan.phases]}, indent=1) + "\n")
    write_quarantine(run.dataset.quarantined, run.output / "quarantine.jsonl")
    log = MetricsLog(run.output, run.config.logging, (position.phase, position.step), run.config.model_dump(mode="json"))
    try:
        with stop_requests() as stop:
            try:
                if run.held_out and not reported("base"):
                    report("base", evaluate(run, run.base_params()))
                for phase in run.plan.phases:
                    trainer = run.trainer(phase)
                    done = (phase.phase.index, True) <= (position.phase, position.complete)
                    if stop:
                        raise Stopped
                    if not done:
                        state, start = _begin(run, phase, trainer, store, position)
                        _train_phase(run, phase, trainer, state, start, store, log, stop, profile, alive)
                        del state
                    if stop:
                        raise Stopped
                    _finish_phase(run, phase, trainer, store, report, reported)
            except BaseException as error:
                try:
                    store.wait()
                except SaveFailed as failed:
                    error.add_note(str(failed))
                raise
            store.wait()
    finally:
        log.close()


def publish(run: Run) -> str | None:
    """Upload the last phase's export where the run asks for it; returns its address.

    Raises:
        UserError: the hub cannot be reached or refuses; everything is on the disk, and the same command uploads it again.
    """
    if not run.config.export.push_to_hub:
        return None
    assert run.config.export.hub_model_id is not None, "the config sees to it"
    return hub.push(mirror.fetched(run.last_export), run.config.export.hub_model_id)


def evaluate(run: Run, params: Params) -> Evaluation:
    """Measure parameters on the held-out rows of every bin."""
    trainer, config = run.trainer(run.plan.phases[0]), run.config
    steps = {name: Steps(rows, config.training.global_batch_size, 1, ("evaluation", name)) for name, rows in run.held_out}
    sizes = [run.plan.phases[0].lengths[s[i]] for s in steps.values() for i in range(len(s))]
    shapes = choose_shapes(sizes, batch_rows(run.mesh), 1, row_price(run.plan.model), config.data.packing)
    losses = {}
    for name, chosen in steps.items():
        parts = [trainer.evaluate(params, put(batch, BATCH_DIMS, run.mesh)) for batch in batches(chosen, 0, run.dataset.examples, shapes)]
        losses[name] = float(sum(float(loss) for loss, _ in parts) / sum(float(count) for _, count in parts))
    answers = {name: _answers(run, params, rows) for name, rows in run.held_out} if config.evaluation.exact_match else {}
    return Evaluation(losses, answers)


def _answers(run: Run, params: Params, rows: np.ndarray) -> list[Answer]:
    examples = [run.dataset.examples[row] for row in rows]
    computing = jax.tree.map(lambda p: p.astype(run.config.model.dtype), params)
    prompts = [example.tokens[: example.response_start] for example in examples]
    generated = generation.greedy(run.plan.model, computing, prompts, run.config.evaluation.max_new_tokens, run.tokenizer.eos_token_id)
    # a conversation cut at max_length is asked for the last response that is left of it
    turns = [run.dataset.records[row].turns[len(example.responses) - 1] for row, example in zip(rows, examples, strict=True)]
    return [
        Answer(run.dataset.records[row].id, f"{turn.instruction}\n{turn.input}".rstrip("\n"), turn.response, decode(ids, run.tokenizer))
        for row, turn, ids in zip(rows, turns, generated, strict=True)
    ]


def _begin(run: Run, phase: PhasePlan, trainer: Trainer, store: Checkpoints, position: Position) -> tuple[TrainState, int]:
    """The state that a phase starts (or goes on) with, and the steps it has done."""
    store.wait()
    if position.phase == phase.phase.index:
        path = store.root / phase.phase.folder / str(position.step)
        return load_arrays(path, trainer.shapes, trainer.shardings), position.step
    if phase.phase.index == 1:
        return trainer.fresh(run.base_params()), 0
    before = store.of_phase(run.plan.phases[phase.phase.index - 2].phase.folder)
    assert before is not None, "a phase starts only after the one before it was saved"
    if run.config.curriculum.optimizer_state == "keep":
        return load_arrays(before, trainer.shapes, trainer.shardings), 0
    return trainer.fresh(load_arrays(before, {"params": trainer.shapes.params}, {"params": trainer.shardings.params})["params"]), 0


def _train_phase(
    run: Run,
    phase: PhasePlan,
    trainer: Trainer,
    state: TrainState,
    start: int,
    store: Checkpoints,
    log: MetricsLog,
    stop: list[int],
    profile: tuple[int, int] | None,
    alive: Callable[[], None],
) -> None:
    """Train the steps of a phase from `start` on, saving as configured, and at its end."""
    steps, rates = phase.steps, phase.learning_rates
    before = sum(len(earlier.steps) for earlier in run.plan.phases[: phase.phase.index - 1])
    rate, saved_at = Rate(peak_flops(list(run.mesh.devices.flat))), time.monotonic()
    source = batches(steps, start, run.dataset.examples, phase.shapes, phase.training.gradient_accumulation_steps)
    pending: tuple[dict[str, Any], dict[str, jax.Array]] | None = None
    tracing = False
    bar = tqdm(total=len(steps), initial=start, desc=phase.phase.folder, unit="step", dynamic_ncols=True, mininterval=0.5)

    def flush() -> None:
        """Log the step before: reading its numbers now does not hold up the one under way."""
        nonlocal pending
        if pending is None:
            return
        (facts, metrics), pending = pending, None
        numbers = {name: float(value) for name, value in metrics.items()}
        alive()
        skipped = _not_finite(run, phase, facts, numbers)
        line = facts | numbers | rate.lap(facts["tokens"], facts["flops"]) | skipped
        del line["flops"]
        log.write(line, last=facts["step"] == len(steps) or bool(skipped))
        shown = {"loss": f"{numbers['loss']:.3f}", "lr": f"{line['learning_rate']:.2e}", "tok/s": f"{line['tokens_per_second']:,.0f}"}
        bar.set_postfix(shown | ({"mfu": f"{line['mfu']:.1%}"} if "mfu" in line else {}), refresh=False)
        bar.update()

    for step, batch in enumerate(source, start):
        if profile and before + step == profile[0]:
            jax.profiler.start_trace(str(run.output / "profile"))
            tracing = True
        learning_rate = put(np.asarray(rates[step], np.float32), "", run.mesh)
        store.check()
        state, metrics = trainer.step(state, put(batch, BATCH_DIMS, run.mesh), learning_rate)
        flush()
        pending = _facts(run, phase, step, before, batch), metrics
        if tracing and profile and (stop or before + step + 1 >= profile[1]):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            tracing = False
        done = step + 1
        position = Position(phase.phase.index, done, done // steps.per_epoch, complete=done == len(steps))
        if position.complete:
            break
        if stop or _due(run, done, saved_at):
            flush()  # what a checkpoint has trained is in the log before the checkpoint is
            store.save(phase.phase.folder, position, state)
            saved_at = time.monotonic()
        if stop:
            bar.close()
            store.wait()
            raise Stopped
    flush()
    bar.close()
    kept = state if run.config.curriculum.optimizer_state == "keep" else {"params": state.params}
    store.save(phase.phase.folder, position, kept)
    store.wait()


def _finish_phase(run: Run, phase: PhasePlan, trainer: Trainer, store: Checkpoints, report: Callable[[str, Evaluation], None], reported: Callable[[str], bool]) -> None:
    """Evaluate and export a phase that is trained and saved, unless that was done before."""
    destination = run.output / "hf" / phase.phase.folder
    last = phase.phase.index == len(run.plan.phases)
    export = (last or run.config.export.after_each_phase) and not destination.exists()
    measure = bool(run.held_out) and not reported(phase.phase.folder)
    if destination.exists():
        conversion.check_export(destination)
    if not (measure or export):
        return
    path = store.of_phase(phase.phase.folder)
    if path is None:
        raise UserError(f"output_dir: the checkpoint at the end of {phase.phase.folder} is gone, from which it is to be evaluated or exported; restore it, or start with --fresh")
    if measure:
        params = load_arrays(path, {"params": trainer.shapes.params}, {"params": trainer.shardings.params})["params"]
        report(phase.phase.folder, evaluate(run, params))
        del params
    if export:
        conversion.to_hf(conversion.Source(path, run.folder, run.output), destination, run.config.export.dtype, verify=False)


def _not_finite(run: Run, phase: PhasePlan, facts: dict[str, Any], numbers: dict[str, float]) -> dict[str, Any]:
    """What a step's line says of a loss or gradient norm that is no finite number: nothing where both are finite.

    Raises:
        NonFinite: such a step is to end the run.
    """
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
    if not wrong:
        return {}
    ids = [reprlib.repr(run.dataset.records[row].id)[1:-1] for row in phase.steps[facts["step"] - 1]]
    if phase.training.on_nonfinite == "stop":
        place = {name: facts[name] for name in ("phase", "phase_index", "step")}
        write_whole(run.output / "nonfinite.json", json.dumps(place | {name: str(numbers[name]) for name in wrong} | {"ids": ids}) + "\n")
        raise NonFinite(
            f"phase {phase.phase.name}, step {facts['step']}: {wrong[0]} is {numbers[wrong[0]]}; rows of the batch: {', '.join(ids[:8])}"
            + (f" and {len(ids) - 8} more, in '{run.output / 'nonfinite.json'}'" if ids[8:] else "")
            + "; nothing of it was saved; in another output_dir or with --fresh, a lower learning rate, other rows or training.on_nonfinite skip would do"
        )
    return dict.fromkeys(wrong) | {"skipped": True, "ids": ids}


def _outline(phase: PhasePlan) -> dict[str, Any]:
    """A phase for plan.json, from which `status` tells how much is left."""
    return {"name": phase.phase.name, "folder": phase.phase.folder, "index": phase.phase.index, "rows": len(phase.phase.rows), "steps": len(phase.steps)}


def _facts(run: Run, phase: PhasePlan, step: int, before: int, batch: Any) -> dict[str, Any]:
    rows = phase.steps[step]
    tokens = int(phase.lengths[rows].sum())
    return {
        "phase": phase.phase.name,
        "phase_index": phase.phase.index,
        "step": step + 1,
        "epoch": (step + 1) / phase.steps.per_epoch,
        "global_step": before + step + 1,
        "examples": len(rows),
        "tokens": tokens,
        "response_tokens": int(phase.response_lengths[rows].sum()),
        "real_token_share": tokens / batch.tokens_BT.size,
        "row_length": batch.tokens_BT.shape[-1],
        "flops": run.plan.model.train_flops(tokens, int(attended_pairs(phase.lengths[rows], run.plan.model.sliding_window).sum())),
    }


def _due(run: Run, done: int, saved_at: float) -> bool:
    config = run.config.checkpoint
    by_steps = config.save_steps is not None and done % config.save_steps == 0
    return by_steps or (config.save_minutes is not None and time.monotonic() - saved_at >= 60 * config.save_minutes)

"""The run: phases one after another, each started from the checkpoint that ended the one before.

`prepare` reads everything and writes nothing; `train` does the rest, and goes on where an earlier call of it was stopped.
"""

from __future__ import annotations

import json
import math
import reprlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Event
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from phased_ift_jax import pictures, processes
from phased_ift_jax.config import RunConfig, dump
from phased_ift_jax.data.batches import batches
from phased_ift_jax.data.dataset import write_quarantine
from phased_ift_jax.files import is_full, set_aside, sole_writer, write_whole
from phased_ift_jax.interrupts import Stop, Stopped, watchdog
from phased_ift_jax.models import hub
from phased_ift_jax.models.decoder import Params
from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.sharding import highest, make_mesh, put
from phased_ift_jax.training import conversion, goodput, mirror
from phased_ift_jax.training.checkpoint import Checkpoints, Position, SaveFailed, load_arrays, load_params
from phased_ift_jax.training.held_out import Results, evaluate
from phased_ift_jax.training.metrics import Books, Rate, check_reporters
from phased_ift_jax.training.output import check_output
from phased_ift_jax.training.plan import PhasePlan, attended_pairs
from phased_ift_jax.training.step import BATCH_DIMS, Trainer, TrainState, trainer_of
from phased_ift_jax.training.survey import Survey, outline, survey


class NonFinite(Failure):
    """A loss or a gradient was no finite number; the last checkpoint has none such."""


@dataclass(frozen=True, eq=False)
class Run(Survey):
    """Everything that a run is made of, read and checked, before anything is written."""

    mesh: Mesh
    trainers: dict[str, Trainer] = field(default_factory=dict)

    @property
    def output(self) -> Path:
        return mirror.folder_of(self.config.output_dir)

    @property
    def last_export(self) -> Path:
        """Where the Hugging Face folder of the last phase lies when the run is done."""
        return self.output / "hf" / self.plan.phases[-1].phase.folder

    def trainer(self, phase: PhasePlan) -> Trainer:
        """One trainer, and so one compilation, for all phases whose optimizer is the same."""
        optimizer = phase.training.model_dump(include={"optim", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "on_nonfinite"})
        return self.trainers.setdefault(str(optimizer), trainer_of(self.config.model, self.plan.model, phase.training, self.mesh))

    def base_params(self) -> Params:
        """The weights that training starts from, sharded as they are made or read."""
        trainer = self.trainer(self.plan.phases[0])
        if self.config.model.init == "random":
            return trainer.init_params(self.config.seed)
        return conversion.load_weights(self.folder, self.folder.converted, trainer.shardings.params, trainer.param_dtype)

    @cached_property
    def held_out(self) -> list[tuple[str, np.ndarray]]:
        """(bin name, positions of its held-out rows), bins without any left out."""
        rows = [(name, self.dataset.held_out_rows(b)) for b, name in enumerate(self.dataset.eval_bin_names, 1)]
        return [(name, held) for name, held in rows if len(held)]


def prepare(config: RunConfig, fresh: bool = False) -> Run:
    """Read and check everything that a run needs, and plan it. Writes nothing.

    Raises:
        UserError: of whatever is at fault in configuration, model folder, data, or an earlier run in output_dir.
    """
    processes.agree(lambda: check_output(config, same_settings=not fresh))
    run = processes.together(lambda: _read(config))
    processes.check_same("model.model_name_or_path: its objects", pictures.stamp(run.folder.path))
    processes.check_same("data.path: its rows, scores or bins", run.dataset.identity)
    return run


def _read(config: RunConfig) -> Run:
    check_reporters(config.logging)
    seen = survey(config, (mesh := make_mesh(config.mesh)).shape, mesh.devices.flat[0].platform)
    folder = seen.folder
    if config.model.init == "pretrained":  # only now: of a hub model these are many gigabytes
        folder = open_folder(config.model.model_name_or_path, config.model.revision)
        conversion.check_weights(folder)
    return Run(config, folder, seen.tokenizer, seen.dataset, seen.plan, seen.mesh_sizes, seen.platform, mesh)


def train(run: Run, results: Results, stop: Stop | None = None, profile: tuple[int, int] | None = None) -> None:
    """Train what remains of the run, phase by phase, and export.

    The held-out rows are measured before training and after each phase, unless `results` has that already. `profile` is a range of
    optimizer steps to trace. In several processes all call this, and each has its own `results`; process 0's are used.

    Raises:
        Stopped: `stop` was asked for, and everything is saved.
        SaveFailed, NonFinite: a checkpoint could not be saved, or a step went wrong; what was saved before is whole.
        UserError: the run in output_dir was made with other settings or other data, is damaged, or another process is at it.
    """
    with ExitStack() as held:
        processes.agree(lambda: _hold(run, held))
        if not processes.first():
            held.enter_context(mirror.held(run.config.output_dir, run.output, writer=False))
        alive = held.enter_context(watchdog(run.config.logging.hang_minutes))
        try:
            _train(run, results, Stop() if stop is None else stop, profile, alive)
        except OSError as error:
            if is_full(error):
                raise Failure(f"no space is left for '{run.output}': {error}; make room, then the same command goes on") from error
            raise


def _hold(run: Run, held: ExitStack) -> None:
    """Make the run's folder this process's own, and look again what is in it: another may have been there since `prepare`."""
    try:
        run.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = "" if str(run.output) == run.config.output_dir else "; it is where this machine works for it: name another folder with PHASED_IFT_WORK"
        raise UserError(f"output_dir: cannot write '{run.output}': {error.strerror}{where}") from None
    held.enter_context(sole_writer(run.output))
    held.enter_context(mirror.held(run.config.output_dir, run.output))
    check_output(run.config, look=False)


def _train(run: Run, results: Results, stop: Stop, profile: tuple[int, int] | None, alive: Callable[[], None]) -> None:
    store = Checkpoints(run.output / "checkpoints", run.dataset.identity, run.config.checkpoint.save_total_limit, pictures.shown(run.folder.path.absolute()))
    found = store.newest()
    position = found[0] if found else Position(0, 0, 0, complete=True)
    processes.agree(lambda: _set_out(run, results, store, found, stop.since))
    books = Books(run.output, run.config.logging, (position.phase, position.step), run.config.model_dump(mode="json"), silent=not processes.first())
    compiler, given_up = ThreadPoolExecutor(1, "compiler"), Event()
    try:
        base, ahead, first = None, None, next((phase for phase in run.plan.phases if not _is_done(phase, position)), None)
        if first and processes.alone() and run.mesh.devices.flat[0].platform in ("cpu", "tpu"):  # on a GPU, compiling times kernels: nothing else may run there then
            ahead = compiler.submit(_compile, first, run.trainer(first), position.step if position.phase == first.phase.index else 0, given_up.is_set)
        if run.held_out and processes.agree(lambda: "base" not in results):
            _measure(run, base := run.base_params(), results, "base")
        for phase in run.plan.phases:
            if not _is_done(phase, position):
                state, start = _begin(run, phase, run.trainer(phase), store, position, base)
                base, _ = None, ahead and ahead.result()
                _train_phase(run, phase, run.trainer(phase), state, start, store, books, stop, profile, alive)
                del state
            _finish_phase(run, phase, store, results)
        processes.agree(lambda: goodput.note(run.output, "done", time.time()) if goodput.is_running(run.output) else None)
    except BaseException as error:
        try:
            store.wait()
        except SaveFailed as failed:
            error.add_note(str(failed))
        raise
    finally:
        given_up.set()
        compiler.shutdown(wait=False, cancel_futures=True)
        books.close()


def _set_out(run: Run, results: Results, store: Checkpoints, found: tuple[Position, Path] | None, since: float) -> None:
    """Say where the run goes on, put aside what is not part of it any more, and note what it is, and since when it is at work."""
    if found:
        mirror.restore(found[1])
    started = [phase for phase in run.plan.phases if phase.phase.folder in results or (run.output / "hf" / phase.phase.folder).exists()]
    if found is None and started:
        raise UserError(f"output_dir: '{run.output}' holds results but no whole checkpoint to go on from; name another folder, or start again with --fresh")
    for path, fault in store.damaged.items():
        print(f"'{mirror.shown(path)}' is damaged: {fault}; it is set aside, and the checkpoint before it is used", flush=True)
    store.set_aside()
    if found:
        position, path = found
        print(f"going on from {mirror.shown(path)} ({'phase complete' if position.complete else f'epoch {position.epoch + 1}'})", flush=True)
        for phase in started:
            if not _is_done(phase, position):  # it will be trained again, and what was made of it then is not of these weights
                results.drop(phase.phase.folder)
                if (export := run.output / "hf" / phase.phase.folder).exists() and not mirror.withdraw(export):
                    print(f"what was exported from {phase.phase.folder} is now in '{set_aside(export, 'before')}'", flush=True)
    write_whole(run.output / "config.yaml", dump(run.config))
    write_whole(run.output / "plan.json", json.dumps(outline(run), indent=1) + "\n")
    write_quarantine(run.dataset.quarantined, run.output / "quarantine.jsonl")
    if not found or any(not _is_done(phase, found[0]) or any(_what_is_missing(run, phase, results, run.output / "hf" / phase.phase.folder)) for phase in run.plan.phases):
        goodput.note(run.output, "start", since)


def _is_done(phase: PhasePlan, position: Position) -> bool:
    return (phase.phase.index, True) <= (position.phase, position.complete)


def _measure(run: Run, params: Params, results: Results, after: str) -> None:
    evaluation = evaluate(run, params)
    if processes.first():
        results.add(after, evaluation)


def publish(run: Run) -> str | None:
    """Upload the last phase's export where the run asks for it; returns its address.

    Raises:
        UserError: the hub cannot be reached or refuses; everything is on the disk, and the same command uploads it again.
    """
    if not run.config.export.push_to_hub:
        return None
    assert run.config.export.hub_model_id is not None, "the config sees to it"
    return hub.push(mirror.fetched(run.last_export), run.config.export.hub_model_id)


def _begin(run: Run, phase: PhasePlan, trainer: Trainer, store: Checkpoints, position: Position, base: Params | None) -> tuple[TrainState, int]:
    """The state that a phase starts (or goes on) with, and the steps it has done. `base`: the run's first weights, where they are there."""
    store.wait()
    if position.phase == phase.phase.index:
        return load_arrays(store.root / phase.phase.folder / str(position.step), trainer.shapes, trainer.shardings), position.step
    if phase.phase.index == 1:
        return trainer.fresh(run.base_params() if base is None else base), 0
    before = store.of_phase(run.plan.phases[phase.phase.index - 2].phase.folder)
    assert before is not None, "a phase starts only after the one before it was saved"
    if run.config.curriculum.optimizer_state == "keep":
        return load_arrays(before, trainer.shapes, trainer.shardings), 0
    return trainer.fresh(load_params(before, trainer.shapes.params, trainer.shardings.params)), 0


def _compile(phase: PhasePlan, trainer: Trainer, start: int, enough: Callable[[], object]) -> None:
    """Compile the train step for every row length of a phase from step `start` on, unless that is `enough`; what was compiled before costs nothing."""
    for length in dict.fromkeys(phase.row_lengths[start:].tolist()):
        if not enough():
            trainer.compile_step(phase.shapes.rows, length, phase.training.gradient_accumulation_steps)


def _train_phase(
    run: Run,
    phase: PhasePlan,
    trainer: Trainer,
    state: TrainState,
    start: int,
    store: Checkpoints,
    books: Books,
    stop: Stop,
    profile: tuple[int, int] | None,
    alive: Callable[[], None],
) -> None:
    """Train the steps of a phase from `start` on, saving as configured, and at its end."""
    steps, rates = phase.steps, phase.learning_rates
    before = sum(len(earlier.steps) for earlier in run.plan.phases[: phase.phase.index - 1])
    _compile(phase, trainer, start, alive)  # now, when nothing is unsaved: a request to stop need not wait for a compilation
    rate, saved_at, saved_step = Rate(run.mesh.devices.flat[0].device_kind, run.mesh.size), time.monotonic(), start
    source = batches(steps, start, run.dataset.examples, phase.shapes, phase.training.gradient_accumulation_steps)
    pending: tuple[dict[str, Any], dict[str, jax.Array], jax.Array | None] | None = None
    wanted = [False, False]  # to stop, to save; of several processes, all see it after the same step: the one before, so that none waits for it
    tracing = False
    bar = tqdm(total=len(steps), initial=start, desc=phase.phase.folder, unit="step", dynamic_ncols=True, mininterval=0.5, disable=not processes.first())

    def flush() -> None:
        """Log the step before: reading its numbers now does not hold up the one under way."""
        nonlocal pending, wanted
        if pending is None:
            return
        (facts, metrics, votes), pending = pending, None
        numbers = {name: float(value) for name, value in jax.device_get(metrics).items()}
        alive()
        if votes is not None:
            stopping, late = (bool(vote) for vote in np.asarray(votes))
            wanted = [stopping, late and facts["step"] > saved_step]  # a vote cast before the last save is answered by it
        ids = [run.dataset.records[row].id for row in steps[facts["step"] - 1]]
        skipped = _not_finite(run, phase, facts, numbers, ids)
        line = facts | numbers | rate.lap(facts["tokens"], facts["flops"]) | skipped
        del line["flops"]
        books.write(line, ids, last=facts["step"] == len(steps) or bool(skipped))
        shown = {"loss": f"{numbers['loss']:.3f}", "lr": f"{line['learning_rate']:.2e}", "tok/s": f"{line['tokens_per_second']:,.0f}"}
        bar.set_postfix(shown | ({"mfu": f"{line['mfu']:.1%}"} if "mfu" in line else {}), refresh=False)
        bar.update()

    def save(position: Position, tree: Any) -> None:
        """What a checkpoint has trained is in the books before the checkpoint is."""
        nonlocal saved_at, saved_step
        flush()
        books.settle()
        store.save(phase.phase.folder, position, tree)
        saved_at, saved_step = time.monotonic(), position.step

    for step, batch in enumerate(source, start):
        if profile and before + step == profile[0]:
            jax.profiler.start_trace(str(run.output / "profile"))
            tracing = True
        learning_rate = put(np.asarray(rates[step], np.float32), "", run.mesh)
        store.check()
        stop.began()
        state, metrics = trainer.step(state, put(batch, BATCH_DIMS, run.mesh), learning_rate)
        votes = None if processes.alone() else highest([bool(stop), _is_late(run, saved_at)], run.mesh)
        flush()
        pending = _facts(run, phase, step, before, batch), metrics, votes
        if processes.alone():
            wanted = [bool(stop), _is_late(run, saved_at)]
        if tracing and profile and (wanted[0] or before + step + 1 >= profile[1]):
            jax.block_until_ready(metrics)
            jax.profiler.stop_trace()
            tracing = False
        done = step + 1
        position = Position(phase.phase.index, done, done // steps.per_epoch, complete=done == len(steps))
        if position.complete:
            break
        if any(wanted) or (run.config.checkpoint.save_steps and done % run.config.checkpoint.save_steps == 0):
            save(position, state)
            wanted[1] = False
        if wanted[0]:
            bar.close()
            store.wait()
            raise Stopped
    save(position, state if run.config.curriculum.optimizer_state == "keep" else {"params": state.params})
    bar.close()
    store.wait()
    stop.saved()


def _finish_phase(run: Run, phase: PhasePlan, store: Checkpoints, results: Results) -> None:
    """Evaluate and export a phase that is trained and saved, unless that was done before."""
    destination = run.output / "hf" / phase.phase.folder
    measure, export = processes.agree(lambda: _what_is_missing(run, phase, results, destination))
    if not (measure or export):
        return
    if (path := store.of_phase(phase.phase.folder)) is None:
        raise UserError(f"output_dir: the checkpoint at the end of {phase.phase.folder} is gone, from which it is to be evaluated or exported; restore it, or start with --fresh")
    if measure:
        trainer = run.trainer(phase)
        _measure(run, load_params(path, trainer.shapes.params, trainer.shardings.params), results, phase.phase.folder)
    if export:
        processes.agree(lambda: conversion.to_hf(conversion.Source(path, run.folder, run.output), destination, run.config.export.dtype, verify=False))


def _what_is_missing(run: Run, phase: PhasePlan, results: Results, destination: Path) -> tuple[bool, bool]:
    """Whether a phase that is trained is still to be measured, and exported."""
    if destination.exists():
        conversion.check_export(destination)
    last = phase.phase.index == len(run.plan.phases)
    return bool(run.held_out) and phase.phase.folder not in results, (last or run.config.export.after_each_phase) and not destination.exists()


def _not_finite(run: Run, phase: PhasePlan, facts: dict[str, Any], numbers: dict[str, float], ids: list[str]) -> dict[str, Any]:
    """What a step's line says of a loss or gradient norm that is no finite number: nothing where both are finite.

    Raises:
        NonFinite: such a step is to end the run.
    """
    wrong = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
    if not wrong:
        return {}
    ids = [reprlib.repr(name)[1:-1] for name in ids]
    if phase.training.on_nonfinite == "stop":
        place = {name: facts[name] for name in ("phase", "phase_index", "step")}
        if processes.first():
            write_whole(run.output / "nonfinite.json", json.dumps(place | {name: str(numbers[name]) for name in wrong} | {"ids": ids}) + "\n")
        raise NonFinite(
            f"phase {phase.phase.name}, step {facts['step']}: {wrong[0]} is {numbers[wrong[0]]}; rows of the batch: {', '.join(ids[:8])}"
            + (f" and {len(ids) - 8} more, in '{run.output / 'nonfinite.json'}'" if ids[8:] else "")
            + "; nothing of it was saved; in another output_dir or with --fresh, a lower learning rate, other rows or training.on_nonfinite skip would do"
        )
    return dict.fromkeys(wrong) | {"skipped": True, "ids": ids}


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


def _is_late(run: Run, saved_at: float) -> bool:
    return (minutes := run.config.checkpoint.save_minutes) is not None and time.monotonic() - saved_at >= 60 * minutes

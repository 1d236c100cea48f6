"""What a train step and a run cost, without a clock, held to figures recorded in guard.json:  python tests/test_guard.py [--record]

Of configs/quickstart.yaml with fewer steps, on one CPU device: FLOPs, bytes accessed and temporary memory of the compiled train step (XLA's own
count, in which the body of a scan, over layers or chunks, counts once), how many programs a whole run compiles, and, in the loop over steps, how
many arrays go to the device and how many numbers come back, and how late. XLA's figures belong to a version of jax: they are recorded by its
first two numbers, and others are not compared. Where one changes for a reason, --record writes those of the jax that runs it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
RECORDED = Path(__file__).with_name("guard.json")
TOLERANCE = {"flops": 0.02, "bytes_accessed": 0.05, "temporary_bytes": 0.10}  # all others are whole numbers, and exact
STEPS = 4  # a phase


def prepared(folder: Path, eval_size: int = 8) -> Any:
    from phased_ift_jax import config
    from phased_ift_jax.training import loop

    changes = {"output_dir": str(folder / "run"), "training.max_steps": str(STEPS), "data.eval_size": str(eval_size), "evaluation.max_new_tokens": "2"}
    paths = {"data.path": str(ROOT / "configs/quickstart/data.jsonl"), "model.model_name_or_path": str(ROOT / "configs/quickstart/model")}
    return loop.prepare(config.load(ROOT / "configs/quickstart.yaml", list((changes | paths).items())))


def step_figures(run: Any) -> dict[str, float]:
    """Of the compiled step, summed over the shapes of the run."""
    shapes = [(phase.training.gradient_accumulation_steps, phase.shapes.rows, length) for phase in run.plan.phases[:1] for length in phase.shapes.lengths]
    steps = [run.trainer(run.plan.phases[0]).lower_step(rows, length, parts).compile() for parts, rows, length in shapes]
    costs = [step.cost_analysis() for step in steps]
    figures = {"flops": sum(cost["flops"] for cost in costs), "bytes_accessed": sum(cost["bytes accessed"] for cost in costs)}
    return figures | {"temporary_bytes": sum(step.memory_analysis().temp_size_in_bytes for step in steps)}


def run_figures(run: Any, put: Callable[..., Any] | None = None) -> dict[str, Any]:
    """Of a run in this process, in whose loops nothing but `put` may move anything to the device; another `put` may be tried."""
    import jax
    from jax._src.array import ArrayImpl  # no public way tells when a number is read

    from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
    from phased_ift_jax.train import Results
    from phased_ift_jax.training import loop
    from phased_ift_jax.training.checkpoint import Checkpoints

    compiled, sent, read, late, begun, looping = [], [], [], [], [], []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None)
    real_put, save, not_finite, value = put or loop.put, Checkpoints.save, loop._not_finite, ArrayImpl._value
    guard = ExitStack()  # closed but within a loop over steps

    def guarded_put(tree: Any, dims: str, mesh: Any) -> Any:
        guard.close()
        placed = real_put(tree, dims, mesh)
        sent.extend(jax.tree.leaves(placed))
        begun.extend([len(compiled)] if dims == loop.BATCH_DIMS else [])
        guard.enter_context(jax.transfer_guard("disallow_explicit"))
        guard.callback(looping.clear)
        looping.append(True)
        return placed

    def saving(*words: Any) -> None:
        guard.close()
        save(*words)

    def noted(run: Any, phase: Any, facts: dict[str, Any], *more: Any) -> Any:
        late.append(len(begun) - facts["global_step"])
        return not_finite(run, phase, facts, *more)

    def reading(array: Any) -> Any:
        if looping:
            read.append(array.shape)
        return value.fget(array)

    with pytest.MonkeyPatch.context() as patch, guard:
        for owner, name, new in ((loop, "put", guarded_put), (loop, "_not_finite", noted), (Checkpoints, "save", saving), (ArrayImpl, "_value", property(reading))):
            patch.setattr(owner, name, new)
        loop.train(run, Results(ForgettingMatrix(run.output / "forgetting.json")))
    ends = [STEPS * number for number in range(1, len(run.plan.phases) + 1)]
    return {
        "programs_compiled": len(compiled),
        "programs_compiled_between_steps": sum(begun[end - 1] - begun[end - STEPS] for end in ends),
        "arrays_sent_a_step": len(sent) / len(begun),
        "numbers_read_a_step": len(read) / len(begun),
        "steps_late": sorted({steps for number, steps in enumerate(late, 1) if number not in ends}),
    }


def version() -> str:
    import jax

    return ".".join(jax.__version__.split(".")[:2])


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    """Made in a process of its own: what a run compiles depends on what was compiled before it."""
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "JAX_ENABLE_COMPILATION_CACHE": "false"}
    return json.loads(subprocess.run([sys.executable, __file__], env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout)


def test_the_loop_waits_for_no_number_and_moves_nothing_but_its_batches(figures: dict[str, Any]) -> None:
    """Five arrays and a learning rate go to the device each step; three numbers come back, when the next step is under way."""
    told = {name: figures[name] for name in ("arrays_sent_a_step", "numbers_read_a_step", "steps_late", "programs_compiled_between_steps")}
    assert told == {"arrays_sent_a_step": 6, "numbers_read_a_step": 3, "steps_late": [1], "programs_compiled_between_steps": 0}


def test_a_step_and_a_run_cost_what_is_recorded(figures: dict[str, Any]) -> None:
    recorded = json.loads(RECORDED.read_text()).get(version())
    if recorded is None:
        pytest.skip(f"tests/guard.json has no figures of jax {version()}; python tests/test_guard.py --record adds them")
    assert figures.keys() == recorded.keys()
    changed = {name: (was, figures[name]) for name, was in recorded.items() if figures[name] != (pytest.approx(was, rel=TOLERANCE[name]) if name in TOLERANCE else was)}
    assert not changed, f"(recorded, now): {changed}; if that is meant, python tests/test_guard.py --record"


@pytest.mark.usefixtures("compilation_cache")
def test_an_array_that_the_step_has_to_fetch_itself_is_found(tmp_path: Path) -> None:
    """The guard guards: a batch left on the host would be moved by the call of the step."""
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        run_figures(prepared(tmp_path, eval_size=0), put=lambda tree, dims, mesh: tree)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        run = prepared(Path(folder))
        found = run_figures(run) | step_figures(run)
    print(json.dumps(found))
    if "--record" in sys.argv:
        all_of_them = (json.loads(RECORDED.read_text()) if RECORDED.exists() else {}) | {version(): found}
        RECORDED.write_text(json.dumps(dict(sorted(all_of_them.items())), indent=1) + "\n")


if __name__ == "__main__":
    main()

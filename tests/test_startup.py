"""Laws of a start, without a clock: what a run imports, how often it makes its first weights, and when it compiles."""

from __future__ import annotations

import subprocess
import sys
import threading

import pytest
from test_run import ROOT, make_config, rows, train  # noqa: F401

from phased_ift_jax.config import dump
from phased_ift_jax.training import loop
from phased_ift_jax.training.step import Trainer

UNUSED = ("torch", "tensorflow", "tensorflow_datasets", "datasets", "pyarrow", "openai", "matplotlib", "statsmodels", "google.cloud.storage", "wandb", "playwright")


def test_a_whole_run_imports_nothing_that_it_has_no_use_for(rows, tmp_path):  # noqa: F811
    """From the command line to the export, TensorBoard included, with all of them installed: each would cost a start some tenths of a second or more."""
    (tmp_path / "config.yaml").write_text(dump(make_config(rows, tmp_path / "run", training__max_steps=1, curriculum__order=[1])))
    program = f"import sys\nfrom phased_ift_jax import train\ntrain.main(['config.yaml'])\nprint([name for name in {UNUSED} if name in sys.modules], file=sys.stderr)"
    environment = {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == "[]"
    assert list((tmp_path / "run/tensorboard").rglob("events.*"))


@pytest.mark.usefixtures("compilation_cache")
def test_the_first_weights_are_made_once_and_the_step_is_compiled_meanwhile(rows, tmp_path, monkeypatch):  # noqa: F811
    made, where, real = [], [], Trainer.compile_step
    monkeypatch.setattr(Trainer, "init_params", lambda self, seed, make=Trainer.init_params: made.append(seed) or make(self, seed))

    def compile_step(self, *shape):
        where.append(threading.current_thread() is threading.main_thread())
        real(self, *shape)

    monkeypatch.setattr(Trainer, "compile_step", compile_step)
    train(make_config(rows, tmp_path / "run", training__max_steps=2, curriculum__order=[1]))
    assert made == [7]
    assert where[0] is False


@pytest.mark.usefixtures("compilation_cache")
def test_a_step_that_does_not_compile_ends_the_run(rows, tmp_path, monkeypatch):  # noqa: F811
    """Also where a thread has tried it first."""

    def fail(self, *shape):
        raise MemoryError("no room for the step")

    monkeypatch.setattr(Trainer, "compile_step", fail)
    with pytest.raises(MemoryError, match="no room"):
        train(make_config(rows, tmp_path / "run", training__max_steps=2, curriculum__order=[1]))


def test_a_plan_counts_each_row_as_often_as_its_steps_train_it(rows, tmp_path):  # noqa: F811
    for most in (-1, 1, 7, 12, 40):
        for phase in loop.prepare(make_config(rows, tmp_path / "run", training__max_steps=most)).plan.phases:
            trained = [row for step in range(len(phase.steps)) for row in phase.steps[step].tolist()]
            assert phase.times_trained.tolist() == [trained.count(row) for row in range(len(phase.lengths))]

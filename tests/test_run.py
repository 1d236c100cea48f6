"""Laws of a whole run: phases in order, each from the one before; stopped and started again equals never stopped; nothing written on bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import types
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from phased_ift_jax import config as config_module
from phased_ift_jax import convert as convert_verb
from phased_ift_jax import train as train_verb
from phased_ift_jax.data import batches
from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
from phased_ift_jax.records import UserError
from phased_ift_jax.training import loop
from phased_ift_jax.training.checkpoint import Checkpoints, load_arrays
from phased_ift_jax.training.metrics import Books
from phased_ift_jax.training.output import begin_afresh
from phased_ift_jax.training.plan import make_plan
from phased_ift_jax.training.schedule import scales
from phased_ift_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("compilation_cache")
ROOT = Path(__file__).parent.parent
MICRO = {
    "seed": 7,
    "model": {"model_name_or_path": str(ROOT / "configs/quickstart/model"), "init": "random", "dtype": "float32"},
    "data": {"max_length": 64, "eval_size": 8},
    "curriculum": {"bins": {"by": "score", "thresholds": [1.5, 3.5], "names": ["easy", "medium", "hard"]}},
    "training": {"num_train_epochs": 2, "global_batch_size": 8, "learning_rate": 1e-3},
    "checkpoint": {"save_minutes": None, "save_steps": 3},
}


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A hundred rows of the quickstart's data, the last of each epoch's steps left uneven."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join((ROOT / "configs/quickstart/data.jsonl").read_text().splitlines(keepends=True)[:100]))
    return path


def make_config(rows: Path, output: Path, **changes) -> config_module.RunConfig:
    tree = json.loads(json.dumps(MICRO)) | {"output_dir": str(output)}
    tree["data"]["path"] = str(rows)
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        node = tree
        for part in section.split("__") if section else []:
            node = node.setdefault(part, {})
        node[name] = value
    return config_module.RunConfig.model_validate(tree)


def train(config: config_module.RunConfig) -> loop.Run:
    run = loop.prepare(config)
    loop.train(run, train_verb.Results(ForgettingMatrix(run.output / "forgetting.json")))
    return run


def final_weights(output: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    folder = sorted((output / "hf").iterdir())[-1]
    return load_file(folder / "model.safetensors")


def metrics(output: Path) -> list[dict]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in ("seconds", "tokens_per_second")} for line in lines]


def assert_same_result(one: Path, other: Path) -> None:
    a, b = final_weights(one), final_weights(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert metrics(one) == metrics(other)
    assert (one / "forgetting.json").read_text() == (other / "forgetting.json").read_text()


@pytest.fixture(scope="module")
def undisturbed(rows, tmp_path_factory, compilation_cache) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(make_config(rows, output))
    return output


def test_three_phases_leave_three_checkpoints_three_exports_and_a_matrix(undisturbed):
    names = ["1-easy", "2-medium", "3-hard"]
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == names
    assert sorted(path.name for path in (undisturbed / "hf").iterdir()) == names
    assert [row["after"] for row in ForgettingMatrix(undisturbed / "forgetting.json").rows] == ["base", *names]
    store = Checkpoints(undisturbed / "checkpoints", "", 2)
    assert [(position.phase, position.complete) for position, _ in store.committed()] == [(1, True), (2, True), (3, True)]


def test_a_phase_end_holds_the_weights_alone(undisturbed):
    from orbax.checkpoint import v1 as ocp

    for _, path in Checkpoints(undisturbed / "checkpoints", "", 2).committed():
        assert set(ocp.metadata(path.absolute()).metadata) == {"params"}


def test_learning_rate_of_each_phase_is_its_closed_form(undisturbed):
    """A step count kept across phases would start the next phase at the end of the schedule."""
    for phase in (1, 2, 3):
        trace = [line["learning_rate"] for line in metrics(undisturbed) if line["phase_index"] == phase]
        np.testing.assert_array_equal(trace, (1e-3 * scales("cosine", len(trace), 0.1)).astype(np.float32))


def test_saved_config_runs_as_it_is_and_finds_nothing_left_to_do(undisturbed):
    before = {path: path.stat().st_mtime_ns for path in (undisturbed / "hf").rglob("*.safetensors")}
    weights = final_weights(undisturbed)
    train(config_module.load(undisturbed / "config.yaml"))
    assert {path: path.stat().st_mtime_ns for path in (undisturbed / "hf").rglob("*.safetensors")} == before
    np.testing.assert_array_equal(final_weights(undisturbed)["model.norm.weight"], weights["model.norm.weight"])


@pytest.mark.parametrize("phase", ["1-easy", "3-hard"])
def test_a_checkpoint_converted_later_is_what_the_run_exported(undisturbed, tmp_path, monkeypatch, phase):
    """`convert to-hf` of a run (its last phase) or of an earlier phase's checkpoint gives the run's own folder, model card and all, from
    wherever it is called."""
    monkeypatch.chdir(tmp_path)
    source = undisturbed if phase == "3-hard" else next((undisturbed / "checkpoints" / phase).iterdir())
    assert convert_verb.main(["to-hf", str(source), str(tmp_path / "again")]) == 0
    exported = undisturbed / "hf" / phase
    assert {path.name for path in (tmp_path / "again").iterdir()} == {path.name for path in exported.iterdir()}
    for path in exported.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_conversion_follows_what_the_run_says_of_itself(undisturbed, tmp_path):
    """The dtype is the run's unless another is asked for; a card whose facts have changed is another card; a line cut by a kill is none."""
    run = shutil.copytree(undisturbed, tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"phase": "ha')
    assert convert_verb.main(["to-hf", str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out/README.md").read_bytes() == (undisturbed / "hf/3-hard/README.md").read_bytes()
    os.truncate(tmp_path / "out/model.safetensors", 1000)
    with pytest.raises(UserError, match="a file of its weights is missing or cut off"):
        convert_verb.main(["to-hf", str(run), str(tmp_path / "out")])
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["export"] |= {"dtype": "bfloat16", "data_license": "MIT"}
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(UserError, match="was not made from this source"):
        convert_verb.main(["to-hf", str(run), str(tmp_path / "out")])
    assert convert_verb.main(["to-hf", str(run), str(tmp_path / "narrow")]) == 0
    assert json.loads((tmp_path / "narrow/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "licence: MIT" in (tmp_path / "narrow/README.md").read_text()


def test_the_model_card_says_what_the_run_did(undisturbed):
    """Base, data, arm, phases, settings, versions and held-out figures, each as it is in the run's own files."""
    card = (undisturbed / "hf/2-medium/README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["license"] == "other"
    assert "base_model" not in yaml.safe_load(front), "a local folder is no name on the hub"
    settings = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    whole = yaml.safe_load((undisturbed / "config.yaml").read_text())
    assert (settings["output_dir"], settings["data"]["path"], settings["model"]["model_name_or_path"]) == ("run", "rows.jsonl", "model"), "no folders of this machine"
    whole["output_dir"], whole["data"]["path"], whole["model"]["model_name_or_path"] = "run", "rows.jsonl", "model"
    assert settings == whole
    assert str(undisturbed.parent) not in card
    rows = json.loads((undisturbed / "forgetting.json").read_text())["rows"]
    for row in rows[:3]:
        assert f"| {row['after']} | " + " | ".join(f"{value:.3f}" for value in row["loss"].values()) + " |" in body
    assert "3-hard" not in body
    last = [line for line in metrics(undisturbed) if line["phase_index"] == 2][-1]
    assert f"| medium | {last['step']} | 2 | {last['learning_rate']:.3g} | {last['loss']:.4f} |" in body
    facts = json.loads((undisturbed / "hf/2-medium/provenance.json").read_text())
    assert facts["data"]["sha256"] in body
    assert facts["versions"]["jax"] == jax.__version__
    assert f"jax {jax.__version__}" in body
    assert f"arm `{facts['arm']}`" in body


class Crash(Exception):
    pass


def crash_in_step(monkeypatch, crash_at: int) -> None:
    """Let the optimizer step number `crash_at` of the whole run raise, as a machine that dies would."""
    taken = [0]
    real = loop.put

    def put(tree, dims, mesh):
        taken[0] += dims == loop.BATCH_DIMS and sys._getframe(1).f_code.co_name == "_train_phase"
        if taken[0] == crash_at:
            raise Crash
        return real(tree, dims, mesh)

    monkeypatch.setattr(loop, "put", put)


@pytest.mark.parametrize("phase", [1, 2, 3])
def test_interrupted_at_a_random_step_of_each_phase(rows, undisturbed, tmp_path, monkeypatch, phase):
    """interrupted(k) == uninterrupted, bit for bit: weights, metrics, forgetting matrix."""
    lengths = [len([line for line in metrics(undisturbed) if line["phase_index"] == p]) for p in (1, 2, 3)]
    within = int(np.random.default_rng([phase, 11]).integers(1, lengths[phase - 1] + 1))
    with monkeypatch.context() as patch:
        crash_in_step(patch, sum(lengths[: phase - 1]) + within)
        with pytest.raises(Crash):
            train(make_config(rows, tmp_path / "run"))
    train(make_config(rows, tmp_path / "run"))
    assert_same_result(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("moment", ["evaluate", "export"])
@pytest.mark.parametrize("call", [1, 2, 3])
def test_interrupted_between_a_phase_and_the_next(rows, undisturbed, tmp_path, monkeypatch, moment, call):
    """Resumed at a boundary, a phase is neither skipped nor trained twice, and what was missing after it is made up."""
    owner = loop if moment == "evaluate" else loop.conversion
    real, calls = getattr(owner, moment), [0]

    def failing(*arguments, **options):
        calls[0] += 1
        if calls[0] == call:
            raise Crash
        return real(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(owner, moment, failing)
        with pytest.raises(Crash):
            train(make_config(rows, tmp_path / "run"))
    train(make_config(rows, tmp_path / "run"))
    assert_same_result(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(("state", "saved"), [("reset", {"params"}), ("keep", {"params", "opt_state"})])
def test_next_phase_starts_from_the_checkpoint_of_the_one_before(rows, tmp_path, monkeypatch, state, saved):
    """The weights that phase k + 1 first sees are those that phase k saved, and the moments are fresh or kept as asked."""
    seen = []
    real = loop._begin

    def begin(run, phase, *given):
        result, start = real(run, phase, *given)
        seen.append((phase.phase.folder, jax.tree.map(np.asarray, result.params), jax.tree.map(np.asarray, result.opt_state)))
        return result, start

    monkeypatch.setattr(loop, "_begin", begin)
    run = train(make_config(rows, tmp_path / "run", curriculum__optimizer_state=state))
    trainer = run.trainer(run.plan.phases[0])
    store = Checkpoints(run.output / "checkpoints", run.dataset.identity, 2)
    for (before, *_), (_, params, opt_state) in pairwise(seen):
        shapes, shardings = {"params": trainer.shapes.params}, {"params": trainer.shardings.params}
        loaded = load_arrays(store.of_phase(before), shapes, shardings)["params"]
        jax.tree.map(np.testing.assert_array_equal, params, loaded)
        moments = [leaf for leaf in jax.tree.leaves(opt_state) if leaf.ndim]
        assert any(leaf.any() for leaf in moments) == (state == "keep")


def test_arms_share_held_out_rows_and_train_what_they_say(rows, tmp_path):
    runs = {arm: loop.prepare(make_config(rows, tmp_path / arm, curriculum__arm=arm)) for arm in ("phased", "one_off", "random")}
    held = {tuple(np.flatnonzero(run.dataset.held_out)) for run in runs.values()}
    assert len(held) == 1
    trained = {arm: sorted(row for phase in run.dataset.phases for row in phase.rows) for arm, run in runs.items()}
    assert trained["phased"] == trained["one_off"] == trained["random"]
    assert [len(phase.rows) for phase in runs["random"].dataset.phases] == [len(phase.rows) for phase in runs["phased"].dataset.phases]


@pytest.mark.parametrize("row_devices", [1, 2, 4, 8])
def test_each_phase_trains_its_ids_once_an_epoch_in_the_same_order_on_any_number_of_devices(rows, tmp_path, row_devices):
    """What the packed batches hold, read back segment by segment, is the order of the plan, which knows no devices."""
    run = loop.prepare(make_config(rows, tmp_path / "run"))
    plan = make_plan(run.config, run.dataset, run.folder.config, row_devices)
    for phase in plan.phases:
        for step, batch in enumerate(batches.batches(phase.steps, 0, run.dataset.examples, phase.shapes)):
            assert batch.tokens_BT.shape[1] % row_devices == 0
            packed = sorted(
                row_tokens[row_segments == segment].tolist()
                for row_tokens, row_segments in zip(batch.tokens_BT[0], batch.segments_BT[0], strict=True)
                for segment in range(1, row_segments.max() + 1)
            )
            assert packed == sorted(run.dataset.examples[row].tokens.tolist() for row in phase.steps[step])
        for epoch in range(2):
            ids = np.concatenate([phase.steps[i] for i in range(epoch * phase.steps.per_epoch, (epoch + 1) * phase.steps.per_epoch)])
            assert sorted(ids) == sorted(phase.phase.rows)


def test_held_out_prompts_of_the_quickstart_are_in_no_training_pool(tmp_path):
    config = config_module.load(ROOT / "configs/quickstart.yaml", [("output_dir", str(tmp_path / "run"))])
    cwd = os.getcwd()
    os.chdir(ROOT)
    try:
        dataset = loop.prepare(config).dataset
    finally:
        os.chdir(cwd)
    held = {dataset.records[row].turns[0].instruction for row in np.flatnonzero(dataset.held_out)}
    assert len(held) == 3 * config.data.eval_size
    for phase in dataset.phases:
        assert not held & {dataset.records[row].turns[0].instruction for row in phase.rows}


def test_bundled_quickstart_files_are_what_their_script_makes():
    sys.path.insert(0, str(ROOT / "configs/quickstart"))
    try:
        import generate
    finally:
        sys.path.pop(0)
    for path, text in generate.files().items():
        assert (ROOT / "configs/quickstart" / path).read_text(encoding="utf-8") == text, path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__learning_rate": 2e-3}, "training.learning_rate: the run in"),
        ({"seed": 8}, "seed: the run in"),
        ({"curriculum__arm": "random"}, "curriculum.arm: the run in"),
    ],
)
def test_a_run_is_not_continued_with_settings_that_would_change_it(rows, undisturbed, changes, message):
    with pytest.raises(UserError, match=message):
        loop.prepare(make_config(rows, undisturbed, **changes))


@pytest.mark.parametrize("change", [("Repeat", "Reverse"), ('"score": "1', '"score": "4')])
def test_a_run_is_not_continued_with_other_data_or_other_scores(rows, undisturbed, change):
    text = rows.read_text()
    try:
        rows.write_text(text.replace(*change, 1))
        with pytest.raises(UserError, match=r"data\.path: rows, scores or bins have changed"):
            train(make_config(rows, undisturbed))
    finally:
        rows.write_text(text)


def test_results_without_a_checkpoint_are_no_silent_start_at_zero(rows, undisturbed, tmp_path):
    shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match="was saved and is gone"):
        train(make_config(rows, tmp_path / "run"))


def test_what_a_killed_save_or_removal_leaves_is_no_checkpoint(rows, undisturbed, tmp_path):
    """Remains of a save go; a checkpoint that was half removed is not looked at."""
    shutil.copytree(undisturbed, tmp_path / "run")
    (tmp_path / "run/checkpoints/3-hard/99.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "run/checkpoints/3-hard/100").mkdir()
    train(make_config(rows, tmp_path / "run"))
    assert not list((tmp_path / "run/checkpoints").rglob("*.orbax-checkpoint-tmp"))
    assert_same_result(tmp_path / "run", undisturbed)


def test_weights_that_do_not_load_are_found_before_anything_is_written(rows, undisturbed, tmp_path):
    shutil.copytree(undisturbed / "hf/3-hard", tmp_path / "model")
    whole = (tmp_path / "model/model.safetensors").read_bytes()
    (tmp_path / "model/model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match="is cut off or damaged"):
        loop.prepare(make_config(rows, tmp_path / "run", model__init="pretrained", model__model_name_or_path=str(tmp_path / "model")))
    assert not (tmp_path / "run").exists()


def test_a_folder_that_holds_something_else_is_left_alone(rows, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        loop.prepare(make_config(rows, tmp_path / "run"))


def test_what_would_fail_later_is_refused_before_anything_is_written(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"logging\.report_to: wandb needs `pip install wandb`"):
        loop.prepare(make_config(rows, tmp_path / "run", logging__report_to=["wandb"]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="output_dir: cannot write"):
        loop.prepare(make_config(rows, tmp_path / "file" / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_profile_writes_a_trace_of_the_steps_asked_for(rows, tmp_path):
    run = loop.prepare(make_config(rows, tmp_path / "run", curriculum__order=[1], training__max_steps=3, data__eval_size=0))
    loop.train(run, train_verb.Results(ForgettingMatrix(run.output / "forgetting.json")), profile=(1, 2))
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))


def _start(config_path: Path, log: Path) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}  # the user's cache is all tests'
    with open(log, "a") as out:
        return subprocess.Popen([sys.executable, "-m", "phased_ift_jax.train", str(config_path)], cwd=ROOT, env=environment, stdout=out, stderr=out)


def _wait_for_steps(output: Path, process: subprocess.Popen, steps: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (output / "metrics.jsonl").exists() and len((output / "metrics.jsonl").read_text().splitlines()) >= steps:
            return
        time.sleep(0.02)


def test_killed_and_asked_to_stop_the_same_command_goes_on(rows, tmp_path):
    """A process killed (-9) mid-phase and then asked to stop (SIGTERM: exit 75) ends where an undisturbed one does."""
    for name in ("alone", "run"):
        (tmp_path / f"{name}.yaml").write_text(config_module.dump(make_config(rows, tmp_path / name, training__num_train_epochs=12, checkpoint__save_steps=8)))
    log = tmp_path / "log"
    alone = _start(tmp_path / "alone.yaml", log)
    assert alone.wait(240) == 0, log.read_text()

    killed = _start(tmp_path / "run.yaml", log)
    _wait_for_steps(tmp_path / "run", killed, 20)
    killed.kill()
    assert killed.wait(60) == -signal.SIGKILL, log.read_text()

    stopped = _start(tmp_path / "run.yaml", log)
    done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    _wait_for_steps(tmp_path / "run", stopped, done + 15)
    stopped.send_signal(signal.SIGTERM)
    assert stopped.wait(120) == 75, log.read_text()

    assert _start(tmp_path / "run.yaml", log).wait(240) == 0, log.read_text()
    assert "going on from" in log.read_text()
    assert_same_result(tmp_path / "run", tmp_path / "alone")


def test_the_verb_prints_the_plan_before_it_trains(rows, tmp_path, capsys):
    config = make_config(rows, tmp_path / "run", evaluation__exact_match=True, evaluation__max_new_tokens=2, training__num_train_epochs=1)
    (tmp_path / "run.yaml").write_text(config_module.dump(config))
    assert train_verb.main([str(tmp_path / "run.yaml")]) == 0
    told = capsys.readouterr().out
    for fact in ("100 rows read = 100 used whole", "1-easy", "lr peak", "budget", "optimizer reset, schedule restarts", "exact match after", "loss after", "expected", "done:"):
        assert fact in told, fact
    assert told.index("budget") < told.index("before training")


@pytest.mark.parametrize("changes", [{}, {"training__gradient_accumulation_steps": 2}, {"data__packing": False}])
def test_a_phase_compiles_its_steps_before_the_first_and_none_in_between(rows, tmp_path, monkeypatch, changes):
    """Every row length that occurs, and only those; so a request to stop never waits for a compilation with steps unsaved."""
    compiled, at = [], []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None)
    run = loop.prepare(make_config(rows, tmp_path / "run", data__eval_size=0, checkpoint__save_steps=None, **changes))
    ahead, real_put, real_compile = [], loop.put, Trainer.compile_step

    def put(tree, dims, mesh):
        if dims == loop.BATCH_DIMS:
            at.append((len(compiled), tree.tokens_BT.shape))
        return real_put(tree, dims, mesh)

    def compile_step(self, rows, length, parts):
        ahead.append((parts, rows // parts, length))
        real_compile(self, rows, length, parts)

    monkeypatch.setattr(loop, "put", put)
    monkeypatch.setattr(Trainer, "compile_step", compile_step)
    loop.train(run, train_verb.Results(ForgettingMatrix(run.output / "forgetting.json")))
    assert {shape for _, shape in at} == set(ahead)
    begin = 0
    for phase in run.plan.phases:
        counts = [count for count, _ in at[begin : begin + len(phase.steps)]]
        assert counts[0] == counts[-1], "compilations within a phase"
        begin += len(phase.steps)


def test_a_restart_continues_its_run_at_wandb_and_a_fresh_start_does_not(rows, tmp_path, monkeypatch):
    """Held against a stand-in for the package, which needs an account: what it is told, at the start of the run, of its restart, of a fresh one."""
    told, logged = [], []

    class Begun:
        def log(self, numbers, step):
            logged.append((step, numbers["loss"]))

        def finish(self):
            pass

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **options: told.append(options) or Begun(), __spec__=types.SimpleNamespace()))
    config = make_config(rows, tmp_path / "run", logging__report_to=["wandb"], curriculum__order=[1], training__max_steps=4, data__eval_size=0)
    with monkeypatch.context() as patch:
        crash_in_step(patch, 4)
        with pytest.raises(Crash):
            train(config)
    train(config)
    assert [options["id"] for options in told] == [told[0]["id"]] * 2
    assert {options["resume"] for options in told} == {"allow"}
    assert [step for step, _ in logged] == [1, 2, 3, 4]
    begin_afresh(config)
    train(config)
    assert told[2]["id"] != told[0]["id"]
    begin_afresh(config)
    monkeypatch.setenv("WANDB_RUN_ID", "mine")
    train(config)
    assert told[3]["id"] == "mine"


def test_tensorboard_has_every_step_that_a_checkpoint_has(rows, tmp_path):
    """A process may leave at once when all is saved: what is settled is on the disk, not in a queue."""
    from tensorboardX.proto.event_pb2 import Event

    books = Books(tmp_path, make_config(rows, tmp_path).logging, (0, 0), {})
    for step in range(1, 6):
        books.write({"phase": "easy", "phase_index": 1, "step": step, "global_step": step, "loss": 1.0 / step, "seconds": 0.1}, ["1"])
    books.settle()
    [file] = (tmp_path / "tensorboard").rglob("events.*")
    content, at, steps = file.read_bytes(), 0, set()
    while at < len(content):  # TFRecord: length, its CRC, the event, its CRC
        length = int.from_bytes(content[at : at + 8], "little")
        event = Event.FromString(content[at + 12 : at + 12 + length])
        steps |= {event.step for value in event.summary.value if value.tag == "loss"}
        at += 16 + length
    assert steps == {1, 2, 3, 4, 5}
    books.close()

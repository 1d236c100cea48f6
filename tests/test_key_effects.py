"""Every key of a run does something: a key that is read by nothing is a promise that is broken in silence."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from phased_ift_jax import config as config_module
from phased_ift_jax import interrupts, xla_flags
from phased_ift_jax.data import readers
from phased_ift_jax.data.packing import Shapes, pack
from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
from phased_ift_jax.models import hf_folder
from phased_ift_jax.records import PackedBatch, UserError
from phased_ift_jax.sharding import make_mesh, put
from phased_ift_jax.train import Results
from phased_ift_jax.training import held_out, loop
from phased_ift_jax.training.checkpoint import Checkpoints
from phased_ift_jax.training.step import Trainer
from phased_ift_jax.training.survey import describe

pytestmark = pytest.mark.usefixtures("compilation_cache")
ROOT = Path(__file__).parent.parent
QUICK = ROOT / "configs/quickstart"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("keys")
    rows = (QUICK / "data.jsonl").read_text().splitlines(keepends=True)[:60]
    (folder / "a.jsonl").write_text("".join(rows))
    triples = [{"instruction": "Repeat: a b", "input": "", "output": " ".join("abcdefgh"[: 2 + i % 4])} for i in range(40)]
    (folder / "raw.json").write_text(json.dumps(triples))
    (folder / "b.jsonl").write_text("".join(rows[:50]))
    wide = [{"id": str(i), "score": "1", "data": ["Repeat:" + " a" * (4 if i < 16 else 150), "a"]} for i in range(32)]
    (folder / "wide.jsonl").write_text("".join(json.dumps(row) + "\n" for row in wide))
    (folder / "phases.json").write_text(json.dumps({"bins": [{"name": n, "ids": [f"quickstart-{i:05d}" for i in range(s, s + 20)]} for n, s in (("x", 0), ("y", 20), ("z", 40))]}))
    return {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(QUICK / "model"), "init": "random", "dtype": "float32"},
        "data": {"path": str(folder / "a.jsonl"), "max_length": 64, "eval_size": 2},
        "curriculum": {"bins": {"by": "score", "thresholds": [1.5, 3.5]}},
        "training": {"num_train_epochs": 2, "global_batch_size": 8},
        "folder": str(folder),
    }


def changed(base: dict, changes: dict) -> config_module.RunConfig:
    tree = json.loads(json.dumps(base))
    folder = tree.pop("folder")
    for key, value in changes.items():
        node = tree
        *path, last = key.split(".")
        for part in path:
            node = node.setdefault(part, {})
        node[last] = json.loads(json.dumps(value).replace("FOLDER", folder))
    return config_module.RunConfig.model_validate(tree)


def observe(config: config_module.RunConfig, what: str) -> object:
    """One of: the printed plan, the lowered step, the first batch, the learning rates, the held-out rows."""
    run = loop.prepare(config)
    phase = run.plan.phases[0]
    if what == "plan":
        return describe(run, "cpu")
    if what == "rates":
        return [p.learning_rates.tolist() for p in run.plan.phases]
    if what == "held out":
        return np.flatnonzero(run.dataset.held_out).tolist()
    batch = next(iter(loop.batches(phase.steps, 0, run.dataset.examples, phase.shapes, phase.training.gradient_accumulation_steps)))
    if what == "batch":
        return batch.tokens_BT.tolist()
    trainer = run.trainer(phase)
    return trainer.step.lower(trainer.shapes, put(batch, "ABT", run.mesh), np.float32(0)).as_text()


WIDE = {
    "data.path": "FOLDER/wide.jsonl",
    "data.max_length": 512,
    "data.packing": False,
    "curriculum.bins": {"by": "file"},
    "training.global_batch_size": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 8,
}
ONLY_SCORED = {"curriculum.bins": {"by": "score", "quantiles": [0.2, 0.6]}}
# key: (what is observed, the change[, what both sides share])
PREPARED = {
    "seed": ("batch", {"seed": 1}),
    "model.param_dtype": ("step", {"model.param_dtype": "bfloat16"}),
    "model.dtype": ("step", {"model.dtype": "bfloat16"}),
    "model.attn_implementation": ("step", {"model.attn_implementation": "reference"}),
    "model.gradient_checkpointing": ("step", {"model.gradient_checkpointing": "full"}),
    "data.path": ("plan", {"data.path": "FOLDER/b.jsonl"}),
    "data.prompt_template": ("batch", {"data.prompt_template": "user_assistant"}),
    "data.max_length": ("plan", {"data.max_length": 13}, {"data.max_quarantined": 1.0}),
    "data.truncation": ("plan", {"data.truncation": "quarantine"}, {"data.max_length": 13, "data.max_quarantined": 1.0, "data.eval_size": 0}),
    "data.packing": ("plan", {"data.packing": False}),
    "data.packing_shapes": ("plan", {"data.packing_shapes": 1}, WIDE),
    "data.eval_size": ("held out", {"data.eval_size": 3}),
    "data.eval_seed": ("held out", {"data.eval_seed": 1}),
    "data.eval_bins": ("held out", {"data.eval_bins": {"by": "length", "thresholds": [4]}}),
    "data.sample_size": ("plan", {"data.sample_size": 30}),
    "curriculum.arm": ("plan", {"curriculum.arm": "one_off"}),
    "curriculum.bins.by": ("plan", {"curriculum.bins": {"by": "length", "thresholds": [1.5, 3.5]}}, {"data.eval_size": 0, "curriculum.order": [2]}),
    "curriculum.bins.thresholds": ("plan", {"curriculum.bins.thresholds": [2.0, 3.5]}, {"data.eval_size": 0}),
    "curriculum.bins.quantiles": ("plan", ONLY_SCORED),
    "curriculum.bins.from": ("plan", {"curriculum.bins": {"from": "FOLDER/phases.json"}}),
    "curriculum.bins.names": ("plan", {"curriculum.bins.names": ["a", "b", "c"]}),
    "curriculum.order": ("plan", {"curriculum.order": [3, 1, 2]}),
    "curriculum.phases": ("plan", {"curriculum.phases": [{"name": "only", "bins": [2]}]}),
    "curriculum.optimizer_state": ("plan", {"curriculum.optimizer_state": "keep"}),
    "curriculum.lr_schedule": ("rates", {"curriculum.lr_schedule": "continue"}),
    "training.num_train_epochs": ("plan", {"training.num_train_epochs": 1}),
    "training.max_steps": ("plan", {"training.max_steps": 3}),
    "training.global_batch_size": ("plan", {"training.global_batch_size": 4}),
    "training.gradient_accumulation_steps": ("step", {"training.gradient_accumulation_steps": 2}),
    "training.learning_rate": ("rates", {"training.learning_rate": 1e-2}),
    "training.lr_scheduler_type": ("rates", {"training.lr_scheduler_type": "linear"}),
    "training.warmup_ratio": ("rates", {"training.warmup_ratio": 0.5}),
    "training.optim": ("step", {"training.optim": "sgd"}),
    "training.weight_decay": ("step", {"training.weight_decay": 0.5}),
    "training.adam_beta1": ("step", {"training.adam_beta1": 0.5}),
    "training.adam_beta2": ("step", {"training.adam_beta2": 0.5}),
    "training.adam_epsilon": ("step", {"training.adam_epsilon": 1e-3}),
    "training.on_nonfinite": ("step", {"training.on_nonfinite": "skip"}),
    "training.max_grad_norm": ("step", {"training.max_grad_norm": 0.25}),
    "mesh.data": ("plan", {"mesh.data": 2}),
    "mesh.fsdp": ("plan", {"mesh.fsdp": 4, "mesh.tensor": -1}),
    "mesh.tensor": ("plan", {"mesh.tensor": 4}),
}
# keys whose effect is looked at by a test of its own, below
OWN_TEST = {
    "output_dir",
    "model.model_name_or_path",
    "model.revision",
    "model.init",
    "data.split",
    "data.append_period",
    "data.max_quarantined",
    "checkpoint.save_minutes",
    "checkpoint.save_steps",
    "checkpoint.save_total_limit",
    "evaluation.exact_match",
    "evaluation.max_new_tokens",
    "evaluation.show_answers",
    "logging.logging_steps",
    "logging.report_to",
    "logging.run_name",
    "logging.hang_minutes",
    "training.deterministic",
    "training.adam_mu_dtype",
    "training.gradient_dtype",
    "export.after_each_phase",
    "export.dtype",
    "export.data_license",
    "export.push_to_hub",
    "export.hub_model_id",
}


def test_every_key_has_an_effect_test():
    assert set(PREPARED) | OWN_TEST == {key for key, _, _ in config_module.fields()}
    assert not set(PREPARED) & OWN_TEST


@pytest.mark.parametrize("key", PREPARED)
def test_key_changes_what_is_done(base, key):
    what, changes, *shared = PREPARED[key]
    shared = shared[0] if shared else {}
    if key == "data.prompt_template":  # the quickstart's tokenizer knows one template's words only: any other must at least be noticed
        with pytest.raises(UserError, match="the tokenizer does not know"):
            loop.prepare(changed(base, {"data.prompt_template": "alpaca"}))
        return
    assert observe(changed(base, shared), what) != observe(changed(base, shared | changes), what)


def train(config: config_module.RunConfig) -> tuple[loop.Run, dict]:
    run = loop.prepare(config)
    told: dict[str, held_out.Evaluation] = {}

    class Told(Results):
        def add(self, after, evaluation):
            super().add(after, evaluation)
            told[after] = evaluation

    loop.train(run, Told(ForgettingMatrix(run.output / "forgetting.json")))
    return run, told


SHORT = {"curriculum.order": [1, 2], "training.num_train_epochs": 1, "data.eval_size": 1}


def test_output_dir_and_the_defaults_of_a_run(base, tmp_path):
    _, told = train(changed(base, SHORT | {"output_dir": str(tmp_path / "here")}))
    written = {"checkpoints", "config.yaml", "forgetting.json", "hf", "metrics.jsonl", "newest_checkpoint", "plan.json", "quarantine.jsonl", "tensorboard"}
    assert {path.name for path in (tmp_path / "here").iterdir()} == written | {"trained_ids.jsonl", "seconds.jsonl", "starts.jsonl", ".lock"}
    assert not told["base"].answers
    assert len(list((tmp_path / "here/hf").iterdir())) == 2
    assert json.loads((tmp_path / "here/hf/1-stage1/config.json").read_text())["torch_dtype"] == "float32"


def test_logging_keys(base, tmp_path):
    output = tmp_path / "run"
    run, _ = train(changed(base, SHORT | {"output_dir": str(output), "logging.logging_steps": 2, "logging.report_to": ["tensorboard"], "logging.run_name": "mine"}))
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert steps == [step for phase in run.plan.phases for step in range(1, len(phase.steps) + 1) if step % 2 == 0 or step == len(phase.steps)]
    assert list((output / "tensorboard/mine").glob("events*"))


def test_export_keys_and_evaluation_keys(base, tmp_path):
    output = tmp_path / "run"
    changes = {"output_dir": str(output), "export.after_each_phase": False, "export.dtype": "bfloat16", "evaluation.exact_match": True, "evaluation.max_new_tokens": 3}
    changes |= {"export.data_license": "CC BY-NC 4.0"}
    _, told = train(changed(base, SHORT | changes))
    assert [path.name for path in (output / "hf").iterdir()] == ["2-stage2"]
    assert json.loads((output / "hf/2-stage2/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert "licence: CC BY-NC 4.0" in (output / "hf/2-stage2/README.md").read_text()
    answers = [answer.answer for evaluation in told.values() for found in evaluation.answers.values() for answer in found]
    assert answers
    assert max(len(answer.split()) for answer in answers) <= 3


@pytest.mark.parametrize(
    ("given", "after"),
    [(None, "--xla_gpu_deterministic_ops=true"), ("--a=b", "--a=b --xla_gpu_deterministic_ops=true"), ("--xla_gpu_deterministic_ops=true", ...)],
)
def test_deterministic(monkeypatch, given, after):
    """It is XLA's own flag, told before JAX is there; what the user has told it stays, and a contradiction is refused."""
    monkeypatch.setattr(xla_flags, "CPU", {})
    if given is None:
        monkeypatch.delenv("XLA_FLAGS", raising=False)
    else:
        monkeypatch.setenv("XLA_FLAGS", given)
    xla_flags.set_flags(deterministic=False)
    assert os.environ.get("XLA_FLAGS") == given
    xla_flags.set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == (given if after is ... else after)
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_deterministic_ops=false")
    with pytest.raises(UserError, match=r"training\.deterministic: XLA_FLAGS has --xla_gpu_deterministic_ops=false; take it out"):
        xla_flags.set_flags(deterministic=True)


@pytest.fixture
def trained_with(base) -> Iterator[Callable[..., tuple[Trainer, PackedBatch, dict]]]:
    """A trainer on one device, compiled quickly, a batch in so many parts, and weights that bfloat16 holds exactly."""
    jax.config.update("jax_disable_most_optimizations", True)

    def make(parts: int, **training: object) -> tuple[Trainer, PackedBatch, dict]:
        run = loop.prepare(changed(base, {"training.global_batch_size": 32}))
        phase = run.plan.phases[0]
        trainer = dataclasses.replace(run.trainer(phase), mesh=make_mesh(config_module.MeshConfig(), jax.devices()[:1]))
        trainer = dataclasses.replace(trainer, training=trainer.training.model_copy(update=training))
        batch = pack([run.dataset.examples[row] for row in phase.steps[0]], Shapes(parts, (64,)), parts)
        return trainer, batch, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(jnp.float32), trainer.init_params(0))

    yield make
    jax.config.update("jax_disable_most_optimizations", False)


def test_adam_mu_dtype(trained_with):
    """Law: the first moment alone is held in it, rounded after its use: the first step's weights are the same."""
    found = {}
    for dtype in (None, "bfloat16"):
        trainer, batch, params = trained_with(1, adam_mu_dtype=dtype)
        state, _ = trainer.step(trainer.fresh(params), put(batch, "ABT", trainer.mesh), np.float32(1e-3))
        [found[dtype]] = [(part.mu, part.nu, state.params) for part in state.opt_state if isinstance(part, optax.ScaleByAdamState)]
    dtypes = [{leaf.dtype.name for leaf in jax.tree.leaves(tree)} for tree in found["bfloat16"]]
    assert dtypes == [{"bfloat16"}, {"float32"}, {"float32"}]
    for (mu, *rest), (narrow_mu, *narrow_rest) in zip(*(zip(*map(jax.tree.leaves, found[dtype]), strict=True) for dtype in (None, "bfloat16")), strict=True):
        np.testing.assert_allclose(narrow_mu.astype(np.float32), mu, rtol=2**-8, atol=1e-12)
        for wide, narrow in zip(rest, narrow_rest, strict=True):
            np.testing.assert_allclose(narrow, wide, rtol=1e-6, atol=1e-12)


def test_gradient_dtype(trained_with):
    """Law: each part's gradient is rounded to it, and the parts are added up in float32: off by at most half a unit of bfloat16's last
    place of each part's share. The embedding's, in which the occurrences of a token are added up, stays wide, and so does the state."""
    trainer, batch, params = trained_with(8, gradient_dtype="bfloat16")
    wide_trainer, *_ = trained_with(8)
    loss, gradients = trainer.loss_and_gradients(params, put(batch, "ABT", trainer.mesh))
    wide_loss, wide = wide_trainer.loss_and_gradients(params, put(batch, "ABT", trainer.mesh))
    np.testing.assert_allclose(loss, wide_loss, rtol=1e-6)
    shares = jax.tree.map(np.zeros_like, wide)
    for part in range(8):
        alone = jax.tree.map(lambda array, part=part: array[part : part + 1], batch)
        share = alone.weights_BT.sum() / batch.weights_BT.sum()
        gradient = wide_trainer.loss_and_gradients(params, put(alone, "ABT", trainer.mesh))[1]
        shares = jax.tree.map(lambda total, more, share=share: total + np.abs(np.asarray(more) * share), shares, gradient)
    for (path, got), want, share in zip(jax.tree.leaves_with_path(gradients), jax.tree.leaves(wide), jax.tree.leaves(shares), strict=True):
        assert got.dtype == jnp.float32
        off, name = np.abs(np.asarray(got) - np.asarray(want)), jax.tree_util.keystr(path)
        half = 0 if "embed" in name else 2**-8
        assert (off <= half * share + 1e-6 * share.max()).all(), name
        assert (off.max() > 1e-5 * share.max()) == bool(half), name
    one = jax.eval_shape(trainer.loss_and_gradients, params, jax.tree.map(lambda array: array[:1], batch))[1]
    assert {(name == "embed", leaf.dtype.name) for name, leaves in one.items() for leaf in jax.tree.leaves(leaves)} == {(True, "float32"), (False, "bfloat16")}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(trainer.shapes)} == {"float32", "int32"}


@pytest.mark.parametrize(("key", "value"), [("adam_mu_dtype", "bfloat16"), ("gradient_dtype", "bfloat16"), ("deterministic", True)])
def test_what_holds_for_a_whole_run_no_phase_may_change(base, key, value):
    with pytest.raises(ValueError, match=f"phase 'odd': {key} holds for a whole run; set training.{key}"):
        changed(base, {"curriculum.phases": [{"name": "odd", "bins": [1], key: value}]})


def test_xla_knows_the_flags_it_is_told():
    """XLA ends a process whose flags it does not know."""
    program = "from phased_ift_jax.xla_flags import set_flags; set_flags(True); import jax; print(jax.jit(lambda x: x + 1)(1))"
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120).stdout == "2\n"


def test_hang_minutes(base, tmp_path, monkeypatch):
    armed = []
    monkeypatch.setattr(interrupts.faulthandler, "dump_traceback_later", lambda seconds, **_: armed.append(seconds))
    train(changed(base, SHORT | {"output_dir": str(tmp_path / "a"), "logging.hang_minutes": 7}))
    assert set(armed) == {420}
    assert len(armed) > 4, "once at the start, and at every step"
    armed.clear()
    train(changed(base, SHORT | {"output_dir": str(tmp_path / "b"), "logging.hang_minutes": None}))
    assert not armed


def test_hub_keys(base, tmp_path, monkeypatch):
    """Nothing is uploaded unless asked for; then it is the last phase's folder, under the name given, after all is on the disk."""
    sent = []
    monkeypatch.setattr(loop.hub, "push", lambda folder, name: sent.append((folder, name)) or "address")
    config = changed(base, SHORT | {"output_dir": str(tmp_path / "run"), "export.hub_model_id": "owner/model"})
    assert loop.publish(loop.prepare(config)) is None
    asked = changed(base, SHORT | {"output_dir": str(tmp_path / "run"), "export.hub_model_id": "owner/model", "export.push_to_hub": True})
    assert loop.publish(loop.prepare(asked)) == "address"
    assert sent == [(tmp_path / "run/hf/2-stage2", "owner/model")]
    with pytest.raises(ValueError, match="push_to_hub needs hub_model_id"):
        changed(base, {"export.push_to_hub": True})


def test_show_answers(base, tmp_path, capsys):
    from phased_ift_jax import train as verb

    shown = []
    for count in (0, 1):
        path = tmp_path / f"{count}.yaml"
        changes = {"output_dir": str(tmp_path / str(count)), "evaluation.exact_match": True, "evaluation.show_answers": count, "evaluation.max_new_tokens": 1}
        path.write_text(config_module.dump(changed(base, SHORT | changes)))
        verb.main([str(path)])
        shown.append(capsys.readouterr().out.count("answered"))
    assert shown == [0, 3]


@pytest.mark.parametrize(
    ("changes", "kept", "saved"),
    [
        ({"save_minutes": None, "save_steps": None}, 0, 0),
        ({"save_minutes": 1e-9, "save_steps": None, "save_total_limit": 1}, 1, 4),
        ({"save_minutes": None, "save_steps": 2, "save_total_limit": 1}, 1, 2),
        ({"save_minutes": None, "save_steps": 1, "save_total_limit": 3}, 3, 4),
    ],
)
def test_checkpoint_keys(base, tmp_path, monkeypatch, changes, kept, saved):
    """How often a phase of five steps is saved within, and how many of those lie there just before its end."""
    seen = []
    real = Checkpoints.save

    def save(store, folder, position, tree):
        if position.complete:
            store.wait()
            seen.append(len([1 for found, _ in store.committed() if not found.complete]))
        else:
            seen.append("within")
        real(store, folder, position, tree)

    monkeypatch.setattr(Checkpoints, "save", save)
    train(changed(base, {"curriculum.order": [1], "training.max_steps": 5, "output_dir": str(tmp_path / "run"), "checkpoint": changes}))
    assert seen.count("within") == saved
    assert seen[-1] == kept


def test_max_quarantined(base):
    limits = {"data.max_length": 13, "data.truncation": "quarantine", "data.eval_size": 0}
    with pytest.raises(UserError, match=r"more than data\.max_quarantined 0\.01 allows"):
        loop.prepare(changed(base, limits))
    loop.prepare(changed(base, limits | {"data.max_quarantined": 1.0}))


@pytest.mark.parametrize(
    ("asked", "platform", "printed"),
    [
        ("auto", None, "attention auto"),
        ("auto", "tpu", "attention splash"),
        ("auto", "gpu", "attention xla (cudnn computes in bfloat16 or float16, not in float32)"),
        ("cudnn", "cpu", "attention xla (cudnn is for NVIDIA GPUs, and this is cpu)"),
        ("splash", "cpu", "attention splash"),
    ],
)
def test_the_attention_kernel_is_printed_and_why_it_is_another_than_asked_for(base, asked, platform, printed):
    run = dataclasses.replace(loop.prepare(changed(base, {"model.attn_implementation": asked})), platform=platform)
    assert describe(run, "cpu").splitlines()[0].endswith(printed)


def test_split_and_append_period_reach_the_reader(base, monkeypatch):
    seen = []
    real = readers.read
    monkeypatch.setattr(readers, "read", lambda path, split, period: seen.append((split, period)) or real(path, split, False))
    loop.prepare(changed(base, {"data.split": "validation", "data.append_period": True}))
    assert seen == [("validation", True)]


def test_model_keys(base, tmp_path, monkeypatch):
    """Folder or hub name, its revision, and whether its weights are wanted."""
    import huggingface_hub

    seen = []

    def snapshot(name, revision, allow_patterns, **_):
        seen.append((name, revision, "*.safetensors" in allow_patterns))
        return str(QUICK / "model")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert hf_folder.open_folder("org/name", "v1").path == QUICK / "model"
    loop.prepare(changed(base, {"model.model_name_or_path": "org/name", "model.revision": "v2"}))
    assert seen == [("org/name", "v1", True), ("org/name", "v2", False)]
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        loop.prepare(changed(base, {"model.init": "pretrained"}))

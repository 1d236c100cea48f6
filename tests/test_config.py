"""Configuration and command line: what is not understood is refused in one line that names it, and what is understood survives a round trip."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml

from phased_ift_jax import arms, cli, config, train
from phased_ift_jax.config import FOREIGN_KEYS, RunConfig
from phased_ift_jax.records import UserError

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted([*ROOT.glob("configs/experiments/*.yaml"), *ROOT.glob("configs/paper/*.yaml")])
CONFIGS = sorted({*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("tests/configs/**/*.yaml")} - {*EXPERIMENTS})
KEYS = {name: (default, description) for name, default, description in config.fields()}
RUN: dict[str, Any] = {
    "output_dir": "out",
    "model": {"model_name_or_path": "folder"},
    "data": {"path": "rows.jsonl"},
    "curriculum": {"bins": {"by": "score", "thresholds": [1.5, 3.5]}},
}


@pytest.fixture
def yaml_file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "run.yaml")

    return write


@pytest.fixture
def load(yaml_file: Callable[[str], str]) -> Callable[..., RunConfig]:
    return lambda *overrides: config.load(yaml_file(yaml.safe_dump(RUN)), overrides)


@pytest.fixture
def fault(load: Callable[..., RunConfig]) -> Callable[..., str]:
    """The one line that a run with these overrides is refused with."""

    def line(*overrides: tuple[str, str]) -> str:
        with pytest.raises(UserError) as caught:
            load(*overrides)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return line


def value_of(run: RunConfig, key: str) -> object:
    value: Any = run
    for name in key.split("."):
        value = getattr(value, {"from": "from_"}.get(name, name))
    return value


# --- reading ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_dumped_run_loads_as_the_same_run(path: Path, yaml_file: Callable[[str], str]) -> None:
    run = config.load(path)
    assert config.load(yaml_file(config.dump(run))) == run


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_dumped_experiment_loads_as_the_same_experiment(path: Path, yaml_file: Callable[[str], str]) -> None:
    experiment = arms.load(str(path), [("evaluation.judging.model", "a-judge")] if path.parent.name == "paper" else ())  # whose judge is the user's to name
    assert arms.load(yaml_file(arms.dump(experiment))) == experiment


def test_a_dumped_run_holds_every_key(load: Callable[..., RunConfig]) -> None:
    tree = yaml.safe_load(config.dump(load()))
    for key in KEYS:
        value = tree
        for name in key.split("."):
            assert name in value, key
            value = value[name]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("output_dir", "runs/a-b", "runs/a-b"),
        ("seed", "7", 7),
        ("training.learning_rate", "1e-5", 1e-5),  # YAML 1.1 takes these three for texts
        ("training.adam_epsilon", "1e-8", 1e-8),
        ("checkpoint.save_minutes", "5e-1", 0.5),
        ("checkpoint.save_minutes", "null", None),
        ("training.max_steps", "-1", -1),
        ("data.packing", "false", False),
        ("data.path", "[a.jsonl, b.json]", ("a.jsonl", "b.json")),
        ("data.prompt_template", "alpaca", "alpaca"),
        ("curriculum.order", "[3, [1, 2]]", (3, (1, 2))),
        ("curriculum.bins.thresholds", "[1e0, 2, 3.5]", (1.0, 2.0, 3.5)),
        ("logging.report_to", "[tensorboard]", ("tensorboard",)),
        ("model.gradient_checkpointing", "none", "none"),
    ],
)
def test_every_kind_of_value_may_be_a_flag(key: str, text: str, value: object, load: Callable[..., RunConfig], yaml_file: Callable[[str], str]) -> None:
    run = load((key, text))
    assert value_of(run, key) == value
    assert type(value_of(run, key)) is type(value)
    assert config.load(yaml_file(config.dump(run))) == run


def test_the_last_flag_wins_and_others_stay(load: Callable[..., RunConfig]) -> None:
    run = load(("training.learning_rate", "1"), ("training.learning_rate", "2"))
    assert run == load().model_copy(update={"training": load().training.model_copy(update={"learning_rate": 2.0})})


def test_a_phase_may_override_training_keys(load: Callable[..., RunConfig], fault: Callable[..., str], yaml_file: Callable[[str], str]) -> None:
    run = load(("curriculum.phases", "[{name: a, bins: [1], learning_rate: 1e-3}, {name: b, bins: [2, 3], replay: 0.5}]"))
    assert run.curriculum.phases is not None
    assert [set(phase.overrides) for phase in run.curriculum.phases] == [{"learning_rate"}, set()]
    assert config.load(yaml_file(config.dump(run))) == run
    assert fault(("curriculum.phases", "[{name: a, bins: [1], learning_rte: 1e-3}]")).endswith("'a': unknown key training.learning_rte; did you mean training.learning_rate?")
    assert "'a': unknown key training.lr: `lr` is `training.learning_rate`" in fault(("curriculum.phases", "[{name: a, bins: [1], lr: 1e-3}]"))
    assert re.search("'a': training.learning_rate: .*'fast'", fault(("curriculum.phases", "[{name: a, bins: [1], learning_rate: fast}]")))
    assert "max_steps 0" in fault(("curriculum.phases", "[{name: a, bins: [1], max_steps: 0}]"))


def test_models_are_frozen(load: Callable[..., RunConfig]) -> None:
    run = load(("curriculum.phases", "[{name: a, bins: [1]}]"))
    assert run.curriculum.phases
    for model, name in ((run, "seed"), (run.training, "learning_rate"), (run.curriculum.bins, "by"), (run.curriculum.phases[0], "replay")):
        with pytest.raises(pydantic.ValidationError, match="frozen"):
            setattr(model, name, 1)


# --- refusing --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("training.learning_rte", "did you mean training.learning_rate?"),
        ("sed", "did you mean seed?"),
        ("data.packng", "did you mean data.packing?"),
        ("curriculum.bins.threshold", "did you mean curriculum.bins.thresholds?"),
        ("curriculum.bins.from_", "did you mean curriculum.bins.from?"),
        ("learning_rate", "did you mean training.learning_rate?"),  # right name, wrong place
        ("mesh.data_parallel", "known here: data, fsdp, tensor"),
        ("training.mesh", "its keys are mesh.data, mesh.fsdp, mesh.tensor"),
        ("data.union", ""),  # pydantic's own words for a place look like these two
        ("functional", ""),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_in_yaml_and_as_a_flag(key: str, near: str, fault: Callable[..., str], yaml_file: Callable[[str], str]) -> None:
    in_yaml = fault((key, "1"))
    assert in_yaml.startswith(f"unknown key {key}")
    assert in_yaml.endswith(near)
    with pytest.raises(UserError) as caught:
        train.main([yaml_file(yaml.safe_dump(RUN)), f"--{key}", "1"])
    assert str(caught.value) == in_yaml


def test_every_fault_has_its_line(load: Callable[..., RunConfig]) -> None:
    with pytest.raises(UserError) as caught:
        load(("training.learning_rte", "1"), ("training.weight_decay", "much"), ("data.path", "3"), ("curriculum.bins.thresholds", "[a, b]"))
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == [
        "data.path",
        "curriculum.bins.thresholds.0",
        "curriculum.bins.thresholds.1",
        "training.weight_decay",
        "unknown key training.learning_rte; did you mean training.learning_rate?",
    ]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("seed", "abc", "'abc'"),
        ("seed", "-1", "-1"),
        ("seed", "true", "True"),
        ("data.path", "3", "3"),
        ("data.path", "{a: 1}", ""),
        ("data.packing", "maybe", "'maybe'"),
        ("data.max_length", "1", "1"),
        ("data.max_quarantined", "1.5", "1.5"),
        ("training.learning_rate", "fast", "'fast'"),
        ("training.learning_rate", ".nan", "nan"),
        ("training.num_train_epochs", "2.5", "2.5"),
        ("training.max_steps", "yes", "True"),
        ("training", "null", "None"),
        ("model.dtype", "fp16", "'fp16'"),
        ("logging.report_to", "tensorboard", "'tensorboard'"),
        ("curriculum.order", "[[1, a]]", "'a'"),
        ("curriculum.phases", "easy", "'easy'"),
        ("curriculum.bins.names", "[a/b]", "'a/b'"),
    ],
)
def test_a_wrong_value_is_named_with_its_key(key: str, text: str, value: str, fault: Callable[..., str]) -> None:
    line = fault((key, text))
    assert line.startswith(key)
    assert line.endswith(value)


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        ({"curriculum.bins.thresholds": "[3, 2]"}, "curriculum.bins: thresholds must rise, got [3.0, 2.0]; try [2.0, 3.0]"),
        ({"curriculum.bins.thresholds": "[2, 2]"}, "thresholds must rise"),
        ({"curriculum.bins.thresholds": "null"}, "needs exactly one of thresholds and quantiles"),
        ({"curriculum.bins.quantiles": "[0.5]"}, "needs exactly one of thresholds and quantiles"),
        ({"curriculum.bins.by": "null"}, "exactly one of `by"),
        ({"curriculum.bins.from": "phases.json"}, "exactly one of `by"),
        ({"curriculum.bins.by": "file"}, "thresholds goes with `by: score` or `by: length` only"),
        ({"curriculum.bins.names": "[a, a, b]"}, "two bins have the same name"),
        ({"curriculum.bins": "{from: phases.json, names: [a]}"}, "names come from the file"),
        ({"curriculum.order": "[1]", "curriculum.phases": "[{name: a, bins: [1]}]"}, "give order or phases, not both"),
        ({"curriculum.order": "[]"}, "order names no phase"),
        ({"curriculum.phases": "[]"}, "phases names no phase"),
        ({"curriculum.phases": "[{name: a, bins: []}]"}, "curriculum.phases.0.bins"),
        ({"curriculum.phases": "[{name: a, bins: [1]}, {name: a, bins: [2]}]"}, "two phases have the same name"),
        ({"curriculum.phases": "[{bins: [1]}]"}, "curriculum.phases.0.name: missing"),
        ({"training.max_steps": "0"}, "max_steps 0 trains nothing"),
        ({"mesh.data": "-1"}, "at most one is -1; got data -1, fsdp -1, tensor 1"),
        ({"mesh.tensor": "0"}, "axis sizes are positive"),
        ({"mesh.tensor": "-2"}, "mesh.tensor"),
    ],
)
def test_what_contradicts_itself_is_refused(overrides: dict[str, str], complaint: str, fault: Callable[..., str]) -> None:
    assert complaint in fault(*overrides.items())


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("a: [1", "is not YAML"),
        ("- a", "must be a mapping"),
        ("", "must be a mapping"),
        ("output_dir: x\nmodel: {model_name_or_path: y}\ndata: {path: z}\n", "curriculum: missing"),
    ],
)
def test_a_file_that_is_no_run_is_one_line(text: str, complaint: str, yaml_file: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        config.load(yaml_file(text))
    assert "\n" not in str(caught.value)


def test_a_missing_key_says_how_to_give_it(yaml_file: Callable[[str], str]) -> None:
    with pytest.raises(UserError) as caught:
        config.load(yaml_file(yaml.safe_dump({**RUN, "data": {}})))
    assert str(caught.value) == "data.path: missing; give it in the YAML or as --data.path VALUE"


@pytest.mark.parametrize("key", FOREIGN_KEYS)
def test_every_foreign_key_is_answered_with_keys_that_exist(key: str, fault: Callable[..., str], load: Callable[..., RunConfig]) -> None:
    assert key not in RunConfig.model_fields
    assert fault((key, "1")) == f"unknown key {key}: {FOREIGN_KEYS[key]}"
    groups = set(RunConfig.model_fields)
    for quoted in re.findall(r"`([^`]*)`", FOREIGN_KEYS[key]):
        name, _, value = quoted.partition(": ")
        if name == key or name.startswith("python -m "):
            continue
        if name == "tokenizer":
            assert name in config.TEMPLATES
            continue
        assert name in KEYS or name in groups, name
        if value:  # an example must be a value that the key takes
            load((name, value))


# --- the command line --------------------------------------------------------------------------------------------------------------


def parsed(*words: str) -> tuple[dict[str, object], list[tuple[str, str]]]:
    parser = cli.Parser(prog="test")
    parser.add_argument("config")
    parser.add_argument("--fresh", action="store_true")
    options, overrides = cli.parse_with_keys(parser, cli.underscored(words))
    return vars(options), overrides


def test_every_key_has_a_description_and_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--help"])
    helped = " ".join(capsys.readouterr().out.split())
    for key, (default, description) in KEYS.items():
        assert len(description) > 10, key
        assert f"--{key} VALUE {' '.join(description.split())} [{default}]" in helped


def test_hyphens_are_accepted_in_flags_and_left_alone_in_values() -> None:
    assert cli.underscored(["--training.learning-rate", "1e-5", "--output-dir=a-b", "my-run.yaml"]) == ["--training.learning_rate", "1e-5", "--output_dir=a-b", "my-run.yaml"]
    options, overrides = parsed("c-d.yaml", "--training.learning-rate", "1e-5", "--mesh.fsdp", "-1", "--output-dir=a-b")
    assert (options["config"], options["fresh"]) == ("c-d.yaml", False)
    assert sorted(overrides) == [("mesh.fsdp", "-1"), ("output_dir", "a-b"), ("training.learning_rate", "1e-5")]


def test_flags_are_not_abbreviated() -> None:
    with pytest.raises(UserError, match=r"unknown key training.learning; did you mean training.learning_rate\?"):
        train.main([str(ROOT / "configs" / "quickstart.yaml"), "--training.learning", "1"])


def test_every_unknown_flag_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        train.main([str(ROOT / "configs" / "quickstart.yaml"), "--training.learning_rte", "1", "--seed", "2", "--lr=3", "stray"])
    first, second = str(caught.value).splitlines()
    assert first == "unknown key training.learning_rte; did you mean training.learning_rate?"
    assert second.startswith("unknown key lr: `lr` is `training.learning_rate`")


def rows(path: Path, broken: int, whole: int = 60) -> str:
    good = [json.dumps({"instruction": f"Give the first of: {'sfwrmz'[i % 6]}", "output": "s f w", "score": 1 + i % 5}) for i in range(whole)]
    path.write_text("\n".join(["{not json"] * broken + good) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"CONFIG": "absent.yaml"}, "config: cannot read '{tmp}/absent.yaml': No such file or directory; give the path of a YAML file"),
        ({"training.learning_rte": "1"}, "unknown key training.learning_rte; did you mean training.learning_rate?"),
        ({"lr": "1"}, "unknown key lr: `lr` is `training.learning_rate` here"),
        ({"training.learning_rate": "fast"}, "training.learning_rate: input should be a valid number, unable to parse string as a number, got 'fast'"),
        ({"data.path": "{tmp}/row.jsonl"}, "data.path: no such file '{tmp}/row.jsonl'; did you mean '{tmp}/rows.jsonl'?"),
        (
            {"data.path": "{tmp}/broken.jsonl"},
            "2 of 62 rows cannot be used, more than data.max_quarantined 0.01 allows; the first is {tmp}/broken.jsonl:1",
        ),
        ({"curriculum.bins.thresholds": "[3, 2]"}, "curriculum.bins: thresholds must rise, got [3.0, 2.0]; try [2.0, 3.0]"),
        ({"curriculum.bins.thresholds": "[3, 7]"}, "curriculum: phase 'stage3' is empty"),
        ({"data.eval_size": "1000"}, "curriculum: phase 'stage1' is empty"),
        ({"curriculum.order": "[1, 4]"}, "curriculum: phase 2 names bin 4; there are bins 1 to 3"),
        ({"data.prompt_template": "tokenizer"}, "data.prompt_template: this tokenizer has no chat template of its own"),
        ({"model.model_name_or_path": "{tmp}/nothing"}, "model.model_name_or_path: no such folder '{tmp}/nothing'"),
        ({"model.model_name_or_path": "{tmp}"}, "model.model_name_or_path: '{tmp}' has no config.json"),
        ({"profile": "5"}, "--profile: '5' is not START:STOP"),
    ],
)
def test_a_users_fault_is_one_line_and_nothing_is_written(flags: dict[str, str], complaint: str, tmp_path: Path) -> None:
    tree = {
        "output_dir": str(tmp_path / "out"),
        "model": {"model_name_or_path": str(ROOT / "configs" / "quickstart" / "model"), "init": "random"},
        "data": {"path": rows(tmp_path / "rows.jsonl", broken=0), "eval_size": 2},
        "curriculum": {"bins": {"by": "score", "thresholds": [2.5, 3.5]}},
    }
    rows(tmp_path / "broken.jsonl", broken=2)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    before = sorted(tmp_path.iterdir())
    words = [word for key, value in flags.items() if key != "CONFIG" for word in (f"--{key}", value.replace("{tmp}", str(tmp_path)))]
    with pytest.raises(UserError) as caught:
        train.main([str(tmp_path / flags.get("CONFIG", "run.yaml")), *words])
    line = str(caught.value)
    assert complaint.replace("{tmp}", str(tmp_path)) in line
    assert "\n" not in line
    assert sorted(tmp_path.iterdir()) == before


def shell(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_process_prints_one_line_and_leaves_with_2(tmp_path: Path) -> None:
    done = shell("-m", "phased_ift_jax.train", "configs/quickstart.yaml", "--output_dir", str(tmp_path / "out"), "--training.learning_rte", "1")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: unknown key training.learning_rte; did you mean training.learning_rate?\n")
    done = shell("-m", "phased_ift_jax.train", "configs/quickstart.yaml", f"--output_dir={tmp_path / 'out'}", "--data.max_length", "0", "--seed", "x")
    assert done.returncode == 2
    assert [line.split(": ")[:2] for line in done.stderr.splitlines()] == [["error", "seed"], ["error", "data.max_length"]]
    assert not (tmp_path / "out").exists()


HEAVY = {"jax", "flax", "optax", "orbax", "transformers", "tokenizers", "datasets", "pyarrow", "grain", "numpy", "openai", "torch", "tensorflow", "matplotlib"}


def test_help_needs_no_jax(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom phased_ift_jax import cli, train\n"
        "try: cli.run(train.main, ['--help'])\nexcept SystemExit as end: code = end.code\n"
        f"print(code, sorted({HEAVY} & set(sys.modules)), file=sys.stderr)"
    )
    done = shell("-c", code, cwd=tmp_path)
    assert done.stderr == "0 []\n"
    assert "--training.learning_rate" in done.stdout


def test_the_console_script_knows_its_verbs() -> None:
    done = shell("-c", "import sys; sys.argv = ['phased-ift', 'trian']; from phased_ift_jax.cli import main; main()")
    assert (done.returncode, done.stderr) == (2, "error: unknown verb 'trian'; did you mean train?\n")
    assert all((ROOT / "phased_ift_jax" / f"{verb}.py").exists() for verb in cli.VERBS)


def test_bins_can_be_replaced_as_a_whole_by_a_flag(tmp_path: Path) -> None:
    """Their keys exclude each other: `by: length` alone would stand beside the file's thresholds."""
    options, overrides = parsed(str(ROOT / "configs/llama2_7b.yaml"), "--curriculum.bins", "{by: length, quantiles: [0.585, 0.869]}")
    loaded = config.load(str(options["config"]), overrides)
    assert loaded.curriculum.bins == config.Bins(by="length", quantiles=(0.585, 0.869))


def test_gradients_do_not_round_the_weights_that_are_computed_with():
    """Gradients have the dtype of what they are taken of: in bfloat16 they would turn a float32 computation into another one."""
    words = [("training.gradient_dtype", "bfloat16"), ("model.dtype", "float32")]
    with pytest.raises(UserError, match=r"training\.gradient_dtype bfloat16 would round the weights that model\.dtype float32 computes with"):
        config.load(ROOT / "configs/llama2_7b.yaml", words)
    assert config.load(ROOT / "configs/llama2_7b.yaml", words[:1]).training.gradient_dtype == "bfloat16"

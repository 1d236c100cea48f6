"""Laws of launch/paper.sh: what it prints the verbs take, each step reads what one before it makes, and what is done is not done again."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import fake_openai
import pytest
import yaml

from phased_ift_jax import arms, cli

ROOT = Path(__file__).resolve().parents[1]
STORY = ROOT / "launch/paper.sh"
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/paper").glob("*.yaml"))}
ASKED = ("--scorer=a-scorer", "--score_usd", "20", "--judge", "a-judge", "--judge-usd=2.5")
JUDGED_APART = {"llama2_7b_alpaca", "llama2_13b_alpaca"}  # Table 3's last part

# Stands for Python: notes the verb, fails where it is told to, and else leaves what the verb would.
FAKE = """
import os, sys
from pathlib import Path
verb, words = sys.argv[2].split(".")[-1], sys.argv[3:]
kind = next((word[2:] for word in words if word in ("--dry_run", "--pilot", "--plan", "--topology")), "")
out = Path(words[words.index("--out") + 1]) if "--out" in words else None
what = " ".join([verb, *[kind] * bool(kind), *[words[0]] * (verb == "fetch"), *([out.stem] if verb == "judge" else [])])
Path(os.environ["CALLS"]).open("a").write(what + "\\n")
if what == os.environ.get("FAIL"):
    sys.exit(int(os.environ["CODE"]))
print(what)
made = {"alpaca": ["alpaca_data.json"], "alpaca-scored": ["en-alpaca52k-stage3.jsonl"], "testsets": ["anthropic_test_set.jsonl"]}
if verb == "fetch":
    made = [out / name for name in made[words[0]]]
elif verb in ("score", "judge") and not kind:
    made = [out, out.with_name(out.stem + ".card.json")]
elif verb == "split":
    made = [out / "phases.json"]
elif verb == "experiment" and not kind:
    made = [] if "OTHERS" in os.environ else [Path("runs/paper") / Path(words[0]).stem / "report.html"]
elif verb == "report":
    made = [out]
else:
    made = []
for path in made:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
"""


def told(folder: Path, *words: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    known = {"PATH": os.environ["PATH"], "HOME": str(folder), "OPENAI_API_KEY": "any", "PYTHON": str(folder / "fake/python"), "CALLS": str(folder / "fake/calls")}
    known |= {"ATTEMPTS": "1", "PAUSE": "0"} | environment
    if not (folder / "fake").exists():
        (folder / "fake").mkdir()
        (folder / "fake/python").write_text(f"#!{sys.executable} -S\n{FAKE}")
        (folder / "fake/python").chmod(0o755)
        (folder / "fake/calls").touch()
    (folder / "work").mkdir(exist_ok=True)
    done = subprocess.run([STORY, *words], cwd=folder / "work", env=known, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    return done


def calls(folder: Path) -> list[str]:
    return (folder / "fake/calls").read_text().splitlines()


class Taken(Exception):
    """What a verb's own parser has made of its words, all of which it knew."""


def parsed(verb: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> Namespace:
    real = cli.Parser.parse_known_args

    def parse(self: cli.Parser, *rest: Any) -> Any:
        options, unknown = real(self, *rest)
        if unknown:
            return options, unknown
        raise Taken(options)

    with monkeypatch.context() as patch:
        patch.setattr(cli.Parser, "parse_known_args", parse)
        with pytest.raises(Taken) as caught:
            importlib.import_module(f"phased_ift_jax.{verb}").main(words)
    options: Namespace = caught.value.args[0]
    return options


@pytest.mark.parametrize("name", CONFIGS)
def test_without_run_every_command_is_printed_with_its_estimate_and_verbs_take_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what one reads, one before it has made, or the experiment's file names."""
    lines = told(tmp_path, name, "--dry-run", *ASKED, "--usd_per_chip_hour=1.5").stdout.splitlines()
    assert calls(tmp_path) == []
    assert list((tmp_path / "work").iterdir()) == []
    steps: list[tuple[str, Namespace]] = []
    for before, line in pairwise(lines):
        launcher, python, words = line.partition("python -m phased_ift_jax.")
        if python and not line.startswith("#"):
            assert launcher in ("", f"{ROOT}/launch/until_done.sh ")
            assert re.match("# +\\w", before), f"no estimate: {line}"
            verb, *rest = shlex.split(words)
            steps.append((verb, parsed(verb, rest, monkeypatch)))
    verbs = [verb for verb, _ in steps]
    fetches = ["fetch"] * (3 if name.endswith("_alpaca") else 2)
    apart = [*["judge"] * 3, "report"] if name in JUDGED_APART else []
    assert verbs == [*fetches, *["score"] * 3, "calibrate", "split", "experiment", "plan", "experiment", *apart]

    def of(verb: str) -> list[Namespace]:
        return [options for step, options in steps if step == verb]

    experiment = arms.load(str(CONFIGS[name]), [("evaluation.judging.model", "a-judge")])
    base, asked = experiment.base, experiment.evaluation
    assert asked
    assert asked.judging
    dry, pilot, whole = of("score")
    assert (dry.dry_run, pilot.pilot, whole.dry_run, whole.pilot) == (True, 200, False, None)
    assert (pilot.budget_usd, whole.budget_usd, whole.model, whole.out) == (20, 20, "a-scorer", base.data.path)
    fetched = {options.what: options.out for options in of("fetch")}
    assert {str(Path(place.partition("=")[2]).parent) for place in asked.prompts} == {fetched["testsets"]}
    if "alpaca" in fetched:
        assert {tuple(options.data) for options in of("score")} == {("data/alpaca_data.json",)}
    assert of("calibrate")[0].scored == of("split")[0].scored == base.data.path
    assert f"{of('split')[0].out}/phases.json" == base.curriculum.bins.from_
    (plan,) = of("plan")
    assert plan.topology
    assert plan.usd_per_chip_hour == 1.5
    run = [(key, value) for key, value in vars(plan).items() if key.partition(".")[0] in ("data", "curriculum")]
    assert {key for key, _ in run} == {"data.path", "data.append_period", "curriculum.bins"}
    from phased_ift_jax import config

    planned = config.load(ROOT / plan.configs[0] if not Path(plan.configs[0]).is_absolute() else plan.configs[0], run)
    assert config.changed(planned, {"output_dir": base.output_dir, "export.after_each_phase": False}) == base, "what is planned is what is trained"
    for options in of("experiment"):
        assert Path(options.config) == CONFIGS[name]
        assert vars(options)["evaluation.judging.model"] == "a-judge"
        assert float(vars(options)["evaluation.judging.budget_usd"]) == 2.5
    assert [options.plan for options in of("experiment")] == [True, False]
    cells = {(cell.arm, cell.seed): str(cell.folder / "answers.jsonl") for cell in experiment.cells}
    assert [options.answers for options in of("judge")] == [[cells["phased", seed], cells["random", seed]] for seed in experiment.seeds] * bool(apart)
    assert all((options.max_completion_tokens, options.budget_usd) == (asked.judging.max_completion_tokens, 2.5) for options in of("judge"))
    for options in of("report"):
        assert options.judgments == [[judge.out for judge in of("judge")]]
        assert {*options.runs} == {str(cell.run) for cell in experiment.cells if cell.arm in ("phased", "random")}


def test_each_experiment_tells_its_costs() -> None:
    """In its head, from which the story has them; the story prints each."""
    for name, path in CONFIGS.items():
        head = path.read_text().partition("\noutput_dir:")[0]
        said = subprocess.run([STORY, name], capture_output=True, text=True, check=True, cwd=ROOT).stdout
        for word in ("hardware", "score", "train", "answer", "judge"):
            (told_,) = re.findall(rf"(?m)^# {word}: .*(?:\n#  .*)*", head)
            assert f"\n{told_}\n" in said, (name, word)
            assert re.search(r"\d", told_)
            assert "@" not in told_, "a figure that was to be put in"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    told(folder, "--run", *ASKED)
    return folder


WHOLE = ["fetch alpaca", "fetch alpaca-scored", "fetch testsets", "score dry_run", "score pilot", "score", "calibrate", "split", "experiment plan", "plan topology", "experiment"]
WHOLE += ["judge seed3517", "judge seed3518", "judge seed3519", "report"]


def test_run_does_it_in_order_and_a_second_time_only_looks(undisturbed: Path) -> None:
    assert calls(undisturbed) == WHOLE
    said = told(undisturbed, "--run", *ASKED).stdout
    assert calls(undisturbed) == [*WHOLE, "experiment"], "which knows itself what of it is done"
    assert said.count("done before: ") == len(WHOLE) - 1
    assert (undisturbed / "work/runs/paper/llama2_7b_alpaca/plan.txt").read_text() == "experiment plan\n"


@pytest.mark.parametrize(("step", "code"), [(step, (1, 2, 75)[number % 3]) for number, step in enumerate(WHOLE)])
def test_stopped_at_any_step_it_ends_with_that_code_and_the_same_command_goes_on(step: str, code: int, tmp_path: Path) -> None:
    told(tmp_path, "--run", *ASKED, code=code, FAIL=step, CODE=str(code))
    so_far = WHOLE[: WHOLE.index(step) + 1]
    assert calls(tmp_path) == so_far
    told(tmp_path, "--run", *ASKED)
    again = [done for done in so_far[:-1] if done == "experiment" or (done.startswith("score ") and WHOLE.index(step) <= WHOLE.index("score"))]
    assert calls(tmp_path) == so_far + again + WHOLE[WHOLE.index(step) :], "a forecast is made again until all is scored"


def test_of_several_hosts_one_makes_the_phases_and_the_last_goes_on(tmp_path: Path) -> None:
    refused = told(tmp_path, "--run", *ASKED, "--shard=1/2", code=2)
    assert refused.stderr == "error: --shard: data/alpaca_phases/phases.json is not there yet; host 0 makes it, with the same command and --shard 0/2\n"
    assert calls(tmp_path) == []
    said = told(tmp_path, "--run", *ASKED, "--shard", "0/2", OTHERS="yes").stdout
    assert "other hosts are at work" in said
    assert calls(tmp_path) == WHOLE[: WHOLE.index("experiment") + 1]
    told(tmp_path, "--run", *ASKED, "--shard", "1/2")
    assert calls(tmp_path) == [*WHOLE[: WHOLE.index("experiment") + 1], *WHOLE[WHOLE.index("experiment") :]]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("llama2_70b_alpaca",), "EXPERIMENT: 'llama2_70b_alpaca' is none of llama2_13b_alpaca llama2_13b_alpaca_cleaned llama2_7b_alpaca"),
        (("mistral_7b_alpaca", "llama2_7b_alpaca"), "what is 'llama2_7b_alpaca'? One EXPERIMENT at a time"),
        (("--jugde", "x"), "unknown flag --jugde; --help lists them"),
        (("--shard", "2/2"), "--shard: '2/2' is not I/N with I from 0 to N - 1"),
        (("--judge",), "--judge: --help lists the flags"),
        (("--run", "--judge=x", "--judge_usd=1"), "--scorer and --score_usd: which model scores"),
        (("--run", "--scorer=x", "--score_usd=1", "--judge=x"), "--judge and --judge_usd: which model judges"),
    ],
)
def test_what_is_wrong_is_one_line_before_anything_is_done(words: tuple[str, ...], line: str, tmp_path: Path) -> None:
    done = told(tmp_path, *words, code=2)
    assert done.stderr.startswith(f"error: {line}")
    assert done.stderr.count("\n") == 1
    assert calls(tmp_path) == []


def test_a_key_that_is_missing_is_told_before_hours_of_training(tmp_path: Path) -> None:
    assert "OPENAI_API_KEY is not set" in told(tmp_path, "--run", *ASKED, code=2, OPENAI_API_KEY="").stderr


def test_keys_of_the_run_reach_all_that_train_or_plan_and_a_server_all_that_ask(tmp_path: Path) -> None:
    words = (*ASKED, "--base_url", "http://127.0.0.1:9/v1", "--reasoning-effort=none", "--", "--model.model_name_or_path", "it's here")
    lines = [line for line in told(tmp_path, *words).stdout.splitlines() if "phased_ift_jax." in line]
    with_key = [shlex.split(line) for line in lines if "model_name_or_path" in line]
    assert [words[words.index("-m") + 1] for words in with_key] == [f"phased_ift_jax.{verb}" for verb in ("experiment", "plan", "experiment")]
    assert all("it's here" in words for words in with_key)
    asking = [line for line in lines if any(f"phased_ift_jax.{verb} " in line for verb in ("score", "judge", "experiment"))]
    assert all("base_url http://127.0.0.1:9/v1" in line and "reasoning_effort none" in line for line in asking)


def test_help_names_every_flag() -> None:
    text = STORY.read_text()
    flags = next(line for line in text.splitlines() if "printf -v" in line).split(")")[0].replace("|", " ").split()
    said = subprocess.run([STORY, "--help"], capture_output=True, text=True, check=True).stdout
    for flag in (*flags, "run", "dry_run"):
        assert f"  --{flag} " in said, flag
    for name in CONFIGS:
        assert name in said
    assert yaml.safe_load(CONFIGS["llama2_7b_alpaca"].read_text())["seeds"] == [3517, 3518, 3519]


@pytest.mark.long
def test_the_whole_story_with_real_verbs(tmp_path: Path, shared_data: Path) -> None:
    """Small: stories260k, some hundred real records, three arms, two seeds, three prompts a set, and a server on 127.0.0.1 that scores and judges."""
    folder = tmp_path / "house"
    shutil.copytree(ROOT / "launch", folder / "launch")
    shutil.copytree(ROOT / "configs/paper", folder / "configs/paper")
    path = folder / "configs/paper/llama2_7b_alpaca.yaml"
    tree, text = yaml.safe_load(path.read_text()), path.read_text()
    dropped = tuple(f"  {arm}: " for arm in tree["arms"] if arm not in ("phased", "one_off", "random"))
    kept = [line for line in text.splitlines() if not line.startswith(dropped)]
    path.write_text("\n".join(kept).replace("max_length: 1024 ", "max_length: 400 ").replace("[3517, 3518, 3519]", "[3517, 3518]") + "\n")
    assert {*tree["arms"]} > {*yaml.safe_load(path.read_text())["arms"]} == {"phased", "one_off", "random"}

    (folder / "data").mkdir()
    scored = [json.loads(line) for line in (shared_data / "alpaca/random_9k_with_stage3_label.jsonl").read_text().splitlines()[:240]]
    (folder / "data/alpaca_data.json").write_text(json.dumps([{key: row[key] for key in ("instruction", "input", "output")} for row in scored]))
    shutil.copy(shared_data / "phasedsft/en-alpaca52k-stage3.jsonl", folder / "data")
    for test_set in (shared_data / "testsets").iterdir():
        (folder / "data" / test_set.name).write_text("".join(test_set.read_text().splitlines(keepends=True)[:3]))
    keys = {"model.model_name_or_path": shared_data / "stories260k", "model.dtype": "float32", "data.max_length": 512, "data.eval_size": 4, "data.packing_shapes": 1}
    keys |= {"training.global_batch_size": 32}
    small = ["--topology=none", "--", *(word for key, value in keys.items() for word in (f"--{key}", str(value)))]
    text = path.read_text().replace("meta-llama/Llama-2-7b-hf", str(shared_data / "stories260k"))  # whose tokenizer `split` counts by
    path.write_text(text)
    environment = os.environ | {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "OPENAI_API_KEY": "sk-of-the-tests", "ATTEMPTS": "1", "XLA_FLAGS": ""}
    asked = ("--scorer=gpt-4o-mini", "--score_usd=5", "--judge=gpt-4o-mini", "--judge_usd=1")
    said, billed = [], []
    with fake_openai.process() as server:
        for _ in range(2):
            words = [folder / "launch/paper.sh", "--run", *asked, "--base_url", server.url, *small]
            done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900, stdin=subprocess.DEVNULL, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            said.append(done.stdout)
            billed.append(server.counts())
    assert "240 records" in said[0]
    assert said[0].count(": training") == said[0].count(": answering") == 6
    assert not re.findall(": (?:training|answering|judging)\n", said[1])
    out = folder / "runs/paper/llama2_7b_alpaca"
    found = json.loads((out / "report.json").read_text())
    assert {arm["name"]: arm["seeds"] for arm in found["arms"]} == {arm: [3517, 3518] for arm in ("phased", "one_off", "random")}
    assert [(compared["runs"], compared["prompts"]) for compared in found["comparisons"]] == [(2, 18), (2, 18)]
    (direct,) = json.loads((out / "phased-against-random/report.json").read_text())["comparisons"]
    assert (direct["runs"], direct["prompts"]) == (2, 18)
    assert billed[0] == billed[1], "nothing is paid for twice"

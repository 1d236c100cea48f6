"""Laws of configs/paper: each row of the paper's tables is an arm that trains what the row says, at the paper's settings, and `--plan` shows it."""

from __future__ import annotations

import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import chdir, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from phased_ift_jax import arms, config, experiment, score, split
from phased_ift_jax.arms import Experiment
from phased_ift_jax.data import prompts, sources
from phased_ift_jax.records import UserError
from phased_ift_jax.training import survey as surveys
from phased_ift_jax.training.survey import Survey

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = {path.stem: path for path in sorted((ROOT / "configs/paper").glob("*.yaml"))}
MODELS = {"Llama-2-7B": "llama2_7b", "Llama-2-13B": "llama2_13b", "Mistral-7B": "mistral_7b"}
JUDGE = ("evaluation.judging.model", "a-judge")
SMALL = ("--model.model_name_or_path", "model", "--data.eval_size", "8")
CONTROLS = {"one_off_restarts", "random", "reversed", "last_alone", "last_alone_equal_steps", "by_length"}
SIZES = {"alpaca": ["paper"], "alpaca_cleaned": ["0.462", "0.317", "0.221"]}
Phases = tuple[tuple[int, ...], ...] | str


@dataclass(frozen=True)
class Grid:
    """A config as it was read, the survey of each of its arms, and what `--plan` has said."""

    told: Experiment
    text: str
    arms: dict[str, Survey]
    said: str


@pytest.fixture(scope="module")
def grids(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Grid]:
    """Of each config, by its name. Rows are scored and split by the verbs into the very files that the configs name; only model and held-out rows are small."""
    folder, found = tmp_path_factory.mktemp("paper"), {}
    tasks = [json.loads(line) for line in (ROOT / "configs/quickstart/data.jsonl").read_text().splitlines()[:240]]
    rows = [dict(zip(("instruction", "input", "output"), (*row["data"][0].split(": "), row["data"][1]), strict=True)) | {"score": row["score"]} for row in tasks]
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "data").mkdir()
    words = {piece: None for row in rows for piece in (f"\u2581{row['instruction'].split(' ')[-1]}.", row["input"].split(" ")[0])}
    with_words(shutil.copytree(ROOT / "configs/quickstart/model", folder / "model"), list(words))
    with chdir(folder), pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr(split, "_draw", lambda *_: [])
        for name, path in CONFIGS.items():
            told, seen = arms.load(str(path), [JUDGE]), dict[str, Survey]()
            bins = told.base.curriculum.bins.from_
            assert isinstance(told.base.data.path, str)
            assert bins
            if not Path(bins).exists():
                assert score.main(["rows.json", "--out", told.base.data.path, "--scorer", "import"]) == 0
                assert split.main([told.base.data.path, "--out", str(Path(bins).parent), "--sizes", *SIZES[data_of(name)]]) == 0
            with pytest.MonkeyPatch.context() as noted, redirect_stdout(io.StringIO()) as said:
                noted.setattr(surveys, "survey", noting(surveys.survey, seen))
                assert experiment.main([str(path), "--plan", f"--{JUDGE[0]}", JUDGE[1], *SMALL]) == 0
            of_arm = {Path(output).parts[-3]: one for output, one in seen.items() if output != told.output_dir}
            found[name] = Grid(told, path.read_text(), of_arm, said.getvalue())
    return found


def with_words(model: Path, words: list[str]) -> None:
    """Teach a tokenizer of whole words some more: an instruction that ends in a period, and what begins a line."""
    tokenizer, sizes = (json.loads((model / name).read_text()) for name in ("tokenizer.json", "config.json"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {word: len(vocabulary) + n for n, word in enumerate(words)}
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    (model / "config.json").write_text(json.dumps(sizes | {"vocab_size": len(vocabulary)}))


def noting(survey: Any, seen: dict[str, Survey]) -> Any:
    def noted(run: config.RunConfig, *rest: Any) -> Survey:
        seen[run.output_dir] = survey(run, *rest)
        return seen[run.output_dir]

    return noted


def data_of(name: str) -> str:
    return "alpaca_cleaned" if name.endswith("_alpaca_cleaned") else "alpaca"


def changed(grid: Grid, arm: str) -> set[str]:
    """Keys of the run that an arm changes of the phased one's."""
    mine, phased = (dict(flat(grid.arms[name].config.model_dump(mode="json"))) for name in (arm, "phased"))
    return {key for key in mine.keys() | phased.keys() if mine.get(key) != phased.get(key)} - {"output_dir"}


def flat(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def trained(found: Survey) -> Phases:
    """The bins that each phase trains, all rows of them that are not held out."""
    data, phases = found.dataset, []
    if found.config.curriculum.arm == "random":
        return "random"
    for phase in data.phases:
        bins = np.unique(data.bin_of[phase.rows])
        np.testing.assert_array_equal(np.sort(phase.rows), np.flatnonzero(np.isin(data.bin_of, bins) & ~data.held_out))
        phases.append(tuple(bins.tolist()))
    return tuple(phases)


def meant(method: str) -> Phases:
    """What a row of the tables says is trained."""
    numbers = [int(digit) for digit in re.findall(r"\d", method)]
    if "random" in method:
        return "random"
    if method.startswith("mixed"):
        return (tuple(numbers),)
    return tuple((n,) for n in (range(1, numbers[0] + 1) if "after" in method else numbers))


def ids(found: Survey, rows: np.ndarray) -> list[str]:
    return [found.dataset.records[row].id for row in rows]


# --- the tables ----------------------------------------------------------------------------------------------------------------------


def test_every_row_of_the_tables_is_an_arm_that_trains_what_it_says(grids: dict[str, Grid], shared_data: Path) -> None:
    """One arm, which differs from the phased one in order or kind of phases alone; its line in the file has the paper's figure. The baseline is one, too."""
    rows = [row for row in json.loads((shared_data / "paper/win_rate_tables.json").read_text())["rows"] if row["model"] in MODELS]
    assert len(rows) == 35
    meant_by = set()
    for row in rows:
        name = f"{MODELS[row['model']]}_{'alpaca_cleaned' if 'cleaned' in row['data'] else 'alpaca'}"
        grid = grids[name]
        of_paper = {arm: trained(found) for arm, found in grid.arms.items() if changed(grid, arm) <= {"curriculum.arm", "curriculum.order"}}
        [arm] = [arm for arm, phases in of_paper.items() if phases == meant(row["method"])]
        line = re.search(rf"^  {arm}: .*# (.*)$", grid.text, re.MULTILINE)
        assert line, f"{name}: {arm} has no line with its figures"
        assert re.search(rf"Table {row['table']}\b[^;]*{re.escape(format(row['avg'], '+.2f'))}", line[1]), (name, row["method"], line[1])
        against = "random" if "random" in row["baseline"] else "one_off"
        assert of_paper[against] == ("random" if against == "random" else ((1, 2, 3),))
        assert against == "random" or grid.told.evaluation is None or grid.told.evaluation.baseline == against
        meant_by.add(name)
    assert meant_by == set(CONFIGS)


def test_the_controls_are_there_and_three_seeds(grids: dict[str, Grid]) -> None:
    for grid in grids.values():
        assert set(grid.told.arms) >= CONTROLS | {"phased", "one_off"}
        assert len(grid.told.seeds) >= 3
        assert next(iter(grid.told.arms)) == "phased", "the arm that plan and report set all others against"


# --- what the arms share -------------------------------------------------------------------------------------------------------------


def test_arms_of_a_config_share_held_out_rows_and_those_of_all_stages_share_examples(grids: dict[str, Grid]) -> None:
    held = {}
    for name, grid in grids.items():
        of_arms = {tuple(tuple(ids(found, found.dataset.held_out_rows(b))) for b in (1, 2, 3)) for found in grid.arms.values()}
        assert len(of_arms) == 1, name
        assert held.setdefault(data_of(name), of_arms) == of_arms, "models, too"
        every = {arm: sorted(row for phase in found.dataset.phases for row in ids(found, phase.rows)) for arm, found in grid.arms.items()}
        whole = every["phased"]
        parts = {arm for arm, rows in every.items() if rows != whole}
        assert all(set(every[arm]) < set(whole) for arm in parts)
        assert parts == {arm for arm, found in grid.arms.items() if trained(found) != "random" and len({b for bins in trained(found) for b in bins}) < 3}, name


def test_after_a_stage_is_the_phased_run_so_far(grids: dict[str, Grid]) -> None:
    """The same rows in the same steps at the same rates, so that it need not be another model."""
    for name in ("llama2_7b_alpaca", "llama2_13b_alpaca"):
        phased = grids[name].arms["phased"].plan.phases
        for n in (1, 2):
            mine = grids[name].arms[f"after_stage{n}"].plan.phases
            assert len(mine) == n
            for one, other in zip(mine, phased, strict=False):
                np.testing.assert_array_equal(one.learning_rates, other.learning_rates)
                for step in range(max(len(one.steps), len(other.steps))):
                    np.testing.assert_array_equal(one.steps[step], other.steps[step])


def test_random_phases_are_as_large_and_cross_the_bins(grids: dict[str, Grid]) -> None:
    for grid in grids.values():
        phased, drawn = (grid.arms[arm].dataset for arm in ("phased", "random"))
        assert [len(phase.rows) for phase in drawn.phases] == [len(phase.rows) for phase in phased.phases]
        assert all(len(np.unique(drawn.bin_of[phase.rows])) == 3 for phase in drawn.phases)


def test_steps_follow_from_rows_and_equal_steps_are_equal(grids: dict[str, Grid]) -> None:
    """Two epochs of ceil(n / 128) steps for each phase; and as many steps on the last stage as the phased run has."""
    for grid in grids.values():
        steps = {arm: [len(phase.steps) for phase in found.plan.phases] for arm, found in grid.arms.items()}
        for arm, found in grid.arms.items():
            if arm != "last_alone_equal_steps":
                assert steps[arm] == [2 * -(-len(phase.rows) // 128) for phase in found.dataset.phases], arm
        assert sum(steps["last_alone_equal_steps"]) == sum(steps["phased"])


# --- the paper's settings ------------------------------------------------------------------------------------------------------------

PAPER = {
    "training.learning_rate": 5e-6, "training.num_train_epochs": 2, "training.global_batch_size": 128, "training.max_steps": -1, "training.lr_scheduler_type": "cosine",
    "training.warmup_ratio": 0.1, "training.weight_decay": 0.1, "training.adam_beta1": 0.9, "training.adam_beta2": 0.95, "training.max_grad_norm": 1.0,
    "data.max_length": 2048, "data.prompt_template": "user_assistant", "data.append_period": True, "data.sample_size": None, "model.dtype": "bfloat16",
    "curriculum.optimizer_state": "reset", "curriculum.lr_schedule": None,
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_the_base_is_the_shipped_run_at_the_papers_settings(name: str) -> None:
    told = arms.load(str(CONFIGS[name]), [JUDGE])
    mine = dict(flat(told.base.model_dump(mode="json", by_alias=True)))
    assert {key: mine[key] for key in PAPER} == PAPER
    shipped = dict(flat(config.load(ROOT / f"configs/{name.removesuffix(f'_{data_of(name)}')}.yaml").model_dump(mode="json", by_alias=True)))
    unlike = {key for key in mine if mine[key] != shipped[key]}
    assert unlike <= {"output_dir", "data.path", "data.append_period", "curriculum.bins.by", "curriculum.bins.from", "curriculum.bins.thresholds", "export.after_each_phase"}
    asked = told.evaluation
    assert asked
    assert asked.judging
    assert (asked.max_length, asked.baseline, asked.judging.judge, asked.judging.max_completion_tokens) == (1024, "one_off", "llm", 256)
    assert 3517 in told.seeds
    assert told.output_dir == f"runs/paper/{name}"


def test_a_raw_triple_ends_in_a_period_and_its_input_follows(grids: dict[str, Grid]) -> None:
    for grid in grids.values():
        (turn,) = grid.arms["phased"].dataset.records[0].turns
        assert turn.instruction.endswith(".")
        assert turn.input


def test_the_six_sets_are_asked_of_every_model(grids: dict[str, Grid], shared_data: Path) -> None:
    """As `fetch testsets` names the files; 1,047 prompts."""
    collection = sources.COLLECTIONS["testsets"]
    fetched = {one.name for one in (*collection.files, *collection.selections)}
    asked = {grid.told.evaluation.prompts for grid in grids.values() if grid.told.evaluation}
    assert len(asked) == 1
    (places,) = asked
    here = [(name, Path(file)) for name, _, file in (place.partition("=") for place in places)]
    assert {file.name for _, file in here} <= fetched
    assert {file.parent for _, file in here} == {Path("data")}
    read = prompts.read([f"{name}={shared_data / 'testsets' / file.name}" for name, file in here])
    assert len(read) == 1047
    assert {prompt.set for prompt in read} == {"sinstruct", "wizardlm", "koala", "vicuna", "oasst", "anthropic"}


# --- the verb ------------------------------------------------------------------------------------------------------------------------


def test_the_plan_shows_every_arm_and_the_grid(grids: dict[str, Grid]) -> None:
    for grid in grids.values():
        for arm in grid.told.arms:
            assert re.search(rf"(?m)^{arm} ", grid.said), arm
        arms_, seeds = len(grid.told.arms), len(grid.told.seeds)
        assert f"{arms_} arms x {seeds} seeds" in grid.said
        assert f"{arms_ * seeds} cells, {arms_ * seeds} of them left to train" in grid.said


def test_without_a_judges_name_it_is_one_line_that_says_where_it_goes() -> None:
    for path in CONFIGS.values():
        with pytest.raises(UserError) as caught:
            experiment.main([str(path), "--plan"])
        assert str(caught.value).startswith("evaluation.judging: name the model that is asked with `model`, --evaluation.judging.model NAME here, or")
        assert "\n" not in str(caught.value)

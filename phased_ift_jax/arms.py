"""An experiment: one run in several arms and with several seeds, which share data, held-out rows and budget ledger (floor 0).

An arm is what it changes of the run. Those that are known by name have their changes from the run and its phased arm; any other names its own.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import yaml
from pydantic import Field, model_validator

from phased_ift_jax import config
from phased_ift_jax.config import NAME, RunConfig, Section
from phased_ift_jax.object_store import is_address
from phased_ift_jax.records import UserError

SHARED = ("output_dir", "seed", "data", "evaluation")  # what no arm may change
JUDGING = "evaluation.judging."  # keys of the experiment itself that may be flags
SECTIONS = ("model", "curriculum", "training", "mesh", "checkpoint", "logging", "export")
Changes = dict[str, Any]


class Judging(Section):
    """Who judges an arm's answers against the baseline's; as the flags of `judge`."""

    judge: Literal["llm", "exact"] = Field("llm", description="a model that is asked, or references")
    references: tuple[str, ...] = Field((), description="of exact, where prompts have none: records whose response is right, by id")
    model: str | None = Field(None, description="of llm: the model that is asked")
    base_url: str | None = Field(None, description="of llm: a server that speaks OpenAI's protocol")
    mode: Literal["live", "batch"] = Field("live", description="of llm: one by one, or in batches at half the price")
    budget_usd: float | None = Field(None, gt=0, description="of llm: never spend more on one arm and seed")
    prompt_file: str | None = Field(None, description="of llm: a prompt of one's own")
    reasoning_effort: str | None = Field(None, description="of llm: for models that reason")
    max_completion_tokens: int | None = Field(None, ge=1, description="of llm: limit of a reply")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.judge == "llm" and self.model is None:
            raise ValueError(f"name the model that is asked with `model`, --{JUDGING}model NAME here, or take `judge: exact`")
        return self


class Answering(Section):
    """What is asked of the trained models, beside their held-out loss."""

    prompts: tuple[str, ...] = Field(min_length=1, description="files of prompts, as those of generate: FILE or NAME=FILE")
    max_new_tokens: int = Field(1024, ge=1, description="longest response")
    max_length: int | None = Field(None, ge=2, description="tokens of prompt and response; default: what the model was made for")
    batch_size: int = Field(32, ge=1, description="prompts at a time")
    judging: Judging | None = Field(None, description="who judges the answers; null: nobody")
    baseline: str = Field("one_off", description="the arm whose answers all others are judged against")


class Experiment(Section):
    """Arms x seeds of one run. Everything lies under output_dir, one folder a cell: ARM/seedN."""

    output_dir: str = Field(description="folder of the experiment")
    base: RunConfig = Field(description="the run that arms change: its keys, or the path of its YAML")
    arms: dict[Annotated[str, Field(pattern=NAME)], Changes] = Field(min_length=1, description="names, or a mapping of name to changed keys of the run")
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1, description="each trains every arm; the same seed is the same pair")
    evaluation: Answering | None = Field(None, description="test sets to answer, and who judges that; null: held-out rows alone")
    tokens_per_second: float | None = Field(None, gt=0, description="measured, a cell's start and evaluation included: what --plan reckons with before a cell is done")

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds: each once; got {list(self.seeds)}")
        if self.base.curriculum.arm != "phased":
            raise ValueError("base.curriculum.arm: every arm is made from the phased one; leave it out")
        if is_address(self.output_dir):
            raise ValueError("output_dir: an experiment lies on a disk; a bucket holds single runs")
        if self.evaluation and self.evaluation.judging and self.evaluation.baseline not in self.arms:
            raise ValueError(f"evaluation.baseline: {self.evaluation.baseline!r} is none of the arms {', '.join(self.arms)}")
        if not self.base.data.eval_size and not (self.evaluation and self.evaluation.judging):
            raise ValueError("nothing would be measured: give base.data.eval_size, or evaluation with judging")
        for name, changes in self.arms.items():
            if not changes and name not in KNOWN:
                near = difflib.get_close_matches(name, KNOWN, n=1)
                raise ValueError(f"arms.{name}: changes nothing, and is no arm known by name; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(KNOWN)}"))
            if shared := next((key for key in changes if key.partition(".")[0] in SHARED), None):
                raise ValueError(f"arms.{name}.{shared}: arms share data, held-out rows and seeds; set it in base")
        return self

    @property
    def folder(self) -> Path:
        return Path(self.output_dir).expanduser()

    @property
    def cells(self) -> list[Cell]:
        """Seed by seed, so that pairs are whole as early as can be."""
        return [Cell(arm, seed, self.folder / arm / f"seed{seed}") for seed in self.seeds for arm in self.arms]


@dataclass(frozen=True)
class Cell:
    """One arm with one seed."""

    arm: str
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.arm}/seed{self.seed}"

    @property
    def run(self) -> Path:
        return self.folder / "run"


@dataclass(frozen=True, eq=False)
class Phased:
    """What is to be known of the phased arm to make the others like it."""

    bins: int
    sizes: Sequence[int]  # rows of each phase
    steps: int  # optimizer steps of all phases
    lengths: np.ndarray  # response tokens of every row that it trains
    whole: bool  # whether that is every row that is not held out


def _entries(run: RunConfig, of: Phased) -> tuple[str, list[Any]]:
    """The run's phases and the key by which they are given."""
    curriculum = run.model_dump(mode="json")["curriculum"]
    return ("curriculum.phases", curriculum["phases"]) if curriculum["phases"] else ("curriculum.order", curriculum["order"] or list(range(1, of.bins + 1)))


def _reversed(run: RunConfig, of: Phased) -> Changes:
    key, entries = _entries(run, of)
    return {key: entries[::-1]}


def _last(run: RunConfig, of: Phased, **more: Any) -> Changes:
    key, entries = _entries(run, of)
    return {key: [entries[-1] | more]} if more and key == "curriculum.phases" else {key: entries[-1:]} | {f"training.{name}": value for name, value in more.items()}


def _by_length(run: RunConfig, of: Phased) -> Changes:
    """Bins of response length, as large as the phased arm's phases as far as equal lengths stay together."""
    if not of.whole:
        raise UserError("the phased arm leaves rows out, which bins by length would train; let its order name every bin")
    lengths, shares = np.sort(of.lengths), np.array(list(accumulate(of.sizes))[:-1]) / sum(of.sizes)
    at = [round(len(lengths) * share) for share in shares]
    beside = [(lengths[i], lengths[min(np.searchsorted(lengths, lengths[i], "right"), len(lengths) - 1)]) for i in at]
    cuts = [int(min(two, key=lambda length: abs(np.searchsorted(lengths, length) - i))) for i, two in zip(at, beside, strict=True)]
    key, entries = _entries(run, of)
    phases = [entry | {"name": f"length{i}", "bins": [i]} for i, entry in enumerate(entries, 1)] if key == "curriculum.phases" else None
    return {"curriculum.bins": {"by": "length", "thresholds": cuts}, "curriculum.order": None, "curriculum.phases": phases}


KNOWN: dict[str, Callable[[RunConfig, Phased], Changes]] = {
    "phased": lambda run, of: {"curriculum.arm": "phased"},
    "one_off": lambda run, of: {"curriculum.arm": "one_off", "curriculum.lr_schedule": None},
    "one_off_restarts": lambda run, of: {"curriculum.arm": "one_off", "curriculum.lr_schedule": "restart"},
    "random": lambda run, of: {"curriculum.arm": "random"},
    "reversed": _reversed,
    "last_alone": _last,
    "last_alone_equal_steps": lambda run, of: _last(run, of, max_steps=of.steps),
    "by_length": _by_length,
}


def load(path: str, overrides: Iterable[tuple[str, str]] = ()) -> Experiment:
    """Read an experiment from YAML; overrides are of the run that it is based on, but for `output_dir` and who judges.

    Raises:
        UserError: as `config.load`.
    """
    tree = config.read(path, "output_dir, base, arms, seeds")
    if isinstance(tree.get("base"), str):
        tree["base"] = config.read(tree["base"])
    for key, text in overrides:
        if key == "seed":
            raise UserError("--seed: an experiment has `seeds`; change them in its YAML")
        config.set_key(tree, key if key == "output_dir" or key.startswith(JUDGING) else f"base.{key}", text)
    if isinstance(tree.get("base"), dict):
        tree["base"]["output_dir"] = tree.get("output_dir")  # each cell's run has its own
    if isinstance(arms := tree.get("arms"), list):
        arms = dict.fromkeys(map(str, arms))
    if isinstance(arms, dict):
        tree["arms"] = {name: _dotted(changes or {}) for name, changes in arms.items()}
    return config.valid(Experiment, tree)


def _dotted(changes: Any) -> Any:
    """Keys as flags have them, where sections were written as mappings."""
    if not isinstance(changes, dict):
        return changes
    found: Changes = {}
    for key, value in changes.items():
        found |= {f"{key}.{name}": inner for name, inner in value.items()} if key in SECTIONS and isinstance(value, dict) else {key: value}
    return found


def dump(experiment: Experiment) -> str:
    """The experiment as YAML that `load` reads."""
    return yaml.safe_dump(experiment.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=200)


def resolved(experiment: Experiment, phased: Phased) -> Experiment:
    """The same with all that each arm changes; raises `UserError` where one cannot be."""
    base, arms = experiment.base, {}
    for name, given in experiment.arms.items():
        try:
            changes = (KNOWN[name](base, phased) if name in KNOWN else {}) | given
            config.changed(base, changes)
        except UserError as error:
            raise UserError("\n".join(f"arms.{name}: {line}" for line in str(error).splitlines())) from None
        arms[name] = changes
    return experiment.model_copy(update={"arms": arms})


def run_of(experiment: Experiment, cell: Cell) -> RunConfig:
    """The run of a cell of a resolved experiment. Held-out rows and the sample are the base's, whatever the arm's bins are."""
    changes: Mapping[str, Any] = experiment.arms[cell.arm]
    if any(key.startswith("curriculum.bins") for key in changes) and experiment.base.data.eval_bins is None:
        changes = {**changes, "data.eval_bins": experiment.base.curriculum.bins.model_dump(mode="json", by_alias=True)}
    return config.changed(experiment.base, {**changes, "output_dir": str(cell.run), "seed": cell.seed})

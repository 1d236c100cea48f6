"""One run is one complete value: frozen typed models, read from YAML, overridden by dotted flags (floor 0).

`load(path, overrides)` gives a `RunConfig` or raises a `UserError` of one line per fault; `dump(config)` writes the resolved value
back as YAML that runs as it is. Names are those of the Hugging Face family wherever it has one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from phased_ift_jax import pictures
from phased_ift_jax.foreign_keys import FOREIGN_KEYS
from phased_ift_jax.records import UserError

Share = Annotated[float, Field(ge=0.0, le=1.0)]
FloatType = Literal["float32", "bfloat16"]
NAME = r"^[A-Za-z0-9][A-Za-z0-9_.+-]*$"  # of bins and phases: they become folders
S = TypeVar("S", bound="Section")
TEMPLATES = ("user_assistant", "alpaca", "llama2_chat", "mistral_instruct", "tokenizer")


class Section(BaseModel):
    """A frozen group of keys that refuses a key it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and info.field_name and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("true and false are not values of this key")
        return value


class ModelConfig(Section):
    """Which model is trained, and how it computes."""

    model_name_or_path: str = Field(description="folder (on a disk or gs://) or Hugging Face hub name with config.json, tokenizer and, unless init is random, safetensors")
    revision: str | None = Field(None, description="branch, tag or commit of a hub name")
    init: Literal["pretrained", "random"] = Field("pretrained", description="weights of the checkpoint, or random ones of config.json's sizes drawn from the seed")
    param_dtype: FloatType = Field("float32", description="dtype of the master weights and of the optimizer's moments")
    dtype: FloatType = Field("bfloat16", description="dtype of the computation")
    attn_implementation: Literal["auto", "xla", "splash", "cudnn", "reference"] = Field(
        "auto",
        description="attention kernel: xla goes in blocks everywhere, splash is for TPUs (elsewhere interpreted, slowly), cudnn for NVIDIA GPUs, reference is the "
        "plain full square; auto is splash on a TPU, cudnn on a GPU, else xla, and xla stands in, with a word, for what a kernel cannot compute",
    )
    gradient_checkpointing: Literal["none", "save_attention", "save_dots", "full"] = Field(
        "none", description="what the backward pass recomputes: nothing, all but attention outputs, all but matmul outputs, everything"
    )


class Bins(Section):
    """How rows are put into bins of difficulty: `by` a measure, or `from` a file that lists them; exactly one."""

    by: Literal["score", "file", "length"] | None = Field(None, description="score of the row, file (TFDS: split) it was read from, or length of the response in tokens")
    thresholds: tuple[float, ...] | None = Field(None, description="bounds between bins, rising: [1.5, 3.5] makes [min, 1.5), [1.5, 3.5), [3.5, max]")
    quantiles: tuple[Share, ...] | None = Field(None, description="instead of thresholds: shares of the rows below each bound, such as [0.585, 0.869]")
    from_: str | None = Field(None, alias="from", description="phases.json with the ids of each bin, or its address gs://...")
    names: tuple[Annotated[str, Field(pattern=NAME)], ...] | None = Field(None, description="names of the bins, easiest first; default: stage1, stage2, ... or the files'")

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.by is None) == (self.from_ is None):
            raise ValueError("give exactly one of `by: score | file | length` and `from: phases.json`")
        bounds = [name for name in ("thresholds", "quantiles") if getattr(self, name) is not None]
        if self.by in ("score", "length") and len(bounds) != 1:
            raise ValueError(f"`by: {self.by}` needs exactly one of thresholds and quantiles, such as thresholds: [1.5, 3.5]")
        if self.by not in ("score", "length") and bounds:
            raise ValueError(f"{bounds[0]} goes with `by: score` or `by: length` only")
        if self.from_ is not None and self.names is not None:
            raise ValueError("names come from the file with `from`; leave names out")
        for name in bounds:
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} must rise, got {list(values)}; try {sorted(set(values))}")
        if self.names is not None and len(self.names) != len(set(self.names)):
            raise ValueError(f"two bins have the same name: {list(self.names)}")
        return self


class DataConfig(Section):
    """What is read, and how text becomes rows of tokens."""

    path: str | tuple[str, ...] = Field(description="file, several files, folder or glob, on a disk or gs://, hub name (org/name) or tfds:name; json, jsonl, csv or parquet")
    split: str = Field("train", description="split of a hub or TFDS dataset; all: every split of a TFDS one")
    prompt_template: Literal[TEMPLATES] = Field("user_assistant", description="user_assistant is the paper's; tokenizer takes the tokenizer's own chat template")  # type: ignore[valid-type]
    append_period: bool = Field(False, description="raw Alpaca triples only: end an instruction that has no period with one, as the paper's data preparation did")
    max_length: int = Field(2048, gt=1, description="tokens of one example, prompt and response; longer ones are truncated or quarantined")
    truncation: Literal["truncate", "quarantine"] = Field("truncate", description="what happens to a response that does not fit in max_length")
    packing: bool = Field(True, description="pack the examples of a step into as few rows as fit; changes speed, not the result")
    packing_shapes: int = Field(4, ge=1, le=16, description="how many row lengths the train step may be compiled for")
    eval_size: int = Field(256, ge=0, description="held-out rows of each bin, never trained")
    eval_seed: int = Field(0, description="draws the held-out rows; they do not depend on arm, order or seed")
    eval_bins: Bins | None = Field(None, description="bins that held-out rows and a sample are drawn from and measured by; default: curriculum.bins")
    sample_size: int | None = Field(None, ge=1, description="train so many rows only, held-out ones not counted: of each bin its share, always the same ones; null: all")
    max_quarantined: Share = Field(0.01, description="share of rows that may be quarantined before the run refuses to start")


class PhaseConfig(BaseModel):
    """One phase of a curriculum; any key of `training` beside these changes that key for this phase."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)
    name: str = Field(pattern=NAME, description="used in folder names")
    bins: tuple[int, ...] = Field(min_length=1, description="bins trained in this phase, from 1")
    replay: Share = Field(0.0, description="share of each bin of earlier phases that is trained again")

    @property
    def overrides(self) -> dict[str, object]:
        return dict(self.model_extra or {})


class CurriculumConfig(Section):
    """Bins, the order of phases over them, and what goes on between phases."""

    arm: Literal["phased", "one_off", "random"] = Field("phased", description="phased; all rows at once; or phases of the same sizes whose rows are drawn by seed")
    bins: Bins = Field(description="how rows are put into bins")
    order: tuple[int | tuple[int, ...], ...] | None = Field(None, description="bins in training order: [3, 1, 2], [3], [[1, 2], 3]; default: every bin, rising")
    phases: tuple[PhaseConfig, ...] | None = Field(None, description="instead of order: a list of {name, bins, replay, and any training key to override}")
    optimizer_state: Literal["reset", "keep"] = Field("reset", description="between phases: fresh moments, as in the paper, or go on with the old ones")
    lr_schedule: Literal["restart", "continue"] | None = Field(
        None,
        description="between phases: a fresh schedule, or one over the whole run; default is the paper's: restart, and one schedule for one_off "
        "(restart there means: at the phased arm's boundaries)",
    )

    @model_validator(mode="after")
    def _one_list(self) -> Self:
        if self.order is not None and self.phases is not None:
            raise ValueError("give order or phases, not both")
        for kind, entries in (("order", self.order), ("phases", self.phases)):
            if entries is not None and not entries:
                raise ValueError(f"{kind} names no phase")
        names = [phase.name for phase in self.phases or ()]
        if len(names) != len(set(names)):
            raise ValueError(f"two phases have the same name: {names}")
        for phase in self.phases or ():
            try:
                TrainingConfig.model_validate(phase.overrides)
            except ValidationError as error:
                raise ValueError(f"phase {phase.name!r}: " + "; ".join(_faults(error, TrainingConfig, "training."))) from None
            for key in ("deterministic", "adam_mu_dtype", "gradient_dtype"):
                if key in phase.overrides:
                    raise ValueError(f"phase {phase.name!r}: {key} holds for a whole run; set training.{key}")
        return self

    @property
    def restarts_schedule(self) -> bool:
        return self.lr_schedule == "restart" or (self.lr_schedule is None and self.arm != "one_off")


class TrainingConfig(Section):
    """One phase's optimization. Batches count examples, not rows: packing does not change them."""

    num_train_epochs: int = Field(2, ge=1, description="passes over the rows of each phase")
    max_steps: int = Field(-1, ge=-1, description="optimizer steps of each phase, instead of num_train_epochs; -1: by epochs")
    global_batch_size: int = Field(128, ge=1, description="examples of one optimizer step, over all devices and accumulation steps")
    gradient_accumulation_steps: int = Field(1, ge=1, description="parts in which a step's rows are computed, to save memory; does not change the result")
    learning_rate: float = Field(5.0e-6, gt=0, description="peak learning rate")
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field("cosine", description="as in transformers, formula for formula")
    warmup_ratio: Share = Field(0.1, description="share of a schedule's steps that warm up: ceil(ratio * steps)")
    optim: Literal["adamw", "sgd"] = Field("adamw", description="optimizer; sgd is plain, without momentum")
    weight_decay: float = Field(0.1, ge=0, description="decoupled weight decay, on all weights but norms and biases")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="decay of Adam's first moment")
    adam_beta2: float = Field(0.95, ge=0, lt=1, description="decay of Adam's second moment")
    adam_epsilon: float = Field(1.0e-8, gt=0, description="added to the root of Adam's second moment")
    adam_mu_dtype: FloatType | None = Field(None, description="dtype of Adam's first moment; default: model.param_dtype's; bfloat16 saves 2 bytes a parameter")
    gradient_dtype: FloatType | None = Field(
        None, description="dtype in which gradients are held; default: model.param_dtype's; bfloat16 saves memory; norm, moments, sums of parts and the embedding's stay wide"
    )
    on_nonfinite: Literal["stop", "skip"] = Field("stop", description="a loss or gradient that is no finite number ends the run, or its step is left out and counted")
    max_grad_norm: float = Field(1.0, gt=0, description="global gradient norm above which gradients are scaled down")
    deterministic: bool = Field(False, description="on GPUs, the same bits every time, at some cost in speed; CPUs and TPUs do that anyway")

    @model_validator(mode="after")
    def _steps(self) -> Self:
        if self.max_steps == 0:
            raise ValueError("max_steps 0 trains nothing; use -1 to go by num_train_epochs")
        return self


class MeshConfig(Section):
    """Devices along each axis; at most one axis is -1 and takes those that remain."""

    data: int = Field(1, ge=-1, description="copies of the model; over several TPU slices, the axis between them")
    fsdp: int = Field(-1, ge=-1, description="shards of weights, optimizer state and batch")
    tensor: int = Field(1, ge=-1, description="shards of heads, feed-forward and vocabulary")

    @model_validator(mode="after")
    def _sizes(self) -> Self:
        sizes = [self.data, self.fsdp, self.tensor]
        if 0 in sizes or sizes.count(-1) > 1:
            raise ValueError(f"axis sizes are positive, and at most one is -1; got data {self.data}, fsdp {self.fsdp}, tensor {self.tensor}")
        return self


class CheckpointConfig(Section):
    """When a run can be taken up again. The end of a phase is always saved."""

    save_minutes: float | None = Field(10.0, gt=0, description="minutes between checkpoints within a phase; null: only by steps")
    save_steps: int | None = Field(None, ge=1, description="optimizer steps between checkpoints within a phase; null: only by minutes")
    save_total_limit: int = Field(2, ge=1, description="checkpoints kept within a phase; the last of each phase is kept always")


class EvaluationConfig(Section):
    """What is measured on the held-out rows, beside their loss, before training and after each phase."""

    exact_match: bool = Field(False, description="answer the held-out prompts greedily and count responses that are right to the letter, white space aside")
    max_new_tokens: int = Field(32, ge=1, description="longest answer")
    show_answers: int = Field(3, ge=0, description="answers of each bin to print after the last phase (with exact_match)")


class LoggingConfig(Section):
    """What a run tells while it runs; metrics.jsonl is always written."""

    logging_steps: int = Field(1, ge=1, description="optimizer steps between lines of metrics.jsonl")
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = Field(("tensorboard",), description="further places for metrics")
    hang_minutes: float | None = Field(30.0, gt=0, description="minutes without a step after which the stacks of all threads are printed; null: never")
    run_name: str | None = Field(None, description="name in TensorBoard and W&B; default: the output folder's")


class ExportConfig(Section):
    """Hugging Face folders of the trained weights."""

    after_each_phase: bool = Field(True, description="write hf/<index>-<phase>/ after every phase, not only the last")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="dtype of the exported weights; default: the base's")
    data_license: str | None = Field(None, description="licence of the data, as the model card is to state it")
    push_to_hub: bool = Field(False, description="upload the last phase's folder when the run is done; it stays on the disk, too")
    hub_model_id: str | None = Field(None, description="name on the hub to upload to: owner/model")

    @model_validator(mode="after")
    def _named(self) -> Self:
        if self.push_to_hub and (self.hub_model_id is None or self.hub_model_id.count("/") != 1):
            raise ValueError(f"push_to_hub needs hub_model_id, a name such as owner/model; got {self.hub_model_id!r}")
        return self


class RunConfig(Section):
    """A whole run. Everything it makes lies under output_dir."""

    output_dir: str = Field(description="folder of the run: checkpoints, metrics, exports")
    seed: int = Field(3517, ge=0, description="draws the order of rows, random weights and the random arm")
    model: ModelConfig
    data: DataConfig
    curriculum: CurriculumConfig
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    logging: LoggingConfig = LoggingConfig()
    export: ExportConfig = ExportConfig()

    @model_validator(mode="after")
    def _gradients(self) -> Self:
        if self.training.gradient_dtype == "bfloat16" and self.model.dtype == "float32":
            raise ValueError("training.gradient_dtype bfloat16 would round the weights that model.dtype float32 computes with; leave it out, or set model.dtype bfloat16")
        return self


def load(path: str | Path, overrides: Iterable[tuple[str, str]] = ()) -> RunConfig:
    """Read a run from YAML and apply `(dotted key, YAML value)` overrides.

    Raises:
        UserError: no such file, not YAML, an unknown key, a value of the wrong kind; one line for each fault.
    """
    tree = read(path)
    for key, text in overrides:
        set_key(tree, key, text)
    return valid(RunConfig, tree)


def read(path: str | Path, keys: str = "output_dir, model, data") -> dict[str, Any]:
    """A YAML file's mapping, which has keys such as these; raises `UserError` where it is none."""
    try:
        local = pictures.copy(str(path), "config") if pictures.is_ours(str(path)) else Path(path)
        tree = yaml.safe_load(local.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"config: cannot read '{path}': {error.strerror}; give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"config: '{path}' is not YAML: " + " ".join(str(error).split())) from None
    if not isinstance(tree, dict):
        raise UserError(f"config: '{path}' must be a mapping of keys such as {keys}")
    return tree


def valid(kind: type[S], tree: Any, prefix: str = "") -> S:
    """A group of keys from what a YAML says of it; raises `UserError`, one line for each fault, where its keys have that prefix."""
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise UserError("\n".join(_faults(error, kind, prefix))) from None

def dump(config: RunConfig) -> str:
    """The resolved run as YAML; `load` of it gives an equal value."""
    return yaml.safe_dump(config.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True, width=200)


def changed(config: RunConfig, values: Mapping[str, Any]) -> RunConfig:
    """The same run with other values of some dotted keys; raises `UserError` as `load` does."""
    tree = config.model_dump(mode="json", by_alias=True)
    for key, value in values.items():
        set_key(tree, key, yaml.safe_dump(value))
    return valid(RunConfig, tree)


def fields(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterable[tuple[str, str, str]]:
    """Every key of a run as (dotted name, default as text, description), for `--help` and for tests."""
    for name, info in section.model_fields.items():
        key = prefix + (info.alias or name)
        if isinstance(info.annotation, type) and issubclass(info.annotation, BaseModel):
            yield from fields(info.annotation, key + ".")
        else:
            default = list(info.default) if isinstance(info.default, tuple) else info.default
            yield key, "required" if info.is_required() else yaml.safe_dump(default, default_flow_style=True).split("\n")[0], info.description or ""


def unknown_key_message(key: str, known: Iterable[str], prefix: str = "") -> str:
    """One line for a key that nothing reads: its name elsewhere, or the nearest valid one."""
    if key in FOREIGN_KEYS:
        return f"unknown key {prefix}{key}: {FOREIGN_KEYS[key]}"
    here = difflib.get_close_matches(key, list(known), n=1)
    if here:
        return f"unknown key {prefix}{key}; did you mean {prefix}{here[0]}?"
    inside = [name for name, _, _ in fields() if name.startswith(f"{key}.")]
    if inside:
        return f"unknown key {prefix}{key}; its keys are {', '.join(inside)}"
    last = {name.rsplit(".", 1)[-1]: name for name, _, _ in fields()}
    near = difflib.get_close_matches(key, list(last), n=1)
    return f"unknown key {prefix}{key}" + (f"; did you mean {last[near[0]]}?" if near else f"; known here: {', '.join(known)}")


def set_key(tree: dict[str, Any], dotted: str, text: str) -> None:
    """Put a YAML value at a dotted key."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *path, last = dotted.split(".")
    for name in path:
        if not isinstance(tree.get(name), dict):
            tree[name] = {}
        tree = tree[name]
    tree[last] = value


def _faults(error: ValidationError, root: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """One line for each fault. For a value that may be of two kinds pydantic complains once for each; the complaint that reaches deepest stays."""
    located = [(_location(item["loc"], root), item) for item in error.errors()]
    faults: dict[tuple[int | str, ...], str] = {}
    for location, item in located:
        if not any(len(other) > len(location) and other[: len(location)] == location for other, _ in located):
            faults.setdefault(location, _fault(item, location, root, prefix))
    return list(faults.values())


def _location(loc: tuple[int | str, ...], root: type[BaseModel]) -> tuple[int | str, ...]:
    """The part of pydantic's location that the user wrote: it puts in the kinds that a value may be of."""
    section: type[BaseModel] | None = root
    location: list[int | str] = []
    for part in loc:
        if section is not None or isinstance(part, int) or part in PhaseConfig.model_fields:
            location.append(part)
        section = _section(section, part) if section is not None else None
    return tuple(location)


def _section(section: type[BaseModel], key: int | str) -> type[BaseModel] | None:
    info = section.model_fields.get(str(key))
    kinds = (info.annotation, *get_args(info.annotation)) if info else ()
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def _fault(item: Any, location: tuple[int | str, ...], root: type[BaseModel], prefix: str) -> str:
    dotted = prefix + ".".join(map(str, location))
    given = item["input"]
    if item["type"] == "extra_forbidden":
        *path, key = location
        section: Any = root
        for part in path:
            section = _section(section, part)
        return unknown_key_message(str(key), [info.alias or name for name, info in section.model_fields.items()], prefix + "".join(f"{part}." for part in path))
    if item["type"] == "missing":
        return f"{dotted}: missing; give it in the YAML" + (f" or as --{dotted} VALUE" if dotted in {name for name, _, _ in fields()} else "")
    if item["type"] == "model_type":
        return f"{dotted}: should be a mapping of keys, got {given!r}"
    message = item["msg"].removeprefix("Value error, ").replace("valid tuple", "list")
    message = message[:1].lower() + message[1:]
    return (f"{dotted}: " if dotted else "") + message + ("" if isinstance(given, dict | BaseModel) else f", got {given!r}")

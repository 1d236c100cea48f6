"""Answers of a model to prompts, in a file that a kill does not harm.

Each batch's lines are added to a part beside the file, in one write; when all are there, the file is made of them, in the prompts' order.
Batches are a function of prompts and batch size alone, and one that is not there whole is generated again, whole.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
from jax.sharding import Mesh

from phased_ift_jax import pictures
from phased_ift_jax.config import load
from phased_ift_jax.data.prompts import Prompt
from phased_ift_jax.data.tokenization import decode, end_of_response, load_tokenizer, prompt_ids
from phased_ift_jax.files import write_whole
from phased_ift_jax.models import generation, hub
from phased_ift_jax.models.decoder import Params, parameter_dims, parameter_shapes, unrolled
from phased_ift_jax.models.hf_folder import Folder, open_folder
from phased_ift_jax.models.tensor_files import weight_files
from phased_ift_jax.object_store import Objects
from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import tree_shardings
from phased_ift_jax.training import conversion, manifest, mirror
from phased_ift_jax.training.model_card import PROVENANCE

Line = dict[str, Any]
TOLD = ("response", "finish_reason", "prompt_tokens", "response_tokens")


@dataclass(frozen=True)
class Settings:
    """What decides the answers, beside model and prompts; it is in every line."""

    max_new_tokens: int = 1024
    max_length: int | None = None  # of prompt and response; None: what the model was made for
    dtype: str | None = None  # None: that of the run that trained the model, else bfloat16
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    prompt_template: str | None = None  # None: that of the run, else user_assistant


@dataclass(frozen=True, eq=False)
class Model:
    """A model that answers: where it lies, what its weights are, and the run's settings where a run trained it. No weight is read yet."""

    name: str
    folder: Folder
    checkpoint: Path | None  # None: safetensors
    trained: dict[str, Any] | None

    @property
    def identity(self) -> str:
        """Of the weights, by name, size and age of their files."""
        files = weight_files(self.folder.path) if self.checkpoint is None else [path for path in self.checkpoint.rglob("*") if path.is_file()]
        return conversion.fingerprint(files)[:16]

    def load(self, dtype: str, mesh: Mesh) -> Params:
        """The weights in this dtype, sharded."""
        shardings = tree_shardings(parameter_dims(self.folder.config), parameter_shapes(self.folder.config, jnp.dtype(dtype)), mesh)
        return conversion.load_weights(self.folder, self.checkpoint, shardings, dtype)

    def resolved(self, settings: Settings) -> Settings:
        """The settings with what the model says where they say nothing.

        Raises:
            UserError: another template than the model was trained with, or more tokens than it has positions.
        """
        trained, most = self.trained, self.folder.max_length
        template = settings.prompt_template or (trained["data"]["prompt_template"] if trained else "user_assistant")
        if trained and template != trained["data"]["prompt_template"]:
            raise UserError(f"--prompt_template: '{self.name}' was trained with {trained['data']['prompt_template']}, not {template}; leave the flag out")
        if (settings.max_length or 0) > most:
            raise UserError(f"--max_length: {settings.max_length} is more than the {most} positions that '{self.name}' was made for")
        dtype = settings.dtype or (trained["model"]["dtype"] if trained else "bfloat16")
        return Settings(**asdict(settings) | {"prompt_template": template, "max_length": settings.max_length or most, "dtype": dtype})


@contextmanager
def opened(source: str) -> Iterator[Model]:
    """The model at a Hugging Face folder or name, in a folder made by `convert from-hf`, a run (its newest finished phase), a phase or a checkpoint of it.

    Raises:
        UserError: there is none, or it is damaged.
    """
    path = Path(source).expanduser()
    is_model = Objects(source, "--model").facts("config.json") is not None if pictures.is_ours(source) else (path / "config.json").exists() or not path.is_dir()
    if is_model:
        if not (path.is_dir() or pictures.is_ours(source) or hub.is_name(source)):
            raise UserError(f"--model: no such folder '{source}'; give a run, a checkpoint of it, a Hugging Face folder or a hub name")
        folder = open_folder(source)
        conversion.check_weights(folder)
        try:
            trained = json.loads((folder.path / PROVENANCE).read_text(encoding="utf-8")).get("settings")
        except (OSError, ValueError, AttributeError):
            trained = None
        yield Model(folder.name, folder, folder.converted, trained)
        return
    with conversion.found(source) as found:
        if fault := found.run and manifest.fault(found.checkpoint):
            raise UserError(f"'{mirror.shown(found.checkpoint)}' is damaged: {fault}; name another checkpoint")
        conversion.check(found)
        trained = load(found.run / "config.yaml").model_dump(mode="json", by_alias=True) if found.run else None
        yield Model(mirror.shown(found.checkpoint), found.base, found.checkpoint, trained)


def answer(model: Model, prompts: Sequence[Prompt], settings: Settings, mesh: Mesh, batch_size: int, book: Book, tick: generation.Tick) -> list[Line]:
    """One line for each prompt, in order: its fields, the settings, and the response or why there is none. What `book` has is not generated again.

    Raises:
        UserError: a prompt that holds a control token, or a book of other prompts or settings.
    """
    settings, tokenizer = model.resolved(settings), load_tokenizer(model.folder.path, model.folder.config.vocab_size)
    template, dtype, most = settings.prompt_template, settings.dtype, settings.max_length
    assert template is not None and dtype is not None and most is not None, "resolved"  # noqa: PT018
    stated = {"model": model.name, "model_id": model.identity} | asdict(settings)
    asked = [_asked(prompt) | stated for prompt in prompts]
    there = book.read([prompt.name for prompt in prompts], asked)
    ids = [prompt_ids(prompt.record, tokenizer, template) for prompt in prompts]

    def line(at: int, response: str | None, reason: str, tokens: int) -> Line:
        return asked[at] | dict(zip(TOLD, (response, reason, len(ids[at]), tokens), strict=True))

    lines = [there.get(prompt.name) or line(at, None, "too_long", 0) for at, prompt in enumerate(prompts)]
    fitting = [at for at in range(len(prompts)) if len(ids[at]) < most]
    batches = [[fitting[at] for at in batch] for batch in generation.in_batches([len(ids[at]) for at in fitting], batch_size)]
    left = [batch for batch in batches if any(prompts[at].name not in there for at in batch)]
    tick(0, len(prompts) - sum(map(len, left)))
    if left:
        params = unrolled(model.load(dtype, mesh), give_up=True)
        ends = model.folder.end_tokens | {tokenizer.eos_token_id, end_of_response(tokenizer, template)}
        decoding = generation.Decoding(settings.temperature, settings.top_k, settings.top_p)
        generator = generation.Generator(model.folder.config, tuple(sorted(ends)), decoding, mesh, batch_size)

        def given(at: int) -> generation.Prompt:
            return generation.Prompt(ids[at], min(settings.max_new_tokens, most - len(ids[at])), generation.sample_key(settings.seed, prompts[at].name))

        for batch, responses in zip(left, generator.in_turn(params, [[given(at) for at in batch] for batch in left], tick), strict=True):
            for at, response in zip(batch, responses, strict=True):
                lines[at] = line(at, decode(response.ids, tokenizer), "eos" if response.ended else "length", len(response.ids))
            book.add([lines[at] for at in batch])
    book.finish(lines)
    return lines


def _asked(prompt: Prompt) -> Line:
    """A prompt's row, with what every prompt has under the same keys; an answer that came with it gives way to ours."""
    turn, fields = prompt.record.turns[0], {key: value for key, value in prompt.fields.items() if key not in TOLD}
    return fields | {"set": prompt.set, "id": prompt.record.id, "instruction": turn.instruction, "input": turn.input}


class Book:
    """The answers file and its part; without a path, nothing is written."""

    def __init__(self, path: Path | None = None, part: BinaryIO | None = None) -> None:
        self.path, self._part = path, part

    def read(self, names: Sequence[str], asked: Sequence[Line]) -> dict[str, Line]:
        """The lines that are there by the name of their prompt; a torn last one is cut off.

        Raises:
            UserError: they answer other prompts, or were made with other settings.
        """
        if self.path is None or self._part is None:
            return {}
        whole = self.path.exists()
        text = self.path.read_bytes() if whole else self._part.read()
        if not whole:
            self._part.truncate(text.rfind(b"\n") + 1)
        expected, there = dict(zip(names, asked, strict=True)), {}
        for number, row in enumerate(text[: text.rfind(b"\n") + 1].splitlines(), 1):
            try:
                line = json.loads(row)
                name = f"{line['set']}/{line['id']}"
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--out: '{self.path}', line {number} is no answer; name another file") from None
            if name not in expected:
                raise UserError(f"--out: '{self.path}' answers {name}, which is not asked now; name another file")
            for key, value in expected[name].items():
                if line.get(key) != value:
                    raise UserError(f"--out: '{self.path}' was made with {key} {line.get(key)!r} ({name}), this is {value!r}; name another file")
            there[name] = line
        if whole and len(there) < len(expected):
            raise UserError(f"--out: '{self.path}' answers {len(there)} of these {len(expected)} prompts; name another file")
        return there

    def add(self, lines: Sequence[Line]) -> None:
        """Add a batch."""
        if self._part is not None:
            self._part.write(_text(lines))
            self._part.flush()

    def finish(self, lines: Sequence[Line]) -> None:
        """Make the file of all lines."""
        if self.path is not None and not self.path.exists():
            write_whole(self.path, _text(lines).decode())


def _text(lines: Sequence[Line]) -> bytes:
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()


@contextmanager
def writing(path: Path) -> Iterator[Book]:
    """The book at a path, of which this process is the only writer.

    Raises:
        UserError: it cannot be written, or another process writes it.
    """
    part = path.with_name(f".{path.name}.answers")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(part, "ab+")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--out: cannot write '{path}': {error.strerror}; name another file") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"--out: another process is writing '{path}'; wait for it, or name another file") from None
        file.seek(0)
        yield Book(path, file)
        if path.exists():
            part.unlink()

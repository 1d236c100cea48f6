"""A Hugging Face model folder: where it is, what architecture it holds, and the files beside the weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import ModuleType
from typing import Any

from phased_ift_jax import pictures
from phased_ift_jax.models import hub, llama, mistral, qwen2
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.models.tensor_files import weight_files
from phased_ift_jax.records import UserError

FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral, "qwen2": qwen2}
BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*.jinja",
    "tekken.json",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
KEY = "model.model_name_or_path"
CARD = "README.md"
CONVERTED, CONVERSION = "checkpoint", "conversion.json"  # in a folder made by `convert from-hf`: its weights, for orbax, and what they were


SMALL = ("*.json", CARD, *BESIDE, f"{CONVERTED}/commit_success.txt", f"{CONVERTED}/*/_METADATA")  # of a folder in a bucket: what is copied to this machine


@dataclass(frozen=True)
class Folder:
    """A model folder on a disk, or in a bucket, of which `path` shows all but the weights; `attributes` is config.json as it stands."""

    path: Path
    attributes: dict[str, Any]
    config: DecoderConfig

    @property
    def name(self) -> str:
        """Where it lies, as the user knows it."""
        return pictures.shown(self.path)

    @property
    def weights(self) -> list[tuple[str, str, str]]:
        """The family's table of (our path, tensor name, layout), without a head where it is tied."""
        rows = FAMILIES[self.attributes["model_type"]].WEIGHTS
        return [row for row in rows if row[0] != "lm_head" or not self.config.tie_word_embeddings]

    @property
    def dtype(self) -> str:
        """The dtype that config.json states for the weights (transformers 5: `dtype`, before: `torch_dtype`)."""
        return str(self.attributes.get("dtype") or self.attributes.get("torch_dtype") or "float32")

    @property
    def max_length(self) -> int:
        """How many positions the model was made for."""
        name = "max_position_embeddings"
        return int(self.attributes.get(name) or FAMILIES[self.attributes["model_type"]].DEFAULTS[name])

    @property
    def end_tokens(self) -> set[int]:
        """The ids at which generation stops, as generation_config.json, or else config.json, has them."""
        try:
            stated = json.loads((self.path / "generation_config.json").read_text(encoding="utf-8")).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            stated = self.attributes.get("eos_token_id")
        return {one for one in (stated if isinstance(stated, list) else [stated]) if isinstance(one, int)}

    @property
    def has_weights(self) -> bool:
        """Whether there are safetensors to read, rather than config and tokenizer alone, with which the hub's cache may hold an index."""
        try:
            return bool(weight_files(self.path))
        except UserError:
            return False

    @property
    def converted(self) -> Path | None:
        """The orbax checkpoint of a folder made by `convert from-hf`."""
        return self.path / CONVERTED if (self.path / CONVERSION).exists() else None

    def converted_dtypes(self) -> dict[str, str]:
        """Of a folder made by `convert from-hf`: the safetensors dtype of each tensor of its base.

        Raises:
            UserError: the file that says so is damaged.
        """
        try:
            return {str(name): str(code) for name, code in json.loads((self.path / CONVERSION).read_text(encoding="utf-8"))["dtypes"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"'{pictures.shown(self.path / CONVERSION)}' is damaged; convert the model again") from None

    def beside(self) -> list[Path]:
        """Tokenizer, generation settings and licences: what an export copies byte for byte."""
        return sorted({file for pattern in BESIDE for file in self.path.glob(pattern) if file.is_file()})

    def small(self) -> dict[str, Path]:
        """config.json and all that lies beside the weights, by name."""
        return {str(file.relative_to(self.path)): file for file in [self.path / "config.json", *self.beside()]}

    def copy_beside(self, destination: Path) -> None:
        """Copy config.json and all that lies beside the weights, byte for byte."""
        for name, file in self.small().items():
            copy = destination / name
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, copy)

    def generation_config(self) -> str | None:
        """What a generation_config.json says where the base has none: config.json's own token ids, as transformers derives them."""
        ids = {name: self.attributes[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if self.attributes.get(name) is not None}
        return json.dumps({"_from_model_config": True} | ids, indent=2) + "\n" if ids else None


def is_small(name: str) -> bool:
    """Whether an object of a model folder is copied to this machine: all but the weights."""
    return any(name.count("/") == pattern.count("/") and fnmatchcase(name, pattern) for pattern in SMALL)


def open_folder(name_or_path: str, revision: str | None = None, weights: bool = True) -> Folder:
    """A model folder on disk or at an address in a bucket, or a hub name brought to the local cache.

    Raises:
        UserError: no such folder, address or name, no access, no config.json, an architecture or attribute that we do not compute.
    """
    path = pictures.take(name_or_path, KEY, is_small) if pictures.is_ours(name_or_path) else Path(name_or_path).expanduser()
    if not path.is_dir():
        if not hub.is_name(name_or_path):
            raise UserError(f"model.model_name_or_path: no such folder '{name_or_path}'; give a folder with config.json, or a hub name such as meta-llama/Llama-2-7b-hf")
        path = hub.download(name_or_path, revision, ["*.json", CARD, *BESIDE] + ["*.safetensors"] * weights)
    try:
        attributes = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"model.model_name_or_path: '{pictures.shown(path)}' has no config.json; give a Hugging Face model folder") from None
    except OSError as error:
        raise UserError(f"model.model_name_or_path: cannot read '{pictures.shown(path / 'config.json')}': {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"model.model_name_or_path: '{pictures.shown(path / 'config.json')}' is not JSON: {error}") from None
    if not isinstance(attributes, dict):
        raise UserError(f"model.model_name_or_path: '{pictures.shown(path / 'config.json')}' is not a JSON object; give a Hugging Face model folder")
    kind = attributes.get("model_type")
    family = FAMILIES.get(kind) if isinstance(kind, str) else None
    if family is None:
        raise UserError(f"config.json: model_type {kind!r} is not supported (only {', '.join(FAMILIES)})")
    architectures = attributes.get("architectures") or [family.ARCHITECTURE]
    if architectures != [family.ARCHITECTURE]:
        raise UserError(f"config.json: architectures {architectures} is not supported (only {family.ARCHITECTURE})")
    return Folder(path, attributes, family.decoder_config(attributes))

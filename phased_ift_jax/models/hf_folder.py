"""A Hugging Face model folder: where it is, what architecture it holds, and the files beside the weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from phased_ift_jax.models import llama, mistral
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import UserError

FAMILIES: dict[str, ModuleType] = {"llama": llama, "mistral": mistral}
BESIDE = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
)


@dataclass(frozen=True)
class Folder:
    """A local model folder; `attributes` is config.json as it stands."""

    path: Path
    attributes: dict[str, Any]
    config: DecoderConfig

    @property
    def weights(self) -> list[tuple[str, str, str]]:
        """The family's table of (our path, tensor name, layout), without a head where it is tied."""
        rows = FAMILIES[self.attributes["model_type"]].WEIGHTS
        return [row for row in rows if row[0] != "lm_head" or not self.config.tie_word_embeddings]

    @property
    def dtype(self) -> str:
        """The dtype that config.json states for the weights (transformers 5: `dtype`, before: `torch_dtype`)."""
        return str(self.attributes.get("dtype") or self.attributes.get("torch_dtype") or "float32")

    def beside(self) -> list[Path]:
        """Tokenizer, generation settings and licences: what an export copies byte for byte."""
        return sorted({file for pattern in BESIDE for file in self.path.glob(pattern) if file.is_file()})


def open_folder(name_or_path: str, revision: str | None = None, weights: bool = True) -> Folder:
    """A model folder on disk, or a hub name brought to the local cache.

    Raises:
        UserError: no such folder or name, no access, no config.json, an architecture or attribute that we do not compute.
    """
    path = Path(name_or_path).expanduser()
    if not path.is_dir():
        path = _download(name_or_path, revision, weights)
    try:
        attributes = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except OSError:
        raise UserError(f"model.model_name_or_path: '{path}' has no config.json; give a Hugging Face model folder") from None
    except ValueError as error:
        raise UserError(f"model.model_name_or_path: '{path / 'config.json'}' is not JSON: {error}") from None
    family = FAMILIES.get(attributes.get("model_type", ""))
    if family is None:
        raise UserError(f"config.json: model_type {attributes.get('model_type')!r} is not supported (only {', '.join(FAMILIES)})")
    architectures = attributes.get("architectures") or [family.ARCHITECTURE]
    if architectures != [family.ARCHITECTURE]:
        raise UserError(f"config.json: architectures {architectures} is not supported (only {family.ARCHITECTURE})")
    return Folder(path, attributes, family.decoder_config(attributes))


def _download(name: str, revision: str | None, weights: bool) -> Path:
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"model.model_name_or_path: no such folder '{name}'; give a folder with config.json, or a hub name such as meta-llama/Llama-2-7b-hf")
    import huggingface_hub
    from huggingface_hub import errors

    patterns = ["*.json", "tokenizer*", "chat_template*", "merges.txt", "LICENSE*", "NOTICE*", "USE_POLICY*"] + ["*.safetensors"] * weights
    try:
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns, ignore_patterns=["consolidated*"]))
    except errors.GatedRepoError:
        raise UserError(f"model.model_name_or_path: '{name}' is gated; accept the licence on its page, then set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise UserError(f"model.revision: '{name}' has no branch, tag or commit {revision!r}") from None
    except errors.HFValidationError:
        raise UserError(f"model.model_name_or_path: no such folder '{name}', and it is not a hub name") from None
    except errors.RepositoryNotFoundError:
        raise UserError(f"model.model_name_or_path: no folder and no hub model '{name}' (a private one needs HF_TOKEN)") from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled, OSError) as error:
        raise UserError(f"model.model_name_or_path: cannot reach the hub for '{name}', and it is not in the cache ({type(error).__name__}); give a local folder") from None

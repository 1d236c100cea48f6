"""What a model is and whether it can be trained here, found out from its config, its tokenizer and the headers of its weights."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import Any

from phased_ift_jax.data.tokenization import load_tokenizer
from phased_ift_jax.models import hf_weights, hub
from phased_ift_jax.models.hf_folder import Folder, open_folder
from phased_ift_jax.models.tensor_files import DTYPES, Tensors
from phased_ift_jax.records import UserError
from phased_ift_jax.training import conversion

Header = dict[str, tuple[str, tuple[int, ...]]]  # of each tensor: dtype by its safetensors code, shape


def inspect(name_or_path: str, revision: str | None = None) -> tuple[dict[str, Any], str | None]:
    """Facts of a model by heading, as far as they go, and the reason why it cannot be trained (None: it can). Loads no weights.

    Raises:
        UserError: there is no such model, or its config.json is of an architecture that is not ours.
    """
    folder = open_folder(name_or_path, revision, weights=False)
    facts: dict[str, Any] = {"model": folder.name} | _architecture(folder)
    fault = None
    for look in (_weights, _tokenizer):
        try:
            facts |= look(folder, name_or_path, revision)
        except UserError as error:
            fault = fault or str(error)
    return facts, fault


def _architecture(folder: Folder) -> dict[str, Any]:
    config = folder.config
    rope = config.rope
    return {
        "architecture": (folder.attributes.get("architectures") or [folder.attributes["model_type"]])[0],
        "layers": config.num_layers,
        "width": config.hidden_size,
        "feed-forward": config.intermediate_size,
        "heads": config.num_heads,
        "key/value heads": config.num_kv_heads,
        "head width": config.head_dim,
        "vocabulary": config.vocab_size,
        "embeddings": "tied" if config.tie_word_embeddings else "not tied",
        "sliding window": config.sliding_window,
        "rope": f"theta {rope.theta:g}" + ("" if rope.kind == "default" else f", {rope.kind} scaling by {rope.factor:g}"),
        "parameters": sum(math.prod(weight.shape) for weight in hf_weights.weights(folder)),
    }


def _weights(folder: Folder, name_or_path: str, revision: str | None) -> dict[str, Any]:
    if folder.converted:
        conversion.check_weights(folder)
        shapes = {name: weight.layout.their_shape(weight.each) for weight in hf_weights.weights(folder) for name in weight.names}
        header: Header = {name: (code, shapes[name]) for name, code in folder.converted_dtypes().items()}
        form = "orbax, made by convert from-hf"
    elif folder.has_weights or Path(name_or_path).expanduser().is_dir():
        tensors = Tensors(folder.path)
        header = {name: (tensors.code(name), tensors.shape(name)) for name in tensors.names()}
        form = f"safetensors in {len(tensors.files)} file{'s'[: len(tensors.files) - 1]}"
    else:
        header = {name: (dtype, tuple(shape)) for name, (dtype, shape) in hub.headers(name_or_path, revision).items()}
        form = "safetensors on the hub"
    hf_weights.check_shapes(folder, {name: shape for name, (_, shape) in header.items()})
    unread = next((f"{name} has dtype {code}; only {', '.join(DTYPES)} are read, no quantized weights" for name, (code, _) in header.items() if code not in DTYPES), None)
    if unread:
        raise UserError(f"model.model_name_or_path: {unread}")
    count = Counter(DTYPES[code].name for code, _ in header.values())
    return {
        "weights": form,
        "tensors": len(header),
        "dtype": ", ".join(f"{name} ({number})" for name, number in count.most_common()) if len(count) > 1 else next(iter(count)),
        "bytes": sum(math.prod(shape) * DTYPES[code].itemsize for code, shape in header.values()),
    }


def _tokenizer(folder: Folder, *_: object) -> dict[str, Any]:
    tokenizer = load_tokenizer(folder.path, folder.config.vocab_size)
    return {
        "tokenizer": "tokenizer.json" if (folder.path / "tokenizer.json").exists() else "tokenizer.model",
        "tokens": len(tokenizer),
        "beginning of sequence": f"{tokenizer.bos_token} ({tokenizer.bos_token_id})" if tokenizer.bos_token else None,
        "end of sequence": f"{tokenizer.eos_token} ({tokenizer.eos_token_id})",
        "chat template": "yes" if tokenizer.chat_template else "no",
    }

"""A Hugging Face folder from tensors: the base's names, config, tokenizer and licences, weights in shards, written aside and renamed."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from phased_ift_jax.files import building, clear, write_whole
from phased_ift_jax.making import SOURCE, Making
from phased_ift_jax.models.hf_folder import Folder
from phased_ift_jax.models.tensor_files import INDEX, Tensor, index_text, read_header, shards, stream_tensors, write_tensors


def export(
    tensors: Sequence[Tensor],
    folder: Folder,
    destination: Path,
    *,
    dtype: str | None = None,
    texts: Mapping[str, str] | None = None,
    source: str | None = None,
    done: Callable[[int], object] = lambda size: None,
) -> None:
    """Write `tensors` as the model that `folder` is the base of; whole, or not there. The destination must not exist.

    `dtype` is what config.json is to state instead of the base's; `texts` are further files by name, which go before the base's. An
    export that was stopped goes on where `source` (a text that says what the tensors are) is the same; else it starts again. `done` is
    told the bytes of each tensor written.

    Raises:
        UserError: the disk is full, or another process writes the same destination.
    """
    with building(destination, SOURCE) as part:
        if source is None or not (part / SOURCE).exists() or (part / SOURCE).read_text(encoding="utf-8") != source:
            clear(part, SOURCE)
            write_whole(part / SOURCE, source or "")
        files = shards(tensors)
        for name, group in files.items():
            if (part / name).exists() and {tensor.name for tensor in group} == read_header(part / name).keys():
                done(sum(tensor.nbytes for tensor in group))
            else:
                write_tensors(part / name, group, done)
        if len(files) > 1:
            write_whole(part / INDEX, index_text(files))
        folder.copy_beside(part)
        for name, text in (_changed(folder, dtype) | dict(texts or {})).items():
            write_whole(part / name, text)


def export_to_bucket(
    tensors: Sequence[Tensor],
    folder: Folder,
    made: Making,
    *,
    dtype: str | None = None,
    texts: Mapping[str, str] | None = None,
    done: Callable[[int], object] = lambda size: None,
) -> None:
    """The same in a bucket: each file of weights goes there as it is made, and none of it onto this machine's disk."""
    files = shards(tensors)
    for name, group in files.items():
        if name in made.there:
            done(sum(tensor.nbytes for tensor in group))
        else:
            with made.objects.writing(name) as write:
                stream_tensors(write, group, made.watched(done))
    changed = _changed(folder, dtype) | dict(texts or {}) | ({INDEX: index_text(files)} if len(files) > 1 else {})
    made.finish({name: file.read_bytes() for name, file in folder.small().items()} | {name: text.encode() for name, text in changed.items()})


def _changed(folder: Folder, dtype: str | None) -> dict[str, str]:
    """Files that are not the base's byte for byte: config.json where it is to state another dtype, generation_config.json where the base has none."""
    changed = {}
    if dtype is not None and dtype != folder.dtype:
        keys = [key for key in ("dtype", "torch_dtype") if key in folder.attributes] or ["torch_dtype"]
        changed["config.json"] = json.dumps(folder.attributes | dict.fromkeys(keys, dtype), indent=2) + "\n"
    generation = folder.generation_config()
    if generation and not (folder.path / "generation_config.json").exists():
        changed["generation_config.json"] = generation
    return changed

"""Whole models between Hugging Face folders and orbax checkpoints, a few tensors at a time.

Both ways a destination is made aside and renamed when whole, or, in a bucket, whole with its last object. A call that was stopped goes on from what it had finished, if its source
is still the same; a destination that this source has made is left as it is.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from phased_ift_jax import pictures
from phased_ift_jax.data.tokenizer_json import added_files
from phased_ift_jax.files import building, clear, part_of, write_whole
from phased_ift_jax.making import SOURCE, is_made, making
from phased_ift_jax.models import hf_weights
from phased_ift_jax.models.decoder import Params, parameter_shapes
from phased_ift_jax.models.hf_export import export, export_to_bucket
from phased_ift_jax.models.hf_folder import CARD, CONVERSION, CONVERTED, Folder, is_small, open_folder
from phased_ift_jax.models.tensor_files import CODES, Tensors, ahead, reordered
from phased_ift_jax.object_store import Objects, crc32c_of
from phased_ift_jax.records import UserError
from phased_ift_jax.training import manifest, mirror
from phased_ift_jax.training.checkpoint import Checkpoints, load_params, metadata_of
from phased_ift_jax.training.model_card import PROVENANCE, card, provenance
from phased_ift_jax.training.stored import Stored

Done = Callable[[int], object]  # told the bytes of what is done, part by part
Progress = Callable[[int], Done]  # told the bytes of the whole


def silent(total: int) -> Done:
    """No progress is shown."""
    return lambda size: None


@dataclass(frozen=True)
class Source:
    """Weights to be exported: a checkpoint, the base that gives names, config and tokenizer, and the run that made it, if one did."""

    checkpoint: Path
    base: Folder
    run: Path | None


def from_hf(folder: Folder, destination: Path | str, progress: Progress = silent) -> bool:
    """Write a Hugging Face model as a folder with an orbax checkpoint and all of the base but its weights. False: it is there already.

    A destination that is a text is an address in a bucket, to which the arrays go straight.

    Raises:
        UserError: weights that are not what config.json says, a destination that holds something else, a full disk.
    """
    if folder.converted:
        raise UserError(f"'{folder.name}' was made by from-hf already")
    tensors = hf_weights.check(folder)
    weights = hf_weights.weights(folder)
    source = fingerprint([*tensors.files, *_texts(folder)])
    if _is_there(destination, CONVERSION, source):
        return False
    total, ranks = _bytes_of(folder, None), {weight.path: len(weight.shape) for weight in weights}
    small = [folder.small(), {CARD: folder.path / CARD} if (folder.path / CARD).exists() else {}]
    dtypes = {name: CODES[tensors.dtype(name).name] for weight in weights for name in weight.names}
    noted = json.dumps({"source": source, "dtypes": dtypes}, indent=1) + "\n"
    if isinstance(destination, str):
        with making(destination, source) as made, TemporaryDirectory(prefix="phased_ift_jax-") as part, pictures.showing(Path(part), made.objects, made.there):
            _lay_out(Path(part) / CONVERTED, ranks)
            _convert(tensors, weights, Stored(Path(part) / CONVERTED), made.watched(progress(total)))
            laid_out = {str(path.relative_to(part)): path for path in Path(part).rglob("*") if path.is_file()}
            made.finish({name: path.read_bytes() for name, path in (laid_out | small[0] | small[1]).items()} | {CONVERSION: noted.encode()})
        return True
    _check_space(destination, total)
    with building(destination, SOURCE) as aside:
        if not (aside / SOURCE).exists() or (aside / SOURCE).read_text(encoding="utf-8") != source:
            clear(aside, SOURCE)
            _lay_out(aside / CONVERTED, ranks)
            write_whole(aside / SOURCE, source)
        for unfinished in aside.rglob("*.__lock"):
            unfinished.unlink()
        _convert(tensors, weights, Stored(aside / CONVERTED), progress(total))
        folder.copy_beside(aside)
        for name, card_of_base in small[1].items():
            shutil.copyfile(card_of_base, aside / name)
        write_whole(aside / CONVERSION, noted)
    return True


def _convert(tensors: Tensors, weights: list[hf_weights.Weight], stored: Stored, done: Done) -> None:
    """Write every array, layer by layer, that is not there yet."""

    def convert(item: tuple[hf_weights.Weight, int]) -> int:
        weight, layer = item
        dtype = _common_dtype([tensors.dtype(name) for name in weight.names])
        if not stored.has(weight.path, layer, len(weight.shape)):
            array = stored.create(weight.path, weight.shape, dtype, weight.stacked)
            theirs = tensors.read(weight.names[layer], tuple(slice(None) for _ in weight.layout.theirs))
            ours = reordered(weight.layout.to_ours(theirs, weight.each), dtype)
            (array[layer] if weight.stacked else array).write(ours, can_reference_source_data_indefinitely=True).result()
        return math.prod(weight.each) * tensors.dtype(weight.names[layer]).itemsize

    for size in ahead(convert, ((weight, layer) for weight in weights for layer in range(len(weight.names)))):
        done(size)


@contextmanager
def found(source: str, base: str | None = None) -> Iterator[Source]:
    """What `find` finds, in a bucket, too; arrays are read from there.

    Raises:
        UserError: as `find` does, or nothing lies at an address.
    """
    if not pictures.is_ours(source):
        yield find(source, base)
        return
    run, _, inside = source.rstrip("/").partition("/checkpoints/")
    with pictures.told("SRC"):
        in_run = Objects(run, "SRC").facts("config.yaml") is not None
    if in_run:
        with mirror.picture(run) as folder:
            yield find(str(folder / "checkpoints" / inside if inside else folder), base)
        return
    path = pictures.take(source, "SRC", is_small)
    try:
        yield find(str(path), base)
    except UserError as error:
        raise UserError(str(error).replace(str(path), source)) from None


def find(source: str, base: str | None = None) -> Source:
    """What is to be exported: a folder made by `from_hf`, a run (its newest finished phase), a phase's folder of checkpoints, or a checkpoint of a run.

    Raises:
        UserError: none of these, or a checkpoint by itself without a `base` to take names and tokenizer from.
    """
    path = Path(source).expanduser()
    if not path.is_dir():
        raise UserError(f"no such folder '{source}'; give a run, a checkpoint of a run, or a folder made by convert from-hf")
    if (path / CONVERSION).exists():
        return Source(path / CONVERTED, open_folder(base or source, weights=False), None)
    if any(name.endswith(".safetensors") for name in pictures.names(path)):
        raise UserError(f"'{source}' holds safetensors: it is a Hugging Face folder already")
    if path.absolute().parent.name == "checkpoints":  # a phase's folder: its newest checkpoint
        path = max((found for found in Checkpoints(path.absolute().parent, "", 1).committed() if found[1].parent.name == path.name), default=(None, path))[1]
    run, checkpoint = path.absolute().parent.parent.parent, path
    if (path / "checkpoints").is_dir():
        if lost := manifest.unreadable(path / "checkpoints"):
            raise UserError(f"'{lost[0]}' is damaged: its manifest is missing or damaged; name another checkpoint")
        ended = [found for position, found in Checkpoints(path / "checkpoints", "", 1).committed() if position.complete]
        if not ended:
            raise UserError(f"'{source}' has finished no phase; name a checkpoint in '{path / 'checkpoints'}', or train on")
        run, checkpoint = path, ended[-1]
    in_run = (run / "config.yaml").exists()
    if in_run and base is None:
        base = metadata_of(checkpoint).get("base")
        if base is None or not (pictures.is_ours(base) or Path(base).is_dir()):
            raise UserError(f"'{source}' was trained from '{base}', which is not there any more; say with --base where that model is")
    if base is None:
        within = next((folder for folder in path.absolute().parents if (folder / "config.yaml").exists() and (folder / "checkpoints").is_dir()), None)
        advice = f"name the run, '{within}', or one of its checkpoints, such as {within / 'checkpoints/3-hard/1200'}" if within else "name its Hugging Face model with --base"
        raise UserError(f"'{source}' is no checkpoint of a run; {advice}")
    return Source(checkpoint, open_folder(base, weights=False), run if in_run else None)


def check(source: Source) -> Stored:
    """The checkpoint's arrays, found to be those that the base's config.json asks for.

    Raises:
        UserError: not a checkpoint of ours, or an array is missing, unknown or of another shape.
    """
    stored, weights = Stored(source.checkpoint), hf_weights.weights(source.base)
    expected = {weight.path for weight in weights}
    for fault, paths in (("lacks", expected - stored.paths), ("holds an unknown array", stored.paths - expected)):
        if paths:
            raise UserError(f"'{mirror.shown(source.checkpoint)}' {fault} {min(paths)}, by the config.json of '{source.base.name}'; name its own base with --base")
    for weight in weights:
        shape = stored.shape(weight.path)
        if shape != weight.shape:
            said = f"the config.json of '{source.base.name}' says {weight.shape}"
            raise UserError(f"'{mirror.shown(source.checkpoint)}': {weight.path} has shape {shape}, {said}; name its own base with --base")
    return stored


def check_weights(folder: Folder) -> None:
    """Raise `UserError` where a folder's weights, safetensors or made by `from_hf`, are not those that its config.json asks for."""
    if folder.converted:
        check(Source(folder.converted, folder, None))
    else:
        hf_weights.check(folder)


def load_weights(folder: Folder, checkpoint: Path | None, shardings: Any, dtype: str) -> Params:
    """The parameters in `dtype`, each under its sharding, from a checkpoint of such a model; None: from the folder's safetensors."""
    if checkpoint is None:
        return hf_weights.load(folder, shardings, dtype)
    return load_params(checkpoint, parameter_shapes(folder.config, jnp.dtype(dtype)), shardings)


def to_hf(source: Source, destination: Path | str, dtype: str | None = None, progress: Progress = silent, verify: bool = True) -> bool:
    """Write a checkpoint as a Hugging Face folder, in the run's or the base's dtype or this one. False: it is there already.

    A destination that is a text is an address in a bucket. A run's checkpoint is first compared with its manifest, unless the caller has done so (`verify`).

    Raises:
        UserError: the checkpoint is damaged or not of the base's sizes, a destination that holds something else, a full disk.
    """
    stored, base = check(source), source.base
    facts: dict[str, Any] = {}
    texts = added_files(base.path)
    if source.run is not None:
        if verify and (fault := manifest.fault(source.checkpoint)):
            raise UserError(f"'{mirror.shown(source.checkpoint)}' is damaged: {fault}; name another checkpoint")
        facts = provenance(source.run, source.checkpoint, base)
        texts |= {CARD: card(facts)}
        dtype = dtype or facts["settings"]["export"]["dtype"]
    elif (base.path / CARD).exists():
        texts |= {CARD: (base.path / CARD).read_text(encoding="utf-8", errors="replace")}
    tensors = hf_weights.tensors_of(base, stored.read, dtype)
    files = [path for path in source.checkpoint.rglob("*") if path.is_file()]
    stamp = {"stamp": stamp} if (stamp := pictures.stamp(source.checkpoint)) else {}
    mark = fingerprint([*files, *_texts(base)], texts=texts, dtypes=[(tensor.name, tensor.dtype.name) for tensor in tensors], **stamp)
    if _is_there(destination, PROVENANCE, mark):
        return False
    total = _bytes_of(base, dtype)
    texts |= {PROVENANCE: json.dumps({"source": mark} | facts, indent=1) + "\n"}
    if isinstance(destination, str):
        with making(destination, mark) as made:
            export_to_bucket(tensors, base, made, dtype=dtype, texts=texts, done=progress(total))
        return True
    _check_space(destination, total)
    export(tensors, base, destination, dtype=dtype, texts=texts, source=mark, done=progress(total))
    mirror.export(destination)
    return True


def check_export(folder: Path) -> None:
    """Raise `UserError` where the weights of an export are not what their headers and index say."""
    if mirror.uploaded(folder).exists():
        return  # it was compared with its listing when the run started
    try:
        Tensors(folder)
    except UserError:
        raise UserError(f"'{folder}' is damaged: a file of its weights is missing or cut off; remove the folder, and the same command makes it again") from None


def _texts(folder: Folder) -> list[Path]:
    """All of a model folder that goes with its weights."""
    return [folder.path / "config.json", *folder.beside(), *(path for path in [folder.path / CARD] if path.exists())]


def fingerprint(files: Iterable[Path], **facts: object) -> str:
    """What a conversion is made from, as a hash: of files their name, size and time of change (of objects their CRC32C). The 1 counts versions of what we make."""
    listed = [_known(file) for file in sorted(file.absolute() for file in files)]
    return hashlib.sha256(json.dumps([1, listed, facts]).encode()).hexdigest()


def _known(file: Path) -> tuple[str, int, object]:
    """Place, size and age of a file; of a run in a bucket, whose folder here is made for each look, its content instead."""
    return (mirror.shown(file), file.stat().st_size, crc32c_of(file)) if mirror.of(file) else pictures.facts(file)


def _bytes_of(folder: Folder, dtype: str | None) -> int:
    """Bytes of the weights of a model in its own dtypes, or in this one."""
    dtypes = hf_weights.stored_dtypes(folder, dtype)
    return sum(math.prod(weight.each) * dtypes(name).itemsize for weight in hf_weights.weights(folder) for name in weight.names)


def _is_there(destination: Path | str, name: str, source: str) -> bool:
    """Whether this source has made the destination; an error where something else has."""
    if isinstance(destination, str):
        said = is_made(destination, name)
        try:
            return said is not None and bool(json.loads(said)["source"] == source)
        except (ValueError, KeyError, TypeError):
            return False
    if not destination.exists() or (destination.is_dir() and not any(destination.iterdir())):
        return False
    try:
        if json.loads((destination / name).read_text(encoding="utf-8"))["source"] == source:
            if name == PROVENANCE:
                check_export(destination)
            return True
    except (OSError, ValueError, KeyError, TypeError):
        pass  # something else, then
    raise UserError(f"'{destination}' is there, and was not made from this source as it is now in the way asked for; name another folder")


def _check_space(destination: Path, needed: int) -> None:
    part = part_of(destination)
    there = next(folder for folder in (part.absolute(), *part.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed and not part.exists():  # a part that is there has some of them
        raise UserError(f"'{destination}' needs {needed:,} bytes, '{there}' has {free:,} free; make room, or name another disk")


def _common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds all of these exactly: the layers of a stacked parameter have one dtype."""
    common = dtypes[0]
    for dtype in dtypes[1:]:
        common = jnp.promote_types(common, dtype)
    return np.dtype(common)


def _lay_out(checkpoint: Path, ranks: dict[str, int]) -> None:
    """A checkpoint of orbax's making that lacks only its arrays."""
    context = ocp.Context()
    context.array.saving.use_ocdbt = False  # a file for each chunk: one that is there is whole, and a second attempt leaves no remains
    context.array.saving.use_zarr3 = False  # with zarr 3 and no OCDBT orbax warns at every load that it finds no data
    params = hf_weights.tree({path: np.zeros((1,) * rank, np.float32) for path, rank in ranks.items()})
    with context, _quiet():
        ocp.save(checkpoint.absolute(), {"params": params})
    for folder in checkpoint.glob("*/params.*"):
        shutil.rmtree(folder)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without orbax's warning that a checkpoint without OCDBT has no OCDBT parts to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

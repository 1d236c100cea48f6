"""TFDS datasets as rows, without TensorFlow: any split of any, and all of what `split --tfds` has written, as it was before it was split."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from phased_ift_jax.data.row_kinds import BadRow, one_line
from phased_ift_jax.records import Source, UserError

PHASES = "phases"  # in the metadata of a folder that `split` has written: the splits that are phases, in their order


def rows(name: str, split: str) -> Iterator[tuple[int | Source, Any]]:
    """Each row of a dataset (a folder, or a name that TFDS knows) with its number in its split; of all phases of a folder with its source.

    Raises:
        UserError: no such dataset or split, or one that cannot be read.
    """
    import tensorflow_datasets as tfds

    folder = os.path.expanduser(name)
    is_folder = os.path.isdir(folder)
    if is_folder and not os.path.exists(os.path.join(folder, "dataset_info.json")):
        versions = sorted(glob.glob(os.path.join(glob.escape(folder), "**", "dataset_info.json"), recursive=True))
        hint = f"; did you mean 'tfds:{os.path.dirname(versions[-1])}'?" if versions else ""
        raise UserError(f"data.path: no dataset_info.json in '{name}'{hint}")
    phases = _phases(f"tfds:{name}")
    try:
        builder = tfds.builder_from_directory(folder) if is_folder else None
        parts = list(builder.info.splits) if builder and phases and split == "all" else [split]
        sources = [(part, builder.as_data_source(split=part) if builder else tfds.data_source(name, split=part)) for part in parts]
    except Exception as error:  # the border to TFDS: unknown names, unknown splits, files of another format
        hint = "; its phases are read with data.split: all" if phases else ""
        raise UserError(f"data.path: TFDS dataset '{name}', split '{split}': {one_line(error)}{hint}") from None
    if phases and split == "all":
        found = [(row, Source(f"tfds:{name}/{part}", number)) for part, source in sources for number, row in _numbered(source)]
        yield from ((source, row) for row, source in sorted(found, key=_position))
    else:
        yield from _numbered(sources[0][1])


def in_order(paths: Iterable[str]) -> list[str]:
    """Paths of sources in the order of the bins that they make: as they come, but splits of a folder of phases as its phases come."""
    groups = {path: _phases(path.rpartition("/")[0]) if path.startswith("tfds:") else [] for path in dict.fromkeys(paths)}
    return list(dict.fromkeys(file for path, group in groups.items() for file in group or [path]))


def _phases(path: str) -> list[str]:
    """The sources that the phases of a folder are, easiest first, where `split` has written it; else none."""
    try:
        with open(os.path.join(os.path.expanduser(path.removeprefix("tfds:")), "metadata.json"), encoding="utf-8") as file:
            return [f"{path}/{name}" for name in json.load(file)[PHASES]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _numbered(source: Any) -> Iterator[tuple[int, Any]]:
    for index in range(len(source)):
        try:
            # TFDS knows no null: a list without entries stands for it
            yield index + 1, {key: value for key, value in _plain(source[index]).items() if value not in ([], {"role": [], "content": []})}
        except UnicodeDecodeError:
            yield index + 1, BadRow("invalid UTF-8")


def _position(found: tuple[Any, Source]) -> int:
    row, source = found
    return row.get("position", source.line) if isinstance(row, dict) else source.line


def _plain(value: Any) -> Any:
    """TFDS values as JSON would have them."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value

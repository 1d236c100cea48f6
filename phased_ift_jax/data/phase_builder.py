"""The TFDS dataset of phases: one split a phase, as ArrayRecord files, without TensorFlow. Imported where one is written only.

`tfds_folders` reads it back: `tfds:FOLDER`, with the split `all` in the order that the rows had before they were split.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from phased_ift_jax.data.tfds_folders import PHASES
from phased_ift_jax.files import building, clear

UNSCORED = "unscored"  # the split of the rows that are in no phase
MARKER = "unfinished"
TEXTS = ("id", "difficulty", "system", "instruction", "input", "output")  # a difficulty is text, for TFDS would round it to float32


class Phases(tfds.core.GeneratorBasedBuilder):
    """Rows as `row_kinds.row_of` makes them, with `difficulty` and `position`; what a row does not have is empty."""

    VERSION = tfds.core.Version("1.0.0")
    name = "phases"

    def __init__(self, splits: Mapping[str, Sequence[Mapping[str, Any]]], **keys: Any) -> None:
        self._splits = splits
        super().__init__(**keys)

    def _info(self) -> tfds.core.DatasetInfo:
        text = tfds.features.Text()
        chat = tfds.features.Sequence({"role": text, "content": text})
        features = tfds.features.FeaturesDict({**dict.fromkeys(TEXTS, text), "position": np.int64, "messages": chat})
        phases = tfds.core.MetadataDict({PHASES: [name for name in self._splits if name != UNSCORED]})
        return tfds.core.DatasetInfo(builder=self, description=self.__doc__, features=features, metadata=phases, disable_shuffling=True)

    def _split_generators(self, dl_manager: object) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        return {name: self._generate_examples(rows) for name, rows in self._splits.items()}

    def _generate_examples(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from enumerate({**dict.fromkeys(TEXTS, ""), "messages": [], **row} for row in rows)


def write(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Make `folder`, which must not be there, whole; rows of `splits` have an int `position`.

    Raises:
        UserError: it cannot be written.
    """
    tfds.disable_progress_bar()
    with building(folder, MARKER) as aside, contextlib.redirect_stdout(io.StringIO()):  # it prints what only TFDS's own users need
        clear(aside, MARKER)
        (aside / MARKER).touch()
        made = Phases(splits, data_dir=str(aside / "made"), file_format="array_record")
        made.download_and_prepare()
        for path in Path(made.data_path).iterdir():
            path.rename(aside / path.name)
        shutil.rmtree(aside / "made")

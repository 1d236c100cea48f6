"""What a verb that pays writes: one file of JSON lines, its ledger and its run card beside it."""

from __future__ import annotations

import fnmatch
import glob
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

from phased_ift_jax import __version__, pictures
from phased_ift_jax.files import write_whole
from phased_ift_jax.records import UserError


def beside(out: Path, name: str) -> Path:
    """A file beside `scored.jsonl`: of "card.json" `scored.card.json`, of "ledger.jsonl" `scored.ledger.jsonl`."""
    return out.with_name(f"{out.stem}.{name}")


def check(out: str, data: Iterable[str], example: str = "scored.jsonl") -> Path:
    """Where to write, with its folder made.

    Raises:
        UserError: it is in a bucket, is no .jsonl file, is one of the files that are read or lies among them, or its folder cannot be made.
    """
    path = Path(out).expanduser()
    if pictures.is_ours(out):
        raise UserError(f"--out: '{out}' is in a bucket, where nothing can be appended; name a file on this machine")
    if path.suffix != ".jsonl" or path.is_dir():
        raise UserError(f"--out: '{out}' is no .jsonl file; name one, such as {example}")
    if PurePath(path.stem).suffix in (".ledger", ".unscored", ".card"):
        raise UserError(f"--out: '{out}' is named as what lies beside such a file; name it {PurePath(path.stem).stem}.jsonl")
    for name in data:
        inside = os.path.isdir(name) and os.path.samefile(name, path.parent if path.parent.is_dir() else ".") and path.parent.is_dir()
        if inside or (glob.has_magic(name) and any(fnmatch.fnmatch(str(one), name) for one in (path, beside(path, "ledger.jsonl")))):
            raise UserError(f"--out: '{out}' lies among the files that are read ('{name}'), and would be read with them; name another folder")
    if path.exists() and any(os.path.exists(name) and path.samefile(name) for name in data):
        raise UserError(f"--out: '{out}' is one of the files that are read; name another")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder '{path.parent}': {error.strerror}") from None
    return path


def line_of(row: Mapping[str, Any]) -> str:
    # some names of files are not Unicode; what stands for their bytes is written as JSON escapes it
    return json.dumps(row, ensure_ascii=False).encode(errors="backslashreplace").decode() + "\n"


def write_card(out: Path, card: Mapping[str, Any]) -> dict[str, Any]:
    """Write the run card of a file, with this package's `version` and when it was `written`; returns it."""
    whole = dict(card) | {"version": __version__, "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    write_whole(beside(out, "card.json"), json.dumps(whole, ensure_ascii=False, indent=2) + "\n")
    return whole

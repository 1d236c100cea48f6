"""What a checkpoint is made of: `manifest.json`, written last, with the size and SHA-256 of every file. No manifest, no checkpoint.

It is read without orbax and without JAX, so that `status` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phased_ift_jax.files import settle, write_whole

MANIFEST = "manifest.json"
UNDER_WAY = ".under-way"


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Make a folder a checkpoint: have the disk hold all of it, then write its manifest, with these facts beside the hashes.

    Raises:
        OSError: the disk does not hold all of it: it is no checkpoint.
    """
    names = _names(folder)
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(names, pool.map(lambda name: _look(folder / name), names), strict=True))
    for inside in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent, folder.parent.parent]:
        settle(inside)
    body = facts | {"files": hashes}
    write_whole(folder / MANIFEST, json.dumps(body | {"sha256": _hash(body)}, indent=1) + "\n")


def facts_of(folder: Path) -> dict[str, Any] | None:
    """What `seal` was told, and the files; None where there is no manifest that can be read."""
    try:
        facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return facts if facts.pop("sha256") == _hash(facts) else None
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return None


def fault(folder: Path) -> str | None:
    """What is wrong with a sealed folder, naming the file; None where every byte is as it was saved."""
    facts = facts_of(folder)
    if facts is None:
        return f"{MANIFEST} is missing or damaged"
    with ThreadPoolExecutor() as pool:
        for name, then, now in zip(facts["files"], facts["files"].values(), pool.map(lambda name: _look_again(folder / name), facts["files"]), strict=True):
            if isinstance(now, str):
                return f"{name} {now}"
            if now != then:
                return f"{name} has {now[0]} bytes, not {then[0]}" if now[0] != then[0] else f"{name} has other content than was saved"
    return None


def unseal(folder: Path) -> None:
    """Make a checkpoint none, before it is removed: half removed, it must not be taken for one."""
    (folder / MANIFEST).unlink()


def mark(folder: Path) -> Path:
    """A file beside a checkpoint that is there while it is being saved or removed: what lies there without a manifest is remains then."""
    return folder.with_name(f".{folder.name}{UNDER_WAY}")


def unreadable(root: Path) -> list[Path]:
    """Folders of checkpoints (`<phase>/<step>`) whose manifest is missing or damaged, though no save or removal of them was under way."""
    folders = (path for path in sorted(root.glob("*/*")) if re.fullmatch(r"[0-9]+", path.name) and path.is_dir())
    return [path for path in folders if facts_of(path) is None and not mark(path).exists()]


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _look(path: Path) -> list[Any]:
    """Size and hash of a file, of which the disk has every byte."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]


def _look_again(path: Path) -> list[Any] | str:
    """The same, or what hinders."""
    try:
        return _look(path)
    except FileNotFoundError:
        return "is gone"
    except OSError as error:
        return f"cannot be read ({error.strerror})"

"""What a checkpoint is made of: `manifest.json`, written last, with the size and SHA-256 of every file. No manifest, no checkpoint.

It is read without orbax and without JAX, so that `status` answers at once.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from phased_ift_jax.files import write_whole

MANIFEST = "manifest.json"


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Make a folder a checkpoint: write its manifest, with these facts beside the hashes."""
    names = _names(folder)
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(names, pool.map(lambda name: _look(folder / name), names), strict=True))
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
        for name, then, now in zip(facts["files"], facts["files"].values(), pool.map(lambda name: _look(folder / name), facts["files"]), strict=True):
            if now is None:
                return f"{name} is gone"
            if now != then:
                return f"{name} has {now[0]} bytes, not {then[0]}" if now[0] != then[0] else f"{name} has other content than was saved"
    return None


def unseal(folder: Path) -> None:
    """Make a checkpoint none, before it is removed: half removed, it must not be taken for one."""
    (folder / MANIFEST).unlink()


def _hash(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)


def _look(path: Path) -> list[Any] | None:
    """Size and hash of a file, of which the disk has every byte; None where there is none."""
    try:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            return [os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError:
        return None

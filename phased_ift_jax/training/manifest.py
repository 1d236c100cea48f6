"""What a checkpoint is made of: `manifest.json`, written last, with the size and SHA-256 of every file. No manifest, no checkpoint.

In a bucket it is an object, with the size and CRC32C of every other one as the store tells them. It is read without orbax and without JAX, so that `status` answers at once.
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
from phased_ift_jax.training import mirror

MANIFEST = "manifest.json"
UNDER_WAY = ".under-way"


def seal(folder: Path, facts: dict[str, Any]) -> None:
    """Make a folder a checkpoint: have the disk hold all of it, then write its manifest, with these facts beside the hashes.

    Raises:
        OSError, StoreError, LeaseLost: the disk or the bucket does not hold all of it, or the bucket is another's: it is no checkpoint.
    """
    if bucket := mirror.of(folder):
        bucket.settle(folder)
        text = _text(facts | {"files": bucket.contents(folder)})
        bucket.commit(folder, text)
        write_whole(folder / MANIFEST, text)
        return
    names = _names(folder)
    with ThreadPoolExecutor() as pool:
        hashes = dict(zip(names, pool.map(lambda name: _look(folder / name), names), strict=True))
    for inside in [*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent, folder.parent.parent]:
        settle(inside)
    write_whole(folder / MANIFEST, _text(facts | {"files": hashes}))


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
    there = bucket.contents(folder) if (bucket := mirror.of(folder)) else None
    with ThreadPoolExecutor() as pool:
        looks = pool.map(lambda name: _look_again(folder / name) if there is None else there.get(name, "is gone"), facts["files"])
        for name, then, now in zip(facts["files"], facts["files"].values(), looks, strict=True):
            if isinstance(now, str):
                return f"{name} {now}"
            if now != then:
                return f"{name} has {now[0]} bytes, not {then[0]}" if now[0] != then[0] else f"{name} has other content than was saved"
    return None


def unseal(folder: Path) -> None:
    """Make a checkpoint none, before it is removed: half removed, it must not be taken for one. In a bucket all of it goes."""
    if bucket := mirror.of(folder):
        bucket.remove(folder)
    (folder / MANIFEST).unlink()


def mark(folder: Path) -> Path:
    """A file beside a checkpoint that is there while it is being saved or removed: what lies there without a manifest is remains then."""
    return folder.with_name(f".{folder.name}{UNDER_WAY}")


def unreadable(root: Path) -> list[Path]:
    """Folders of checkpoints (`<phase>/<step>`) whose manifest is missing or damaged, though no save or removal of them was under way."""
    folders = (path for path in sorted(root.glob("*/*")) if re.fullmatch(r"[0-9]+", path.name) and path.is_dir())
    return [path for path in folders if facts_of(path) is None and not mark(path).exists()]


def _text(body: dict[str, Any]) -> str:
    return json.dumps(body | {"sha256": _hash(body)}, indent=1) + "\n"


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

"""What lies in a bucket as files of this machine: small files as copies, large ones read by ranges from where they lie (floor 0).

A picture is a folder under PHASED_IFT_WORK, named by what the store says of each object (size, CRC32C, generation): what is in it never
changes, and an object that was changed is in another. Nothing in it is needed: it may be removed while nobody is at work.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from phased_ift_jax.object_store import SCHEME, THREADS, Facts, Objects, StoreError, crc32c_of, work_folder
from phased_ift_jax.records import UserError

PIECE_BYTES = 8 << 20  # of one request; as many are under way as there are threads


@dataclass(frozen=True)
class Picture:
    """A folder, and the objects it shows; names are relative to both."""

    folder: Path
    mark: str  # the same wherever it is taken, as long as no object is changed
    objects: Objects
    listing: Mapping[str, Facts]


_taken: dict[Path, Picture] = {}


def is_ours(place: str) -> bool:
    """Whether a place is an address in a bucket."""
    return place.startswith(SCHEME)


def take(address: str, key: str, wanted: Callable[[str], bool]) -> Path:
    """A folder that shows what lies at an address, with copies of the objects whose names are `wanted`. `key` is what gave the address.

    Raises:
        UserError: nothing lies there, the bucket is not there or may not be read, the client is not installed, or an object is changed meanwhile.
    """
    with told(key):
        objects = Objects(address, key)
        listing = objects.list("")
        if not listing:
            raise UserError(f"{key}: nothing lies at '{objects.address}'{nearest(address, key)}")
        return _show(objects, listing, [name for name in listing if wanted(name)], address.rstrip("/").rpartition("/")[2])


def copy(address: str, key: str) -> Path:
    """A copy of the object at an address, under the name of the object; raises `UserError` as `take` does."""
    with told(key):
        objects, name = Objects(address, key, parent=True), address.rstrip("/").rpartition("/")[2]
        facts = objects.facts(name)
        if facts is None:
            raise UserError(f"{key}: no such object '{address}'{nearest(address, key)}")
        return _show(objects, {name: facts}, [name], "") / name


@contextmanager
def showing(folder: Path, objects: Objects, listing: Mapping[str, Facts]) -> Iterator[None]:
    """Let a folder, for a while, be the picture of what is being made at an address."""
    _taken[folder] = Picture(folder, "", objects, listing)
    try:
        yield
    finally:
        del _taken[folder]


@contextmanager
def told(key: str) -> Iterator[None]:
    """What the store refuses, said as a fault of what was given."""
    try:
        yield
    except StoreError as error:
        raise UserError(f"{key}: {error}") from None


def nearest(address: str, key: str) -> str:
    """What may have been meant instead of an address at which nothing lies."""
    objects, name = Objects(address, key, parent=True), address.rstrip("/").rpartition("/")[2]
    there = objects.children()
    near = difflib.get_close_matches(name, there, n=1)
    if near:
        return f"; did you mean '{objects.address}/{near[0]}'?"
    return f"; '{objects.address}' holds {', '.join(there[:5])}{', ...' if there[5:] else ''}" if there else f"; there is nothing in '{objects.address}' either"


def of(path: Path) -> tuple[Picture, str] | None:
    """The picture that a path lies in, and its name there; None where it is simply a path on a disk."""
    path = path.absolute()
    return next(((picture, path.relative_to(folder).as_posix()) for folder, picture in _taken.items() if path.is_relative_to(folder)), None)


def shown(path: Path) -> str:
    """A path as the user knows it."""
    found = of(path)
    return str(path) if found is None else f"{found[0].objects.address}/{found[1]}".removesuffix("/.")


def stamp(path: Path) -> str:
    """The mark of the picture that a path lies in; empty for a path on a disk."""
    found = of(path)
    return "" if found is None else found[0].mark


def facts(path: Path) -> tuple[str, int, object]:
    """Place, size and age of a file, by which it is known again."""
    found = of(path)
    if found is None:
        return str(path.absolute()), path.stat().st_size, path.stat().st_mtime_ns
    there = found[0].listing[found[1]]
    return shown(path), there.size, there.crc32c


def names(folder: Path) -> list[str]:
    """Names of the files that lie in a folder, copied or not."""
    found = of(folder)
    if found is not None:
        return sorted(name for name in found[0].listing if "/" not in name)
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())


def exists(path: Path) -> bool:
    """Whether a file is there, copied or not."""
    found = of(path)
    return path.exists() if found is None else found[1] in found[0].listing


def size(path: Path) -> int:
    """Bytes of a file; raises `OSError` where there is none."""
    found = of(path)
    if found is None:
        return path.stat().st_size
    if found[1] not in found[0].listing:
        raise FileNotFoundError(f"no such object '{shown(path)}'")
    return found[0].listing[found[1]].size


def fill(path: Path, start: int, target: memoryview) -> None:
    """Read a file from a byte on until `target` (of bytes) is full.

    Raises:
        OSError, StoreError: it cannot be read, ends before, or is not the object any more that the picture was taken of.
    """
    found = of(path)
    if found is None:
        with open(path, "rb") as file:
            file.seek(start)
            if file.readinto(target) != len(target):
                raise OSError(0, "it ends too early")
        return
    picture, name = found

    def piece(at: int) -> None:
        until = min(at + PIECE_BYTES, len(target))
        target[at:until] = picture.objects.read_range(name, start + at, start + until, picture.listing[name].generation)

    list(_pool().map(piece, range(0, len(target), PIECE_BYTES)))


@functools.cache
def _pool() -> ThreadPoolExecutor:
    """One for all that is read at once: the client has no more connections."""
    return ThreadPoolExecutor(THREADS, thread_name_prefix="pictures")


def _show(objects: Objects, listing: Mapping[str, Facts], wanted: list[str], called: str) -> Path:
    """The folder of a picture, with these copies, each compared with what the listing says."""
    said = json.dumps([objects.address, sorted((name, asdict(facts)) for name, facts in listing.items())])
    mark = hashlib.sha256(said.encode()).hexdigest()[:16]
    folder = (work_folder() / "pictures" / mark / called).absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        objects.download((name, folder / name) for name in wanted if not _is_copy(folder / name, listing[name]))
    except OSError as error:
        raise UserError(f"'{objects.address}' cannot be copied to '{folder}': {error.strerror or error}; name another folder with PHASED_IFT_WORK") from None
    for name in wanted:
        if not _is_copy(folder / name, listing[name]):
            (folder / name).unlink(missing_ok=True)
            raise StoreError(f"'{objects.address}/{name}' was changed while it was read; the same command reads it as it is now")
    _taken[folder] = Picture(folder, mark, objects, listing)
    return folder


def _is_copy(path: Path, facts: Facts) -> bool:
    return path.is_file() and path.stat().st_size == facts.size and crc32c_of(path) == facts.crc32c

"""Files and folders that are whole or not there (floor 0)."""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from phased_ift_jax.records import UserError

LOCK = ".lock"
TRIES = 5


def write_whole(path: Path, text: str | Iterable[str]) -> None:
    """Write a text file, given at once or in pieces, aside and rename it: whoever reads it sees the old text or the new one, never a part."""
    aside = path.with_name(f".{path.name}.part")
    with open(aside, "w", encoding="utf-8") as file:
        file.writelines([text] if isinstance(text, str) else text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    settle(path.parent)


def part_of(destination: Path) -> Path:
    """The folder in which a destination is made, beside it.

    Raises:
        UserError: nothing can be renamed to the destination.
    """
    if not destination.name or destination.is_symlink() or os.path.ismount(destination):
        raise UserError(f"'{destination}' is a link, a mount point or the current folder, which nothing can be renamed to; name a folder in it")
    return destination.with_name(f".{destination.name}.part")


@contextmanager
def building(destination: Path, marker: str) -> Iterator[Path]:
    """A folder aside, kept from an earlier call that was stopped; left without an error, it becomes the destination, which is then whole.

    The file `marker`, in which the caller notes what the part is made from, is dropped at the very end. `clear` empties the part.

    Raises:
        UserError: it cannot be written, another process is at it, or the disk is full (what is done so far stays aside).
    """
    aside = part_of(destination)
    try:
        handle = _lock(aside)
    except BlockingIOError:
        raise UserError(f"another process is writing '{destination}'; wait for it, or name another folder") from None
    except OSError as error:
        raise UserError(f"cannot write '{destination}': {error.strerror}; name another folder") from None
    try:
        yield aside
        for path in [*aside.rglob("*"), aside]:
            settle(path)
        (aside / marker).unlink()
        os.rename(aside, destination)
        settle(destination.parent)
    except Exception as error:
        if is_full(error):
            free = os.statvfs(destination.parent)
            raise UserError(f"no space left for '{destination}' ({free.f_bavail * free.f_frsize:,} bytes free); make room, then the same command goes on") from error
        raise
    finally:
        os.close(handle)


def clear(folder: Path, first: str) -> None:
    """Empty a folder, the file `first` before all others: as long as it is there, they are what it says."""
    (folder / first).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _lock(folder: Path) -> int:
    """A locked handle on a folder, made where it is not there; it ends with the process that holds it."""
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder)):
                return handle
        except FileNotFoundError:  # whoever held it has renamed it between our two calls
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def set_aside(path: Path, word: str) -> Path:
    """Rename a file or folder to `<word>-<name>`, numbered where that is taken; returns its new path."""
    names = itertools.chain([f"{word}-{path.name}"], (f"{word}-{path.name}.{number}" for number in itertools.count(1)))
    return path.rename(next(aside for name in names if not (aside := path.with_name(name)).exists()))


def settle(path: Path) -> None:
    """Have the disk hold a file or folder, so that a rename after it survives a power cut with all that it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the hold ends with the process, however it ends, so that no stale one is left.

    Raises:
        UserError: another process holds it; the line says which.
    """
    handle = -1
    for attempt in range(TRIES):
        try:
            handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(handle), os.stat(folder / LOCK)):  # else the folder was renamed meanwhile
                break
            os.close(handle)
        except BlockingIOError:
            holder = _holder(handle)
            os.close(handle)
            if attempt == TRIES - 1:
                raise UserError(f"output_dir: {holder} is at work in '{folder}'; wait for it to end, or choose another output_dir") from None
            time.sleep(0.2)  # it may be someone who only looked
        except OSError as error:
            print(f"warning: '{folder}' cannot be locked ({error.strerror}); see to it that no other process trains in it", file=sys.stderr)
            break
    try:
        if handle >= 0:
            os.ftruncate(handle, 0)
            os.write(handle, f"process {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S %Z')},".encode())
        yield
    finally:
        if handle >= 0:
            os.close(handle)


def holder_of(folder: Path) -> str | None:
    """Which process holds a folder; None where none does, or where that cannot be found out."""
    try:
        handle = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return None
    except BlockingIOError:
        return _holder(handle)
    except OSError:
        return None
    finally:
        os.close(handle)


def _holder(handle: int) -> str:
    return os.pread(handle, 200, 0).decode(errors="replace") or "another process"


def is_full(error: BaseException) -> bool:
    """Whether an error says that a disk (or the user's share of it) is full; tensorstore says so in words only."""
    full = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in full or any(os.strerror(number) in str(error) for number in full)

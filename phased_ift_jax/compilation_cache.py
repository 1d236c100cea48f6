"""What XLA has compiled, kept for the next start (floor 0; must choose where before JAX is there).

JAX writes each executable into a folder under a key of program, flags, devices and versions, and reads it there instead of compiling.
Reading or writing that fails costs a warning and a compilation, never a run.
"""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

import filelock

from phased_ift_jax.object_store import SCHEME

NAME = "compiled"
MOST_BYTES = 5 * 10**9  # the executables used least recently go first
LOCK_SECONDS = 10
NO = {"n", "no", "f", "false", "off", "0"}
PLACE = "JAX_COMPILATION_CACHE_DIR"
SIZE = "JAX_COMPILATION_CACHE_MAX_SIZE"
ENABLED = "JAX_ENABLE_COMPILATION_CACHE"


def choose(output_dir: str, several: bool) -> Path | None:
    """Tell JAX, before it is there, where to keep what is compiled; return the folder, for `ready`, where that is ours to choose and on a disk.

    That is the user's cache on this machine. Of several processes one writes, so theirs lies beside the run, where all see it; so does
    that of a run in a bucket, whose next machine has an empty disk. What the user has set in JAX's own variables stays.
    """
    if _off() or os.environ.get(PLACE):
        return None
    folder = None
    if output_dir.startswith(SCHEME):
        os.environ[PLACE] = f"{output_dir.rstrip('/').rpartition('/')[0]}/{NAME}/{host()}"
        os.environ.setdefault("JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES", "none")  # XLA's own, of kernels it has timed, knows disks only
    else:
        try:
            caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "phased_ift_jax"
            folder = (Path(output_dir).expanduser().absolute().parent if several else caches) / NAME / host()
        except RuntimeError:
            return None
        os.environ[PLACE] = str(folder)
        os.environ.setdefault(SIZE, str(MOST_BYTES))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # a start compiles dozens of small programs, too
    return folder


def ready(folder: Path | None) -> str:
    """Make the folder that was chosen fit for use, and say in a line where what is compiled is kept; where it cannot be, nothing is."""
    if _off():
        return f"none ({ENABLED} {os.environ[ENABLED]})"
    try:
        if folder is not None:
            mend(folder)
    except (OSError, NotImplementedError) as error:  # the latter: a disk that knows no locks
        import jax

        jax.config.update(ENABLED.lower(), False)
        return f"none, every start compiles: {error}; name a folder with {PLACE}"
    return os.environ.get(PLACE) or f"none, every start compiles: this user has no home; name a folder with {PLACE}"


def mend(folder: Path) -> None:
    """Make a cache's folder, and remove what a process that was killed has left half written: the time of use is written after it.

    Raises:
        OSError: nothing can be read or written there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile").acquire(timeout=LOCK_SECONDS):  # JAX's own lock: nobody is writing
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"")
        probe.unlink()
        for entry in folder.glob("*-cache") if os.environ.get(SIZE) != "-1" else ():  # without bounds no times are written
            if not entry.with_name(f"{entry.name.removesuffix('-cache')}-atime").exists():
                entry.unlink()


def _off() -> bool:
    return os.environ.get(ENABLED, "").lower() in NO


def host() -> str:
    """This host's kind of processor: what is compiled for one may use instructions that another has not, and JAX's key does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = [platform.processor()]
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "".join(lines[:1]))
    return f"{platform.machine()}-{hashlib.sha256(' '.join(sorted(features.split())).encode()).hexdigest()[:12]}"

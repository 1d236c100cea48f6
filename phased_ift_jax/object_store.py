"""Objects of a Google Cloud Storage bucket, and the lease that makes one process the only writer of a run there (floor 0).

A bucket has no append, no rename and no lock. What it has: an object is there whole or not at all, every write of it gives it a new
generation, and a write may be made to hold only over a generation that is named (0: none). All of ours is built from these three.
`google-cloud-storage` is imported when a bucket is first spoken to; with STORAGE_EMULATOR_HOST it speaks to that server.
"""

from __future__ import annotations

import base64
import functools
import getpass
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from phased_ift_jax.files import write_whole
from phased_ift_jax.records import Failure, UserError

Result = TypeVar("Result")
SCHEME = "gs://"
PATIENCE = 120.0  # seconds for which a request that fails with a passing fault (429, 5xx, a lost connection) is tried again
LEASE = "lease.json"
LEASE_SECONDS = 120.0  # a lease that was not renewed for so long may be taken over by another run
THREADS = 8  # requests at once; the client's pool has 10 connections


class StoreError(Failure):
    """The store refused, or could not be reached."""


class Changed(StoreError):
    """An object is of another generation than the write was to hold over: someone else has written it."""


class LeaseLost(Failure):
    """Another process has taken the run over."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the store says of an object. Its CRC32C is of the content as it is stored, in the store's own spelling (base64)."""

    size: int
    crc32c: str
    generation: int
    updated: float  # seconds since 1970, by the store's clock


def is_address(text: str) -> bool:
    """Whether a text names something in an object store rather than on a disk."""
    return "://" in text


def split(address: str) -> tuple[str, str]:
    """Bucket and name of an address such as gs://bucket/runs/one.

    Raises:
        UserError: it is no such address.
    """
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)/([^/\s?#\[\]*]+(?:/[^/\s?#\[\]*]+)*)/?", address)
    if match is None or {".", ".."} & set(match[2].split("/")):
        raise UserError(f"output_dir: '{address}' is neither a folder on a disk nor an address such as gs://bucket/runs/one")
    return match[1], match[2]


class Objects:
    """The objects under one address; names are relative to it."""

    def __init__(self, address: str) -> None:
        """Raises `UserError` where the address is none, the client is not installed, or no credentials are found."""
        bucket, self.prefix = split(address)
        self.address = f"{SCHEME}{bucket}/{self.prefix}"
        self._client = _client()
        self._bucket = self._client.bucket(bucket)

    def list(self, prefix: str = "") -> dict[str, Facts]:
        """Every object whose name begins so, by name."""

        def listed() -> dict[str, Facts]:
            blobs = self._client.list_blobs(self._bucket, prefix=f"{self.prefix}/{prefix}", retry=_retry(), fields=LISTED)
            return {blob.name.removeprefix(f"{self.prefix}/"): _facts(blob) for blob in blobs}

        return self._told("listed", prefix, listed)

    def is_folder(self, prefix: str) -> bool:
        """Whether any name begins so, with a slash after it."""
        beginning = f"{self.prefix}/{prefix}/".replace("//", "/")
        return self._told("listed", prefix, lambda: any(True for _ in self._client.list_blobs(self._bucket, prefix=beginning, max_results=1, retry=_retry())))

    def facts(self, name: str) -> Facts | None:
        """What the store says of an object, None where there is none."""
        blob = self._told("looked at", name, lambda: self._bucket.get_blob(self._name(name), retry=_retry()))
        return None if blob is None else _facts(blob)

    def read(self, name: str) -> bytes | None:
        """An object's content, compared with its CRC32C on the way; None where there is no such object."""
        from google.api_core.exceptions import NotFound

        def content() -> bytes | None:
            try:
                return bytes(self._bucket.blob(self._name(name)).download_as_bytes(checksum="crc32c", retry=_retry()))
            except NotFound:
                return None

        return self._told("read", name, content)

    def write(self, name: str, content: bytes, over: int | None = None) -> int:
        """Write an object and return its generation; where `over` is given, only if the object is of that generation (0: is not there).

        Raises:
            Changed: it is of another.
            StoreError: it cannot be written.
        """
        from google.api_core.exceptions import PreconditionFailed

        def written() -> int | None:
            blob = self._bucket.blob(self._name(name))
            try:
                blob.upload_from_string(content, content_type="application/octet-stream", if_generation_match=over, checksum="crc32c", retry=_retry())
            except PreconditionFailed:
                return None
            return int(blob.generation)

        generation = self._told("written", name, written)
        if generation is not None:
            return generation
        # the answer to an earlier attempt of ours may have been lost: then what we were to write is there
        there = self.facts(name)
        if there is not None and (there.size, there.crc32c) == (len(content), crc32c(content)):
            return there.generation
        raise Changed(f"'{self.address}/{name}' was written by another process meanwhile")

    def upload(self, files: Iterable[tuple[str, Path]]) -> None:
        """Write objects from files, several at once; raises `StoreError`."""

        def one(pair: tuple[str, Path]) -> None:
            name, path = pair
            self._told("written", name, lambda: self._bucket.blob(self._name(name)).upload_from_filename(str(path), checksum="crc32c", retry=_retry()))

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, files))

    def download(self, files: Iterable[tuple[str, Path]]) -> None:
        """Write files from objects, several at once, each compared with its CRC32C; raises `StoreError`."""

        def one(pair: tuple[str, Path]) -> None:
            name, path = pair
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.part")  # a download that fails must not leave a file that looks like one
            self._told("read", name, lambda: self._bucket.blob(self._name(name)).download_to_filename(str(part), checksum="crc32c", retry=_retry()))
            os.replace(part, path)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, files))

    def delete(self, names: Iterable[str] | Mapping[str, int]) -> None:
        """Remove objects, several at once: where generations are given, only if each is still of its own. Raises `StoreError`."""
        from google.api_core.exceptions import NotFound, PreconditionFailed

        generations: Mapping[str, int] = names if isinstance(names, Mapping) else {}

        def one(name: str) -> None:
            def gone() -> None:
                with suppress(NotFound, PreconditionFailed):
                    self._bucket.blob(self._name(name)).delete(if_generation_match=generations.get(name), retry=_retry())

            self._told("removed", name, gone)

        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(one, names))

    def _name(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _told(self, done: str, name: str, call: Callable[[], Result]) -> Result:
        """What a call returns, its errors as one line."""
        try:
            return call()
        except (Failure, UserError):
            raise
        except Exception as error:  # google's, google.auth's and requests', which are OSErrors
            if getattr(error, "filename", None) is not None:
                raise  # of a local file
            raise StoreError(f"'{f'{self.address}/{name}'.rstrip('/')}' cannot be {done}: {_line(error)}") from error


LISTED = "items(name,size,crc32c,generation,updated),nextPageToken"


def _facts(blob: Any) -> Facts:
    return Facts(int(blob.size), str(blob.crc32c), int(blob.generation), blob.updated.timestamp())


def crc32c(content: bytes) -> str:
    """A CRC32C as the store spells it."""
    import google_crc32c

    return base64.b64encode(google_crc32c.value(content).to_bytes(4, "big")).decode()


def _line(error: Exception) -> str:
    """What an error says, in one line."""
    code = int(getattr(error, "code", None) or 0)
    causes = {401: "the credentials are not valid", 403: "these credentials may not do that", 404: "no such bucket or object"}
    return f"{causes[code]} (HTTP {code})" if code in causes else " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _retry() -> Any:
    from google.cloud.storage.retry import DEFAULT_RETRY

    return DEFAULT_RETRY.with_timeout(PATIENCE).with_delay(min(1.0, PATIENCE / 8), 2.0, 32.0)


@functools.cache
def _client() -> Any:
    try:
        from google.cloud import storage
    except ImportError:
        raise UserError("output_dir: gs:// needs `pip install 'phased_ift_jax[gcs]'`") from None
    from google.auth.exceptions import DefaultCredentialsError

    try:
        # a project is asked for by calls that we do not make; without a name the client would look for one
        return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
    except DefaultCredentialsError:
        raise UserError(
            "output_dir: no credentials for gs:// are found; run `gcloud auth application-default login`, or give the machine's service account access to the bucket"
        ) from None


def whoami() -> str:
    """Who holds the lease of a run: what a launcher says (PHASED_IFT_RUN_ID, the same on every machine the run is moved to), else user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    if named := os.environ.get("PHASED_IFT_RUN_ID"):
        return named
    machine = work_folder() / "machine"  # names of hosts are no names: many are called localhost
    try:
        if not machine.exists():
            machine.parent.mkdir(parents=True, exist_ok=True)
            write_whole(machine, uuid.uuid4().hex[:8])
        return f"{user}@{socket.gethostname()}:{machine.read_text(encoding='utf-8')}"
    except OSError:
        return f"{user}@{socket.gethostname()}"


def work_folder() -> Path:
    """Where on this machine runs lie whose output_dir is an address; raises `UserError` where no home is known."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return Path(os.environ.get("PHASED_IFT_WORK") or caches / "phased_ift_jax" / "runs").expanduser()
    except RuntimeError:
        raise UserError("output_dir: this user has no home to work in; name a folder with PHASED_IFT_WORK") from None


class Lease:
    """The right to write under an address: an object with an expiry, renewed by a thread, each time over the generation written before.

    Whoever writes it next makes the generation another, so that the process that held it cannot renew it any more: it is fenced. A
    renewal that comes late, but before anyone else has written, holds as well: nobody was there in between.
    """

    def __init__(self, objects: Objects, holder: str | None = None, seconds: float | None = None) -> None:
        self._objects, self.holder = objects, holder or whoami()
        self.seconds = seconds or LEASE_SECONDS
        self.token = uuid.uuid4().hex  # of this process: no two write equal content
        self._generation = 0
        self._renewals = 0
        self._lost: str | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, name="lease", daemon=True)

    def acquire(self) -> Lease:
        """Take the lease, at once where nobody or the same holder has it, else only after its expiry.

        Raises:
            UserError: another holds it; the line says who, and until when.
            StoreError: the store cannot be reached.
        """
        watched = 0
        while True:
            there = self._objects.facts(LEASE)
            if there is not None and (reason := refusal(self._objects, there, self.holder)):
                raise UserError(reason)
            if there is not None and there.generation != watched and (said := _lease(self._objects, there)[0]) and said["holder"] != self.holder:
                # it looks expired, by a clock of ours that may be wrong: one that is renewed meanwhile is not
                watched = there.generation
                time.sleep(self.seconds / 3)
                continue
            self._generation = there.generation if there else 0
            try:
                self._write()
                break
            except Changed:  # someone was faster: look again at who that is
                self._generation = 0
                time.sleep(0.1)
        self._thread.start()
        return self

    def check(self) -> None:
        """Raise `LeaseLost` where the renewing thread has found the lease taken over. Asks nobody."""
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def confirm(self) -> None:
        """Renew the lease now: raises `LeaseLost` unless it is ours at this moment, or `StoreError`."""
        self.check()
        try:
            self._write()
        except Changed:
            self._lose()
            self.check()

    def release(self) -> None:
        """Give it back, so that another need not wait for its expiry; where that fails, it expires."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lost is None:
            with suppress(StoreError):
                self._objects.delete({LEASE: self._generation})

    def _write(self) -> None:
        with self._writing:
            self._renewals += 1
            said = {"holder": self.holder, "process": f"process {os.getpid()} on {socket.gethostname()}", "seconds": self.seconds, "token": self.token, "renewals": self._renewals}
            body = (json.dumps(said) + "\n").encode()
            try:
                self._generation = self._objects.write(LEASE, body, over=self._generation)
            except Changed:
                # perhaps by ourselves: a renewal whose answer was lost
                there = self._objects.facts(LEASE)
                if there is None or self.token not in (self._objects.read(LEASE) or b"").decode(errors="replace"):
                    raise
                self._generation = self._objects.write(LEASE, body, over=there.generation)

    def _renew_on(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            try:
                self._write()
            except Changed:
                self._lose()
                break
            except StoreError:
                continue  # the next renewal, or the commit of a checkpoint, will tell

    def _lose(self) -> None:
        def lost(who: str) -> str:
            return f"'{self._objects.address}' was taken over by {who}; this one stops, and nothing of it is saved from here on"

        self._lost = lost("another process")  # at once: by whom can be asked later
        with suppress(StoreError):
            self._lost = lost(holder(self._objects) or "another process")


def holder(objects: Objects, there: Facts | None = None) -> str | None:
    """Who holds the lease of an address, and until when; None where nobody does."""
    said, until = _lease(objects, there or objects.facts(LEASE))
    if said is None or until < time.time():
        return None
    return f"{said['holder']} ({said['process']}), until {time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(until))} unless renewed,"


def refusal(objects: Objects, there: Facts, me: str) -> str | None:
    """Why this holder may not take the lease now, in one line; None where it may."""
    said, _ = _lease(objects, there)
    if said is None or said["holder"] == me or (who := holder(objects, there)) is None:
        return None
    return f"output_dir: {who} is at work in '{objects.address}'; wait for it to end, or choose another output_dir"


def _lease(objects: Objects, there: Facts | None) -> tuple[dict[str, Any] | None, float]:
    """What the lease says, and when it expires: by the store's clock for its beginning, so that only our own has to be right."""
    if there is None or (content := objects.read(LEASE)) is None:
        return None, 0.0
    try:
        said = json.loads(content)
        return {name: said[name] for name in ("holder", "process")}, there.updated + float(said["seconds"])
    except (ValueError, KeyError, TypeError):
        return None, 0.0  # not ours to read; a write over its generation will tell whether it is still there

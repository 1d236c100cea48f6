"""Objects of a Google Cloud Storage bucket (floor 0).

A bucket has no append, no rename and no lock. What it has: an object is there whole or not at all, every write of it gives it a new
generation, and a write may be made to hold only over a generation that is named (0: none). All of ours is built from these three.
`google-cloud-storage` is imported when a bucket is first spoken to; with STORAGE_EMULATOR_HOST it speaks to that server.
"""

from __future__ import annotations

import base64
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from phased_ift_jax.records import Failure, UserError

Result = TypeVar("Result")
SCHEME = "gs://"
PATIENCE = 120.0  # seconds for which a request that fails with a passing fault (429, 5xx, a lost connection) is tried again
CHUNK_BYTES = 16 << 20  # of an object that is written as it is made; a multiple of 256 KiB
THREADS = 8  # requests at once; the client's pool has 10 connections


class StoreError(Failure):
    """The store refused, or could not be reached."""


class Changed(StoreError):
    """An object is of another generation than the write was to hold over: someone else has written it."""


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


def split(address: str, key: str = "output_dir") -> tuple[str, str]:
    """Bucket and name of an address such as gs://bucket/runs/one, which `key` has given.

    Raises:
        UserError: it is no such address.
    """
    match = re.fullmatch(r"gs://([a-z0-9][a-z0-9._-]+)/([^/\s?#\[\]*]+(?:/[^/\s?#\[\]*]+)*)/?", address)
    if match is None or {".", ".."} & set(match[2].split("/")):
        raise UserError(f"{key}: '{address}' is neither a {'folder' if key == 'output_dir' else 'file or folder'} on a disk nor an address such as gs://bucket/runs/one")
    return match[1], match[2]


class Objects:
    """The objects under one address; names are relative to it."""

    def __init__(self, address: str, key: str = "output_dir", parent: bool = False) -> None:
        """With `parent`, those beside what the address names. `key` is what has given it.

        Raises:
            UserError: the address is none, the client is not installed, or no credentials are found.
        """
        bucket, name = split(address, key)
        self.prefix = name.rpartition("/")[0] if parent else name
        self.address = f"{SCHEME}{bucket}/{self.prefix}".rstrip("/")
        try:
            self._client = _client()
        except UserError as error:
            raise UserError(f"{key}: {error}") from None
        self._bucket = self._client.bucket(bucket)

    def list(self, prefix: str = "") -> dict[str, Facts]:
        """Every object whose name begins so, by name."""

        def listed() -> dict[str, Facts]:
            blobs = self._client.list_blobs(self._bucket, prefix=self._name(prefix), retry=_retry(), fields=LISTED)
            return {blob.name.removeprefix(self._name("")): _facts(blob) for blob in blobs}

        return self._told("listed", prefix, listed)

    def children(self, prefix: str = "") -> Sequence[str]:
        """Names right under a prefix (empty, or ending with a slash), folders without their slash."""

        def listed() -> Sequence[str]:
            begin = self._name(prefix)
            blobs = self._client.list_blobs(self._bucket, prefix=begin, delimiter="/", retry=_retry(), fields=f"prefixes,{LISTED}")
            names = [blob.name for blob in blobs]
            return sorted({name.removeprefix(begin).rstrip("/") for name in [*names, *blobs.prefixes]} - {""})

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

    def read_range(self, name: str, start: int, stop: int, generation: int) -> bytes:
        """Bytes of an object of this generation.

        Raises:
            Changed: it is of another by now, or gone.
            StoreError: it cannot be read.
        """
        from google.api_core.exceptions import NotFound

        def content() -> bytes | None:
            try:
                blob = self._bucket.blob(self._name(name), generation=generation)
                return bytes(blob.download_as_bytes(start=start, end=stop - 1, raw_download=True, checksum=None, retry=_retry()))
            except NotFound:
                return None

        found = self._told("read", name, content)
        if found is None:
            raise Changed(f"'{self.address}/{name}' was changed or removed while it was read; the same command reads it as it is now")
        if len(found) != stop - start:
            raise StoreError(f"'{self.address}/{name}' cannot be read: {len(found)} bytes came of {stop - start}")
        return found

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

    @contextmanager
    def writing(self, name: str) -> Iterator[Callable[[memoryview], None]]:
        """What takes an object's bytes as they are made: it is there, whole, when this is left without an error. No more than CHUNK_BYTES wait here.

        Raises:
            StoreError: it cannot be written, or what the store has is not what was written.
        """
        import google_crc32c

        checksum = google_crc32c.Checksum()
        out = self._bucket.blob(self._name(name)).open("wb", chunk_size=CHUNK_BYTES, content_type="application/octet-stream", retry=_retry())

        def write(content: memoryview) -> None:
            for at in range(0, len(content), CHUNK_BYTES):
                part = bytes(content[at : at + CHUNK_BYTES])
                checksum.update(part)
                self._told("written", name, partial(out.write, part))

        try:
            yield write
            self._told("written", name, out.close)
        except BaseException:
            with suppress(Exception):  # it is the first error that is told
                out.terminate()
            raise
        there = self.facts(name)
        if there is None or there.crc32c != base64.b64encode(checksum.digest()).decode():
            raise StoreError(f"'{self.address}/{name}' is not what was written; run the same command again")

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
            part = path.with_name(f".{path.name}.{os.getpid()}.part")  # a download that fails must not leave a file that looks like one
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
        return f"{self.prefix}/{name}".removeprefix("/")

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


def crc32c_of(path: Path) -> str:
    """The CRC32C of a file, likewise."""
    import google_crc32c

    checksum = google_crc32c.Checksum()
    with open(path, "rb") as file:
        while content := file.read(1 << 20):
            checksum.update(content)
    return base64.b64encode(checksum.digest()).decode()


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
        raise UserError("gs:// needs `pip install 'phased_ift_jax[gcs]'`") from None
    from google.auth.exceptions import DefaultCredentialsError

    try:
        # a project is asked for by calls that we do not make; without a name the client would look for one
        return storage.Client(project=os.environ.get("GOOGLE_CLOUD_PROJECT", "none"))
    except DefaultCredentialsError:
        raise UserError(
            "no credentials for gs:// are found; run `gcloud auth application-default login`, or give the machine's service account access to the bucket"
        ) from None


def work_folder() -> Path:
    """Where on this machine runs lie whose output_dir is an address; raises `UserError` where no home is known."""
    try:
        caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        return Path(os.environ.get("PHASED_IFT_WORK") or caches / "phased_ift_jax" / "runs").expanduser()
    except RuntimeError:
        raise UserError("output_dir: this user has no home to work in; name a folder with PHASED_IFT_WORK") from None

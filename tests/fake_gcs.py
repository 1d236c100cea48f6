"""A Google Cloud Storage on 127.0.0.1: as much of its JSON API as google-cloud-storage and tensorstore speak, with its laws and with faults.

Every write makes a new generation, `ifGenerationMatch` is held (412), CRC32C is told and checked, a name is listed as soon as it is
written. There is no append and no rename, and copies are refused. One process is enough for many clients; the tests look into `objects`.
"""

from __future__ import annotations

import base64
import datetime
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import google_crc32c
import pytest

from phased_ift_jax import object_store

PAGE = 50  # names of a page, so that every listing of a run has several


@dataclass(frozen=True)
class Object:
    content: bytes
    generation: int
    updated: float

    @property
    def crc32c(self) -> str:
        return base64.b64encode(google_crc32c.value(self.content).to_bytes(4, "big")).decode()


@dataclass
class Fault:
    """What happens to requests whose "METHOD bucket/name" matches: `status` is answered (0: the connection is cut before, -1: after it
    was done), `times` times; `skip` of them go well before."""

    pattern: str
    status: int
    times: float = float("inf")
    skip: int = 0


@dataclass
class FakeGCS:
    """What a server holds and was asked."""

    url: str = ""
    buckets: dict[str, dict[str, Object]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)
    uploads: dict[str, dict[str, Any]] = field(default_factory=dict)
    generations: int = 1_700_000_000_000_000

    def objects(self, prefix: str = "", bucket: str = "bucket") -> dict[str, bytes]:
        with self.lock:
            return {name: found.content for name, found in sorted(self.buckets[bucket].items()) if name.startswith(prefix)}

    def put(self, name: str, content: bytes, bucket: str = "bucket") -> Object:
        with self.lock:
            self.generations += 1
            self.buckets[bucket][name] = made = Object(content, self.generations, time.time())
            return made

    def flip(self, name: str) -> None:
        """Another bit in the middle of an object, which the store itself does not take for a write."""
        with self.lock:
            old = self.buckets["bucket"][name]
            content = bytearray(old.content)
            content[len(content) // 2] ^= 1
            self.buckets["bucket"][name] = Object(bytes(content), old.generation, old.updated)

    def delete(self, name: str) -> None:
        with self.lock:
            del self.buckets["bucket"][name]

    def fail(self, pattern: str, status: int, times: float = float("inf"), skip: int = 0) -> Fault:
        self.faults.append(Fault(pattern, status, times, skip))
        return self.faults[-1]

    def fault(self, asked: str) -> int | None:
        with self.lock:
            self.asked.append(asked)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, asked):
                    if fault.skip:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault.status
        return None


class Refused(Exception):
    """A request that is answered with this status."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    disable_nagle_algorithm = True  # else a client waits 40 ms for what is ready
    wbufsize = 1 << 16
    gcs: FakeGCS
    cut = False

    def handle_any(self) -> None:
        address = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(address.query, keep_blank_values=True).items()}
        self.body = self.read_body()
        match = re.fullmatch(r"(?P<how>/upload|/download|/resumable|)/storage/v1/b/(?P<bucket>[^/]+)(?:/o(?:/(?P<name>.*))?)?/?", address.path)
        bucket, name = (unquote(match["bucket"]), unquote(match["name"] or self.query.get("name", ""))) if match else ("", address.path)
        if match and match["how"] == "/upload" and not name and self.query.get("uploadType") in ("multipart", "resumable"):
            name = self.name_within()
        listing = match and self.command == "GET" and address.path.rstrip("/").endswith("/o")
        status = self.gcs.fault(f"{'LIST' if listing else self.command} {bucket}/{self.query.get('prefix', '') if listing else name}")
        self.cut = status == -1
        if status == 0:
            self.close_connection = True
            return
        try:
            if status and status > 0:
                raise Refused(status)
            if not match or bucket not in self.gcs.buckets:
                raise Refused(404)
            if re.search(r"/(copyTo|rewriteTo|compose|moveTo)/|/compose$", address.path):
                raise Refused(501)
            with self.gcs.lock:
                self.route(match["how"], bucket, name, bool(listing), address.path)
        except Refused as refused:
            code = refused.args[0]
            self.answer(code, {"error": {"code": code, "message": f"status {code} for {self.command} {bucket}/{name}", "errors": []}})

    do_GET = do_POST = do_PUT = do_DELETE = do_HEAD = handle_any

    def route(self, how: str, bucket: str, name: str, listing: bool, path: str) -> None:
        held = self.gcs.buckets[bucket]
        if how == "/upload":
            return self.upload(bucket, name)
        if self.command == "GET" and listing:
            return self.list(bucket, held)
        if self.command == "GET" and not name:
            return self.answer(200, {"kind": "storage#bucket", "name": bucket})
        if self.command not in ("GET", "DELETE"):
            raise Refused(501)
        found = held.get(name)
        if found is None:
            raise Refused(404)
        self.hold_conditions(found)
        if self.command == "DELETE":
            del held[name]
            return self.answer(204)
        if self.query.get("alt") == "media" or how == "/download":
            return self.media(found)
        return self.answer(200, resource(bucket, name, found))

    def hold_conditions(self, found: Object | None) -> None:
        generation = found.generation if found else 0
        if "generation" in self.query and int(self.query["generation"]) != generation:
            raise Refused(404)
        if "ifGenerationMatch" in self.query and int(self.query["ifGenerationMatch"]) != generation:
            raise Refused(412)
        if "ifGenerationNotMatch" in self.query and int(self.query["ifGenerationNotMatch"]) == generation:
            raise Refused(304)

    def media(self, found: Object) -> None:
        content, status, size = found.content, 200, len(found.content)
        headers = {"x-goog-generation": str(found.generation), "x-goog-hash": f"crc32c={found.crc32c}", "x-goog-stored-content-length": str(size)}
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = wanted.groups()
            start = int(first) if first else max(0, size - int(last))
            stop = min(size, int(last) + 1) if first and last else size
            if start >= size:
                raise Refused(416)
            content, status = content[start:stop], 206
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self.answer(status, body=content, headers=headers)

    def list(self, bucket: str, held: dict[str, Object]) -> None:
        prefix, delimiter, start = self.query.get("prefix", ""), self.query.get("delimiter", ""), self.query.get("startOffset", "")
        end = self.query.get("endOffset")
        names: dict[str, bool] = {}
        for name in sorted(held):
            if name.startswith(prefix) and name >= start and (end is None or name < end):
                folder = name[: name.index(delimiter, len(prefix)) + 1] if delimiter and delimiter in name[len(prefix) :] else None
                names[folder or name] = folder is not None
        after = base64.b64decode(self.query.get("pageToken", "")).decode()
        left = [name for name in names if name > after]
        size = min(PAGE, int(self.query.get("maxResults") or PAGE))
        page = left[:size]
        more = {"nextPageToken": base64.b64encode(page[-1].encode()).decode()} if len(left) > size else {}
        items = [resource(bucket, name, held[name]) for name in page if not names[name]]
        prefixes = [name for name in page if names[name]]
        self.answer(200, {"kind": "storage#objects"} | more | ({"items": items} if items else {}) | ({"prefixes": prefixes} if prefixes else {}))

    def upload(self, bucket: str, name: str) -> None:
        kind = self.query.get("uploadType")
        if kind == "media":
            return self.store(bucket, name, self.body, {})
        if kind == "multipart":
            metadata, content = self.parts()
            return self.store(bucket, name, content, metadata)
        if kind == "resumable" and "upload_id" not in self.query:
            identity = f"upload-{len(self.gcs.uploads)}"
            self.gcs.uploads[identity] = {"name": name, "query": dict(self.query), "metadata": json.loads(self.body or b"{}"), "content": b""}
            return self.answer(200, headers={"Location": f"{self.gcs.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={identity}"})
        session = self.gcs.uploads[self.query["upload_id"]]
        self.query |= session["query"]
        wanted = re.fullmatch(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)", self.headers.get("Content-Range", ""))
        assert wanted, self.headers
        if wanted[1] is not None and int(wanted[1]) == len(session["content"]):
            session["content"] += self.body
        if wanted[3] != "*" and len(session["content"]) == int(wanted[3]):
            return self.store(bucket, session["name"], session["content"], session["metadata"])
        told = {"Range": f"bytes=0-{len(session['content']) - 1}"} if session["content"] else {}
        return self.answer(308, headers=told)

    def store(self, bucket: str, name: str, content: bytes, metadata: dict[str, Any]) -> None:
        assert name, "an object has a name"
        self.hold_conditions(self.gcs.buckets[bucket].get(name))
        made = Object(content, 0, 0.0)
        if metadata.get("crc32c", made.crc32c) != made.crc32c:
            raise Refused(400)
        self.answer(200, resource(bucket, name, self.gcs.put(name, content, bucket)))

    def parts(self) -> tuple[dict[str, Any], bytes]:
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])
        assert boundary
        _, first, second, *_ = self.body.split(b"--" + boundary[1].encode())
        return json.loads(first.split(b"\r\n\r\n", 1)[1]), second.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")

    def name_within(self) -> str:
        if "upload_id" in self.query:
            return str(self.gcs.uploads[self.query["upload_id"]]["name"])
        metadata = self.parts()[0] if self.query["uploadType"] == "multipart" else json.loads(self.body or b"{}")
        return str(metadata.get("name", ""))

    def read_body(self) -> bytes:
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(100)
            self.end_headers()
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            content = b""
            while size := int(self.rfile.readline().strip() or b"0", 16):
                content += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return content
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def answer(self, status: int, content: dict[str, Any] | None = None, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        if self.cut:  # it was done, and nobody is told
            self.close_connection = True
            return
        body = json.dumps(content).encode() if content is not None else body
        if status in (204, 304):  # have none, by the law of HTTP
            self.send_response(status)
            self.end_headers()
            return
        self.send_response(status)
        kind = "application/octet-stream" if content is None else "application/json"
        for name, value in ({"Content-Length": str(len(body)), "Content-Type": kind} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def resource(bucket: str, name: str, found: Object) -> dict[str, Any]:
    when = datetime.datetime.fromtimestamp(found.updated, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    facts = {"kind": "storage#object", "id": f"{bucket}/{name}/{found.generation}", "name": name, "bucket": bucket}
    facts |= {"generation": str(found.generation), "metageneration": "1", "size": str(len(found.content)), "crc32c": found.crc32c}
    return facts | {"updated": when, "timeCreated": when, "contentType": "application/octet-stream", "storageClass": "STANDARD"}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that went away
            super().handle_error(*_)


@contextmanager
def serving(*buckets: str) -> Iterator[FakeGCS]:
    """A server with these empty buckets."""
    gcs = FakeGCS(buckets={name: {} for name in buckets or ("bucket",)})
    server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"gcs": gcs}))
    server.daemon_threads = True
    gcs.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield gcs
    finally:
        server.shutdown()
        server.server_close()


def environment(gcs: FakeGCS) -> dict[str, str]:
    """What leads the clients of a process to this server; tensorstore reads it once."""
    return {"STORAGE_EMULATOR_HOST": gcs.url, "TENSORSTORE_GCS_HTTP_URL": gcs.url, "GOOGLE_AUTH_TOKEN_FOR_TESTING": "made-up"}


@pytest.fixture(scope="module")
def server() -> Iterator[FakeGCS]:
    """One for all tests of a file: tensorstore reads its address once for each client."""
    with serving("bucket") as gcs, pytest.MonkeyPatch.context() as patch:
        for name, value in environment(gcs).items():
            patch.setenv(name, value)
        object_store._client.cache_clear()
        yield gcs
        object_store._client.cache_clear()


def empty(server: FakeGCS, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing in the bucket, no fault to come, and a client that soon gives up."""
    server.buckets["bucket"].clear()
    server.faults.clear()
    server.asked.clear()
    monkeypatch.setattr(object_store, "PATIENCE", 2.0)

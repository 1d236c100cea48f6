"""Fetch: a file is there whole and right, or it is not there; nothing that has come is asked for twice."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from phased_ift_jax import fetch as verb
from phased_ift_jax.data import sources
from phased_ift_jax.data.sources import COLLECTIONS, RemoteFile, download, fetch
from phased_ift_jax.records import UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
BODY = bytes(range(256)) * 2000
FILE = RemoteFile("body.bin", "https://example.invalid/a/body.bin", hashlib.sha256(BODY).hexdigest(), "CC0")
UNKNOWN = RemoteFile("body.bin", FILE.url, None, "CC0")


@dataclass
class Mirror:
    """A server on this machine: what it holds, what it was asked, and faults to make, first to last, one a request."""

    url: str = ""
    files: dict[str, bytes] = field(default_factory=lambda: {"/a/body.bin": BODY})
    faults: list[str] = field(default_factory=list)  # "503" and the like: a status; "cut": the connection closes half-way; "whole": Range is ignored
    asked: list[tuple[str, str | None, str | None]] = field(default_factory=list)  # path, Range, Authorization
    sent: int = 0


@pytest.fixture
def mirror(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mirror]:
    state = Mirror()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            wanted = self.headers["Range"]
            state.asked.append((self.path, wanted, self.headers["Authorization"]))
            fault = state.faults.pop(0) if state.faults else ""
            body = state.files.get(self.path)
            if fault.isdigit() or body is None:
                return self.send_error(int(fault or 404))
            start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and fault != "whole" else 0
            if start and start >= len(body):
                return self.send_error(416)
            part = body[start:]
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            part = part[: len(part) // 2] if fault == "cut" else part
            self.wfile.write(part)
            state.sent += len(part)
            return None

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    state.url = f"http://127.0.0.1:{server.server_port}"
    yield state
    server.shutdown()
    server.server_close()


def get(mirror: Mirror, folder: Path, file: RemoteFile = FILE) -> tuple[Path, list[str]]:
    said: list[str] = []
    return download(file, folder, mirror.url, said.append, backoff=0.01), said


def refusal(mirror: Mirror, folder: Path, file: RemoteFile = FILE) -> str:
    with pytest.raises(UserError) as error:
        get(mirror, folder, file)
    assert "\n" not in str(error.value)
    assert not (folder / file.name).exists()
    return str(error.value)


def test_a_whole_download_is_checked_named_and_not_repeated(mirror: Mirror, tmp_path: Path) -> None:
    path, said = get(mirror, tmp_path)
    assert path.read_bytes() == BODY
    assert list(tmp_path.iterdir()) == [path]
    assert "licence CC0" in said[0]
    _, said = get(mirror, tmp_path)
    assert "have it" in said[0]
    assert mirror.asked == [("/a/body.bin", None, None)]


def test_a_partial_file_is_continued_and_only_the_missing_bytes_are_asked_for(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "body.bin.part").write_bytes(BODY[:123_456])
    path, _ = get(mirror, tmp_path)
    assert path.read_bytes() == BODY
    assert mirror.asked == [("/a/body.bin", "bytes=123456-", None)]
    assert mirror.sent == len(BODY) - 123_456


def test_a_partial_file_that_is_already_whole_needs_no_byte(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "body.bin.part").write_bytes(BODY)
    assert get(mirror, tmp_path)[0].read_bytes() == BODY
    assert mirror.sent == 0


def test_a_server_without_ranges_sends_it_whole(mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults = ["whole"]
    (tmp_path / "body.bin.part").write_bytes(b"old" * 1000)
    assert get(mirror, tmp_path)[0].read_bytes() == BODY


def test_without_a_checksum_halves_are_never_joined(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "body.bin.part").write_bytes(b"old" * 1000)
    path, said = get(mirror, tmp_path, UNKNOWN)
    assert path.read_bytes() == BODY
    assert mirror.asked[0][1] is None
    assert f"sha256 {FILE.sha256}, nothing known" in said[0]


@pytest.mark.parametrize("part", [b"", b"of another file"])
def test_a_wrong_checksum_leaves_nothing(mirror: Mirror, tmp_path: Path, part: bytes) -> None:
    mirror.files["/a/body.bin"] = wrong = BODY[:-1] + b"!"
    if part:
        (tmp_path / "body.bin.part").write_bytes(part)
    got = hashlib.sha256(part + wrong[len(part) :]).hexdigest()
    assert f"sha256 is {got}, expected {FILE.sha256}" in refusal(mirror, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_the_user_with_that_name_is_not_overwritten(mirror: Mirror, tmp_path: Path) -> None:
    (tmp_path / "body.bin").write_bytes(b"mine")
    with pytest.raises(UserError, match="move it away"):
        get(mirror, tmp_path)
    assert (tmp_path / "body.bin").read_bytes() == b"mine"
    assert mirror.asked == []


@pytest.mark.parametrize(("code", "message"), [(404, "HTTP 404, no such file"), (401, "then set HF_TOKEN"), (403, "accept the licence"), (418, "HTTP 418")])
def test_a_refusal_is_one_line_and_not_repeated(mirror: Mirror, tmp_path: Path, code: int, message: str) -> None:
    mirror.faults = [str(code)]
    assert message in refusal(mirror, tmp_path)
    assert len(mirror.asked) == 1


@pytest.mark.parametrize("fault", ["503", "429", "cut"])
def test_a_passing_fault_is_waited_out(mirror: Mirror, tmp_path: Path, fault: str) -> None:
    mirror.faults = [fault]
    assert get(mirror, tmp_path)[0].read_bytes() == BODY
    assert mirror.sent == len(BODY)  # what came before the cut is not sent again


def test_a_lasting_fault_ends_after_three_tries_and_what_came_is_kept(mirror: Mirror, tmp_path: Path) -> None:
    mirror.faults = ["cut", "503", "cut"]
    assert "the same command again continues at byte 384000" in refusal(mirror, tmp_path)
    assert len(mirror.asked) == 3
    assert get(mirror, tmp_path)[0].read_bytes() == BODY
    assert mirror.sent == len(BODY)


def test_nobody_listening_is_one_line(tmp_path: Path) -> None:
    assert "connection failed" in refusal(Mirror(url="http://127.0.0.1:9"), tmp_path)


def test_the_token_goes_to_hugging_face_over_https_only(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    get(mirror, tmp_path)
    assert mirror.asked[0][2] is None
    shown = {url: sources._request(url, 0).get_header("Authorization") for url in ("https://huggingface.co/x", "https://cdn.huggingface.co/x")}
    assert set(shown.values()) == {"Bearer secret"}
    for url in ("http://huggingface.co/x", "https://huggingface.co.example.org/x", "https://nothuggingface.co/x", "https://raw.githubusercontent.com/x"):
        assert sources._request(url, 0).get_header("Authorization") is None
    request = sources._request("https://huggingface.co/x", 0)
    assert "Authorization" not in request.headers  # urllib copies `headers` to where a redirect leads


def farm(oasst: int = 188) -> bytes:
    names = [("helpful_base", index) for index in range(129)] + [("oasst", index) for index in range(oasst)]
    return json.dumps([{"instruction": f"é {index}", "input": "", "output": "x", "dataset": name} for name, index in names]).encode()


def serve_testsets(mirror: Mirror, monkeypatch: pytest.MonkeyPatch, body: bytes) -> None:
    """The mirror has the test sets under their true paths: AlpacaFarm's is `body`, of the others any bytes, with their checksum."""
    files = []
    for file in COLLECTIONS["testsets"].files:
        bytes_ = body if file.sha256 is None else file.name.encode()
        mirror.files[file.url.removeprefix("https://raw.githubusercontent.com")] = bytes_
        files.append(RemoteFile(file.name, file.url, file.sha256 and hashlib.sha256(bytes_).hexdigest(), file.licence))
    monkeypatch.setitem(COLLECTIONS, "testsets", sources.Collection(tuple(files), COLLECTIONS["testsets"].selections))


def test_testsets_are_six_of_which_two_are_cut_out(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve_testsets(mirror, monkeypatch, farm())
    paths = fetch("testsets", tmp_path / "new", mirror.url, say=print, backoff=0.01)
    assert len([path for path in paths if path.name.endswith("_test_set.jsonl")]) == 6
    rows = [json.loads(line) for line in (tmp_path / "new" / "oasst_test_set.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows[187] == {"id": "oasst_187", "instruction": "é 187", "input": ""}
    assert len(rows) == 188
    assert len((tmp_path / "new" / "anthropic_test_set.jsonl").read_text(encoding="utf-8").splitlines()) == 129


@pytest.mark.parametrize(("body", "message"), [(farm(oasst=3), "has 3 rows of oasst, expected 188"), (b"<html>", "not an array"), (b"[1]", "not an array")])
def test_a_test_set_that_cannot_be_cut_out_is_not_written(mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: bytes, message: str) -> None:
    serve_testsets(mirror, monkeypatch, body)
    with pytest.raises(UserError, match=message):
        fetch("testsets", tmp_path, mirror.url, say=print)
    assert not (tmp_path / "oasst_test_set.jsonl").exists()


def test_the_known_checksums_are_those_of_the_shared_copies() -> None:
    if not SHARED.exists():
        pytest.skip(f"needs the shared data: no {SHARED}")
    known = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for folder in ("phasedsft", "testsets") for path in (SHARED / folder).iterdir()}
    files = [file for collection in COLLECTIONS.values() for file in collection.files]
    assert all(known[file.name] == file.sha256 for file in files if file.name in known)
    assert len([file for file in files if file.name in known]) == 5


def test_the_table_is_sane() -> None:
    for collection in COLLECTIONS.values():
        assert {selection.source for selection in collection.selections} <= {file.name for file in collection.files}
        for file in collection.files:
            assert file.url.startswith("https://")
            assert file.licence
            assert file.sha256 is None or len(file.sha256) == 64


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "no_proxy": "127.0.0.1"}
    return subprocess.run([sys.executable, "-m", "phased_ift_jax.fetch", *argv], env=environment, capture_output=True, text=True, check=False)


def test_the_command_line_ends_in_0_or_in_2_with_one_line(mirror: Mirror, tmp_path: Path) -> None:
    file = COLLECTIONS["alpaca-scored"].files[0]
    path = file.url.removeprefix("https://raw.githubusercontent.com")
    arguments = ("alpaca-scored", "--out", str(tmp_path), "--base-url", mirror.url)
    for setup, code, message in (({}, 2, "HTTP 404"), ({path: b"x"}, 2, f"expected {file.sha256}")):
        mirror.files = dict(setup)
        done = run(*arguments)
        assert (done.returncode, done.stderr.count("\n")) == (code, 1)
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
    stage3 = SHARED / "phasedsft" / file.name
    if stage3.exists():
        mirror.files = {path: stage3.read_bytes()}
        done = run(*arguments)
        assert (done.returncode, done.stderr) == (0, "")
        assert "CC BY-NC 4.0" in done.stdout
        assert (tmp_path / file.name).read_bytes() == stage3.read_bytes()


@pytest.mark.parametrize(("words", "message"), [("alpacca --out x", "alpacca"), ("alpaca", "--out"), ("alpaca --out x --base_url file:///etc", "base_url")])
def test_wrong_words_are_the_users_error(words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        verb.main(words.split())
    assert list(tmp_path.iterdir()) == []

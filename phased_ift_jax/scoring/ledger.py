"""Every attempt and every raw reply, in an append-only JSONL file of one writer: what is in it is never paid for again.

    {"sent": key, "attempt", "reserved_usd", "at", "via"}                                         before a request leaves
    {"key", "attempt", "usd", "final", "error", "at", "via", "status", "request_id", "reply"}     what became of it

`error` is null exactly where there is a `reply`; with the code "content_filter" it is an answer, too, and not asked for again. `usd` is what
an attempt counts against the budget: the price of its reply, 0 where the server refused it, its worst case where nobody knows; null without
a price. `final` spares a start the parsing of a million replies: with it a question is never asked again. Lines of any other shape are notes of a mode's own.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.scoring.request import Parse, Reading, one_line

NUMBER = rb"(null|[\d.e+-]+)"
SENT = re.compile(rb'\{"sent": "([0-9a-f]{64})", "attempt": (\d+), "reserved_usd": ' + NUMBER + rb', "at": "([^"]+)", "via": "([^"]+)"\}')
ANSWER = re.compile(rb'\{"key": "([0-9a-f]{64})", "attempt": (\d+), "usd": ' + NUMBER + rb', "final": (true|false), "error": (null|\{"code": "content_filter"|\{)')
CHUNK = 1 << 11  # bytes, of which most lines have fewer
DAMAGED = {"status": None, "at": "", "reply": None, "error": {"code": None, "type": None, "message": "its line in the ledger is damaged; without the line it is asked again"}}
SECRET = 8  # a key shorter than this is a word like "none", and is no secret


@dataclass(frozen=True, slots=True)
class Sent:
    """An attempt without an answer line: what became of it is not known here."""

    attempt: int
    reserved_usd: float | None
    at: str
    via: str

    @property
    def age(self) -> float:
        """Seconds since it was sent."""
        return (datetime.now(UTC) - datetime.fromisoformat(self.at)).total_seconds()


class Ledger:
    """The ledger at a path, held by this process until `close`. In memory is an index only.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """

    def __init__(self, path: Path, secret: str = "") -> None:
        self.path, self._secret = path, json.dumps(secret)[1:-1] if len(secret) >= SECRET else ""
        self.pending: dict[str, Sent] = {}
        self.notes: list[dict[str, Any]] = []  # lines that are neither attempts nor answers, in order
        self.spent_usd = 0.0  # of all answer lines; those without a price are counted in `unpriced`
        self.unpriced = self.answers = self.unreadable = 0
        self._last: dict[bytes, int] = {}  # key -> 2 * offset of the newest reply + whether it is final; where there is none, -1 - offset of the newest error
        self._earlier: dict[bytes, list[int]] = {}  # offsets of the replies before the newest, of the few keys that have more than one
        self._attempts: dict[bytes, int] = {}  # of keys with other than one attempt
        self._synced, self._thread = 0, ThreadPoolExecutor(1, "ledger")
        self._syncing: asyncio.Future[None] | None = None
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is writing '{path}'; wait for it, or name another --out") from None
        except OSError as error:
            raise UserError(f"--out: cannot write '{path}': {error.strerror}; name a file in a folder of this machine") from None
        self.size = self._load()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._thread.shutdown()
        self.sync()
        os.close(self._fd)

    # --- what is known -------------------------------------------------------------------------------------------------------------

    def attempts(self, key: str) -> int:
        """How many attempts were made of a request; the next is one more."""
        raw = bytes.fromhex(key)
        return self._attempts.get(raw, int(raw in self._last))

    def replies(self, key: str) -> int:
        raw = bytes.fromhex(key)
        return 0 if self._last.get(raw, -1) < 0 else 1 + len(self._earlier.get(raw, ()))

    def final(self, key: str) -> bool:
        """Whether the newest reply was final when it came: a request with one is never sent again."""
        last = self._last.get(bytes.fromhex(key), -1)
        return last >= 0 and last & 1 == 1

    def lines(self, key: str) -> Iterator[dict[str, Any]]:
        """Answer lines with a reply, in order; where there is none, the newest error's line, if there is that."""
        raw = bytes.fromhex(key)
        last = self._last.get(raw)
        for offset in [*self._earlier.get(raw, ()), *([] if last is None else [last >> 1 if last >= 0 else -1 - last])]:
            try:
                yield json.loads(self._line_at(offset))
            except ValueError:  # a reply that was paid for: it is not for us to pay for another
                yield DAMAGED

    def reading(self, key: str, parse: Parse) -> Reading | None:
        """The first of a request's replies that is ok, else what the last one is, else how it failed; None where no attempt has ended."""
        return read_lines(self.lines(key), parse)

    # --- what happens ----------------------------------------------------------------------------------------------------------------

    def sent(self, key: str, attempt: int, via: str, reserved_usd: float | None) -> None:
        """Note that a request is about to leave; it may, once `sync` or `durable` has returned."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._append({"sent": key, "attempt": attempt, "reserved_usd": reserved_usd, "at": at, "via": via})
        self._note_sent(key, Sent(attempt, reserved_usd, at, via))

    def answered(
        self,
        key: str,
        attempt: int,
        via: str,
        *,
        usd: float | None,
        reply: Mapping[str, Any] | None = None,
        error: Mapping[str, Any] | None = None,
        final: bool = False,
        status: int | None = None,
        request_id: str | None = None,
    ) -> None:
        """Note what became of an attempt: a raw reply, or else an error `{code, type, message}`."""
        assert (reply is None) != (error is None), "a reply or an error"
        told = {"code": None, "type": None, "message": None, **error} if error is not None else None
        head = {"key": key, "attempt": attempt, "usd": usd, "final": final, "error": told, "at": datetime.now(UTC).isoformat(timespec="milliseconds"), "via": via}
        offset = self._append(head | {"status": status, "request_id": request_id, "reply": reply})
        self._note_answer(bytes.fromhex(key), attempt, usd, final, told is None or told["code"] == "content_filter", offset)

    def note(self, line: dict[str, Any]) -> None:
        """Append a line of a mode's own, which must have neither `sent` nor `key`; later starts find it in `notes`."""
        self._append(line)
        self.notes.append(line)

    def sync(self) -> None:
        """Return once the disk holds all that was noted."""
        end = self.size
        os.fsync(self._fd)
        self._synced = end

    async def durable(self) -> None:
        """The same for many who wait at a time: one `fsync` serves all whose lines were there when it began."""
        end = self.size
        while self._synced < end:
            if self._syncing is None or self._syncing.done():
                self._syncing = asyncio.get_running_loop().run_in_executor(self._thread, self.sync)
            await asyncio.shield(self._syncing)

    # --- lines and index -------------------------------------------------------------------------------------------------------------

    def _append(self, line: Mapping[str, Any]) -> int:
        text = json.dumps(line, ensure_ascii=False)
        if self._secret:  # servers have been seen to quote a key in their complaints
            text = text.replace(self._secret, "[the key]")
        data = text.encode("utf-8", "backslashreplace") + b"\n"
        offset = self.size
        try:
            if os.write(self._fd, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            os.ftruncate(self._fd, offset)  # a disk that is full has taken a part
            raise Failure(f"cannot write '{self.path}': {error.strerror}; make room, then the same command goes on") from error
        self.size += len(data)
        return offset

    def _line_at(self, offset: int) -> bytes:
        data = b""
        while (end := data.find(b"\n")) < 0:
            data += os.pread(self._fd, CHUNK, offset + len(data))
        return data[:end]

    def _load(self) -> int:
        offset = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):  # torn by a kill or a power cut: it was not durable, so nobody has built on it
                    os.ftruncate(self._fd, offset)
                    break
                self._index(line, offset)
                offset += len(line)
        if self.unreadable:
            told = f"warning: {self.unreadable:,} lines of '{self.path}' cannot be read; what they answered is not known"
            print(told, file=sys.stderr)
        return offset

    def _index(self, line: bytes, offset: int) -> None:
        if match := ANSWER.match(line):
            key, attempt, usd, final, error = match.groups()
            self._note_answer(bytes.fromhex(key.decode()), int(attempt), None if usd == b"null" else float(usd), final == b"true", error != b"{", offset)
        elif match := SENT.match(line):
            key, attempt, usd, at, via = match.groups()
            self._note_sent(key.decode(), Sent(int(attempt), None if usd == b"null" else float(usd), at.decode(), via.decode()))
        else:
            try:
                note = json.loads(line)
            except ValueError:
                note = None
            if isinstance(note, dict) and not note.keys() & {"sent", "key"}:
                self.notes.append(note)
            else:
                self.unreadable += 1

    def _note_sent(self, key: str, sent: Sent) -> None:
        self.pending[key] = sent
        if sent.attempt > 1 or bytes.fromhex(key) not in self._last:
            self._attempts[bytes.fromhex(key)] = sent.attempt

    def _note_answer(self, key: bytes, attempt: int, usd: float | None, final: bool, replied: bool, offset: int) -> None:
        sent = self.pending.get(key.hex())
        if sent and sent.attempt <= attempt:
            del self.pending[key.hex()]
        self.answers += replied
        self.unpriced += usd is None
        self.spent_usd += usd or 0.0
        before = self._last.get(key, -1)
        if replied and before >= 0:
            self._earlier.setdefault(key, []).append(before >> 1)
        if replied or before < 0:
            self._last[key] = 2 * offset + final if replied else -1 - offset
        if attempt == 1:
            self._attempts.pop(key, None)
        else:
            self._attempts[key] = attempt


def read_lines(lines: Iterable[Mapping[str, Any]], parse: Parse) -> Reading | None:
    """What a request's answer lines come to: see `Ledger.reading`."""
    reading = None
    for line in lines:
        if error := line["error"]:
            filtered = error["code"] == "content_filter"
            reading = Reading("filtered" if filtered else "failed", reason=one_line(f"{line['status'] or ''} {error['message'] or error['type']}"))
        else:
            reading = parse(line["reply"])
        if reading.outcome == "ok":
            break
    return reading

"""Questions in batches: half the price, and an answer within a day. Whatever becomes of a batch or of this process, nothing is paid for twice.

A part of the questions is uploaded as a file; then the ledger notes that each of them leaves, and that the batch is being created; then it is,
with the part's name as metadata, by which one is found again whose creation was not told; then its id is noted, and it is polled; what its files
say goes into the ledger line by line. A part is under way as long as one of its questions has no answer line. A creation of which nothing is to
be found may yet be executed: its questions are asked again in another part, and stay counted at their worst case.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import IO, TYPE_CHECKING, Any

from phased_ift_jax.scoring import live
from phased_ift_jax.scoring.ledger import Ledger, Sent
from phased_ift_jax.scoring.money import BATCH, Budget
from phased_ift_jax.scoring.patience import PASSING, Gone, Patience, lasting, unheard
from phased_ift_jax.scoring.request import FAILURES, Parse, Request, Settings, Summary

if TYPE_CHECKING:
    from openai.types import Batch

PART = "phased_ift_part"  # metadata of a batch
VIA = "batch:"
URL = "/v1/chat/completions"
ENDED = ("completed", "expired", "cancelled", "failed")
FETCHES = 8  # so often a file is fetched that is torn, or has fewer lines than its batch says
CRUMBS = 50  # a part that the budget makes smaller than this share of what is left to ask is not sent
CLOCKS = 86_400  # seconds by which a server's clock may differ from ours


@dataclass(frozen=True, slots=True)
class Limits:
    """What one file may have, and how often at least a batch is looked at."""

    requests: int = 50_000
    size: int = 200_000_000  # bytes
    poll_seconds: float = 60.0


@dataclass(slots=True)
class Part:
    """Questions that travel in one batch; its `id` is None until it is known."""

    name: str
    keys: list[str]
    id: str | None = None
    seen: tuple[object, ...] = ()
    began: float = field(default_factory=time.monotonic)

    @property
    def via(self) -> str:
        return VIA + self.name


class Stopped(Exception):
    """Nothing more can be done now: "signal", "budget", or "limit", the server's of what may wait."""


def ask_in_batches(requests: Iterable[Request], ledger: Ledger, budget: Budget, settings: Settings, parse: Parse, limits: Limits | None = None) -> Summary:
    """Ask what the ledger has no settled answer to, after the batches of earlier starts; without any question, see those to their end.

    `budget` has the live price, of which everything here costs half, and what is pending in the ledger set aside. A part is set aside whole.

    Raises:
        UserError: the server refuses the key, the model or the batch.
        Failure: the server could not be reached for an hour.
    """
    import openai

    known = asyncio.run(live.ask([], ledger, budget, settings, parse)) if any(sent.via == live.VIA for sent in ledger.pending.values()) else Summary()
    if known.stopped:
        return known
    wanted = {request.key: request for request in requests if not live.is_settled(ledger, request.key, parse)}
    with openai.OpenAI(**settings.client_options()) as client:
        asking = _Asking(client, ledger, budget, settings, parse, limits or Limits(), wanted, known)
        try:
            asking.all()
        except Stopped as stopped:
            asking.summary.stopped = str(stopped)
        except KeyboardInterrupt:  # comes at any moment, as a kill may
            asking.summary.stopped = "signal"
            _say(f"interrupted; {len(asking.open):,} batches go on at the server, and the same command fetches them")
    ledger.sync()
    return asking.summary


class _Asking:
    """One call of `ask_in_batches`."""

    def __init__(self, client: Any, ledger: Ledger, budget: Budget, settings: Settings, parse: Parse, limits: Limits, wanted: dict[str, Request], summary: Summary) -> None:
        self.client, self.ledger, self.budget, self.settings, self.parse, self.limits = client, ledger, budget, settings, parse, limits
        self.wanted, self.summary, self.failures = wanted, summary, Counter[str]()
        self.patience = Patience(settings)
        self.queue = deque(key for key in wanted if key not in ledger.pending)
        self.open: list[Part] = []
        self.largest, self.at_once = limits.requests, sys.maxsize  # requests of a part, and parts: fewer once the server says that too much waits

    def all(self) -> None:
        self.resume()
        while self.queue or self.open:
            while self.queue and len(self.open) < self.at_once and (part := self.submit()):
                if part.id:
                    self.open.append(part)
            if self.queue and not self.open:
                raise Stopped("budget")
            for part in [*self.open]:
                try:
                    if (batch := self.look(part)).status in ENDED:
                        self.open.remove(part)
                        self.merge(part, batch)
                except Gone:
                    self.open = [other for other in self.open if other is not part]
                    self.lose(part, f"the server no longer has batch {part.id}, or a file of it")
            if self.open:
                time.sleep(min(self.limits.poll_seconds, 1 + (time.monotonic() - self.open[-1].began) / 20))

    # --- what becomes of a question

    def failed(self, key: str, sent: Sent, error: Mapping[str, Any], *, lost: bool = False, weight: int = 1, status: int | None = None, request_id: str | None = None) -> None:
        """Note that an attempt has no reply; it may count for several of those after which a request has failed."""
        usd = sent.reserved_usd if lost or self.budget.price is None else 0.0
        told = {name: error.get(name) for name in ("type", "code")} | {"message": self.patience.told(error.get("message"))}
        self.ledger.answered(key, sent.attempt, sent.via, usd=usd, error=told, status=status, request_id=request_id)
        self.budget.settle(key, usd)
        self.summary.lost += lost
        self.failures[key] += weight

    def end_or_queue(self, keys: Iterable[str]) -> None:
        for key in keys:
            if key in self.wanted:
                if self.failures[key] < FAILURES and not live.is_settled(self.ledger, key, self.parse):
                    self.queue.append(key)
                elif reading := self.ledger.reading(key, self.parse):
                    self.summary.outcomes[reading.outcome] += 1

    # --- a part leaves

    def submit(self) -> Part | None:
        """Send the next part, which has an id if its batch is known to be there; None where the budget has no room for one worth a batch."""
        with tempfile.TemporaryFile(dir=self.ledger.path.parent) as file:
            keys = self.fill(file)
            if not keys:
                return None
            part = Part(uuid.uuid4().hex, keys)
            uploaded = self.patience.until_done(lambda: self.client.files.create(file=(f"{part.name}.jsonl", _from_start(file)), purpose="batch"))
        for key in keys:
            self.ledger.sent(key, self.ledger.attempts(key) + 1, part.via, self.worst_case(key))
        self.ledger.sync()
        self.create(part, uploaded.id)
        return part

    def worst_case(self, key: str) -> float | None:
        usd = self.budget.worst_case(self.wanted[key])
        return None if usd is None else usd * BATCH

    def fill(self, file: IO[bytes]) -> list[str]:
        """Write as many of the next questions as one file and the budget take; they leave the queue, and their worst case is set aside."""
        keys: list[str] = []
        size, asked = 0, len(self.queue)
        while self.queue and len(keys) < self.largest:
            key = self.queue[0]
            line = json.dumps({"custom_id": key, "method": "POST", "url": URL, "body": self.wanted[key].body}).encode() + b"\n"
            if len(line) > self.limits.size:
                told = {"type": "too_large", "message": f"the request has {len(line):,} bytes, and a file of a batch at most {self.limits.size:,}"}
                self.failed(key, Sent(self.ledger.attempts(key) + 1, None, "", VIA), told, weight=FAILURES)
                self.end_or_queue([self.queue.popleft()])
                continue
            if size + len(line) > self.limits.size:
                break
            if not self.budget.reserve(key, self.worst_case(key)):
                if len(keys) * CRUMBS < asked:  # each round would be smaller than the last, and may take a day
                    for key in reversed(keys):
                        self.budget.settle(key, 0.0)
                        self.queue.appendleft(key)
                    return []
                break
            size += len(line)
            file.write(line)
            keys.append(self.queue.popleft())
        return keys

    def create(self, part: Part, file: str) -> None:
        """Create the batch of a part: again where the server has turned it away, but not where its reply got lost and no batch is to be found."""
        import openai

        while part.id is None:
            self.ledger.note({"creating": part.name, "at": datetime.now(UTC).isoformat(timespec="milliseconds")})
            self.ledger.sync()
            try:
                part.id = self.client.batches.create(input_file_id=file, endpoint=URL, completion_window="24h", metadata={PART: part.name}).id
            except (openai.APIError, json.JSONDecodeError) as error:
                if lasting(error):
                    self.undo(part, str(error))
                elif getattr(error, "status_code", None) != 429 and self.find(part, self.settings.settle_seconds):
                    break
                elif unheard(error):
                    self.lose(part, "the reply to the creation of its batch got lost, and no batch is to be found")
                    return
                else:
                    self.ledger.note({"refused": part.name})
                self.patience.pause(error, part.began)
        self.created(part)

    def created(self, part: Part) -> None:
        self.ledger.note({"part": part.name, "batch": part.id})
        self.ledger.sync()
        _say(f"batch {part.id}: {len(part.keys):,} requests")

    def undo(self, part: Part, why: str) -> None:
        """The batch of a part was never created: nothing of it was billed."""
        for key in part.keys:
            self.failed(key, self.ledger.pending[key], {"type": "not_created", "message": why}, weight=0)
        self.ledger.sync()

    def lose(self, part: Part, why: str) -> None:
        """Nobody knows what became of the rest of a part: it is asked again, and stays counted at its worst case."""
        pending = {key: self.ledger.pending[key] for key in part.keys if key in self.ledger.pending}
        _say(f"{why}: {len(pending):,} requests are asked again, and stay counted at their worst case")
        for key, sent in pending.items():
            self.failed(key, sent, {"type": "lost", "code": "lost", "message": why}, lost=True)
        self.ledger.sync()
        self.end_or_queue(part.keys)

    def find(self, part: Part, seconds: float) -> bool:
        """Look for the batch of a part among the server's, which it may take so many seconds to come up."""
        until, oldest = time.monotonic() + seconds, max(0.0, *(self.ledger.pending[key].age for key in part.keys))
        while True:
            late = time.monotonic() >= until
            part.id = self.patience.until_done(lambda: self.listed(part.name, time.time() - oldest - CLOCKS))
            if part.id or late:
                return part.id is not None
            time.sleep(self.settings.settle_seconds / 10)

    def listed(self, name: str, since: float) -> str | None:
        for batch in self.client.batches.list(limit=100):  # the newest first
            if (batch.metadata or {}).get(PART) == name:
                return str(batch.id)
            if batch.created_at < since:
                break
        return None

    # --- a part comes back

    def resume(self) -> None:
        """Take up what an earlier start left under way."""
        ids = {note["part"]: note["batch"] for note in self.ledger.notes if "part" in note}
        creations: dict[str, str | None] = {}  # when each was last begun; None where the server has turned it away since
        for note in self.ledger.notes:
            if name := note.get("creating") or note.get("refused"):
                creations[name] = note.get("at")
        parts: dict[str, Part] = {}
        for key, sent in self.ledger.pending.items():
            if sent.via.startswith(VIA):
                name = sent.via.removeprefix(VIA)
                parts.setdefault(name, Part(name, [], ids.get(name))).keys.append(key)
        self.open = [part for part in parts.values() if part.id]
        for part in parts.values():
            begun = creations.get(part.name)
            if part.id is None and self.find(part, self.left(begun or max(self.ledger.pending[key].at for key in part.keys))):
                self.created(part)
                self.open.append(part)
            elif part.id is None and begun:
                self.lose(part, "the process ended while its batch was being created, and no batch is to be found")
            elif part.id is None:
                self.undo(part, "the process ended before the batch was created")
                self.end_or_queue(part.keys)

    def left(self, begun: str) -> float:
        """Seconds for which what was begun at a time may yet come up, whatever became of the clock since."""
        age = (datetime.now(UTC) - datetime.fromisoformat(begun)).total_seconds()
        return min(max(self.settings.settle_seconds - age, 0.0), self.settings.settle_seconds)

    def look(self, part: Part) -> Batch:
        batch: Batch = self.patience.there(lambda: self.client.batches.retrieve(part.id))
        counts = batch.request_counts
        done, total = (counts.completed + counts.failed, counts.total) if counts else (0, 0)
        if (seen := (batch.status, 10 * done // max(total, 1))) != part.seen:
            part.seen = seen
            _say(f"batch {part.id}: {batch.status}" + (f", {done:,} of {total:,}" if total else ""))
        return batch

    def merge(self, part: Part, batch: Batch) -> None:
        """Note what became of each question of a part whose batch has ended, whichever way."""
        pending = {key: self.ledger.pending[key] for key in part.keys}
        paid, found = (batch.request_counts.completed if batch.request_counts else 0), 0
        for look in range(FETCHES):
            if batch.output_file_id or not paid:
                break
            time.sleep(min(look, self.limits.poll_seconds))  # a batch may have ended before it names its files
            batch = self.look(part)
        for file, expected in ((batch.output_file_id, paid), (batch.error_file_id, 0)):
            for line in self.lines(file, expected) if file else ():
                response = _object(line.get("response"))
                status, request_id, body = response.get("status_code"), response.get("request_id"), _object(response.get("body"))
                found += status == 200
                if (sent := pending.pop(key := str(line.get("custom_id")), None)) is None:  # an earlier start has noted it
                    continue
                if status == 200 and body:
                    usd = self.budget.cost(body, None)
                    usd = sent.reserved_usd if usd is None else usd * BATCH
                    self.ledger.answered(key, sent.attempt, sent.via, usd=usd, reply=body, status=status, request_id=request_id)
                    self.budget.settle(key, usd)
                else:
                    error = _object(line.get("error")) or _object(body.get("error")) or {"type": "no_reply", "message": f"neither reply nor error: {line}"}
                    self.failed(key, sent, error, weight=FAILURES if status and status < 500 and status not in PASSING else 1, status=status, request_id=request_id)
        told = batch.errors.data[0] if batch.errors and batch.errors.data else None
        crowded = batch.status == "failed" and told is not None and told.code == "token_limit_exceeded"
        why = {"type": f"batch_{batch.status}", "code": told and told.code, "message": (told and told.message) or f"the batch has {batch.status} without it"}
        for key, sent in pending.items():  # a batch that was refused is tried twice; of replies that are in no file, nobody knows whose they were
            self.failed(key, sent, why, lost=found < paid, weight=0 if crowded else FAILURES // 2 if batch.status == "failed" else 1)
        self.ledger.sync()
        self.end_or_queue(part.keys)
        if crowded:
            if len(part.keys) == 1 and not self.open:
                _say(f"the server has no room for a single request: {self.patience.told(why['message'])}")
                raise Stopped("limit")
            self.at_once, self.largest = max(1, len(self.open)), self.largest if self.open else len(part.keys) // 2

    def lines(self, file: str, expected: int) -> Iterator[dict[str, Any]]:
        """The lines of a file of the server's, which is here as a whole before the first of them is used."""
        with tempfile.TemporaryFile(dir=self.ledger.path.parent) as here:
            for fetch in range(FETCHES):
                self.patience.there(lambda: self.fetch(file, here))
                whole = [bool(_line(text)) for text in _from_start(here)]
                if all(whole) and len(whole) >= expected:
                    break
                time.sleep(min(fetch, self.limits.poll_seconds))
            yield from (line for text in _from_start(here) if (line := _line(text)))

    def fetch(self, file: str, here: IO[bytes]) -> None:
        here.seek(0)
        here.truncate()
        with self.client.files.with_streaming_response.content(file) as response:
            for data in response.iter_bytes():
                here.write(data)


def _from_start(file: IO[bytes]) -> IO[bytes]:
    file.seek(0)
    return file


def _line(text: bytes) -> dict[str, Any]:
    """A line of a file of the server's; empty for one that is torn."""
    try:
        return _object(json.loads(text))
    except ValueError:
        return {}


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)

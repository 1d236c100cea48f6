"""Questions one by one, many at a time, over the official client.

Nothing leaves before its line in the ledger is on the disk, and an attempt without a reply (a time-out, a dropped connection, a kill) is first
looked for among the replies that the server keeps: only what is not there is asked again, and stays counted at its worst case.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import re
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any, Literal, cast

from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.scoring.ledger import SECRET, Ledger
from phased_ift_jax.scoring.money import Budget, prompt_bound
from phased_ift_jax.scoring.pace import Pace, retry_after
from phased_ift_jax.scoring.request import ATTEMPT, FAILURES, KEY, Parse, Reading, Request, Settings, Summary, one_line, settled

VIA = "live"
RATE_LIMITED = 100  # attempts that a server may turn away because of its limits, which costs nothing, before a request has failed
BACKOFF, LONGEST = 0.5, 60.0  # seconds: the first wait is up to the one, doubles, and ends at the other
NEVER_LEFT = 0  # in place of an HTTP status
PER_CLIENT = 8  # requests at a time of one client, whose pool looks at all of its connections for each request
GATEWAY = {408, 502, 504, 520, 522, 524}  # what a proxy says when it has lost patience: the server behind it may have answered
NO_STORE = {400, 403, 404, 405, 422, 501}  # of the list of stored replies: there is none here, or not for us
Tell = Callable[[Summary, Budget], object]


async def ask(requests: Iterable[Request], ledger: Ledger, budget: Budget, settings: Settings, parse: Parse, tell: Tell = lambda *_: None) -> Summary:
    """Ask what the ledger has no settled answer to, each question once, and return when all have ended or nothing more may be sent.

    Attempts of earlier starts are looked for first. `tell` is called whenever a request has ended.

    Raises:
        UserError: the server refuses the key, the model or the account, or does not take `store`.
        Failure: the disk is full.
    """
    import openai

    async with AsyncExitStack() as opened:
        clients = [await opened.enter_async_context(openai.AsyncOpenAI(**settings.client_options())) for _ in range(0, settings.concurrency, PER_CLIENT)]
        asking = _Asking(clients, ledger, budget, settings, parse, tell)
        with asking.stopped_by_signals():
            await asking.settle_pending()
            await asking.all(requests)
    ledger.sync()
    return asking.summary


def hide(text: str, settings: Settings) -> str:
    """A server's words without the key, which some repeat."""
    return text.replace(settings.api_key, "[the key]") if len(settings.api_key) >= SECRET else text


class _Asking:
    """One call of `ask`."""

    def __init__(self, clients: Sequence[Any], ledger: Ledger, budget: Budget, settings: Settings, parse: Parse, tell: Tell) -> None:
        self.clients, self.ledger, self.budget, self.settings, self.parse, self.tell = itertools.cycle(clients), ledger, budget, settings, parse, tell
        self.summary, self.pace, self.keeps = Summary(), Pace(), settings.store
        self._stop, self._landed, self._queue = asyncio.Event(), asyncio.Event(), asyncio.Lock()
        self._under_way, self._fault = 0, cast(Exception | None, None)

    # --- all of them

    async def all(self, requests: Iterable[Request]) -> None:
        shared, seen = iter(requests), set[str]()

        async def work() -> None:
            for request in shared:
                if self._stop.is_set():
                    return
                if request.key not in seen and request.key not in self.ledger.pending and not is_settled(self.ledger, request.key, self.parse):
                    seen.add(request.key)
                    await self._one(request)
                else:
                    await asyncio.sleep(0)  # a million that are answered already must not keep the others waiting

        await self._together(work() for _ in range(self.settings.concurrency))

    async def settle_pending(self) -> None:
        """Find out about the attempts of earlier starts that have no answer line."""
        pending = [(key, sent) for key, sent in self.ledger.pending.items() if sent.via == VIA]
        if pending and self.keeps:
            print(f"{len(pending):,} requests were under way when the last start ended: asking the server what became of them", file=sys.stderr)
        room = asyncio.Semaphore(self.settings.concurrency)

        async def settle(key: str) -> None:
            async with room:
                sent = self.ledger.pending[key]
                longest = self.settings.timeout_seconds + self.settings.settle_seconds  # it may be at work on the answer still
                left = min(max(longest - sent.age, 0.0), longest)
                await self._settle_unknown(key, sent.attempt, sent.reserved_usd, left, "the process ended before its reply")

        await self._together(settle(key) for key, _ in pending)
        if self.summary.lost:
            print(f"{self.summary.lost:,} of them are asked again: the server kept no reply; they stay counted at their worst case", file=sys.stderr)

    async def _together(self, work: Iterable[Awaitable[None]]) -> None:
        async def guarded(one: Awaitable[None]) -> None:
            try:
                await one
            except BaseException:
                self.stop("a fault")
                raise

        ended = await asyncio.gather(*map(guarded, work), return_exceptions=True)
        for fault in [self._fault, *ended]:
            if fault is not None:
                raise fault

    def _end(self, fault: Exception) -> None:
        self._fault = self._fault or fault
        self.stop("a fault")

    def stop(self, why: str) -> None:
        """Send nothing more; what is under way is awaited."""
        self.summary.stopped = self.summary.stopped or why
        self._stop.set()
        self._landed.set()

    @contextmanager
    def stopped_by_signals(self) -> Iterator[None]:
        def hear(name: str) -> None:
            if self.summary.stopped == "signal":
                os.write(2, b"\nended at once; the next start asks the server about what was under way\n")
                os._exit(130)
            print(f"\n{name}: nothing more is sent; waiting for {self._under_way} replies that are paid for", file=sys.stderr)
            self.summary.stopped = None
            self.stop("signal")

        loop, before = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for number in before:
                loop.add_signal_handler(number, hear, number.name)
        except (ValueError, RuntimeError):  # not in the main thread: signals are the main thread's
            before = {}
        try:
            yield
        finally:
            for number, handler in before.items():
                loop.remove_signal_handler(number)
                signal.signal(number, handler)  # the loop would leave the system's own

    # --- one of them

    async def _one(self, request: Request) -> None:
        failures = limited = 0
        while await self._may_leave(request):
            reading, status, wait = await self._attempt(request)
            if request.key in self.ledger.pending:  # what became of it could not be found out now
                break
            if reading.outcome != "failed":
                if settled(reading.outcome, self.ledger.replies(request.key)):
                    break
                failures = 0
                continue
            limited, failures = (limited + 1, failures) if status == 429 else (limited, failures + 1)
            final = status is not None and 400 <= status < 500 and status not in (408, 409, 425, 429)
            if final or failures >= FAILURES or limited >= RATE_LIMITED:
                if status == NEVER_LEFT:
                    self._end(Failure(f"the server cannot be reached ({reading.reason}); the same command goes on"))
                break
            # full jitter, after what the server asks for: those that it turned away together do not come back together
            await self._sleep(wait + random.uniform(0, min(BACKOFF * 2 ** (failures + limited - 1), LONGEST)))
        else:
            return
        self.summary.outcomes[reading.outcome] += 1
        self.tell(self.summary, self.budget)

    async def _may_leave(self, request: Request) -> bool:
        """Wait for the server's pace and the budget; True once the request's worst case is set aside, False where nothing more may be sent."""
        async with self._queue:
            tokens = _tokens(request.body)
            while not self._stop.is_set() and (wait := self.pace.wait(tokens)):
                await self._sleep(wait)
            usd = self.budget.worst_case(request)
            while not self._stop.is_set() and not self.budget.reserve(request.key, usd):
                if not self._under_way:
                    self.stop("budget")
                    break
                self._landed.clear()
                await self._landed.wait()
            if self._stop.is_set():
                return False
            self._under_way += 1
            self.pace.left(tokens)
            return True

    async def _attempt(self, request: Request) -> tuple[Reading, int | None, float]:
        """Send a request that may leave; its reading, the HTTP status and the seconds that the server asks to wait."""
        import httpx
        import openai

        key, attempt, usd = request.key, self.ledger.attempts(request.key) + 1, self.budget.worst_case(request)
        headers: Mapping[str, str] = {}
        try:
            self.ledger.sent(key, attempt, VIA, usd)
            await self.ledger.durable()
            try:
                response = await next(self.clients).post("/chat/completions", cast_to=httpx.Response, body=self._sent_body(request, attempt))
                headers = response.headers
                reply = _completion(response.content)
                if reply is None:
                    reading = await self._settle_unknown(key, attempt, usd, self.settings.settle_seconds, "the reply came in pieces only", response.status_code)
                else:
                    reading = await self._note(key, attempt, reply, self.budget.cost(reply, usd), response.status_code, headers.get("x-request-id"))
                return reading, response.status_code, 0.0
            except openai.APIStatusError as error:
                headers = error.response.headers
                if error.status_code in GATEWAY:
                    reading = await self._settle_unknown(key, attempt, usd, self.settings.settle_seconds, error.message, error.status_code)
                else:
                    reading = await self._note_refusal(key, attempt, error)
                return reading, error.status_code, retry_after(headers)
            except openai.APIConnectionError as error:
                why = f"{type(error.__cause__).__name__}: {error.__cause__}" if error.__cause__ else str(error)
                if isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout):  # it has never left
                    return await self._note_error(key, attempt, 0.0, None, {"type": "connection_error", "message": why}), NEVER_LEFT, 0.0
                return await self._settle_unknown(key, attempt, usd, self.settings.settle_seconds, why), None, 0.0
        finally:
            self._under_way -= 1
            self._landed.set()
            self.pace.back(_tokens(request.body), headers)

    def _sent_body(self, request: Request, attempt: int) -> dict[str, Any]:
        return dict(request.body) | ({"store": True, "metadata": {KEY: request.key, ATTEMPT: str(attempt)}} if self.settings.store else {})

    async def _note(self, key: str, attempt: int, reply: Mapping[str, Any], usd: float | None, status: int | None, request_id: str | None) -> Reading:
        reading = self.parse(reply)
        final = settled(reading.outcome, self.ledger.replies(key) + 1)
        self.ledger.answered(key, attempt, VIA, usd=usd, reply=reply, final=final, status=status, request_id=request_id)
        await self.ledger.durable()
        self.budget.settle(key, usd)
        return reading

    async def _note_refusal(self, key: str, attempt: int, error: Any) -> Reading:
        """An answer in words of HTTP, which is not billed; some concern all requests to come."""
        message = error.body.get("message") if isinstance(error.body, dict) else None
        told = {"code": error.code, "type": error.type, "message": one_line(message or error.message)}
        status, words = error.status_code, hide(told["message"], self.settings)
        if status in (401, 402) or error.code == "insufficient_quota" or (status in (403, 404) and not self.ledger.answers):
            self._end(UserError(f"the server refuses all requests (HTTP {status}): {words}"))
        elif status in (400, 422) and self.settings.store and re.search(r"\b(store|metadata)\b", f"{error.param} {error.message}") and not self.ledger.answers:
            self._end(UserError(f"the server does not keep replies (HTTP {status}: {words}); --no_store does without"))
        return await self._note_error(key, attempt, 0.0 if self.budget.price else None, status, told, error.request_id)

    async def _note_error(self, key: str, attempt: int, usd: float | None, status: int | None, error: Mapping[str, Any], request_id: str | None = None) -> Reading:
        self.ledger.answered(key, attempt, VIA, usd=usd, error=error, status=status, request_id=request_id)
        await self.ledger.durable()
        self.budget.settle(key, usd)
        filtered = error.get("code") == "content_filter"
        return Reading("filtered" if filtered else "failed", reason=one_line(error["message"]))

    # --- what became of it

    async def _settle_unknown(self, key: str, attempt: int, usd: float | None, seconds: float, why: str, status: int | None = None) -> Reading:
        """Note what the server kept of an attempt, or that it is lost; nothing is noted, and the next start asks again, where that cannot be found out."""
        fate = await self._fate(key, attempt, seconds)
        if isinstance(fate, Mapping):
            self.summary.found += 1
            return await self._note(key, attempt, fate, self.budget.cost(fate, usd), None, None)
        if fate == "lost":
            self.summary.lost += 1
            return await self._note_error(key, attempt, usd, status, {"code": "lost", "type": "lost", "message": why})
        return Reading("failed", reason=why)

    async def _fate(self, key: str, attempt: int, seconds: float) -> Mapping[str, Any] | Literal["lost", "unknown"]:
        """What the server kept of an attempt, which may take it so many seconds to show."""
        import httpx
        import openai

        loop, failures, wait = asyncio.get_running_loop(), 0, 0.1
        until = loop.time() + seconds
        wanted = {KEY: key, ATTEMPT: str(attempt)}
        query = {"limit": 100} | {f"metadata[{name}]": value for name, value in wanted.items()}
        while self.keeps:
            last = loop.time() >= until
            try:
                response = await next(self.clients).get("/chat/completions", cast_to=httpx.Response, options={"params": query})
                found = json.loads(response.content)["data"]
                if reply := next((reply for reply in found if wanted.items() <= (reply.get("metadata") or {}).items()), None):
                    return dict(reply)
                if last:
                    return "lost"
            except (openai.APIConnectionError, openai.APIStatusError, ValueError, KeyError, TypeError, AttributeError) as error:
                if getattr(error, "status_code", None) in NO_STORE:
                    self.keeps = False
                    print("the server lists no stored replies: what got no reply is asked again, and stays counted at its worst case", file=sys.stderr)
                    break
                failures += 1
                if failures >= FAILURES:
                    return "unknown"
            if self._stop.is_set():
                return "unknown"
            await self._sleep(min(wait, max(until - loop.time(), 0.05)))
            wait = min(2 * wait, 5.0)
        return "lost"

    async def _sleep(self, seconds: float) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._stop.wait(), seconds)


def is_settled(ledger: Ledger, key: str, parse: Parse) -> bool:
    """Whether a request is never sent again."""
    return ledger.final(key) or (ledger.replies(key) > 0 and settled(cast(Reading, ledger.reading(key, parse)).outcome, ledger.replies(key)))


def _completion(content: bytes) -> dict[str, Any] | None:
    """A chat completion; None for anything else that came with HTTP 200: part of one, or a proxy's page."""
    try:
        reply = json.loads(content)
    except ValueError:
        return None
    return reply if isinstance(reply, dict) and isinstance(reply.get("choices"), list) else None


def _tokens(body: Mapping[str, Any]) -> float:
    """Tokens of a request as rate limits count them, about: a quarter of its characters, and what its answer may have."""
    return prompt_bound(body) / 4 + body.get("max_completion_tokens", body.get("max_tokens", 0))

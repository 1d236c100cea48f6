"""An OpenAI on 127.0.0.1: as much of its wire protocol as the official client speaks for chat completions, files and batches, with faults.

    python tests/fake_openai.py --port 0 --latency 0.05 --seed 1 --faults 0.2        prints its URL, ends after --seconds

What goes wrong is a function of (seed, question, how often it came before), and what is answered is a function of the question, so that a run
that is killed meets the same faults and gets the same answers as one that is not. It counts as a provider bills: a request that is being
answered is finished, billed and (with `store: true`) kept, whether or not its client is still there. `GET /_counts` tells what was billed.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from email.utils import formatdate
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from fake_openai_batches import Batches, Refused, page

TRANSPORT = ("retry_seconds", "retry_date", "server_error", "unavailable", "drop", "cut", "truncated", "stall", "late")
FINAL = ("refusal", "filter", "filter_400")
ODD = ("fraction", "nan", "empty", "range", "length")
KINDS = TRANSPORT + FINAL + ODD  # and "quota", which ends a run
BILLED_UNSEEN = ("cut", "truncated", "late")  # answered and billed, but the reply does not come through
KNOWN = {
    *("model", "messages", "store", "metadata", "response_format", "temperature", "top_p", "seed", "logprobs", "top_logprobs", "max_completion_tokens", "max_tokens"),
    *("n", "stop", "reasoning_effort", "service_tier", "user", "frequency_penalty", "presence_penalty", "verbosity", "prompt_cache_key", "safety_identifier"),
}


@dataclass
class Options:
    """Each is a flag of the command line as well."""

    port: int = 0
    seed: int = 0
    seconds: float = 600.0  # after these it ends by itself
    latency: float = 0.0
    jitter: float = 0.0  # share by which the latency varies
    faults: float = 0.0  # share of chat completions that go wrong, each in one of `kinds`
    kinds: str = ",".join(KINDS)
    retry_after: float = 1.0
    vanished: str = "bill"  # "cancel": a request whose client is gone is neither finished nor billed
    keeps: int = 1  # 0: it has no stored completions to list
    store_delay: float = 0.0  # seconds until a stored completion is listed
    rpm: float = 0.0  # requests and tokens a minute; 0: as many as come
    tpm: float = 0.0
    chars_per_token: float = 4.0  # bytes, in truth; 1 is the most tokens that a text can have
    wordy: int = 0  # 1: every answer costs max_completion_tokens
    prices: str = "0.15 0.075 0.6"  # USD per million tokens: input, cached, output
    unsupported: str = ""  # parameters that the model refuses
    noise: float = 0.0  # how far the answers to equal questions differ
    text: str = '{{"instruction_difficulty": {0}, "response_difficulty": {1}}}'  # the answer where no schema is given
    batch_faults: float = 0.0  # share of requests to files and batches that go wrong
    batch_latency: float = 0.0  # of each of these, half of it after the deed
    create_latency: float = 0.0  # of the creation of a batch, on top
    batch_seconds: float = 0.2
    fates: str = ""  # of the batches in the order of their creation, as "expired:0.5,completed"; later ones complete
    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    enqueued: int = 0  # tokens that may wait in batches; 0: as many as come


def digest(*parts: object) -> bytes:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).digest()


def share(*parts: object) -> float:
    """A number in [0, 1) that is a function of its parts."""
    return int.from_bytes(digest(*parts)[:7], "big") / 2**56


def canonical(body: dict[str, Any]) -> str:
    return json.dumps({name: value for name, value in body.items() if name not in ("store", "metadata")}, sort_keys=True)


@dataclass
class Question:
    """What one question (a body, and a key where the client gives one) led to."""

    arrivals: int = 0
    finals: int = 0  # answers after which nothing is left to ask
    odd: int = 0
    not_before: float = 0.0  # when its Retry-After ends


class FakeOpenAI:
    """What a server holds and was asked. Read from another thread, its numbers are right as soon as nothing is under way."""

    def __init__(self, **options: Any) -> None:
        self.options = Options(**options)
        self.transport = (*TRANSPORT, "quota")
        self.url, self.loop = "", asyncio.new_event_loop()
        self.questions: defaultdict[str, Question] = defaultdict(Question)
        self.bodies: Counter[str] = Counter()  # final answers by body alone
        self.kinds: Counter[str] = Counter()
        self.tokens: Counter[tuple[str, str]] = Counter()  # by (live or batch, input | cached | output)
        self.billed = self.rebilled = self.too_early = self.at_once = self.most_at_once = 0
        self.stored: dict[str, tuple[float, dict[str, Any]]] = {}
        self.by_metadata: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
        self.level = {"requests": self.options.rpm, "tokens": self.options.tpm}
        self.refilled = time.monotonic()
        self.batches = Batches(self)
        self.numbers = 0

    def number(self) -> str:
        self.numbers += 1
        return f"{self.options.seed:x}{self.numbers:08x}"

    @property
    def usd(self) -> float:
        price = dict(zip(("input", "cached", "output"), map(float, self.options.prices.split()), strict=True))
        return sum(n * price[kind] * (0.5 if how == "batch" else 1) for (how, kind), n in self.tokens.items()) / 1e6

    def counts(self) -> dict[str, Any]:
        return {
            "questions": len(self.questions),
            "arrivals": sum(question.arrivals for question in self.questions.values()),
            "billed": self.billed,  # replies, of every kind
            "rebilled": self.rebilled,  # replies to questions that had a final answer, or a third odd one
            "rebilled_bodies": sum(n - 1 for n in self.bodies.values()),  # the same, blind to keys: repeated questions are among them
            "answered": sum(question.finals > 0 for question in self.questions.values()),
            "usd": self.usd,
            "tokens": {f"{how} {kind}": n for (how, kind), n in sorted(self.tokens.items())},
            "kinds": dict(sorted(self.kinds.items())),
            "too_early": self.too_early,
            "most_at_once": self.most_at_once,
        } | self.batches.counts()

    # --- one question

    def question(self, body: dict[str, Any], key: str) -> tuple[str, Question]:
        name = digest(canonical(body)).hex() + key
        return name, self.questions[name]

    def fault(self, name: str, question: Question) -> str:
        """What this arrival of a question meets: "" or one of the kinds."""
        arrival, kinds = question.arrivals, self.options.kinds.split(",")
        question.arrivals += 1
        drawn = share(self.options.seed, name, arrival)
        kind = kinds[int(drawn / self.options.faults * len(kinds))] if drawn < self.options.faults else ""
        self.kinds[kind or "ok"] += 1
        return kind

    def check(self, body: Any) -> None:
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise Refused(400, "you must provide a model parameter")
        for name in set(body) - KNOWN:
            raise Refused(400, f"Unknown parameter: '{name}'.", "unknown_parameter", name)
        for name in filter(None, self.options.unsupported.split(",")):
            if name in body:
                raise Refused(400, f"Unsupported parameter: '{name}' is not supported with this model.", "unsupported_parameter", name)
        messages = body.get("messages")
        if not messages or not all(isinstance(message, dict) and {"role", "content"} <= set(message) and isinstance(message["content"], str) for message in messages):
            raise Refused(400, "Missing required parameter: 'messages'.", "missing_required_parameter", "messages")
        self.check_metadata(body.get("metadata"))
        if body.get("metadata") and not body.get("store"):
            raise Refused(400, "The 'metadata' parameter is only allowed when 'store' is enabled.", None, "metadata")
        if "top_logprobs" in body and not (body.get("logprobs") and 0 <= body["top_logprobs"] <= 20):
            raise Refused(400, "'top_logprobs' needs 'logprobs' and is at most 20.", "invalid_value", "top_logprobs")
        if (form := body.get("response_format") or {}).get("type") == "json_schema":
            schema = form["json_schema"]["schema"]
            closed = schema.get("additionalProperties") is False and sorted(schema.get("required", [])) == sorted(schema["properties"])
            if form["json_schema"].get("strict") and not closed:
                raise Refused(400, f"Invalid schema for response_format '{form['json_schema']['name']}'", "invalid_json_schema", "response_format")

    @staticmethod
    def check_metadata(metadata: Any) -> None:
        for name, value in (metadata or {}).items():
            if not isinstance(value, str) or len(value) > 512 or len(name) > 64 or len(metadata) > 16:
                raise Refused(400, f"Invalid 'metadata.{name}': at most 16 strings of at most 512 characters.", "invalid_type", f"metadata.{name}")

    def write(self, body: dict[str, Any], key: str, kind: str) -> tuple[str | None, str | None, str]:
        """Content, refusal and finish reason."""
        if kind == "refusal":
            return None, "I'm sorry, but I can't assist with that.", "stop"
        if kind in ("fraction", "nan", "empty", "filter"):
            return {"fraction": "4/5", "nan": "NaN", "empty": "", "filter": ""}[kind], None, "content_filter" if kind == "filter" else "stop"
        text = json.dumps(body["messages"], sort_keys=True)

        def draw(part: object) -> float:
            shaken = share(text, part) * 4 + 1 + self.options.noise * (2 * share(text, part, key) - 1)
            return 7.5 if kind == "range" else round(min(5.0, max(1.0, shaken)), 1)

        form = body.get("response_format") or {}
        if form.get("type") == "json_schema":
            made: dict[str, Any] = {}
            for name, property in form["json_schema"]["schema"]["properties"].items():
                if choices := property.get("enum"):
                    made[name] = choices[int(share(text, name) * len(choices))]
                else:
                    made[name] = {"number": draw, "integer": lambda part: round(draw(part))}.get(property.get("type"), lambda _: "So it is.")(name)
            content = json.dumps(made)
        else:
            content = self.options.text.format(draw("instruction_difficulty"), draw("response_difficulty"))
        return (content[: len(content) // 2], None, "length") if kind == "length" else (content, None, "stop")

    def prompt_tokens(self, body: dict[str, Any]) -> int:
        size = sum(len(message["content"].encode()) for message in body["messages"]) + len(json.dumps(body.get("response_format", "")))
        return int(size / self.options.chars_per_token) + 4 * len(body["messages"]) + 3

    def answer(self, body: dict[str, Any], name: str, question: Question, key: str, kind: str, how: str) -> dict[str, Any]:
        """The completion of a question: it is billed from here on, and kept if that was asked for."""
        content, refusal, finish = self.write(body, key, kind)
        pieces = re.findall(r"\d|\W|[^\W\d]+", content or refusal or "")
        spent = {"input": self.prompt_tokens(body), "cached": 0, "output": len(pieces)}
        if self.options.wordy:
            spent["output"] = body.get("max_completion_tokens", body.get("max_tokens", len(pieces)))
        for part, n in spent.items():
            self.tokens[how, part] += n
        self.billed += 1
        self.rebilled += question.finals > 0 or question.odd > 1
        if kind in ODD:
            question.odd += 1
        else:
            question.finals += 1
            self.bodies[name[:64]] += 1
        usage = {"prompt_tokens": spent["input"], "completion_tokens": spent["output"], "total_tokens": spent["input"] + spent["output"]}
        usage |= {"prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0}, "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0}}
        choice = {"index": 0, "message": {"role": "assistant", "content": content, "refusal": refusal, "annotations": []}, "finish_reason": finish, "logprobs": None}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [logprob(piece, body.get("top_logprobs", 0)) for piece in pieces], "refusal": None}
        reply = {"id": f"chatcmpl-{self.number()}", "object": "chat.completion", "created": int(time.time()), "model": f"{body['model']}-2026-01-01", "choices": [choice]}
        reply |= {"usage": usage, "service_tier": "default", "system_fingerprint": f"fp_{digest(body['model']).hex()[:10]}"}
        if body.get("store") and self.options.keeps and how == "live":
            metadata = body.get("metadata") or {}
            self.stored[reply["id"]] = time.monotonic(), reply | {"metadata": metadata}
            for pair in metadata.items():
                self.by_metadata[pair].append(reply["id"])
        return reply

    # --- the API

    def room(self, tokens: int) -> dict[str, str]:
        """Headers of the rate limit, after these tokens.

        Raises:
            Refused: they would exceed it.
        """
        limits, now = {"requests": self.options.rpm, "tokens": self.options.tpm}, time.monotonic()
        for name, limit in limits.items():
            self.level[name] = min(limit, self.level[name] + (now - self.refilled) * limit / 60)
        self.refilled = now
        wants = {"requests": 1, "tokens": tokens}
        short = {name: (wants[name] - self.level[name]) * 60 / limit for name, limit in limits.items() if limit and self.level[name] < wants[name]}
        if short:
            wait = max(short.values())
            self.kinds["limited"] += 1
            told = {"retry_after_ms": f"{1000 * wait:.0f}", "retry_after": f"{wait:.0f}"}
            raise Refused(429, f"Rate limit reached on {max(short)}. Please try again in {wait:.3f}s.", "rate_limit_exceeded", kind=max(short), **told)
        headers = {}
        for name, limit in limits.items():
            self.level[name] -= wants[name] if limit else 0
            left, full = (self.level[name], limit) if limit else (1e9, 1e9)
            reset = (full - left) * 60 / full
            told = f"{1000 * reset:.0f}ms" if reset < 1 else f"{reset // 60:.0f}m{reset % 60:.3f}s"
            headers |= {f"x-ratelimit-limit-{name}": f"{full:.0f}", f"x-ratelimit-remaining-{name}": f"{left:.0f}", f"x-ratelimit-reset-{name}": told}
        return headers

    def chat(self, call: Call) -> None:
        body = json.loads(call.body)
        self.check(body)
        key = str((body.get("metadata") or {}).get("phased_ift_key", ""))
        name, question = self.question(body, key)
        self.too_early += time.monotonic() < question.not_before
        limits = self.room(self.prompt_tokens(body))
        kind, options = self.fault(name, question), self.options
        if kind in ("retry_seconds", "retry_date"):
            question.not_before = time.monotonic() + options.retry_after - (1 if kind == "retry_date" else 0)  # dates have no fractions
            when = f"{options.retry_after:g}" if kind == "retry_seconds" else formatdate(time.time() + options.retry_after, usegmt=True)
            raise Refused(429, f"Rate limit reached for {body['model']}. Please try again later.", "rate_limit_exceeded", kind="requests", retry_after=when)
        if kind == "quota":
            raise Refused(429, "You exceeded your current quota, please check your plan and billing details.", "insufficient_quota", kind="insufficient_quota")
        if kind == "server_error":
            raise Refused(500, "The server had an error while processing your request. Sorry about that!", kind="server_error")
        if kind == "unavailable":
            raise Refused(503, "The engine is currently overloaded, please try again later.", kind="server_error")
        if kind == "filter_400":
            question.finals += 1
            raise Refused(400, "The prompt triggered the content management policy.", "content_filter", "prompt", None)
        if kind == "drop":
            return call.connection.close()
        if kind == "stall" or (kind == "late" and options.vanished == "cancel"):
            return None  # until its client goes
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        wait = options.latency * (1 + options.jitter * (2 * share(name, question.arrivals, "wait") - 1))
        self.loop.call_later(wait, self.finish, call, body, name, question, key, kind, limits)
        return None

    def finish(self, call: Call, body: dict[str, Any], name: str, question: Question, key: str, kind: str, limits: dict[str, str]) -> None:
        self.at_once -= 1
        if self.options.vanished == "cancel" and call.connection.gone:
            return
        reply = self.answer(body, name, question, key, kind, "live")
        if kind != "late":
            call.reply(200, reply, limits, cut=kind if kind in BILLED_UNSEEN else "")

    def kept(self, call: Call) -> None:
        if not self.options.keeps:
            raise Refused(404, "Invalid URL (GET /v1/chat/completions)")
        wanted = [(found[1], value) for name, value in call.query.items() if (found := re.fullmatch(r"metadata\[(.+)\]", name))]
        names = min((self.by_metadata.get(pair, []) for pair in wanted), key=len, default=list(self.stored))
        until = time.monotonic() - self.options.store_delay
        replies = [reply for name in names for at, reply in [self.stored[name]] if at <= until and all(reply["metadata"].get(key) == value for key, value in wanted)]
        replies = [reply for reply in replies if call.query.get("model", reply["model"]) == reply["model"]]
        call.reply(200, page(replies[::-1] if call.query.get("order") == "desc" else replies, call.query))

    def route(self, call: Call) -> None:
        where = call.method, call.path
        if where == ("GET", "/_counts"):
            return call.reply(200, self.counts())
        given = call.headers.get("authorization", "").removeprefix("Bearer ")
        if not given.startswith("sk-") or "wrong" in given:  # a server that tells the key again, which its client must not
            raise Refused(401, f"Incorrect API key provided: {given}.", "invalid_api_key")
        if where == ("POST", "/v1/chat/completions"):
            return self.chat(call)
        if where == ("GET", "/v1/chat/completions"):
            return self.kept(call)
        if call.path.startswith("/v1/chat/completions/") and call.method == "GET" and (found := self.stored.get(call.path.rsplit("/", 1)[1])):
            return call.reply(200, found[1])
        if call.path.startswith(("/v1/files", "/v1/batches")):
            return self.batches.route(call)
        raise Refused(404, f"Invalid URL ({call.method} {call.path})")


def logprob(piece: str, top: int) -> dict[str, Any]:
    """A token with its log-probability; a digit from 1 to 5 shares the rest with its neighbours."""
    likely = {piece: -0.3} | ({str(n): -1.5 - abs(n - int(piece)) for n in range(1, 6) if str(n) != piece} if piece in "12345" else {"?": -1.5})
    told = [{"token": token, "logprob": chance, "bytes": list(token.encode())} for token, chance in likely.items()]
    return told[0] | {"top_logprobs": sorted(told, key=lambda choice: -choice["logprob"])[:top]}


@dataclass
class Call:
    """One request, and where its reply goes."""

    connection: Connection
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None, cut: str = "") -> None:
        self.connection.reply(status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers or {}, cut)


class Connection(asyncio.Protocol):
    """HTTP/1.1 with keep-alive, one request at a time."""

    def __init__(self, server: FakeOpenAI) -> None:
        self.server, self.buffer, self.busy, self.gone, self.head = server, bytearray(), False, False, None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    def connection_lost(self, _: Exception | None) -> None:
        self.gone = True

    def close(self) -> None:
        self.transport.close()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        self.next()

    def next(self) -> None:
        if self.busy:
            return
        if self.head is None:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
            self.head = first.split(" ")[:2], {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            del self.buffer[: end + 4]
        (method, target), headers = self.head
        body = self.chunks() if headers.get("transfer-encoding") == "chunked" else self.take(int(headers.get("content-length", 0)))
        if body is None:
            return
        self.head, self.busy = None, True
        address = urlsplit(target)
        call = Call(self, method, address.path, dict(parse_qsl(address.query)), headers, body)
        try:
            self.server.route(call)
        except Refused as refused:
            call.reply(refused.status, refused.body, refused.headers)

    def take(self, size: int) -> bytes | None:
        if len(self.buffer) < size:
            return None
        body = bytes(self.buffer[:size])
        del self.buffer[:size]
        return body

    def chunks(self) -> bytes | None:
        at, parts = 0, []
        while (end := self.buffer.find(b"\r\n", at)) >= 0:
            size = int(self.buffer[at:end], 16)
            if len(self.buffer) < end + size + 4:
                return None
            parts.append(bytes(self.buffer[end + 2 : end + 2 + size]))
            at = end + size + 4
            if not size:
                del self.buffer[:at]
                return b"".join(parts)
        return None

    def reply(self, status: int, content: bytes, headers: dict[str, str], cut: str = "") -> None:
        if self.gone:
            return
        if cut == "truncated":  # whole, as far as HTTP can tell
            content = content[: len(content) * 2 // 3]
        head = {"content-type": "application/json", "content-length": str(len(content)), "x-request-id": f"req_{self.server.number()}", "openai-processing-ms": "1"} | headers
        sent = f"HTTP/1.1 {status} \r\n".encode() + "".join(f"{name}: {value}\r\n" for name, value in head.items()).encode() + b"\r\n" + content
        self.transport.write(sent[: len(sent) - len(content) // 2] if cut == "cut" else sent)
        if cut == "cut":
            self.close()
        else:
            self.busy = False
            self.next()


@contextmanager
def serving(**options: Any) -> Iterator[FakeOpenAI]:
    """A server in a thread of this process; `url` is what a client has as its base_url."""
    server = FakeOpenAI(**options)
    ready = threading.Event()
    thread = threading.Thread(target=run, args=(server, ready.set), daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.loop.stop)
        thread.join(10)


@dataclass(frozen=True)
class Remote:
    url: str

    def counts(self) -> dict[str, Any]:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(self.url.removesuffix("/v1") + "/_counts", timeout=60) as reply:
            return json.load(reply)


@contextmanager
def process(**options: Any) -> Iterator[Remote]:
    """A server in a process of its own, which a client that is measured or killed does not share."""
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    server = subprocess.Popen([sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"})
    try:
        assert server.stdout
        yield Remote(server.stdout.readline().strip())
    finally:
        server.kill()
        server.wait()


def run(server: FakeOpenAI, ready: Callable[[], object]) -> None:
    asyncio.set_event_loop(server.loop)
    listening = server.loop.run_until_complete(server.loop.create_server(lambda: Connection(server), "127.0.0.1", server.options.port, backlog=1024))
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1"
    ready()
    server.loop.call_later(server.options.seconds, server.loop.stop)
    server.loop.run_forever()
    listening.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    for option in fields(Options):
        parser.add_argument(f"--{option.name}", type=type(option.default), default=option.default)
    server = FakeOpenAI(**vars(parser.parse_args()))
    run(server, lambda: print(server.url, flush=True))


if __name__ == "__main__":
    main()

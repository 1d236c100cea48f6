"""What is asked and what an answer is worth: the types that live mode, batch mode and the ledger share. Nothing here knows what the question is."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, Literal

from phased_ift_jax.records import UserError

Outcome = Literal["ok", "refused", "filtered", "unparseable", "out_of_range", "failed"]
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))
LONG = 2000
KEY, ATTEMPT = "phased_ift_key", "phased_ift_attempt"  # metadata of a request, by which the server is asked what became of it
REPLIES = {"unparseable": 2, "out_of_range": 2}  # so many replies are paid for at most, in all starts together; of any other outcome one
CUT = "cut at its limit of tokens"  # how the reason of such a reply begins
FAILURES = 8  # so many attempts without a reply, in one start, and a request has failed; another start tries again


@lru_cache(maxsize=16)
def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@dataclass(frozen=True)
class Request:
    """One question: what `chat/completions` is given, as JSON, and the how-manyth asking of it (0; 1, 2, .. are repeats that measure agreement)."""

    body: Mapping[str, Any]
    sample: int = 0

    @cached_property
    def key(self) -> str:
        """SHA-256 (hex) of what is asked and of nothing else: order, ids and restarts change nothing, and equal questions share an answer.

        Of the canonical JSON of `[body, sample]`, in which a message's text of more than `LONG` characters stands as `{"sha256": ...}`: the
        same long prompt comes with every question, and a million of them are to be recognized in a minute.
        """
        messages = [
            {**message, "content": {"sha256": _digest(text)}} if isinstance(text := message.get("content"), str) and len(text) > LONG else message
            for message in self.body["messages"]
        ]
        return hashlib.sha256(CANONICAL.encode([{**self.body, "messages": messages}, self.sample]).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Reading:
    """What a parser makes of a reply: a value with `ok`, a reason of one line with anything else."""

    outcome: Outcome
    value: Any = None
    reason: str = ""


Parse = Callable[[Mapping[str, Any]], Reading]  # of a raw chat completion; never raises


def read_reply(reply: Mapping[str, Any], parse_text: Callable[[str], Reading]) -> Reading:
    """The part of every `Parse` that does not depend on the question; `parse_text` is given the text of a whole answer. Never raises."""
    try:
        choice = reply["choices"][0]
        message, end = choice["message"], choice.get("finish_reason")
        if end == "content_filter":
            return Reading("filtered", reason="stopped by the content filter")
        if message.get("refusal"):
            return Reading("refused", reason=one_line(message["refusal"]))
        text = message.get("content")
        if not isinstance(text, str) or not text.strip():
            return Reading("unparseable", reason=f"{CUT}, before the answer" if end == "length" else "empty")
        if end == "length":
            return Reading("unparseable", reason=f"{CUT}: {one_line(text)}")
        return parse_text(text)
    except Exception as error:  # a reply is whatever a server sent
        return Reading("unparseable", reason=f"no chat completion: {type(error).__name__}: {one_line(error)}")


def settled(outcome: str, replies: int) -> bool:
    """Whether a request with so many replies, the best of which reads so, is never sent again."""
    return replies >= REPLIES.get(outcome, 1)


def one_line(value: object) -> str:
    return " ".join(str(value).split())[:200]


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server is spoken to.

    Raises:
        UserError: an address or a time that no request can be made with.
    """

    api_key: str = field(repr=False)
    base_url: str | None = None
    concurrency: int = 32
    timeout_seconds: float = 300.0
    settle_seconds: float = 30.0  # so long after it was sent, an attempt without a reply may still come up among the server's stored ones
    store: bool = True  # have the server keep its replies, so that one that got lost on the way is not paid for twice

    def __post_init__(self) -> None:
        if self.base_url is not None and not re.fullmatch(r"https?://[^/\s?#]+[^\s?#]*", self.base_url):
            raise UserError(f"--base_url: '{self.place}' is no address of a server; one is http://127.0.0.1:8000/v1")
        if not (0 < self.timeout_seconds < math.inf and 0 <= self.settle_seconds < math.inf):
            raise UserError(f"--timeout_seconds and --settle_seconds: {self.timeout_seconds} and {self.settle_seconds} are no times to wait; give seconds")

    @property
    def place(self) -> str | None:
        """The address without what it may hold of a password or key."""
        return self.base_url and re.sub(r"(?<=//)[^/@]*@|[?#].*", "", self.base_url)

    def client_options(self) -> dict[str, Any]:
        """Arguments of `openai.OpenAI` and `openai.AsyncOpenAI`: what is repeated, and when, is ours to say."""
        return {"api_key": self.api_key, "base_url": self.base_url, "timeout": self.timeout_seconds, "max_retries": 0}


@dataclass(slots=True)
class Summary:
    """What became of one call. `stopped` says why it ended before everything was asked; what was answered until then is in the ledger."""

    outcomes: Counter[str] = field(default_factory=Counter)  # of the requests that ended in this call
    lost: int = 0  # attempts of which nobody knows what became of them: asked again, and counted at their worst case
    found: int = 0  # attempts without a reply of which the server had kept one
    stopped: str | None = None

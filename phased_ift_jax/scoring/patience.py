"""A server that is out of reach for a while, and what a refusal of its means."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from typing import TypeVar

from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.scoring.live import GATEWAY, hide
from phased_ift_jax.scoring.pace import retry_after
from phased_ift_jax.scoring.request import Settings, one_line

PASSING = (408, 409, 425, 429)  # refusals that need not be the last word, as those of 500 and more
LONGEST = 3600.0  # seconds for which a server may be out of reach
T = TypeVar("T")


class Gone(Exception):
    """The server no longer has what it was asked for."""


class Patience:
    """Of one who asks a server for what costs nothing, again and again until it comes."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    def told(self, words: object) -> str:
        return one_line(hide(str(words), self.settings))

    def until_done(self, act: Callable[[], T]) -> T:
        """What an act returns, once it succeeds.

        Raises:
            UserError, Failure: see `pause`.
        """
        import httpx
        import openai

        began = time.monotonic()
        while True:
            try:
                return act()
            except (openai.APIError, httpx.HTTPError, json.JSONDecodeError) as error:
                self.pause(error, began)

    def there(self, act: Callable[[], T]) -> T:
        """The same of an act on something that the server has had.

        Raises:
            Gone: it says that it has no such thing, and again when that can no longer be because it is new.
            UserError, Failure: see `pause`.
        """
        import openai

        def tried() -> tuple[T] | None:
            try:
                return (act(),)
            except openai.NotFoundError:
                return None

        until = time.monotonic() + self.settings.settle_seconds
        while True:
            late = time.monotonic() >= until
            if found := self.until_done(tried):
                return found[0]
            if late:
                raise Gone
            time.sleep(self.settings.settle_seconds / 10)

    def pause(self, error: Exception, began: float) -> None:
        """Wait before what failed is tried again.

        Raises:
            UserError, Failure: it would fail again, or has for long enough.
        """
        server, told = self.settings.place or "the server", self.told(getattr(error, "message", error))
        waited = time.monotonic() - began
        if lasting(error):
            raise UserError(f"{server} refuses (HTTP {getattr(error, 'status_code', None)}): {told}") from None
        if waited > LONGEST:
            raise Failure(f"{server} is out of reach: {told}; everything is saved, and the same command goes on") from None
        time.sleep(retry_after(getattr(getattr(error, "response", None), "headers", {})) + random.uniform(0, min(60.0, 0.1 + waited)))


def lasting(error: Exception) -> bool:
    """Whether a server would say the same again."""
    status = getattr(error, "status_code", None)
    return status is not None and status < 500 and (status not in PASSING or getattr(error, "code", None) == "insufficient_quota")


def unheard(error: Exception) -> bool:
    """Whether the server may have done what it was asked, or may yet do it, though we were not told."""
    import httpx

    if status := getattr(error, "status_code", None):
        return status in GATEWAY
    return not isinstance(error.__cause__, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)

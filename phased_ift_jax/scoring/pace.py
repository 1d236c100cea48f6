"""How fast a server may be asked: what it says of its limits, as buckets that fill up again."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime

UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class Bucket:
    """Something of which there is `limit`, and which comes back at `rate` a second; without a word of the server, endless."""

    def __init__(self) -> None:
        self.limit = self.level = self.rate = math.inf
        self.taken = 0.0  # by requests under way
        self._at = time.monotonic()

    def wait(self, amount: float) -> float:
        """Seconds until there is so much; of an amount that never is there at once, until the bucket is full."""
        missing = min(amount, self.limit) - self._now()
        return missing / self.rate if missing > 0 else 0.0

    def take(self, amount: float) -> None:
        self.level = self._now() - amount
        self.taken += amount

    def heard(self, limit: float, remaining: float, reset: float | None) -> None:
        """What a reply says: `remaining` of `limit` is left, and all of it is there again after `reset` seconds.

        What is under way may have come after those words, so that it is counted, perhaps a second time.
        """
        self.limit, self.level, self._at = limit, min(remaining - self.taken, limit), time.monotonic()
        self.rate = max((limit - remaining) / reset if reset and remaining < limit else limit / 60, 1e-3)

    def _now(self) -> float:
        now = time.monotonic()
        if self.level < self.limit:
            self.level = min(self.limit, self.level + (now - self._at) * self.rate)
        self._at = now
        return self.level


class Pace:
    """Requests and tokens, as in the headers x-ratelimit-{limit,remaining,reset}-{requests,tokens}."""

    def __init__(self) -> None:
        self._buckets = {"requests": Bucket(), "tokens": Bucket()}

    def wait(self, tokens: float) -> float:
        """Seconds until a request of so many tokens may leave."""
        return max(bucket.wait(amount) for bucket, amount in zip(self._buckets.values(), (1, tokens), strict=True))

    def left(self, tokens: float) -> None:
        for bucket, amount in zip(self._buckets.values(), (1, tokens), strict=True):
            bucket.take(amount)

    def back(self, tokens: float, headers: Mapping[str, str] | None) -> None:
        """A request is no longer under way; `headers` are those of its reply, if there was one."""
        for (name, bucket), amount in zip(self._buckets.items(), (1, tokens), strict=True):
            bucket.taken -= amount
            if headers:
                limit, remaining = (_number(headers.get(f"x-ratelimit-{what}-{name}")) for what in ("limit", "remaining"))
                if limit and remaining is not None:
                    bucket.heard(limit, remaining, seconds(headers.get(f"x-ratelimit-reset-{name}")))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait: in milliseconds, in seconds or until a date; 0 where it does not."""
    if (milliseconds := _number(headers.get("retry-after-ms"))) is not None:
        return milliseconds / 1000
    told = headers.get("retry-after", "")
    if (number := _number(told)) is not None:
        return number
    try:
        return max(parsedate_to_datetime(told).timestamp() - time.time(), 0.0)
    except (ValueError, TypeError):
        return 0.0


def seconds(told: str | None) -> float | None:
    """`6m0s`, `20ms`, `1.5` as seconds; None for anything else."""
    if (number := _number(told)) is not None:
        return number
    parts = re.findall(r"([\d.]+)(ms|s|m|h|d)", told or "")
    return sum(float(number) * UNITS[unit] for number, unit in parts) if parts and "".join(map("".join, parts)) == told else None


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if 0 <= number < math.inf else None

"""What comes from outside while a run is at work: requests to stop, and silence."""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """SIGINT and SIGTERM, noted in a list for the loop to see between two steps; a second one changes nothing."""
    seen: list[int] = []

    def note(received: int, _: Any) -> None:
        if not seen:
            os.write(2, b"\nstopping once everything is saved\n")
        seen.append(received)

    try:
        old = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: a caller that embeds us keeps its own handlers
        old = {}
    try:
        yield seen
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


@contextmanager
def watchdog(minutes: float | None) -> Iterator[Callable[[], None]]:
    """A function to call at every step; when it has not been called for so long, the stacks of all threads go to standard error."""

    def alive() -> None:
        if minutes is not None:
            faulthandler.dump_traceback_later(60 * minutes, repeat=True, file=2)

    alive()
    try:
        yield alive
    finally:
        if minutes is not None:
            faulthandler.cancel_dump_traceback_later()

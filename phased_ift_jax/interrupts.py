"""What comes from outside while a run is at work: requests to stop, and silence (floor 0; imports nothing heavy, so that it stands first).

A run is asked to stop by SIGTERM, by SIGINT, or by a notice of Google's metadata server that the machine will be taken away. Where a kill
would lose nothing it ends at once, else after the steps under way and a save. A thread sees to it: the main one may be in a compilation or
an import, where no Python handler runs.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, cast

STOPPED = 75  # exit code: stopped on request with everything saved
REQUESTS = (signal.SIGINT, signal.SIGTERM)
NOTICE_SECONDS = 5.0  # between two looks for a notice; a spot machine has 30 s from it
NOTICES = {"preempted": "TRUE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}


class Stopped(Exception):
    """The run was asked to stop, and has saved everything; the same command goes on."""


class Stop:
    """Whether the run is to stop, and what is to be done then. The first request counts; others change nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = self._unsaved = False
        self.since = time.time()  # the run's start, before anything heavy is imported
        self.farewell = "stopped with everything saved; the same command goes on"
        self.tell: Callable[[str, bool], None] | None = None  # passes a request on to the other processes of the run, and whether this one leaves
        self.linger = 0.0  # seconds for them to hear of it, where they hear through this process

    def __bool__(self) -> bool:
        return self._asked

    def began(self) -> None:
        """A step is under way that no checkpoint holds: from now on a request waits until it is saved."""
        with self._lock:
            self._unsaved = True

    def saved(self) -> None:
        """Everything is in a checkpoint: from now on a request ends the process at once. Raises `Stopped` where one has come."""
        with self._lock:
            self._unsaved = False
            if self._asked:
                raise Stopped

    def ask(self, why: str, told: bool = False, left: bool = False) -> None:
        """Stop, now or once everything is saved.

        The other processes are told, unless it was `told` by one of them. Has that one `left`, it had trained nothing that is unsaved; so
        neither has this one, whose steps cannot end without it.
        """
        with self._lock:
            if self._asked and not left:
                return
            self._asked, leaves = True, left or not self._unsaved
            if self.tell and not told:
                self.tell(why, leaves)
            if leaves:
                self._leave()
            say(2, f"{why}: stopping once everything is saved")

    def _leave(self) -> NoReturn:
        time.sleep(self.linger)
        # not by an exception: what the main thread is in need not be left in order, since a kill may come at any moment as well
        say(1, self.farewell)
        os._exit(STOPPED)


def say(to: int, words: str) -> None:
    """Write a line past everything that buffers; where nobody listens any more, saying nothing is all right."""
    with suppress(OSError):
        os.write(to, f"\n{words}\n".encode())


class _Unbroken:
    """A stream of which the reader may go: then it writes into nothing. Ctrl-C on `train ... | tee log` ends `tee` first."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())


@contextmanager
def unbroken() -> Iterator[None]:
    """Let what a run says never end it."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (cast(Any, _Unbroken(stream)) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def hold() -> None:
    """Let requests wait until somebody is listening, also in a program that takes this one's place."""
    signal.pthread_sigmask(signal.SIG_BLOCK, REQUESTS)


@contextmanager
def listening() -> Iterator[Stop]:
    """A `Stop` that hears signals and notices. In a thread other than the main one it hears notices only: signals are the main thread's."""
    stop = Stop()
    ended = threading.Event()
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def pass_on(number: int, _: Any) -> None:
        with suppress(BlockingIOError):  # full of requests
            os.write(writing, bytes([number]))

    def watch() -> None:
        while number := os.read(reading, 1)[0]:
            if number in REQUESTS:  # others come here, too, where the program has handlers for them
                stop.ask(signal.Signals(number).name)

    watching = threading.Thread(target=watch, name="stop", daemon=True)
    watching.start()
    if host := metadata_host():
        threading.Thread(target=_await_notice, args=(host, stop, ended), name="notices", daemon=True).start()
    try:
        # the handler in C writes to this at once, whatever the main thread is in; the handler in Python, where a library (uvloop) has
        # put its own file there for a while
        before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        old = {number: signal.signal(number, pass_on) for number in REQUESTS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
    except ValueError:
        before, old = None, {}
    try:
        yield stop
    finally:
        for number, handler in old.items():  # once asked to stop, a process is about to end, and another request must not end it otherwise
            signal.signal(number, signal.SIG_IGN if stop else handler)
        if before is not None:
            signal.set_wakeup_fd(before)
        ended.set()
        os.write(writing, b"\0")
        watching.join()
        os.close(reading)
        os.close(writing)


def metadata_host() -> str | None:
    """Who knows about this machine, and has notices of maintenance and preemption; None on one that is not Google's."""
    try:
        on_google = Path("/sys/class/dmi/id/product_name").read_text().startswith("Google")
    except OSError:
        on_google = False
    return os.environ.get("GCE_METADATA_HOST") or ("metadata.google.internal" if on_google else None)


def metadata(host: str, key: str) -> str | None:
    """What the metadata server says of this machine, past any proxy; None where it does not answer."""
    import http.client
    import urllib.request

    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"})
    try:
        with opener.open(request, timeout=5) as answer:
            return str(answer.read().decode(errors="replace").strip())
    except (OSError, http.client.HTTPException):
        return None


def _await_notice(host: str, stop: Stop, ended: threading.Event) -> None:
    standing: dict[str, bool] = {}  # a maintenance that is announced already at the first look may be an hour away
    while not (stop or ended.wait(NOTICE_SECONDS)):
        for key, taken_away in NOTICES.items():
            if (told := metadata(host, key)) is None:  # a look that fails says nothing; the next may not
                continue
            noticed = told == taken_away
            if noticed and not (key == "maintenance-event" and standing.get(key, True)):
                stop.ask(f"the machine will be taken away ({key})")
            standing[key] = standing.get(key, True) and noticed


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

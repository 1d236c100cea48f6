"""The lease that makes one process the only writer under an address of a bucket (floor 0)."""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading
import time
import uuid
from contextlib import suppress
from typing import Any

from phased_ift_jax.files import write_whole
from phased_ift_jax.object_store import Changed, Facts, Objects, StoreError, work_folder
from phased_ift_jax.records import Failure, UserError

LEASE = "lease.json"
LEASE_SECONDS = 120.0  # a lease that was not renewed for so long may be taken over by another run


class LeaseLost(Failure):
    """Another process has taken the run over."""


def whoami() -> str:
    """Who holds the lease of a run: what a launcher says (PHASED_IFT_RUN_ID, the same on every machine the run is moved to), else user and host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    if named := os.environ.get("PHASED_IFT_RUN_ID"):
        return named
    machine = work_folder() / "machine"  # names of hosts are no names: many are called localhost
    try:
        if not machine.exists():
            machine.parent.mkdir(parents=True, exist_ok=True)
            write_whole(machine, uuid.uuid4().hex[:8])
        return f"{user}@{socket.gethostname()}:{machine.read_text(encoding='utf-8')}"
    except OSError:
        return f"{user}@{socket.gethostname()}"


class Lease:
    """The right to write under an address: an object with an expiry, renewed by a thread, each time over the generation written before.

    Whoever writes it next makes the generation another, so that the process that held it cannot renew it any more: it is fenced. A
    renewal that comes late, but before anyone else has written, holds as well: nobody was there in between.
    """

    def __init__(self, objects: Objects, holder: str | None = None, seconds: float | None = None) -> None:
        self._objects, self.holder = objects, holder or whoami()
        self.seconds = seconds or LEASE_SECONDS
        self.token = uuid.uuid4().hex  # of this process: no two write equal content
        self._generation = 0
        self._renewals = 0
        self._lost: str | None = None
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew_on, name="lease", daemon=True)

    def acquire(self) -> Lease:
        """Take the lease, at once where nobody or the same holder has it, else only after its expiry.

        Raises:
            UserError: another holds it; the line says who, and until when.
            StoreError: the store cannot be reached.
        """
        watched = 0
        while True:
            there = self._objects.facts(LEASE)
            if there is not None and (reason := refusal(self._objects, there, self.holder)):
                raise UserError(reason)
            if there is not None and there.generation != watched and (said := _lease(self._objects, there)[0]) and said["holder"] != self.holder:
                # it looks expired, by a clock of ours that may be wrong: one that is renewed meanwhile is not
                watched = there.generation
                time.sleep(self.seconds / 3)
                continue
            self._generation = there.generation if there else 0
            try:
                self._write()
                break
            except Changed:  # someone was faster: look again at who that is
                self._generation = 0
                time.sleep(0.1)
        self._thread.start()
        return self

    def check(self) -> None:
        """Raise `LeaseLost` where the renewing thread has found the lease taken over. Asks nobody."""
        if self._lost is not None:
            raise LeaseLost(self._lost)

    def confirm(self) -> None:
        """Renew the lease now: raises `LeaseLost` unless it is ours at this moment, or `StoreError`."""
        self.check()
        try:
            self._write()
        except Changed:
            self._lose()
            self.check()

    def release(self) -> None:
        """Give it back, so that another need not wait for its expiry; where that fails, it expires."""
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._lost is None:
            with suppress(StoreError):
                self._objects.delete({LEASE: self._generation})

    def _write(self) -> None:
        with self._writing:
            self._renewals += 1
            said = {"holder": self.holder, "process": f"process {os.getpid()} on {socket.gethostname()}", "seconds": self.seconds, "token": self.token, "renewals": self._renewals}
            body = (json.dumps(said) + "\n").encode()
            try:
                self._generation = self._objects.write(LEASE, body, over=self._generation)
            except Changed:
                # perhaps by ourselves: a renewal whose answer was lost
                there = self._objects.facts(LEASE)
                if there is None or self.token not in (self._objects.read(LEASE) or b"").decode(errors="replace"):
                    raise
                self._generation = self._objects.write(LEASE, body, over=there.generation)

    def _renew_on(self) -> None:
        while not self._ended.wait(self.seconds / 4):
            try:
                self._write()
            except Changed:
                self._lose()
                break
            except StoreError:
                continue  # the next renewal, or the commit of a checkpoint, will tell

    def _lose(self) -> None:
        def lost(who: str) -> str:
            return f"'{self._objects.address}' was taken over by {who}; this one stops, and nothing of it is saved from here on"

        self._lost = lost("another process")  # at once: by whom can be asked later
        with suppress(StoreError):
            self._lost = lost(holder(self._objects) or "another process")


def holder(objects: Objects, there: Facts | None = None) -> str | None:
    """Who holds the lease of an address, and until when; None where nobody does."""
    said, until = _lease(objects, there or objects.facts(LEASE))
    if said is None or until < time.time():
        return None
    return f"{said['holder']} ({said['process']}), until {time.strftime('%Y-%m-%d %H:%M:%S %Z', time.localtime(until))} unless renewed,"


def refusal(objects: Objects, there: Facts, me: str) -> str | None:
    """Why this holder may not take the lease now, in one line; None where it may."""
    said, _ = _lease(objects, there)
    if said is None or said["holder"] == me or (who := holder(objects, there)) is None:
        return None
    return f"output_dir: {who} is at work in '{objects.address}'; wait for it to end, or choose another output_dir"


def _lease(objects: Objects, there: Facts | None) -> tuple[dict[str, Any] | None, float]:
    """What the lease says, and when it expires: by the store's clock for its beginning, so that only our own has to be right."""
    if there is None or (content := objects.read(LEASE)) is None:
        return None, 0.0
    try:
        said = json.loads(content)
        return {name: said[name] for name in ("holder", "process")}, there.updated + float(said["seconds"])
    except (ValueError, KeyError, TypeError):
        return None, 0.0  # not ours to read; a write over its generation will tell whether it is still there

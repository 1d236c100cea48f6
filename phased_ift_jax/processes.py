"""Several processes of one run, one on each host of a pod, started with the same command (floor 0; imports JAX when it joins them).

Process 0 decides what all must agree on, speaks, and writes what is not an array; all train, evaluate and save their own slices. They
talk through JAX's coordination service, which waits in no queue of a device and may be used from any thread.
"""

from __future__ import annotations

import atexit
import ctypes
import json
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from phased_ift_jax.interrupts import STOPPED, Stop, Stopped
from phased_ift_jax.records import Failure, UserError

HEARTBEAT_SECONDS = 15  # of silence after which a process counts as gone; JAX's own 100 would have its peers wait as long
START_SECONDS = 300  # for all processes to have been started
HEARING_SECONDS = 0.3  # between two looks whether another process was asked to stop
PATIENCE_MS = 24 * 3600 * 1000  # for what one process does while the others wait: the heartbeat tells whether it still lives
DIED_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class _Group:
    """This process among those of its run."""

    client: Any
    index: int
    size: int
    serial: Any


_group: _Group | None = None


def several() -> bool:
    """Whether this process was started as one of several, or may have been: by its environment alone, before JAX is there to ask."""
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment or "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return True
    if any(environment.get(name, "1") != "1" for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")):
        return True
    return any(Path(device).exists() for device in ("/dev/accel0", "/dev/vfio/0"))  # a TPU: JAX asks its metadata for the other hosts


def supervise() -> None:
    """Go on in a child where there are several processes; this one relays its standard error and makes of its end an exit code and one line.

    When a peer is gone, JAX ends a process by abort(), from a thread of its own and with a stack in C++: only a parent can say it in a line.
    """
    if not several():
        return
    reading, writing = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(DIED_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.dup2(writing, 2)
        os.close(reading)
        os.close(writing)
        return
    os.close(writing)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: os.kill(child, received))
    withheld = _relay(reading)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code < 0 or (code == 1 and withheld):
        why = _epitaph(-code if code < 0 else signal.SIGABRT, withheld)
        os.write(2, f"\nerror: {why}; everything up to the newest checkpoint is saved: start the same command on every host again\n".encode())
        code = 1
    elif withheld:
        os.write(2, withheld)
    os._exit(code)


@contextmanager
def joined(stop: Stop) -> Iterator[None]:
    """Be one of several processes, if this was started as such; process 0 is the one whose standard output is seen.

    Raises:
        UserError: the environment says that there are several, but not where or which this is.
    """
    global _group
    _group = _join()
    if _group is None:
        yield
        return
    if not first():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    stop.tell, stop.linger = _tell, 0 if _group.index else 1
    ended = threading.Event()
    hearing = threading.Thread(target=_hear, args=(stop, ended), name="peers", daemon=True)
    hearing.start()
    try:
        yield
    except BaseException as error:
        if isinstance(error.__cause__ or error, RuntimeError | TimeoutError):  # perhaps a peer is gone: then JAX soon knows, and ends this process
            time.sleep(HEARTBEAT_SECONDS + 5)
        # at its ordinary end JAX would wait for all processes
        atexit.register(_leave, stop, STOPPED if isinstance(error, Stopped) else 2 if isinstance(error, UserError) else 1)
        raise
    finally:
        ended.set()
        hearing.join()


def _join() -> _Group | None:
    if not several():
        return None
    import jax

    where = {"coordinator_address": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    given = {name: os.environ[variable] for name, variable in where.items() if variable in os.environ}
    # JAX's own service for notices would take SIGTERM away from us
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            given.get("coordinator_address"),
            int(given["num_processes"]) if "num_processes" in given else None,
            int(given["process_id"]) if "process_id" in given else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=START_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if "coordinator_address" not in given and isinstance(error, ValueError):
            return None  # a TPU of one host
        told = ", ".join(f"{variable} {os.environ.get(variable, 'not set')}" for variable in where.values())
        raise UserError(f"several processes: {told}: {' '.join(str(error).split())[:200]}; set all three, and start the same command on every host") from None
    if jax.process_count() == 1:
        return None
    from jax._src import distributed  # no public way leads to the client; orbax goes this one, too

    return _Group(distributed.global_state.client, jax.process_index(), jax.process_count(), count())


def first() -> bool:
    """Whether this is the process that speaks and writes; so it is where there is one only."""
    return _group is None or _group.index == 0


def alone() -> bool:
    return _group is None


def agree(decide: Callable[[], Any]) -> Any:
    """What process 0 decides, on every process, which must all ask in the same order. The value must survive JSON.

    Raises:
        UserError, Failure: process 0 has raised it.
    """
    if _group is None:
        return decide()
    key = f"agreed/{next(_group.serial)}"
    if _group.index == 0:
        try:
            answer = {"value": decide()}
        except (UserError, Failure) as error:
            answer = {"raised": [isinstance(error, UserError), str(error)]}
        _group.client.key_value_set(key, json.dumps(answer))
    else:
        answer = json.loads(_group.client.blocking_key_value_get(key, PATIENCE_MS))
    if "raised" in answer:
        is_users, text = answer["raised"]
        raise (UserError if is_users else Failure)(text)
    return answer["value"]


def check_same(what: str, mine: str) -> None:
    """Raise `UserError` where this process has something else than process 0."""
    if agree(lambda: mine) != mine:
        raise UserError(f"{what}: this process has others than process 0; give every host the same")


def await_all(name: str) -> None:
    """Return when every process has come here; `name` is used once in a run, and may be asked for in any thread."""
    if _group is not None:
        _group.client.wait_at_barrier(name, PATIENCE_MS)


def _leave(stop: Stop, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(stop.linger)
    os._exit(code)


def _tell(why: str) -> None:
    assert _group is not None
    try:
        _group.client.key_value_set("stop", f"process {_group.index}: {why}", allow_overwrite=True)
    except RuntimeError:  # the service is gone, and with it the run
        return


def _hear(stop: Stop, ended: threading.Event) -> None:
    assert _group is not None
    while not ended.wait(HEARING_SECONDS):  # a call that waits in C++ could not be left at the end of the process
        try:
            told = _group.client.key_value_try_get("stop")
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):  # the service has ended: whoever is in a step finds out there
                return
        else:
            stop.ask(told, tell=False)
            return


def _relay(reading: int) -> bytes:
    """Pass on what the child says as it comes, but for what JAX says when it gives up, which is returned."""
    withheld = b""
    while text := os.read(reading, 65536):
        if withheld:
            withheld += text
            continue
        last_words = re.search(rb"(?m)^[EF]\d{4} [\d:.]+ .*(coordination|client\.h)|^terminate called", text)
        said, withheld = (text[: last_words.start()], text[last_words.start() :]) if last_words else (text, b"")
        os.write(2, said)
    return withheld


def _epitaph(number: int, last_words: bytes) -> str:
    """Why a child has died of a signal, in a line."""
    text = last_words.decode(errors="replace")
    if number != signal.SIGABRT or "coordination" not in text:
        return f"a process of the run was ended by {signal.Signals(number).name}" + (f": {' '.join(text.split())[:300]}" if text else "")
    if found := re.search(r"unhealthy \(stopped sending heartbeats\):\s*([\d,\s/a-z:]+?)\s*\n", text):
        return f"process {' '.join(found[1].split())} of the run is gone"
    return "process 0 of the run, which the others talk through, is gone" if "leader" in text else f"JAX's coordination service has failed: {' '.join(text.split())[:300]}"

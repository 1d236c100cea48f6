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
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar, cast

from phased_ift_jax.interrupts import REQUESTS, STOPPED, Stop, Stopped, say
from phased_ift_jax.records import Failure, UserError

HEARTBEAT_SECONDS = 15  # of silence after which a process counts as gone; JAX's own 100 would have its peers wait as long
START_SECONDS = 300  # for all processes to have been started
HEARING_SECONDS = 0.3  # between two looks whether another process was asked to stop
PATIENCE_MS = 24 * 3600 * 1000  # for what one process does while the others wait: the heartbeat tells whether it still lives
TPU_DEVICES = ("/dev/accel0", "/dev/vfio/0")
WHERE = {"coordinator_address": "JAX_COORDINATOR_ADDRESS", "num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
# from where on JAX speaks of its own end, in several lines of C++
LAST_WORDS = re.compile(
    rb"(?m)(?:(?<=\r)|^)(?:E\d{4} [^\n]*(?:Use error polling to propagate|Polled an error from coordination service)"
    rb"|F\d{4} [^\n]*(?:client\.h|coordination)|terminate called)"
)
T = TypeVar("T")
DIED_WITH_PARENT = 1  # prctl's PR_SET_PDEATHSIG


@dataclass(frozen=True)
class _Group:
    """This process among those of its run."""

    client: Any
    index: int
    size: int
    serial: Any


_group: _Group | None = None
_parent = -1  # where a supervised process tells its parent that it has found the others


def several() -> bool:
    """Whether this process was started as one of several, or may have been: by its environment alone, before JAX is there to ask."""
    # on a machine with a TPU JAX asks its metadata for the other hosts
    return bool(_said()) or (has_tpu() and "tpu" in os.environ.get("JAX_PLATFORMS", "tpu"))


def has_tpu() -> bool:
    """Whether a TPU, or what may be one, is attached to this machine."""
    return any(Path(device).exists() for device in TPU_DEVICES)


def _said() -> str:
    """By what the environment says that there are several processes; empty where it does not."""
    environment = os.environ
    if "JAX_COORDINATOR_ADDRESS" in environment:
        return ", ".join(f"{name} {environment.get(name, 'not set')}" for name in WHERE.values())
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return f"TPU_WORKER_HOSTNAMES {environment['TPU_WORKER_HOSTNAMES']}"
    return next((f"{name} {environment[name]}" for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE") if environment.get(name, "1") != "1"), "")


def supervise() -> None:
    """Go on in a child where there are several processes; this one relays its standard error and makes of its end an exit code and one line.

    When a peer is gone, JAX ends a process by abort(), from a thread of its own and with a stack in C++: only a parent can say it in a line.
    """
    global _parent
    if not several():
        return
    reading, writing = os.pipe()
    found, _parent = os.pipe()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(DIED_WITH_PARENT, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        os.dup2(writing, 2)
        for unused in (reading, writing, found):
            os.close(unused)
        return
    os.close(writing)
    os.close(_parent)

    def pass_on(number: int, _: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(child, number)

    for number in REQUESTS:
        signal.signal(number, pass_on)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, REQUESTS)
    withheld: list[bytes] = []
    relaying = threading.Thread(target=_relay, args=(reading, withheld), daemon=True)
    relaying.start()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for number in REQUESTS:
        signal.signal(number, signal.SIG_IGN)
    relaying.join(2)  # no longer: a process that the child has left behind may hold the pipe open
    words = b"".join(withheld)
    if code == 1 and (ours := re.search(rb"(?m)^(error:|Traceback)", words)):
        say(2, words[ours.start() :].decode(errors="replace").rstrip())
    elif code < 0 or (code == 1 and words):
        say(2, f"error: {epitaph(-code if code < 0 else signal.SIGABRT, words, bool(os.read(found, 1)))}")
        code = 1
    elif words:
        say(2, words.decode(errors="replace").rstrip())
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
    if _parent >= 0:
        os.write(_parent, b"1")
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

    said, given = _said(), {name: os.environ[variable] for name, variable in WHERE.items() if variable in os.environ}
    advice = "set JAX_COORDINATOR_ADDRESS (host:port of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID, and start the same command on every host"
    # JAX's own service for notices would take SIGTERM away from us
    jax.config.update("jax_enable_preemption_service", False)
    try:
        if "coordinator_address" in given and not re.fullmatch(r".+:\d+", given["coordinator_address"]):
            raise ValueError(f"{given['coordinator_address']} is not host:port")
        jax.distributed.initialize(
            given.get("coordinator_address"),
            int(given["num_processes"]) if "num_processes" in given else None,
            int(given["process_id"]) if "process_id" in given else None,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            initialization_timeout=START_SECONDS,
            shutdown_timeout_seconds=HEARTBEAT_SECONDS,
        )
    except (ValueError, TypeError, RuntimeError) as error:
        if not said and isinstance(error, ValueError):
            return None  # a machine with a TPU, alone
        raise UserError(f"several processes ({said or 'a TPU'}): {' '.join(str(error).split())[:200]}; {advice}") from None
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


def together(act: Callable[[], T]) -> T:
    """What this process makes of something that all do alike, once all have done it.

    Raises:
        UserError: of this process or of another: what one refuses all refuse, so that none goes on alone.
    """
    if _group is None:
        return act()
    key, mine, result = f"together/{next(_group.serial)}", "", None
    try:
        result = act()
    except UserError as error:
        mine = str(error)
    _group.client.key_value_set(f"{key}/{_group.index}", f".{mine}")
    told = [_group.client.blocking_key_value_get(f"{key}/{index}", PATIENCE_MS)[1:] for index in range(_group.size)]
    if any(told):
        index, text = next((index, text) for index, text in enumerate(told) if text)
        raise UserError(mine or f"process {index}: {text}")
    return cast(T, result)


def check_same(what: str, mine: str) -> None:
    """Raise `UserError`, on all processes, where one has something else than process 0."""
    theirs = agree(lambda: mine)

    def compare() -> None:
        if mine != theirs:
            raise UserError(f"{what} is not what process 0 has ({mine[:200]}, not {theirs[:200]}); start every process with the same")

    together(compare)


def await_all(name: str) -> None:
    """Return when every process has come here; `name` is used once in a run, and may be asked for in any thread."""
    if _group is not None:
        _group.client.wait_at_barrier(name, PATIENCE_MS)


def _leave(stop: Stop, code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(stop.linger)
    os._exit(code)


def _tell(why: str, leaves: bool) -> None:
    assert _group is not None
    try:
        _group.client.key_value_set("stop", json.dumps([f"process {_group.index}: {why}", leaves]), allow_overwrite=True)
    except RuntimeError:  # the service is gone, and with it the run
        return


def _hear(stop: Stop, ended: threading.Event) -> None:
    assert _group is not None
    while not ended.wait(HEARING_SECONDS):  # a call that waits in C++ could not be left at the end of the process
        try:
            why, left = json.loads(_group.client.key_value_try_get("stop"))
        except RuntimeError as error:
            if "NOT_FOUND" not in str(error):  # the service has ended: whoever is in a step finds out there
                return
        else:
            if not why.startswith(f"process {_group.index}:"):
                stop.ask(why, told=True, left=left)
            if left:
                return


def _relay(reading: int, withheld: list[bytes]) -> None:
    """Pass on what the child says as it comes, but for what JAX says when it gives up, which is kept."""
    while text := os.read(reading, 65536):
        at = 0 if withheld else len(text)
        if not withheld and (found := LAST_WORDS.search(text)):
            at = found.start()
        os.write(2, text[:at])
        withheld += [text[at:]] if text[at:] else []


def epitaph(number: int, last_words: bytes, joined: bool) -> str:
    """Why a child has died of a signal, in a line."""
    text = last_words.decode(errors="replace")
    if number != signal.SIGABRT or "coordination" not in text:
        why = f"a process of the run was ended by {signal.Signals(number).name}" + (f": {' '.join(text.split())[:300]}" if text else "")
    elif not joined:
        return f"the other processes were not found within {START_SECONDS} s ({_said() or 'a TPU'}); start the same command on every host"
    elif found := re.search(r"unhealthy \(stopped sending heartbeats\):\s*([\d,\s/a-z:]+?)\s*\n", text):
        why = f"process {' '.join(found[1].split())} of the run is gone"
    elif "leader" in text:
        why = "process 0 of the run, which the others talk through, is gone"
    else:
        why = f"JAX's coordination service has failed: {' '.join(text.split())[:300]}"
    return f"{why}; everything up to the newest checkpoint is saved: start the same command on every host again"

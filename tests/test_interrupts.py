"""Laws of stopping: requests are heard from a process's first moments on, by signal or by notice, and end it at once where a kill would lose nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from test_run import ROOT, make_config, rows  # noqa: F401

from phased_ift_jax import config as config_module
from phased_ift_jax.interrupts import NOTICES, STOPPED, Stop, Stopped, listening

AT_ONCE = 5.0  # seconds


def start(*words: object, **environment: str) -> subprocess.Popen[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""} | environment
    return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_a_request_waits_for_what_is_not_saved():
    stop = Stop()
    assert not stop
    stop.began()
    stop.ask("a test")
    stop.ask("a test, again")
    assert stop
    with pytest.raises(Stopped):
        stop.saved()


def test_a_request_is_passed_on_unless_it_was_passed_on():
    for told, heard in ((False, [("a test", False)]), (True, [])):
        stop, passed = Stop(), []
        stop.tell = lambda why, leaves, passed=passed: passed.append((why, leaves))
        stop.began()
        stop.ask("a test", told=told)
        stop.ask("another", told=told)
        assert passed == heard


def test_handlers_are_as_they_were_afterwards():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)
    threads = threading.active_count()
    with listening():
        assert signal.getsignal(signal.SIGTERM) != before[0]
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT), signal.set_wakeup_fd(-1)) == before
    assert threading.active_count() == threads


def test_in_a_thread_signals_are_left_alone():
    seen = []

    def inside() -> None:
        with listening() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), bool(stop)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [(before, False)]


LONG_CALL = """
import sys, time
from phased_ift_jax.interrupts import listening
with listening() as stop:
    if sys.argv[1] == "unsaved":
        stop.began()
    print("ready", flush=True)
    {call}
print("never here" if not stop else "went on", flush=True)
"""
SLEEP_IN_C = "import ctypes; ctypes.CDLL(None).usleep(3_000_000)"  # as in a compilation: no bytecode, but the GIL is free


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_call_in_c_does_not_hold_a_request_up(number):
    process = start("-c", LONG_CALL.format(call=SLEEP_IN_C), "saved")
    assert process.stdout.readline() == "ready\n"
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(20) == 75
    assert time.monotonic() - began < 2
    assert "stopped with everything saved" in process.stdout.read()


def test_unless_something_is_unsaved():
    process = start("-c", LONG_CALL.format(call=SLEEP_IN_C), "unsaved")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=20)[0]
    assert process.returncode == 0
    assert said.count("SIGTERM: stopping once everything is saved") == 1
    assert said.endswith("went on\n")


def test_a_reader_that_has_gone_does_not_keep_a_process_from_stopping():
    """Ctrl-C on `train ... | tee log` ends `tee` first; saying something must never end a run, or keep it."""
    process = start("-c", LONG_CALL.format(call=SLEEP_IN_C), "saved")
    assert process.stdout.readline() == "ready\n"
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 75


def test_a_run_whose_output_nobody_reads_any_more_saves_and_stops(rows, tmp_path):  # noqa: F811
    config = make_config(rows, tmp_path / "run", training__num_train_epochs=2000, logging__report_to=[], checkpoint__save_steps=None)
    (tmp_path / "config.yaml").write_text(config_module.dump(config))
    process = start("-m", "phased_ift_jax.train", tmp_path / "config.yaml")
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert process.poll() is None
        time.sleep(0.05)
    process.stdout.close()
    time.sleep(1.5)  # the bar has tried to say something
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 75
    steps = metrics.read_text().count("\n")
    assert (tmp_path / f"run/checkpoints/1-easy/{steps}/manifest.json").exists()


def test_other_signals_are_the_programs_own():
    program = (
        "import os, signal, time\nfrom phased_ift_jax.interrupts import listening\nheard = []\nsignal.signal(signal.SIGUSR1, lambda *_: heard.append(1))\n"
        "with listening() as stop:\n os.kill(os.getpid(), signal.SIGUSR1)\n time.sleep(0.5)\n print(heard, bool(stop))"
    )
    assert start("-c", program).communicate(timeout=20)[0] == "[1] False\n"


def test_a_second_request_does_not_end_otherwise_what_the_first_is_ending():
    program = (
        "import os, signal, time\nfrom phased_ift_jax.interrupts import listening\nwith listening() as stop:\n stop.began()\n os.kill(os.getpid(), signal.SIGTERM)\n"
        " while not stop: time.sleep(0.01)\nos.kill(os.getpid(), signal.SIGTERM)\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.2)\nprint('in order')"
    )
    process = start("-c", program)
    assert process.communicate(timeout=20)[0].endswith("in order\n")
    assert process.returncode == 0


def test_a_process_leaves_with_one_that_has_left():
    """Its steps cannot end without the other's part, so nothing that it has begun since the last save can be done."""
    program = "from phased_ift_jax.interrupts import Stop\nstop = Stop()\nstop.began()\nstop.ask('process 1: SIGTERM', told=True, left=True)\nprint('never here')"
    process = start("-c", program)
    assert "never here" not in process.communicate(timeout=20)[0]
    assert process.returncode == 75


@pytest.fixture
def metadata():
    """A metadata server as on Google's machines; what it answers is to be set."""
    answers = dict.fromkeys(NOTICES, "NONE") | {"preempted": "FALSE"}
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            body = answers[self.path.rsplit("/", 1)[1]].encode()
            if answers.get("truncated"):
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", answers, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("key", "notice"), list(NOTICES.items()))
def test_a_notice_is_a_request(metadata, key, notice):
    """A live migration is none, and neither is a look that fails."""
    host, answers, asked = metadata
    program = "import phased_ift_jax.interrupts as i, time; i.NOTICE_SECONDS = 0.05\nwith i.listening():\n print('ready', flush=True)\n time.sleep(30)"
    answers["maintenance-event"] = "MIGRATE_ON_HOST_MAINTENANCE"
    process = start("-c", program, GCE_METADATA_HOST=host, http_proxy="http://127.0.0.1:1")
    assert process.stdout.readline() == "ready\n"
    while len(asked) < 6:
        time.sleep(0.02)
    answers["truncated"] = True
    time.sleep(0.3)
    del answers["truncated"]
    time.sleep(0.3)
    assert process.poll() is None
    answers[key] = notice
    assert process.wait(20) == 75
    assert set(asked) == {(f"/computeMetadata/v1/instance/{key}", "Google") for key in NOTICES}


def test_a_maintenance_announced_before_the_start_ends_nothing(metadata):
    """It may be an hour away, and started again the run would be stopped again; when the machine goes, SIGTERM or its preemption says so."""
    host, answers, asked = metadata
    answers["maintenance-event"] = NOTICES["maintenance-event"]
    program = "import phased_ift_jax.interrupts as i, time; i.NOTICE_SECONDS = 0.05\nwith i.listening():\n print('ready', flush=True)\n time.sleep(1.5)"
    process = start("-c", program, GCE_METADATA_HOST=host)
    assert process.wait(20) == 0
    assert len(asked) > 6


def test_a_run_that_is_told_of_a_preemption_stops_with_everything_saved(rows, tmp_path, metadata):  # noqa: F811
    """The real thing, from the notice to exit code 75 and a checkpoint."""
    host, answers, _ = metadata
    config = make_config(rows, tmp_path / "run", training__num_train_epochs=2000, logging__report_to=[], checkpoint__save_steps=None)
    (tmp_path / "config.yaml").write_text(config_module.dump(config))
    process = start("-m", "phased_ift_jax.train", tmp_path / "config.yaml", GCE_METADATA_HOST=host)
    metrics = tmp_path / "run/metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") > 3:
            break
        time.sleep(0.1)
    answers["preempted"] = "TRUE"
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 75, said[-2000:]
    assert "the machine will be taken away (preempted): stopping once everything is saved" in said
    steps = metrics.read_text().count("\n")
    assert (tmp_path / f"run/checkpoints/1-easy/{steps}/manifest.json").exists()


def test_a_request_that_was_held_is_heard_by_the_program_in_its_place():
    """Between the first word of a process and its `listening` lies a start anew, in which a signal would end it."""
    second = "from phased_ift_jax.interrupts import listening; import time; listens = listening(); listens.__enter__(); time.sleep(1)"
    first = "import os, signal, sys; from phased_ift_jax.interrupts import hold; hold(); os.kill(os.getpid(), signal.SIGTERM)"
    first += f"; os.execv(sys.executable, [sys.executable, '-c', {second!r}])"
    ended = [subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False).returncode for program in (first, first.replace("hold();", ""))]
    assert ended == [STOPPED, -signal.SIGTERM]


def test_a_stop_in_the_imports_is_heard(tmp_path: Path):
    """Exit code 75 at once, wherever in the first second it comes; Python itself needs some hundredths of a second to begin."""
    for delay in (0.2, 0.5, 0.9):
        process = start("-m", "phased_ift_jax.train", ROOT / "configs/quickstart.yaml", "--output_dir", tmp_path / "run")
        time.sleep(delay)
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 75, process.stdout.read()
        assert time.monotonic() - began < AT_ONCE
    assert not (tmp_path / "run").exists()

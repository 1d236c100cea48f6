"""The Batch API: whatever becomes of a batch, every question is answered or listed, and none is paid for twice; the server counts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import fake_openai
import pytest
from batch_asker import KEY, MODEL, ask

from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.scoring.request import FAILURES, Summary

ROOT = Path(__file__).resolve().parents[1]


def outcomes(out: Path) -> Counter[str]:
    return Counter(json.loads(line)[1] for line in out.read_text().splitlines())


def ledger(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{out}.ledger.jsonl").read_text().splitlines()]


def once_each(server: fake_openai.FakeOpenAI | fake_openai.Remote, n: int) -> dict[str, Any]:
    """The server's counts, by which `n` questions were answered once each, and no batch was made twice."""
    counts = server.counts()
    assert (counts["answered"], counts["billed"], counts["rebilled"], counts["same_batches"]) == (n, n, 0, 0), counts
    return counts


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "scored.jsonl"


def test_questions_are_split_by_number_and_what_was_answered_is_not_asked_again(out: Path) -> None:
    with fake_openai.serving(max_requests=100, seconds=60) as server:
        summary = ask(server.url, str(out), 250, requests=100)
        assert summary == Summary(Counter(ok=250))
        counts = once_each(server, 250)
        assert (counts["files"], counts["batches"]) == (3, {"completed": 3})
        assert sum(line["usd"] for line in ledger(out) if "usd" in line) == pytest.approx(counts["usd"], rel=1e-9), "half the price"
        first = out.read_bytes()
        assert ask(server.url, str(out), 250, requests=100).outcomes == {}, "nothing is left to ask"
        assert ask(server.url, str(out), 300, requests=100).outcomes == {"ok": 50}
        once_each(server, 300)
        assert out.read_bytes().startswith(first)


def test_questions_are_split_by_bytes_and_one_that_fits_no_file_has_failed(out: Path) -> None:
    with fake_openai.serving(max_bytes=20_000, seconds=60) as server:
        assert ask(server.url, str(out), 50, size=20_000, padding=1000).outcomes == {"ok": 50}
        counts = once_each(server, 50)
        assert counts["files"] > 2
        assert all(len(content) <= 20_000 for facts, content in server.batches.files.values() if facts["purpose"] == "batch")
        assert ask(server.url, str(out), 3, size=900, padding=1001).outcomes == {"failed": 3}
        assert once_each(server, 50)["files"] == counts["files"]


FATES = ("expired:0.5", "expired:0", "cancelled:0.5", "cancelled:1", "errors", "no_output", "failed", "limit", "expired:0.5,cancelled:0.3,errors,no_output,expired:0.9")


@pytest.mark.parametrize("fate", FATES)
def test_whatever_becomes_of_a_batch_every_question_is_answered_once(out: Path, fate: str) -> None:
    with fake_openai.serving(fates=fate, seconds=60) as server:
        assert ask(server.url, str(out), 100, requests=60).outcomes == {"ok": 100}
        once_each(server, 100)


@pytest.mark.parametrize(("fate", "batches"), [("errors", FAILURES), ("no_output", FAILURES), ("expired:0", FAILURES), ("failed", 2), ("limit", 7)])
def test_what_never_ends_well_ends(out: Path, fate: str, batches: int) -> None:
    """Each question is listed as failed with its reason, and nothing was billed. Of a limit that nothing fits, single questions are tried last."""
    with fake_openai.serving(fates=",".join([fate] * 99), batch_seconds=0.02, seconds=60) as server:
        summary = ask(server.url, str(out), 40)
        assert summary.outcomes == {"failed": 40} if fate != "limit" else summary.stopped
        assert server.counts()["billed"] == 0
        assert len(server.batches.made) == batches
    errors = [line["error"]["message"] for line in ledger(out) if line.get("error")]
    assert len(errors) >= 40
    assert all(errors)


def test_a_batch_that_someone_cancels_is_made_up_for(out: Path) -> None:
    import threading

    import openai

    with fake_openai.serving(batch_seconds=1.0, seconds=60) as server:
        client = openai.OpenAI(api_key=KEY, base_url=server.url)

        def cancel() -> None:
            while not (made := [*server.batches.made.values()]) or made[0]["request_counts"]["completed"] < 20:
                time.sleep(0.01)
            client.batches.cancel(made[0]["id"])

        canceller = threading.Thread(target=cancel)
        canceller.start()
        assert ask(server.url, str(out), 100).outcomes == {"ok": 100}
        canceller.join()
        assert once_each(server, 100)["batches"] == {"cancelled": 1, "completed": 1}


@pytest.mark.parametrize("seed", range(5))
def test_connections_that_fail_while_files_and_batches_are_made_polled_and_fetched(out: Path, seed: int) -> None:
    """Replies get lost after the deed, too: a batch that was made is found again, a file that came in part is fetched again."""
    with fake_openai.serving(seed=seed, batch_faults=0.3, fates="expired:0.5,cancelled:0.5", seconds=60) as server:
        assert ask(server.url, str(out), 150, requests=40, settle_seconds=0.3).outcomes == {"ok": 150}
        once_each(server, 150)
        assert sum(server.kinds[f"{path} {kind}"] for path in ("files", "batches") for kind in ("cut", "truncated")) > 1


def test_bad_answers_are_asked_for_as_often_as_live_ones(out: Path) -> None:
    with fake_openai.serving(seed=3, faults=0.5, seconds=60) as server:
        summary = ask(server.url, str(out), 300)
        counts = server.counts()
        assert (counts["questions"], counts["rebilled"]) == (300, 0), counts
        found = outcomes(out)
        assert found == summary.outcomes
        assert {"ok", "refused", "filtered", "unparseable", "out_of_range"} <= found.keys() <= {"ok", "refused", "filtered", "unparseable", "out_of_range", "failed"}
        assert all(question.odd <= 2 and question.finals <= 1 for question in server.questions.values())
        answered = sum(question.finals for question in server.questions.values())
        assert found["ok"] + found["refused"] + found["filtered"] + found["failed"] == answered + found["failed"]


def test_a_budget_holds_and_parts_are_made_to_fit_it(out: Path) -> None:
    with fake_openai.serving(wordy=1, chars_per_token=1, seconds=60) as server:
        summary = ask(server.url, str(out), 200, usd=0.002)
        assert summary.stopped
        assert "budget" in summary.stopped
        assert 0 < server.counts()["usd"] <= 0.002
        once_each(server, summary.outcomes["ok"])
        assert len(server.batches.made) >= 1
        assert not ask(server.url, str(out), 200, usd=1.0).stopped
        once_each(server, 200)


def test_a_budget_too_small_for_one_question_makes_no_batch(out: Path) -> None:
    with fake_openai.serving(seconds=60) as server:
        assert ask(server.url, str(out), 10, usd=1e-9).stopped
        assert server.batches.files == {}


def test_a_wrong_key_is_one_line_without_the_key(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import batch_asker

    monkeypatch.setattr(batch_asker, "KEY", "sk-wrong-key")
    with fake_openai.serving(seconds=60) as server, pytest.raises(UserError) as told:
        ask(server.url, str(out), 5)
    assert "sk-wrong-key" not in str(told.value)
    assert "\n" not in str(told.value)
    assert "sk-wrong-key" not in Path(f"{out}.ledger.jsonl").read_text()


def test_no_server_is_a_failure_that_says_how_to_go_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("phased_ift_jax.scoring.batch.PATIENCE", 0.5)
    with pytest.raises(Failure, match="same command"):
        ask("http://127.0.0.1:9/v1", str(out), 5)


# --- kill -9

N = 240
KILLED = {"requests": 90, "settle_seconds": 0.5}
DISTURBED: dict[str, Any] = {"faults": 0.2, "batch_latency": 0.06, "batch_seconds": 0.4, "fates": "completed,expired:0.5,cancelled:0.4", "seconds": 500}


def start(url: str, out: Path) -> subprocess.Popen[str]:
    arguments = json.dumps({"url": url, "out": str(out), "n": N} | KILLED)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    asker = subprocess.Popen([sys.executable, str(ROOT / "tests/batch_asker.py"), arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert asker.stdout
    assert asker.stdout.readline() == "ready\n"
    return asker


def moment(out: Path) -> str:
    """What a killed process was at, by its ledger."""
    path = Path(f"{out}.ledger.jsonl")
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    last: dict[str, Any] = next((json.loads(line) for line in reversed(lines[:-1])), {})
    return "creation" if "sent" in last or last.get("part") and len(last) == 3 else "merging" if "key" in last else "polling or download" if "batch" in last else "upload"


def killed_and_not(tmp_path: Path, seed: int, kills: int) -> Counter[str]:
    """A run that is killed so often at random moments is as one that is not: same file, same bill. Returns what it was at when killed."""
    moments: Counter[str] = Counter()
    with fake_openai.process(seed=seed, **DISTURBED) as server:
        began = time.monotonic()
        whole = start(server.url, tmp_path / "whole.jsonl")
        assert whole.wait(120) == 0
        needed, expected = time.monotonic() - began, server.counts()
    with fake_openai.process(seed=seed, **DISTURBED) as server:
        out, left, rng = tmp_path / "killed.jsonl", kills, random.Random(seed)
        while left:
            asker = start(server.url, out)
            time.sleep(rng.uniform(0, needed) / (1 if left == kills else 2))
            if asker.poll() is None:
                os.kill(asker.pid, signal.SIGKILL)
                left -= 1
                moments[moment(out)] += 1
            asker.wait()
            if asker.returncode == 0:  # it was through before it was to be killed
                break
        assert start(server.url, out).wait(120) == 0
        counts = server.counts()
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert counts["rebilled"] == counts["same_batches"] == 0, counts
    assert {name: counts[name] for name in ("questions", "answered", "billed", "usd")} == {name: expected[name] for name in ("questions", "answered", "billed", "usd")}
    return moments + Counter({"kills": kills - left})


def test_a_run_that_is_killed_is_as_one_that_is_not(tmp_path: Path) -> None:
    assert killed_and_not(tmp_path, seed=1, kills=3)["kills"] > 0


@pytest.mark.slow
def test_twenty_five_kills(tmp_path: Path) -> None:
    moments: Counter[str] = Counter()
    seed = 100
    while moments["kills"] < 25:
        seed += 1
        (tmp_path / str(seed)).mkdir()
        moments += killed_and_not(tmp_path / str(seed), seed, min(5, 25 - moments["kills"]))
    print("\nkilled while at:", dict(moments), "seeds", 101, "to", seed)

"""The Batch API: whatever becomes of a batch, every question is answered or listed, and none is paid for twice; the server counts."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_openai
import openai
import pytest
from batch_asker import KEY, PRICE, ask, questions

from phased_ift_jax.records import Failure, UserError
from phased_ift_jax.scoring import batch, patience
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.money import BATCH, Price
from phased_ift_jax.scoring.request import ATTEMPT, FAILURES, Summary
from phased_ift_jax.scoring.request import KEY as KEY_OF

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
def out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(patience, "LONGEST", 30.0)
    return tmp_path / "scored.jsonl"


def test_questions_are_split_by_number_and_what_was_answered_is_not_asked_again(out: Path) -> None:
    with fake_openai.serving(max_requests=100) as server:
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
    with fake_openai.serving(max_bytes=20_000) as server:
        assert ask(server.url, str(out), 50, size=20_000, padding=1000).outcomes == {"ok": 50}
        counts = once_each(server, 50)
        assert counts["files"] > 2
        assert all(len(content) <= 20_000 for facts, content in server.batches.files.values() if facts["purpose"] == "batch")
        assert ask(server.url, str(out), 3, size=900, padding=1001).outcomes == {"failed": 3}
        assert once_each(server, 50)["files"] == counts["files"]


FATES = ("expired:0.5", "expired:0", "cancelled:0.5", "cancelled:1", "hasty", "errors", "no_output", "failed", "limit", "expired:0.5,cancelled:0.3,errors,no_output,expired:0.9")


@pytest.mark.parametrize("fate", FATES)
def test_whatever_becomes_of_a_batch_every_question_is_answered_once(out: Path, fate: str) -> None:
    with fake_openai.serving(fates=fate) as server:
        assert ask(server.url, str(out), 100, requests=60).outcomes == {"ok": 100}
        once_each(server, 100)


@pytest.mark.parametrize(("fate", "batches"), [("errors", FAILURES), ("no_output", FAILURES), ("expired:0", FAILURES), ("failed", 2), ("limit", 6)])
def test_what_never_ends_well_ends(out: Path, fate: str, batches: int) -> None:
    """Each question is listed as failed with its reason, and nothing was billed. Where nothing fits, 40, 20, 10, 5, 2, 1 are tried."""
    with fake_openai.serving(fates=",".join([fate] * 99), batch_seconds=0.02) as server:
        summary = ask(server.url, str(out), 40)
        assert summary.outcomes == {"failed": 40} if fate != "limit" else summary.stopped
        assert server.counts()["billed"] == 0
        assert len(server.batches.made) == batches
    errors = [line["error"]["message"] for line in ledger(out) if line.get("error")]
    assert len(errors) >= 40
    assert all(errors)


def test_a_batch_that_someone_cancels_is_made_up_for(out: Path) -> None:
    with fake_openai.serving(batch_seconds=1.0) as server:
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
    with fake_openai.serving(seed=seed, batch_faults=0.3, fates="expired:0.5,cancelled:0.5") as server:
        assert ask(server.url, str(out), 150, requests=40, settle_seconds=0.3).outcomes == {"ok": 150}
        once_each(server, 150)
        assert sum(server.kinds[f"{path} {kind}"] for path in ("files", "batches") for kind in ("cut", "truncated")) > 1


def test_bad_answers_are_asked_for_as_often_as_live_ones(out: Path) -> None:
    with fake_openai.serving(seed=3, faults=0.6, kinds="server_error,refusal,filter,filter_400,fraction,nan,empty,range,length") as server:
        summary = ask(server.url, str(out), 300)
        counts = server.counts()
        assert (counts["questions"], counts["rebilled"]) == (300, 0), counts
        found = outcomes(out)
        assert found == summary.outcomes
        assert found.keys() == {"ok", "refused", "filtered", "unparseable", "out_of_range"}
        assert all(question.odd <= 2 and question.finals <= 1 for question in server.questions.values())
        assert sum(question.finals for question in server.questions.values()) == found["ok"] + found["refused"] + found["filtered"]


def test_all_is_written_down_before_it_is_needed(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a batch is created, the ledger holds its questions; when it is looked at, its id."""
    with fake_openai.serving() as server:
        routed, seen = server.batches.answer, Counter[str]()

        def answer(call: Any) -> Any:
            lines = ledger(out)
            if call.method == "POST" and call.path == "/v1/batches":
                part = json.loads(call.body)["metadata"][batch.PART]
                inside = server.batches.files[json.loads(call.body)["input_file_id"]][1].splitlines()
                assert {line["sent"] for line in lines if line.get("via") == batch.VIA + part} == {json.loads(line)["custom_id"] for line in inside}
                seen["created"] += 1
            elif call.path.startswith("/v1/batches/"):
                assert any(call.path.endswith(line["batch"]) for line in lines if "batch" in line)
                seen["looked at"] += 1
            return routed(call)

        monkeypatch.setattr(server.batches, "answer", answer)
        assert ask(server.url, str(out), 50, requests=20).outcomes == {"ok": 50}
        assert seen["created"] == 3
        assert seen["looked at"] > 3


def test_a_budget_holds_and_parts_are_made_to_fit_it(out: Path) -> None:
    with fake_openai.serving(wordy=1, chars_per_token=1) as server:
        summary = ask(server.url, str(out), 200, usd=0.002)
        assert summary.stopped
        assert "budget" in summary.stopped
        assert 0 < server.counts()["usd"] <= 0.002
        once_each(server, summary.outcomes["ok"])
        assert len(server.batches.made) >= 1
        assert not ask(server.url, str(out), 200, usd=1.0).stopped
        once_each(server, 200)


def test_a_budget_too_small_for_one_question_makes_no_batch(out: Path) -> None:
    with fake_openai.serving() as server:
        assert ask(server.url, str(out), 10, usd=1e-9).stopped
        assert server.batches.files == {}


def test_a_wrong_key_is_one_line_without_the_key(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import batch_asker

    monkeypatch.setattr(batch_asker, "KEY", "sk-wrong-key")
    with fake_openai.serving() as server, pytest.raises(UserError) as told:
        ask(server.url, str(out), 5)
    assert "sk-wrong-key" not in str(told.value)
    assert "\n" not in str(told.value)
    assert "sk-wrong-key" not in Path(f"{out}.ledger.jsonl").read_text()


def test_a_batch_that_the_server_refuses_is_said_in_one_line_and_may_be_asked_again(out: Path) -> None:
    with fake_openai.serving(fates="refused") as server:
        with pytest.raises(UserError, match="Billing hard limit"):
            ask(server.url, str(out), 5)
        server.options.fates = ""
        assert ask(server.url, str(out), 5, usd=1e-4).outcomes == {"ok": 5}
        once_each(server, 5)


def test_what_a_live_run_left_under_way_is_found_out_before_it_is_asked_again(out: Path) -> None:
    """One of its replies is kept by the server, of the other it knows nothing."""
    kept, unknown, _ = asked = questions(3)
    with Ledger(Path(f"{out}.ledger.jsonl")) as book:
        for request in (kept, unknown):
            book.sent(request.key, 1, "live", 1e-5)
    with fake_openai.serving() as server:
        client = openai.OpenAI(api_key=KEY, base_url=server.url)
        client.chat.completions.create(**asked[0].body, store=True, metadata={KEY_OF: kept.key, ATTEMPT: "1"})
        summary = ask(server.url, str(out), 3, settle_seconds=0.1)
        assert (summary.found, summary.lost) == (1, 1)
        assert outcomes(out) == {"ok": 3}
        once_each(server, 3)
    assert [line["usd"] for line in ledger(out) if (line.get("key"), line.get("attempt")) == (unknown.key, 1)] == [1e-5]


def test_both_modes_share_a_ledger_and_make_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from phased_ift_jax import score

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the verb's process has it
    data = tmp_path / "data.json"
    data.write_text(json.dumps([{"instruction": f"Name {i} fish.", "input": "", "output": "cod, " * i} for i in range(1, 40)]))
    with fake_openai.serving(seed=5, faults=0.2, kinds="fraction,refusal,server_error") as server:
        made = {}
        for mode in ("live", "batch"):
            out = tmp_path / f"{mode}.jsonl"
            command = [str(data), "--out", str(out), "--model", "gpt-4o-mini", "--base_url", server.url, "--budget_usd", "1"]
            assert score.main([*command, "--limit", "20"]) == 0  # live: a start in batches takes over what it has answered
            before = server.counts()
            assert score.main([*command, "--mode", mode]) == 0
            after = server.counts()
            made[mode] = out.read_bytes()
            assert ("completed" in after["batches"]) == (mode == "batch")
            assert after["rebilled"] == 0
            assert 0 < after["billed"] - before["billed"] < 39
            server.questions.clear()
            server.bodies.clear()
        assert made["live"] == made["batch"]
    assert signal.signal(signal.SIGTERM, old) is signal.default_int_handler


def test_no_server_is_a_failure_that_says_how_to_go_on(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "LONGEST", 0.5)
    with pytest.raises(Failure, match="same command") as told:
        ask("http://me:hidden@127.0.0.1:9/v1", str(out), 5)
    assert "127.0.0.1:9" in str(told.value)
    assert "hidden" not in str(told.value)


# --- ends at any moment

N = 150
KILLED = {"requests": 60, "settle_seconds": 0.5}
DISTURBED: dict[str, Any] = {"faults": 0.2, "batch_latency": 0.06, "batch_seconds": 0.4, "fates": "completed,expired:0.5,cancelled:0.4"}


def start(url: str, out: Path, **options: Any) -> subprocess.Popen[str]:
    arguments = json.dumps({"url": url, "out": str(out), "n": N} | KILLED | options)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    asker = subprocess.Popen([sys.executable, str(ROOT / "tests/batch_asker.py"), arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)
    assert asker.stdout
    assert asker.stdout.readline() == "ready\n"
    return asker


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_says_so_and_goes_on_later(out: Path, number: signal.Signals) -> None:
    with fake_openai.process(batch_seconds=2) as server:
        asker = start(server.url, out)
        path = Path(f"{out}.ledger.jsonl")
        while not path.exists() or '"batch": ' not in path.read_text():
            time.sleep(0.02)
        asker.send_signal(number)
        told, _ = asker.communicate(timeout=60)
        assert (asker.returncode, "stopped='signal'" in told) == (0, True), told
        assert start(server.url, out).wait(60) == 0
        once_each(server, N)
    assert outcomes(out) == {"ok": N}


@pytest.mark.parametrize("created", [False, True])
def test_a_run_that_is_killed_while_a_batch_is_created_finds_it_or_creates_it_again(out: Path, created: bool) -> None:
    """The server creates the batch after 2 seconds, whether or not anybody waits for it, and tells so after 2 more."""
    with fake_openai.process(create_latency=4) as server:
        asker, path = start(server.url, out), Path(f"{out}.ledger.jsonl")
        while not path.exists() or '"sent": ' not in path.read_text():
            time.sleep(0.02)
        while created and not server.counts()["batches"]:
            time.sleep(0.02)
        asker.kill()
        asker.wait()
        assert '"batch": ' not in path.read_text()
        assert (server.counts()["batches"] == {}) != created
        assert start(server.url, out, settle_seconds=5).wait(120) == 0
        counts = once_each(server, N)
        assert counts["batches"] == {"completed": 3}
    assert outcomes(out) == {"ok": N}


REFUSED, ASKED = {"refused": "gone"}, {"creating": "gone"}
FREE, LOST = [("not_created", 0.0)] * 3, [("lost", 1e-4)] * 3


@pytest.mark.parametrize("at", ["2026-01-02T03:04:05.678+00:00", "2126-01-02T03:04:05.678+00:00"])  # the latter before the clock was put right
@pytest.mark.parametrize(("notes", "ended"), [([], FREE), ([ASKED, REFUSED], FREE), ([ASKED], LOST), ([ASKED, REFUSED, ASKED], LOST)])
def test_a_part_whose_batch_was_never_created_is_free_and_one_that_nobody_knows_of_stays_counted(
    out: Path, at: str, notes: list[dict[str, str]], ended: list[tuple[str, float]]
) -> None:
    sent = [{"sent": request.key, "attempt": 1, "reserved_usd": 1e-4, "at": at, "via": f"{batch.VIA}gone"} for request in questions(3)]
    lines = [*sent, *(note | ({"at": at} if note == ASKED else {}) for note in notes)]
    Path(f"{out}.ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with fake_openai.serving() as server:
        summary = ask(server.url, str(out), 5, usd=5e-4, settle_seconds=0.1)
        assert (summary.outcomes, summary.lost) == ({"ok": 5}, 3 if ended == LOST else 0)
        once_each(server, 5)
    assert [(line["error"]["type"], line["usd"]) for line in ledger(out) if line.get("error")] == ended


# --- creations of which nobody hears, and batches that are gone


def creations(server: fake_openai.FakeOpenAI, monkeypatch: pytest.MonkeyPatch, *fates: str | float) -> list[Callable[[], object]]:
    """What becomes of the first requests to create a batch; those that are "late" or "held" are executed when the test calls what is returned.

    "drop": never executed; "unavailable": HTTP 503; a number: executed so many seconds after its connection is lost; "late": after its
    connection is lost; "held": its client goes on waiting. Later ones are as ever.
    """
    routed, left, later = server.batches.route, [*fates], list[Callable[[], object]]()

    def route(call: Any) -> None:
        if (call.method, call.path) != ("POST", "/v1/batches") or not left:
            return routed(call)
        if (fate := left.pop(0)) == "unavailable":
            raise fake_openai.Refused(503, "Try again later.", kind="server_error", retry_after="0.01")

        def execute() -> None:
            server.batches.create(json.loads(call.body))

        if isinstance(fate, float):
            server.loop.call_later(fate, execute)
        elif fate in ("late", "held"):
            later.append(lambda: server.loop.call_soon_threadsafe(execute))
        if fate != "held":
            call.connection.close()
        return None

    monkeypatch.setattr(server.batches, "route", route)
    return later


def worst_case(n: int) -> float:
    """USD of so many questions in batches, at most."""
    return BATCH * sum(Price(*PRICE).worst_case(request.body) for request in questions(n))


def assert_all_is_counted(server: fake_openai.FakeOpenAI, later: list[Callable[[], object]], out: Path, usd: float) -> None:
    """Once all that was asked of the server is done, its bill is within the ledger's, and that within the budget."""
    made = len(server.batches.made) + len(later)
    for execute in later:
        execute()
    while len(server.batches.made) < made or not {one["status"] for one in server.batches.made.values()} <= {*batch.ENDED}:
        time.sleep(0.02)
    spent = sum(line["usd"] for line in ledger(out) if "usd" in line)
    assert 0 < server.usd <= spent <= usd, (server.usd, spent, usd)


@pytest.mark.parametrize("first", ["drop", "unavailable"])
def test_each_creation_whose_reply_is_lost_is_looked_for_as_long_as_the_first(out: Path, monkeypatch: pytest.MonkeyPatch, first: str) -> None:
    with fake_openai.serving() as server:
        creations(server, monkeypatch, first, 1.0)
        assert ask(server.url, str(out), 60, settle_seconds=2.0).outcomes == {"ok": 60}
        once_each(server, 60)


@pytest.mark.parametrize("share", [1.2, 4.0])
@pytest.mark.parametrize("fates", [["late"], ["unavailable", "late"], ["late", "drop", "late"]])
def test_a_budget_holds_whenever_a_creation_is_executed(out: Path, monkeypatch: pytest.MonkeyPatch, fates: list[str], share: float) -> None:
    with fake_openai.serving(wordy=1, chars_per_token=1) as server:
        later, usd = creations(server, monkeypatch, *fates), share * worst_case(40)
        summary = ask(server.url, str(out), 40, usd=usd, settle_seconds=0.1)
        assert (summary.stopped, summary.outcomes["ok"] == 40) == (("budget", False) if share < 2 else (None, True))
        assert_all_is_counted(server, later, out, usd)


@pytest.mark.parametrize("first", [[], ["unavailable"]])
def test_a_budget_holds_where_a_creation_was_under_way_at_a_kill(out: Path, monkeypatch: pytest.MonkeyPatch, first: list[str]) -> None:
    with fake_openai.serving(wordy=1, chars_per_token=1) as server:
        later, usd = creations(server, monkeypatch, *first, "held"), 1.2 * worst_case(40)
        asker = start(server.url, out, n=40, usd=usd, settle_seconds=0.1)
        while not later:
            time.sleep(0.01)
        asker.kill()
        asker.wait()
        assert ask(server.url, str(out), 40, usd=usd, settle_seconds=0.1).stopped == "budget"
        assert_all_is_counted(server, later, out, usd)


@pytest.mark.parametrize("gone", ["batch", "output file", "error file"])
def test_what_the_server_no_longer_has_is_said_and_asked_again_and_stays_counted(out: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], gone: str) -> None:
    with fake_openai.serving(fates="expired:0.5") as server:
        answered = server.batches.answer

        def answer(call: Any) -> Any:
            first = next(iter(server.batches.made.values()), {"status": None})
            if first["status"] == "expired":
                if gone == "batch" and call.path.endswith(first["id"]):
                    raise fake_openai.Refused(404, f"No batch found with id '{first['id']}'.", None, "batch_id")
                if gone != "batch":
                    server.batches.files.pop(first[gone.replace(" ", "_") + "_id"], None)
            return answered(call)

        monkeypatch.setattr(server.batches, "answer", answer)
        summary = ask(server.url, str(out), 40, settle_seconds=0.1)
        lost = {"batch": 40, "output file": 40, "error file": 20}[gone]
        assert (summary.outcomes, summary.lost) == ({"ok": 40}, lost)
        counts = server.counts()
        assert (counts["answered"], counts["rebilled"]) == (40, 0 if gone == "error file" else 20)
        assert counts["usd"] <= sum(line["usd"] for line in ledger(out) if "usd" in line)
    assert "no longer has" in capfd.readouterr().err


def test_a_batch_of_an_earlier_start_that_the_server_no_longer_has_is_no_dead_end(out: Path) -> None:
    with Ledger(Path(f"{out}.ledger.jsonl")) as book:
        for request in questions(3):
            book.sent(request.key, 1, f"{batch.VIA}gone", 1e-4)
        book.note({"part": "gone", "batch": "batch_gone"})
    with fake_openai.serving() as server:
        assert ask(server.url, str(out), 5, usd=5e-4, settle_seconds=0.1).lost == 3
        once_each(server, 5)
    assert [(line["error"]["type"], line["usd"]) for line in ledger(out) if line.get("error")] == LOST


def moment(out: Path) -> str:
    """What a killed process was at, by its ledger."""
    path = Path(f"{out}.ledger.jsonl")
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    last = json.loads(lines[-1]) if lines else {}
    kinds = {"sent": "creation", "batch": "polling or download", "key": "merging, or the next upload"}
    return next((kinds[name] for name in kinds if name in last), "upload")


def killed_and_not(tmp_path: Path, seed: int, kills: int) -> Counter[str]:
    """A run that is killed so often at random moments is as one that is not: same file, same bill. Returns what it was at when killed."""
    whole, out, moments, rng = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl", Counter[str](), random.Random(seed)
    with fake_openai.process(seed=seed, **DISTURBED) as server:
        asker, began = start(server.url, whole), time.monotonic()
        assert asker.wait(120) == 0
        needed, expected = time.monotonic() - began, server.counts()
    with fake_openai.process(seed=seed, **DISTURBED) as server:
        while moments.total() < kills:
            asker = start(server.url, out)
            time.sleep(rng.uniform(0, needed / 2))
            if asker.poll() == 0:  # it was through before it was to be killed
                break
            asker.kill()
            assert asker.wait(60) == -signal.SIGKILL
            moments[moment(out)] += 1
        assert start(server.url, out).wait(120) == 0
        counts = server.counts()
    assert out.read_bytes() == whole.read_bytes()
    assert counts["rebilled"] == counts["same_batches"] == 0, counts
    same = ("questions", "answered", "billed", "usd")
    assert [counts[name] for name in same] == [expected[name] for name in same]
    return moments


def test_a_run_that_is_killed_is_as_one_that_is_not(tmp_path: Path) -> None:
    assert killed_and_not(tmp_path, seed=1, kills=3).total() > 0


@pytest.mark.long
def test_twenty_five_kills(tmp_path: Path) -> None:
    moments, seed = Counter[str](), 100
    while moments.total() < 25:
        (tmp_path / str(seed)).mkdir()
        moments += killed_and_not(tmp_path / str(seed), seed, min(5, 25 - moments.total()))
        seed += 1
    print(f"\n{moments.total()} kills, in {seed - 100} runs, while at:", dict(moments))

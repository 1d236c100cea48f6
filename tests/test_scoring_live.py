"""Nothing is paid for twice: faults, kills, stops and budgets, over HTTP against a server that counts as a provider bills."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_rig import KEY, accounted, fake_openai, lines, pending, process, run, same_files, some_data, words

from phased_ift_jax.records import InstructionRecord, Source, Turn, UserError
from phased_ift_jax.scoring import difficulty, live, money, pace
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.request import Reading, Request, Settings, Summary

QUESTION = difficulty.Settings("gpt-4o-mini", "json_schema")
PARSE = difficulty.parser(QUESTION)
PRICE = money.PRICES["gpt-4o-mini"]


def questions(count: int, start: int = 0) -> list[Request]:
    turns = [Turn(f"Name {n} things that are {'very ' * (n % 30)}round.", "A ball. " * (n % 50)) for n in range(start, start + count)]
    return [difficulty.request_of(InstructionRecord(str(n), (turn,), Source("", n)), QUESTION) for n, turn in enumerate(turns)]


def ask(requests: list[Request], path: Path, url: str, limit: float | None = None, parse: Any = PARSE, **options: Any) -> tuple[Summary, Ledger]:
    with Ledger(path, KEY) as ledger:
        budget = money.Budget(limit, PRICE, ledger.spent_usd, {key: sent.reserved_usd for key, sent in ledger.pending.items()})
        server = Settings(KEY, url, **{"concurrency": 32, "timeout_seconds": 1.0, "settle_seconds": 0.5} | options)
        summary = asyncio.run(live.ask(requests, ledger, budget, server, parse))
        assert budget.reserved == pytest.approx(sum(sent.reserved_usd or 0 for sent in ledger.pending.values()), abs=1e-12)
        return summary, ledger


# --- faults --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [200, pytest.param(5000, marks=pytest.mark.long)])
def test_with_a_fifth_of_faults_every_record_is_scored_or_listed_and_no_answer_is_asked_for_again(
    count: int, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, count), tmp_path / "scored.jsonl"
    with fake_openai.process(faults=0.2, seed=1, retry_after=0.3, latency=0.02) as server:
        argv = words(data, out, server.url, "--concurrency", "64", "--budget_usd", "50")
        assert run(argv, monkeypatch) == 0
        counts, before = server.counts(), (out.read_bytes(), (tmp_path / "scored.ledger.jsonl").read_bytes())
        assert run(argv, monkeypatch) == 0
        assert server.counts()["arrivals"] == counts["arrivals"], "everything has ended: another start asks nothing"
    assert before == (out.read_bytes(), (tmp_path / "scored.ledger.jsonl").read_bytes())
    assert counts["rebilled"] == 0
    assert counts["too_early"] == 0
    assert set(counts["kinds"]) >= ({"ok", *fake_openai.KINDS} if count > 1000 else {"ok", "late", "fraction", "refusal"})
    scored, unscored = accounted(out)
    assert len(scored) + sum(unscored.values()) == count
    assert set(unscored) <= {"refused", "filtered", "unparseable", "out_of_range", "failed"}
    assert unscored["failed"] == 0
    # the numbers are those that the server gave, and no others
    given = {line["reply"]["choices"][0]["message"]["content"] for line in lines(tmp_path / "scored.ledger.jsonl") if line.get("reply")}
    told = {(row["instruction_difficulty"], row["response_difficulty"]) for row in lines(out)}
    assert {json.dumps(dict(zip(difficulty.PARTS, pair, strict=True))) for pair in told} <= given
    ledger_usd = sum(line["usd"] for line in lines(tmp_path / "scored.ledger.jsonl") if "key" in line)
    assert counts["usd"] <= ledger_usd + 1e-9
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 5
    assert not [path for path in files if KEY in path.read_text()]
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize("options", [{"keeps": 0}, {"store_delay": 60}])
def test_where_the_server_keeps_no_reply_a_lost_one_is_asked_for_again_and_counted(options: dict[str, float], tmp_path: Path) -> None:
    with fake_openai.process(faults=0.3, kinds="late,cut,truncated", seed=3, **options) as server:
        summary, ledger = ask(questions(60), tmp_path / "ledger.jsonl", server.url, timeout_seconds=0.5, settle_seconds=0.2)
        counts = server.counts()
    assert summary.outcomes == {"ok": 60}
    assert summary.lost == sum(counts["kinds"][kind] for kind in ("late", "cut", "truncated")) == counts["rebilled"] > 0
    assert counts["usd"] <= ledger.spent_usd


def test_retry_after_is_honoured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "BACKOFF", 0.01)
    with fake_openai.process(faults=0.5, kinds="retry_seconds,retry_date", retry_after=1.2) as server:
        summary, _ = ask(questions(60), tmp_path / "ledger.jsonl", server.url)
        counts = server.counts()
    assert summary.outcomes == {"ok": 60}
    assert min(counts["kinds"]["retry_seconds"], counts["kinds"]["retry_date"]) > 5
    assert counts["too_early"] == 0


def test_what_cannot_be_found_out_now_is_left_to_the_next_start(tmp_path: Path) -> None:
    """A stop while the server has not yet listed replies that got lost: they are not sent again, and the next start finds them."""
    with fake_openai.process(faults=1.0, kinds="late", store_delay=2.5) as server:
        asked = questions(20)
        threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
        summary, ledger = ask(asked, tmp_path / "ledger.jsonl", server.url, timeout_seconds=0.3, settle_seconds=60)
        assert (summary.stopped, len(ledger.pending)) == ("signal", 20)
        summary, ledger = ask(asked, tmp_path / "ledger.jsonl", server.url, settle_seconds=60)
        assert (summary.stopped, summary.found, summary.lost, len(ledger.pending)) == (None, 20, 0, 0)
        assert server.counts()["billed"] == 20


def test_a_question_without_a_number_is_asked_twice_and_no_more(tmp_path: Path) -> None:
    with fake_openai.process(faults=1.0, kinds="fraction,nan,empty,range,length") as server:
        for _ in range(3):
            summary, ledger = ask(questions(30), tmp_path / "ledger.jsonl", server.url)
        assert server.counts()["billed"] == ledger.answers == 60
    assert summary == Summary()


def test_a_server_that_is_away_is_one_line_and_the_same_command_goes_on(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 20), tmp_path / "scored.jsonl"
    monkeypatch.setattr(live, "LONGEST", 0.01)
    assert run(words(data, out, "http://127.0.0.1:9/v1"), monkeypatch) == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "cannot be reached" in errors[0]
    assert "the same command goes on" in errors[0]
    with fake_openai.process() as server:
        assert run(words(data, out, server.url), monkeypatch) == 0
    assert len(lines(out)) == 20


@pytest.mark.parametrize(("key", "options", "says"), [("sk-wrong-0123456789", {}, "Incorrect API key"), (KEY, {"faults": 1.0, "kinds": "quota"}, "quota")])
def test_what_concerns_all_questions_ends_the_asking_in_one_line_without_the_key(
    key: str, options: dict[str, Any], says: str, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 50), tmp_path / "scored.jsonl"
    with fake_openai.process(**options) as server:
        assert run(words(data, out, server.url), monkeypatch, key=key) == 2
    told = capfd.readouterr()
    assert [says in line for line in told.err.splitlines() if line.startswith("error:")] == [True]
    assert "[the key]" in told.err or key == KEY
    assert key not in told.err + told.out + (tmp_path / "scored.ledger.jsonl").read_text()
    assert not out.exists()


def test_what_a_model_does_not_take_is_left_out_or_told(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 10), tmp_path / "scored.jsonl"
    with fake_openai.process(unsupported="response_format") as server:
        for _ in range(2):
            assert run(words(data, out, server.url), monkeypatch) == 0
            assert [line["status"] for line in lines(tmp_path / "scored.ledger.jsonl") if line.get("error")] == [400, 400], "two forms of the first question"
            assert server.counts()["arrivals"] == len(lines(out)) == 10
    with fake_openai.process(unsupported="temperature") as server:
        assert run(words(data, tmp_path / "other.jsonl", server.url), monkeypatch) == 2
    assert "--temperature none" in capsys.readouterr().err
    with fake_openai.process(unsupported="store") as server:
        assert run(words(data, tmp_path / "third.jsonl", server.url), monkeypatch) == 2
        assert "--no_store" in capsys.readouterr().err
        assert run(words(data, tmp_path / "third.jsonl", server.url, "--no_store"), monkeypatch) == 0


# --- kills and stops -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_any_moment_nothing_is_billed_twice_and_the_file_is_the_same(kills: int, tmp_path: Path, shared_data: Path) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 40 * kills + 80)
    options = {"faults": 0.2, "seed": 7, "latency": 0.2, "jitter": 0.9, "retry_after": 0.2}
    chance = random.Random(kills)

    def argv(server: Any, name: str, concurrency: int) -> list[str]:
        return words(data, tmp_path / name, server.url, "--concurrency", str(concurrency), "--budget_usd", "50", "--settle_seconds", "2")

    with fake_openai.process(**options) as server:
        assert process(argv(server, "whole.jsonl", 32)).wait(600) == 0
    with fake_openai.process(**options) as server:
        under_way = killed = 0
        while killed < kills:
            verb = process(argv(server, "killed.jsonl", 8))
            before, until = server.counts()["arrivals"], time.monotonic() + 120
            while verb.poll() is None and server.counts()["arrivals"] == before and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.8))
            if verb.poll() is not None:
                break
            verb.send_signal(signal.SIGKILL)
            verb.wait()
            killed += 1
            under_way += bool(pending(tmp_path / "killed.ledger.jsonl"))
        assert killed == kills, "the data end too soon"
        assert process(argv(server, "killed.jsonl", 32)).wait(600) == 0
        counts = server.counts()
    assert under_way > kills / 2, "most kills have met requests under way"
    assert counts["rebilled"] == 0
    assert not pending(tmp_path / "killed.ledger.jsonl")
    assert same_files(tmp_path / "killed.jsonl", tmp_path / "whole.jsonl")


def test_an_answer_that_takes_longer_than_it_takes_to_show_is_awaited_after_a_kill(tmp_path: Path, shared_data: Path) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 6), tmp_path / "scored.jsonl"
    with fake_openai.process(latency=3.0) as server:
        argv = [*words(data, out, server.url), "--timeout_seconds", "8", "--settle_seconds", "0.5"]
        verb = process(argv)
        while server.counts()["arrivals"] < 2:
            time.sleep(0.05)
        verb.kill()
        verb.wait()
        assert pending(tmp_path / "scored.ledger.jsonl")
        assert process(argv).wait(120) == 0
        counts = server.counts()
    assert (counts["billed"], counts["rebilled"]) == (6, 0)
    assert len(lines(out)) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_awaits_what_is_paid_for_and_the_same_command_goes_on(number: signal.Signals, tmp_path: Path, shared_data: Path) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 150), tmp_path / "scored.jsonl"
    with fake_openai.process(latency=0.4) as server:
        argv = words(data, out, server.url, "--concurrency", "16")
        verb = process(argv)
        while server.counts()["billed"] < 20:
            time.sleep(0.05)
        verb.send_signal(number)
        said, _ = verb.communicate(timeout=60)
        assert verb.returncode == 75
        assert "the same command goes on" in said
        counts = server.counts()
        assert 20 <= counts["billed"] < 150
        assert not pending(tmp_path / "scored.ledger.jsonl")
        assert sum("key" in line for line in lines(tmp_path / "scored.ledger.jsonl")) == counts["arrivals"] == counts["billed"]
        assert not out.exists(), "a file that is there is whole"
        assert process(argv).wait(120) == 0
        assert server.counts()["billed"] == 150
    assert len(lines(out)) == 150


def test_a_second_process_is_refused(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 5), tmp_path / "scored.jsonl"
    with Ledger(tmp_path / "scored.ledger.jsonl"):
        assert run(words(data, out, "http://127.0.0.1:9/v1"), monkeypatch) == 2
    assert capsys.readouterr().err == f"error: another process is writing '{tmp_path / 'scored.ledger.jsonl'}'; wait for it, or name another --out\n"


# --- the budget ----------------------------------------------------------------------------------------------------------------------


def test_the_budget_is_never_exceeded(tmp_path: Path) -> None:
    _many_budgets(range(6), tmp_path)


@pytest.mark.long
def test_the_budget_is_never_exceeded_in_a_hundred_runs(tmp_path: Path) -> None:
    _many_budgets(range(100), tmp_path)


def _many_budgets(seeds: range, tmp_path: Path) -> None:
    """Each a run with a random budget and its own faults, stopped by kills (in a process) in every third, and started again until nothing is left to do."""
    stopped = 0
    for seed in seeds:
        chance, path, asked = random.Random(seed), tmp_path / f"{seed}.jsonl", questions(60, 100 * seed)
        whole = sum(PRICE.worst_case(request.body) for request in asked)
        limit = whole * chance.choice([0.02, 0.1, 0.3, 0.6, 1.5])
        options: dict[str, Any] = {"seed": seed, "faults": chance.choice([0, 0.2, 0.5]), "chars_per_token": chance.choice([1, 4]), "wordy": chance.randint(0, 1)}
        options |= {"keeps": chance.randint(0, 1), "kinds": "retry_seconds,server_error,drop,cut,truncated,late,fraction"}
        with fake_openai.process(**options, latency=0.03, retry_after=0.1) as server:
            for start in range(3):
                child = os.fork() if seed % 3 == 0 and start < 2 else None
                if child == 0:
                    ask(asked, path, server.url, limit, timeout_seconds=0.4, settle_seconds=0.2)
                    os._exit(0)
                if child is None:
                    summary, ledger = ask(asked, path, server.url, limit, timeout_seconds=0.4, settle_seconds=0.2)
                else:
                    time.sleep(chance.uniform(0.3, 1.5))
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
            time.sleep(0.1)
            billed = server.counts()["usd"]
        assert billed <= limit, f"seed {seed}"
        assert ledger.spent_usd <= limit, f"seed {seed}"
        assert summary.stopped in (None, "budget")
        stopped += summary.stopped == "budget"
        if summary.stopped:  # nothing is left unspent that a question would have fitted into
            assert limit - ledger.spent_usd < max(PRICE.worst_case(request.body) for request in asked) * (1 + 1e-6)
    assert 0 < stopped < len(seeds)


@settings(max_examples=200)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=300), system=st.text(st.characters(exclude_categories=["Cs"]), max_size=300))
def test_no_bill_is_above_the_worst_case(text: str, system: str) -> None:
    body = difficulty.request_of(InstructionRecord("1", (Turn(text, system),), Source("", 1), system), QUESTION).body
    server = fake_openai.FakeOpenAI(chars_per_token=1, wordy=1)
    usage = {"prompt_tokens": server.prompt_tokens(dict(body)), "completion_tokens": body["max_completion_tokens"]}
    server.loop.close()
    assert PRICE.cost(usage) <= PRICE.worst_case(body)


def test_a_budget_without_a_price_or_a_bound_is_refused() -> None:
    with pytest.raises(UserError, match="--price"):
        money.Budget(1.0, money.price_of("somebodys-model"))
    with pytest.raises(UserError, match="no amount"):
        money.Budget(float("nan"), PRICE)
    with pytest.raises(UserError, match="max_completion_tokens"):
        PRICE.worst_case({"model": "m", "messages": []})
    assert money.price_of("gpt-4o-mini-2024-07-18") == PRICE
    assert money.price_of("gpt-4o-2024-05-13") != money.price_of("gpt-4o-2024-08-06") == money.price_of("gpt-4o")


# --- the ledger ----------------------------------------------------------------------------------------------------------------------


def test_what_a_power_cut_leaves_is_made_good(tmp_path: Path) -> None:
    """The last line torn at each byte, or a line within unreadable: the server is asked what became of it, and nothing is billed again."""
    path = tmp_path / "ledger.jsonl"
    with fake_openai.process() as server:
        asked = questions(8)
        _, ledger = ask(asked, path, server.url)
        whole = path.read_bytes()
        keeper = ledger.spent_usd
        for size in [1, 40, 200, len(whole.splitlines(keepends=True)[-1]) - 1]:
            path.write_bytes(whole[:-size])
            summary, ledger = ask(asked, path, server.url)
            assert (summary.found, summary.lost, ledger.unreadable) == (1, 0, 0)
            assert ledger.spent_usd == pytest.approx(keeper, abs=1e-12)
        noted = whole.splitlines(keepends=True)
        broken = next(index for index, line in enumerate(noted) if line.startswith(b'{"key"'))
        path.write_bytes(b"".join([*noted[:broken], b"\0" * 50 + b"\n", *noted[broken + 1 :]]))
        summary, ledger = ask(asked, path, server.url)
        assert (summary.found, ledger.unreadable) == (1, 1)
        assert server.counts()["billed"] == 8


def test_a_reply_damaged_in_its_middle_is_told_and_not_paid_for_again(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    with fake_openai.process() as server:
        asked = questions(3)
        ask(asked, path, server.url)
        noted = path.read_bytes().splitlines(keepends=True)
        hit = next(index for index, line in enumerate(noted) if line.startswith(b'{"key"'))
        noted[hit] = noted[hit].replace(b'"choices"', b'"choi\0es', 1)
        path.write_bytes(b"".join(noted))
        _, ledger = ask(asked, path, server.url)
        assert server.counts()["billed"] == 3
    with Ledger(path) as ledger:
        readings = [ledger.reading(one.key, PARSE) for one in asked]
    assert sorted(one.outcome for one in readings if one) == ["failed", "ok", "ok"]
    assert "damaged" in next(one.reason for one in readings if one and one.outcome == "failed")


def test_an_index_made_anew_is_the_one_that_was_kept(tmp_path: Path) -> None:
    with fake_openai.process(faults=0.5, seed=5, retry_after=0.05) as server:
        _, ledger = ask(questions(100), tmp_path / "ledger.jsonl", server.url, timeout_seconds=0.4, settle_seconds=0.2)
    with Ledger(tmp_path / "ledger.jsonl") as again:
        for name in ("_last", "_earlier", "_attempts", "pending", "answers", "unpriced", "size"):
            assert getattr(again, name) == getattr(ledger, name), name
        assert again.spent_usd == pytest.approx(ledger.spent_usd, abs=1e-12)


def test_parsing_is_a_second_pass_that_costs_nothing(tmp_path: Path) -> None:
    with fake_openai.process() as server:
        asked = questions(10)
        ask(asked, tmp_path / "ledger.jsonl", server.url)
        stricter = lambda reply: Reading("refused", reason="no") if "4" in reply["choices"][0]["message"]["content"] else PARSE(reply)  # noqa: E731
        _, ledger = ask(asked, tmp_path / "ledger.jsonl", server.url, parse=stricter)
        assert server.counts()["arrivals"] == 10
    with Ledger(tmp_path / "ledger.jsonl") as ledger:
        assert {ledger.reading(one.key, stricter).outcome for one in asked} == {"ok", "refused"}  # type: ignore[union-attr]


def test_order_edits_elsewhere_and_restarts_change_nothing(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 30), tmp_path / "scored.jsonl"
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("How hard? {record}")
    with fake_openai.process() as server:
        assert run(words(data, out, server.url), monkeypatch) == 0
        first = {row["instruction"]: row["difficulty"] for row in lines(out)}
        some_data(data, shared_data, 30, start=5)
        data.write_text("".join([*data.read_text().splitlines(keepends=True)[::-1], data.read_text().splitlines(keepends=True)[0]]))
        assert run(words(data, out, server.url), monkeypatch) == 0
        assert server.counts()["billed"] == 35, "five are new, and one is there twice"
        assert len(lines(out)) == 31
        assert all(row["difficulty"] == first.get(row["instruction"], row["difficulty"]) for row in lines(out))
        assert run(words(data, out, server.url, "--prompt_file", str(prompt)), monkeypatch) == 0
        assert server.counts()["billed"] == 65
        assert {row["prompt_version"][:4] for row in lines(out)} == {"own-"}
        assert run(words(data, out, server.url), monkeypatch) == 0
        assert server.counts()["billed"] == 65


def test_the_key_is_in_no_line_whatever_a_server_says(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.jsonl", KEY) as ledger:
        key = questions(1)[0].key
        ledger.answered(key, 1, "live", usd=0.0, error={"message": f"Incorrect API key provided: {KEY}"}, request_id=KEY)
        ledger.answered(key, 2, "live", usd=0.0, reply={"choices": [{"message": {"content": f"It is {KEY}."}}], "model": KEY})
    assert KEY not in (tmp_path / "ledger.jsonl").read_text()
    assert (tmp_path / "ledger.jsonl").read_text().count("[the key]") == 4


# --- pace ----------------------------------------------------------------------------------------------------------------------------


def test_limits_that_a_server_tells_are_kept(tmp_path: Path) -> None:
    """300 requests where 240 may come at once and 10 a second after: hardly any is turned away, and no time is wasted."""
    with fake_openai.process(rpm=240, latency=0.02) as server:
        began = time.monotonic()
        summary, _ = ask(questions(280), tmp_path / "ledger.jsonl", server.url)
        took = time.monotonic() - began
        turned_away = server.counts()["kinds"].get("limited", 0)
    assert summary.outcomes == {"ok": 280}
    assert turned_away <= 32, "those that left before the first reply told the limit"
    assert took < 40 / 4 * 2 + 20


def test_words_for_time_are_read() -> None:
    told: Mapping[str, float | None] = {"1s": 1, "6m0s": 360, "20ms": 0.02, "1h2m3.5s": 3723.5, "0.25": 0.25, "soon": None, "1s?": None, "": None}
    assert {text: pace.seconds(text) for text in told} == told
    assert pace.retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert pace.retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0
    assert pace.retry_after({"retry-after": "soon"}) == pace.retry_after({}) == 0

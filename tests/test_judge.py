"""The verb `judge`: every prompt is judged or listed, in both orders, by set and id; nothing is paid twice; a judge that is dead gives no verdict."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scoring_rig import KEY, QUICK, ROOT, fake_openai, lines, pending, process, run

from phased_ift_jax import judge
from phased_ift_jax.data.answers import Answer, Pair
from phased_ift_jax.evaluation.comparison import compare
from phased_ift_jax.evaluation.forgetting import exact_match
from phased_ift_jax.evaluation.judging import exact
from phased_ift_jax.evaluation.judgments import read_judgments, row_of
from phased_ift_jax.scoring import live

AWAY = "http://127.0.0.1:9/v1"
SETS = {"sinstruct": 252, "wizardlm": 218, "koala": 180, "vicuna": 80, "oasst": 188, "anthropic": 129}
KEYS = {"wizardlm": ("idx", "Instruction"), "koala": ("id", "prompt"), "vicuna": ("question_id", "text")}
DEADLY = "refusal,filter,filter_400,fraction,nan,empty,server_error,unavailable"  # each arrival costs one reply at most, in both modes
Row = dict[str, Any]


def prompts(shared_data: Path, each: int | None = None) -> list[Row]:
    """Those of the six sets, `each` of every set at most."""
    found = []
    for test_set, size in SETS.items():
        rows = lines(shared_data / "testsets" / f"{test_set}_test_set.jsonl")
        assert len(rows) == size
        number, text = KEYS.get(test_set, ("id", "instruction"))
        found += [{"set": test_set, "id": str(row[number]), "instruction": row[text], "input": row.get("input") or ""} for row in rows[:each]]
    return found


def plain(count: int, test_set: str = "tasks") -> list[Row]:
    return [{"set": test_set, "id": str(number), "instruction": f"Name {number} fish.", "input": ""} for number in range(count)]


def answers(path: Path, asked: list[Row], response: Callable[[Row], str], **more: Any) -> Path:
    """A file of answers as `generate` writes it."""
    stated = {"model": path.stem, "temperature": 0.0, "finish_reason": "eos"}
    rows = [row | stated | {"response": (said := response(row)), "response_tokens": len(said.split())} | more for row in asked]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def two(tmp_path: Path, asked: list[Row]) -> list[str]:
    """Made-up answers of two models, which differ."""
    chance = random.Random(3)
    new = answers(tmp_path / "new.jsonl", asked, lambda row: f"New: {row['id']} " + "and more " * chance.randint(0, 30))
    old = answers(tmp_path / "old.jsonl", asked, lambda row: f"Old: {row['id']} " + "or so " * chance.randint(0, 30))
    return [str(new), str(old)]


def words(files: list[str], out: Path, url: str, *more: str) -> list[str]:
    return [*files, "--out", str(out), "--model", "gpt-4o-mini", "--base_url", url, *QUICK, *more]


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    return lambda argv, key=KEY: run(argv, monkeypatch, key, judge.main)


def card_of(out: Path) -> dict[str, Any]:
    return json.loads(out.with_name(f"{out.stem}.card.json").read_text())


def counts_of(out: Path) -> Counter[str]:
    """Win, tie, lose, invalid, counted here."""
    found = Counter[str]()
    for row in lines(out):
        scores = [order["scores"] for order in row["orders"]]
        balance = sum((one > other) - (one < other) for one, other in filter(None, scores))
        found["invalid" if None in scores else "win" if balance > 0 else "lose" if balance < 0 else "tie"] += 1
    return found


# --- what is asked, and what is made of it


def test_both_orders_are_asked_and_matched_by_set_and_id(tmp_path: Path, shared_data: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    asked, out = prompts(shared_data, 4), tmp_path / "judgments.jsonl"
    new, old = files = two(tmp_path, asked)
    with fake_openai.process(seed=2) as server:
        assert judged(words(files, out, server.url, "--json")) == 0
        counts = server.counts()
        assert counts["billed"] == 2 * len(asked)
        told, first, before = json.loads(capsys.readouterr().out), out.read_bytes(), (tmp_path / "judgments.ledger.jsonl").read_bytes()
        shuffled = Path(old).read_text().splitlines(keepends=True)
        random.Random(0).shuffle(shuffled)
        Path(old).write_text("".join(shuffled))
        assert judged(words(files, out, server.url)) == 0
        assert server.counts()["arrivals"] == counts["arrivals"]
    assert (first, before) == (out.read_bytes(), (tmp_path / "judgments.ledger.jsonl").read_bytes())
    assert told == json.loads(json.dumps(compare(read_judgments(out))))
    rows, replies = lines(out), {line["key"]: line["reply"] for line in lines(tmp_path / "judgments.ledger.jsonl") if "key" in line}
    assert [(row["set"], row["id"]) for row in rows] == [(row["set"], row["id"]) for row in asked]
    assert {(row["candidate"], row["baseline"], row["judge"]) for row in rows} == {("new", "old", "gpt-4o-mini")}
    for row in rows:
        said = [json.loads(replies[order["key"]]["choices"][0]["message"]["content"]) for order in row["orders"]]
        assert [order["scores"] for order in row["orders"]] == [[said[0]["answer_1"], said[0]["answer_2"]], [said[1]["answer_2"], said[1]["answer_1"]]]
    for path, place in ((new, 0), (old, 1)):
        known = {(row["set"], row["id"]): row for row in lines(Path(path))}
        for row in rows:
            text = known[row["set"], row["id"]]["response"]
            assert [row["lengths"][unit][place] for unit in ("characters", "words", "tokens")] == [len(text), len(text.split()), len(text.split())]
    assert {kind: told["rules"]["paper"][kind] for kind in ("win", "tie", "lose", "invalid")} == {kind: counts_of(out)[kind] for kind in ("win", "tie", "lose", "invalid")}
    card = card_of(out)
    assert card["questions"] == {"ok": 2 * len(asked)}
    assert card["usd"] == pytest.approx(counts["usd"], abs=1e-6)
    assert card["models"] == {"gpt-4o-mini-2026-01-01": 2 * len(asked)}
    assert (card["judge"], card["candidate"], card["pairs"], card["settings"]["prompt"]["version"]) == ("llm", "new", 24, "preference-1")


def test_the_verdict_is_told_by_each_rule_and_set(tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    files = two(tmp_path, [*plain(30), *plain(20, "others")])
    with fake_openai.process(text='{{"answer_1": 0, "answer_2": 0}}') as server:
        assert judged(words(files, tmp_path / "judgments.jsonl", server.url, "--structured", "none")) == 0
    told = capsys.readouterr().out
    table = {line.split("  ")[0]: line.split() for line in told.splitlines()}
    assert table["paper"][1:6] == table["conservative"][1:6] == ["50", "0", "50", "0", "0"], "zero is a score, and twice zero is a tie"
    assert table["official_script"][1:7] == ["50", "0", "0", "0", "50", "-"]
    assert (table["tasks"][1:4], table["others"][1:4]) == (["30", "0", "30"], ["20", "0", "20"])
    assert "The difference between new and old is within noise: +0.0 points" in told


def test_what_cannot_be_judged_is_named_and_counted(tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    asked, out = [*plain(6), *plain(2, "long"), {"id": "x", "instruction": "No set.", "input": ""}], tmp_path / "judgments.jsonl"
    new, old = two(tmp_path, asked)
    rows = lines(Path(new))
    for row in rows[6:8]:
        row |= {"response": None, "finish_reason": "too_long", "response_tokens": 0}
    rows[0]["response"] = ""
    Path(new).write_text("".join(json.dumps(row) + "\n" for row in rows if row["id"] != "3" or row["set"] == "long"))
    Path(old).write_text("".join(json.dumps(row | {"temperature": 0.5}) + "\n" for row in lines(Path(old)) if row["id"] != "4"))
    with fake_openai.process() as server:
        assert judged(words([new, old], out, server.url)) == 0
        assert server.counts()["billed"] == 2 * 5, "an answer that is empty is an answer"
    told = capsys.readouterr().err
    assert "note: 2 of 9 prompts have nothing to judge (candidate: prompt too long): long/0, long/1\n" in told
    assert "(candidate: prompt not in the file): tasks/3\n" in told
    assert "(baseline: prompt not in the file): tasks/4\n" in told
    assert "no prompt of the set 'long' can be judged" in told
    assert "1 prompts name no set" in told
    assert "made with temperature 0.0 and 0.5" in told
    outcomes = {(row["set"], row["id"]): [order["outcome"] for order in row["orders"]] for row in lines(out)}
    assert len(outcomes) == 9
    assert {prompt for prompt, both in outcomes.items() if both == ["no_answer"] * 2} == {("tasks", "3"), ("tasks", "4"), ("long", "0"), ("long", "1")}
    assert card_of(out)["no_answer"] == {"candidate: prompt too long": 2, "candidate: prompt not in the file": 1, "baseline: prompt not in the file": 1}
    assert sum(counts_of(out).values()) == 9
    assert counts_of(out)["invalid"] == 4


def test_equal_answers_are_asked_about_once_unless_they_are_skipped(tmp_path: Path, judged: Callable[..., int]) -> None:
    asked, out = plain(5), tmp_path / "judgments.jsonl"
    same = [str(answers(tmp_path / name, asked, lambda row, name=name: "Cod." if row["id"] < "3" else name)) for name in ("new.jsonl", "old.jsonl")]
    with fake_openai.process() as server:
        assert judged(words(same, tmp_path / "skipped.jsonl", server.url, "--skip_equal")) == 0
        assert server.counts()["billed"] == 2 * 2
        assert judged(words(same, out, server.url)) == 0
        assert server.counts()["billed"] == 2 * 2 + 3 + 2 * 2
    assert [order["reason"] for order in lines(tmp_path / "skipped.jsonl")[0]["orders"]] == ["equal answers: a tie, not asked"] * 2
    assert [card_of(path)["questions"]["ok"] for path in (tmp_path / "skipped.jsonl", out)] == [4, 7]
    for path in (out, tmp_path / "skipped.jsonl"):
        assert counts_of(path)["tie"] >= 3
        assert json.loads(json.dumps([row_of(judgment) for judgment in read_judgments(path)])) == lines(path)


def test_all_answers_equal_and_skipped_is_a_tie_without_a_question(tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(answers(tmp_path / name, plain(5), lambda _: "Cod.")) for name in ("new.jsonl", "old.jsonl")]
    assert judged(words(files, tmp_path / "judgments.jsonl", AWAY, "--skip_equal"), None) == 0
    assert counts_of(tmp_path / "judgments.jsonl") == {"tie": 5}
    assert "within noise" in capsys.readouterr().out


# --- judges without a question


def test_exact_says_right_or_wrong(tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    asked, out = [row | {"output": f"{row['id']} fish"} for row in plain(6)], tmp_path / "judgments.jsonl"
    right = lambda row: f" {row['id']}\n fish"  # noqa: E731
    new = answers(tmp_path / "new.jsonl", asked, lambda row: right(row) if row["id"] < "5" else "no")
    old = answers(tmp_path / "old.jsonl", asked, lambda row: right(row) if row["id"] < "2" else f"{row['id']} Fish")
    exact = [str(new), str(old), "--judge", "exact"]
    assert judged([*exact, "--out", str(out)], None) == 0
    assert counts_of(out) == {"win": 3, "tie": 3}
    assert lines(out)[2]["orders"][1]["scores"] == [1.0, 0.0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["judgments.card.json", "judgments.jsonl", "new.jsonl", "old.jsonl"], "no ledger: nothing was asked"
    bare = [row | {"output": [row["output"]]} for row in asked]  # of a shape that is no reference
    answers(new, bare, lambda row: right(row) if row["id"] < "5" else "no")
    answers(old, bare, lambda row: right(row) if row["id"] < "2" else f"{row['id']} Fish")
    capsys.readouterr()
    assert judged([*exact, "--out", str(tmp_path / "again.jsonl")], None) == 2
    assert "no prompt has a reference" in capsys.readouterr().err
    data = tmp_path / "tasks.jsonl"  # in the paper's released form, as the quickstart's are
    data.write_text("".join(json.dumps({"id": row["id"], "score": 1, "data": [row["instruction"], row["output"]]}) + "\n" for row in asked[:5]))
    assert judged([*exact, "--out", str(tmp_path / "again.jsonl"), "--references", str(data)], None) == 0
    assert lines(tmp_path / "again.jsonl")[:5] == lines(out)[:5]
    assert counts_of(tmp_path / "again.jsonl") == {"win": 3, "tie": 2, "invalid": 1}


def test_recorded_logs_are_replayed(tmp_path: Path, shared_data: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    logs = [shared_data / "judgments" / f"{test_set}_wrap_reviews_gpt4.json" for test_set in ("vicuna", "koala")]
    out, recorded = tmp_path / "judgments.jsonl", ["--judge", "replay", "--recorded", *map(str, logs)]
    assert judged([*recorded, "--out", str(out), "--model", "gpt-4", "--json"], None) == 0
    assert read_judgments(out) == [judgment for log in logs for judgment in read_judgments(log, "gpt-4")]
    told = json.loads(capsys.readouterr().out)
    assert told["prompts"] == 260
    assert told == json.loads(json.dumps(compare(read_judgments(out))))

    whole = json.loads(logs[0].read_text())["data"]
    asked = [{"set": "vicuna", "id": str(number), "instruction": row["text"], "input": ""} for number, row in enumerate(whole, 1)]
    by_id = dict(zip([row["id"] for row in asked], whole, strict=True))
    files = [str(answers(tmp_path / f"{name}.jsonl", asked[::-1], lambda row, name=name: by_id[row["id"]][name])) for name in ("Answer1", "Answer2")]
    argv = [*files, "--judge", "replay", "--out", str(tmp_path / "again.jsonl"), "--recorded"]
    for source in (str(logs[0]), str(out)):
        assert judged([*argv, source], None) == 0
        assert [row["orders"] for row in lines(tmp_path / "again.jsonl")][::-1] == [row["orders"] for row in lines(out)[:80]]
    assert judged([*argv[1::-1], *argv[2:], str(out)], None) == 0, "the files swapped: the judgments are of other answers, and count for nothing"
    equal_lengths = sum(len(row["Answer1"]) == len(row["Answer2"]) for row in whole)
    assert equal_lengths == 0
    assert counts_of(tmp_path / "again.jsonl") == {"invalid": 80}
    assert "No verdict" in capsys.readouterr().out
    assert judged([*argv[1::-1], *argv[2:], str(logs[0])], None) == 0, "as a log names nobody, the lengths tell"
    assert counts_of(tmp_path / "again.jsonl") == {"invalid": 80}
    assert judged([*two(tmp_path, plain(3)), *argv[2:], str(out)], None) == 2
    assert "--recorded: judgments of other prompts" in capsys.readouterr().err


def test_a_judgment_is_replayed_for_its_own_models_and_lengths_alone(tmp_path: Path, judged: Callable[..., int]) -> None:
    asked, out, again = [row | {"output": "4"} for row in plain(6)], tmp_path / "judgments.jsonl", tmp_path / "again.jsonl"
    new, old = str(answers(tmp_path / "new.jsonl", asked, lambda _: "4")), str(answers(tmp_path / "old.jsonl", asked, lambda _: "5"))
    other = str(answers(tmp_path / "other.jsonl", asked, lambda _: "4"))
    assert judged([new, old, "--judge", "exact", "--out", str(out)], None) == 0
    for files, expected in (((new, old), {"win": 6}), ((old, new), {"invalid": 6}), ((new, other), {"invalid": 6})):
        assert judged([*files, "--judge", "replay", "--recorded", str(out), "--out", str(again)], None) == 0
        assert counts_of(again) == expected
    assert "'new' against 'old'" in lines(again)[0]["orders"][0]["reason"]
    for lengths in ({}, {"characters": [1, 1]}, {"characters": [1, 1], "words": [1, 2]}):
        out.write_text("".join(json.dumps(row | {"lengths": lengths}) + "\n" for row in lines(out)))
        assert judged([new, old, "--judge", "replay", "--recorded", str(out), "--out", str(again)], None) == 0
        assert counts_of(again) == {"invalid": 6}


@settings(deadline=None)
@given(st.text(" \t\n\u2028\u0085ab", max_size=8), st.text(" \t\n\u2028\u0085ab", max_size=8))
def test_right_is_the_same_for_a_judge_and_for_held_out_rows(expected: str, given_answer: str) -> None:
    prompt = Answer("tasks", "1", "Name a fish.", "", given_answer, "eos", None, expected)
    order, _ = exact(Pair(prompt, given_answer, given_answer, "", None), {})
    assert order.scores == (exact_match([(expected, given_answer)]),) * 2


# --- the server, the budget, the end


@pytest.mark.parametrize("kinds", ["server_error", "refusal", "nan"])
def test_a_dead_judge_gives_no_verdict_never_a_tie(
    kinds: str, tmp_path: Path, judged: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(live, "LONGEST", 0.01)
    files, out = two(tmp_path, plain(8)), tmp_path / "judgments.jsonl"
    with fake_openai.process(faults=1.0, kinds=kinds) as server:
        assert judged(words(files, out, server.url, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert {rule: (figures["invalid"], figures["tie"], figures["win_rate"], figures["conclusion"]) for rule, figures in told["rules"].items()} == dict.fromkeys(
        told["rules"], (8, 0, None, "no_verdict")
    )
    assert told["headline"]["conclusion"] == "no_verdict"
    outcome = {"server_error": "failed", "refusal": "refused", "nan": "unparseable"}[kinds]
    assert card_of(out)["orders"] == {outcome: 16}
    assert {order["outcome"] for row in lines(out) for order in row["orders"]} == {outcome}
    with fake_openai.process() as server:  # what failed is asked again by the same command; what was answered, if not with scores, is not
        assert judged(words(files, out, server.url)) == 0
        assert server.counts()["billed"] == (16 if kinds == "server_error" else 0)
    assert ("No verdict" in capsys.readouterr().out) == (kinds != "server_error")


def test_the_budget_holds_and_a_larger_one_goes_on(tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    files, out = two(tmp_path, plain(60)), tmp_path / "judgments.jsonl"
    with fake_openai.process(faults=0.2, seed=4, kinds="cut,late,truncated,server_error,fraction", chars_per_token=1, wordy=1) as server:
        assert judged([*words(files, out, server.url), "--dry_run"], None) == 0
        assert "120, of which 120 are not answered" in capsys.readouterr().out
        assert not (tmp_path / "judgments.ledger.jsonl").exists()
        assert judged(words(files, out, server.url, "--budget_usd", "0.015")) == 75
        assert "a larger --budget_usd goes on" in capsys.readouterr().out
        assert 0.01 < server.counts()["usd"] <= 0.015
        assert not out.exists(), "half a comparison is none"
        assert judged(words(files, out, server.url, "--pilot", "40")) == 0
        assert "drawn at random" in capsys.readouterr().out
        assert judged(words(files, out, server.url, "--budget_usd", "1")) == 0
        assert server.counts()["rebilled"] == 0
    assert len(lines(out)) == 60


def test_a_forecast_knows_that_some_questions_get_no_reply(tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    files, out = two(tmp_path, plain(60)), tmp_path / "judgments.jsonl"
    with fake_openai.process(faults=0.3, kinds="filter_400") as server:
        assert judged(words(files, out, server.url, "--pilot", "40")) == 0
    assert "from 40 questions drawn at random" in capsys.readouterr().out


@pytest.mark.parametrize("each", [10, pytest.param(None, marks=pytest.mark.long)])
def test_batches_judge_as_live_questions_do(each: int | None, tmp_path: Path, shared_data: Path, judged: Callable[..., int]) -> None:
    files = two(tmp_path, prompts(shared_data, each))
    for mode in ("live", "batch"):
        with fake_openai.process(seed=5, faults=0.2, kinds=DEADLY, retry_after=0.1) as server:
            assert judged(words(files, tmp_path / f"{mode}.jsonl", server.url, "--mode", mode)) == 0
            counts = server.counts()
        assert ("completed" in counts["batches"]) == (mode == "batch")
        assert counts["rebilled"] == 0
        assert counts["usd"] <= card_of(tmp_path / f"{mode}.jsonl")["usd"] + 1e-6
    assert (tmp_path / "live.jsonl").read_bytes() == (tmp_path / "batch.jsonl").read_bytes()
    assert 0 < counts_of(tmp_path / "live.jsonl")["invalid"] < len(lines(tmp_path / "live.jsonl")) / 2


@pytest.mark.parametrize(("kills", "each"), [(3, 20), pytest.param(20, None, marks=pytest.mark.long)])
def test_killed_at_any_moment_nothing_is_lost_or_billed_twice_and_the_judgments_are_the_same(kills: int, each: int | None, tmp_path: Path, shared_data: Path) -> None:
    asked = prompts(shared_data, each)
    files, chance = two(tmp_path, asked), random.Random(kills)
    options = {"faults": 0.2, "seed": 7, "latency": 0.1, "jitter": 0.9, "retry_after": 0.2}
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    with fake_openai.process(**options) as server:
        assert process(words(files, whole, server.url, "--budget_usd", "50"), "judge").wait(600) == 0
        assert server.counts()["rebilled"] == 0
    under_way = done = 0
    with fake_openai.process(**options) as server:
        while done < kills:
            verb = process(words(files, killed, server.url, "--budget_usd", "50", "--concurrency", "8"), "judge")
            before, until = server.counts()["arrivals"], time.monotonic() + 120
            while verb.poll() is None and server.counts()["arrivals"] == before and time.monotonic() < until:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 0.8))
            if verb.poll() is not None:
                break
            verb.send_signal(signal.SIGKILL)
            verb.wait()
            done += 1
            under_way += bool(pending(tmp_path / "killed.ledger.jsonl"))
        assert done == kills, "the questions end too soon"
        assert under_way > kills / 2, "most kills have met requests under way"
        assert process(words(files, killed, server.url, "--budget_usd", "50"), "judge").wait(600) == 0
        counts = server.counts()
    assert counts["rebilled"] == counts["too_early"] == 0
    assert not pending(tmp_path / "killed.ledger.jsonl")
    assert killed.read_bytes() == whole.read_bytes()
    assert [(row["set"], row["id"]) for row in lines(killed)] == [(row["set"], row["id"]) for row in asked]
    assert "failed" not in card_of(killed)["orders"]
    assert counts["usd"] <= card_of(killed)["usd"] + 1e-6 <= 50
    assert sum(card_of(killed)["questions"].values()) == 2 * len(asked) == counts["questions"]
    if each is None:
        assert len(asked) == 1047


# --- at the door


def test_no_jax_and_no_openai_before_it_is_needed(tmp_path: Path) -> None:
    files, absent = two(tmp_path, plain(3)), ("jax", "jaxlib", "flax", "optax", "orbax", "torch", "transformers", "tensorflow")
    code = f"import sys; from phased_ift_jax import judge; print([name for name in {(*absent, 'openai', 'scipy')} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"
    with fake_openai.process() as server:
        argv = words(files, tmp_path / "judgments.jsonl", server.url)
        code = f"import sys; from phased_ift_jax import judge; judge.main({argv!r}); print([name for name in {absent} if name in sys.modules])"
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"OPENAI_API_KEY": KEY, "PATH": ""}, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([], "no API key: set the environment variable OPENAI_API_KEY"),
        (["--model", ""], "--model: name the model"),
        (["--model", "somebodys", "--budget_usd", "5"], "--price INPUT OUTPUT"),
        (["--prompt_file", "none.txt"], "--prompt_file: cannot read 'none.txt'"),
        (["--out", "gs://bucket/judgments.jsonl"], "in a bucket, where nothing can be appended"),
        (["--out", "{new}"], "is one of the files that are read"),
        (["--judge", "replay"], "--recorded: name the recorded judgments"),
        (["--recorded", "log.json"], "--recorded: of use to --judge replay only"),
        (["--references", "data.json"], "--references: of use to --judge exact only"),
        (["--judge", "exact"], "no prompt has a reference"),
        (["--judge", "exact", "--limit", "0"], "'0' is no number from 1 on"),
        (["--modle", "x"], "did you mean --mode"),
    ],
)
def test_bad_input_is_one_line(more: list[str], says: str, tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    files = two(tmp_path, plain(3))
    more = [word.format(new=files[0]) for word in more]
    assert judged([*words(files, tmp_path / "judgments.jsonl", AWAY), *more], None) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda rows: [row | {"id": f"x{row['id']}"} for row in rows], "the files answer other prompts, such as 'tasks/0' in"),
        (lambda rows: [row | {"set": "other"} for row in rows], "the files answer other prompts, such as 'tasks/0' in"),
        (lambda rows: [row | {"instruction": "Name a cat."} for row in rows], "the files answer other prompts: '0' of 'tasks' has other words in each"),
        (lambda rows: [*rows, rows[1]], "old.jsonl:4: prompt '1' of 'tasks' is answered a second time"),
        (lambda rows: [rows[0], rows[1] | {"model": "third"}], "old.jsonl:2: answered by 'third', the lines before by 'old'"),
        (lambda rows: [rows[0], {"id": "1", "instruction": "Name 1 fish."}], "old.jsonl:2: not an answer (no 'response')"),
        (lambda rows: [rows[0] | {"response": 5}], "old.jsonl:1: not an answer (`response` is 5, no text)"),
        (lambda rows: [rows[0] | {"id": None}], "old.jsonl:1: not an answer (`id` and `instruction` are needed)"),
        (lambda rows: [[1]], "old.jsonl:1: not an answer (not an object)"),
        (lambda rows: [], "old.jsonl' holds no answer"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(
    spoil: Callable[[list[Row]], list[Row]], says: str, tmp_path: Path, judged: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    new, old = two(tmp_path, plain(3))
    Path(old).write_text("".join(json.dumps(row) + "\n" for row in spoil(lines(Path(old)))))
    assert judged(words([new, old], tmp_path / "judgments.jsonl", AWAY), None) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1
    assert judged(words([new, str(tmp_path / "none.jsonl")], tmp_path / "judgments.jsonl", AWAY), None) == 2
    assert "none.jsonl': No such file" in capsys.readouterr().err
    assert judged(words([new, new], tmp_path / "judgments.jsonl", AWAY), None) == 2
    assert "both the candidate's file and the baseline's" in capsys.readouterr().err
    assert judged(words([new], tmp_path / "judgments.jsonl", AWAY), None) == 2
    assert "1 files of answers; give two" in capsys.readouterr().err

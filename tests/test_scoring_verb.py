"""The verb `score` from outside: what it refuses, what it forecasts, what it writes, and what it does not import."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from scoring_rig import KEY, ROOT, fake_openai, lines, process, run, same_files, some_data, words

from phased_ift_jax.data import readers
from phased_ift_jax.data.row_kinds import row_of
from phased_ift_jax.records import ScoredRecord
from phased_ift_jax.scoring.forecast import Missing, forecast, told
from phased_ift_jax.scoring.ledger import Ledger
from phased_ift_jax.scoring.money import price_of
from phased_ift_jax.scoring.request import Request

AWAY = "http://127.0.0.1:9/v1"


@pytest.mark.parametrize(
    ("module", "absent"),
    [("score", ["jax", "jaxlib", "flax", "optax", "orbax", "openai", "torch", "transformers", "tensorflow"]), ("train", ["openai"]), ("scoring.live", ["jax", "openai"])],
)
def test_what_is_imported(module: str, absent: list[str]) -> None:
    code = f"import sys, phased_ift_jax.{module}; print([name for name in {absent} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_scoring_a_file_from_end_to_end_brings_no_jax(tmp_path: Path, shared_data: Path) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 5)
    with fake_openai.process() as server:
        argv = words(data, tmp_path / "scored.jsonl", server.url)
        code = f"import sys; from phased_ift_jax import score; score.main({argv!r}); print([name for name in ('jax', 'flax', 'transformers') if name in sys.modules])"
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env={"OPENAI_API_KEY": KEY, "PATH": ""}, capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--model", "somebodys", "--budget_usd", "5"], "--price INPUT OUTPUT"),
        (["--budget_usd", "0"], "--budget_usd: 0.0 is no amount"),
        (["--price", "-1", "-1", "--budget_usd", "5"], "--price: -1.0 -1.0 are no prices"),
        (["--price", "nan", "1"], "--price: nan 1.0 are no prices"),
        (["--base_url", "nonsense"], "--base_url: 'nonsense' is no address"),
        (["--base_url", "http://me:secret@127.0.0.1:9/v1?key=secret"], "--base_url: 'http://127.0.0.1:9/v1' is no address"),
        (["--timeout_seconds", "-1"], "--timeout_seconds and --settle_seconds: -1.0 and"),
        (["--settle_seconds", "nan"], "and nan are no times"),
        (["--repeat", "500%"], "'500%' is no share"),
        (["--concurrency", "0"], "'0' is no number from 1 on"),
        (["--out", "gs://bucket/scored.jsonl"], "in a bucket, where nothing can be appended"),
        (["--prompt_file", "none.txt"], "--prompt_file: cannot read 'none.txt'"),
        (["--expected_score", "--reasoning_effort", "low"], "--expected_score"),
        (["--model", " "], "--model"),
        (["--modle", "x"], "did you mean --mode"),
        ([], "no API key: set the environment variable OPENAI_API_KEY"),
        (["--api_key_env", "MY_KEY"], "no API key: set the environment variable MY_KEY"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], says: str, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 5)
    assert run([*words(data, tmp_path / "scored.jsonl", AWAY), *more], monkeypatch, key=None) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("key", ["sk-secret\nsk-another", "\N{LEFT DOUBLE QUOTATION MARK}sk-secret"])
def test_a_key_that_is_none_is_not_told(key: str, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 5)
    assert run(words(data, tmp_path / "scored.jsonl", AWAY), monkeypatch, key=key) == 2
    assert capsys.readouterr().err == "error: OPENAI_API_KEY: holds characters that no key has; was it copied whole, and alone?\n"


def test_answers_that_would_all_be_cut_are_found_with_the_first(
    tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 40)
    with fake_openai.process(faults=1.0, kinds="length") as server:
        assert run(words(data, tmp_path / "scored.jsonl", server.url), monkeypatch) == 2
        assert server.counts()["billed"] <= 2
    assert "cut at its limit of 64 tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("here/scored.jsonl", "lies among the files that are read"),
        ("paid.ledger.jsonl", "named as what lies beside such a file; name it paid.jsonl"),
        ("paid.unscored.jsonl", "name it paid.jsonl"),
    ],
)
@pytest.mark.parametrize("place", ["here", "here/*.jsonl"])
def test_no_file_is_written_over_or_read_as_data(
    place: str, out: str, says: str, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here").mkdir()
    some_data(tmp_path / "here" / "data.jsonl", shared_data, 5)
    kept = Path("paid.ledger.jsonl")
    kept.write_text("a reply that was paid for\n")
    assert run([place, "--out", out, "--scorer", "length"], monkeypatch) == 2
    assert says in capsys.readouterr().err
    assert kept.read_text() == "a reply that was paid for\n"
    assert [path.name for path in Path("here").iterdir()] == ["data.jsonl"]


def test_a_key_in_place_of_its_variable_is_not_told(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 5)
    assert run([*words(data, tmp_path / "scored.jsonl", AWAY), "--api_key_env", "sk-secret"], monkeypatch, key=None) == 2
    error = capsys.readouterr().err
    assert "--api_key_env" in error
    assert "secret" not in error


@pytest.mark.parametrize("usage", [None, {"prompt_tokens": 100}])
def test_a_forecast_needs_replies_that_tell_their_tokens(usage: object, tmp_path: Path) -> None:
    asked = [Request({"model": "gpt-4o-mini", "messages": [{"role": "user", "content": str(number)}], "max_completion_tokens": 64}) for number in range(60)]
    missing = Missing(price_of("gpt-4o-mini"), 1.0)
    for request in asked:
        missing.add(request, settled=False)
    with Ledger(tmp_path / "x.ledger.jsonl") as ledger:
        for request in asked[:40]:
            ledger.answered(request.key, 1, "live", usd=0.1, reply={"choices": [], "usage": usage})
        assert "from the sizes alone" in told(missing, asked[:40], ledger)


def test_a_killed_start_in_batches_ends_as_one_that_was_not(tmp_path: Path, shared_data: Path) -> None:
    """What its batch ends without is asked again by the start that fetches it."""
    data = some_data(tmp_path / "data.jsonl", shared_data, 21)
    for name, kill in (("whole", False), ("killed", True)):
        with fake_openai.process(fates="expired:0.5", batch_seconds=3.0) as server:
            argv = words(data, tmp_path / f"{name}.jsonl", server.url, "--mode", "batch")
            verb = process(argv)
            while kill and not server.counts()["batches"]:
                time.sleep(0.05)
            if kill:
                time.sleep(0.5)  # and the ledger knows of it
                verb.kill()
                verb.wait()
                verb = process(argv)
            assert verb.wait(120) == 0
            assert server.counts()["rebilled"] == 0
    assert len(lines(tmp_path / "whole.jsonl")) == 21
    assert same_files(tmp_path / "killed.jsonl", tmp_path / "whole.jsonl")


def test_equal_records_count_once_in_the_card(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = some_data(tmp_path / "one.jsonl", shared_data, 1).read_text()
    data = tmp_path / "data.jsonl"
    data.write_text(row * 5)
    with fake_openai.process() as server:
        assert run(words(data, tmp_path / "scored.jsonl", server.url), monkeypatch) == 0
        counts = server.counts()
    card = json.loads((tmp_path / "scored.card.json").read_text())
    assert (card["questions"], card["scored"], counts["billed"]) == ({"ok": 1}, 5, 1)
    assert card["tokens"]["input"] == counts["tokens"]["live input"]


def test_no_model_and_no_usable_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "no instruction"}\n')
    assert run([str(data), "--out", str(tmp_path / "scored.jsonl")], monkeypatch) == 2
    assert "--model: name the model" in capsys.readouterr().err
    assert run(words(data, tmp_path / "scored.jsonl", AWAY), monkeypatch) == 2
    assert "no row is usable" in capsys.readouterr().err


def test_a_dry_run_sends_nothing_and_needs_no_key(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = some_data(tmp_path / "data.jsonl", shared_data, 100)
    assert run(words(data, tmp_path / "scored.jsonl", AWAY, "--dry_run"), monkeypatch, key=None) == 0
    said = capsys.readouterr().out
    assert "100, of which 100 are not answered" in said
    assert "at most" in said
    assert list(tmp_path.iterdir()) == [data]
    with fake_openai.process() as server:  # and what it said holds
        assert run(words(data, tmp_path / "scored.jsonl", server.url), monkeypatch) == 0
        counts = server.counts()
    low, high = (float(part.split()[-1].replace(",", "")) for part in said.split("USD")[1].split(";")[0].split(" to "))
    most = float(said.split("USD")[1].split(";")[1].split()[0].replace(",", ""))
    assert low - 0.005 <= counts["usd"] <= high + 0.005
    assert counts["usd"] <= most + 0.005


def test_a_pilot_forecasts_the_rest_and_is_not_paid_for_again(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 250), tmp_path / "scored.jsonl"
    with fake_openai.process(faults=0.1, kinds="filter_400", seed=3) as server:
        argv = words(data, out, server.url)
        assert run([*argv, "--pilot", "60"], monkeypatch) == 0
        said, pilot = capsys.readouterr().out, server.counts()
        assert pilot["answered"] in (60, 61), "the first question may be none of the drawn ones"
        assert not out.exists()
        assert f"250, of which {250 - pilot['answered']} are not answered" in said
        assert "from 60 questions drawn at random and asked" in said, "those that are turned away are among them"
        assert run([*argv, "--dry_run"], monkeypatch, key=None) == 0
        assert re.search(r"^from 6[01] questions drawn at random and asked", capsys.readouterr().out, re.MULTILINE), "a dry run knows the pilot"
        assert run(argv, monkeypatch) == 0
        whole = server.counts()
    assert (whole["answered"], whole["rebilled"]) == (250, 0)
    assert whole["kinds"]["filter_400"] > 10
    rest = whole["tokens"]["live input"] - pilot["tokens"]["live input"]
    low, high = (int(text.replace(",", "")) for text in next(line for line in said.splitlines() if line.startswith("prompt")).split("95 %: ")[1].split(" to "))
    assert low <= rest <= high
    assert high - low < 0.5 * rest


def test_a_forecasts_interval_holds_in_95_of_100() -> None:
    """Over 400 draws from one population, whose cost is no function of size."""
    import random

    chance, hits = random.Random(5), 0
    population = [(size, size * 3 + chance.expovariate(1 / 400)) for size in (chance.lognormvariate(6, 0.7) for _ in range(2000))]
    for _ in range(400):
        chance.shuffle(population)
        sample, rest = population[:100], population[100:]
        told = forecast([size for size, _ in sample], [cost for _, cost in sample], len(rest), sum(size for size, _ in rest))
        hits += told.low <= sum(cost for _, cost in rest) <= told.high
    assert 0.91 <= hits / 400 <= 0.98


def test_the_files_say_the_same(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 60), tmp_path / "scored.jsonl"
    with open(data, "a") as file:
        file.write('{"output": "no instruction"}\n')
    with fake_openai.process(faults=0.3, seed=2, kinds="refusal,filter,filter_400,nan,server_error", noise=0.5) as server:
        assert run(words(data, out, server.url, "--repeat", "50%"), monkeypatch) == 0
        counts = server.counts()
    card, unscored = json.loads((tmp_path / "scored.card.json").read_text()), lines(tmp_path / "scored.unscored.jsonl")
    scored = readers.read(str(out))
    assert not scored.quarantined
    assert len(scored.records) == card["scored"]
    assert [row_of(record.record) for record in scored.records if isinstance(record, ScoredRecord)] == [
        row_of(record) for record in readers.read(str(data)).records if record.id in {one.record.id for one in scored.records if isinstance(one, ScoredRecord)}
    ]
    assert all(row["difficulty"] == round((row["instruction_difficulty"] + row["response_difficulty"]) / 2, 6) for row in lines(out))
    assert {(row["scorer"], row["prompt_version"]) for row in lines(out)} == {("gpt-4o-mini", card["settings"]["prompt"]["version"])}
    assert len(scored.records) + len(unscored) == 61
    assert unscored[-1] | {"reason": ""} == {"id": None, "file": str(data), "line": 61, "outcome": "unusable", "reason": ""}
    assert sum(card["unscored"].values()) == len(unscored)
    assert sum(card["questions"].values()) == counts["answered"] + sum(row["outcome"] in ("unparseable", "out_of_range") for row in unscored) > 60
    assert card["models"] == {"gpt-4o-mini-2026-01-01": counts["billed"]}
    assert (card["tokens"]["input"], card["tokens"]["output"]) == (counts["tokens"]["live input"], counts["tokens"]["live output"])
    assert card["usd"] == pytest.approx(counts["usd"], abs=1e-6)
    assert 10 < card["repeats"]["n"] < 50
    assert 0 <= card["repeats"]["exact"] < 1
    assert f"{len(scored.records)} records scored" in capsys.readouterr().out


def test_stopped_by_the_budget_and_gone_on_with_more(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 60), tmp_path / "scored.jsonl"
    with fake_openai.process() as server:
        assert run(words(data, out, server.url, "--budget_usd", "0.005"), monkeypatch) == 75
        assert "a larger --budget_usd goes on" in capsys.readouterr().out
        assert 0.003 < server.counts()["usd"] <= 0.005
        assert not out.exists()
        assert run(words(data, out, server.url, "--budget_usd", "0.5"), monkeypatch) == 0
        assert server.counts()["billed"] == 60
    assert len(lines(out)) == 60


def test_limit_takes_the_first(tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, out = some_data(tmp_path / "data.jsonl", shared_data, 20), tmp_path / "scored.jsonl"
    with fake_openai.process() as server:
        assert run(words(data, out, server.url, "--limit", "7"), monkeypatch) == 0
        assert server.counts()["billed"] == 7
    assert [row["instruction"] for row in lines(out)] == [row["instruction"] for row in lines(data)[:7]]


def test_a_stream_of_rows_is_what_read_reads(shared_data: Path) -> None:
    path = str(shared_data / "phasedsft" / "en-alpaca52k-stage3.jsonl")
    whole = readers.read(path)
    assert (*whole.records, *whole.quarantined) == tuple(readers.stream(path))

"""Difficulty that is not paid for: imported, by length, by instruction-following difficulty; and what every scorer writes and publishes."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from test_hub import ROOT, Hub, refusal, serving, several, verb

from phased_ift_jax import cli, score
from phased_ift_jax.config import MeshConfig, TrainingConfig
from phased_ift_jax.data import row_kinds
from phased_ift_jax.data.packing import choose_shapes, pack
from phased_ift_jax.data.readers import read
from phased_ift_jax.data.row_kinds import row_of
from phased_ift_jax.data.tokenization import load_tokenizer, tokenize
from phased_ift_jax.models import hf_weights
from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.records import InstructionRecord, Reading, Source, TokenizedExample, UserError
from phased_ift_jax.scoring import scored_file
from phased_ift_jax.scoring.measures import by_rank, import_scores, score_by_ifd, score_by_length
from phased_ift_jax.scoring.outputs import beside, check
from phased_ift_jax.scoring.scored_file import Unscored
from phased_ift_jax.sharding import make_mesh, put
from phased_ift_jax.training.ifd import ratios, summed_losses
from phased_ift_jax.training.step import Trainer


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_scored_file_and_what_lies_beside_it_say_the_same(tmp_path: Path) -> None:
    out = check(str(tmp_path / "new" / "scored.jsonl"), [])
    rows = [{"id": "a", "difficulty": 1.0}, {"id": "b", "difficulty": 4.0}]
    others = [Unscored("c", Source("d.jsonl", 3), "refused", "no"), Unscored(None, Source("odd\udcff.jsonl", 4), "unusable", "not JSON")]
    card = scored_file.write(out, iter(rows), iter(others), {"scorer": "length"})
    assert lines(out) == rows
    assert lines(beside(out, "unscored.jsonl"))[0] == {"id": "c", "file": "d.jsonl", "line": 3, "outcome": "refused", "reason": "no"}
    assert json.loads(beside(out, "card.json").read_text()) == card
    assert (card["scorer"], card["scored"], card["unscored"], card["mean_difficulty"]) == ("length", 2, {"refused": 1, "unusable": 1}, 2.5)
    assert card["sha256"] == hashlib.sha256(out.read_bytes()).hexdigest()
    assert sorted(path.name for path in out.parent.iterdir()) == ["scored.card.json", "scored.jsonl", "scored.unscored.jsonl"]


def test_a_failure_in_the_middle_leaves_the_scored_file_of_before(tmp_path: Path) -> None:
    out = tmp_path / "scored.jsonl"
    scored_file.write(out, [{"id": "a", "difficulty": 2.0}], [], {})
    for wrong in (0.9, 5.1, float("nan")):
        with pytest.raises(AssertionError):
            scored_file.write(out, [{"id": "b", "difficulty": 3.0}, {"id": "c", "difficulty": wrong}], [], {})
        assert lines(out) == [{"id": "a", "difficulty": 2.0}]


@pytest.mark.parametrize(("out", "wanted"), [("gs://b/scored.jsonl", "in a bucket"), ("scored.json", "no .jsonl"), ("{data}", "one of the files that are read")])
def test_out_is_refused_in_one_line(tmp_path: Path, out: str, wanted: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    with pytest.raises(UserError, match=wanted):
        check(out.format(data=data), [str(data)])


# --- import, length ---------------------------------------------------------------------------------------------------------------------


def test_the_official_file_imports_whole(tmp_path: Path, shared_data: Path) -> None:
    out = tmp_path / "scored.jsonl"
    card = scored_file.write(out, *import_scores(read(str(shared_data / "phasedsft/en-alpaca52k-stage3.jsonl")), row_of))
    assert (card["scored"], card["unscored"], round(card["mean_difficulty"], 3)) == (6889, {}, 4.255)
    again = read(str(out))
    assert [(one.record.id, one.difficulty) for one in again.records] == [(row["id"], row["difficulty"]) for row in lines(out)]
    assert sum(not one.record.turns[0].response for one in again.records) == 9
    assert len({one.difficulty for one in again.records}) == 48


def test_what_has_no_score_is_unscored_and_never_a_number(tmp_path: Path) -> None:
    rows = [{"instruction": "a", "output": "b", "score": "3.5\n\n"}, {"instruction": "c", "output": "d"}, {"instruction": "e", "output": "f", "score": "NaN"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows, unscored, _ = import_scores(read(str(tmp_path / "some.jsonl")), row_of)
    assert [row["difficulty"] for row in rows] == [3.5]
    assert [(one.source.line, one.outcome) for one in unscored] == [(2, "unusable"), (3, "unusable")]


@pytest.mark.parametrize("seed", range(20))
def test_difficulty_by_rank_keeps_order_and_ties(seed: int) -> None:
    figures = np.random.default_rng(seed).choice([0.0, 1e-9, 1.0, 1 + 1e-15, 7.5, 1e12], size=1 + seed) if seed % 2 else np.random.default_rng(seed).normal(size=1 + 50 * seed)
    found = by_rank(figures)
    assert found.min() >= 1
    assert found.max() <= 5
    assert (np.sign(found[:, None] - found) == np.sign(figures[:, None] - figures)).all()
    assert by_rank([3.0, 1.0, 2.0, 2.0, 9.0]) == pytest.approx([4, 1, 2.5, 2.5, 5])


def test_many_ranks_stay_apart_when_they_are_read_again() -> None:
    figures = by_rank(np.arange(200_000))
    assert len({row_kinds._difficulty({"difficulty": figure}) for figure in json.loads(json.dumps(figures.tolist()))}) == len(figures)


def test_length_is_characters_of_all_responses_in_the_order_of_the_data(tmp_path: Path) -> None:
    chat = [{"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "ab"), ("user", "r"), ("assistant", "\u00e9\u4e2d"))]
    rows = [{"instruction": "a", "output": "xyz"}, {"messages": chat}, {"instruction": "c", "output": ""}, {"instruction": "d"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = score_by_length(read(str(tmp_path / "some.jsonl")), row_of)
    scored_file.write(tmp_path / "scored.jsonl", *made)
    assert [(row["length"], row["difficulty"], row["scorer"]) for row in lines(tmp_path / "scored.jsonl")] == [(3, 3, "length"), (4, 5, "length"), (0, 1, "length")]
    assert [one.reason.split(" with")[0] for one in made.unscored] == ["unknown shape"]


# --- instruction-following difficulty ---------------------------------------------------------------------------------------------------


def alpaca(shared_data: Path, count: int) -> list[InstructionRecord]:
    return [record for record in read(str(shared_data / "alpaca/random_9k.json")).records[:count] if isinstance(record, InstructionRecord)]


@pytest.fixture(scope="module")
def stories(shared_data: Path) -> tuple[Any, Any, Trainer]:
    folder = open_folder(str(shared_data / "stories260k"))
    trainer = Trainer(folder.config, TrainingConfig(), make_mesh(MeshConfig()), dtype="float32")
    return load_tokenizer(folder.path), hf_weights.load(folder, trainer.shardings.params, "float32"), trainer


def test_packed_and_batched_losses_are_those_of_one_at_a_time(shared_data: Path, stories: tuple[Any, Any, Trainer]) -> None:
    tokenizer, params, trainer = stories
    examples = [one for one in tokenize(alpaca(shared_data, 12), tokenizer, "user_assistant", 512) if isinstance(one, TokenizedExample)]
    alone = Trainer(trainer.model, trainer.training, make_mesh(MeshConfig(), jax.devices()[:1]), dtype="float32")
    one_device = jax.device_put(jax.device_get(params), alone.shardings.params)
    expected = summed_losses(alone, one_device, examples, batch_size=1, packed=False)
    assert summed_losses(alone, one_device, examples, batch_size=5) == pytest.approx(expected, rel=1e-5)
    assert summed_losses(trainer, params, examples, batch_size=len(examples)) == pytest.approx(expected, rel=1e-5)
    shapes = choose_shapes([np.array([len(one.tokens) for one in examples])], 8, 1, 1000.0)
    whole, _ = trainer.evaluate(params, put(pack(examples, shapes), "ABT", trainer.mesh))
    assert expected.sum() == pytest.approx(float(whole), rel=1e-5)


def test_the_ratio_is_that_of_transformers(shared_data: Path, measured: Callable[[str, float], None]) -> None:
    torch = pytest.importorskip("torch", reason="parity is measured against transformers on torch")
    transformers = pytest.importorskip("transformers", reason="parity is measured against transformers")
    records, place = alpaca(shared_data, 20), shared_data / "stories260k"
    found, facts = ratios(records, str(place), "user_assistant")
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32), load_tokenizer(place)

    def loss(prompt: list[int], response: list[int]) -> float:
        ids = torch.tensor([prompt + response])
        labels = torch.tensor([[-100] * len(prompt) + response])
        with torch.no_grad():
            return float(model(input_ids=ids, labels=labels).loss)

    for record, ratio in zip(records, found, strict=True):
        turn = record.turns[0]
        asked = f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction
        prompt = tokenizer(f"<s>User: {asked}</s>\nAssistant:", add_special_tokens=False).input_ids
        whole = tokenizer(f"<s>User: {asked}</s>\nAssistant: {turn.response}", add_special_tokens=False).input_ids[: facts["max_length"]]
        response = whole[len(prompt) :]
        expected = loss(prompt, response) / loss([1], response)
        measured("ifd: relative difference from transformers", abs(ratio / expected - 1))
        assert ratio == pytest.approx(expected, rel=1e-5)


def test_what_cannot_be_measured_is_unscored_with_the_reason(shared_data: Path, tmp_path: Path) -> None:
    chat = [{"role": role, "content": text} for role, text in (("user", "Say one."), ("assistant", "One."), ("user", "Say two."), ("assistant", "Two."))]
    rows = [{"instruction": "Tell a story.", "output": "Once upon a time."}, {"messages": chat}, {"instruction": "x" * 900, "output": "y"}, {"instruction": "q", "output": " "}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reading = read(str(tmp_path / "some.jsonl"))
    made = score_by_ifd(reading, row_of, lambda records: ratios(records, str(shared_data / "stories260k"), "user_assistant"))
    assert [row.get("instruction", "chat") for row in made.rows] == ["Tell a story.", "chat"]
    assert [(one.source.line, one.reason.split(" of ")[0]) for one in made.unscored] == [(3, "a prompt"), (4, "empty response")]
    assert sorted(row["difficulty"] for row in made.rows) == [1, 5]
    assert (made.card["settings"]["max_length"], made.card["settings"]["dtype"]) == (512, "float32")
    nothing = Reading(reading.records[2:], ())
    assert score_by_ifd(nothing, row_of, lambda records: ratios(records, str(shared_data / "stories260k"), "user_assistant")).rows == []


# --- the verb, and the hub --------------------------------------------------------------------------------------------------------------


def test_neither_scorers_nor_calibrate_load_jax_before_it_is_needed() -> None:
    found = "import sys, phased_ift_jax.score, phased_ift_jax.calibrate; print(sorted({'jax', 'flax', 'torch', 'huggingface_hub', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", found], capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"


def test_the_verb_scores_without_a_question(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], compilation_cache: None) -> None:
    data = str(shared_data / "alpaca/random_9k.json")
    measuring = ["--ifd_model", str(shared_data / "stories260k"), "--prompt_template", "alpaca", "--max_length", "256"]
    for scorer, words in (("length", []), ("ifd", measuring)):
        out = tmp_path / f"{scorer}.jsonl"
        assert score.main([data, "--out", str(out), "--scorer", scorer, "--limit", "9", *words]) == 0
        assert f"records scored in '{out}'" in capsys.readouterr().out
        card = json.loads(beside(out, "card.json").read_text())
        assert (card["scorer"], card["data"], card["scored"] + sum(card["unscored"].values())) == (scorer, [data], 9)
        by_figure, by_difficulty = (sorted(lines(out), key=lambda row: row[key]) for key in (scorer, "difficulty"))
        assert [row["id"] for row in by_figure] == [row["id"] for row in by_difficulty]
    assert (card["settings"]["prompt_template"], card["settings"]["max_length"]) == ("alpaca", 256)
    assert score.main([str(out), "--out", str(tmp_path / "again.jsonl"), "--scorer", "import"]) == 0
    assert [row["difficulty"] for row in lines(tmp_path / "again.jsonl")] == [row["difficulty"] for row in lines(out)]


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--scorer", "ifd", "--out", "x.jsonl"], "--ifd_model"),
        (["--scorer", "ifd", "--out", "x.jsonl", "--ifd_model", "nowhere"], "no such folder 'nowhere'"),
        (["--scorer", "length"], "--out"),
        (["--push_to_hub", "scored"], "your-name/"),
        (["--push_to_hub", "org/scored"], "scored.unscored.jsonl"),
    ],
)
def test_what_is_wrong_with_the_command_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], wanted: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("scored.jsonl").write_text('{"instruction": "a", "output": "b"}\n')
    with pytest.raises(SystemExit) as end:
        cli.run(score.main, ["scored.jsonl", *words])
    said = capsys.readouterr().err.splitlines()
    assert (end.value.code, len(said)) == (2, 1), said
    assert wanted in said[0]


def test_a_scored_file_is_published_with_its_card_and_without_raw_replies(tmp_path: Path) -> None:
    data, out, home = tmp_path / "data.jsonl", tmp_path / "out/mine.jsonl", tmp_path / "home"
    data.write_text("".join(json.dumps({"instruction": f"Do {i}", "output": "x" * i}) + "\n" for i in range(5)) + '{"instruction": "d"}\n')
    names = ["scored.jsonl", "scored.unscored.jsonl", "scored.card.json"]
    ours = [out, beside(out, "unscored.jsonl"), beside(out, "card.json")]
    token = {"HF_TOKEN": "made-up"}
    with serving(Hub()) as hub:
        made = verb(hub.url, home, "score", data, "--out", out, "--scorer", "length", "--push_to_hub", "org/one", **token)
        assert made.returncode == 0, made.stderr
        assert f"uploaded: {hub.url}/datasets/org/one" in made.stdout
        beside(out, "ledger.jsonl").write_text('{"reply": "raw"}\n')
        again, whole = several(hub.url, home, ["score", out, "--push_to_hub", "org/two"], ["score", out, "--push_to_hub", "org/whole", "--with_ledger"], **token)
        assert (again.returncode, whole.returncode) == (0, 0), again.stderr + whole.stderr

        for name, also in (("one", set()), ("two", set()), ("whole", {"scored.ledger.jsonl"})):
            repo = hub.repos[f"org/{name}"]
            held = repo.commits[repo.names["main"]]
            assert held.keys() == {*names, "README.md"} | also
            assert [held[part] for part in names] == [path.read_bytes() for path in ours]
            page = held["README.md"].decode()
            assert page.startswith("---\nconfigs:\n- config_name: default\n  data_files: scored.jsonl\n")
            assert "# 5 instructions" in page
            assert "1 unusable" in page
            assert "| 4.5 to 5 | 1 |" in page
            assert json.loads(page.split("````json\n")[1].split("````")[0]) == json.loads(ours[2].read_text())

        elsewhere, stranger = several(hub.url, home, ["score", out, "--push_to_hub", "other/one"], ["score", data, "--push_to_hub", "org/x"], **token)
        assert "set HF_TOKEN" in refusal(elsewhere)
        assert "no such file" in refusal(stranger)
        out.write_text(out.read_text().replace("xxx", "yyy"))
        assert "is not the file that" in refusal(verb(hub.url, home, "score", out, "--push_to_hub", "org/three", **token))
        assert "org/three" not in hub.repos

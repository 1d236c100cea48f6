"""Readers: every row is accounted for, and what is read depends neither on format nor on shape."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from phased_ift_jax.data.readers import read
from phased_ift_jax.data.row_kinds import NO_INPUT, Ids, record_of, row_of
from phased_ift_jax.records import InstructionRecord, ScoredRecord, Source, Turn, UserError

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
GARDEN, BREW = Turn("Name a flower", "A rose.\nRed."), Turn('Say "hi", twice', "hi, hi")


def needs(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs the shared data: no {path}")
    return str(path)


def write(path: Path, rows: list[Any]) -> str:
    """Rows in the format that the extension of `path` says."""
    if path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif path.suffix in (".jsonl", ".ndjson"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            table = csv.DictWriter(file, list(rows[0]))
            table.writeheader()
            table.writerows({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


def lines(path: Path, *rows: Any) -> str:
    """A jsonl file of raw lines: bytes as they are, anything else as JSON."""
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return str(path)


def content(path: str | list[str], append_period: bool = False) -> list[tuple[str, tuple[Turn, ...], str, float | None]]:
    """What was read, without where."""
    reading = read(path, append_period=append_period)
    assert reading.quarantined == ()
    pairs = [(item.record, item.difficulty) if isinstance(item, ScoredRecord) else (item, None) for item in reading.records]
    return [(record.id, record.turns, record.system, difficulty) for record, difficulty in pairs]


def triple(turn: Turn, **more: object) -> dict[str, object]:
    return {"instruction": turn.instruction, "input": turn.input, "output": turn.response, **more}


def chat(turn: Turn) -> list[dict[str, str]]:
    return [{"role": "user", "content": turn.instruction}, {"role": "assistant", "content": turn.response}]


SHAPES: dict[str, Callable[..., dict[str, object]]] = {
    "triple": triple,
    "response": lambda turn, **more: {"instruction": turn.instruction, "response": turn.response, **more},
    "official": lambda turn, **more: {"data": [turn.instruction, turn.response], **more},
    "messages": lambda turn, **more: {"messages": chat(turn), **more},
    "prompt": lambda turn, **more: {"prompt": turn.instruction, "completion": turn.response, **more},
    "prompt lists": lambda turn, **more: {"prompt": chat(turn)[:1], "completion": chat(turn)[1:], **more},
}


PAIRS = [(extension, shape) for extension in (".json", ".jsonl", ".ndjson", ".csv", ".parquet") for shape in SHAPES]
PAIRS.remove((".csv", "prompt lists"))  # a csv cell of prompt or completion is a text


@pytest.mark.parametrize(("extension", "shape"), PAIRS)
def test_every_format_and_shape_gives_equal_records(tmp_path: Path, extension: str, shape: str) -> None:
    rows = [SHAPES[shape](GARDEN, id="7", score="4.75", system="Be kind."), SHAPES[shape](BREW, id="8", score=None, system=None)]
    path = write(tmp_path / f"rows{extension}", rows)
    assert content(path) == [("7", (GARDEN,), "Be kind.", 4.75), ("8", (BREW,), "", None)]
    assert [type(item) for item in read(path).records] == [ScoredRecord, InstructionRecord]


@pytest.mark.parametrize("shape", SHAPES)
def test_the_id_of_a_row_without_one_depends_on_its_content_alone(tmp_path: Path, shape: str) -> None:
    plain = content(write(tmp_path / "a.jsonl", [triple(GARDEN), triple(BREW)]))
    assert content(write(tmp_path / "b.json", [SHAPES[shape](BREW), SHAPES[shape](GARDEN)]), append_period=True)[1][0] == plain[0][0]
    assert len({row[0] for row in plain}) == 2
    assert all(len(row[0]) == 16 for row in plain)


def test_several_turns_and_a_system_message(tmp_path: Path) -> None:
    said = [{"role": "system", "content": "Be brief."}, *chat(GARDEN), *chat(BREW)]
    flat = [GARDEN.instruction, GARDEN.response, BREW.instruction, BREW.response]
    path = lines(tmp_path / "a.jsonl", {"id": 1, "messages": said}, {"id": 2, "data": flat, "system": "Be brief."})
    assert content(path) == [("1", (GARDEN, BREW), "Be brief.", None), ("2", (GARDEN, BREW), "Be brief.", None)]


def test_sources_name_physical_lines_and_blank_lines_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    row = json.dumps(triple(GARDEN)).encode()
    path.write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n  \n" + row)
    assert [str(item.source) for item in read(str(path)).records if isinstance(item, InstructionRecord)] == [f"{path}:1", f"{path}:4"]
    table = tmp_path / "a.csv"
    table.write_bytes(b'\xef\xbb\xbfinstruction,output\r\n"a\r\nb",c\r\n\r\nd,"""e"""\r\n')
    found = [item for item in read(str(table)).records if isinstance(item, InstructionRecord)]
    assert [(item.source.line, item.turns[0]) for item in found] == [(2, Turn("a\r\nb", "c")), (5, Turn("d", '"e"'))]


MALFORMED: list[tuple[Any, str]] = [
    (b'{"instruction": "a",', "not valid JSON"),
    (b'{"instruction": "\xff", "output": "b"}', "invalid UTF-8"),
    (b"[" * 20_000, "not valid JSON"),
    (b'{"instruction": "a", "output": "b", "score": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    (["a", "b"], "a list, not an object"),
    (None, "null, not an object"),
    ({}, "unknown shape"),
    ({"question": "a", "answer": "b"}, "'question', 'answer'; wanted: instruction + output"),
    ({"instruction": "a", "output": None}, "unknown shape"),
    ({"instruction": 3, "output": "b"}, "`instruction` is a number, not text"),
    ({"instruction": "a", "output": ["b"]}, "`output` is a list, not text"),
    ({"instruction": " ", "input": "", "output": "b"}, "no text"),
    ({"instruction": "", "input": "<noinput>", "output": "b"}, "no text"),
    ({"instruction": "a", "output": "\ud83d"}, "surrogate"),
    ({"instruction": "a", "output": "b", "id": 1.5}, "`id` is 1.5"),
    ({"instruction": "a", "output": "b", "id": True}, "`id` is True"),
    ({"instruction": "a", "output": "b", "score": "hard"}, "`score` is 'hard'"),
    ({"instruction": "a", "output": "b", "score": float("nan")}, "`score` is nan"),
    ({"instruction": "a", "output": "b", "score": 1e400}, "`score` is inf"),
    ({"instruction": "a", "output": "b", "score": 10**400}, "wanted: a number from 1 to 5"),
    ({"instruction": "a", "output": "b", "score": True}, "`score` is True"),
    ({"instruction": "a", "output": "b", "difficulty": 0.5, "score": 3}, "`difficulty` is 0.5"),
    ({"data": ["a", "b", "c"]}, "in pairs"),
    ({"data": []}, "in pairs"),
    ({"messages": []}, "roles []"),
    ({"messages": chat(GARDEN)[:1]}, "assistant last"),
    ({"messages": chat(GARDEN)[::-1]}, "assistant last"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "contents are texts"),
    ({"messages": "a"}, "not a list"),
    ({"prompt": "a", "completion": chat(GARDEN)[1:]}, "`completion` is a list, not text"),
    ({"messages": [{"role": "system", "content": "x"}, *chat(GARDEN)], "system": "y"}, "differ"),
]


@pytest.mark.parametrize(("row", "reason"), MALFORMED, ids=[reason for _, reason in MALFORMED])
def test_a_bad_row_is_quarantined_with_its_line_and_reason_and_costs_no_other(tmp_path: Path, row: Any, reason: str) -> None:
    path = lines(tmp_path / "a.jsonl", triple(GARDEN), row, triple(BREW))
    reading = read(path)
    assert (reading.rows, len(reading.records)) == (3, 2)
    assert str(reading.quarantined[0].source) == f"{path}:2"
    assert reason in reading.quarantined[0].reason
    assert "\n" not in reading.quarantined[0].reason


def test_rows_are_records_plus_quarantined_over_all_malformed_rows(tmp_path: Path) -> None:
    assert read(lines(tmp_path / "a.jsonl", *(row for row, _ in MALFORMED))).rows == len(MALFORMED)


def test_a_repeated_given_id_is_quarantined_and_a_repeated_content_is_kept(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", triple(GARDEN, id=5), triple(BREW, id="5"), triple(BREW), triple(BREW), triple(BREW))
    reading = read(path)
    assert [(row.id, row.reason) for row in reading.quarantined] == [("5", f"id '5' was used before, at {path}:1")]
    ids = [item.id for item in reading.records if isinstance(item, InstructionRecord)]
    assert ids == ["5", ids[1], ids[1] + "-2", ids[1] + "-3"]


def test_an_id_is_free_until_a_good_row_has_it(tmp_path: Path) -> None:
    reading = read(lines(tmp_path / "a.jsonl", {"id": 5, "instruction": "", "output": ""}, triple(BREW, id=5)))
    assert [row.id for row in reading.quarantined] == ["5"]
    assert len(reading.records) == 1


def test_bad_rows_of_csv_and_parquet_are_quarantined_too(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = tmp_path / "a.csv"
    table.write_bytes(b'instruction,output\na,b\n\xff,b\na,b,c\na\n"a"b,c\na,""\n')
    reading = read(str(table))
    found = [(row.source.line, row.reason[:11]) for row in reading.quarantined]
    assert found == [(3, "invalid UTF"), (4, "has 3 cells"), (5, "has 1 cells"), (6, "not valid C")]
    assert (reading.rows, len(reading.records)) == (6, 2)

    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"instruction": texts, "output": ["x", "y", "z"]}), tmp_path / "a.parquet")
    reading = read(str(tmp_path / "a.parquet"))
    assert [(row.source.line, row.reason) for row in reading.quarantined] == [(2, "invalid UTF-8")]
    assert reading.rows == 3


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
KEYS = ("id", "score", "difficulty", "system", "instruction", "input", "output", "response", "data", "messages", "prompt", "completion", "role", "content")
MESSAGES = st.lists(st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": JSON}))
ROWS = st.dictionaries(st.sampled_from(KEYS), JSON | MESSAGES, max_size=6)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(rows=st.lists(JSON | ROWS | st.binary().map(lambda data: b"x" + data.replace(b"\n", b"")), min_size=1, max_size=8))
def test_no_row_raises_and_all_add_up(tmp_path: Path, rows: list[Any]) -> None:
    reading = read(lines(tmp_path / "a.jsonl", *rows), append_period=True)
    assert reading.rows == len(rows)


@pytest.mark.parametrize("given", ["<noinput>", "<no input>", "No input", "No Input.", "noinput", "< noinput >", "  No input\n", "   "])
def test_an_input_that_says_no_input_is_empty(tmp_path: Path, given: str) -> None:
    assert content(write(tmp_path / "a.json", [triple(Turn("a", "b", given))]))[0][1] == (Turn("a", "b"),)


@pytest.mark.parametrize("given", ["N/A", "none", "No inputs were given by him", "casino input", "noinput = 3"])
def test_other_inputs_stay_as_they_are(tmp_path: Path, given: str) -> None:
    assert content(write(tmp_path / "a.json", [triple(Turn("a", "b", given))]))[0][1] == (Turn("a", "b", given),)


def test_append_period_ends_raw_triples_and_touches_nothing_else(tmp_path: Path) -> None:
    raw = ["Do it", "Do it.", "Why?", " Do it \n"]
    path = write(tmp_path / "a.jsonl", [triple(Turn(text, "b", "x.")) for text in raw])
    assert [row[1][0].instruction for row in content(path, append_period=True)] == ["Do it.", "Do it.", "Why?.", "Do it."]
    assert [row[1][0].instruction for row in content(path)] == raw
    for shape in set(SHAPES) - {"triple", "response"}:
        other = write(tmp_path / "b.jsonl", [SHAPES[shape](GARDEN)])
        assert content(other, append_period=True) == content(other)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
WORDS = TEXT.filter(str.strip)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(WORDS, TEXT), min_size=1, max_size=3), TEXT, TEXT)
def test_a_written_row_is_read_as_the_same_record(turns: list[tuple[str, str]], system: str, given_input: str) -> None:
    assume(not NO_INPUT.fullmatch(given_input.strip()) and (not given_input or given_input.strip()))
    said = tuple(Turn(instruction, response, given_input if len(turns) == 1 else "") for instruction, response in turns)
    record = InstructionRecord("7", said, Source("x.jsonl", 1), system)
    assert record_of(json.loads(json.dumps(row_of(record))), record.source, Ids(), append_period=False) == record


def test_a_folder_a_glob_and_a_list_give_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json", "c.ndjson"):
        write(tmp_path / name, [triple(Turn(name, "x"), id=name)])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "sub.json").mkdir()
    assert [row[0] for row in content(str(tmp_path / "[a-c].*"))] == ["a.json", "b.jsonl", "c.ndjson"]
    (tmp_path / "sub.json").rmdir()
    assert [row[0] for row in content(str(tmp_path))] == ["a.json", "b.jsonl", "c.ndjson"]
    assert [row[0] for row in content([str(tmp_path / "b.jsonl"), str(tmp_path / "a.json")])] == ["b.jsonl", "a.json"]


def test_a_path_that_cannot_be_read_is_one_line_that_says_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("alpaca.json"), [triple(GARDEN)])
    Path("broken.json").write_text('[{"a": 1},\n {"b" 2}]')
    Path("lines.json").write_text('{"a": 1}\n{"b": 2}\n')
    Path("object.json").write_text("{}")
    Path("latin.json").write_bytes(b'["a",\n"\xff"]')
    Path("torn.parquet").write_bytes(b"PAR1")
    Path("table.xlsx").write_bytes(b"")
    Path("empty").mkdir()
    for name, text in {"none.jsonl": "\n \n", "none.json": "[]", "void.json": "", "none.csv": "instruction,output\n"}.items():
        Path(name).write_text(text)
    expected = {
        "alpaca.jsonl": "data.path: no such file 'alpaca.jsonl'; did you mean 'alpaca.json'?",
        "nowhere/alpaca.json": "data.path: no such file 'nowhere/alpaca.json'; there is no folder 'nowhere' either",
        "empty/alpaca": "data.path: no such file 'empty/alpaca'; a hub dataset",
        "s3://bucket/a.jsonl": "copied to this machine",
        "*.tsv": "no file matches '*.tsv'",
        "empty": "holds no .json, .jsonl",
        "table.xlsx": "unknown extension '.xlsx'",
        "broken.json": "broken.json:2:7: not valid JSON",
        "lines.json": "lines.json:2:1: not valid JSON: Extra data; one object per line? then name it .jsonl",
        "object.json": "holds an object; a .json file is an array",
        "latin.json": "latin.json:2:2: invalid UTF-8",
        "torn.parquet": "not readable as parquet",
        "none.jsonl": "'none.jsonl' has no rows",
        "none.json": "'none.json' has no rows",
        "void.json": "'void.json' has no rows",
        "none.csv": "'none.csv' has no rows",
        "tfds:empty": "no dataset_info.json in 'empty'",
        "tfds:./nowhere": "no such folder './nowhere'",
    }
    for path, message in expected.items():
        with pytest.raises(UserError) as error:
            read(path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)
    for paths, message in (((), "names no file"), (("alpaca.json", "./alpaca.json"), "given twice")):
        with pytest.raises(UserError, match=message):
            read(paths)


def test_hub_datasets_are_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "org"
    folder.mkdir()
    write(folder / "train.jsonl", [triple(GARDEN, score=4.75), triple(BREW, score=None)])
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path / "cache")
    reading = read(f"hub:{folder}")
    assert content(f"hub:{folder}") == content(str(folder))
    assert [str(item.record.source) for item in reading.records if isinstance(item, ScoredRecord)] == [f"hub:{folder}:1"]
    with pytest.raises(UserError, match="split 'tset'"):
        read(f"hub:{folder}", split="tset")


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    program = "from phased_ift_jax import cli; from phased_ift_jax.data.readers import read; cli.run(lambda argv: print(read('org/name')) or 0)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: data.path: hub dataset 'org/name', split 'train': the hub cannot be reached from here, and the dataset is not in the cache\n"


def test_a_hub_dataset_that_is_not_given_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    answers = {
        "Dataset 'org/name' is a gated dataset on the Hub. Visit it": "accept the licence on its page, https://huggingface.co/datasets/org/name, then",
        "Dataset 'org/name' doesn't exist on the Hub\nor cannot be accessed.": "no such dataset on the hub, and no such file here",
    }
    for text, message in answers.items():

        def refuse(*_: object, text: str = text, **__: object) -> None:
            raise DatasetNotFoundError(text)

        monkeypatch.setattr(datasets, "load_dataset", refuse)
        with pytest.raises(UserError, match=message):
            read("org/name")


def test_tfds_folders_are_read_without_tensorflow(tmp_path: Path) -> None:
    package = tmp_path / "garden_of_records"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "builder.py").write_text(
        "import numpy as np\n"
        "import tensorflow_datasets as tfds\n"
        "class Builder(tfds.core.GeneratorBasedBuilder):\n"
        "    VERSION = tfds.core.Version('1.0.0')\n"
        "    name = 'garden'\n"
        "    def _info(self):\n"
        "        chat = tfds.features.Sequence({'role': tfds.features.Text(), 'content': tfds.features.Text()})\n"
        "        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(\n"
        "            {'id': np.int64, 'difficulty': np.float32, 'messages': chat}))\n"
        "    def _split_generators(self, dl_manager):\n"
        "        return {'train': self._generate_examples()}\n"
        "    def _generate_examples(self):\n"
        "        for index in range(3):\n"
        "            said = [{'role': 'user', 'content': f'é {index}'}, {'role': 'assistant', 'content': 'x'}]\n"
        "            yield index, {'id': index, 'difficulty': 4.2, 'messages': said}\n"
    )
    program = (
        f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(Path(__file__).parents[1])!r}]\n"
        "from garden_of_records.builder import Builder\n"
        f"builder = Builder(data_dir={str(tmp_path / 'made')!r}, file_format='array_record')\n"
        "builder.download_and_prepare()\n"
        "print('--')\n"
        "from phased_ift_jax.data.readers import read\n"
        "reading = read('tfds:' + str(builder.data_path))\n"
        "for item in reading.records:\n"
        "    print(item.record.id, item.record.turns[0].instruction, item.difficulty, item.record.source.line)\n"
        "print(reading.quarantined, 'tensorflow' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env={**os.environ, "PYTHONUTF8": "1"})
    assert done.returncode == 0, done.stderr
    *rows, end = done.stdout.partition("--\n")[2].splitlines()
    assert sorted(row.rsplit(" ", 1)[0] for row in rows) == ["0 é 0 4.2", "1 é 1 4.2", "2 é 2 4.2"]
    assert sorted(row.rsplit(" ", 1)[1] for row in rows) == ["1", "2", "3"]
    assert end == "() False"
    folder = next((tmp_path / "made").rglob("dataset_info.json")).parent
    for path, message in ((str(folder), "write 'tfds:"), (f"tfds:{tmp_path / 'made'}", f"did you mean 'tfds:{folder}'")):
        with pytest.raises(UserError, match=message):
            read(path)
    with pytest.raises(UserError, match="split 'tset'"):
        read(f"tfds:{folder}", split="tset")


def test_the_official_stage_three_falls_into_its_known_bins() -> None:
    reading = read(needs("phasedsft/en-alpaca52k-stage3.jsonl"))
    scores = [item.difficulty for item in reading.records if isinstance(item, ScoredRecord)]
    assert (reading.rows, len(scores)) == (6889, 6889)
    assert (sum(s < 4.0 for s in scores), sum(4.0 <= s < 4.75 for s in scores), sum(s >= 4.75 for s in scores)) == (2140, 3287, 1462)


def test_real_raw_alpaca_is_read_whole_and_prepared_as_the_paper_did() -> None:
    raw = content(needs("alpaca/random_9k.json"))
    prepared = content(needs("alpaca/random_9k_with_stage3_label.jsonl"), append_period=True)
    assert len(raw) == 9229
    assert [row[0] for row in raw] == [row[0] for row in prepared]
    official = {row[0]: row[1][0].instruction for row in content(needs("phasedsft/en-alpaca52k-stage3.jsonl"))}
    labels = [json.loads(line) for line in Path(needs("alpaca/random_9k_with_stage3_label.jsonl")).read_text().splitlines()]
    pairs = [(row[1][0], official[label["official_id"]]) for row, label in zip(prepared, labels, strict=True) if label["official_stage3"]]
    assert len(pairs) == 1255
    assert all(text.startswith(turn.instruction) and turn.instruction.endswith(".") for turn, text in pairs)

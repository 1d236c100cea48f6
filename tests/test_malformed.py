"""Laws of malformed input: it ends in a counted quarantine or in one line with exit code 2, never in a traceback, and costs no good row.

The bad rows, files and lists of bins are the tables of `malformed/`; all go through the real `train` verb, as far as the first weights.
Then the readers are held to the same on ten thousand inputs that nobody thought of.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed.files import CHAT, FILES, IDS, LINES, PHASES, arrow_columns, bins, csv_of, parquet_of
from malformed.rows import GOOD, ROOT, ROWS, TRIPLE, but, jsonl
from test_run import MICRO

from phased_ift_jax import cli, train
from phased_ift_jax.data.readers import read
from phased_ift_jax.interrupts import STOPPED, Stopped
from phased_ift_jax.records import UserError
from phased_ift_jax.training import loop

BEFORE = 20  # good rows before the bad one
CONFIG = MICRO | {
    "data": MICRO["data"] | {"eval_size": 2},
    "training": MICRO["training"] | {"num_train_epochs": 1},
    "checkpoint": {"save_minutes": None},
    "logging": {"report_to": []},
}


# --- the verb --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What the verb did; `run` is None where it refused."""

    code: object
    out: str
    err: str
    run: loop.Run | None
    quarantine: list[dict[str, Any]]


def call(folder: Path, data: object, changes: dict[str, object] | None = None) -> Outcome:
    """`train` on `data`, in this process, until it asks for the first weights; `folder` must not change where it refuses."""
    tree = json.loads(json.dumps(CONFIG)) | {"output_dir": str(folder / "run")}
    tree["data"]["path"] = data
    for key, value in (changes or {}).items():
        section, _, name = key.rpartition(".")
        node = tree
        for part in section.split("."):
            node = node[part]
        node[name] = value
    (folder / "run.yaml").write_text(yaml.safe_dump(tree), encoding="utf-8")
    seen: list[loop.Run] = []

    def stop(run: loop.Run) -> None:
        seen.append(run)
        raise Stopped

    before, out, err = everything(folder), io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(loop.Run, "base_params", stop)
        with pytest.raises(SystemExit) as left:
            cli.run(train.main, [str(folder / "run.yaml")])
    if left.value.code == 2:
        assert everything(folder) == before, "a refusal writes nothing"
        assert_one_line(out.getvalue(), err.getvalue())
        return Outcome(2, "", err.getvalue(), None, [])
    assert left.value.code == STOPPED
    lines = (folder / "run" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    return Outcome(left.value.code, out.getvalue(), err.getvalue(), seen[0], [json.loads(line) for line in lines])


def everything(folder: Path) -> list[tuple[str, int]]:
    return sorted((os.fsencode(path).hex(), path.lstat().st_mtime_ns) for path in folder.rglob("*"))


def assert_one_line(out: str, err: str) -> None:
    assert out == ""
    assert re.fullmatch(r"error: [^\n]{10,1500}\n", err), err[:3000]


def facts(run: loop.Run) -> dict[str, object]:
    """What training sees of each usable row, by id."""
    data = run.dataset
    rows = zip(data.records, data.examples, data.bin_of.tolist(), strict=True)
    return {record.id: (record.turns, record.system, example.tokens.tolist(), example.responses, example.truncated, b) for record, example, b in rows}


def assert_accounted(done: Outcome, rows: int, truncated: int = 0) -> None:
    """Read = used whole + truncated + quarantined, to the row, in the plan as printed, and the quarantine file is as long as it says."""
    found = re.search(r"^data +(\d+) rows read = (\d+) used whole \+ (\d+) truncated \+ (\d+) quarantined", done.out, re.MULTILINE)
    assert found, (done.out, done.err[-3000:])
    read_, whole, cut, bad = map(int, found.groups())
    assert (read_, cut, bad) == (rows, truncated, len(done.quarantine))
    assert read_ == whole + cut + bad
    assert done.run is not None
    assert len(done.run.dataset.examples) == whole + cut


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What training sees of the good rows alone."""
    folder = tmp_path_factory.mktemp("clean")
    done = call(folder, put(folder / "rows.jsonl", jsonl(GOOD)))
    assert_accounted(done, len(GOOD))
    assert done.run is not None
    found = facts(done.run)
    assert list(found) == [row["id"] for row in GOOD]
    return found


def put(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


# --- bad rows and files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ROWS)
def test_a_bad_row_is_quarantined_by_line_id_and_reason_and_every_good_row_is_used_as_if_alone(name: str, tmp_path: Path, clean: dict[str, object]) -> None:
    row, identifier, reason = ROWS[name]
    path = put(tmp_path / "rows.jsonl", jsonl([*GOOD[:BEFORE], row, *GOOD[BEFORE:]]))
    assert_one_is_quarantined(tmp_path, path, identifier, reason, clean)


@pytest.mark.parametrize("name", [name for name, (row, _, _) in ROWS.items() if not isinstance(row, bytes) and "megabytes" not in name])
def test_the_same_in_an_array(name: str, tmp_path: Path, clean: dict[str, object]) -> None:
    row, identifier, reason = ROWS[name]
    path = put(tmp_path / "rows.json", json.dumps([*GOOD[:BEFORE], row, *GOOD[BEFORE:]], indent=1).encode())
    assert_one_is_quarantined(tmp_path, path, identifier, reason, clean)


def assert_one_is_quarantined(folder: Path, path: str, identifier: str | None, reason: str, clean: dict[str, object]) -> None:
    done = call(folder, path, {"data.max_quarantined": 0.03})
    assert_accounted(done, len(GOOD) + 1)
    assert [(row["file"], row["line"], row["id"]) for row in done.quarantine] == [(path, BEFORE + 1, identifier)]
    said = done.quarantine[0]["reason"]
    assert reason in said
    assert len(said) < 500
    assert "\n" not in said
    assert done.run is not None
    assert facts(done.run) == clean
    shutil.rmtree(folder / "run")
    refused = call(folder, path, {"data.max_quarantined": 0})
    assert f"data: 1 of {len(GOOD) + 1} rows cannot be used, more than data.max_quarantined 0 allows; the first is {path}:{BEFORE + 1} (id " in refused.err


def test_all_bad_rows_together_add_up(tmp_path: Path, clean: dict[str, object]) -> None:
    bad = [(row | {"id": f"bad{i}"} if isinstance(row, dict) and row.get("id") == "bad" else row) for i, (row, _, _) in enumerate(ROWS.values())]
    mixed = [row for i in range(max(len(bad), len(GOOD))) for row in (*GOOD[i : i + 1], *bad[i : i + 1])]
    done = call(tmp_path, put(tmp_path / "rows.jsonl", jsonl(mixed)), {"data.max_quarantined": 1})
    assert_accounted(done, len(GOOD) + len(ROWS))
    assert len(done.quarantine) == len(ROWS)
    assert done.run is not None
    assert facts(done.run) == clean


def test_a_long_response_is_truncated_and_counted_as_such(tmp_path: Path, clean: dict[str, object]) -> None:
    path = put(tmp_path / "rows.jsonl", jsonl([*GOOD, but(output="v " * 99 + "v"), but(id="bad2", output="")]))
    done = call(tmp_path, path, {"data.max_quarantined": 1})
    assert_accounted(done, len(GOOD) + 2, truncated=1)
    assert done.run is not None
    assert {key: value for key, value in facts(done.run).items() if key != "bad"} == clean
    shutil.rmtree(tmp_path / "run")
    assert_accounted(call(tmp_path, path, {"data.max_quarantined": 1, "data.truncation": "quarantine"}), len(GOOD) + 2)


@pytest.mark.parametrize("name", FILES)
def test_a_bad_file_is_refused_in_one_line_or_counted(name: str, tmp_path: Path, clean: dict[str, object]) -> None:
    file, make, wanted = FILES[name]
    path = put(tmp_path / file, make())
    if isinstance(wanted, str):
        refused = call(tmp_path, path, {"data.max_quarantined": 0})
        assert refused.code == 2, refused.out
        assert wanted in refused.err
        assert str(path) in refused.err
        assert call(tmp_path, path, {"data.max_quarantined": 1}).code == 2
        return
    done = call(tmp_path, path, {"data.max_quarantined": 1})
    assert_accounted(done, len(GOOD) + len(wanted))
    assert [row["line"] for row in done.quarantine] == [line for line, _ in wanted]
    for row, (_, reason) in zip(done.quarantine, wanted, strict=True):
        assert reason in row["reason"]
        assert len(row["reason"]) < 500
    assert done.run is not None
    if name != "parquet with invalid UTF-8":  # there the good rows' instructions are others
        assert facts(done.run) == clean


# --- bad places and bad lists of bins --------------------------------------------------------------------------------------------


def refuse(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


# name -> what makes it under a folder and gives data.path, and the line's text
PLACES: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty folder by the name of a file": (lambda here: (here / "x.jsonl").mkdir() or here / "x.jsonl", "x.jsonl' holds no .json"),
    "a folder within a folder of data": (lambda here: [put(here / "a.jsonl", LINES), (here / "x.jsonl").mkdir()] and here, "cannot read '{here}/x.jsonl': Is a directory"),
    "a link to nothing": (lambda here: (here / "x.jsonl").symlink_to(here / "gone.jsonl") or here / "x.jsonl", "no such file '{here}/x.jsonl'"),
    "a link to nothing in a folder": (lambda here: [put(here / "a.jsonl", LINES), (here / "x.jsonl").symlink_to(here / "gone.jsonl")] and here, "cannot read '{here}/x.jsonl'"),
    "a link to itself": (lambda here: (here / "x.jsonl").symlink_to(here / "x.jsonl") or here / "x.jsonl", "no such file '{here}/x.jsonl'"),
    "a name that is too long": (lambda here: here / ("x" * 300 + ".jsonl"), "no such file"),
    "a name with NUL": (lambda here: str(here) + "/x\0y.jsonl", "no such file"),
    "an empty name": (lambda here: "", "no such file ''"),
    "an empty list": (lambda here: [], "names no file"),
    "a file beside an empty one": (lambda here: [put(here / "a.jsonl", LINES), put(here / "b.jsonl", b"")], "'{here}/b.jsonl' has no rows"),
    "a file twice": (lambda here: [put(here / "a.jsonl", LINES), str(here / "." / "a.jsonl")], "given twice"),
    "no such split of no such folder": (lambda here: f"tfds:{here}/none", "no such folder"),
}


@pytest.mark.parametrize("name", PLACES)
def test_a_bad_place_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    make, line = PLACES[name]
    path = make(tmp_path)
    done = call(tmp_path, [*map(str, path)] if isinstance(path, list) else str(path), {"data.max_quarantined": 1})
    assert done.code == 2
    assert "data.path: " in done.err
    assert line.replace("{here}", str(tmp_path)) in done.err


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv", ".parquet"])
def test_an_unreadable_file_is_refused_in_one_line(extension: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{extension}"
    if not Path("/proc/self/mem").exists():
        pytest.skip("needs a file that opens and cannot be read, whoever reads: /proc/self/mem")
    path.symlink_to("/proc/self/mem")
    line = call(tmp_path, str(path), {"data.max_quarantined": 1}).err
    assert f"data.path: cannot read '{path}': " in line or f"data.path: '{path}' is not readable as parquet" in line


def test_a_forbidden_file_or_folder_is_refused_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path / "x.jsonl", LINES)
    monkeypatch.setattr("phased_ift_jax.data.readers.open", refuse, raising=False)
    monkeypatch.setattr("phased_ift_jax.data.readers.os.listdir", refuse)
    for asked, named in ((path, path), (str(tmp_path), str(tmp_path)), (str(tmp_path / "y.jsonl"), str(tmp_path))):
        with pytest.raises(UserError, match=re.escape(f"data.path: cannot read '{named}': Permission denied")):
            read(asked)


def test_a_file_whose_name_is_not_unicode_is_used_and_named_in_the_quarantine(tmp_path: Path, clean: dict[str, object]) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    name = os.fsencode(folder) + b"/\xff.jsonl"
    try:
        Path(os.fsdecode(name)).write_bytes(jsonl([*GOOD, but(output=""), GOOD[0]]))
    except OSError:
        pytest.skip("this file system has Unicode names only")
    done = call(tmp_path, str(folder), {"data.max_quarantined": 1})
    assert_accounted(done, len(GOOD) + 2)
    assert [(os.fsencode(row["file"]), row["line"]) for row in done.quarantine] == [(name, 42), (name, 41)]
    assert done.run is not None
    assert facts(done.run) == clean
    shutil.rmtree(tmp_path / "run")
    assert ":42 (id " in call(tmp_path, str(folder), {"data.max_quarantined": 0}).err


@pytest.mark.parametrize("name", PHASES)
def test_a_bad_list_of_bins_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    data, line = PHASES[name]
    path = tmp_path / "phases.json"
    if data is not None:
        path.write_bytes(data)
    done = call(tmp_path, put(tmp_path / "x.jsonl", LINES), {"curriculum.bins": {"from": str(path)}, "data.max_quarantined": 1})
    assert done.code == 2
    assert line.replace("{path}", str(path)) in done.err


def test_rows_that_no_bin_lists_are_counted_and_quarantined(tmp_path: Path, clean: dict[str, Any]) -> None:
    put(tmp_path / "phases.json", bins(easy=IDS[:20], hard=IDS[25:]))
    done = call(tmp_path, put(tmp_path / "x.jsonl", LINES), {"curriculum.bins": {"from": str(tmp_path / "phases.json")}, "data.max_quarantined": 1})
    assert_accounted(done, len(GOOD))
    assert [(row["line"], row["id"]) for row in done.quarantine] == [(i + 1, IDS[i]) for i in range(20, 25)]
    assert done.run is not None
    assert {key: value[:-1] for key, value in facts(done.run).items()} == {key: value[:-1] for key, value in clean.items() if key not in IDS[20:25]}


# --- as processes ----------------------------------------------------------------------------------------------------------------


def shell(folder: Path, path: str) -> subprocess.CompletedProcess[str]:
    (folder / "run.yaml").write_text(yaml.safe_dump(CONFIG | {"output_dir": str(folder / "run"), "data": {"path": path, "max_length": 64, "eval_size": 2}}), encoding="utf-8")
    words = [sys.executable, "-m", "phased_ift_jax.train", str(folder / "run.yaml"), "--data.max_quarantined", "1"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)


@pytest.mark.parametrize("name", ["nesting of 10,000 levels, .json", "a header with a quote never closed", "parquet cut off, the middle"])
def test_a_process_leaves_with_2_and_one_line(name: str, tmp_path: Path) -> None:
    file, make, wanted = FILES[name]
    done = shell(tmp_path, put(tmp_path / file, make()))
    assert done.returncode == 2
    assert_one_line(done.stdout, done.stderr)
    assert str(wanted) in done.stderr
    assert not (tmp_path / "run").exists()


def test_a_process_trains_the_good_rows_among_all_the_bad_ones(tmp_path: Path) -> None:
    bad = [row for name, (row, _, _) in ROWS.items() if "megabytes" not in name]
    done = shell(tmp_path, put(tmp_path / "rows.jsonl", jsonl([*GOOD, *bad])))
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"{len(GOOD) + len(bad)} rows read = {len(GOOD)} used whole + 0 truncated + {len(bad)} quarantined" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]
    assert sorted(line["line"] for line in lines) == list(range(len(GOOD) + 1, len(GOOD) + len(bad) + 1))
    assert (tmp_path / "run" / "hf").is_dir()


# --- inputs that nobody thought of: 10,000 in all ----------------------------------------------------------------------------------


def fuzz(cases: int) -> Callable[[Any], Any]:
    """So many cases, the same ones every time."""
    return settings(max_examples=cases, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def read_or_refused(place: Path, extension: str, data: bytes) -> tuple[dict[int, Any], dict[int, str]] | None:
    """What the rows became, by line: the record's content, or the reason; None where one line refuses the file. Nothing else may come."""
    path, line = put(place / f"x{extension}", data), None
    try:
        reading = read(path, append_period=True)
    except UserError as error:
        line = str(error)
    if line is not None:
        assert re.fullmatch(r"data\.path: [^\n]{1,900}", line), line[:2000]
        assert path in line
        return None
    records = [getattr(item, "record", item) for item in reading.records]
    used = {record.source.line: (record.id, record.turns, record.system) for record in records}
    refused = {row.source.line: row.reason for row in reading.quarantined}
    assert len(used) + len(refused) == reading.rows, "no line is two rows"
    assert not used.keys() & refused.keys()
    assert len({record.id for record in records}) == len(records)
    assert all(re.fullmatch(r"[^\n]{3,600}", reason) for reason in refused.values())
    json.dumps([used, refused], ensure_ascii=False, default=str).encode()  # Unicode, so that it can be written
    return used, refused


TEXTS = st.sampled_from(["", " ", "l v", "v l", "</s>", "\0", "\ud800", "\u2028", "\ufeff", "\r", "é", "3", "nan", "-inf", "1e999", "user", "assistant", "system"])
NUMBERS = st.sampled_from([0, 1, 3, 5, 5.0000001, float("nan"), float("inf"), 10**400, 5e-324, True, False, -0.0, 2**63, -1]) | st.integers() | st.floats()
SCALARS = st.none() | TEXTS | TEXTS | NUMBERS | st.text(max_size=4)
KEYS = st.sampled_from(["id", "score", "difficulty", "system", "instruction", "input", "output", "response", "data", "messages", "prompt", "completion", "role", "content", ""])
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=5)
MESSAGE = st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]) | SCALARS, "content": TEXTS | VALUES})
MESSAGES = st.lists(MESSAGE, max_size=4) | st.dictionaries(st.sampled_from(["role", "content"]), st.lists(TEXTS | SCALARS, max_size=3))
BASES = st.sampled_from([TRIPLE, but(output=..., response="l"), GOOD[0], {"messages": CHAT}, {"prompt": "l", "completion": "v"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}, {}])
CHANGES = st.dictionaries(KEYS, TEXTS | VALUES | MESSAGES | st.lists(TEXTS, max_size=4), max_size=3)
ROW = st.builds(lambda base, changes: base | changes, BASES, CHANGES) | VALUES


@fuzz(3500)
@given(rows=st.lists(ROW, min_size=1, max_size=4), ascii_only=st.booleans())
def test_fuzz_rows_near_the_known_shapes(place: Path, rows: list[Any], ascii_only: bool) -> None:
    data = b"".join(json.dumps(row, ensure_ascii=ascii_only).encode(errors="surrogatepass") + b"\n" for row in rows)
    found = read_or_refused(place, ".jsonl", data)
    assert found is not None
    assert found[0].keys() | found[1].keys() == set(range(1, len(rows) + 1))
    if ascii_only:  # an array holds the same rows
        array = read_or_refused(place, ".json", b"[" + b",\n".join(data.splitlines()) + b"]")
        assert array is not None
        assert array[0] == found[0]
        assert array[1].keys() == found[1].keys()


PIECES = st.sampled_from(
    [
        *b'" " "" , { } [ ] : - \\ \\ud800 \0 \xff \xc3 \xef\xbb\xbf \xe2\x80\xa8 instruction output messages id null NaN 1e999'.split(b" "),
        b" ",
        b"\n",
        b"\n",
        b"\r",
        b"\r\n",
        b"instruction,output\n",
        b'{"instruction": "a", "output": "b"}',
        b'"a","b"\n',
        b"a,b\n",
    ]
)
BYTES = st.lists(PIECES, max_size=25).map(b"".join) | st.binary(max_size=60)


def assert_accounted_file(place: Path, extension: str, data: bytes) -> tuple[dict[int, Any], dict[int, str]] | None:
    """Rows are records and quarantined rows, wherever they can be counted by other means."""
    found = read_or_refused(place, extension, data)
    text = data.removeprefix(b"\xef\xbb\xbf")
    if extension == ".jsonl":
        numbers = {number for number, line in enumerate(text.split(b"\n"), 1) if line.strip()}
        assert (found[0].keys() | found[1].keys() if found else set()) == numbers
    elif extension == ".json":
        try:
            rows = json.loads(text.decode())
        except (ValueError, RecursionError):
            rows = None
        assert (len(found[0]) + len(found[1]) if found else 0) == (len(rows) if isinstance(rows, list) else 0)
    elif found:
        numbers = {number for number, line in enumerate(re.split(rb"\r\n|\r|\n", text), 1) if line}
        got = found[0].keys() | found[1].keys()
        assert got <= numbers - {min(numbers)}
        assert b'"' in text or got == numbers - {min(numbers)}
    return found


@pytest.mark.parametrize("extension", [".json", ".jsonl", ".csv"])
@fuzz(1000)
@given(data=BYTES)
def test_fuzz_arbitrary_bytes(place: Path, extension: str, data: bytes) -> None:
    assert_accounted_file(place, extension, data)


EDIT = st.tuples(st.integers(0, 10_000), st.sampled_from(["cut", "drop", "put", "flip", "repeat"]), st.integers(0, 255), PIECES)


def edited(data: bytes, edits: Iterable[tuple[int, str, int, bytes]]) -> bytes:
    """Bytes after some accidents."""
    for at, kind, size, piece in edits:
        at %= len(data) + 1
        if kind == "cut":
            data = data[: max(at, len(data) // 4)]
        elif kind == "drop":
            data = data[:at] + data[at + 1 + size % 40 :]
        elif kind == "put":
            data = data[:at] + piece + data[at:]
        elif kind == "flip":
            data = data[:at] + bytes([size]) + data[at + 1 :]
        else:
            data = data[:at] + data[max(0, at - size) :]
    return data


@pytest.mark.parametrize("extension", [".json", ".jsonl"])
@fuzz(800)
@given(edits=st.lists(EDIT, min_size=1, max_size=3))
def test_fuzz_accidents_to_good_json(place: Path, extension: str, edits: list[tuple[int, str, int, bytes]]) -> None:
    good = [json.dumps(row).encode() for row in [*GOOD[:3], TRIPLE, {"messages": CHAT, "id": 7}]]
    data = edited(b"\n".join(good) + b"\n" if extension == ".jsonl" else b"[" + b",\n".join(good) + b"]", edits)
    found = assert_accounted_file(place, extension, data)
    if found and extension == ".jsonl":  # a line that no accident met is what it was
        alone = read_or_refused(place, ".jsonl", b"\n".join(good))
        assert alone is not None
        for number, line in enumerate(data.split(b"\n"), 1):
            if line in good:
                assert found[0].get(number) == alone[0][good.index(line) + 1] or "was used before" in found[1][number]


@fuzz(900)
@given(edits=st.lists(EDIT, min_size=1, max_size=3), end=st.sampled_from(["\n", "\r\n", "\r"]))
def test_fuzz_accidents_to_a_good_table(place: Path, edits: list[tuple[int, str, int, bytes]], end: str) -> None:
    rows = [*GOOD[:3], {"id": "q", "score": 2, "data": ['say "l",\nor v', "v l"]}, GOOD[3]]
    assert_accounted_file(place, ".csv", edited(csv_of(rows, end), edits))


@fuzz(400)
@given(chosen=st.dictionaries(KEYS.filter(bool), st.integers(0, 1000), min_size=1, max_size=4))
def test_fuzz_columns_of_parquet(place: Path, chosen: dict[str, int]) -> None:
    kinds = list(arrow_columns().values())
    found = read_or_refused(place, ".parquet", parquet_of(**{key: kinds[number % len(kinds)] for key, number in chosen.items()}))
    assert found is not None
    assert found[0].keys() | found[1].keys() == {1, 2, 3}


@fuzz(600)
@given(edits=st.lists(EDIT.filter(lambda edit: edit[1] != "cut"), min_size=1, max_size=2))
def test_fuzz_accidents_to_good_parquet(place: Path, edits: list[tuple[int, str, int, bytes]]) -> None:
    import pyarrow.parquet as pq

    found = read_or_refused(place, ".parquet", edited(parquet_of(GOOD[:5]), edits))
    if found:
        assert len(found[0]) + len(found[1]) == pq.read_metadata(place / "x.parquet").num_rows

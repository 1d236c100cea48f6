"""Files, hub datasets and TFDS folders as records, with every row accounted for (floor 1: knows no JAX).

A path says where, a file's extension says in which format, and the keys of a row say what it is (`row_kinds`); no file name means anything.
"""

from __future__ import annotations

import csv
import difflib
import fnmatch
import glob
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from reprlib import repr as short
from typing import Any

from phased_ift_jax import pictures
from phased_ift_jax.data import tfds_folders
from phased_ift_jax.data.row_kinds import BadRow, Ids, id_or_none, is_unicode, kind, one_line, record_of
from phased_ift_jax.object_store import Objects
from phased_ift_jax.records import InstructionRecord, Quarantined, Reading, ScoredRecord, Source, UserError

KEY = "data.path"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
Rows = Iterator[tuple[int | Source, Any]]  # the 1-based line (or source) and the row there, or the `BadRow` that stands in its place


def read(paths: str | Sequence[str], split: str = "train", append_period: bool = False) -> Reading:
    """Read every row of `paths`, in order: each becomes a record or is quarantined with its line and the reason.

    A path is a file, a folder (its data files by name) or a glob, on a disk or in a bucket (`gs://...`), a hub name (`org/name` or `hub:name`), `tfds:name` or `tfds:folder`.
    A row without an id is named by a hash of its content, before any period is added; a repeated row gets `-2`, `-3` behind it.
    `append_period` ends the instruction of Alpaca triples with a period, as the paper's data preparation did; other shapes are not touched.

    Raises:
        UserError: a path that does not exist, or that as a whole cannot be read or has no rows.
    """
    records: list[InstructionRecord | ScoredRecord] = []
    quarantined: list[Quarantined] = []
    for row in stream(paths, split, append_period):
        if isinstance(row, Quarantined):
            quarantined.append(row)
        else:
            records.append(row)
    return Reading(tuple(records), tuple(quarantined))


def stream(paths: str | Sequence[str], split: str = "train", append_period: bool = False) -> Iterator[InstructionRecord | ScoredRecord | Quarantined]:
    """The same row by row, of which only the ids are kept."""
    ids = Ids()
    for path, rows in _places([paths] if isinstance(paths, str) else paths, split):
        empty = True
        for line, row in rows:
            source, empty = source_of(path, line), False
            try:
                yield record_of(row, source, ids, append_period)
            except BadRow as reason:
                yield Quarantined(source, id_or_none(row), str(reason))
        if empty:
            raise UserError(f"data.path: '{path}' has no rows")


def columns(path: str, keys: Sequence[str], split: str = "train") -> dict[Source, dict[str, Any]]:
    """What rows hold under keys that are no part of a record, by where the rows are; null is as good as nothing."""
    places = [(source_of(where, line), row) for where, rows in _places([path], split) for line, row in rows if isinstance(row, dict)]
    return {source: found for source, row in places if (found := {key: row[key] for key in keys if row.get(key) is not None})}


def source_of(path: str, line: int | Source) -> Source:
    return line if isinstance(line, Source) else Source(path, line)


def rows(path: str) -> Rows:
    """The rows of the files that a path names, by the line where each begins; raises `UserError` as `read` does."""
    for _, found in _places([path], "train"):
        yield from found


# --- places: what a path names -------------------------------------------------------------------------------------------------


def _places(paths: Sequence[str], split: str) -> list[tuple[str, Rows]]:
    places = [place for path in paths for place in _expand(path, split)]
    twice = [path for path, count in Counter(os.path.abspath(path) for path, _ in places).items() if count > 1]
    if twice or not places:
        raise UserError(f"data.path: '{twice[0]}' is given twice" if twice else "data.path: names no file")
    return places


def _expand(path: str, split: str) -> list[tuple[str, Rows]]:
    if path.startswith("hub:"):
        return [(path, _hub(path.removeprefix("hub:"), split))]
    if path.startswith("tfds:"):
        return [(path, _tfds(path.removeprefix("tfds:"), split))]
    if pictures.is_ours(path):
        return [_file(address) for address in _addresses(path)]
    local = os.path.expanduser(path)
    if os.path.isdir(local):
        names = [name for name in _listing(local) if _extension(name) in FORMATS and not name.startswith(".")]
        if "dataset_info.json" in names and "features.json" in names:
            raise UserError(f"data.path: '{path}' is a TFDS folder; write 'tfds:{path}'")
        if not names:
            raise UserError(f"data.path: folder '{path}' holds no {', '.join(FORMATS)} file")
        return [_file(os.path.join(local, name)) for name in names]
    if os.path.exists(local):
        return [_file(local)]
    if glob.has_magic(local):
        found = [name for name in sorted(glob.glob(local, recursive=True)) if os.path.isfile(name)]
        if not found:
            raise UserError(f"data.path: no file matches '{path}'")
        return [_file(name) for name in found]
    if HUB_NAME.fullmatch(path) and _extension(path) not in FORMATS and not os.path.isdir(os.path.dirname(path)):
        return [(path, _hub(path, split))]
    raise UserError(f"data.path: no such file '{path}'" + _nearest(local))


def _addresses(path: str) -> list[str]:
    """The addresses of the files that an address in a bucket names: an object, the data files of a folder, or what matches a glob."""
    if "#" in path or not glob.has_magic(path):
        return _addresses_in(path)
    fixed = path[: re.search(r"[*?\[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if fixed.count("/") < 3:
        raise UserError(f"data.path: '{path}' would list a whole bucket; name a folder before the first of *?[")
    with pictures.told(KEY):
        found = [f"{fixed}/{name}" for name in Objects(fixed, KEY).list() if _matches(f"{fixed}/{name}".split("/"), path.split("/"))]
    if not found:
        raise UserError(f"data.path: no file matches '{path}'")
    return found


def _addresses_in(path: str) -> list[str]:
    with pictures.told(KEY):
        objects, name = Objects(path, KEY, parent=True), path.rstrip("/").rpartition("/")[2]
        if not path.endswith("/") and objects.facts(name):
            return [path]
        inside = objects.children(f"{name}/")
        found = [name for name in inside if _extension(name) in FORMATS and not name.startswith(".")]
        if not inside:
            raise UserError(f"data.path: no such object '{path}'{pictures.nearest(path, KEY)}")
    if not found:
        raise UserError(f"data.path: folder '{path}' holds no {', '.join(FORMATS)} file")
    return [f"{path.rstrip('/')}/{name}" for name in found]


def _matches(parts: list[str], pattern: list[str]) -> bool:
    """Whether the parts of a name match those of a pattern, as `glob` has it: ** stands for any folders, and a name with a dot first is hidden."""
    if not pattern or not parts:
        return parts == pattern
    if pattern[0] == "**":
        return _matches(parts, pattern[1:]) or (not parts[0].startswith(".") and len(parts) > 1 and _matches(parts[1:], pattern))
    hidden = parts[0].startswith(".") and not pattern[0].startswith(".")
    return fnmatch.fnmatchcase(parts[0], pattern[0]) and not hidden and _matches(parts[1:], pattern[1:])


def _file(path: str) -> tuple[str, Rows]:
    extension = _extension(path)
    if extension not in FORMATS:
        raise UserError(f"data.path: '{path}' has the unknown extension '{extension}'; known: {', '.join(FORMATS)}")
    return path, _guarded(path, FORMATS[extension])


def _guarded(path: str, rows: Callable[[str], Rows]) -> Rows:
    local = str(pictures.copy(path, KEY)) if pictures.is_ours(path) else path
    try:
        yield from rows(local)
    except OSError as error:
        raise UserError(f"data.path: cannot read '{path}': {error.strerror or one_line(error)}") from None
    except UserError as error:
        raise UserError(str(error).replace(local, path)) from None


def _listing(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except OSError as error:
        raise UserError(f"data.path: cannot read '{folder}': {error.strerror}") from None


def _extension(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _nearest(path: str) -> str:
    folder, name = os.path.split(path)
    if "://" in path:
        return "; of remote files those in a bucket are read, gs://bucket/...; others must be copied to this machine first"
    if not os.path.isdir(folder or "."):
        return f"; there is no folder '{folder}' either"
    near = difflib.get_close_matches(name, _listing(folder), n=1)
    return f"; did you mean '{os.path.join(folder, near[0])}'?" if near else "; a hub dataset is hub:org/name, a TFDS one tfds:name"


# --- formats: from bytes to rows ------------------------------------------------------------------------------------------------


def _json(path: str) -> Rows:
    with open(path, "rb") as file:
        data = file.read().removeprefix(b"\xef\xbb\xbf")
    try:
        rows = json.loads(data.decode()) if data.strip() else []
    except UnicodeDecodeError as error:
        line, column = data.count(b"\n", 0, error.start) + 1, error.start - data.rfind(b"\n", 0, error.start)
        raise UserError(f"data.path: {path}:{line}:{column}: invalid UTF-8") from None
    except json.JSONDecodeError as error:
        hint = "; one object per line? then name it .jsonl" if error.msg == "Extra data" else ""
        raise UserError(f"data.path: {path}:{error.lineno}:{error.colno}: not valid JSON: {error.msg}{hint}") from None
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, nesting of thousands of levels
        raise UserError(f"data.path: {path}:1:1: not valid JSON: {error}") from None
    if not isinstance(rows, list):
        raise UserError(f"data.path: {path}:1:1: holds {kind(rows)}; a .json file is an array of objects, [{{...}}, ...]")
    yield from enumerate(rows, 1)


def _jsonl(path: str) -> Rows:
    with open(path, "rb") as file:
        for line, data in enumerate(file, 1):  # bytes: only "\n" ends a line, while text may hold U+2028 and the like
            data = data.removeprefix(b"\xef\xbb\xbf") if line == 1 else data
            if data.strip():
                yield line, _json_line(data)


def _json_line(data: bytes) -> object:
    try:
        return json.loads(data.decode())
    except UnicodeDecodeError as error:
        return BadRow(f"invalid UTF-8 at byte {error.start + 1} of the line")
    except json.JSONDecodeError as error:
        return BadRow(f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return BadRow(f"not valid JSON: {error}")


def _csv(path: str) -> Rows:
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is shorter than some conversations
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        taken: list[str] = []  # the lines of the row being read
        reader = csv.reader(_noted(file, taken), strict=True)
        header: list[str] = []
        while True:
            line = reader.line_num + 1
            taken.clear()
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                fault = f"not valid CSV: {error}; is a quote left open, or not doubled?"
                if not header:
                    raise UserError(f"data.path: {path}:{line}: the header is {fault}") from None
                yield line, BadRow(fault)
                for number, text in enumerate(taken[1:], line + 1):  # rows, most likely, that an open quote has swallowed
                    if text.strip("\r\n"):
                        yield number, BadRow(f"lost in the row of line {line}, which is not valid CSV")
                continue
            if header and cells:
                yield line, _csv_row(header, cells)
            elif cells:
                header = _once(cells, f"{path}:{line}: the header")


def _noted(lines: Iterable[str], taken: list[str]) -> Iterator[str]:
    for line in lines:
        taken.append(line)
        yield line


def _once(names: list[str], what: str) -> list[str]:
    """Names of columns, each of which must be one column's: of two, a row could keep only one."""
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if twice:
        raise UserError(f"data.path: {what} names {short(twice[0])} twice; rename one of the two, or leave it out")
    return names


def _csv_row(header: list[str], cells: list[str]) -> object:
    if len(cells) != len(header):
        return BadRow(f"has {len(cells)} cells where the header has {len(header)}")
    if not is_unicode("".join(cells)):  # what `surrogateescape` made of bytes that are not UTF-8
        return BadRow("invalid UTF-8")
    row: dict[str, Any] = dict(zip(header, cells, strict=True))
    for key in {"messages", "data"} & row.keys():  # lists are written as JSON in a cell
        row[key] = _json_line(row[key].encode()) if row[key] else None
    return row


def _parquet(path: str) -> Rows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _once(file.schema_arrow.names, f"{path}: the schema")
            yield from _arrow_rows(file.iter_batches(batch_size=1024))
    except (pa.ArrowException, UnicodeDecodeError) as error:  # a column's name may be no text, too
        raise UserError(f"data.path: '{path}' is not readable as parquet: {one_line(error)}") from None


def _arrow_rows(batches: Iterable[Any]) -> Rows:
    line = 0
    for batch in batches:
        try:
            rows: list[object] = batch.to_pylist()
        except (ValueError, OverflowError):  # some cell is no text, or no date or span that Python has: find its row
            rows = [_arrow_row(batch.slice(index, 1)) for index in range(batch.num_rows)]
        yield from enumerate(rows, line + 1)
        line += len(rows)


def _arrow_row(one_row: Any) -> object:
    try:
        return one_row.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("invalid UTF-8")
    except (ValueError, OverflowError) as error:
        return BadRow(f"a cell cannot be read: {one_line(error)}")


def _hub(name: str, split: str) -> Rows:
    import datasets

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # the border to the hub: whatever it raises, the user gets one line
        raise UserError(f"data.path: hub dataset '{name}', split '{split}': {_hub_fault(error, name)}") from None
    yield from _arrow_rows(table.with_format("arrow").iter(batch_size=1024))


def _hub_fault(error: Exception, name: str) -> str:
    text = one_line(error)
    if re.search(r"gated|\b40[13]\b", text):
        return f"accept the licence on its page, https://huggingface.co/datasets/{name}, then set HF_TOKEN"
    if isinstance(error, ConnectionError) or "offline" in text.lower():
        return "the hub cannot be reached from here, and the dataset is not in the cache"
    if type(error).__name__ == "DatasetNotFoundError":
        return "no such dataset on the hub, and no such file here; a private one needs HF_TOKEN"
    return text


def _tfds(name: str, split: str) -> Rows:
    folder = os.path.expanduser(name)
    if not os.path.isdir(folder) and name.startswith(("/", ".", "~")):
        raise UserError(f"data.path: no such folder '{name}'{_nearest(folder)}")
    yield from tfds_folders.rows(name, split)


FORMATS: dict[str, Callable[[str], Rows]] = {".json": _json, ".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}

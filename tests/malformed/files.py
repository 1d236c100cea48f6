"""Bad files, made of good rows, and bad lists of bins: refused in one line, or used with the bad rows counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable
from typing import Any

from malformed.rows import GOOD, MEGABYTES, TRIPLE, jsonl

ARRAY, LINES = json.dumps(GOOD).encode(), jsonl(GOOD)


def csv_of(rows: Iterable[dict[str, Any]], end: str = "\n") -> bytes:
    """Good rows as a table of id, score, instruction, output."""
    file = io.StringIO()
    table = csv.writer(file, lineterminator=end)
    table.writerow(["id", "score", "instruction", "output"])
    table.writerows([row["id"], row["score"], *row["data"]] for row in rows)
    return file.getvalue().encode()


def parquet_of(rows: list[dict[str, Any]] | None = None, **columns: Any) -> bytes:
    """Rows as parquet, with further or other columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.table((pa.Table.from_pylist(rows).to_pydict() if rows else {}) | columns)
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


def bad_texts(count: int) -> Any:
    """A text column whose last cell is not UTF-8."""
    import pyarrow as pa

    cells = [b"Reverse: l v"] * (count - 1) + [b"Reverse: \xff"]
    return pa.array(cells, pa.binary()).view(pa.string())


def twin_columns() -> bytes:
    """A parquet file in which two columns have one name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    pq.write_table(pa.table([pa.array(["Reverse: l v"]), pa.array(["v l"]), pa.array(["l v"])], names=["instruction", "output", "output"]), file)
    return file.getvalue()


def times(zone: str, count: int) -> Any:
    """A column of times in a zone."""
    import pyarrow as pa

    return pa.array([0] * count, pa.timestamp("ns", zone))


def dates(days: int, count: int) -> Any:
    """A column of dates, so many days after 1970."""
    import pyarrow as pa

    return pa.array([days] * count, pa.date32())


def swap(data: bytes, old: bytes, new: bytes) -> bytes:
    """Bytes with one thing put in the place of another that is there."""
    assert data.count(old) >= 1
    return data.replace(old, new)


# name -> file name, its bytes, and what comes of it: the one line's text, or the lines quarantined (number, part of the reason) among good rows
FILES: dict[str, tuple[str, Callable[[], bytes], str | list[tuple[int, str]]]] = {
    # nothing there
    **{f"empty {ext}": (f"x{ext}", lambda: b"", "has no rows") for ext in (".json", ".jsonl", ".ndjson", ".csv")},
    "empty .parquet": ("x.parquet", lambda: b"", "not readable as parquet"),
    "blank lines only": ("x.jsonl", lambda: b"\n \r\n\t\n\n", "has no rows"),
    "blank lines only, .json": ("x.json", lambda: b"\n \r\n\t\n\n", "has no rows"),
    "blank lines only, .csv": ("x.csv", lambda: b"\n\r\n\n", "has no rows"),
    "a BOM only": ("x.jsonl", lambda: b"\xef\xbb\xbf", "has no rows"),
    "a BOM only, .json": ("x.json", lambda: b"\xef\xbb\xbf\n", "has no rows"),
    "an empty array": ("x.json", lambda: b"[]", "has no rows"),
    "a header only": ("x.csv", lambda: b"instruction,output\n", "has no rows"),
    "parquet without rows": ("x.parquet", lambda: parquet_of(instruction=[], output=[]), "has no rows"),
    # line ends and byte order marks are no fault
    "a BOM": ("x.jsonl", lambda: b"\xef\xbb\xbf" + LINES, []),
    "a BOM, .json": ("x.json", lambda: b"\xef\xbb\xbf" + ARRAY, []),
    "a BOM, .csv": ("x.csv", lambda: b"\xef\xbb\xbf" + csv_of(GOOD), []),
    "CRLF": ("x.jsonl", lambda: jsonl(GOOD, b"\r\n"), []),
    "CRLF, .json": ("x.json", lambda: json.dumps(GOOD, indent=1).encode().replace(b"\n", b"\r\n"), []),
    "CRLF, .csv": ("x.csv", lambda: csv_of(GOOD, "\r\n"), []),
    "CR only, .json": ("x.json", lambda: json.dumps(GOOD, indent=1).encode().replace(b"\n", b"\r"), []),
    "CR only, .csv": ("x.csv", lambda: csv_of(GOOD, "\r"), []),
    "CR only": ("x.jsonl", lambda: jsonl(GOOD, b"\r"), "x.jsonl:1 (id None): not valid JSON: Extra data"),
    "no line end at the end": ("x.jsonl", lambda: LINES.rstrip(b"\n"), []),
    # cut off
    "a truncated last line": ("x.jsonl", lambda: LINES + json.dumps(TRIPLE).encode()[:30], [(41, "not valid JSON")]),
    "a last line cut within a character": ("x.jsonl", lambda: LINES + '{"id": "é'.encode()[:-1], [(41, "invalid UTF-8 at byte")]),
    "an array cut off": ("x.json", lambda: ARRAY[:-200], "x.json:1:"),
    "an array without its end": ("x.json", lambda: json.dumps(GOOD, indent=1).encode()[:-1], "not valid JSON"),
    "an array cut within a character": ("x.json", lambda: '["é'.encode()[:-1], "x.json:1:3: invalid UTF-8"),
    **{
        f"parquet cut off, {name}": ("x.parquet", lambda part=part: part(parquet_of(GOOD)), "x.parquet")
        for name, part in {
            "first half": lambda data: data[: len(data) // 2],
            "second half": lambda data: data[len(data) // 2 :],
            "magic only": lambda data: data[:4],
            "all but a byte": lambda data: data[:-1],
            "the middle": lambda data: data[:400] + data[600:],
        }.items()
    },
    # one thing by the name of another
    "an object instead of an array": ("x.json", lambda: json.dumps({"data": GOOD}).encode(), "holds an object; a .json file is an array"),
    "a text instead of an array": ("x.json", lambda: b'"rows"', "holds a text"),
    "null instead of an array": ("x.json", lambda: b"null", "holds null"),
    "jsonl named .json": ("x.json", lambda: LINES, "x.json:2:1: not valid JSON: Extra data; one object per line? then name it .jsonl"),
    "one line of jsonl named .json": ("x.json", lambda: jsonl(GOOD[:1]), "holds an object"),
    "json named .jsonl": ("x.jsonl", lambda: ARRAY, "x.jsonl:1 (id None): is a list, not an object"),
    "json of many lines named .jsonl": ("x.jsonl", lambda: json.dumps(GOOD, indent=1).encode(), "x.jsonl:1 (id None): not valid JSON"),
    "csv named .jsonl": ("x.jsonl", lambda: csv_of(GOOD), "x.jsonl:1 (id None): not valid JSON"),
    "jsonl named .csv": ("x.csv", lambda: LINES, "x.csv:"),
    "jsonl named .parquet": ("x.parquet", lambda: LINES, "not readable as parquet"),
    "parquet named .jsonl": ("x.jsonl", lambda: parquet_of(GOOD), "x.jsonl:1 (id None): "),
    "parquet named .json": ("x.json", lambda: parquet_of(GOOD), "x.json:1:"),
    "parquet named .csv": ("x.csv", lambda: parquet_of(GOOD), "x.csv"),
    "gzip named .jsonl": ("x.jsonl", lambda: gzip.compress(LINES, mtime=0), "x.jsonl:1 (id None): invalid UTF-8"),
    "gzip named .json": ("x.json", lambda: gzip.compress(ARRAY, mtime=0), "x.json:1:2: invalid UTF-8"),
    "gzip named .csv": ("x.csv", lambda: gzip.compress(csv_of(GOOD), mtime=0), "x.csv"),
    "UTF-16": ("x.jsonl", lambda: LINES.decode().encode("utf-16"), "x.jsonl:1 (id None): invalid UTF-8"),
    "UTF-16 without a BOM": ("x.jsonl", lambda: LINES.decode().encode("utf-16-le"), "x.jsonl:1 (id None): not valid JSON"),
    "UTF-16, .json": ("x.json", lambda: ARRAY.decode().encode("utf-16"), "x.json:1:1: invalid UTF-8"),
    "UTF-16, .csv": ("x.csv", lambda: csv_of(GOOD).decode().encode("utf-16"), "x.csv"),
    "UTF-32": ("x.jsonl", lambda: LINES.decode().encode("utf-32"), "x.jsonl:1 (id None): "),
    "an unknown extension": ("x.xlsx", lambda: b"PK", "has the unknown extension '.xlsx'"),
    "a compressed file": ("x.jsonl.gz", lambda: gzip.compress(LINES), "has the unknown extension '.gz'"),
    "NUL bytes only": ("x.jsonl", lambda: b"\0" * 5000, "x.jsonl:1 (id None): not valid JSON"),
    "NUL bytes only, .json": ("x.json", lambda: b"\0" * 5000, "x.json:1:1: not valid JSON"),
    "NUL bytes only, .csv": ("x.csv", lambda: b"\0" * 5000, "x.csv"),
    "NUL bytes only, .parquet": ("x.parquet", lambda: b"\0" * 5000, "not readable as parquet"),
    # within json
    "a number of 5,000 digits, .json": ("x.json", lambda: ARRAY[:-1] + b"," + b"1" * 5000 + b"]", "x.json:1:1: not valid JSON"),
    "nesting of 10,000 levels, .json": ("x.json", lambda: ARRAY[:-1] + b"," + b"[" * 10_000 + b"]" * 10_001, "x.json:1:1: not valid JSON"),
    "invalid UTF-8, .json": ("x.json", lambda: ARRAY[:-1] + b',\n"\xff"]', "x.json:2:2: invalid UTF-8"),
    "a line of megabytes, .json": ("x.json", lambda: b"[" + b"x" * MEGABYTES, "x.json:1:2: not valid JSON"),
    # csv
    "ragged rows": ("x.csv", lambda: csv_of(GOOD) + b'a,2,"Reverse: l v"\nb,2,"Reverse: l v",v l,v\nc\n', [(42, "has 3 cells where"), (43, "has 5 cells"), (44, "has 1 cells")]),
    "no header": ("x.csv", lambda: csv_of(GOOD).split(b"\n", 1)[1], "x.csv:2 (id None): unknown shape"),
    "a column named twice": ("x.csv", lambda: swap(csv_of(GOOD), b"score,", b"output,"), "x.csv:1: the header names 'output' twice"),
    "a header with a quote never closed": ("x.csv", lambda: swap(csv_of(GOOD), b"instruction,", b'"instruction,'), "x.csv:1: the header is not valid CSV"),
    "a quote never closed, at the end": ("x.csv", lambda: csv_of(GOOD) + b'a,2,"Reverse: l v,v l\n', [(42, "not valid CSV")]),
    "a quote never closed": (
        "x.csv",
        lambda: csv_of(GOOD) + b'a,2,"Reverse: l v,v l\n' + b"b,2,Reverse: l v,v l\n" * 3,
        [(42, "not valid CSV"), (43, "in the row of line 42"), (44, "in the row of line 42"), (45, "in the row of line 42")],
    ),
    "a quote closed by a later row": (
        "x.csv",
        lambda: csv_of(GOOD) + b'a,2,"Reverse: l v,v l\n' + b"b,2,Reverse: l v,v l\n\n" + b'c,2,"Reverse: l v",v l\n',
        [(42, "not valid CSV"), (43, "in the row of line 42"), (45, "in the row of line 42")],
    ),
    "a quote not doubled": ("x.csv", lambda: csv_of(GOOD) + b'a,2,"Reverse: "l" v",v l\n', [(42, "not valid CSV")]),
    "tabs for commas": ("x.csv", lambda: swap(csv_of(GOOD), b",", b"\t"), "x.csv:2 (id None): unknown shape"),
    "invalid UTF-8, .csv": ("x.csv", lambda: csv_of(GOOD) + b"a,2,Reverse: \xff,v\n", [(42, "invalid UTF-8")]),
    "NUL bytes, .csv": ("x.csv", lambda: csv_of(GOOD) + b"a,2,Reverse: l v,\0\n", [(42, "the tokenizer does not know")]),
    "an empty cell for a response": ("x.csv", lambda: csv_of(GOOD) + b"a,2,Reverse: l v,\n", [(42, "empty response")]),
    "a row of commas": ("x.csv", lambda: csv_of(GOOD) + b",,,\n", [(42, "no text")]),
    "a long cell": ("x.csv", lambda: csv_of(GOOD) + b"a,2,Reverse: l v," + b"v" * 200_000 + b"\n", [(42, "the tokenizer does not know")]),
    "a chat that is no JSON": ("x.csv", lambda: b'id,messages\na,"[{"\nb,[]\nc,\n', "x.csv:2 (id 'a'): `messages` is not a list"),
    # parquet
    "parquet with wrong columns": ("x.parquet", lambda: parquet_of(question=["l"] * 3, answer=["v"] * 3), "x.parquet:1 (id None): unknown shape"),
    "parquet with numbers for texts": ("x.parquet", lambda: parquet_of(instruction=[1.0] * 3, output=["v"] * 3), "`instruction` is a number, not text"),
    "parquet with bytes for texts": ("x.parquet", lambda: parquet_of(instruction=[b"l"] * 3, output=["v"] * 3), "`instruction` is bytes, not text"),
    "parquet with dates for texts": ("x.parquet", lambda: parquet_of(instruction=times("UTC", 3), output=["v"] * 3), "x.parquet:1"),
    "parquet with an unknown time zone": ("x.parquet", lambda: parquet_of(instruction=["l"] * 3, output=["v"] * 3, when=times("Moon/Sea", 3)), "x.parquet:1"),
    "parquet with dates out of range": ("x.parquet", lambda: parquet_of(instruction=["l"] * 3, output=["v"] * 3, when=dates(2**30, 3)), "a cell cannot be read"),
    "parquet with a column name that is not UTF-8": ("x.parquet", lambda: swap(parquet_of(ab=["l"] * 3, output=["v"] * 3), b"ab", b"a\xff"), "not readable as parquet"),
    "parquet with a column named twice": ("x.parquet", twin_columns, "'output' twice"),
    "parquet with nulls": ("x.parquet", lambda: parquet_of([*GOOD, {"id": None, "score": None, "data": None}]), [(41, "unknown shape")]),
    "parquet with invalid UTF-8": (
        "x.parquet",
        lambda: parquet_of([{"id": row["id"], "score": row["score"], "output": row["data"][1]} for row in [*GOOD, GOOD[0] | {"id": "bad"}]], instruction=bad_texts(41)),
        [(41, "invalid UTF-8")],
    ),
}


IDS = [row["id"] for row in GOOD]


def bins(**ids: object) -> bytes:
    """A list of bins as `curriculum.bins.from` reads it."""
    return json.dumps({"bins": [{"name": name, "ids": listed} for name, listed in ids.items()]}).encode()


# name -> the file of bins (None: there is none), the line's text
PHASES: dict[str, tuple[bytes | None, str]] = {
    "missing": (None, "cannot read '{path}': No such file"),
    "empty": (b"", "is not of the form"),
    "no JSON": (b'{"bins": [', "is not of the form"),
    "nesting of 10,000 levels": (b'{"bins": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "is not of the form"),
    "ids that are a text": (b'{"bins": [{"name": "a", "ids": "ab"}]}', "is not of the form"),
    "a name that ends in a line break": (b'{"bins": [{"name": "a\\n", "ids": []}]}', "must be distinct and made of letters"),
    "an array": (json.dumps([IDS]).encode(), "is not of the form"),
    "null": (b"null", "is not of the form"),
    "without bins": (b'{"phases": []}', "is not of the form"),
    "bins by name": (json.dumps({"bins": {"easy": IDS}}).encode(), "is not of the form"),
    "bins without ids": (b'{"bins": [{"name": "easy"}]}', "is not of the form"),
    "ids null": (bins(easy=None), "is not of the form"),
    "ids a number": (bins(easy=7), "is not of the form"),
    "ids of 5,000 digits": (b'{"bins": [{"name": "easy", "ids": [' + b"1" * 5000 + b"]}]}", "is not of the form"),
    "UTF-16": (bins(easy=IDS).decode().encode("utf-16"), "is not of the form"),
    "invalid UTF-8": (bins(easy=["\xff"]).replace(b"\\u00ff", b"\xff"), "is not of the form"),
    "unknown ids": (bins(easy=IDS[:20], hard=[*IDS[20:], "nobody"]), "lists 1 ids that the data does not have, such as 'nobody'"),
    "half of a surrogate pair": (bins(easy=[*IDS, "\ud800"]), "lists 1 ids that the data does not have, such as '\\ud800'"),
    "an id in two bins": (bins(easy=IDS[:20], hard=IDS[19:]), f"id '{IDS[19]}' is in bins 'easy' and 'hard'"),
    "two bins of one name": (b'{"bins": [{"name": "a", "ids": []}, {"name": "a", "ids": []}]}', "must be distinct"),
    "a name that is a path": (bins(**{"../easy": IDS}), "must be distinct and made of letters"),
    "no bins": (b'{"bins": []}', "no row can be used"),
    "an empty bin": (bins(easy=IDS, hard=[]), "phase 'hard' is empty"),
    "no ids": (bins(easy=[]), "no row can be used"),
}


CHAT = [{"role": "user", "content": "l v"}, {"role": "assistant", "content": "v l"}]


def arrow_columns() -> dict[str, Any]:
    """Three rows of every kind of column that a text or a score might come in."""
    import decimal

    import pyarrow as pa

    texts = pa.array(["l v", "v l", None])
    said = pa.array([CHAT, [], None])
    return {
        "text": texts,
        "large": texts.cast(pa.large_string()),
        "view": texts.cast(pa.string_view()),
        "bytes": texts.cast(pa.binary()),
        "dictionary": texts.dictionary_encode(),
        "bad": bad_texts(3),
        "null": pa.nulls(3),
        "int": pa.array([1, 2, None]),
        "float": pa.array([1.5, float("nan"), None]),
        "half": pa.array([1, 2, 3], pa.float32()),
        "true": pa.array([True, False, None]),
        "decimal": pa.array([decimal.Decimal("3.1")] * 3),
        "time": times("UTC", 3),
        "zone": times("Moon/Sea", 3),
        "late": pa.array([2**52] * 3, pa.timestamp("s")),
        "date": dates(2**30, 3),
        "span": pa.array([2**62] * 3, pa.duration("s")),
        "noon": pa.array([86_399_999_999_999] * 3, pa.time64("ns")),
        "chat": said,
        "list": pa.array([["l", "v"], [None], None]),
        "large list": said.cast(pa.large_list(said.type.value_type)),
        "struct": pa.array([{"role": ["user"], "content": ["l"]}, {"role": ["user", "assistant"], "content": ["l", "v"]}, None]),
        "map": pa.array([[("role", "user")], [("role", "user"), ("role", "user")], None], pa.map_(pa.string(), pa.string())),
        "bad list": pa.ListArray.from_arrays([0, 1, 2, 3], bad_texts(3)),
    }

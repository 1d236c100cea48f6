"""Judgments in files: our own `judgments.jsonl`, and the two-order logs that others have recorded.

A recorded log is {"Meta_Info": {"dataset_name"}, "data": [{PROMPT, "Answer1", "Answer2", "review", "scores", "review_reverse", "scores_reverse"}]}.
Its scores are lists written as text, (Answer1's, Answer2's); `scores_reverse` has them by place, so Answer2's first. Its prompt's key differs from
set to set: it is the one that is left.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path
from reprlib import repr as short
from typing import Any

from phased_ift_jax.files import write_whole
from phased_ift_jax.records import Judged, Judgment, UserError

UNITS = ("characters", "words", "tokens")
LOWEST, HIGHEST = 0.0, 10.0
LONGEST = 2**53  # up to which a float tells whole numbers apart
FIRST = ("candidate", "baseline")  # whose answer came first, in each order
UNNAMED = ("Answer1", "Answer2")  # candidate and baseline in a recorded log, which names no models
NAMES = ("id", "set", "candidate", "baseline", "judge")


def lengths_of(candidate: str, baseline: str) -> dict[str, tuple[int, int]]:
    """Characters and words of two answers."""
    return {"characters": (len(candidate), len(baseline)), "words": (len(candidate.split()), len(baseline.split()))}


def judged(value: Any, key: str = "") -> Judged:
    """Two scores, (candidate's, baseline's), as a judged order; anything else is unparseable, or out of range."""
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(score, int | float) and not isinstance(score, bool) for score in value):
        return Judged("unparseable", reason=f"no two scores: {short(value)}", key=key)
    if not all(LOWEST <= score <= HIGHEST for score in value):
        return Judged("out_of_range", reason=f"scores beyond 0 to 10: {short(value)}", key=key)
    return Judged("ok", (float(value[0]), float(value[1])), key=key)


def row_of(judgment: Judgment) -> dict[str, Any]:
    """A line of `judgments.jsonl`."""
    names = (judgment.id, judgment.test_set, judgment.candidate, judgment.baseline, judgment.judge)
    orders = [{"first": first} | asdict(order) for first, order in zip(FIRST, judgment.orders, strict=True)]
    return dict(zip(NAMES, names, strict=True)) | {"orders": orders, "lengths": {unit: judgment.lengths.get(unit) for unit in UNITS}}


def write_judgments(path: Path, judgments: Iterable[Judgment]) -> None:
    write_whole(path, "".join(json.dumps(row_of(judgment)) + "\n" for judgment in judgments))


def read_judgments(path: Path, judge: str = "") -> list[Judgment]:
    """Our own lines or a recorded log, whichever the file holds; `judge` names who judged a log, which does not say it.

    Raises:
        UserError: it cannot be read, or is neither; the line says where and why.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read '{path}': {getattr(error, 'strerror', None) or 'it is not UTF-8 text'}; name a judgments.jsonl or a recorded log") from None
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    is_log = isinstance(whole, dict) and "data" in whole
    found = _recorded(whole, path, judge or path.stem) if is_log else []
    for number, line in enumerate(() if is_log else text.split("\n"), 1):
        if line.strip():
            try:
                found.append(_judgment(json.loads(line)))
            except (ValueError, KeyError, TypeError) as error:
                what = f"no {error}" if isinstance(error, KeyError) else str(error)
                raise UserError(f"{path}:{number}: not a judgment ({what}); wanted: a line of judgments.jsonl, as docs/formats.md has it") from None
    if not found:
        raise UserError(f"'{path}' holds no judgment; name a judgments.jsonl or a recorded log")
    return found


def _judgment(row: Any) -> Judgment:
    identifier, test_set, candidate, baseline, judge = names = [row[name] for name in NAMES]
    if not all(isinstance(name, str) for name in names):
        raise ValueError(f"{', '.join(NAMES)} are not all texts")
    if [order["first"] for order in row["orders"]] != list(FIRST):
        raise ValueError("`orders` are not two, with the candidate's answer first and with the baseline's first")
    first, second = (_order(order) for order in row["orders"])
    by_unit = row.get("lengths") or {}
    lengths = {unit: pair for unit, pair in by_unit.items() if pair is not None} if isinstance(by_unit, dict) else None
    if lengths is None or not all(isinstance(pair, list) and len(pair) == 2 and all(type(each) is int and 0 <= each <= LONGEST for each in pair) for pair in lengths.values()):
        raise ValueError("`lengths` are not pairs of whole numbers by unit")
    return Judgment(identifier, test_set, candidate, baseline, judge, (first, second), {unit: (pair[0], pair[1]) for unit, pair in lengths.items()})


def _order(row: dict[str, Any]) -> Judged:
    outcome, key, reason = row["outcome"], row.get("key", ""), row.get("reason", "")
    if not (isinstance(key, str) and isinstance(reason, str)):
        raise ValueError("`reason` and `key` are not texts")
    if outcome == "ok":
        order = judged(row["scores"], key)
        if order.scores is None:
            raise ValueError(order.reason)
        return replace(order, reason=reason)
    if row.get("scores") is not None or not isinstance(outcome, str):
        raise ValueError(f"outcome {short(outcome)} with scores {short(row.get('scores'))}; only `ok` has scores")
    return Judged(outcome, reason=reason, key=key)


def _recorded(log: dict[str, Any], path: Path, judge: str) -> list[Judgment]:
    try:
        name, rows = str(log["Meta_Info"]["dataset_name"]), log["data"]
        answers = [(row["Answer1"], row["Answer2"], _scores(row["scores"]), _scores(row["scores_reverse"])) for row in rows]
        return [
            Judgment(str(number), name, *UNNAMED, judge, (judged(scores), judged(reverse and reverse[::-1])), lengths_of(first, second))
            for number, (first, second, scores, reverse) in enumerate(answers, 1)
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"'{path}' is no recorded log of judgments ({type(error).__name__}: {error}); wanted: Meta_Info.dataset_name, and data with two scores a row") from None


def _scores(value: Any) -> list | None:
    """A list, or one written as text; None for anything else."""
    try:
        value = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return None
    return value if isinstance(value, list) else None

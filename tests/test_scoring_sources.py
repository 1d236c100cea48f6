"""Difficulty that is not paid for: imported, by length, by instruction-following difficulty; and what every scorer writes and publishes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from phased_ift_jax.records import Source, UserError
from phased_ift_jax.scoring import scored_file
from phased_ift_jax.scoring.scored_file import Unscored, beside


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_scored_file_and_what_lies_beside_it_say_the_same(tmp_path: Path) -> None:
    out = scored_file.check(str(tmp_path / "new" / "scored.jsonl"), [])
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


@pytest.mark.parametrize(("out", "wanted"), [("gs://b/scored.jsonl", "in a bucket"), ("scored.json", "no .jsonl"), ("{data}", "the file that is scored")])
def test_out_is_refused_in_one_line(tmp_path: Path, out: str, wanted: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("{}\n")
    with pytest.raises(UserError, match=wanted):
        scored_file.check(out.format(data=data), [str(data)])

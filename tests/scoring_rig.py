"""What tests of scoring share: real records, the verb as a process and in this one, and what a ledger says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fake_openai
import pytest

from phased_ift_jax import cli, score

KEY = "sk-0123456789abcdef-of-the-tests"
ROOT = Path(__file__).resolve().parents[1]
QUICK = ("--settle_seconds", "1", "--timeout_seconds", "1.5")


def some_data(path: Path, shared_data: Path, count: int, start: int = 0) -> Path:
    rows = json.loads((shared_data / "alpaca" / "random_9k.json").read_text())
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[start : start + count]), encoding="utf-8")
    return path


def words(data: Path, out: Path, url: str, *more: str) -> list[str]:
    return [str(data), "--out", str(out), "--model", "gpt-4o-mini", "--base_url", url, *QUICK, *more]


def process(argv: list[str], verb: str = "score", **options: Any) -> subprocess.Popen[str]:
    env = os.environ | {"OPENAI_API_KEY": KEY, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-m", f"phased_ift_jax.{verb}", *argv], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def run(argv: list[str], monkeypatch: pytest.MonkeyPatch, key: str | None = KEY, main: Callable[[Sequence[str]], int] = score.main) -> int:
    """The verb in this process; its exit code, as `cli.run` gives it."""
    if key is None:
        monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(SystemExit) as ended:
        cli.run(main, argv)
    return int(ended.value.code or 0)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def accounted(out: Path) -> tuple[list[str], Counter[str]]:
    """Ids that are scored, and how many records have each other outcome."""
    return [row["id"] for row in lines(out)], Counter(row["outcome"] for row in lines(out.with_name(f"{out.stem}.unscored.jsonl")))


def pending(ledger: Path) -> set[tuple[str, int]]:
    """Attempts that were sent and have no answer line."""
    noted = lines(ledger)
    return {(line["sent"], line["attempt"]) for line in noted if "sent" in line} - {(line["key"], line["attempt"]) for line in noted if "key" in line}


def same_files(one: Path, other: Path) -> bool:
    return all(one.with_name(one.stem + end).read_bytes() == other.with_name(other.stem + end).read_bytes() for end in (".jsonl", ".unscored.jsonl"))


__all__ = ["KEY", "QUICK", "accounted", "fake_openai", "lines", "pending", "process", "run", "same_files", "some_data", "words"]

"""Laws of what is run unattended on machines that we do not have: it says what is missing, and its whole way is gone once on this one."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
CHECK, SPEED = ROOT / "benchmarks/gpu_check.sh", ROOT / "benchmarks/gpu_speed.sh"


def start(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHON": sys.executable} | environment
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def test_the_gpu_check_goes_its_whole_way(tmp_path: Path) -> None:
    done = start(CHECK, "--tiny", "--steps", "2", "--rows", "2", OUT=str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told == json.loads((tmp_path / "gpu_check.json").read_text())
    assert [(case["kernel"], case["kv_heads"], case["window"]) for case in told["attention"]] == [("xla", 8, None), ("xla", 8, 100), ("xla", 2, None), ("xla", 2, 100)]
    assert all(0 < case["off"] <= case["limit"] < 0.05 for case in told["attention"])
    seen = told["training"]
    assert seen["tokens_per_second"] == pytest.approx(2 * 256 / seen["step_seconds"])
    parameters = 2 * (64 * 16 * (4 + 4 + 4 + 4) + 3 * 64 * 172) + 512 * 64
    assert seen["flops_full"] / seen["tokens_per_second"] == pytest.approx(6 * parameters + 12 * 2 * 4 * 16 * 256)
    assert seen["flops_causal"] / seen["tokens_per_second"] == pytest.approx(6 * parameters + 6 * 2 * 4 * 16 * 256)
    assert seen["mfu_full"] is seen["peak_bytes"] is None, "a CPU has neither"
    assert "WRONG" not in done.stdout


def test_the_gpu_speed_goes_its_whole_way(tmp_path: Path) -> None:
    """Both sides of one kind of step, each in processes of its own; both count the same tokens, and the first loss is that of weights that know nothing."""
    pytest.importorskip("torch", reason="PyTorch is not installed: the other side was not run")
    done = start(SPEED, "--tiny", "--steps", "1", "--kinds", "alpaca", OUT=str(tmp_path), TORCH_PYTHON=sys.executable, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stderr[-2000:]
    [result] = json.loads((tmp_path / "gpu_speed.json").read_text())["results"]
    assert set(result["sides"]) == {"ours", "theirs, float32 weights", "theirs, bfloat16 weights"}
    assert len({side[0]["tokens"] for side in result["sides"].values()}) == 1
    assert all(abs(side[0]["loss_last"] - 6.24) < 0.2 for side in result["sides"].values()), "ln 512"
    assert result["times"] == pytest.approx(result["medians"]["ours"] / max(speed for side, speed in result["medians"].items() if side != "ours"))


def test_a_kernel_that_is_wrong_is_found() -> None:
    """One that does not see where examples end, and one whose window is off by one."""
    program = """
import sys; sys.path.insert(0, "benchmarks")
import gpu_check
from phased_ift_jax.models import attention as a
a.IMPLEMENTATIONS["one"] = lambda q, k, v, segments, window: a.attend_packed(q, k, v, segments * 0, window)
a.IMPLEMENTATIONS["off"] = lambda q, k, v, segments, window: a.attend_packed(q, k, v, segments, window + 1)
print(*(gpu_check.attention(name, 2, 100, 256, 16)["right"] for name in ("xla", "one", "off")))
"""
    assert start(sys.executable, "-c", program, PYTHONPATH=str(ROOT)).stdout == "True False False\n"


def test_without_a_gpu_it_refuses_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for tool in ("bash", "dirname", "env"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or tool)
    for done in (start(SPEED, PATH=str(tmp_path / "bin")), start(CHECK, PATH=str(tmp_path / "bin")), start(sys.executable, CHECK.with_suffix(".py"), PYTHONPATH=str(ROOT))):
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1


def test_shellcheck_has_nothing_to_say() -> None:
    checker = shutil.which("shellcheck", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert checker, "shellcheck is missing: it comes with '.[test]'"
    done = start(checker, CHECK, SPEED)
    assert done.returncode == 0, done.stdout
    assert all(os.access(script, os.X_OK) for script in (CHECK, SPEED))


@pytest.fixture
def training(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name, value in {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}.items():
        monkeypatch.setenv(name, value)
    return importlib.import_module("training")


def test_our_side_trains_in_turns_and_counts_real_tokens(training: ModuleType, tmp_path: Path) -> None:
    """What it counts are the tokens of the rows that the run itself notes as trained; what the peers are given is the same, in the same order."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join((ROOT / "configs/quickstart/data.jsonl").read_text().splitlines(keepends=True)[:100]))
    config = training.config_of(ROOT / "configs/quickstart/model", rows, tmp_path / "run", 64)
    config["model"]["init"] = "random"
    seen = training.surveyed(config)
    training.write_examples(tmp_path / "examples.npz", seen)
    side = training.Side("ours", "ours", [sys.executable, str(ROOT / "benchmarks/training_ours.py")], {"config": config, "warm": 1, "warm_seconds": 0})
    side.start(tmp_path)
    try:
        turns = [side.turn(1), side.turn(2)]  # step 2 gets warm, and 3 is counted; 4, and 5 and 6
    finally:
        side.end()
    assert [turn["steps"] for turn in turns] == [1, 2]
    assert all(turn["seconds"] > 0 for turn in turns)
    assert side.facts["compile_seconds"] > 0

    lengths = {record.id: len(example.tokens) for record, example in zip(seen.dataset.records, seen.dataset.examples, strict=True)}
    trained = [[lengths[name] for name in json.loads(line)["ids"]] for line in (tmp_path / "run/trained_ids.jsonl").read_text().splitlines()]
    assert [len(step) for step in trained] == [16, 16, 16, 16], "a step is noted while the one after it is under way"
    assert turns[0]["tokens"] == sum(trained[2]), "what gets warm is not counted"
    tokens, marks = importlib.import_module("training_peers").load(str(tmp_path / "examples.npz"))
    assert [len(row) for row in tokens[:64]] == [length for step in trained for length in step]
    assert turns[1]["tokens"] == sum(len(row) for row in tokens[64:96])
    first = seen.dataset.examples[seen.plan.phases[0].steps[0][0]]
    assert tokens[0].tolist() == first.tokens.tolist()
    assert [at for at, mark in enumerate(marks[0]) if mark] == [at for begin, end in first.responses for at in range(begin, end)]


def test_a_side_that_fails_is_quoted(training: ModuleType, tmp_path: Path) -> None:
    side = training.Side("ours", "ours", [sys.executable, "-c", "raise SystemExit('no such thing')"], {})
    with pytest.raises(RuntimeError, match="no such thing"):
        side.start(tmp_path)


@pytest.mark.parametrize(("fast", "apart", "kept"), [(500.0, 1e-4, True), (390.0, 1e-4, False), (500.0, 2e-3, False)])
def test_a_missed_bound_is_told(training: ModuleType, fast: float, apart: float, kept: bool) -> None:
    """Ours against the fastest of TRL's, by medians, and against its losses."""
    rates = {"ours": ("ours", [1.0, fast, 9999.0]), "trl padded": ("trl padded", [50.0]), "trl packed 512": ("trl packed", [100.0, 90.0, 110.0])}
    sides = [
        {"side": side, "group": group, "rates": each, "cpu_rates": each, "tokens_per_second": statistics.median(each), "start_seconds": 1.0}
        for side, (group, each) in rates.items()
    ]
    rows = [{"side": side, "seconds": 1.0, "losses": [2.0, 1.0]} for side in ("ours", "trl padded")]
    result = {"model": "stories260k", "sides": sides, "trace": {"steps": 2, "learning_rate": 1e-3, "rows": rows, "largest_difference": apart}}
    lines, seen = training.table([result])
    assert seen is kept
    assert any("MISSED" in line for line in lines) is not kept
    assert any(f"ours / trl: {fast / 100:.2f}" in line for line in lines)

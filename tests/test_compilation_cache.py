"""Laws of the compilation cache: a second start compiles nothing and ends as the first did, and no cache is worth a run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fake_gcs
import pytest
from test_run import ROOT, assert_same_result, make_config, rows  # noqa: F401

from phased_ift_jax import compilation_cache
from phased_ift_jax.config import dump

FREE = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "XLA_"))} | {
    "JAX_PLATFORMS": "cpu",
    "JAX_LOG_COMPILES": "true",
    "JAX_EXPLAIN_CACHE_MISSES": "true",
}


def start(config: Any, folder: Path, **environment: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    (folder / "config.yaml").write_text(dump(config))
    command = [sys.executable, "-m", "phased_ift_jax.train", str(folder / "config.yaml")]
    return subprocess.Popen(command, cwd=ROOT, env=FREE | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def compiled(said: str) -> tuple[int, int]:
    """How many programs were compiled, and how many taken from the cache."""
    return len(re.findall("PERSISTENT COMPILATION CACHE MISS for", said)), len(re.findall("Persistent compilation cache hit for", said))


def ended(process: subprocess.Popen[str]) -> str:
    said = process.communicate(timeout=300)[0]
    assert process.returncode == 0, said[-3000:]
    assert not re.search("Error (reading|writing) persistent", said), said[-3000:]
    return said


def test_a_second_start_compiles_nothing_and_its_result_is_the_same(rows, tmp_path):  # noqa: F811
    """After two first ones at once, of which a third has been killed in writing."""
    caches = tmp_path / "caches"
    half = caches / "phased_ift_jax" / "compiled" / compilation_cache.host() / "jit_step-0123-cache"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half of")
    both = [start(make_config(rows, tmp_path / name / "run"), tmp_path / name, XDG_CACHE_HOME=str(caches)) for name in ("one", "two")]
    told = [ended(process) for process in both]
    assert all(f"\ncache   {half.parent}\n" in said for said in told)
    assert sum(compiled(said)[0] for said in told) > 10, "what one has compiled the other may find"
    assert not half.exists()
    misses, hits = compiled(ended(start(make_config(rows, tmp_path / "again" / "run"), tmp_path / "again", XDG_CACHE_HOME=str(caches))))
    assert misses == 0
    assert hits > 10
    for other in ("two", "again"):
        assert_same_result(tmp_path / "one" / "run", tmp_path / other / "run")


def test_a_cache_that_cannot_be_written_costs_a_line(rows, tmp_path):  # noqa: F811
    (tmp_path / "file").write_text("")
    config = make_config(rows, tmp_path / "run", training__max_steps=1, data__eval_size=0, curriculum__order=[1])
    said = ended(start(config, tmp_path / "a", XDG_CACHE_HOME=str(tmp_path / "file")))
    assert len([line for line in said.splitlines() if str(tmp_path / "file") in line]) == 1
    assert re.search(rf"\ncache   none, every start compiles: .*'{tmp_path}/file.*; name a folder with JAX_COMPILATION_CACHE_DIR\n", said)


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[dict[str, str]]:
    with fake_gcs.serving("bucket") as gcs:
        yield fake_gcs.environment(gcs) | {"PHASED_IFT_RUN_ID": "this-run"}


def test_beside_a_run_in_a_bucket(bucket, rows, tmp_path):  # noqa: F811
    """Another run beside the first, on a machine with an empty disk: it compiles nothing."""
    short = {"training__max_steps": 1, "data__eval_size": 0, "curriculum__order": [1]}
    told = []
    for name in ("one", "two"):
        config = make_config(rows, f"gs://bucket/runs/{name}", **short)
        said = ended(start(config, tmp_path / name, PHASED_IFT_WORK=str(tmp_path / name / "work"), XDG_CACHE_HOME=str(tmp_path / name / "caches"), **bucket))
        assert f"\ncache   gs://bucket/runs/compiled/{compilation_cache.host()}\n" in said
        told.append(compiled(said))
    assert told[0][0] > 5
    assert told[1][0] == 0
    assert told[1][1] > 5


# ---- where it lies ----

PLACE, ENABLED, SIZE, LEAST = "JAX_COMPILATION_CACHE_DIR", "JAX_ENABLE_COMPILATION_CACHE", "JAX_COMPILATION_CACHE_MAX_SIZE", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    for name in (PLACE, ENABLED, SIZE, LEAST, "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES"):
        monkeypatch.setenv(name, "")  # so that what `choose` sets is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return monkeypatch


def test_it_is_the_users_and_bounded(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = compilation_cache.choose("runs/one", several=False)
    assert str(folder) == os.environ[PLACE] == f"{tmp_path}/caches/phased_ift_jax/compiled/{compilation_cache.host()}"
    assert (os.environ[SIZE], os.environ[LEAST]) == (str(5 * 10**9), "0")
    assert list(tmp_path.iterdir()) == [], "nothing is written before the run is known to be sound"
    assert compilation_cache.ready(folder) == str(folder)
    assert [path.name for path in folder.iterdir()] == [".lockfile"]


def test_of_several_processes_it_lies_where_all_see_it(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = compilation_cache.choose(str(tmp_path / "shared/one"), several=True)
    assert compilation_cache.ready(folder) == f"{tmp_path}/shared/compiled/{compilation_cache.host()}"
    assert not (tmp_path / "shared/one").exists()


def test_what_the_user_has_set_stays(clean: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean.setenv(SIZE, "-1")
    folder = compilation_cache.choose("runs/one", several=False)
    folder.mkdir(parents=True)
    (folder / "a-cache").touch()  # JAX writes no times where there are no bounds
    compilation_cache.ready(folder)
    assert os.environ[SIZE] == "-1"
    assert (folder / "a-cache").exists()
    clean.setenv(PLACE, str(tmp_path / "mine"))
    clean.delenv(LEAST)
    assert compilation_cache.choose("gs://bucket/one", several=True) is None
    assert compilation_cache.ready(None) == str(tmp_path / "mine")
    assert LEAST not in os.environ
    for word in ("false", "0", "Off"):
        clean.setenv(ENABLED, word)
        assert compilation_cache.choose("runs/one", several=False) is None
        assert compilation_cache.ready(None) == f"none (JAX_ENABLE_COMPILATION_CACHE {word})"
    assert not (tmp_path / "mine").exists()


def test_a_user_without_a_home_keeps_nothing(clean: pytest.MonkeyPatch) -> None:
    def no_home(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    clean.delenv("XDG_CACHE_HOME")
    clean.setattr(Path, "expanduser", no_home)
    assert compilation_cache.ready(compilation_cache.choose("runs/one", several=False)).startswith("none, every start compiles: this user has no home")
    assert PLACE not in os.environ


def test_processors_that_differ_share_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = Path.read_text
    seen = set()
    for flags in ("fpu avx2", "fpu avx2 avx512f", "avx2 fpu"):
        (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
        monkeypatch.setattr(Path, "read_text", lambda path, *a, **k: real(tmp_path / "cpuinfo" if str(path) == "/proc/cpuinfo" else path, *a, **k))
        seen.add(compilation_cache.host())
    assert len(seen) == 2

"""What the tests share: eight virtual CPU devices, the shared data, tiny models made by `transformers`, and a list of figures measured."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

# before jax is imported by anything: jax reads these once
os.environ["JAX_PLATFORMS"] = "cpu"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if "PYTEST_XDIST_WORKER" not in os.environ:  # a run keeps what it compiles in its user's cache, which is not ours: one for all workers
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="phased-ift-caches-")

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

WORKER = "PYTEST_XDIST_WORKER" in os.environ
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data that lies beside the repository; it is not ours to copy into it."""
    if not SHARED_DATA.is_dir():
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"needs the shared data: no {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes model folders: `tiny_model("mistral", seed=1, dtype="bfloat16", max_shard_size="20KB", sliding_window=8)`; equal arguments share one.

    Weights are random by `transformers`, then widened so that attention is far from uniform, and norms are moved off one: a rotation,
    a window or a scale that is wrong shows. They are rounded to bfloat16, so that float32 and bfloat16 hold the same numbers.
    """
    made: dict[str, Path] = {}

    def make(family: str = "llama", *, seed: int = 0, dtype: str = "float32", max_shard_size: str = "5GB", **sizes: object) -> Path:
        torch = pytest.importorskip("torch", reason="models are made by transformers on torch")
        import transformers

        from phased_ift_jax.models.hf_folder import FAMILIES

        key = repr((family, seed, dtype, max_shard_size, sorted(sizes.items())))
        if key not in made:
            config = transformers.CONFIG_MAPPING[family](**TINY | {"bos_token_id": 1, "eos_token_id": 2} | sizes)
            torch.manual_seed(seed)
            model = getattr(transformers, FAMILIES[family].ARCHITECTURE)(config)
            with torch.no_grad():
                for name, weight in model.named_parameters():
                    weight.copy_((1 + 0.3 * torch.randn_like(weight) if "norm" in name else 0.2 * torch.randn_like(weight)).bfloat16())
            made[key] = tmp_path_factory.mktemp(family)
            model.to(getattr(torch, dtype)).save_pretrained(made[key], max_shard_size=max_shard_size)
        return made[key]

    return make


@pytest.fixture(scope="session")
def compilation_cache() -> Iterator[None]:
    """For tests that make whole runs of one model again and again: what was compiled once, by whatever worker, is not compiled twice."""
    import jax

    options = {
        "jax_compilation_cache_dir": f"{os.environ['XDG_CACHE_HOME']}/in-process",
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_compilation_cache_max_size": 5 * 10**9,  # only with a bound does JAX lock what it writes
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def programs_end_with_their_file() -> Iterator[None]:
    """What a file of tests has compiled goes with it: each program is mapped into memory some ten times, and at 65,530 mappings a process dies."""
    yield
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()


@pytest.fixture
def measured(request: pytest.FixtureRequest) -> Callable[[str, float], None]:
    """`measured(what, value)` notes a figure; the largest of each is printed at the end of the run, next to the bound it was held to."""
    return lambda what, value: request.node.user_properties.append(("measured", (what, float(value))))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Of all workers: what a test has noted comes with its report."""
    largest: dict[str, float] = {}
    reports = [report for reports in terminalreporter.stats.values() for report in reports if isinstance(report, pytest.TestReport)]
    for name, noted in (one for report in reports if report.when == "call" for one in report.user_properties):
        if name == "measured":
            what, value = noted
            largest[what] = max(largest.get(what, 0.0), value)
    if largest:
        terminalreporter.section("largest figures measured")
        for what, value in largest.items():
            terminalreporter.write_line(f"{what}: {value:.3g}")


def pytest_unconfigure() -> None:
    if not WORKER:
        shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)

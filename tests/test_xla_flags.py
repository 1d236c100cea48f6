"""Laws of XLA's flags: every flag of the table is known to what is installed, each chip gets its own, and nothing overrules the user."""

from __future__ import annotations

import http.server
import importlib.util
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from phased_ift_jax import processes, xla_flags
from phased_ift_jax.xla_flags import CPU, FLAGS, GPUS, TPUS, flags_for, set_flags

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu, which comes with '.[tpu]'")


def run(program: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    environment = clean | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"} | environment
    return subprocess.run([sys.executable, "-c", program, *words], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)


def spelt(flags: dict[str, str]) -> str:
    return " ".join(f"--{name}={value}" for name, value in flags.items())


COMPILE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
devices = topologies.get_topology_desc(platform="tpu", topology_name=sys.argv[1]).devices
split = NamedSharding(Mesh(np.array(devices), ("x",)), PartitionSpec("x"))
square = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=split)
jax.jit(lambda a: a @ a, out_shardings=split).lower(square).compile(compiler_options=json.loads(sys.argv[2]))
print("compiled")
"""


@needs_libtpu
@pytest.mark.parametrize("chip", TOPOLOGIES)
def test_the_tpu_compiler_takes_every_flag_of_its_chip(chip: str) -> None:
    """From the environment, as a run sets them, and as options of one compilation, as a planner has them."""
    told = run(COMPILE, TOPOLOGIES[chip], json.dumps(flags_for(chip)), LIBTPU_INIT_ARGS=spelt(flags_for(chip)))
    assert told.stdout == "compiled\n", told.stderr[-2000:]


@needs_libtpu
def test_the_tpu_compiler_refuses_what_it_does_not_know() -> None:
    """So that the test before can fail."""
    assert "Unknown command line flag 'xla_tpu_is_no_flag'" in run(COMPILE, TOPOLOGIES["v5e"], "{}", LIBTPU_INIT_ARGS="--xla_tpu_is_no_flag=true").stderr
    assert "No such compile option: 'xla_tpu_is_no_flag'" in run(COMPILE, TOPOLOGIES["v5e"], '{"xla_tpu_is_no_flag": "true"}').stderr


@pytest.mark.parametrize("chip", GPUS.values())
def test_jaxlib_takes_every_flag_of_a_gpu(chip: str) -> None:
    program = "import jax; print(jax.jit(lambda x: x + 1)(1))"
    told = run(program, XLA_FLAGS=spelt(flags_for(chip)))
    assert told.stdout == "2\n", told.stderr[-2000:]
    assert "Unknown flag in XLA_FLAGS: --xla_gpu_is_no_flag" in run(program, XLA_FLAGS="--xla_gpu_is_no_flag=true").stderr


def test_every_chip_has_flags() -> None:
    assert set(FLAGS) == {*TPUS.values(), *GPUS.values()} == {"v4", "v5e", "v5p", "v6e", "h100", "h200"}
    for chip in FLAGS:
        assert {name.split("_")[0] for name in flags_for(chip)} == {"xla"}
        assert any("gpu" in name for name in flags_for(chip)) == chip.startswith("h")
    assert flags_for("v6e")["xla_tpu_scoped_vmem_limit_kib"] == "98304"
    assert flags_for("a100") == {}


# ---- which chip this is ----


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """A machine of this environment, with an nvidia-smi of this test's own, or none."""

    def make(smi: str | None = None, **environment: str) -> None:
        for name in ("JAX_PLATFORMS", "TPU_ACCELERATOR_TYPE", "GCE_METADATA_HOST", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
            monkeypatch.delenv(name, raising=False)
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/nvidia-smi").unlink(missing_ok=True)
        if smi is not None:
            (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{smi}\n")
            (tmp_path / "bin/nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/bin")
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return make


@pytest.mark.parametrize(
    ("named", "chip"), [("v5litepod-16", "v5e"), ("v5p-32", "v5p"), ("v6e-8", "v6e"), ("v4-16", "v4"), ("v5litepod-1", "v5e"), ("v3-8", None), ("tpu7x-8", None), ("", None)]
)
def test_the_environment_names_a_tpu(machine: Callable[..., None], named: str, chip: str | None) -> None:
    machine(TPU_ACCELERATOR_TYPE=named)
    assert xla_flags.chip() == chip


@pytest.mark.parametrize(
    ("smi", "chip"),
    [
        ("echo 'NVIDIA H100 80GB HBM3'; echo 'NVIDIA H100 80GB HBM3'", "h100"),
        ("echo 'NVIDIA H200'", "h200"),
        ("echo 'NVIDIA H200 NVL'", "h200"),
        ("echo 'NVIDIA GH200 480GB'", None),
        ("echo 'NVIDIA A100-SXM4-80GB'", None),
        ("echo 'NVIDIA-SMI has failed'; exit 9", None),
        ("exit 0", None),
        (None, None),
    ],
)
def test_nvidia_smi_names_a_gpu(machine: Callable[..., None], smi: str | None, chip: str | None) -> None:
    machine(smi)
    assert xla_flags.chip() == chip


def test_a_platform_that_is_not_asked_for_is_not_looked_at(machine: Callable[..., None], tmp_path: Path) -> None:
    machine(f"touch {tmp_path}/asked; echo 'NVIDIA H200'", TPU_ACCELERATOR_TYPE="v6e-8", JAX_PLATFORMS="cpu")
    assert xla_flags.chip() is None
    assert not (tmp_path / "asked").exists()
    machine("echo 'NVIDIA H200'", TPU_ACCELERATOR_TYPE="v6e-8", JAX_PLATFORMS="cuda,cpu")
    assert xla_flags.chip() == "h200"


@pytest.fixture
def metadata() -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(f"{self.path} {self.headers['Metadata-Flavor']}")
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"v5litepod-16")

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def test_a_tpu_vm_is_asked_and_no_other_machine(machine: Callable[..., None], metadata: tuple[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host, asked = metadata
    machine(GCE_METADATA_HOST=host, http_proxy="http://127.0.0.1:1")
    monkeypatch.setattr(processes, "TPU_DEVICES", (str(tmp_path / "accel0"),))
    assert xla_flags.chip() is None
    assert asked == []
    (tmp_path / "accel0").touch()
    assert xla_flags.chip() == "v5e"
    assert asked == ["/computeMetadata/v1/instance/attributes/accelerator-type Google"]
    monkeypatch.setenv("GCE_METADATA_HOST", "127.0.0.1:1")
    assert xla_flags.chip() is None, "who cannot be asked says nothing"


@pytest.mark.parametrize(("libtpu", "chips"), [((), 4), ((0, 0, 42), 4), ((0, 0, 50), 1), ((0, 1, 0), 1)])
def test_only_a_v5e_fuses_all_gathers_where_the_compiler_refuses_it_elsewhere(monkeypatch: pytest.MonkeyPatch, libtpu: tuple[int, ...], chips: int) -> None:
    monkeypatch.setattr(xla_flags, "LIBTPU", libtpu)
    fused = [chip for chip in ("v5e", "v4", "v5p", "v6e") if flags_for(chip).get(xla_flags.ONLY_V5E) == "true"]
    assert fused == ["v5e", "v4", "v5p", "v6e"][:chips]


# ---- what is set ----


@needs_libtpu
def test_a_tpu_gets_its_flags(machine: Callable[..., None]) -> None:
    machine(TPU_ACCELERATOR_TYPE="v6e-8")
    lines = set_flags(deterministic=False)
    assert os.environ["LIBTPU_INIT_ARGS"] == spelt(flags_for("v6e"))
    assert "XLA_FLAGS" not in os.environ
    assert lines == [f"LIBTPU_INIT_ARGS={os.environ['LIBTPU_INIT_ARGS']}"]
    assert set_flags(deterministic=False) == lines, "said again, it changes nothing"


def test_a_gpu_gets_its_flags(machine: Callable[..., None]) -> None:
    machine("echo 'NVIDIA H200'")
    lines = set_flags(deterministic=True)
    assert os.environ["XLA_FLAGS"] == spelt(flags_for("h200") | {"xla_gpu_deterministic_ops": "true"})
    assert "LIBTPU_INIT_ARGS" not in os.environ
    assert lines == [f"XLA_FLAGS={os.environ['XLA_FLAGS']}", "XLA_CLIENT_MEM_FRACTION=0.9"]


def test_a_cpu_gets_its_flag(machine: Callable[..., None]) -> None:
    machine()
    assert set_flags(deterministic=False) == [f"XLA_FLAGS={spelt(CPU)}"]
    assert os.environ["XLA_FLAGS"] == spelt(CPU)
    machine(XLA_FLAGS="--xla_cpu_prefer_vector_width=256")
    assert set_flags(deterministic=False) == ["XLA_FLAGS=--xla_cpu_prefer_vector_width=256"]


def test_another_accelerator_gets_none(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "nvidiactl").touch()
    monkeypatch.setattr(xla_flags, "NVIDIA", tmp_path / "nvidiactl")
    machine("echo 'NVIDIA A100-SXM4-80GB'")
    assert set_flags(deterministic=False) == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert set_flags(deterministic=False) == [f"XLA_FLAGS={spelt(CPU)}"]


WIDTH = """
import glob, re, sys
import jax, jax.numpy as jnp
jax.jit(lambda x: jnp.exp(x) * x).lower(jnp.zeros((64, 64))).compile()
print(*{width for path in glob.glob(sys.argv[1] + "/*.ll") for width in re.findall('"prefer-vector-width"="([0-9]+)"', open(path).read())})
"""


def test_jaxlib_takes_the_flag_of_a_cpu(tmp_path: Path) -> None:
    """And hands it on to LLVM, which makes XLA's own loops; jax 0.12 dumps none of what it hands on."""
    narrow, wide = (run(WIDTH, str(tmp_path / name), XLA_FLAGS=f"--xla_dump_to={tmp_path / name} {flags}") for name, flags in (("narrow", ""), ("wide", spelt(CPU))))
    assert narrow.returncode == wide.returncode == 0, wide.stderr[-2000:]
    assert narrow.stdout.split() != ["512"]
    assert wide.stdout.split() == ["512"] * bool(narrow.stdout.split())


def test_what_the_user_has_set_stays(machine: Callable[..., None]) -> None:
    machine("echo 'NVIDIA H100'", XLA_FLAGS="--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=d", XLA_PYTHON_CLIENT_MEM_FRACTION="0.5")
    lines = set_flags(deterministic=False)
    rest = {name: value for name, value in flags_for("h100").items() if name != "xla_gpu_enable_latency_hiding_scheduler"}
    assert os.environ["XLA_FLAGS"] == f"--xla_gpu_enable_latency_hiding_scheduler=false --xla_dump_to=d {spelt(rest)}"
    assert lines == [f"XLA_FLAGS={os.environ['XLA_FLAGS']}", "XLA_PYTHON_CLIENT_MEM_FRACTION=0.5"]
    assert "XLA_CLIENT_MEM_FRACTION" not in os.environ, "JAX refuses both"


def test_a_flag_that_the_installed_library_does_not_know_is_left_out(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Told to XLA, it would end the process."""
    monkeypatch.setitem(FLAGS, "h100", {"xla_gpu_is_no_flag": "true"} | FLAGS["h100"])
    machine("echo 'NVIDIA H100'")
    lines = set_flags(deterministic=False)
    assert "is_no_flag" not in os.environ["XLA_FLAGS"]
    assert "--xla_gpu_enable_latency_hiding_scheduler=true" in os.environ["XLA_FLAGS"]
    assert lines[1] == "not known to this jaxlib, and left out: xla_gpu_is_no_flag"


def test_without_its_library_a_chip_gets_no_flags(machine: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(xla_flags, "LIBRARIES", dict.fromkeys(xla_flags.LIBRARIES, ("there_is_no_such_package", "lib.so")))
    machine(TPU_ACCELERATOR_TYPE="v6e-8")
    assert set_flags(deterministic=False) == []
    assert "LIBTPU_INIT_ARGS" not in os.environ


def test_a_run_says_what_is_set(tmp_path: Path) -> None:
    """The whole of it: a machine with an H200 by its nvidia-smi, whose plan names the flags that its XLA then takes."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA H200'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    words = ["configs/quickstart.yaml", "--output_dir", str(tmp_path / "run"), "--training.max_steps", "1", "--evaluation.exact_match", "false", "--data.eval_size", "0"]
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JAX_PLATFORMS": "", "XDG_CACHE_HOME": str(tmp_path)}
    told = run("import sys; from phased_ift_jax import cli, train; cli.run(train.main, sys.argv[1:])", *words, **environment)
    assert told.returncode == 0, told.stderr[-2000:]
    assert f"\nflags   XLA_FLAGS={spelt(flags_for('h200'))}\nflags   XLA_CLIENT_MEM_FRACTION=0.9\n" in told.stdout


@pytest.mark.skipif(not xla_flags.HUGE_PAGES.exists() or "[madvise]" not in xla_flags.HUGE_PAGES.read_text(), reason="Linux gives no huge pages here to those who ask")
def test_a_run_asks_for_memory_that_lasts_once_and_leaves_what_the_user_has_set():
    """The process stays the same one, with the words that it was started with; in its second life the C library has read what was asked."""
    program = "import os, sys; from phased_ift_jax.xla_flags import lasting_memory, TUNABLES as name; print(os.getpid(), flush=True)"
    program += "; lasting_memory(os.environ.get('MODEL', 'owner/model')); print(os.environ[name], sys.argv[1:])"
    ours = ("GLIBC_TUNABLES", "JAX_NUM_CPU_DEVICES", "XLA_FLAGS", xla_flags.AGAIN)
    free = {name: value for name, value in os.environ.items() if name not in ours} | {"JAX_PLATFORMS": "cpu"}

    def said(**environment: str) -> list[str]:
        done = subprocess.run([sys.executable, "-c", program, "one", "two words"], env=free | environment, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout.splitlines()

    first, second, told = said()
    assert first == second
    assert told == f"{xla_flags.ASKED}:{xla_flags.KEPT} ['one', 'two words']"
    alone = f"{xla_flags.ASKED} ['one', 'two words']"
    assert said(JAX_NUM_CPU_DEVICES="2")[2] == alone, "threads of two devices would wait for each other at one heap"
    assert said(XLA_FLAGS="--xla_force_host_platform_device_count=2")[2] == alone
    assert said(MODEL=str(ROOT / "configs/quickstart/model"))[2] == alone, "and so do those of a small model"
    assert len(said(**{xla_flags.AGAIN: "1"})) == 1, "it has tried before, and says so by failing on the variable that is not there"
    assert said(GLIBC_TUNABLES="glibc.malloc.perturb=0")[1:] == ["glibc.malloc.perturb=0 ['one', 'two words']"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_what_a_step_gives_back_is_there_for_the_next_one():
    """Memory that is taken, given back and taken again by another thread is not asked of the kernel again."""
    program = """
import resource, threading, numpy as np
def step(): np.ones(2**25)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults()]
for _ in range(4):
    thread = threading.Thread(target=step); thread.start(); thread.join(); counts.append(faults())
print(*np.diff(counts))
"""

    def said(tunables: str) -> list[int]:
        environment = os.environ | {xla_flags.TUNABLES: tunables}
        return [int(word) for word in subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True).stdout.split()]

    kept, given_back = said(xla_flags.KEPT), said("glibc.malloc.perturb=0")
    assert max(kept[1:]) < min(given_back[1:]) / 20, (kept, given_back)

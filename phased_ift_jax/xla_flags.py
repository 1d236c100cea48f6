"""What XLA is told before JAX is there to tell it, each with its reason (floor 0).

`train` finds out the chip and sets its flags itself, so that it does not matter what started it. Those of `FLAGS` are of public recipes
for dense models under FSDP: MaxText and AXLearn for TPUs, JAX-Toolbox and MaxText for GPUs.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import mmap
import os
import platform
import re
import subprocess
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from phased_ift_jax import interrupts, processes
from phased_ift_jax.records import UserError

# on GPUs: no kernel whose additions come in another order each time, and none chosen by a timing that may turn out otherwise next time
DETERMINISTIC = {"xla_gpu_deterministic_ops": "true"}

TPU = {
    # a collective is begun before its data is needed, and the work that does not need it goes between
    "xla_tpu_enable_latency_hiding_scheduler": "true",
    "xla_enable_async_all_gather": "true",
    # the all-gather of the weights that come next moves along inside the matmuls before it, over several of them, on the same core
    "xla_tpu_enable_async_collective_fusion": "true",
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": "true",
    "xla_tpu_enable_async_collective_fusion_multiple_steps": "true",
    "xla_tpu_overlap_compute_collective_tc": "true",
    # gradients of a layer are added up over mesh.data, between slices the slow network, while those of the next are computed
    "xla_tpu_enable_data_parallel_all_reduce_opt": "true",
    "xla_tpu_data_parallel_opt_different_sized_ops": "true",
    # else it rounds the weights of all layers at once, before the loop over them: a bfloat16 copy of the model that stays
    "xla_jf_bf16_propagation": "false",
}
# libtpu 0.0.50 refuses to compile with it for others, where it may hang or compute something else; 0.0.42 does, and gathers asynchronously
ONLY_V5E = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"
LIBTPU = tuple(int(part) for found in importlib.metadata.distributions(name="libtpu") for part in re.findall(r"\d+", found.version)[:3])  # empty without one
TORUS = {
    # off by default on v4; v5p's recipe says it all the same
    "xla_enable_async_collective_permute": "true",
    # else the weights of a layer come together, on a slice that is a torus of three axes, by an all-reduce of zeros and shards: twice the bytes
    "xla_tpu_prefer_async_allgather_to_allreduce": "true",
}
GPU = {
    "xla_gpu_enable_latency_hiding_scheduler": "true",  # off by default on GPUs: without it collectives stand in the way of the matmuls
    # a layer's weights (0.4 GB of Llama-2-7B in bfloat16, 0.6 GB of 13B) in one collective; smaller ones have less of the bandwidth
    "xla_gpu_all_gather_combine_threshold_bytes": str(2**30),
    "xla_gpu_reduce_scatter_combine_threshold_bytes": str(2**30),
    "xla_gpu_all_reduce_combine_threshold_bytes": str(2**30),
    "xla_gpu_enable_triton_gemm": "false",  # cuBLAS is as fast on large bfloat16 matmuls, and needs no minutes of tuning
}
FLAGS: dict[str, dict[str, str]] = {
    "v4": TPU | TORUS,
    "v5e": TPU,
    # two cores share a chip's work there: a fusion of theirs would take the all-gathers away from the asynchronous one
    "v5p": TPU | TORUS | {"xla_tpu_megacore_fusion_allow_ags": "false"},
    # of its fast memory 96 MiB for the operation at work, and the rest for fetching ahead: large tiles pay where matmuls are what takes the time
    "v6e": TPU | {"xla_tpu_scoped_vmem_limit_kib": "98304"},
    "h100": GPU,
    "h200": GPU,
}
# vectors of 512 bits, where the processor has them, in XLA's own loops: by itself it takes 256, which cost a small model a tenth of its step
CPU = {"xla_cpu_prefer_vector_width": "512"}
TPUS = {"v4": "v4", "v5litepod": "v5e", "v5p": "v5p", "v6e": "v6e"}  # by the accelerator type before its dash
GPUS = {"H100": "h100", "H200": "h200"}  # by a word of nvidia-smi's name; a GH200 is another machine
# JAX takes 75 % of a GPU's memory by default; what CUDA's libraries have outside of it fits into the tenth that remains
MEMORY = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")  # JAX refuses both
TUNABLES = "GLIBC_TUNABLES"
ASKED = "glibc.malloc.hugetlb=1"
KEPT = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000:glibc.malloc.arena_max=1"
AGAIN = "PHASED_IFT_STARTED_AGAIN"  # once, whatever becomes of the other variable on the way
NARROW = 128  # a model's width up to which one heap costs more than it saves
NVIDIA = Path("/dev/nvidiactl")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
LIBRARIES = {"LIBTPU_INIT_ARGS": ("libtpu", "libtpu.so"), "XLA_FLAGS": ("jaxlib", "libjax_common.so")}


def flags_for(chip: str) -> dict[str, str]:
    """XLA's flags for a chip (v4, v5e, v5p, v6e, h100, h200), none for another; in the form that `compile(compiler_options=...)` takes."""
    return {name: value for name, value in FLAGS.get(chip, {}).items() if name != ONLY_V5E or chip == "v5e" or LIBTPU < (0, 0, 50)}


def chip() -> str | None:
    """Which chip of the table JAX will find here; asks nobody about platforms that JAX_PLATFORMS leaves out."""
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu,cuda"
    found = TPUS.get(_tpu_type().partition("-")[0]) if "tpu" in platforms else None
    if found is None and ("cuda" in platforms or "gpu" in platforms):
        found = next((chip for word, chip in GPUS.items() if re.search(rf"\b{word}\b", _gpu_name())), None)
    return found


def lasting_memory(model: str) -> None:
    """Start this process again, in its place, with a malloc for steps on a CPU, each of which takes gigabytes and gives them back.

    It asks for huge pages, where Linux gives them to those who ask: got in small pages, memory is a fifth of a step's time. And it keeps in one heap
    what a step gives back: what is given back to a virtual machine goes on to its host within seconds, and comes again slowly. No such heap where
    threads would wait for each other at it, with several virtual devices or a `model` (folder or hub name) whose matmuls are small; nor beside an
    accelerator, where a step is not computed in this memory.

    The C library reads this only when a process starts; a GLIBC_TUNABLES that is set stays as it is. Not where other threads are: this is then no
    process of ours alone.
    """
    with suppress(OSError):  # what cannot be had is done without
        library, version = platform.libc_ver()
        known = library == "glibc" and tuple(map(int, version.split(".")[:2])) >= (2, 35)
        wanted = [ASKED] * ("[madvise]" in HUGE_PAGES.read_text()) + [KEPT] * (_one_cpu() and _wide(model))
        if known and wanted and not {TUNABLES, AGAIN} & os.environ.keys() and threading.active_count() == 1:
            os.environ |= {TUNABLES: ":".join(wanted), AGAIN: "1"}
            os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def set_flags(deterministic: bool) -> list[str]:
    """Set the chip's flags and what the run asks for; must come before JAX makes its first array. What the user has set stays.

    Returns a line for each variable, as it is now, and one of flags that the installed library does not know.

    Raises:
        UserError: the user has set the opposite of what the run asks for.
    """
    given = {name: value for variable in LIBRARIES for name, value in _given(variable).items()}
    wanted = DETERMINISTIC if deterministic else {}
    for name, value in wanted.items():
        if given.get(name, value).lower() not in (value, ""):
            raise UserError(f"training.deterministic: XLA_FLAGS has --{name}={given[name]}; take it out of there, or set training.deterministic false")
    here = chip()
    variable = "LIBTPU_INIT_ARGS" if here in TPUS.values() else "XLA_FLAGS"
    flags = flags_for(here) if here else {} if _accelerated() else CPU
    unknown = _unknown(variable, flags)
    _add(variable, {name: value for name, value in flags.items() if name not in given and name not in unknown})
    _add("XLA_FLAGS", {name: value for name, value in wanted.items() if name not in given})
    lines = [f"{name}={os.environ[name]}" for name in dict.fromkeys([variable] * bool(flags) + ["XLA_FLAGS"] * bool(wanted)) if name in os.environ]
    if unknown and len(unknown) < len(flags):
        lines.append(f"not known to this {LIBRARIES[variable][0]}, and left out: {', '.join(unknown)}")
    if here in GPUS.values():
        name = next((name for name in MEMORY if name in os.environ), MEMORY[-1])
        lines.append(f"{name}={os.environ.setdefault(name, '0.9')}")
    if AGAIN in os.environ and TUNABLES in os.environ:
        lines.append(f"{TUNABLES}={os.environ[TUNABLES]}")
    return lines


def _one_cpu() -> bool:
    """Whether JAX will compute on this machine's processors, as one device."""
    return not _accelerated() and os.environ.get("JAX_NUM_CPU_DEVICES", "1") == "1" and "xla_force_host_platform_device_count" not in _given("XLA_FLAGS")


def _accelerated() -> bool:
    return os.environ.get("JAX_PLATFORMS") != "cpu" and (processes.has_tpu() or NVIDIA.exists())


def _wide(model: str) -> bool:
    """Whether a step is mostly matmuls; a model that is not in a folder here is none of the small ones."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))["hidden_size"] > NARROW
    return True


def _given(variable: str) -> dict[str, str]:
    return {name.lstrip("-"): value for name, _, value in (flag.partition("=") for flag in os.environ.get(variable, "").split())}


def _add(variable: str, flags: Mapping[str, str]) -> None:
    if flags:
        os.environ[variable] = " ".join([os.environ.get(variable, ""), *(f"--{name}={value}" for name, value in flags.items())]).strip()


def _unknown(variable: str, flags: Mapping[str, str]) -> list[str]:
    """Those of the flags whose names the library that reads the variable does not contain: told of one, it would end the process."""
    package, file = LIBRARIES[variable]
    found = importlib.util.find_spec(package) if flags else None
    library = Path((found.submodule_search_locations or [""])[0], file) if found else None
    if library is None or not library.is_file():
        return list(flags)
    with open(library, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return [name for name in flags if content.find(b"\0" + name.encode() + b"\0") < 0]


def _tpu_type() -> str:
    """Such as v5litepod-16: from the environment, or on a TPU VM from its metadata; empty where there is none."""
    if "TPU_ACCELERATOR_TYPE" in os.environ:
        return os.environ["TPU_ACCELERATOR_TYPE"]
    host = interrupts.metadata_host() if processes.has_tpu() else None
    return (interrupts.metadata(host, "attributes/accelerator-type") if host else None) or ""


def _gpu_name() -> str:
    """Of the first GPU; empty where there is none."""
    try:
        told = subprocess.run(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout.partition("\n")[0]

"""What the makers publish of each chip: one table (floor 0)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, and its memory."""

    kinds: tuple[str, ...]  # how JAX's `device_kind` begins
    flops: float  # bf16, FLOP/s
    memory: float = 0.0  # bytes of HBM that programs may use
    bandwidth: float = 0.0  # of it, bytes/s
    link: float = 0.0  # bytes/s that come in from a neighbour in a TPU slice
    network: float = 0.0  # bytes/s that come in from other slices: a chip's share of its host's
    axes: int = 0  # of a slice
    ring: int = 1  # an axis whose length is a multiple of this is closed to a ring

    def links(self, shape: tuple[int, ...]) -> float:
        """Bytes/s that come into a chip of a slice of this shape over all its axes together: from both sides where an axis is a ring."""
        return sum(self.link * (1 if length % self.ring else 2) for length in shape if length > 1) or self.link


GIB = 2**30
# TPUs: Google's Cloud TPU documentation (FLOP/s, HBM); memory is what libtpu leaves to programs; links, rings and network are those of
# "How to Scale Your Model" (jax-ml.github.io/scaling-book), where FSDP is compute-bound above flops / links tokens a chip. GPUs: NVIDIA's data sheets.
CHIPS = {
    "v4": Chip(("TPU v4",), 275e12, 30.75 * GIB, 1.2e12, 4.5e10, 3.1e9, 3, 4),
    "v5e": Chip(("TPU v5 lite", "TPU v5e"), 197e12, 15.75 * GIB, 8.1e11, 4.5e10, 3.1e9, 2, 16),
    "v5p": Chip(("TPU v5", "TPU v5p"), 459e12, 95.74 * GIB, 2.8e12, 9e10, 6.25e9, 3, 4),
    "v6e": Chip(("TPU v6 lite", "TPU v6e"), 918e12, 31.25 * GIB, 1.6e12, 9e10, 12.5e9, 2, 16),
    "a100": Chip(("NVIDIA A100",), 312e12),
    "h100": Chip(("NVIDIA H100",), 989e12),
    "h200": Chip(("NVIDIA H200",), 989e12),
}


def peak_flops(kind: str, count: int) -> float | None:
    """Peak bf16 FLOP/s of so many chips of JAX's `device_kind`, or None where it is not in the table."""
    known = {prefix: chip for chip in CHIPS.values() for prefix in chip.kinds}
    name = max((prefix for prefix in known if kind.startswith(prefix)), key=len, default=None)
    return known[name].flops * count if name else None

"""What a compiled program sends between devices, read from the text of its HLO: XLA's own analyses count the body of a loop once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from phased_ift_jax.records import Failure

WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}
# XLA hides some exchanges in the matmul before or after them, as a ring of steps in a loop of that name
RINGS = {"windowed_dot_general_body_rs": "reduce-scatter", "windowed_dot_general_body_ag": "all-gather"}
KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
ARRAY = re.compile(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]")
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
BETWEEN_SLICES = re.compile(r"= (.*?) (send)()\(.*xla_megascale_runtime")  # over the hosts' network: each slice sends what it has to the others
CALLED = re.compile(r"\b(?:calls|to_apply|body|branch_computations|async_computation)=\{?([%\w., -]+)")


@dataclass(frozen=True)
class Collective:
    """One exchange: how many `times` a step, of arrays of these sizes in all, among `group` devices."""

    kind: str
    shape: str  # of the largest array, such as bf16[4096,11008]
    largest: int  # bytes of it
    bytes: int  # that come into each device, each time
    times: int
    group: int
    slices: bool  # whether it crosses from one TPU slice into another
    within: str  # name of the loop it stands in


def collectives(text: str, slice_size: int) -> list[Collective]:
    """Every exchange of a compiled step, with loops counted; devices are numbered slice by slice, `slice_size` in each.

    Raises:
        Failure: it is written in a way that is not known here.
    """
    computations, entry = _computations(text)
    devices = int(partitions[1]) if (partitions := re.search(r"num_partitions=(\d+)", text)) else 1
    found: dict[tuple[str, str], Collective] = {}
    for name, times, within in _walk(computations, entry, 1, "entry"):
        for line in computations[name]:
            if match := COLLECTIVE.search(line) or BETWEEN_SLICES.search(line):
                one = _collective(match, line, times, (name, within), slice_size, devices)
                # one that runs beside several matmuls stands in each of them, as a link of one chain
                chain = re.search(r'chain_id="(\d+)"', line)
                found.setdefault((within, chain[0] if chain else str(len(found))), one)
    return list(found.values())


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry = ""
    lines: list[str] = []
    for line in text.splitlines():
        if match := HEADER.match(line):
            lines = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        else:
            lines.append(line)
    return computations, entry


def _walk(computations: Mapping[str, list[str]], name: str, times: int, within: str) -> Iterator[tuple[str, int, str]]:
    """Each computation that runs, how often, and the loop it belongs to."""
    yield name, times, within
    for line in computations[name]:
        trips, loop = times, within
        if match := re.search(r" while\(.*condition=%?([\w.-]+), body=%?([\w.-]+)", line):
            trips, loop = times * _trips(computations[match[1]], computations[match[2]]), match[2]
        if called := CALLED.search(line):
            for other in re.findall(r"%?([\w.-]+)", called[1].split(", ")[0] if "{" not in called[0] else called[1]):
                if other in computations:
                    yield from _walk(computations, other, trips, loop)


def _trips(condition: list[str], body: list[str]) -> int:
    """How often a loop runs whose counter, from 0, is compared with a constant; XLA unrolls some, whose counter then grows by 2."""
    constants = _constants(condition)
    compared = re.search(r" compare\(%?([\w.-]+), %?([\w.-]+)\), direction=LT", "\n".join(condition))
    if not (compared and compared[2] in constants):
        return max(constants.values(), default=1)
    counter = re.search(rf"%?{re.escape(compared[1])} = .*get-tuple-element\(.*\), index=(\d+)", "\n".join(condition))
    results = re.search(r"ROOT .* tuple\((.*?)\)", "\n".join(body))
    grown = re.findall(r"%([\w.-]+)", results[1])[int(counter[1])] if counter and results else ""
    added = re.search(rf"%?{re.escape(grown)} = .* add\(%?([\w.-]+), %?([\w.-]+)\)", "\n".join(body))
    step = next((_constants(body)[name] for name in added.groups() if name in _constants(body)), 1) if added else 1
    return -(-constants[compared[2]] // step)


def _constants(lines: list[str]) -> dict[str, int]:
    return {name: int(value) for name, value in re.findall(r"%?([\w.-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(lines))}


def _collective(match: re.Match[str], line: str, times: int, place: tuple[str, str], slice_size: int, devices: int) -> Collective:
    kind, started = match[2], match[3]
    computation, within = place
    arrays = [(size, f"{dtype}[{dims}]") for dtype, dims in ARRAY.findall(match[1]) if (size := _bytes(dtype, dims)) and dtype in WIDTHS]
    if kind == "send" or (started and kind in ("all-gather", "collective-permute")):  # counters come last, and of one that is only started the operands first
        arrays = [array for array in arrays if array[0] > 4] or arrays
        arrays = arrays[len(arrays) // 2 :]
    total = sum(size for size, _ in arrays)
    groups = [] if kind == "send" else _groups(line, devices)
    group = max(map(len, groups), default=1)
    crosses = kind == "send" or any(len({device // slice_size for device in members}) > 1 for members in groups)
    largest, shape = max(arrays, default=(0, ""))
    if kind == "all-reduce" and "all-reduce-scatter" in computation:  # XLA's fusion of the two, which leaves each device its part of the sum
        kind, total, largest = "reduce-scatter", total // group, largest // group
    share = {"all-gather": (group - 1) / group, "all-to-all": (group - 1) / group, "all-reduce": 2 * (group - 1) / group, "reduce-scatter": group - 1}
    bytes_in = int(total * share.get(kind, 1))
    if kind == "reduce-scatter":
        largest *= group
    if kind == "collective-permute":
        kind = next((meant for name, meant in RINGS.items() if name in within), kind)
    return Collective(kind, shape, largest, bytes_in, times, group, crosses, within)


def _bytes(dtype: str, dims: str) -> int:
    return WIDTHS.get(dtype, 0) * math.prod(int(dim) for dim in dims.split(",") if dim)


def _groups(line: str, devices: int) -> list[list[int]]:
    """The devices that exchange with each other, in the ways that HLO writes it."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", line):
        return [[int(a), int(b)] for a, b in re.findall(r"\{(\d+),(\d+)", pairs[1] + "}")]
    if mesh := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(\[([\d,]*)\](?:T\(([\d,]*)\))?\))? \{(.*?)\}", line):
        axes = re.findall(r"'(\w+)'=(\d+)", mesh[1])
        sizes, chosen = [int(size) for _, size in axes], set(re.findall(r"'(\w+)'", mesh[4]))
        return _split(sizes, [number for number, (name, _) in enumerate(axes) if name in chosen], mesh[2], mesh[3])
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]*)\](?:T\(([\d,]*)\))?", line):
        return _split([int(iota[1]), int(iota[2])], [1], iota[3], iota[4])
    if "replica_groups={}" in line:
        return [list(range(devices))]
    if listed := re.search(r"replica_groups=\{(\{.*?\})\}", line):
        return [[int(device) for device in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    raise Failure(f"the compiled program writes an exchange in a way that is not known here: {line.strip()[:300]}")


def _split(sizes: list[int], exchanging: list[int], order: str | None, transposed: str | None) -> list[list[int]]:
    """Devices, laid out in an array of these sizes, in groups along the dims that exchange."""
    devices = np.arange(math.prod(sizes))
    if order:
        devices = devices.reshape([int(size) for size in order.split(",")])
        devices = devices.transpose([int(dim) for dim in transposed.split(",")]) if transposed else devices
    devices = devices.reshape(sizes)
    rest = [dim for dim in range(len(sizes)) if dim not in exchanging]
    return devices.transpose(rest + exchanging).reshape(math.prod(sizes[dim] for dim in rest), -1).tolist()

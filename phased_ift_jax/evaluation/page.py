"""The page of a report: one HTML file that fetches nothing, made from what `report.gather` found.

All text of data goes through Jinja's escaping, and the page's policy lets run no script but its own (by its hash). Charts are SVG without a script: shapes
are placed in percent of their box, so that they fill any width while their text stays as large as the page's.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

FOLDER = Path(__file__).with_name("template")
NONE = "\N{EN DASH}"
MINUS = str.maketrans("-", "\N{MINUS SIGN}")
WIDE = 30  # largest over smallest value above which an axis counts powers of ten


@dataclass(frozen=True)
class Axis:
    """Values as percent of a length, and where its ticks are."""

    low: float
    high: float
    log: bool = False

    def __call__(self, value: float) -> float:
        at = math.log(max(value, self.low) / self.low) / math.log(self.high / self.low) if self.log else (value - self.low) / (self.high - self.low)
        return round(100 * min(max(at, 0.0), 1.0), 2)

    @property
    def ticks(self) -> list[float]:
        """Four or so round numbers: 1, 2 or 5 times a power of ten apart, or of a wide axis such powers themselves."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
            return [10.0**power for power in powers][:: max(1, math.ceil(len(powers) / 5))]
        rough = (self.high - self.low) / 4
        unit = 10 ** math.floor(math.log10(rough))
        step = unit * min((1, 2, 5, 10), key=lambda times: abs(times * unit - rough))
        return [round(number * step, 12) for number in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]


def axis(values: Iterable[float | None], around: float | None = None, zero: bool = False) -> Axis:
    """An axis that holds all values: in powers of ten where they are far apart; the same on both sides of `around`; from `zero`."""
    known = [value for value in values if value is not None] or [0.0, 1.0]
    low, high = min(known), max(known)
    if around is not None:
        reach = 1.08 * max(abs(value - around) for value in known) or 1.0
        return Axis(around - reach, around + reach)
    if not zero and low > 0 and high / low > WIDE:
        return Axis(low / 1.15, high * 1.15, log=True)
    low, room = (min(low, 0.0) if zero else low), 0.06 * (high - low) or abs(high) or 1.0
    return Axis(low if zero else low - room, high + room)


def line(points: Sequence[Mapping[str, Any]], key: str, x: Axis, y: Axis) -> str:
    """An SVG path in a box of 100 x 100, broken between phases and where there is no value."""
    parts, phase = [], None
    for point in points:
        if point[key] is None:
            phase = None
            continue
        parts.append(f"{'L' if point['phase'] == phase else 'M'}{x(point['step'])} {round(100 - y(point[key]), 2)}")
        phase = point["phase"]
    return "".join(f"{part}h.01" if part[0] == "M" and following[0] == "M" else part for part, following in zip(parts, [*parts[1:], "M"], strict=True))


def spans(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """First and last step of each phase."""
    found: list[dict[str, Any]] = []
    for point in points:
        if not found or found[-1]["phase"] != point["phase"]:
            found.append({"phase": point["phase"], "start": found[-1]["stop"] if found else 0})
        found[-1]["stop"] = point["step"]
    return found


def signed(value: float | None, digits: int = 1) -> str:
    if value is None:
        return NONE
    return f"{value:+.{digits}f}".translate(MINUS) if round(value, digits) else f"{0:.{digits}f}"


def number(value: float | None, form: str = ",.4g") -> str:
    return NONE if value is None else format(value, form).translate(MINUS)


def between(pair: Sequence[float] | None, digits: int = 1) -> str:
    return "no interval" if pair is None else f"{signed(pair[0], digits)} to {signed(pair[1], digits)}"


def p_value(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def tick(value: float) -> str:
    """A number at an axis, as short as it can be told."""
    size = abs(value)
    text = f"{value / 1e6:g}M" if size >= 1e6 else f"{value / 1e3:g}k" if size >= 1e5 else f"{value:,g}" if size >= 1e-3 or not size else f"{value:.0e}".replace("e-0", "e-")
    return text.translate(MINUS)


def minus(text: str) -> str:
    """A sentence whose negative numbers have a minus sign, as the tables have."""
    return re.sub(r"(?<![\w-])-(?=\d)", "\N{MINUS SIGN}", text)


def render(report: Mapping[str, Any]) -> str:
    """The page; a character that no UTF-8 has stands in it as its escape."""
    pages = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    pages.filters |= {"signed": signed, "number": number, "between": between, "tick": tick, "minus": minus, "p": p_value}
    pages.globals |= {"axis": axis, "Axis": Axis, "line": line, "spans": spans, "max": max, "min": min, "log": math.log}
    script, style = ((FOLDER / name).read_text(encoding="utf-8") for name in ("page.js", "page.css"))
    mark = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    text = pages.get_template("page.html").render(report=report, script=Markup(script), style=Markup(style), script_mark=mark)
    return text.encode("utf-8", "backslashreplace").decode()

"""The picture of a split: how often each score is, the kernel density, the cumulative share, and where the bins begin (floor 1: needs matplotlib)."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np

from phased_ift_jax.data.splitting import Scores

SUFFIXES = ("png", "svg")
INK, CUT = "#222222", "#a50f15"
BARS = 40
STEEP = 40  # a tallest bar so many times the median one makes the axis logarithmic: the paper's scores are 1.0 on more than half of the rows
NARROW = 0.12  # of the picture; the names of narrower bins are set at two heights


def draw(scores: Scores, thresholds: Sequence[float], names: Sequence[str], title: str, base: Path) -> list[Path]:
    """Write `base`.png and `base`.svg, each whole, and return their paths; raises `ImportError` without matplotlib."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter

    n, width = scores.counts.sum(), float(scores.values[-1] - scores.values[0]) / BARS
    borders = [float(scores.values[0]), *thresholds, float(scores.values[-1]) + width]  # the highest score has a bar of its own
    span, below = borders[-1] - borders[0], np.cumsum(scores.bins(thresholds))[:-1] / n
    cells = [max(1, round(BARS * (right - left) / span)) for left, right in pairwise(borders)]  # a bar lies in one bin
    edges = np.array([borders[0], *(edge for pair, count in zip(pairwise(borders), cells, strict=True) for edge in np.linspace(*pair, count + 1)[1:])])
    heights = np.histogram(scores.values, edges, weights=scores.counts / n)[0]
    at = np.linspace(borders[0], borders[-1], 1001)
    smooth = scores.density(at) * width
    shades = matplotlib.colormaps["Blues"](np.linspace(0.25, 0.7, len(names)))  # told apart in grey, too
    percent, halo = FuncFormatter(lambda share, _: f"{100 * share:g}%" if share <= 1 else ""), [withStroke(linewidth=4, foreground="white")]

    figure = Figure(figsize=(9, 7), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    top.bar(edges[:-1], heights, np.diff(edges), align="edge", color=np.repeat(shades, cells, axis=0), edgecolor=INK, linewidth=0.4)
    top.plot(at, smooth, color=INK, linewidth=1.6, path_effects=halo, label=f"Gaussian kernel density, bandwidth {scores.bandwidth:.2g}")
    if steep := heights.max() > STEEP * np.median(heights[heights > 0]):
        top.set_yscale("log")
        top.set_ylim(0.5 * heights[heights > 0].min(), 20 * heights.max())
    else:
        top.set_ylim(0, 1.35 * max(heights.max(), smooth.max()))
    top.set_ylabel(f"rows in {width:.2g} points of score{', log scale' if steep else ''}")
    top.set_title("\n".join(part for line in title.splitlines() for part in textwrap.wrap(line, 62)), fontsize=11, loc="left")
    top.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), fontsize=9, frameon=False)
    for number, (name, size) in enumerate(zip(names, scores.bins(thresholds) / n, strict=True)):
        left, right = borders[number : number + 2]
        height = 0.97 - 0.1 * (number % 2 if min(np.diff(borders)) < NARROW * span else 0)
        top.text((left + right) / 2, height, f"{name}\n{size:.1%}", transform=top.get_xaxis_transform(), ha="center", va="top", path_effects=halo)
    bottom.step([borders[0], *scores.values, borders[-1]], [0, *np.cumsum(scores.counts) / n, 1], where="post", color=INK, linewidth=1.6)
    bottom.set_ylim(0, 1.02)
    bottom.set_ylabel("rows up to a score")
    bottom.set_xlabel("score")
    bottom.grid(axis="y", color="#dddddd", linewidth=0.6)
    for threshold, share in zip(thresholds, below, strict=True):
        for panel in (top, bottom):
            panel.axvline(threshold, color=CUT, linewidth=1.2, linestyle="--")
        # right of the line and under the curve, or, near the border, left of it and above
        place = {"xytext": (5, -13)} if threshold < borders[0] + 0.8 * span else {"xytext": (-5, 5), "ha": "right"}
        bottom.annotate(f"{threshold:g}: {share:.1%} below", (threshold, share), **place, textcoords="offset points", color=CUT, fontsize=9, path_effects=halo)
    for panel in (top, bottom):
        panel.yaxis.set_major_formatter(percent)
    written = []
    with matplotlib.rc_context({"svg.hashsalt": "phased_ift_jax"}):  # so that the same scores make the same file
        for suffix in SUFFIXES:
            aside = base.with_name(f".{base.name}.{suffix}.part")
            figure.savefig(aside, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)
            written.append(base.with_name(f"{base.name}.{suffix}"))
            os.replace(aside, written[-1])
    return written

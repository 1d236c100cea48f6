"""The tables and plots of docs/results.md, from an experiment's folder:  python benchmarks/results.py runs/stories260k-alpaca-arms --pictures docs/pictures

Prints Markdown: held-out loss of each arm after its last phase, what it was after each phase (the forgetting matrix), and what the gain is made of. All figures are
means over seeds with Student's 95 % intervals, where there are two seeds. With --pictures, draws attribution.png and forgetting.png there.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phased_ift_jax.evaluation.statistics import student

LEVEL = 0.95
Losses = dict[str, np.ndarray]  # of each arm (seeds, phases and the base before them, bins)


def losses_of(report: dict[str, Any]) -> tuple[Losses, list[str]]:
    """Held-out losses of each arm, and the names of the bins."""
    bins = list(report["runs"][0]["forgetting"]["rows"][0]["loss"])

    def of(run: int) -> list[list[float]]:
        return [[row["loss"][name] for name in bins] for row in report["runs"][run]["forgetting"]["rows"]]

    return {arm["name"]: np.array([of(run) for run in arm["runs"]]) for arm in report["arms"]}, bins


def cell(values: Sequence[float]) -> str:
    mean, interval = student(np.array(values), LEVEL)
    return f"{mean:.3f}" + (f" ± {(interval[1] - interval[0]) / 2:.3f}" if interval else "")


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *map(list, rows)])


def last(losses: Losses, bins: Sequence[str]) -> str:
    rows = [[arm, *(cell(of[:, -1, at]) for at in range(len(bins))), cell(of[:, -1].mean(1))] for arm, of in losses.items()]
    return table(["arm", *bins, "mean of the bins"], rows)


def matrix(losses: Losses, bins: Sequence[str], arms: Sequence[str]) -> str:
    rows = []
    for arm in arms:
        for phase in range(losses[arm].shape[1]):
            figures = [cell(losses[arm][:, phase, at]) if phase else f"{losses[arm][0, 0, at]:.3f}" for at in range(len(bins))]
            rows.append([arm, f"phase {phase}" if phase else "the base", *figures])
    return table(["arm", "after", *bins], rows)


def attribution(told: dict[str, Any], bins: Sequence[str]) -> str:
    rows = []
    for line in told["lines"]:
        if line["loss"]:
            figures = [line["loss"]["mean"], *(line["loss"]["bins"][name] for name in bins)]
            gains = [f"{one['gain']:+.3f}" + (" ({:+.3f} to {:+.3f})".format(*one["interval"]) if one["interval"] else "") for one in figures]
            unlike = ", ".join(f"{measure.replace('_', ' ')} {line['budget'][measure]:+.1%}" for measure in line["unlike"])
            rows.append([line["title"], gains[0], figures[0]["conclusion"].replace("_", " "), *gains[1:], unlike or "alike"])
    return table(["what", "gain in mean loss, nats", "that is", *bins, "budgets"], rows)


def draw(told: dict[str, Any], losses: Losses, bins: Sequence[str], folder: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    lines = [line for line in told["lines"] if line["loss"] and line["loss"]["mean"]["interval"]][::-1]
    kinds = [("mean of the bins", "black", [line["loss"]["mean"] for line in lines])]
    kinds += [(name, f"C{at}", [line["loss"]["bins"][name] for line in lines]) for at, name in enumerate(bins)]
    figure, axes = plt.subplots(figsize=(9, 0.8 * len(lines) + 1.4), layout="constrained")
    for row, (name, color, figures) in enumerate(kinds):
        gains, y = np.array([one["gain"] for one in figures]), np.arange(len(lines)) + 0.27 - 0.18 * row
        reach = np.array([one["interval"] for one in figures])
        axes.errorbar(gains, y, xerr=np.abs(reach.T - gains), fmt="o", ms=6 if not row else 3.5, lw=2 if not row else 1, capsize=3, color=color, label=name)
    axes.axvline(0, color="grey", lw=1)
    axes.set_yticks(np.arange(len(lines)), [line["title"].replace(": ", ":\n", 1) for line in lines], fontsize=9)
    axes.set_xlabel("gain in held-out loss, nats a token\n(to the right the first is better; 95 % intervals over seeds)")
    axes.legend(fontsize=9)
    figure.savefig(folder / "attribution.png", dpi=110)
    phased = [arm for arm, of in losses.items() if of.shape[1] > 2]
    figure, grid = plt.subplots(1, len(phased), figsize=(3 * len(phased), 3.2), sharey=True, layout="constrained", squeeze=False)
    for panel, arm in zip(grid[0], phased, strict=True):
        for at, name in enumerate(bins):
            of = losses[arm][:, 1:, at]
            panel.plot(range(1, of.shape[1] + 1), of.mean(0), "o-", color=f"C{at}", label=name)
            panel.fill_between(range(1, of.shape[1] + 1), of.min(0), of.max(0), color=f"C{at}", alpha=0.2)
        panel.set_title(arm)
        panel.set_xticks(range(1, losses[arm].shape[1]))
        panel.set_xlabel("after phase")
    grid[0][0].set_ylabel("held-out loss, nats a token\n(mean; shade: all seeds)")
    grid[0][0].legend(fontsize=9)
    figure.savefig(folder / "forgetting.png", dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path, help="output_dir of an experiment that is done")
    parser.add_argument("--pictures", type=Path, help="a folder for attribution.png and forgetting.png")
    args = parser.parse_args()
    try:
        report = json.loads((args.experiment / "report.json").read_text())
    except OSError as error:
        parser.error(f"{error.filename}: {error.strerror}; run the experiment to its end first")
    for arm in report["arms"]:
        phases = [len(report["runs"][run]["forgetting"]["rows"]) for run in arm["runs"]]
        if len(set(phases)) != 1:
            parser.error(f"{args.experiment}: the seeds of arm {arm['name']} have {phases} measured phases; run the experiment to its end first")
    if args.pictures and min(len(arm["runs"]) for arm in report["arms"]) < 2:
        parser.error("--pictures: error bars need two seeds of each arm; without it, the tables are printed")
    losses, bins = losses_of(report)
    staged = [arm for arm, of in losses.items() if of.shape[1] > 2]
    print("\n\n".join([last(losses, bins), matrix(losses, bins, staged), attribution(report["attribution"], bins), "\n".join(report["attribution"]["words"])]))
    if args.pictures:
        draw(report["attribution"], losses, bins, args.pictures)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""All that a report says, as one JSON object (keys: docs/formats.md), gathered from files of runs, judgments and answers; each block names its files."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from phased_ift_jax import config
from phased_ift_jax.evaluation.comparison import SEEDS, compare, estimated
from phased_ift_jax.evaluation.forgetting import ANSWERS, is_exact
from phased_ift_jax.evaluation.judgments import read_judgments
from phased_ift_jax.evaluation.statistics import ALIKE, RESAMPLES, student
from phased_ift_jax.evaluation.win_rate import points, scores_of
from phased_ift_jax.records import Judgment, UserError

POINTS = 240  # of a run's curve at most
EXAMPLES, TEXTS = 1200, 3_000_000  # side by side at most, and bytes of them in the page
CUTS = (4000, 2000, 1000, 500, 250, 100)  # characters after which an answer is cut, so that all fit
LEVEL = 0.95
PAPER = Path(__file__).with_name("paper.json")
VERDICTS = {0.5: "win", 0.0: "tie", -0.5: "lose"}


def gather(
    runs: Sequence[tuple[str, Path]], judgments: Sequence[Sequence[Path]] = (), answers: Sequence[Path] = (), judge: str = "", named: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A report on runs, each (name to show, folder); `judgments` are files of one comparison each, of several sets, several seeds, or both.

    `named`: the arm of each run by the run's name, where that is known; else the settings tell.

    Raises:
        UserError: a folder holds no run, a file is not what it should be, or judgments cannot be compared.
    """
    read = [_run(name, folder) | ({"arm": named[name], "alike": named[name]} if named else {}) for name, folder in runs]
    arms = _arms(read)
    sheets = [[(path, read_judgments(path, judge)) for path in paths] for paths in judgments]
    compared = [compare(*_side_by_side(sheet)) | {"files": [str(path) for path, _ in sheet]} for sheet in sheets]
    responses = [_responses(path) for path in answers]
    if responses:
        examples = _examples(_judged_pairs(responses, [judgment for sheet in sheets for _, found in sheet for judgment in found]))
        shown = [*(one["file"] for one in responses), *(str(path) for sheet in sheets for path, _ in sheet)]
    else:
        examples = _examples(_tasks(arms, read))
        shown = [f"{read[arm['runs'][0]]['name']}/{ANSWERS}" for arm in arms if read[arm["runs"][0]]["answers"]]
    held_out, budget = [_held_out(arms[0], other, read) for other in arms[1:]], _budget(arms, read)
    unlike = ", ".join(budget["unlike"]).replace("_", " ").replace("flops", "FLOPs")
    unfair = [f"Arms differ by more than {ALIKE:.0%} in {unlike}: a difference between them may come from that."] * bool(unlike)
    return {
        "words": [word for one in compared or held_out for word in one["words"]] + unfair or _alone(read),
        "attribution": None,
        "arms": arms,
        "runs": [{key: value for key, value in run.items() if key not in ("answers", "alike")} for run in read],
        "comparisons": compared,
        "held_out": held_out,
        "budget": budget,
        "lengths": [one["lengths"] | {"file": one["file"], "model": one["model"]} for one in responses],
        "examples": examples | {"files": shown},
        "paper": _paper(read),
    }


def _run(name: str, folder: Path) -> dict[str, Any]:
    if not (folder / "config.yaml").exists():
        raise UserError(f"'{name}' holds no run (no config.yaml); give the output_dir of one")
    settings = config.load(folder / "config.yaml")
    bins, outline, manifests = settings.curriculum.bins, _json(folder / "plan.json", name), list(folder.glob("checkpoints/*/[0-9]*/manifest.json"))
    matrix = _json(folder / "forgetting.json", name).get("rows", [])
    thresholds = list(bins.thresholds or ()) if bins.by == "score" else _json(Path(bins.from_), bins.from_).get("thresholds", []) if bins.from_ else []
    saved, manifest = max(((_json(path, name), path) for path in manifests), key=lambda found: (found[0]["phase"], found[0]["step"]), default=({}, None))
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _lines(folder / ANSWERS):
        if matrix and row["after"] == matrix[-1]["after"]:
            answers[row["bin"], row["id"]] = row
    return {
        "name": name,
        "arm": settings.curriculum.arm,
        "seed": settings.seed,
        "finished": bool(matrix) and matrix[-1]["after"] == outline.get("phases", [{"folder": ""}])[-1]["folder"],
        "model": settings.model.model_name_or_path,
        "config": {"file": f"{name}/config.yaml", "text": (folder / "config.yaml").read_text(encoding="utf-8")},
        "versions": {"file": f"{name}/{manifest.relative_to(folder)}", "packages": saved.get("versions", {})} if manifest else None,
        "plan": {"file": f"{name}/plan.json", "thresholds": thresholds} | {key: outline.get(key) for key in ("phases", "budget", "bins", "difficulties")},
        "curves": {"file": f"{name}/metrics.jsonl"} | _curves(_lines(folder / "metrics.jsonl")),
        "forgetting": {"file": f"{name}/forgetting.json", "rows": matrix},
        "answers": answers,
        "alike": settings.model_dump_json(exclude={"seed", "output_dir", "mesh", "checkpoint", "evaluation", "logging", "export"}),
    }


def _json(path: Path, name: str) -> dict[str, Any]:
    """The object in a file; empty where there is no such file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict):
        raise UserError(f"'{name}': '{path.name}' is damaged; remove it, and the report will be without what it says")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects, one a line, up to a line that a kill has cut off."""
    for line in path.read_bytes().split(b"\n")[:-1] if path.exists() else ():
        try:
            yield json.loads(line)
        except ValueError:
            return


def _curves(lines: Iterator[dict[str, Any]]) -> dict[str, Any]:
    """Loss, rate and speed over steps, thinned: each point is the mean of as many logged steps of one phase as make `POINTS` of all."""
    logged = list(lines)
    each = max(1, math.ceil(len(logged) / POINTS))
    parts = []
    for _, of_phase in groupby(logged, key=lambda line: line["phase_index"]):
        rows = list(of_phase)
        parts += [rows[start : start + each] for start in range(0, len(rows), each)]
    return {
        "steps_per_point": each,
        "points": [
            {
                "phase": part[0]["phase"],
                "step": part[-1]["global_step"],
                "loss": _mean([line["loss"] for line in part if line["loss"] is not None]),
                "learning_rate": _mean([line["learning_rate"] for line in part]),
                "tokens_per_second": sum(line["tokens"] for line in part) / sum(line["seconds"] for line in part),
            }
            for part in parts
        ],
        "tokens_per_second": sum(line["tokens"] for line in logged) / sum(line["seconds"] for line in logged) if logged else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _arms(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Runs that differ in nothing but their seed (and where and on what they ran), under the arm's name; where two have the same, the run's is added."""
    alike: dict[str, list[int]] = defaultdict(list)
    for number, run in enumerate(runs):
        alike[run["alike"]].append(number)
    kinds = [runs[numbers[0]]["arm"] for numbers in alike.values()]
    names = [kind if kinds.count(kind) == 1 else f"{kind} ({runs[numbers[0]]['name']})" for kind, numbers in zip(kinds, alike.values(), strict=True)]
    return [{"name": name, "runs": numbers, "seeds": [runs[n]["seed"] for n in numbers]} for name, numbers in zip(names, alike.values(), strict=True)]


def _side_by_side(sheet: Sequence[tuple[Path, list[Judgment]]]) -> list[list[Judgment]]:
    """Files of the same two models are one run, of other sets each; those of other models are another run: another seed."""
    runs: dict[tuple[str, str], list[Judgment]] = defaultdict(list)
    for _, found in sheet:
        runs[found[0].candidate, found[0].baseline] += found
    return list(runs.values())


def _held_out(candidate: dict[str, Any], baseline: dict[str, Any], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What two arms know of the held-out rows after their last phase; runs are paired by seed, else in order."""
    mine, theirs = ([runs[n] for n in arm["runs"] if runs[n]["finished"]] for arm in (candidate, baseline))
    seeds = {run["seed"] for run in mine} & {run["seed"] for run in theirs}
    pairs = [(a, b) for a in mine for b in theirs if a["seed"] == b["seed"]] if seeds else list(zip(mine, theirs, strict=False))
    found: dict[str, Any] = {"candidate": candidate["name"], "baseline": baseline["name"], "pairs": [[a["name"], b["name"]] for a, b in pairs]}
    found |= {"loss": _losses(pairs), "exact_match": _exact(pairs)}
    alone = [run["name"] for run in [*mine, *theirs] if not any(run in pair for pair in pairs)]
    found["files"] = [f"{run['name']}/{file}" for pair in pairs for run in pair for file in ["forgetting.json"] + [ANSWERS] * bool(found["exact_match"])]
    unpaired = [f"Left out, without a run of the other arm to go with: {', '.join(alone)}."] * bool(alone)
    return found | {"words": [*_words(found), *unpaired]}


def _losses(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any]:
    """Of each bin: both arms' loss, their difference, and Student's interval of it, for which two pairs of seeds are needed."""
    last = [[run["forgetting"]["rows"][-1]["loss"] for run in pair] for pair in pairs]
    bins = [name for name in (last[0][0] if last else ()) if all(name in loss for pair in last for loss in pair)]
    table = {}
    for name in bins:
        both_K2 = np.array([[loss[name] for loss in pair] for pair in last])
        difference, interval = student(both_K2[:, 0] - both_K2[:, 1], LEVEL)
        candidate, baseline = both_K2.mean(0).tolist()
        table[name] = {"candidate": candidate, "baseline": baseline, "difference": difference, "interval": interval}
    return table


def _exact(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> dict[str, Any] | None:
    """Difference of exact match in percentage points, task by task, with the interval, test and conclusion of a comparison; None without answers to the same tasks."""
    tasks = [task for task in (pairs[0][0]["answers"] if pairs else ()) if all(task in run["answers"] for pair in pairs for run in pair)]
    if not tasks:
        return None
    right_KP2 = np.array([[[_right(run["answers"][task]) for run in pair] for task in tasks] for pair in pairs], np.float64)
    names = np.array([name for name, _ in tasks])

    def figures(bins: Sequence[str]) -> dict[str, Any]:
        chosen = np.isin(names, bins)
        difference = estimated([right_KP2[:, names == name, 0] - right_KP2[:, names == name, 1] for name in bins], np.nan, RESAMPLES, 0, LEVEL, reach=1.0)
        shares = dict(zip(("candidate", "baseline"), right_KP2[:, chosen].mean((0, 1)).tolist(), strict=True))
        return {"tasks": int(chosen.sum())} | shares | {"difference": difference.pop("win_rate")} | difference

    bins = list(dict.fromkeys(names.tolist()))
    return figures(bins) | {"sets": {name: figures([name]) for name in bins}}


def _right(row: Mapping[str, str]) -> bool:
    return is_exact(row["response"], row["answer"])


def _words(found: Mapping[str, Any]) -> Iterator[str]:
    candidate, baseline, exact, runs = (found[key] for key in ("candidate", "baseline", "exact_match", "pairs"))
    if exact:
        between = "{:.0%} interval {:+.1f} to {:+.1f}".format(LEVEL, *exact["interval"]) if exact["interval"] else "no interval"
        said = f"{exact['difference']:+.1f} points of exact match ({between}) over {exact['tasks']:,} held-out tasks"
        if exact["conclusion"] in ("better", "worse"):
            yield f"{candidate} is {exact['conclusion']} than {baseline}: {said}."
        else:
            yield f"The difference between {candidate} and {baseline} is within noise: {said}."
        if len(runs) == 2 and exact["interval"]:
            yield SEEDS[2]
        if len(runs) == 1:
            yield f"It is one training seed of {candidate} and {baseline}: the interval does not hold what another seed would change."
    elif found["loss"]:
        each = ", ".join(f"{name} {one['difference']:+.3f}" for name, one in found["loss"].items())
        yield f"Held-out loss of {candidate} minus that of {baseline}: {each}."
        if len(runs) == 1:
            yield "That is one run of each, so that nothing says whether these differences are more than noise: train several seeds, or judge the answers."
    else:
        yield f"No verdict between {candidate} and {baseline}: no two of their runs are finished and have held-out figures in common."


def _alone(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [f"{len(runs)} run{'s' * (len(runs) > 1)} of one arm: there is nothing to compare with. Give runs of another arm, or judgments."]


def _budget(arms: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first run's budget of each arm, and of each measure whether arms differ by more than `ALIKE`."""
    known = {arm["name"]: runs[arm["runs"][0]]["plan"] for arm in arms if runs[arm["runs"][0]]["plan"]["budget"]}
    ledgers = {name: plan["budget"] for name, plan in known.items()}
    spread = {}
    for measure in next(iter(ledgers.values()), {}):
        values = [ledger[measure] for ledger in ledgers.values()]
        spread[measure] = (max(values) - min(values)) / max(values) if max(values) else 0.0
    return {"files": [plan["file"] for plan in known.values()], "arms": ledgers, "spread": spread, "unlike": [name for name, share in spread.items() if share > ALIKE]}


def _responses(path: Path) -> dict[str, Any]:
    """The answers of one model in a file, by (set, id), and how long they are."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        by_prompt = {(str(row["set"]), str(row["id"])): row for row in rows if isinstance(row["response"], str)}
        model = str(rows[0]["model"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"--answers: '{path}' is no file of answers ({type(error).__name__}: {error}); wanted: lines with id, set, model and response") from None
    if not by_prompt:
        raise UserError(f"--answers: '{path}' holds no answer; wanted: lines with id, set, model and response")
    lengths: dict[str, Any] = {"answers": len(by_prompt), "too_long": len(rows) - len(by_prompt), "clipped": sum(row.get("finish_reason") == "length" for row in rows)}
    for unit, measure in (("characters", len), ("words", lambda text: len(text.split()))):
        values = [measure(row["response"]) for row in by_prompt.values()]
        quantiles = {str(percent): float(np.percentile(values, percent)) for percent in (10, 25, 50, 75, 90)}
        lengths[unit] = {"mean": float(np.mean(values)), "quantiles": quantiles}
    return {"file": str(path), "model": model, "rows": by_prompt, "lengths": lengths}


def _judged_pairs(responses: Sequence[Mapping[str, Any]], judgments: Sequence[Judgment]) -> Iterator[dict[str, Any]]:
    """Answers to one prompt by all models, and what the judge said of them; where a prompt was judged more than once, the first time."""
    judged: dict[tuple[str, str], Judgment] = {}
    for judgment in judgments:
        judged.setdefault((judgment.test_set, judgment.id), judgment)
    for prompt in dict.fromkeys(prompt for one in responses for prompt in one["rows"]):
        rows = [(one["model"], one["rows"][prompt]) for one in responses if prompt in one["rows"]]
        asked = "\n".join(str(rows[0][1][key]) for key in ("instruction", "input") if rows[0][1].get(key))
        found = {"set": prompt[0], "id": prompt[1], "prompt": asked, "verdict": "not judged", "said": ""}
        if prompt in judged:
            judgment = judged[prompt]
            found["verdict"] = VERDICTS.get(float(points(scores_of([judgment]))[0]), "invalid")
            orders = "; ".join("{:g} to {:g}".format(*order.scores) if order.scores else order.outcome for order in judgment.orders)
            found["said"] = f"{judgment.candidate} against {judgment.baseline}: {orders}"
        yield found | {"answers": [{"by": model, "text": row["response"]} for model, row in rows]}


def _tasks(arms: Sequence[Mapping[str, Any]], runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answers to held-out tasks by the first run of each arm, those first on which they differ."""
    found = []
    first = [(arm["name"], runs[arm["runs"][0]]["answers"]) for arm in arms if runs[arm["runs"][0]]["answers"]]
    for (name, identifier), row in first[0][1].items() if first else ():
        given = [(arm, answers[name, identifier]) for arm, answers in first if (name, identifier) in answers]
        right = [_right(other) for _, other in given]
        verdict = "all right" if all(right) else "differ" if any(right) else "all wrong"
        answers = [{"by": arm, "text": other["answer"], "right": good} for (arm, other), good in zip(given, right, strict=True)]
        found.append({"set": name, "id": identifier, "prompt": row["prompt"], "verdict": verdict, "said": f"expected: {row['response']}", "answers": answers})
    return sorted(found, key=lambda row: ("differ", "all wrong", "all right").index(row["verdict"]))


def _examples(found: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """As many as fit into a page: evenly spaced where there are too many, each text cut after as many characters as all have room for."""
    rows = list(found)

    def cut(text: str, after: int) -> str:
        return text if len(text) <= after else text[:after] + " ..."

    for count, after in [(EXAMPLES, after) for after in CUTS] + [(EXAMPLES >> halved, CUTS[-1]) for halved in range(1, 9)]:
        shown = [rows[i] for i in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), count)).round().astype(int))]
        short = [
            row | {"prompt": cut(row["prompt"], after), "said": cut(row["said"], after), "answers": [answer | {"text": cut(answer["text"], after)} for answer in row["answers"]]}
            for row in shown
        ]
        texts = (text for row in short for text in (row["prompt"], row["said"], *(answer["text"] for answer in row["answers"])))
        if sum(len(escape(text).encode("utf-8", "backslashreplace")) for text in texts) <= TEXTS:
            break
    return {"of": len(rows), "cut_after": after if short != shown else None, "rows": short}


def _paper(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The paper's rows for the model of the runs; without such, those for all of its models, phased against one-off."""
    paper = json.loads(PAPER.read_text(encoding="utf-8"))
    bases = {"".join(filter(str.isalnum, str(run["model"]).rpartition("/")[2].lower())) for run in runs}
    same = [row for row in paper["rows"] if any(base.startswith("".join(filter(str.isalnum, row["model"].lower()))) for base in bases)]
    return paper | {"same_model": bool(same), "rows": same or [row for row in paper["rows"] if row["method"] == "phased 1-2-3" and row["baseline"].startswith("One-off")]}

"""What a model is made of, for whoever finds its folder: provenance.json for programs, README.md for people and the hub.

Everything is read from the run's own files, so that an export made later says the same as one made by the run.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from phased_ift_jax import config
from phased_ift_jax.models import hub
from phased_ift_jax.models.hf_folder import CARD, Folder
from phased_ift_jax.records import UserError
from phased_ift_jax.training.checkpoint import metadata_of
from phased_ift_jax.training.metrics import whole_lines

PROVENANCE = "provenance.json"


def provenance(run: Path, checkpoint: Path, base: Folder) -> dict[str, Any]:
    """The facts of a checkpoint: base, data, arm, phases so far, settings, versions, and what was measured up to it."""
    settings = config.load(run / "config.yaml")
    saved = metadata_of(checkpoint)
    try:
        rows = json.loads((run / "forgetting.json").read_text(encoding="utf-8"))["rows"]
    except FileNotFoundError:
        rows = []
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{run / 'forgetting.json'}' is damaged; remove it, and the model card will be without held-out figures") from None
    phase = checkpoint.parent.name
    until = next((i for i, row in enumerate(rows) if row["after"] == phase), len(rows) - 1)
    trained: dict[str, dict[str, Any]] = {}
    for line in whole_lines(run / "metrics.jsonl"):
        if (line["phase_index"], line["step"]) <= (saved["phase"], saved["step"]):
            trained[line["phase"]] = {name: line[name] for name in ("phase", "step", "epoch", "learning_rate", "loss")}
    name = settings.model.model_name_or_path
    on_hub = hub.is_name(name) and not str(saved.get("base")).endswith(name)  # else it was a folder of that name
    shown = _without_folders(settings.model_dump(mode="json", by_alias=True))
    return {
        "base": {"name": shown["model"]["model_name_or_path"], "revision": settings.model.revision, "init": settings.model.init, "on_hub": on_hub},
        "base_license": license_of(base),
        "data": {"path": shown["data"]["path"], "license": settings.export.data_license, "sha256": saved["identity"]},
        "arm": settings.curriculum.arm,
        "checkpoint": {name: saved[name] for name in ("phase", "step", "epoch", "complete")} | {"folder": phase},
        "trained": list(trained.values()),
        "held_out": rows[: until + 1],
        "versions": saved.get("versions", {}),
        "settings": shown,
    }


def _without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folders of one's own machine, which are nobody else's business."""

    def bare(path: str) -> str:
        return Path(path).name if Path(path).is_absolute() or "://" in path else path

    paths = settings["data"]["path"]
    settings["output_dir"] = bare(settings["output_dir"])
    settings["model"]["model_name_or_path"] = bare(settings["model"]["model_name_or_path"])
    settings["data"]["path"] = bare(paths) if isinstance(paths, str) else [bare(path) for path in paths]
    return settings


def license_of(folder: Folder) -> dict[str, str]:
    """What a model's own card states of its licence in the front matter: license, license_name, license_link, as far as it does."""
    path = folder.path / CARD
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    parts = text.split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        stated = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return {name: stated[name] for name in ("license", "license_name", "license_link") if isinstance(stated, dict) and isinstance(stated.get(name), str)}


def card(facts: dict[str, Any]) -> str:
    """A model card with the facts of `provenance`."""
    base, data, settings, terms = facts["base"], facts["data"], facts["settings"], facts["base_license"]
    front = (terms or {"license": "other"}) | {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["phased_ift_jax", "instruction-tuning"],
    } | ({"base_model": base["name"]} if base["on_hub"] else {})
    shown = base["name"] if base["on_hub"] else Path(base["name"]).name
    paths = [data["path"]] if isinstance(data["path"], str) else data["path"]
    place = facts["checkpoint"]
    lines = [
        f"# {shown}, fine-tuned {'at once' if facts['arm'] == 'one_off' else 'in phases'}",
        "",
        f"Made with phased_ift_jax {facts['versions'].get('phased_ift_jax', '')} from "
        + (f"random weights of the sizes of {shown}" if base["init"] == "random" else shown)
        + f" (arm `{facts['arm']}`, checkpoint `{place['folder']}` at step {place['step']}{'' if place['complete'] else ', within the phase'}).",
        "",
        "- Base: none; the weights were drawn at random."
        if base["init"] == "random"
        else f"- Base: {shown}{' @ ' + base['revision'] if base['revision'] else ''}, licence: "
        f"{terms.get('license_name') or terms.get('license') or 'not stated by its card'}; its terms hold for this model, too.",
        f"- Data: {', '.join(Path(path).name if '://' not in path else path for path in paths)}, licence: {data['license'] or 'not stated (export.data_license)'}; "
        f"identity of the rows, scores and bins: `{data['sha256']}`.",
        f"- Prompt template: `{settings['data']['prompt_template']}`. Ask it in the same form.",
        "",
        "| phase | steps | epochs | last learning rate | last training loss |",
        "|---|---|---|---|---|",
        *(
            f"| {row['phase']} | {row['step']} | {row['epoch']:g} | {row['learning_rate']:.3g} | {'left out' if row['loss'] is None else format(row['loss'], '.4f')} |"
            for row in facts["trained"]
        ),
    ]
    for measure, form in (("loss", ".3f"), ("exact_match", ".1%")):
        rows = [row for row in facts["held_out"] if row.get(measure)]
        if rows:
            bins = list(rows[0][measure])
            lines += ["", f"Held-out {measure.replace('_', ' ')} of each bin, after each phase:", "", f"| after | {' | '.join(bins)} |", "|---" * (len(bins) + 1) + "|"]
            lines += [f"| {row['after']} | {' | '.join(format(row[measure][name], form) for name in bins)} |" for row in rows]
    lines += ["", "Settings:", "", "```yaml", yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=120).rstrip(), "```", ""]
    lines += ["Versions: " + ", ".join(f"{name} {version}" for name, version in facts["versions"].items()) + ".", ""]
    return "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n\n" + "\n".join(lines)

"""A scored file as a dataset of the hub, with its run card as the page: what it holds, who scored it and how, so that it can be done again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from phased_ift_jax.records import UserError
from phased_ift_jax.scoring.outputs import beside

LEVELS = (1.0, 1.5, 2.5, 3.5, 4.5, 5.0)  # of the page's table: half-open, but for the last
SCORERS = {
    "import": "a score that its source already held",
    "length": "its rank by the characters of its response",
    "ifd": "its rank by instruction-following difficulty",
}
PAGE = """---
configs:
- config_name: default
  data_files: scored.jsonl
tags:
- instruction-tuning
- difficulty
- phased_ift_jax
---

# {scored:,} instructions with their difficulty

Every record of `scored.jsonl` has a `difficulty` from 1 (easy) to 5 (hard): {scorer}. `python -m phased_ift_jax.score` made it.
{unscored} Their texts come from {data}, whose licence holds for them here, too.

| difficulty | records |
|---|---|
{levels}

Mean {mean}. Train on it in phases with `data: {{path: hub:{name}}}`. See how another scorer agrees with it:
`python -m phased_ift_jax.calibrate YOURS.jsonl --against hub:{name}`.

## Run card

````json
{card}
````
"""


def files_of(out: Path, name: str, with_ledger: bool = False) -> dict[str, Path | bytes]:
    """What is published of a scored file, by name: itself, what is unscored, its card, a page; the ledger, which has all raw replies, only if asked for.

    Raises:
        UserError: one of them is missing, or the scored file is not the one that its card was written for.
    """
    parts = {f"scored.{part}": beside(out, part) for part in ("unscored.jsonl", "card.json", *(["ledger.jsonl"] if with_ledger else []))}
    files: dict[str, Path | bytes] = {"scored.jsonl": out, **parts}
    for path in (out, *parts.values()):
        if not path.is_file():
            raise UserError(f"--push_to_hub: no such file '{path}'; publish what `score` has written, with the files beside it")
    try:
        text = beside(out, "card.json").read_text(encoding="utf-8")
        card = json.loads(text)
        data = out.read_bytes()
        if card["sha256"] != hashlib.sha256(data).hexdigest():
            raise UserError(f"--push_to_hub: '{out}' is not the file that '{beside(out, 'card.json').name}' was written for; score the data again")
        return files | {"README.md": _page(card, text.rstrip(), [json.loads(line)["difficulty"] for line in data.splitlines()], name).encode()}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"--push_to_hub: '{beside(out, 'card.json')}' is no run card ({type(error).__name__}: {error}); score the data again") from None


def _page(card: Mapping[str, Any], text: str, difficulties: list[float], name: str) -> str:
    counts = [(low, high, sum(low <= one < high or (one == high == LEVELS[-1]) for one in difficulties)) for low, high in pairwise(LEVELS)]
    levels = "\n".join(f"| {low:g} to {high:g} | {count:,} |" for low, high, count in counts)
    scorer = SCORERS.get(card["scorer"], "by the model `{model}`").format(model=card.get("model"))
    without = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(card["unscored"].items()))
    unscored = f"Records without a number are listed in `scored.unscored.jsonl`: {without}." if without else "No record is without a number."
    mean = f"{card['mean_difficulty']:.3f}" if difficulties else "of nothing"
    data = ", ".join(f"`{Path(place).name}`" for place in card.get("data", [])) or "elsewhere"
    return PAGE.format(scored=len(difficulties), scorer=scorer, unscored=unscored, data=data, levels=levels, mean=mean, name=name, card=text)

"""How a scored file agrees with a reference, and which thresholds the reference can test.

    python -m phased_ift_jax.calibrate scored.jsonl --against data/en-alpaca52k-stage3.jsonl --thresholds 4.0 4.75

Records are matched by id and content, else by content, also across the official data preparation. The reference is any file with scores, or with
`official_stage3` (true or false, and perhaps `official_score`), which says of a record only whether it lies above 3.5.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from itertools import pairwise
from reprlib import repr as short
from typing import Any

from phased_ift_jax import cli
from phased_ift_jax.data import readers
from phased_ift_jax.records import InstructionRecord, ScoredRecord, UserError
from phased_ift_jax.scoring.calibration import Known, calibrate

LABEL, SCORE = "official_stage3", "official_score"
PAPER = (1.5, 3.5)


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="calibrate", description=__doc__)
    parser.add_argument("scored", metavar="SCORED", help="file with scores: what `score` has written, or any other")
    parser.add_argument("--against", required=True, metavar="REFERENCE", help="file with scores or labels")
    parser.add_argument("--thresholds", nargs="+", type=float, default=list(PAPER), metavar="T", help="bounds between phases, rising [the paper's, 1.5 3.5]")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    args = parser.parse_args(argv)
    if args.thresholds != sorted(set(args.thresholds)) or not all(1 < threshold <= 5 for threshold in args.thresholds):
        raise UserError(f"--thresholds: {' '.join(map(str, args.thresholds))} do not rise from above 1 to at most 5; try {' '.join(map(str, PAPER))}")

    scored = [(record.record, record.difficulty) for record in _records(args.scored) if isinstance(record, ScoredRecord)]
    if not scored:
        raise UserError(f"'{args.scored}' has no scores; make some with `score`")
    found = calibrate(scored, known(args.against), args.thresholds)
    if not found["matched"]:
        raise UserError(f"no record of '{args.scored}' is in '{args.against}': no id and no content is the same")
    print(json.dumps(found) if args.json else described(found))
    return 0


def known(path: str) -> list[Known]:
    """What a file knows of its records; those of which it knows nothing are left out.

    Raises:
        UserError: it knows nothing of any, or a label or score cannot be understood.
    """
    said, found = readers.columns(path, (LABEL, SCORE)), []
    for record in _records(path):
        if isinstance(record, ScoredRecord):
            found.append(Known(record.record, record.difficulty, record.difficulty))
        elif beside := said.get(record.source):
            label, score = beside.get(LABEL), beside.get(SCORE)
            if not isinstance(label, bool | None) or not isinstance(score, int | float | None) or (score is not None and not 1 <= score <= 5):
                raise UserError(f"{record.source}: {LABEL} {short(label)}, {SCORE} {short(score)}; wanted: true or false, and a number from 1 to 5 or null")
            found.append(Known.labelled(record, bool(label)) if score is None else Known(record, score, score))
    if not found:
        raise UserError(f"--against: '{path}' has neither scores nor {LABEL}; name a scored file")
    return found


def _records(path: str) -> Sequence[InstructionRecord | ScoredRecord]:
    reading = readers.read(path)
    if bad := reading.quarantined:
        print(f"note: of '{path}' {len(bad):,} cannot be used; the first is line {bad[0].source.line}: {bad[0].reason}", file=sys.stderr)
    return reading.records


def described(found: dict[str, Any]) -> str:
    spearman = "not defined" if found["spearman"] is None else f"{found['spearman']:.3f}"
    by = f"{found['matched_by_id']:,} by id, {found['matched_by_content']:,} by content"
    lines = [
        f"matched   {found['matched']:,} of {found['scored']:,} scored and {found['reference']:,} of the reference: {by}",
        f"spearman  {spearman}, over {found['spearman_n']:,} records whose score the reference knows",
    ]
    if found["same_id_other_text"]:
        lines.append(f"note      {found['same_id_other_text']:,} ids name another text in the reference; these were not matched by id")
    rows: list[list[object]] = [["threshold", "at or above", "below", "AUC"]]
    rows += [[f"{one['threshold']:g}", f"{one['above']:,}", f"{one['below']:,}", "none" if one["auc"] is None else f"{one['auc']:.3f}"] for one in found["thresholds"]]
    lines += ["", cli.table(rows)]
    untested = [one for one in found["thresholds"] if one["auc"] is None]
    lines += [f"{one['threshold']:g} cannot be tested: the reference knows of no record {'below' if one['above'] else 'at or above'} it" for one in untested]
    if confusion := found["confusion"]:
        own = ", ".join("none" if cut is None else f"{cut:.3f}" for cut in confusion["own_thresholds"])
        for name, title in (("by_value", "cut there, too"), ("by_size", f"cut to the reference's sizes, at {own}")):
            lines += ["", f"reference (down) and scored file (across), {title}", cli.table(_confusion(confusion, name))]
    return "\n".join(lines)


def _confusion(confusion: dict[str, Any], name: str) -> list[list[object]]:
    bounds = [f"{threshold:g}" for threshold in confusion["thresholds"]]
    names = [f"below {bounds[0]}", *(f"{low} to {high}" for low, high in pairwise(bounds)), f"from {bounds[-1]}"]
    rows: list[list[object]] = [[phase, *(f"{count:,}" for count in row)] for phase, row in zip(names, confusion[name], strict=True)]
    return [["", *names], *rows]


if __name__ == "__main__":
    cli.run(main)

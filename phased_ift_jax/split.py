"""Put scored data into phases:  python -m phased_ift_jax.split SCORED --out DIR (--thresholds T ... | --quantiles Q ... | --sizes S ... | --auto K)

    split scored.jsonl --out phases --thresholds 1.5 3.5     bins [lowest, 1.5), [1.5, 3.5), [3.5, highest]
    split scored.jsonl --out phases --quantiles 0.585 0.869  so many of the rows below each threshold, as nearly as equal scores stay together
    split scored.jsonl --out phases --sizes paper            the paper's sizes, 58.5, 28.4 and 13.1 %: for any scorer but the paper's own
    split scored.jsonl --out phases --auto 3                 where the density of the scores has valleys, and the bins are alike in size

DIR gets phases.json, which curriculum.bins {from: DIR/phases.json} reads; the distribution with the thresholds as distribution.png and .svg (needs
the extra `analysis`); unscored.jsonl, the rows that are in no bin; and with --tfds the phases as splits of a TFDS dataset, which data.path: tfds:DIR/tfds with
data.split: all reads. Nothing is scored again.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from phased_ift_jax import cli, pictures
from phased_ift_jax.records import UserError

if TYPE_CHECKING:
    from phased_ift_jax.data.splitting import Scores

KEY = "--tokenizer"
TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="split", description=__doc__)
    parser.add_argument("scored", metavar="SCORED", help="scored rows: anything that data.path takes")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the phases: a new or empty one, or one that split has written")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--thresholds", nargs="+", type=float, metavar="T", help="the lowest score of each bin but the first")
    rule.add_argument("--quantiles", nargs="+", type=float, metavar="Q", help="share of the scored rows below each threshold")
    rule.add_argument("--sizes", nargs="+", metavar="S", help="share of the scored rows in each bin, or `paper`")
    rule.add_argument("--auto", type=int, metavar="K", help="find the thresholds between K bins")
    parser.add_argument("--names", nargs="+", metavar="NAME", help="names of the bins, easiest first; default: stage1, stage2, ...")
    parser.add_argument("--tokenizer", metavar="MODEL", help="folder or hub name of a model, to count tokens by its tokenizer")
    parser.add_argument("--tfds", action="store_true", help="write the phases as a TFDS dataset (ArrayRecord), too")
    parser.add_argument("--json", action="store_true", help="print one JSON object, phases.json without the ids, instead of a table")
    args = parser.parse_args(argv)

    from phased_ift_jax.data import phase_files as files  # what these bring takes a second: not before the command line is known to be sound
    from phased_ift_jax.data import readers

    encode = _encoder(args.tokenizer) if args.tokenizer else None
    reading = readers.read(args.scored)
    scores = files.scores_of(reading, args.scored)
    thresholds, chosen = _chosen(args, scores)
    made = files.split(reading, _names(args.names, len(thresholds) + 1, args.tfds), thresholds)
    bins = files.facts(made, encode)
    rows = {"read": reading.rows, "in_bins": int((made.bin_of > 0).sum()), "unscored": len(made.rows(0)), "quarantined": len(reading.quarantined)}
    told = {"data": args.scored, "rows": rows, "thresholds": thresholds, "chosen": chosen, "tokenizer": args.tokenizer, "scorer": files.run_card(args.scored)}
    with files.claimed(args.out) as folder:
        files.write_list(made, told, bins, folder)
        written = [files.LIST, files.UNSCORED]
        if args.tfds:
            files.write_tfds(made, folder)
            written.append(files.TFDS)
        title = f"{Path(args.scored).name}: {scores.counts.sum():,} scores\n{_how(chosen)}"
        written += _draw(scores, thresholds, made.names, title, folder / files.PICTURE)
    if args.json:
        print(json.dumps({**told, "bins": bins, "written": written}))
        return 0
    print(f"{reading.rows:,} rows = {rows['in_bins']:,} in bins + {rows['unscored']:,} without a score + {rows['quarantined']:,} that cannot be used")
    if empty := sum(bin["empty_responses"] for bin in bins):
        print(f"note: {empty:,} of those in bins have an empty response: training quarantines them (and stops at more than data.max_quarantined)")
    print(f"{_how(chosen)}: thresholds {' '.join(map(repr, thresholds))}\n\n{_table(bins, thresholds)}\n")
    print(f"written in {folder}: {', '.join(written)}")
    print(f"train with  --curriculum.bins '{{from: {folder / files.LIST}}}'")
    if args.tfds:
        print(f"or          --data.path tfds:{folder / files.TFDS} --data.split all --curriculum.bins '{{by: file}}'")
    return 0


def _chosen(args: Any, scores: Scores) -> tuple[tuple[float, ...], dict[str, Any]]:
    """The thresholds, and how they were chosen."""
    from phased_ift_jax.data import splitting

    if args.auto is not None:
        found = splitting.found(scores, args.auto)
        terms = {"saddles": found.saddles, "unevenness": found.unevenness, "cost": found.cost, "bandwidth": scores.bandwidth}
        return found.thresholds, {"by": "auto", "asked": args.auto, **terms}
    if args.thresholds:
        return splitting.at_values(scores, args.thresholds), {"by": "thresholds", "asked": args.thresholds}
    sizes = None if args.sizes is None else _sizes(args.sizes, splitting.PAPER_SIZES)
    below = [sum(sizes[:k]) for k in range(1, len(sizes))] if sizes else args.quantiles
    thresholds = splitting.at_shares(scores, below)
    had = (scores.bins(thresholds) / scores.counts.sum()).tolist()
    if sizes:
        return thresholds, {"by": "sizes", "asked": sizes, "achieved": had}
    return thresholds, {"by": "quantiles", "asked": below, "achieved": [sum(had[:k]) for k in range(1, len(had))]}


def _sizes(given: Sequence[str], paper: tuple[float, ...]) -> list[float]:
    try:
        sizes = list(paper) if list(given) == ["paper"] else [float(size) for size in given]
    except ValueError:
        raise UserError(f"--sizes: {' '.join(given)}: shares such as 0.6 0.3 0.1, or `paper`, are expected") from None
    whole = 100.0 if sum(sizes) > 2 else 1.0  # in percent, or parts of one
    if len(sizes) < 2 or not all(size > 0 for size in sizes) or not abs(sum(sizes) / whole - 1) < 0.005:
        raise UserError(f"--sizes: {' '.join(given)}: two or more positive shares that add up to 1, or to 100 %, are expected")
    return [size / sum(sizes) for size in sizes]


def _names(given: Sequence[str] | None, bins: int, tfds: bool) -> list[str]:
    from phased_ift_jax.config import NAME

    names = list(given or (f"stage{number}" for number in range(1, bins + 1)))
    if len(names) != bins:
        raise UserError(f"--names: {len(names)} names for {bins} bins")
    if len(set(names)) < bins or not all(re.fullmatch(NAME, name) for name in names):
        raise UserError(f"--names: {', '.join(map(repr, names))} must be distinct and made of letters, digits and _.+-")
    if tfds and (unfit := [name for name in names if not re.fullmatch(r"[\w-]+", name) or name in ("all", "unscored")]):
        raise UserError(f"--names: {unfit[0]!r} cannot name a split of TFDS; use letters, digits, _ and -, and neither `all` nor `unscored`")
    return names


def _encoder(model: str) -> Any:
    from phased_ift_jax.data.tokenization import load_tokenizer
    from phased_ift_jax.models import hub

    try:
        if pictures.is_ours(model):
            folder = pictures.take(model, KEY, lambda name: name.startswith("tokenizer") or name in TOKENIZER_FILES)
        else:
            local = Path(model).expanduser()
            folder = hub.download(model, None, TOKENIZER_FILES) if hub.is_name(model) and not local.is_dir() else local
        backend = load_tokenizer(folder).backend_tokenizer
    except UserError as error:
        raise UserError(str(error).replace("model.model_name_or_path", KEY)) from None
    return lambda texts: [encoding.ids for encoding in backend.encode_batch(texts, add_special_tokens=False)]


def _draw(scores: Scores, thresholds: Sequence[float], names: Sequence[str], title: str, base: Path) -> list[str]:
    from phased_ift_jax.data.split_plot import draw

    try:
        return [picture.name for picture in draw(scores, thresholds, names, title, base)]
    except ImportError:
        print("note: no picture, for matplotlib is missing: pip install 'phased_ift_jax[analysis]'", file=sys.stderr)
        return []


def _how(chosen: dict[str, Any]) -> str:
    """How the thresholds were chosen, in words."""

    def percent(shares: Sequence[float]) -> str:
        return " / ".join(f"{share:.1%}" for share in shares)

    if chosen["by"] == "auto":
        return f"auto {chosen['asked']}, saddles {' '.join(f'{saddle:.2f}' for saddle in chosen['saddles'])}, unevenness {chosen['unevenness']:.2f}"
    if chosen["by"] == "thresholds":
        return "by value"
    return f"by {chosen['by']}, {percent(chosen['asked'])} asked, {percent(chosen['achieved'])} had"


def _table(bins: Sequence[dict[str, Any]], thresholds: Sequence[float]) -> str:
    means = [key for key in ("mean_score", "mean_tokens", "mean_words", "mean_characters") if key in bins[0]]
    edges = [f"{bins[0]['lowest']:g}", *map(repr, thresholds), f"{bins[-1]['highest']:g}"]
    rows: list[list[str]] = [["bin", "rows", "share", "scores", *(key.replace("_", " ") for key in means)]]
    for facts, start, end in zip(bins, edges, edges[1:], strict=False):
        interval = f"[{start}, {end}{']' if facts is bins[-1] else ')'}"
        rows.append([facts["name"], f"{facts['rows']:,}", f"{facts['share']:.1%}", interval, *(f"{facts[key]:,.{2 if key == 'mean_score' else 1}f}" for key in means)])
    return cli.table(rows)


if __name__ == "__main__":
    cli.run(main)

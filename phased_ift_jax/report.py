"""Did it help? One page of runs, judgments and answers:  python -m phased_ift_jax.report RUN_DIR... [--judgments FILE...] [--answers FILE...] --out report.html

  report runs/phased runs/one-off runs/random --out report.html           the first run's arm against each other one, on their held-out rows
  report runs/phased runs/one-off --judgments judgments.jsonl --answers phased.jsonl one-off.jsonl --out report.html
  report --judgments seed1.jsonl seed2.jsonl --out report.html            files of one --judgments are one comparison: several sets, several seeds
  report --judgments a.jsonl --judgments b.jsonl --out report.html        two comparisons

The page needs no network, and no script but for its filters; report.json beside it has its numbers, each with the file that it is from. Runs that differ in
nothing but their seed are one arm. Judgments of the same two models are one seed's; another seed's models have other names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from phased_ift_jax import cli
from phased_ift_jax.files import write_whole
from phased_ift_jax.object_store import is_address
from phased_ift_jax.records import UserError


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="report", description=__doc__)
    parser.add_argument("runs", nargs="*", metavar="RUN_DIR", help="output_dir of a run: a folder, or an address such as gs://bucket/runs/one")
    parser.add_argument("--judgments", nargs="+", action="append", default=[], metavar="FILE", help="judgments.jsonl, or recorded logs, of one comparison")
    parser.add_argument("--answers", nargs="+", default=[], metavar="FILE", help="answers.jsonl of a model each: lengths, and examples side by side")
    parser.add_argument("--judge", default="", metavar="NAME", help="who judged recorded logs, which do not say it [their file's name]")
    parser.add_argument("--out", required=True, metavar="report.html", help="the page; report.json is written beside it")
    args = parser.parse_args(argv)
    out = Path(args.out).expanduser()
    if out.suffix != ".html":
        raise UserError(f"--out: '{args.out}' does not end in .html; such as report.html")
    if not (args.runs or args.judgments):
        raise UserError("report: nothing to report on; give RUN_DIR..., --judgments FILE..., or both")

    from phased_ift_jax.evaluation.page import render
    from phased_ift_jax.evaluation.report import gather
    from phased_ift_jax.training import mirror

    with ExitStack() as held:
        runs = [(run.rstrip("/"), held.enter_context(mirror.picture(run)) if is_address(run) else Path(run).expanduser()) for run in dict.fromkeys(args.runs)]
        found = gather(runs, [[Path(path) for path in paths] for paths in args.judgments], [Path(path) for path in args.answers], args.judge)
    page, facts = render(found), json.dumps(found, indent=1) + "\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out.with_suffix(".json"), facts)
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"--out: cannot write '{out}': {error.strerror}; name another file") from None
    print("\n".join(found["words"]))
    print(f"\n{out} ({cli.size(out.stat().st_size)}); its numbers: {out.with_suffix('.json')}")
    return 0


if __name__ == "__main__":
    cli.run(main)

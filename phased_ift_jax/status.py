"""How far a run is, and what its next start will do:  python -m phased_ift_jax.status RUN [--verify]

Reads files only, and may be asked while the run is at work. Exit code 2 where --verify finds a damaged checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from phased_ift_jax import cli
from phased_ift_jax.object_store import is_address
from phased_ift_jax.records import UserError


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="status", description=__doc__)
    parser.add_argument("run", metavar="RUN", help="output_dir of a run: a folder, or an address such as gs://bucket/runs/one")
    parser.add_argument("--verify", action="store_true", help="compare every file of every checkpoint with the hash that was saved with it")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)

    from phased_ift_jax.training.status import status, status_of_address

    facts = status_of_address(args.run, args.verify) if is_address(args.run) else status(Path(args.run).expanduser(), args.verify)
    if args.json:
        print(json.dumps(facts))
    else:
        rows: list[list[object]] = [["phase", "rows", "steps", "done", "evaluated", "exported"]]
        rows += [[p["folder"], p["rows"], p["steps"], p["done"], "yes" if p["evaluated"] else "no", "yes" if p["exported"] else "no"] for p in facts["phases"]]
        print(cli.table(rows))
        print(f"\nnewest checkpoint{'' if not args.verify else ', verified'}: {facts['checkpoint'] or 'none'}")
        if last := facts["last_step"]:
            print(f"last step: {last['step']} of {last['phase']}, loss {'none' if last['loss'] is None else format(last['loss'], '.4f')}, {last['seconds']:.3g} s")
            if facts["seconds_left"]:
                print(f"left to train: about {timedelta(seconds=round(facts['seconds_left']))}")
        if good := facts["goodput"]:
            to = "since the {}" if not good["ended"] else "between the {} and the end"
            start = "start" if good["starts"] == 1 else f"first of {good['starts']} starts"
            print(f"goodput: {100 * good['share']:.0f} % of {timedelta(seconds=round(good['wall_seconds']))} {to.format(start)} was training")
        if facts["skipped"]:
            print(f"steps left out for a loss or gradient that was no finite number: {facts['skipped']}")
        print(f"at work: {facts['at_work'] or 'no process'}")
        print(f"the next start {facts['next_start']}")
        if args.verify and not facts["damaged"]:
            print("every file of every checkpoint is as it was saved")
    if facts["damaged"]:
        raise UserError("\n".join(f"'{path}' is damaged: {fault}" for path, fault in facts["damaged"].items()))
    return 0


if __name__ == "__main__":
    cli.run(main)

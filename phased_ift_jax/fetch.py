"""Download scored Alpaca, raw Alpaca or the six test sets, each checked by its SHA-256.

    python -m phased_ift_jax.fetch alpaca-scored --out data/

A download that was interrupted goes on where it stopped; a file that is there and right is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

from phased_ift_jax import cli, pictures
from phased_ift_jax.data import sources
from phased_ift_jax.object_store import Objects, crc32c_of, work_folder
from phased_ift_jax.records import UserError


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="fetch", description=__doc__)
    parser.add_argument("what", choices=list(sources.COLLECTIONS), help="what to download")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the files, on a disk or gs://; made if it is not there")
    parser.add_argument("--base_url", metavar="URL", help="a mirror: stands in for scheme and host of every address")
    args = parser.parse_args(argv)
    if not pictures.is_ours(args.out):
        sources.fetch(args.what, args.out, args.base_url)
        return 0
    objects = Objects(args.out, "out")
    paths = sources.fetch(args.what, work_folder() / "fetched", args.base_url)
    with pictures.told("out"):
        for path in paths:
            if (there := objects.facts(path.name)) and there.crc32c != crc32c_of(path):
                raise UserError(f"out: '{objects.address}/{path.name}' is there, and is something else; move it away, or name another folder")
        objects.upload((path.name, path) for path in paths)
    print(f"in {objects.address}: {', '.join(path.name for path in paths)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

"""What a model is and whether it can be trained here, without loading it.

    python -m phased_ift_jax.inspect meta-llama/Llama-2-7b-hf

MODEL is a hub name, a folder of safetensors, or what `convert from-hf` made. Exit code 0: it can be trained; 2: it cannot, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from phased_ift_jax import cli
from phased_ift_jax.records import UserError


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="inspect", description=__doc__)
    parser.add_argument("model", metavar="MODEL", help="hub name or folder")
    parser.add_argument("--revision", help="branch, tag or commit of a hub name")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    args = parser.parse_args(argv)

    from phased_ift_jax.training.inspection import inspect

    facts, fault = inspect(args.model, args.revision)
    facts["can be trained"] = "no" if fault else "yes"
    if args.json:
        print(json.dumps(facts | {"fault": fault}))
    else:
        for name, value in facts.items():
            print(f"{name:<22} {'none' if value is None else f'{value:,}' if isinstance(value, int) else value}")
    if fault:
        raise UserError(fault)
    return 0


if __name__ == "__main__":
    cli.run(main)

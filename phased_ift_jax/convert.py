"""Convert whole models between Hugging Face folders and orbax checkpoints, a few tensors at a time.

    python -m phased_ift_jax.convert from-hf meta-llama/Llama-2-7b-hf models/llama2-7b
    python -m phased_ift_jax.convert to-hf runs/llama2-7b-phased exported/ --dtype bfloat16

from-hf takes a hub name or a folder of safetensors; train takes what it makes as model.model_name_or_path. to-hf takes a run (its newest
finished phase), a checkpoint of a run, or what from-hf made. A conversion that was stopped goes on when the same command is given again. SRC and DST may be
addresses in a bucket, gs://bucket/models/llama2-7b.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from tqdm import tqdm

from phased_ift_jax import cli, pictures
from phased_ift_jax.records import UserError


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="convert", description=__doc__)
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-hf | to-hf", parser_class=cli.Parser)
    from_hf = ways.add_parser("from-hf", help="a Hugging Face model as an orbax checkpoint with all that lies beside its weights")
    to_hf = ways.add_parser("to-hf", help="a checkpoint as a folder that transformers loads")
    for way, what in ((from_hf, "hub name or folder"), (to_hf, "run, checkpoint of a run, or folder made by from-hf")):
        way.add_argument("source", metavar="SRC", help=what)
        way.add_argument("destination", metavar="DST", help="folder to be made")
    from_hf.add_argument("--revision", help="branch, tag or commit of a hub name")
    to_hf.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="dtype of the weights; default: the base's, tensor by tensor")
    to_hf.add_argument("--base", metavar="MODEL", help="where names, config and tokenizer come from; default: the model that the run started from")
    to_hf.add_argument("--push_to_hub", metavar="NAME", help="then upload the folder under this name")
    args = parser.parse_args(argv)

    from phased_ift_jax.models import hub  # what these bring takes seconds: not before the command line is known to be sound
    from phased_ift_jax.models.hf_folder import open_folder
    from phased_ift_jax.training import conversion

    destination = args.destination if pictures.is_ours(args.destination) else Path(os.path.expanduser(args.destination))
    with ExitStack() as stack:  # so that an error begins on a line of its own

        def bar(total: int) -> Callable[[int], object]:
            return stack.enter_context(tqdm(total=total, unit="B", unit_scale=True, dynamic_ncols=True)).update

        try:
            if args.way == "from-hf":
                made = conversion.from_hf(open_folder(args.source, args.revision), destination, bar)
            else:
                if args.push_to_hub is not None and not hub.is_name(args.push_to_hub):
                    raise UserError(f"--push_to_hub: '{args.push_to_hub}' is not a name such as your-name/llama2-7b-phased")
                if args.push_to_hub is not None and isinstance(destination, str):
                    raise UserError(f"--push_to_hub: '{destination}' is in a bucket, and the hub takes a folder of this machine; name one as DST")
                source = stack.enter_context(conversion.found(args.source, args.base))
                made = conversion.to_hf(source, destination, args.dtype, bar)
        except OSError as error:  # of SRC or DST: a name too long, a folder that may not be looked into, a disk that fails
            raise UserError(f"{error.strerror or error}" + (f": '{error.filename}'" if error.filename else "")) from error
    print(f"{'done' if made else 'nothing to do: it is there already'}: {destination}")
    if args.way == "to-hf" and args.push_to_hub is not None:
        print(f"uploaded: {hub.push(destination, args.push_to_hub)}")
    return 0


if __name__ == "__main__":
    cli.run(main)

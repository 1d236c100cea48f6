"""The rim that every verb shares: exit codes, one-line errors, and dotted flags (floor 0).

`python -m phased_ift_jax.<verb>` and `phased-ift <verb>` both end in `run`, which turns a `UserError` into lines on standard error
and exit code 2. The codes: 0 done; 1 a failure inside; 2 the user's input is at fault; 75 stopped on request with everything saved.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from phased_ift_jax.interrupts import REQUESTS
from phased_ift_jax.records import Failure, UserError

VERBS = {  # in the order in which one comes to need them
    "fetch": "download scored Alpaca, raw Alpaca or the test sets",
    "score": "how difficult records are: ask a model once, and never pay twice",
    "calibrate": "how a scored file agrees with another, and what that other can test",
    "split": "put scored data into phases: thresholds, a picture, phases.json",
    "plan": "what a run will do, before it does it",
    "train": "train a model in phases, or at once",
    "status": "how far a run is, and what its next start will do",
    "inspect": "what a model is and whether it can be trained, without loading it",
    "convert": "models between Hugging Face folders and orbax checkpoints",
    "generate": "answers of a model to prompts",
    "judge": "which of two models answers better, and how sure that is",
    "experiment": "arms x seeds of one run: train, answer, judge, report, and what the gain is made of",
    "report": "one page that says whether it helped: win rates, curves, forgetting, budgets, examples",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s of one line, and that knows no abbreviations."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)  # type: ignore[arg-type, misc]

    def error(self, message: str) -> NoReturn:
        flag = next((word for word in message.split() if word.startswith("--")), "").partition("=")[0] if message.startswith("unrecognized") else ""
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
        raise UserError(f"{self.prog}: {message}; " + (f"did you mean {near[0]}?" if near else "--help lists what is known"))


def parse_with_keys(parser: Parser, argv: Sequence[str]) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    """What a parser's own arguments are, and (key, YAML value) for every key of the configuration that is given as a flag.

    Raises:
        UserError: flags are neither; a line for each names the nearest that is known.
    """
    from phased_ift_jax import config

    own = [action.dest for action in parser._actions]
    keys = parser.add_argument_group("keys of the configuration, each of which may be given as a flag with a YAML value")
    for key, default, description in config.fields():
        keys.add_argument(f"--{key}", metavar="VALUE", default=argparse.SUPPRESS, help=f"{description} [{default}]".replace("%", "%%"))
    # its keys exclude each other, so that one of them alone could not be overridden
    bins = "all of curriculum.bins at once, such as '{by: length, quantiles: [0.5]}'"
    keys.add_argument("--curriculum.bins", metavar="MAPPING", default=argparse.SUPPRESS, help=bins)
    options, rest = parser.parse_known_args(argv)
    if rest:  # other words may be values of unknown flags: they are told only where no flag is at fault
        flags = [word for word in rest if word.startswith("--") and " " not in word.partition("=")[0]]
        raise UserError("\n".join(dict.fromkeys(_unknown(parser, word, own) for word in flags or rest[:1])))
    return options, [(key, value) for key, value in vars(options).items() if key not in own]


def _unknown(parser: Parser, word: str, own: list[str]) -> str:
    from phased_ift_jax import config

    if not word.startswith("--"):
        return f"{parser.prog}: what is {word!r}? CONFIG is expected, then flags such as --training.learning_rate 1e-5"
    key = word[2:].partition("=")[0]
    known = [name for name, _, _ in config.fields()] + own
    section, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == section]
    if siblings:
        return config.unknown_key_message(last, siblings, f"{section}." if section else "")
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else "; --help lists all")


def underscored(argv: Sequence[str]) -> list[str]:
    """Flags with hyphens as flags with underscores, which is how keys are spelt; values are left as they are."""
    result = []
    for word in argv:
        flag, equals, value = word.partition("=")
        result.append("--" + flag[2:].replace("-", "_") + equals + value if word.startswith("--") else word)
    return result


def size(count: float) -> str:
    """So many bytes, to four digits in the unit that fits."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    power = min((len(str(int(count))) - 1) // 3, len(units) - 1)
    return f"{count / 1000**power:.4g} {units[power]}"


def table(rows: Sequence[Sequence[object]]) -> str:
    """Rows of cells as aligned text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells)


def run(main: Callable[[Sequence[str]], int], argv: Sequence[str] | None = None, before: Callable[[], None] | None = None) -> NoReturn:
    """Run a verb and leave the process with its exit code.

    Without `argv` the process is the verb's, with the words that it was started with; only then is `before` called.
    """
    try:
        if argv is None and before:
            before()
        code = main(underscored(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
    except (UserError, Failure) as error:
        for line in [*str(error).splitlines(), *getattr(error, "__notes__", [])]:
            print(f"error: {line}", file=sys.stderr)
        code = 2 if isinstance(error, UserError) else 1
    except BrokenPipeError:  # the reader of our output has gone (`| head`); do not let Python complain at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        code = 130
    if argv is None:
        for number in REQUESTS:  # the verb has ended, and how it did stands: Python's own end is no part of it
            signal.signal(number, signal.SIG_IGN)
    raise SystemExit(code)


def main() -> NoReturn:
    """`phased-ift <verb> ...`."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        print("usage: phased-ift VERB ...\n\nverbs (each has its own --help):")
        for verb, purpose in VERBS.items():
            print(f"  {verb:<10} {purpose}")
        raise SystemExit(0 if words else 2)
    verb, *rest = words
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        print(f"error: unknown verb {verb!r}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(VERBS)}"), file=sys.stderr)
        raise SystemExit(2)
    sys.argv = [str(Path(sys.argv[0]).with_name(f"phased-ift {verb}")), *rest]
    module = importlib.import_module(f"phased_ift_jax.{verb}")
    run(module.main, before=getattr(module, "before", None))

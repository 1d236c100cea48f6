"""The documents hold: their commands are commands, their paths are there, their links lead somewhere, the error lines they name are ours, what can run here runs.

A word in capitals (`CONFIG`, `NAME`) stands for the reader's own, and a command that cannot run on a laptop says what it `needs`, behind it or at the top of its
block: of both, the verb's own parser is asked. Every other command of a verb is run, in order, in a folder that looks like the repository's.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

import phased_ift_jax
from phased_ift_jax import arms, cli, config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = re.compile(r"needs (?:an? )?(key|network|TPU|GPU|bucket|Slurm|\.\./shared/data|\w+ minutes)\b")
CAPITALS = re.compile(r"(?:^|/)[A-Z]{3,}\b")  # CONFIG, SHARED/run: the reader's own
SHORT = ["--training.max_steps", "2", "--data.eval_size", "8", "--evaluation.max_new_tokens", "4", "--logging.report_to", "[]"]
QUICKLY = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"  # half of the time is the compiler's
WRITTEN = {"config.yaml", "experiment.yaml", "run.yaml"}  # named in documents, and not ours: a run makes them


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: Path
    line: int
    kind: str
    text: str


@dataclass(frozen=True)
class Command:
    """A command of a block; `shown` are the lines that a session shows behind it."""

    where: str
    words: tuple[str, ...]
    needs: str
    shown: tuple[str, ...]

    @property
    def verb(self) -> tuple[str, list[str]] | None:
        """A verb of ours and its arguments, where the command comes down to one."""
        words = list(self.words)
        for at, word in enumerate(words):
            if word.startswith("phased_ift_jax.") and words[at - 1] == "-m":
                return word.removeprefix("phased_ift_jax."), words[at + 1 :]
            if word.endswith(("gpu.sh", "slurm.sbatch")) and "launch" in word:
                return "train", words[at + 1 :]
            if word.endswith("tpu_vm.sh") and words[at + 1] == "run":
                return "train", [word for word in words[at + 2 :] if word != "--detach"]
        return None

    @property
    def is_refused(self) -> bool:
        """Whether its session shows what a mistake is answered with."""
        return any(line.startswith("error: ") for line in self.shown)

    @property
    def is_form(self) -> bool:
        return any(CAPITALS.search(word) for word in self.words)


@cache
def blocks() -> tuple[Block, ...]:
    found = []
    for document in DOCUMENTS:
        inside: list[str] | None = None
        for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
            if line.startswith("```"):
                if inside is None:
                    inside, kind, start = [], line[3:], number
                else:
                    found.append(Block(document, start, kind, "\n".join(inside)))
                    inside = None
            elif inside is not None:
                inside.append(line)
        assert inside is None, f"{document.name}: a block without its end"
    return tuple(found)


def prose(document: Path) -> Iterator[tuple[int, str]]:
    inside = False
    for number, line in enumerate(document.read_text(encoding="utf-8").splitlines(), 1):
        inside ^= line.startswith("```")
        if not inside:
            yield number, line


@cache
def commands() -> tuple[Command, ...]:
    found = []
    for block in blocks():
        lines = block.text.replace("\\\n", " ").splitlines()
        of_all = NEEDS.search(lines[0]) if lines[0].startswith("# needs") else None
        for at, line in enumerate(lines):
            line, sessions = line.removeprefix("$ "), line.startswith("$ ")
            if not re.match(r"(?:python3?|sbatch|\.ci/run|\.venv/bin/\S+|launch/\S+|benchmarks/\S+) ?", line):
                continue
            needs = of_all or NEEDS.search(line.rpartition(" # ")[2])
            shown = []
            for told in lines[at + 1 :] if sessions else ():
                if told.startswith("$ "):
                    break
                shown.append(told)
            found.append(Command(f"{block.document.name}:{block.line + at + 1}", tuple(shlex.split(line, comments=True)), needs[1] if needs else "", tuple(shown)))
    for document in DOCUMENTS:
        for number, line in prose(document):
            for text in re.findall(r"`(python -m phased_ift_jax\.[^`]+|python (?:benchmarks|tests)/[^`]+)`", line):
                found.append(Command(f"{document.name}:{number}", tuple(shlex.split(text)), "", ()))
    return tuple(found)


def row_of_verbs() -> dict[str, list[str]]:
    """The README's table: of each verb its example."""
    rows = (re.fullmatch(r"\| `(\w+)` \|.*\| `([^`]+)` \|", line) for _, line in prose(ROOT / "README.md"))
    return {row[1]: shlex.split(row[2]) for row in rows if row}


class Accepted(Exception):
    """A parser has taken the words: (its options, the keys of the configuration among them)."""


@pytest.fixture
def accepted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Asks a verb's own parser, and goes no further."""
    parse_args, parse_with_keys = cli.Parser.parse_args, cli.parse_with_keys

    def stop(result: Any) -> None:
        raise Accepted(result)

    monkeypatch.setattr(cli.Parser, "parse_args", lambda self, *given: stop((parse_args(self, *given), [])))
    monkeypatch.setattr(cli, "parse_with_keys", lambda *given: stop(parse_with_keys(*given)))

    def ask(verb: str, words: list[str]) -> tuple[Any, list[tuple[str, str]]]:
        module = importlib.import_module(f"phased_ift_jax.{verb}")
        with pytest.raises(Accepted) as caught:
            getattr(module, "parse", module.main)(cli.underscored(words))
        return caught.value.args[0]

    return ask


def test_every_command_of_a_verb_is_taken_by_its_parser(accepted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """And where its config is one of ours, the keys that it gives make a run."""
    asked = [(command.where, *command.verb) for command in commands() if command.verb and not command.is_refused]
    assert len(asked) > 40
    assert {verb for _, verb, _ in asked} == set(cli.VERBS)
    asked += [("the table of verbs", words[0], words[1:]) for words in row_of_verbs().values()]
    for where, verb, words in asked:
        options, keys = accepted(verb, words)
        for path in [getattr(options, "config", None), *getattr(options, "configs", [])]:
            if path and (ROOT / path).exists():
                monkeypatch.chdir(ROOT)
                (arms.load if verb == "experiment" else config.load)(path, keys), where


def test_the_table_has_every_verb_in_order() -> None:
    assert list(row_of_verbs()) == list(cli.VERBS)
    assert all(words[0] == verb for verb, words in row_of_verbs().items())


def test_flags_of_other_programs_are_theirs() -> None:
    """Of launchers, benchmarks and harnesses: the file is there, and knows the flag."""
    looked = 0
    for command in commands():
        program = next((word for word in command.words if re.fullmatch(r"(launch|benchmarks|tests/faults)/\w+\.(py|sh)", word)), None)
        if program and command.verb is None:
            looked += 1
            text = (ROOT / program).read_text(encoding="utf-8")
            assert all(word in text for word in command.words if word.startswith("--")), command
    assert looked > 8


def test_every_file_that_is_named_is_there() -> None:
    ours = {path.relative_to(ROOT).as_posix() for folder in ("phased_ift_jax", "tests", "configs", "docs", "launch", "benchmarks") for path in (ROOT / folder).rglob("*")}
    ours |= {path.name for path in ROOT.iterdir()}
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        named = set(re.findall(r"(?<![\w/.$~<-])((?:phased_ift_jax|tests|configs|docs|launch|benchmarks)/[\w./-]*\.\w+)", text))
        assert {name for name in named - ours if not CAPITALS.search(name)} == set(), document.name
        short = set(re.findall(r"(?<![\w.~$/-])([\w/-]+\.(?:py|sh|sbatch|toml|cff|yaml))\b", text)) - named - WRITTEN
        assert {name for name in short if not any(f"/{path}".endswith(f"/{name}") for path in ours) and not CAPITALS.search(name)} == set(), document.name


def slugs(document: Path) -> set[str]:
    heads = [line.lstrip("#").strip() for _, line in prose(document) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_link_leads_somewhere() -> None:
    links = 0
    for document in DOCUMENTS:
        for number, line in prose(document):
            for target in re.findall(r"\]\(([^)\s]+)\)", line):
                if not target.startswith("https://"):
                    links += 1
                    name, _, anchor = target.partition("#")
                    path = document.parent / name if name else document
                    assert path.exists(), f"{document.name}:{number}: {target}"
                    assert not anchor or anchor in slugs(path), f"{document.name}:{number}: {target}"
    assert links > 30
    assert {path.name for path in DOCUMENTS[2:]} <= set(re.findall(r"docs/([\w.]+\.md)", DOCUMENTS[0].read_text(encoding="utf-8"))), "the README leads to every guide"


def test_prose_is_as_wide_as_a_terminal() -> None:
    wide = [f"{document.name}:{number}" for document in DOCUMENTS for number, line in prose(document) if len(line) > 155 and not line.startswith(("|", "#", "!["))]
    assert wide == []


@cache
def said() -> tuple[str, ...]:
    """Every text of the package with a break where a value is put in, and every line of the launchers."""
    texts = []
    for path in sorted((ROOT / "phased_ift_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(part.value if isinstance(part, ast.Constant) else "\0" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return (*texts, *(line for path in (ROOT / "launch").iterdir() for line in path.read_text(encoding="utf-8").splitlines()))


def test_every_error_line_of_the_guide_is_one_of_ours() -> None:
    heads = [re.fullmatch(r"### (`+) ?(.+?) ?\1", line) for _, line in prose(ROOT / "docs/troubleshooting.md") if line.startswith("### ")]
    assert len(heads) >= 30
    assert all(heads), "every entry is a line"
    for head in heads:
        assert head
        pieces = [piece for piece in head[2].split("...") if piece]
        assert max(map(len, pieces)) >= 12, f"{head[2]} could be anything"
        pattern = re.compile(".*".join(map(re.escape, pieces)), re.DOTALL)
        assert any(pattern.search(text) for text in said()), head[2]


def test_yaml_of_the_documents_is_part_of_a_run() -> None:
    base = yaml.safe_load((ROOT / "configs/llama2_7b.yaml").read_text(encoding="utf-8"))
    fragments = [yaml.safe_load(block.text) for block in blocks() if block.kind == "yaml"]
    assert fragments
    for fragment in fragments:
        config.valid(config.RunConfig, base | fragment)


def test_who_is_cited() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (cited["version"], cited["license"]) == (phased_ift_jax.__version__, project["license"])
    assert "2406.04371" in str(cited["references"])


# --- what can run here runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like the repository's, with the shared data beside it where they are; nothing of ours can be written through it."""
    place = tmp_path_factory.mktemp("documents") / "place"
    place.mkdir()
    (place / "configs").symlink_to(ROOT / "configs")
    return place


def tell(words: tuple[str, ...] | list[str], verb: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit code and words of a command; what asks for this machine's devices is a process of its own, which has one."""
    if verb in ("plan", "train"):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": QUICKLY, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, "-m", f"phased_ift_jax.{verb}", *words]
        done = subprocess.run(command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False)
        return done.returncode, done.stdout + done.stderr
    monkeypatch.chdir(place)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run(importlib.import_module(f"phased_ift_jax.{verb}").main, list(words))
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out + err


def agrees(shown: tuple[str, ...], told: str) -> None:
    """Every line that a session shows was told, in order; `...` stands for any."""
    lines, at = told.splitlines(), 0
    for line in shown:
        if line.strip() and line != "...":
            assert line in lines[at:], f"{line!r} is not in\n{told}"
            at = lines.index(line, at) + 1


def test_help_is_there_for_every_verb(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in cli.VERBS:
        code, told = tell(["--help"], verb, place, monkeypatch, capsys)
        assert (code, told[:6]) == (0, "usage:"), verb


def test_what_can_run_here_runs(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In the order of the documents, the README first; what a session shows is what is told, but for figures of a training that was cut short."""
    for block in blocks():
        for name, text in re.findall(r"^cat > (\S+) <<'END'\n(.*?\n)END$", block.text, re.MULTILINE | re.DOTALL):
            (place / name).write_text(text)
    done: set[tuple[str, ...]] = set()
    for command in commands():
        if command.verb and not command.needs and not command.is_form and (command.verb[0], *command.verb[1]) not in done:
            verb, words = command.verb
            done.add((verb, *words))
            code, told = tell(words if verb != "train" or command.is_refused else [*words, *SHORT], verb, place, monkeypatch, capsys)
            assert code == (2 if command.is_refused else 0), f"{command.where}: {told}"
            if command.is_refused or not (verb == "train" or any("runs/" in word for word in words)):
                agrees(command.shown, told)
    assert {verb for verb, *_ in done} >= {"train", "plan", "split", "status", "inspect", "convert", "generate", "report", "score", "calibrate"}


def test_sessions_on_real_data_show_what_is_told(place: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (*shared_data.glob("*/*.json*"), shared_data / "llama2"):
        if not (place / path.name).exists():
            (place / path.name).symlink_to(path)
    sessions = [command for command in commands() if command.verb and command.needs == "../shared/data" and command.shown]
    assert len(sessions) >= 4
    for command in sessions:
        assert command.verb
        code, told = tell(command.verb[1], command.verb[0], place, monkeypatch, capsys)
        assert code == 0, told
        agrees(command.shown, told)

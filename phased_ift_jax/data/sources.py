"""Where public data comes from, and a download that is either whole and right or not there (floor 1: knows no JAX).

Bytes go to `NAME.part`, which a later call continues; only when all have come and their SHA-256 is the expected one are they named `NAME`.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from phased_ift_jax.records import UserError

TRIES = 3
CHUNK = 1 << 16
RAW = "https://raw.githubusercontent.com"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A public file; `sha256` is None where nobody here has seen its bytes."""

    name: str
    url: str
    sha256: str | None
    licence: str


@dataclass(frozen=True, slots=True)
class Selection:
    """A test set cut out of a downloaded JSON array: the instruction and input of the rows whose `dataset` is this one, `rows` in number."""

    name: str
    prefix: str
    source: str
    dataset: str
    rows: int


@dataclass(frozen=True, slots=True)
class Collection:
    """What one word of the command line fetches."""

    files: tuple[RemoteFile, ...]
    selections: tuple[Selection, ...] = ()
    note: str = ""


ALPACA_LICENCE = "CC BY-NC 4.0"
FARM = "alpaca_farm_eval.json"

# A commit by its full hash where it is known, else by the short hash or branch that public code uses: the SHA-256 pins the bytes either way.
COLLECTIONS = {
    # Alpaca-scored/Alpaca52k-meta-info-v1.json of that repository names en-alpaca52k-stage1.jsonl, -stage2.jsonl and -stages-all.jsonl as well;
    # no version of the repository known to us holds them.
    "alpaca-scored": Collection(
        files=(
            RemoteFile(
                "en-alpaca52k-stage3.jsonl",
                f"{RAW}/xubuvd/PhasedSFT/9a7e0fc0938b91018dc079776e839516d384a23e/Alpaca-scored/en-alpaca52k-stage3.jsonl",
                "6e825519fe10097cb9a560d9f5f0133be91a04dc0dfa5a1e79588458babe264f",
                f"Apache-2.0 (repository), {ALPACA_LICENCE} (Alpaca)",
            ),
        ),
        note="the authors released stage 3 alone (6,889 rows, score >= 3.5); score raw Alpaca for stages 1 and 2",
    ),
    "alpaca": Collection(
        files=(
            RemoteFile(
                "alpaca_data.json",
                f"{RAW}/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json",
                "2eddafc6b977608d778aaab8dfc7e50e547b3af9826dfb9e909d9fc362e4a419",
                ALPACA_LICENCE,
            ),
        ),
        note="for the paper's preparation of these raw triples set data.append_period: true",
    ),
    "testsets": Collection(
        files=(
            RemoteFile(
                "koala_test_set.jsonl",
                f"{RAW}/arnav-gudibande/koala-test-set/main/koala_test_set.jsonl",
                "c8cda5c53810dc30aad34fabbb828fe3eba0957119e00916650c971905d19886",
                "Apache-2.0",
            ),
            RemoteFile(
                "sinstruct_test_set.jsonl",
                f"{RAW}/yizhongw/self-instruct/main/human_eval/user_oriented_instructions.jsonl",
                "81d60a117db495cecedecd9193504fd07c5b5a42f6699ef6b0f9da10fc22f42e",
                "Apache-2.0",
            ),
            RemoteFile(
                "vicuna_test_set.jsonl",
                f"{RAW}/gpt4life/alpagasus/95ad3e5/test_data/vicuna_test_set.jsonl",
                "590c39157bc561eadd7f03cad4be18c2b597f93029780af65f86718f39eafa87",
                "Apache-2.0",
            ),
            RemoteFile(
                "wizardlm_test_set.jsonl",
                f"{RAW}/gpt4life/alpagasus/95ad3e5/test_data/wizardlm_test_set.jsonl",
                "1a39103c4ad7e0b68a0f7ed770f13a60cc60749418263dafb20cfe8f5e51901e",
                "CC BY-NC 4.0",
            ),
            RemoteFile(FARM, f"{RAW}/tatsu-lab/alpaca_farm/30717dd/examples/data/eval_gpt-3.5-turbo-0301.json", None, "CC BY-NC 4.0"),
        ),
        selections=(
            Selection("oasst_test_set.jsonl", "oasst", FARM, "oasst", 188),
            Selection("anthropic_test_set.jsonl", "anthropic", FARM, "helpful_base", 129),
        ),
    ),
}


def fetch(what: str, out: str | Path, base_url: str | None = None, say: Callable[[str], None] = print, backoff: float = 1.0) -> list[Path]:
    """Bring the files of a collection into the folder `out`, keeping those that are there and right; the paths of all its data files.

    `base_url` (`http://host:port`) stands in for scheme and host of every address: a mirror. `say` gets one line per file.

    Raises:
        UserError: unknown collection, refused or missing file, wrong checksum, or no connection after three tries.
    """
    if what not in COLLECTIONS:
        raise UserError(f"fetch: unknown '{what}'; known: {', '.join(COLLECTIONS)}")
    if base_url is not None and urlsplit(base_url).scheme not in ("http", "https"):
        raise UserError(f"base_url: '{base_url}' is not an http:// or https:// address")
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        collection = COLLECTIONS[what]
        paths = [download(file, folder, base_url, say, backoff) for file in collection.files]
        paths += [_select(selection, folder, say) for selection in collection.selections]
    except OSError as error:
        raise UserError(f"out: cannot write in '{out}': {error.strerror or error}") from None
    if collection.note:
        say(f"note: {collection.note}")
    return paths


def download(file: RemoteFile, folder: Path, base_url: str | None = None, say: Callable[[str], None] = print, backoff: float = 1.0) -> Path:
    """One file, whole and with the right checksum, or a `UserError`; `backoff` seconds are waited after a first failure, then twice that."""
    target, part = folder / file.name, folder / (file.name + ".part")
    if target.exists():
        _check_present(target, file, say)
        return target
    url = file.url if base_url is None else base_url.rstrip("/") + urlsplit(file.url).path
    if file.sha256 is None:
        part.unlink(missing_ok=True)  # without a checksum nothing would tell that two halves belong together
    for attempt in range(1, TRIES + 1):
        try:
            _receive(url, part, file.name)
            break
        except _Interrupted as fault:
            if attempt == TRIES:
                kept = part.stat().st_size if part.exists() else 0
                raise UserError(f"{url}: {fault} ({TRIES} tries); the same command again continues at byte {kept}") from None
            time.sleep(backoff * 2 ** (attempt - 1))
    digest = _sha256(part)
    if file.sha256 not in (None, digest):
        part.unlink()
        raise UserError(f"{url}: sha256 is {digest}, expected {file.sha256}; the download was removed")
    _name(part, target)
    checked = "sha256 as expected" if file.sha256 else f"sha256 {digest}, nothing known to compare it with"
    say(f"{target}: {target.stat().st_size:,} bytes, {checked}, licence {file.licence}")
    return target


class _Interrupted(Exception):
    """The connection or the server failed in a way that may pass; what has come is kept."""


def _check_present(target: Path, file: RemoteFile, say: Callable[[str], None]) -> None:
    digest = _sha256(target)
    if file.sha256 not in (None, digest):
        raise UserError(f"'{target}' is there, but its sha256 is {digest}, expected {file.sha256}; move it away to download it")
    say(f"{target}: have it, licence {file.licence}")


def _receive(url: str, part: Path, name: str) -> None:
    """Append to `part` what is missing of it; returns only when every byte that the server announced has come."""
    have = part.stat().st_size if part.exists() else 0
    try:
        with urllib.request.urlopen(_request(url, have), timeout=60) as response:
            resumed = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
            if response.status == 206 and not resumed:
                raise _Interrupted("the server sent another range than the one asked for")
            start = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with part.open("ab" if resumed else "wb") as out, tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name, disable=None) as bar:
                while chunk := response.read(CHUNK):
                    out.write(chunk)
                    bar.update(len(chunk))
                out.flush()
                os.fsync(out.fileno())
    except urllib.error.HTTPError as error:
        if error.code == 416:  # `part` is as long as the file, or longer: whether it is the file its checksum says
            return
        raise _http_fault(url, error.code) from None
    except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError) as error:
        raise _Interrupted(f"connection failed: {getattr(error, 'reason', error)}") from None
    size = part.stat().st_size
    if total is not None and size != total:
        raise _Interrupted(f"connection closed after {size} of {total} bytes")


def _request(url: str, have: int) -> urllib.request.Request:
    request = urllib.request.Request(url, headers={"User-Agent": "phased_ift_jax", "Accept-Encoding": "identity"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    address, token = urlsplit(url), os.environ.get("HF_TOKEN")
    if token and address.scheme == "https" and f".{address.hostname}".endswith(".huggingface.co"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # a redirect leads to other hosts, which must not see it
    return request


def _http_fault(url: str, code: int) -> Exception:
    if code in (401, 403):
        return UserError(f"{url}: HTTP {code}; accept the licence on its page, then set HF_TOKEN")
    if code == 404:
        return UserError(f"{url}: HTTP 404, no such file; --base_url names a mirror")
    return _Interrupted(f"HTTP {code}") if code >= 500 or code == 429 else UserError(f"{url}: HTTP {code}")


def _select(selection: Selection, folder: Path, say: Callable[[str], None]) -> Path:
    source, target, part = folder / selection.source, folder / selection.name, folder / (selection.name + ".part")
    try:
        rows = [row for row in json.loads(source.read_text(encoding="utf-8")) if row["dataset"] == selection.dataset]
        prompts = [{"id": f"{selection.prefix}_{index}", "instruction": row["instruction"], "input": row["input"]} for index, row in enumerate(rows)]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"'{source}' is not an array of {{instruction, input, dataset}}; delete it to download it again") from None
    if len(prompts) != selection.rows:
        raise UserError(f"'{source}' has {len(prompts)} rows of {selection.dataset}, expected {selection.rows}; delete it to download it again")
    with part.open("w", encoding="utf-8", newline="\n") as out:
        out.writelines(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in prompts)
        out.flush()
        os.fsync(out.fileno())
    _name(part, target)
    say(f"{target}: {len(prompts)} prompts of {selection.dataset} in {selection.source}")
    return target


def _name(part: Path, target: Path) -> None:
    """Give a finished file its name, so that it survives a power cut whole or not at all."""
    part.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

"""The hub, spoken to over sockets of this machine: no more comes than is needed, all that was made goes, a refusal is one line, and offline is offline.

The server below speaks as much of the hub's protocol as `huggingface_hub` needs. HF_ENDPOINT and HF_HOME are read when that is
imported, so every verb runs in a process of its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

import pytest
from test_convert import contents, digest, make_model

from phased_ift_jax import convert
from phased_ift_jax.training.inspection import inspect

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
NEEDED = {"config.json", "LICENSE.txt", "README.md", "USE_POLICY.md", "special_tokens_map.json", "tokenizer.model", *TOKENIZER, "model.safetensors.index.json"}
SHARDS = {f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)}
OTHERS = ("consolidated.safetensors", "consolidated-00001-of-00002.safetensors", "pytorch_model-00001-of-00001.bin", "model.gguf", ".gitattributes")
ELSEWHERE = ("original/params.json", "original/tokenizer.model", "original/consolidated.00.pth", "fp16/model.safetensors", "onnx/config.json")
MAIN, OLD = "a" * 40, "b" * 40

# every child imports this first: it waits for nothing, and with WATCH set it notes in that file and refuses whatever would leave the process
SITE = """
import os, sys, time
time.sleep = lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.02))

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        with open(os.environ["WATCH"], "a") as file:
            print(event, arguments, file=file)
        raise ConnectionRefusedError(event)

if "WATCH" in os.environ:
    sys.addaudithook(watch)
"""


@dataclass
class Repo:
    """A model or dataset on the hub: the files of each commit, and the names of commits."""

    commits: dict[str, dict[str, bytes]]
    names: dict[str, str]

    def commit(self, revision: str) -> str | None:
        found = self.names.get(revision, revision)
        return found if found in self.commits else None


@dataclass
class Hub:
    """A hub on this machine: what it holds, what it was asked, bytes sent of each file, and faults by pattern of "METHOD path"."""

    url: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, tuple[int, str]] = field(default_factory=dict)  # status and X-Error-Code; status 0: the server is gone for good, half-way
    asked: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)


class Handler(BaseHTTPRequestHandler):
    timeout = 10
    hub: Hub
    stop: Callable[[], None]

    def handle_any(self) -> None:
        hub, path = self.hub, urlsplit(self.path).path
        asked = f"{self.command} {path}"
        hub.asked.append(asked)
        self.body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        status, code = next((fault for pattern, fault in hub.faults.items() if re.match(pattern, asked)), (None, ""))
        self.gone = status == 0
        if status:
            return self.answer(status, error=code)
        if self.gone and self.command != "GET":
            return self.stop()
        if self.command in ("POST", "PUT") and self.headers["Authorization"] != "Bearer made-up" and not path.startswith("/lfs/"):
            return self.answer(401)
        for pattern, method in self.ROUTES.items():
            if match := re.fullmatch(pattern, asked):
                return method(self, *match.groups())
        return self.answer(404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def answer(self, status: int = 200, content: object = None, error: str = "", body: bytes = b"", **headers: str) -> None:
        body = body or (json.dumps(content).encode() if content is not None else b"")
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | ({"X-Error-Code": error} if error else {}) | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if self.gone else body)
        if self.gone:
            self.stop()

    def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
        repo = self.hub.repos.get(name)
        commit = repo and repo.commit(revision)
        if commit is None or repo is None:
            self.answer(404, error="RevisionNotFound" if repo else "RepoNotFound")
            return None
        return commit, repo.commits[commit]

    def info(self, name: str, revision: str | None) -> None:
        if found := self.find(name, revision or "main"):
            self.answer(content={"id": name, "sha": found[0], "siblings": [{"rfilename": path} for path in found[1]]})

    def tree(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            self.answer(content=[{"type": "file", "path": path, "size": len(body), "oid": blob(body)} for path, body in found[1].items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        if not (found := self.find(name, revision)):
            return None
        commit, files = found
        if path not in files:
            return self.answer(404, error="EntryNotFound", X_Repo_Commit=commit)
        headers = {"X_Repo_Commit": commit, "ETag": f'"{blob(files[path])}"', "Accept_Ranges": "bytes"}
        status, body = 200, files[path]
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or ""):
            start, stop = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1) + 1
            headers |= {"Content_Range": f"bytes {start}-{stop - 1}/{len(body)}"}
            status, body = 206, body[start:stop]
        self.hub.sent[path] += len(body) * (self.command == "GET")
        return self.answer(status, body=body, **headers)

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "org":
            return self.answer(403)
        status = 409 if name in self.hub.repos else 200
        self.hub.repos.setdefault(name, Repo({MAIN: {}}, {"main": MAIN}))
        return self.answer(status, {"url": f"{self.hub.url}/{'datasets/' if asked.get('type') == 'dataset' else ''}{name}"})

    def validate(self) -> None:
        self.answer(content={"warnings": [], "errors": []})

    def preupload(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            told = []
            for path in (file["path"] for file in json.loads(self.body)["files"]):
                large, known = path.endswith(".safetensors"), found[1].get(path)
                oid = None if known is None else hashlib.sha256(known).hexdigest() if large else blob(known)
                told.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
            self.answer(content={"files": told})

    def batch(self, name: str) -> None:
        told = []
        for item in json.loads(self.body)["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/lfs/{name}/{item['oid']}"}, "verify": {"href": f"{self.hub.url}/verify"}}
            told.append(item | ({} if item["oid"] in self.hub.objects else {"actions": actions}))
        self.answer(content={"transfer": "basic", "objects": told})

    def put(self, name: str, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.objects[oid] = self.body
        self.answer()

    def verify(self) -> None:
        asked = json.loads(self.body)
        self.answer(200 if len(self.hub.objects.get(asked["oid"], b"")) == asked["size"] else 404)

    def commit(self, name: str, revision: str) -> None:
        if found := self.find(name, revision):
            files = dict(found[1])
            for kind, value in ((line["key"], line["value"]) for line in map(json.loads, self.body.splitlines())):
                if kind != "header":
                    files[value["path"]] = base64.b64decode(value["content"]) if kind == "file" else self.hub.objects[value["oid"]]
            commit = hashlib.sha1(self.body).hexdigest()
            self.hub.repos[name].commits[commit], self.hub.repos[name].names[revision] = files, commit
            self.answer(content={"commitUrl": f"{self.hub.url}/{name}/commit/{commit}", "commitOid": commit})

    def log_message(self, *_: object) -> None:
        pass

    NAME = r"([\w.-]+/[\w.-]+)"
    ROUTES = {
        rf"GET /api/models/{NAME}(?:/revision/([^/]+))?": info,
        rf"GET /api/models/{NAME}/tree/([^/]+)": tree,
        rf"(?:GET|HEAD) /{NAME}/resolve/([^/]+)/(.+)": resolve,
        r"POST /api/repos/create": create,
        r"POST /api/validate-yaml": validate,
        rf"POST /api/(?:models|datasets)/{NAME}/preupload/([^/]+)": preupload,
        rf"POST /(?:datasets/)?{NAME}\.git/info/lfs/objects/batch": batch,
        rf"PUT /lfs/{NAME}/(\w+)": put,
        r"POST /verify": verify,
        rf"POST /api/(?:models|datasets)/{NAME}/commit/([^/]+)": commit,
    }


def blob(body: bytes) -> str:
    """A file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub; every thread of it ends here."""

    def stop() -> None:
        server.shutdown()
        server.socket.close()

    handler = type("OfThisHub", (Handler,), {"hub": hub, "stop": staticmethod(stop)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        stop()
        server.server_close()
        thread.join()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


SEVERAL = """
import importlib, json, os, sys, traceback
from phased_ift_jax import cli
folder, *commands = sys.argv[1:]
for number, command in enumerate(commands):
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
        os.dup2(os.open(f"{folder}/{number}.{stream.fileno()}", os.O_CREAT | os.O_WRONLY), stream.fileno())
    verb, *words = json.loads(command)
    try:
        cli.run(importlib.import_module("phased_ift_jax." + verb).main, words)
    except BaseException as end:
        code = end.code if isinstance(end, SystemExit) else traceback.print_exc() or 1
    with open(f"{folder}/{number}.code", "w") as file:
        print(code, file=file)
"""


def child(url: str, home: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python` with these words, and this hub, cache and environment; nothing of the caller's own for the hub."""
    inherited = {name: value for name, value in os.environ.items() if not re.match("hf_|hugging|transformers_|watch|.*_proxy", name, re.IGNORECASE)}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": f"{home.parent / 'site'}{os.pathsep}{ROOT}"}
    (home.parent / "site").mkdir(exist_ok=True)
    (home.parent / "site/sitecustomize.py").write_text(SITE)
    return subprocess.run([sys.executable, *map(str, words)], env=inherited | ours | environment, capture_output=True, text=True, timeout=60, check=False)


def verb(url: str, home: Path, name: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return child(url, home, "-m", f"phased_ift_jax.{name}", *arguments, **environment)


def several(url: str, home: Path, *commands: Sequence[object], **environment: str) -> list[subprocess.CompletedProcess[str]]:
    """Verbs one after the other in one process, which imports JAX once; what came of each."""
    with TemporaryDirectory() as said:
        whole = child(url, home, "-c", SEVERAL, said, *(json.dumps([str(word) for word in command]) for command in commands), **environment)
        assert whole.returncode == 0, whole.stderr
        streams = [[(Path(said) / f"{number}.{name}").read_text() for name in ("code", "1", "2")] for number in range(len(commands))]
    return [subprocess.CompletedProcess(command, int(code), *rest) for command, (code, *rest) in zip(commands, streams, strict=True)]


def refusal(done: subprocess.CompletedProcess[str]) -> str:
    """The one line of a refusal. The hub's client may note its attempts before it, and an upload without xet leaves its progress bar open."""
    assert done.returncode == 2, done.stderr
    told = re.findall(r"(?:^|B/s\])(error: .*)$", done.stderr, re.MULTILINE)
    assert len(told) == 1, done.stderr
    assert not re.search("Traceback|Exception", done.stderr), done.stderr
    return str(told[0])


@pytest.fixture(scope="module")
def nowhere() -> str:
    """An address at which nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two commits of a model as local folders: two shards of 15 MB, and before that one small file."""
    root = tmp_path_factory.mktemp("bases")
    sizes = {"vocab_size": 1024, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    made = {MAIN: make_model(root / "main", count=2, **sizes), OLD: make_model(root / "old", seed=1)}
    for folder in made.values():
        (folder / "README.md").write_text("---\nlicense: other\n---\nA model.\n")
        (folder / "special_tokens_map.json").write_text("{}")
        for name in TOKENIZER:
            shutil.copyfile(ROOT / "configs/quickstart/model" / name, folder / name)
    return made


@pytest.fixture(scope="module")
def hub(bases: dict[str, Path]) -> Iterator[Hub]:
    commits = {commit: files_of(folder) for commit, folder in bases.items()}
    commits[MAIN] |= dict.fromkeys((*OTHERS, *ELSEWHERE), b"{}" * 1000)
    repos = {f"org/{name}": Repo(commits, {"main": MAIN, "v1": OLD}) for name in ("model", "gated", "down", "closed", "busy")}
    repos["org/broken"] = Repo({MAIN: commits[OLD] | {"model.safetensors": b"<html>" * 100}}, {"main": MAIN})
    faults = {r"\w+ /org/gated/resolve/": (403, "GatedRepo"), r"\w+ /(api/models/)?org/down": (500, ""), r"\w+ /(api/models/)?org/closed": (401, "RepoNotFound")}
    with serving(Hub(repos=repos, faults=faults | {r"GET /org/busy/resolve/.*safetensors": (503, "")})) as served:
        yield served


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache that the tests of this file share."""
    return tmp_path_factory.mktemp("hub") / "home"


@pytest.fixture(scope="module")
def fetched(hub: Hub, home: Path) -> tuple[Path, Counter[str]]:
    """What a first `convert from-hf` of a hub name makes, and the bytes that came of each file."""
    hub.sent.clear()
    folder = home.parent / "fetched"
    done = verb(hub.url, home, "convert", "from-hf", "org/model", folder)
    assert (done.returncode, done.stdout) == (0, f"done: {folder}\n"), done.stderr
    return folder, Counter(hub.sent)


# --- from the hub --------------------------------------------------------------------------------------------------------------


def test_inspect_reads_headers_only(hub: Hub, bases: dict[str, Path], tmp_path: Path) -> None:
    """Law: of a model on the hub inspect says what it says of a local one, and less than 1 % of the weights' bytes have come."""
    hub.sent.clear()
    done = verb(hub.url, tmp_path / "home", "inspect", "org/model", "--json")
    assert done.returncode == 0, done.stderr
    local, _ = inspect(str(bases[MAIN]))
    told = json.loads(done.stdout)
    assert told | {"model": "", "weights": ""} == local | {"model": "", "weights": "", "can be trained": "yes", "fault": None}
    assert told["weights"] == "safetensors on the hub"
    for name in SHARDS:
        assert 0 < hub.sent[name] < 0.01 * (bases[MAIN] / name).stat().st_size, name
    assert {path for path in hub.sent if path.endswith(".safetensors")} == SHARDS


def test_from_hf_fetches_what_is_needed_and_no_more(fetched: tuple[Path, Counter[str]], bases: dict[str, Path], tmp_path: Path) -> None:
    """Law: config, tokenizer, licences, card and the weights that the index names come, each once; no other weights, no other folder. The
    result is that of the local folder."""
    folder, sent = fetched
    assert sent == {name: (bases[MAIN] / name).stat().st_size for name in NEEDED | SHARDS}
    convert.main(["from-hf", str(bases[MAIN]), str(tmp_path / "local")])
    assert digest(folder) == digest(tmp_path / "local")


def test_a_revision_is_another_model(hub: Hub, home: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Law: --revision takes the model as it was at that tag or commit, for inspect too."""
    commands = [("convert", "from-hf", "org/model", tmp_path / name, "--revision", name) for name in ("v1", OLD)]
    told, *converted = several(hub.url, home, ("inspect", "org/model", "--revision", "v1", "--json"), *commands)
    convert.main(["from-hf", str(bases[OLD]), str(tmp_path / "local")])
    for done, name in zip(converted, ("v1", OLD), strict=True):
        assert done.returncode == 0, done.stderr
        assert digest(tmp_path / name) == digest(tmp_path / "local")
    assert json.loads(told.stdout)["parameters"] == inspect(str(bases[OLD]))[0]["parameters"]


def test_offline_the_cache_is_enough(fetched: tuple[Path, Counter[str]], nowhere: str, home: Path, tmp_path: Path) -> None:
    """Law: with HF_HUB_OFFLINE=1 what was fetched once is there, and nothing is tried; what was not is refused in one line and nothing else."""
    commands = [("convert", "from-hf", "org/model", tmp_path / "again"), ("inspect", "org/model"), ("convert", "from-hf", "org/other", tmp_path / "none"), ("inspect", "org/other")]
    again, told, *refused = several(nowhere, home, *commands, HF_HUB_OFFLINE="1", WATCH=str(tmp_path / "tried"))
    assert (again.returncode, told.returncode) == (0, 0), again.stderr + told.stderr
    assert digest(tmp_path / "again") == digest(fetched[0])
    for done in refused:
        assert refusal(done) == "error: hub: cannot reach it for 'org/other', and it is not in the cache (HF_HUB_OFFLINE is set); give a local folder"
        assert done.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


REFUSED = {
    "convert from-hf org/gated DST": "model.model_name_or_path: 'org/gated' is gated; accept the licence on its page, then set HF_TOKEN",
    "convert from-hf org/closed DST": "no folder and no hub model 'org/closed' (a private one needs HF_TOKEN)",
    "convert from-hf org/nothing DST": "no folder and no hub model 'org/nothing'",
    "inspect org/nothing": "no folder and no hub model 'org/nothing'",
    "convert from-hf org/model DST --revision v9": "model.revision: 'org/model' has no branch, tag or commit 'v9'",
    "convert from-hf org/down DST": "500 Internal Server Error",
    "convert from-hf org/busy DST": "503 Service Unavailable",
    "inspect org/broken": "hub: 'org/broken': SafetensorsParsingError",
}


@pytest.fixture(scope="module")
def refusals(hub: Hub, home: Path) -> dict[str, subprocess.CompletedProcess[str]]:
    commands = [[str(home.parent / "dst") if word == "DST" else word for word in command.split()] for command in REFUSED]
    return dict(zip(REFUSED, several(hub.url, home, *commands), strict=True))


@pytest.mark.parametrize("command", REFUSED)
def test_what_the_hub_refuses_is_one_line(command: str, refusals: dict[str, subprocess.CompletedProcess[str]], home: Path) -> None:
    """Law: whatever the hub answers instead of the model, one line says what would do, and there is nothing at the destination."""
    assert REFUSED[command] in refusal(refusals[command])
    assert not [path for path in home.parent.iterdir() if "dst" in path.name]


def test_a_hub_that_is_gone_is_one_line(hub: Hub, tmp_path: Path) -> None:
    """Law: so it is when the hub is gone after half of a file, and when nobody listens; the command given again goes on and ends well."""
    command = ("convert", "from-hf", "org/model", tmp_path / "dst")
    with serving(Hub(repos=hub.repos, faults={r"GET .*00002.safetensors": (0, "")})) as leaving:
        halfway, after = several(leaving.url, tmp_path / "home", command, command)
    for done in (halfway, after):
        assert "Connect" in refusal(done)
    assert {path.name for path in tmp_path.iterdir()} == {"home", "site"}
    done = verb(hub.url, tmp_path / "home", *command)
    assert done.returncode == 0, done.stderr


# --- to the hub ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ours(bases: dict[str, Path]) -> Path:
    """A model made by from-hf, to be exported."""
    folder = bases[OLD].parent / "ours"
    convert.main(["from-hf", str(bases[OLD]), str(folder)])
    return folder


def test_to_hf_uploads_the_folder(hub: Hub, ours: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Law: the repository is made and holds every file of the folder, byte for byte; the same command again sends no weights and ends well."""
    command = ("convert", "to-hf", ours, tmp_path / "dst", "--push_to_hub", "org/new")
    hub.asked.clear()
    for done in several(hub.url, tmp_path / "home", command, command, HF_TOKEN="made-up"):
        assert (done.returncode, done.stdout.splitlines()[-1]) == (0, f"uploaded: {hub.url}/org/new"), done.stderr
    new = hub.repos["org/new"]
    held = new.commits[new.names["main"]]
    assert held == files_of(tmp_path / "dst")
    assert contents(tmp_path / "dst") == contents(bases[OLD])
    assert len([asked for asked in hub.asked if asked.startswith("PUT")]) == len(list((tmp_path / "dst").glob("*.safetensors"))) > 0
    assert hub.asked.count("POST /api/repos/create") == 2


NOT_TAKEN = {
    "other/new": "403 Forbidden",  # another's place
    "org/unwritable": "403 Forbidden",
    "org/unstored": "403 Forbidden",
    "org/leaving": "ConnectError",  # the hub goes at the first file of weights
    "org/late": "ConnectError",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"HF_TOKEN": "made-up"}, NOT_TAKEN), ({}, {"org/new": "401 Unauthorized"}), ({"HF_HUB_OFFLINE": "1"}, {"org/new": "HF_HUB_OFFLINE is set"})],
    ids=["token", "no token", "offline"],
)
def test_a_refused_upload_is_one_line_and_the_folder_is_whole(environment: dict[str, str], expected: dict[str, str], ours: Path, bases: dict[str, Path], tmp_path: Path) -> None:
    """Law: where the hub does not take it, at any of its steps, one line says so and what would do, and the export is whole on the disk."""
    faults = {"POST /api/models/org/unwritable/preupload": (403, ""), "PUT /lfs/org/unstored": (403, ""), "PUT /lfs/org/leaving": (0, "")}
    with serving(Hub(faults=faults)) as refusing:
        told = several(refusing.url, tmp_path / "home", *(("convert", "to-hf", ours, tmp_path / "dst", "--push_to_hub", name) for name in expected), **environment)
    for done, (name, message) in zip(told, expected.items(), strict=True):
        said = refusal(done)
        assert said.startswith("error: hub: ")
        assert f"'{name}'" in said
        assert message in said
        assert ("; set HF_TOKEN" in said) == message.startswith("40")
        assert said.endswith(f"; '{tmp_path / 'dst'}' is whole; the same command uploads it again")
    assert contents(tmp_path / "dst") == contents(bases[OLD])
    assert not [path for repo in refusing.repos.values() for files in repo.commits.values() for path in files]


# --- no network ----------------------------------------------------------------------------------------------------------------


def test_the_watch_sees_what_leaves_the_process(hub: Hub, tmp_path: Path) -> None:
    """Law: what the tests of silence are held by notes and refuses both a socket and a look-up of a name, and the hub client's own."""
    tries = "socket.create_connection(('127.0.0.1', 9))", "socket.socket().connect(('127.0.0.1', 9))"
    for call in tries:
        done = child(hub.url, tmp_path / "home", "-c", f"import socket; {call}", WATCH=str(tmp_path / "tried"))
        assert "ConnectionRefusedError: socket" in done.stderr
    assert [line.split()[0] for line in (tmp_path / "tried").read_text().splitlines()] == ["socket.getaddrinfo", "socket.connect"]
    hub.asked.clear()
    assert "cannot reach" in refusal(verb(hub.url, tmp_path / "home", "inspect", "org/model", WATCH=str(tmp_path / "hub")))
    assert "127.0.0.1" in (tmp_path / "hub").read_text()
    assert hub.asked == []


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["", "offline"])
def test_a_local_folder_needs_no_network(environment: dict[str, str], hub: Hub, bases: dict[str, Path], tmp_path: Path) -> None:
    """Law: to inspect and convert a local folder, there and back, nothing is tried of the network, HF_HUB_OFFLINE set or not."""
    base, ours, back = bases[OLD], tmp_path / "ours", tmp_path / "back"
    commands = ("inspect", base), ("convert", "from-hf", base, ours), ("convert", "to-hf", ours, back), ("inspect", back)
    for done in several(hub.url, tmp_path / "home", *commands, WATCH=str(tmp_path / "tried"), **environment):
        assert done.returncode == 0, done.stderr
    assert contents(back) == contents(base)
    assert not (tmp_path / "tried").exists()

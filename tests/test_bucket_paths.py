"""Addresses in a bucket wherever a path is taken: what is read from there is what is read from a disk, or one line says why not."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import fake_gcs
import jax
import numpy as np
import pytest
from fake_gcs import server  # noqa: F401
from test_run import ROOT, assert_same_result, make_config, rows, train, undisturbed  # noqa: F401

from phased_ift_jax import config as config_module
from phased_ift_jax import convert as convert_verb
from phased_ift_jax import fetch as fetch_verb
from phased_ift_jax import inspect as inspect_verb
from phased_ift_jax import object_store, pictures
from phased_ift_jax import plan as plan_verb
from phased_ift_jax.config import MeshConfig, dump
from phased_ift_jax.data import readers
from phased_ift_jax.lease import Lease
from phased_ift_jax.models import hf_weights
from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.models.tensor_files import Tensors
from phased_ift_jax.object_store import Changed, StoreError
from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training import loop
from phased_ift_jax.training.step import Trainer

pytestmark = pytest.mark.usefixtures("compilation_cache")
QUICK = ROOT / "configs/quickstart"


@pytest.fixture
def gcs(server, monkeypatch, tmp_path) -> fake_gcs.FakeGCS:  # noqa: F811
    """An empty bucket, a machine that has never seen it, and no patience."""
    fake_gcs.empty(server, monkeypatch)
    monkeypatch.setenv("PHASED_IFT_WORK", str(tmp_path / "work"))
    monkeypatch.setenv("PHASED_IFT_RUN_ID", "this-machine")
    return server


def put(gcs: fake_gcs.FakeGCS, source: Path, name: str) -> str:
    """A file or a folder as objects; returns its address."""
    for path in [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]:
        gcs.put(name if source.is_file() else f"{name}/{path.relative_to(source)}", path.read_bytes())
    return f"gs://bucket/{name}"


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A model with a tokenizer, in several files."""
    folder = shutil.copytree(tiny_model("llama", vocab_size=512, max_shard_size="80KB", dtype="bfloat16"), tmp_path / "tiny")
    assert len(list(folder.glob("*.safetensors"))) > 1
    for file in QUICK.joinpath("model").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def loaded(folder, **mesh) -> dict:
    """The parameters of a model over eight devices."""
    trainer = Trainer(folder.config, config_module.TrainingConfig(), make_mesh(MeshConfig(**mesh)), "float32", "float32", "none", "auto")
    return hf_weights.load(folder, trainer.shardings.params, "float32")


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 2, "tensor": 2, "data": 2}])
def test_weights_in_a_bucket_are_weights_on_a_disk(gcs, model, monkeypatch, mesh):
    """Every slice, to the last bit; nothing of the weights is put on this machine's disk, and no byte of them is read twice."""
    monkeypatch.setattr(pictures, "PIECE_BYTES", 4096)
    address = put(gcs, model, "models/tiny")
    folder = open_folder(address)
    assert not list(folder.path.rglob("*.safetensors"))
    assert folder.name == address
    read, real = [], object_store.Objects.read_range
    monkeypatch.setattr(object_store.Objects, "read_range", lambda self, name, start, stop, generation: read.append(stop - start) or real(self, name, start, stop, generation))
    there, here = loaded(folder, **mesh), loaded(open_folder(str(model)), **mesh)
    jax.tree.map(np.testing.assert_array_equal, there, here)
    assert len(read) > 30
    assert max(read) <= 4096
    assert sum(read) <= sum(path.stat().st_size for path in model.glob("*.safetensors"))


def test_a_host_reads_the_rows_of_its_own_devices(gcs, model, monkeypatch):
    """And of columns the rows in which they lie, some at a time."""
    monkeypatch.setattr("phased_ift_jax.models.tensor_files.FETCHED_BYTES", 1024)
    folder = open_folder(put(gcs, model, "models/tiny"))
    tensors, local = Tensors(folder.path), Tensors(model)
    read, real = [], object_store.Objects.read_range
    monkeypatch.setattr(object_store.Objects, "read_range", lambda self, name, start, stop, generation: read.append(stop - start) or real(self, name, start, stop, generation))
    name = "model.layers.0.mlp.gate_proj.weight"
    size, width = tensors.shape(name)
    quarter = (slice(size // 4, size // 2), slice(0, width))
    np.testing.assert_array_equal(tensors.read(name, quarter), local.read(name, quarter))
    assert sum(read) == (size // 2 - size // 4) * width * 2
    read.clear()
    columns = [(slice(0, size), slice(at, at + 8)) for at in (8, 16)]
    reader = tensors.reader(name, columns)
    for index in columns:
        np.testing.assert_array_equal(reader(index), local.read(name, index))
    assert sum(read) == size * width * 2
    assert max(read) <= 1024


def test_a_run_from_a_bucket_is_a_run_from_a_disk(gcs, undisturbed, rows, tmp_path, capsys):  # noqa: F811
    """Config, model, data and bins from there: weights, metrics and matrix are the same to the last bit, and so is the export."""
    ids = [json.loads(line)["id"] for line in rows.read_text().splitlines()]
    listed = {"bins": [{"name": name, "ids": ids[start::3]} for start, name in enumerate(("easy", "medium", "hard"))]}
    (tmp_path / "phases.json").write_text(json.dumps(listed))
    base = undisturbed / "hf/3-hard"

    def config(output: str, model: str, path: str, bins: str) -> config_module.RunConfig:
        changes = {"model__model_name_or_path": model, "model__init": "pretrained", "data__path": path, "curriculum__bins": {"from": bins}, "training__num_train_epochs": 1}
        return make_config(rows, output, **changes)

    here = train(config(str(tmp_path / "disk/run"), str(base), str(rows), str(tmp_path / "phases.json")))
    addresses = [put(gcs, source, name) for source, name in ((base, "models/base"), (rows, "data/rows.jsonl"), (tmp_path / "phases.json", "data/phases.json"))]
    (tmp_path / "run.yaml").write_text(dump(config(str(tmp_path / "bucket/run"), *addresses)))
    there = train(config_module.load(put(gcs, tmp_path / "run.yaml", "run.yaml")))
    assert_same_result(there.output, here.output)
    for path in (here.output / "hf/3-hard").iterdir():
        if path.name not in ("README.md", "provenance.json"):
            assert (there.output / "hf/3-hard" / path.name).read_bytes() == path.read_bytes(), path.name
    assert convert_verb.main(["to-hf", str(there.output), str(tmp_path / "again")]) == 0, "its base is found again"
    assert (tmp_path / "again/README.md").read_bytes() == (there.output / "hf/3-hard/README.md").read_bytes()
    assert str(tmp_path) not in (there.output / "quarantine.jsonl").read_text()
    assert plan_verb.main(["gs://bucket/run.yaml", "--devices", "8"]) == 0
    assert f"model   {addresses[0]} (pretrained)" in capsys.readouterr().out


def test_rows_of_every_kind_of_place(gcs, rows, tmp_path):  # noqa: F811
    """A file, a folder, a glob and several, of every format, in the order of a disk; a row is known by its address."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = tmp_path / "data"
    (data / "more/.hidden").mkdir(parents=True)
    triples = [{"instruction": f"Repeat: {i}", "input": "", "output": f"{i}"} for i in range(3)]
    (data / "b.json").write_text(json.dumps(triples))
    (data / "a.jsonl").write_bytes(rows.read_bytes() + b"{}\n")
    (data / "c.csv").write_text("instruction,output\nSay x,x\n")
    pq.write_table(pa.Table.from_pylist(triples), data / "d.parquet")
    (data / "notes.txt").write_text("not data")
    (data / "more/e.jsonl").write_text(json.dumps(triples[0]) + "\n")
    (data / "more/.hidden/f.jsonl").write_text(json.dumps(triples[0]) + "\n")
    address = put(gcs, data, "sets/data")
    for place in ("", "/", "/b.json", "/*.json*", "/**/*.jsonl", "/[cd].*", "/more/*"):
        here, there = readers.read(f"{data}{place}"), readers.read(f"{address}{place}")
        assert len(here.records) + len(here.quarantined) == here.rows
        moved = json.loads(json.dumps([repr(row) for row in (*here.records, *here.quarantined)]).replace(str(data), address))
        assert [repr(row) for row in (*there.records, *there.quarantined)] == moved, place
    assert [row.source.path for row in readers.read([f"{address}/c.csv", f"{data}/b.json"]).records][:2] == [f"{address}/c.csv", f"{data}/b.json"]
    before = len([asked for asked in gcs.asked if asked == "GET bucket/sets/data/a.jsonl"])
    readers.read(f"{address}/a.jsonl")
    assert len([asked for asked in gcs.asked if asked == "GET bucket/sets/data/a.jsonl"]) == before + 2, "only asked about: the copy is as the store says"
    [copy] = (tmp_path / "work/pictures").glob("*/a.jsonl")
    copy.write_bytes(b"x" + copy.read_bytes()[1:])
    assert readers.read(f"{address}/a.jsonl").rows == 101, "a copy that is damaged is none"
    gcs.put("sets/data/a.jsonl", b'{"instruction": "new", "output": "x"}\n')
    assert readers.read(f"{address}/a.jsonl").rows == 1, "nor is one of an object that was changed"


def read(path: str) -> object:
    return readers.read(path)


WRONG = [
    (lambda: open_folder("gs://bucket/models/tinny"), r"model.model_name_or_path: nothing lies at 'gs://bucket/models/tinny'; did you mean 'gs://bucket/models/tiny'\?"),
    (lambda: open_folder("gs://bucket/xyz"), r"model.model_name_or_path: nothing lies at 'gs://bucket/xyz'; 'gs://bucket' holds data, models"),
    (lambda: open_folder("gs://nowhere/tiny"), r"model.model_name_or_path: 'gs://nowhere/tiny' cannot be listed: no such bucket or object \(HTTP 404\)"),
    (lambda: open_folder("gs://bucket"), r"model.model_name_or_path: 'gs://bucket' is neither a file or folder on a disk nor an address such as"),
    (lambda: open_folder("gs://bucket/data"), r"model.model_name_or_path: 'gs://bucket/data' has no config.json; give a Hugging Face model folder"),
    (lambda: read("gs://bucket/data/row.jsonl"), r"data.path: no such object 'gs://bucket/data/row.jsonl'; did you mean 'gs://bucket/data/rows.jsonl'\?"),
    (lambda: read("gs://bucket/data/*.csv"), r"data.path: no file matches 'gs://bucket/data/\*.csv'"),
    (lambda: read("gs://bucket/*"), r"data.path: 'gs://bucket/\*' would list a whole bucket; name a folder before the first of \*\?\["),
    (lambda: read("gs://bucket/models"), r"data.path: folder 'gs://bucket/models' holds no .json, .jsonl"),
    (lambda: read("gs://bucket/data/bad.json"), r"data.path: gs://bucket/data/bad.json:1:2: not valid JSON"),
    (lambda: read("gs://bucket/data/x.txt"), r"data.path: 'gs://bucket/data/x.txt' has the unknown extension '.txt'; known: "),
    (lambda: read("s3://bucket/rows.jsonl"), r"data.path: no such file 's3://bucket/rows.jsonl'; of remote files those in a bucket are read, gs://bucket/...; others must be"),
    (lambda: config_module.load("gs://bucket/data/run.yml"), r"config: no such object 'gs://bucket/data/run.yml'; did you mean 'gs://bucket/data/run.yaml'\?"),
    (lambda: config_module.load("gs://bucket/data/run.yaml"), r"config: 'gs://bucket/data/run.yaml' must be a mapping"),
]


@pytest.mark.parametrize(("act", "line"), WRONG, ids=[line[:60] for _, line in WRONG])
def test_what_is_wrong_is_one_line(gcs, act, line):
    for name, content in (("models/tiny/x.bin", b"x"), ("data/rows.jsonl", b"{}\n"), ("data/bad.json", b"[x]"), ("data/x.txt", b"x"), ("data/run.yaml", b"- 1\n")):
        gcs.put(name, content)
    with pytest.raises(UserError, match="^" + line) as caught:
        act()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("place", "key"), [("model", "model.model_name_or_path"), ("data", "data.path"), ("config", "config")])
def test_what_may_not_be_read_is_one_line(gcs, model, monkeypatch, place, key):
    """No permission, a store that is busy for longer than we wait, and no client to ask it with."""
    put(gcs, model, "models/tiny")
    gcs.put("rows.jsonl", b"{}\n")
    act = {"model": lambda: open_folder("gs://bucket/models/tiny"), "data": lambda: readers.read("gs://bucket/rows.jsonl"), "config": lambda: config_module.load("gs://bucket/rows.jsonl")}
    for status, said in ((403, r"these credentials may not do that \(HTTP 403\)"), (503, ".*503")):
        gcs.fail("", status)
        with pytest.raises(UserError, match=rf"^{key}: 'gs://bucket/.*' cannot be (listed|looked at): {said}"):
            act[place]()
        gcs.faults.clear()
    object_store._client.cache_clear()
    monkeypatch.setitem(sys.modules, "google.cloud", None)
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    with pytest.raises(UserError, match=rf"^{key}: gs:// needs `pip install 'phased_ift_jax\[gcs\]'`$"):
        act[place]()
    object_store._client.cache_clear()


def test_a_passing_fault_is_not_noticed_and_a_change_is_an_error(gcs, model, monkeypatch):
    """Busy, or a connection cut in a slice: tried again. Another object under the same name: no mixture of the two is ever read."""
    folder = open_folder(put(gcs, model, "models/tiny"))
    here = loaded(open_folder(str(model)), fsdp=8)
    for status in (503, 0, -1):
        gcs.fail(r"GET .*safetensors", status, times=1, skip=7)
    monkeypatch.setattr(object_store, "PATIENCE", 30.0)
    jax.tree.map(np.testing.assert_array_equal, loaded(folder, fsdp=8), here)
    assert not any(fault.times for fault in gcs.faults)
    tensors = Tensors(folder.path)
    name = sorted(gcs.objects("models/tiny/model-0"))[0]
    gcs.put(name, gcs.objects()[name])
    line = rf"'gs://bucket/{name}' was changed or removed while it was read; the same command reads it as it is now"
    with pytest.raises(Changed, match=line):
        [tensors.read(tensor, tuple(slice(None) for _ in tensors.shape(tensor))) for tensor in tensors.names()]
    with pytest.raises(UserError, match=f"^model.model_name_or_path: {line}"):
        Tensors(folder.path)
    again = open_folder("gs://bucket/models/tiny")
    assert pictures.stamp(again.path) != pictures.stamp(folder.path)
    jax.tree.map(np.testing.assert_array_equal, loaded(again, fsdp=8), here)
    gcs.put(name, gcs.objects()[name][:1000])
    with pytest.raises(UserError, match=rf"'gs://bucket/{name}' is (cut off or damaged|not a safetensors file)"):
        hf_weights.check(open_folder("gs://bucket/models/tiny"))
    gcs.delete(name)
    with pytest.raises(UserError, match=r"'gs://bucket/models/tiny' lacks model-00001"):
        hf_weights.check(open_folder("gs://bucket/models/tiny"))


def test_what_is_in_a_bucket_is_inspected_there(gcs, model, capsys):
    """By headers and small files alone."""
    address = put(gcs, model, "models/tiny")
    assert inspect_verb.main([address, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["model"], facts["can be trained"]) == (address, "yes")
    assert inspect_verb.main([str(model), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) | {"model": address} == facts


RUN = "gs://bucket/runs/run"


@pytest.fixture(scope="module")
def in_bucket(server, rows, tmp_path_factory) -> dict[str, fake_gcs.Object]:  # noqa: F811
    """What a whole run has left in the bucket."""
    server.buckets["bucket"].clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PHASED_IFT_WORK", str(tmp_path_factory.mktemp("work")))
        train(make_config(rows, RUN))
    return dict(server.buckets["bucket"])


def same_model(gcs, name: str, folder: Path) -> None:
    """An export at a name is the one of a folder, byte for byte, but for what it says of where it was made from."""
    there = {path.removeprefix(f"{name}/"): content for path, content in gcs.objects(f"{name}/").items()}
    assert there.keys() == {path.name for path in folder.iterdir()}
    for path in folder.iterdir():
        if path.name == "provenance.json":
            assert json.loads(there[path.name]) | {"source": ""} == json.loads(path.read_text()) | {"source": ""}
        else:
            assert there[path.name] == path.read_bytes(), path.name


def test_a_run_in_a_bucket_is_exported_from_there(gcs, in_bucket, tmp_path, capsys):
    """The newest phase, or a checkpoint by its address, onto a disk or into a bucket: what the run itself has exported."""
    gcs.buckets["bucket"].update(in_bucket)
    for phase in ("3-hard", "1-easy"):
        [checkpoint] = {"/".join(name.split("/")[:5]) for name in in_bucket if name.startswith(f"runs/run/checkpoints/{phase}/")}
        source = RUN if phase == "3-hard" else f"gs://bucket/{checkpoint}"
        assert convert_verb.main(["to-hf", source, str(tmp_path / phase)]) == 0
        same_model(gcs, f"runs/run/hf/{phase}", tmp_path / phase)
        assert convert_verb.main(["to-hf", source, f"gs://bucket/exported/{phase}"]) == 0
        same_model(gcs, f"exported/{phase}", tmp_path / phase)
    before = gcs.objects()
    capsys.readouterr()
    for destination in (str(tmp_path / "3-hard"), "gs://bucket/exported/3-hard"):
        assert convert_verb.main(["to-hf", RUN, destination]) == 0
        assert capsys.readouterr().out == f"nothing to do: it is there already: {destination}\n"
    assert gcs.objects() == before
    with pytest.raises(UserError, match="'gs://bucket/exported/3-hard' is there, and was not made from this source"):
        convert_verb.main(["to-hf", RUN, "gs://bucket/exported/3-hard", "--dtype", "bfloat16"])
    gcs.put("data/thesis.tex", b"years of work")
    with pytest.raises(UserError, match="'gs://bucket/data' is there, and was not made from this source"):
        convert_verb.main(["to-hf", RUN, "gs://bucket/data"])
    assert gcs.objects() == before | {"data/thesis.tex": b"years of work"}
    gcs.flip(next(name for name in in_bucket if "checkpoints/3-hard" in name and "/d/" in name))
    with pytest.raises(UserError, match=rf"'{RUN}/checkpoints/3-hard/[0-9]+' is damaged: .*/d/.* has other content than was saved"):
        convert_verb.main(["to-hf", RUN, str(tmp_path / "damaged")])


def test_a_model_is_converted_into_a_bucket_and_loaded_from_there(gcs, model, rows, tmp_path, monkeypatch):  # noqa: F811
    """base -> bucket -> base is the identity; a run gets its parameters from there; nothing large touches the disk."""
    address = "gs://bucket/models/converted"
    assert convert_verb.main(["from-hf", put(gcs, model, "models/tiny"), address]) == 0
    monkeypatch.setattr(object_store, "CHUNK_BYTES", 1 << 18)
    assert convert_verb.main(["to-hf", address, "gs://bucket/back"]) == 0
    assert convert_verb.main(["from-hf", str(model), str(tmp_path / "converted")]) == 0
    assert convert_verb.main(["to-hf", str(tmp_path / "converted"), str(tmp_path / "back")]) == 0
    same_model(gcs, "back", tmp_path / "back")
    assert max(path.stat().st_size for path in (tmp_path / "work").rglob("*") if path.is_file()) < 30_000 + (model / "tokenizer.json").stat().st_size
    places = (str(tmp_path / "converted"), address, str(model))
    params = [loop.prepare(make_config(rows, tmp_path / "run", model__init="pretrained", model__model_name_or_path=place)).base_params() for place in places]
    jax.tree.map(np.testing.assert_array_equal, params[0], params[1])
    jax.tree.map(np.testing.assert_array_equal, params[0], params[2])
    assert inspect_verb.main([address]) == 0
    with pytest.raises(UserError, match=f"'{address}' was made by from-hf already"):
        convert_verb.main(["from-hf", address, "gs://bucket/again"])


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_a_conversion_into_a_bucket_that_was_stopped_goes_on(gcs, model, tmp_path, monkeypatch, way):
    """Wherever it is stopped, nothing there is taken for a model; the same command makes what one that was never stopped makes."""
    source = str(model)
    if way == "to-hf":
        source = str(tmp_path / "converted")
        convert_verb.main(["from-hf", str(model), source])
        monkeypatch.setattr("phased_ift_jax.models.tensor_files.SHARD_BYTES", 40_000)
    convert_verb.main([way, source, "gs://bucket/whole/model"])
    whole = {name.removeprefix("whole/"): content for name, content in gcs.objects("whole/").items()}
    assert len([name for name in whole if name.endswith(".safetensors")]) != 1
    monkeypatch.setattr(object_store, "PATIENCE", 0.5)
    for skip in (1, 4, 7, 9) if way == "from-hf" else (1, 2, 3, 4):
        fault = gcs.fail("(POST|PUT) bucket/model/(?!lease)", 403, skip=skip)
        with pytest.raises((StoreError, ValueError, UserError)):
            convert_verb.main([way, source, "gs://bucket/model"])
        gcs.faults.remove(fault)
        with pytest.raises(UserError, match=r"'gs://bucket/model' has no config.json"):
            open_folder("gs://bucket/model")
        assert "model/lease.json" not in gcs.objects()
    assert convert_verb.main([way, source, "gs://bucket/model"]) == 0
    made = gcs.objects("model/")
    assert made.keys() == whole.keys()
    assert [name for name in whole if made[name] != whole[name] and not name.startswith("model/checkpoint/")] == []
    assert [name for name in whole if made[name] != whole[name] and "/params." in name] == []
    assert gcs.asked.count("PUT bucket/model/model-00001-of-00003.safetensors") == (way == "to-hf"), "what is there is not sent again"
    last = sorted(gcs.buckets["bucket"].items(), key=lambda item: item[1].generation)
    assert [name for name, _ in last if name.startswith("model/")][-1] == "model/config.json"


def test_one_process_makes_a_folder(gcs, model):
    lease = Lease(object_store.Objects("gs://bucket/model"), "another", 60).acquire()
    with pytest.raises(UserError, match=r"^another \(process .* is at work in 'gs://bucket/model'; wait for it to end, or choose another folder$"):
        convert_verb.main(["from-hf", str(model), "gs://bucket/model"])
    lease.release()
    gcs.fail("POST", 403)
    with pytest.raises(UserError, match=r"^DST: 'gs://bucket/model/lease.json' cannot be written: these credentials may not do that \(HTTP 403\)$"):
        convert_verb.main(["from-hf", str(model), "gs://bucket/model"])
    gcs.faults.clear()
    with pytest.raises(UserError, match=r"^DST: 'gs://nowhere/model.*: no such bucket or object"):
        convert_verb.main(["from-hf", str(model), "gs://nowhere/model"])
    with pytest.raises(UserError, match=r"^SRC: nothing lies at 'gs://bucket/nothing'"):
        convert_verb.main(["to-hf", "gs://bucket/nothing", "gs://bucket/model"])
    with pytest.raises(UserError, match="--push_to_hub: 'gs://bucket/model' is in a bucket"):
        convert_verb.main(["to-hf", "gs://bucket/nothing", "gs://bucket/model", "--push_to_hub", "me/model"])



def test_data_are_fetched_into_a_bucket(gcs, monkeypatch, capsys):
    def fetched(what: str, out: Path, base_url: str | None) -> list[Path]:
        out.mkdir(parents=True, exist_ok=True)
        (out / "rows.jsonl").write_text("{}\n")
        return [out / "rows.jsonl"]

    monkeypatch.setattr(fetch_verb.sources, "fetch", fetched)
    assert fetch_verb.main(["alpaca", "--out", "gs://bucket/data"]) == 0
    assert gcs.objects() == {"data/rows.jsonl": b"{}\n"}
    assert capsys.readouterr().out == "in gs://bucket/data: rows.jsonl\n"
    gcs.put("data/rows.jsonl", b"years of work")
    with pytest.raises(UserError, match=r"^out: 'gs://bucket/data/rows\.jsonl' is there, and is something else; move it away"):
        fetch_verb.main(["alpaca", "--out", "gs://bucket/data"])
    assert gcs.objects() == {"data/rows.jsonl": b"years of work"}

"""Laws of conversion: there and back is the identity; a few tensors in memory; stopped and started again is never stopped; one line for every fault."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from phased_ift_jax import convert, files
from phased_ift_jax.config import MeshConfig, TrainingConfig
from phased_ift_jax.models import hf_weights, tensor_files
from phased_ift_jax.models.hf_folder import FAMILIES, open_folder
from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training import conversion, stored
from phased_ift_jax.training.checkpoint import Checkpoints, Position, load_params
from phased_ift_jax.training.step import Trainer
from phased_ift_jax.training.stored import Stored

BESIDE = {"tokenizer.model": b"\x00\x01pieces\xff", "tokenizer.json": b"{ }\r\n\n", "tokenizer_config.json": b'{"a":1}', "LICENSE.txt": b"may\r\n", "USE_POLICY.md": b"nicely"}
SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def make_model(folder: Path, family: str = "llama", dtype: str = "bfloat16", count: int = 1, seed: int = 0, **attributes: Any) -> Path:
    """A model folder of random bytes, written by the format's own library: numbers of every kind, NaNs, zeros of both signs."""
    config = {"model_type": family, "architectures": [FAMILIES[family].ARCHITECTURE], "torch_dtype": dtype, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2}
    config |= SIZES | attributes
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    for name, content in BESIDE.items():
        (folder / name).write_bytes(content)
    rng = np.random.default_rng(seed)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    tensors: dict[str, np.ndarray] = {}
    for weight in hf_weights.weights(open_folder(str(folder))):
        for name in weight.names:
            shape = weight.layout.their_shape(weight.each)
            tensors[name] = np.frombuffer(rng.bytes(int(np.prod(shape)) * kind.itemsize), kind).reshape(shape).copy()
    tensors["model.layers.0.input_layernorm.weight"][...] = 0  # a chunk that storage would rather leave out
    names = list(tensors)
    if count == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    where = {}
    for number in range(count):
        part = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
        save_file({name: tensors[name] for name in names[number::count]}, folder / part, metadata={"format": "pt"})
        where |= dict.fromkeys(names[number::count], part)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    return folder


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name: (dtype, shape, bytes) of every tensor of a folder."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {name: (array.dtype.name, array.shape, array.tobytes()) for name, array in load_file(file).items()}
    return found


def digest(folder: Path) -> dict[str, str]:
    """Name and SHA-256 of every file of a folder that its content decides: not those in which orbax notes the time."""
    timed = {"_CHECKPOINT_METADATA", "commit_success.txt", "conversion.json", "provenance.json"}
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in timed]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def refusal(arguments: Sequence[object]) -> str:
    """The one line with which the verb refuses these arguments."""
    with pytest.raises(UserError) as caught:
        convert.main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert "\n" not in message
    return message


def run(*arguments: object) -> None:
    assert convert.main([str(argument) for argument in arguments]) == 0


# --- the identity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_the_identity(family: str, dtype: str, tied: bool, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: base -> from-hf -> to-hf leaves names, dtypes, shapes and bytes of all tensors, and the bytes of all files beside them."""
    base = make_model(tmp_path / "base", family, dtype, count, tie_word_embeddings=tied, head_dim=12 if family == "llama" else None)
    if count == 7:
        monkeypatch.setattr(tensor_files, "SHARD_BYTES", sum(len(data) for *_, data in contents(base).values()) // 6)
    run("from-hf", base, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert ("lm_head.weight" in contents(base)) != tied
    for name in ("config.json", *BESIDE):
        assert (tmp_path / "back" / name).read_bytes() == (base / name).read_bytes(), name
    if count == 7:
        assert len(list((tmp_path / "back").glob("*.safetensors"))) in (7, 8)
    assert json.loads((tmp_path / "back/generation_config.json").read_text()) == {"_from_model_config": True, "bos_token_id": 1, "eos_token_id": 2}


def test_tensors_of_different_dtypes_come_back_in_their_own(tmp_path: Path) -> None:
    """Law: where layers have different dtypes, our stacked array holds every number exactly, and the export tells them apart."""
    base = make_model(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    for name in tensors:
        if "layernorm" in name or "mlp.up" in name:
            dtype = np.float32 if "layers.0" in name else np.float16 if "layers.1" in name else ml_dtypes.bfloat16
            tensors[name] = np.linspace(-2, 2, tensors[name].size).astype(dtype).reshape(tensors[name].shape)
    save_file(tensors, base / "model.safetensors")
    run("from-hf", base, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)
    assert {dtype for dtype, *_ in contents(base).values()} == {"bfloat16", "float16", "float32"}


def test_another_dtype_is_rounded_once_and_said_in_the_config(tmp_path: Path) -> None:
    """Law: with --dtype every tensor is the base's rounded to it, and config.json says so (trap 27)."""
    base = make_model(tmp_path / "base", dtype="float32")
    run("from-hf", base, tmp_path / "ours")
    run("to-hf", tmp_path / "ours", tmp_path / "narrow", "--dtype", "bfloat16")
    wide, narrow = load_file(base / "model.safetensors"), load_file(tmp_path / "narrow/model.safetensors")
    for name, array in wide.items():
        np.testing.assert_array_equal(narrow[name].view(np.uint16), array.astype(ml_dtypes.bfloat16).view(np.uint16), err_msg=name)
    assert json.loads((tmp_path / "narrow/config.json").read_text()) == json.loads((base / "config.json").read_text()) | {"torch_dtype": "bfloat16"}


def test_a_number_too_large_for_the_dtype_is_refused(tmp_path: Path) -> None:
    """Law: no export turns a number into an infinity: the tensor is named, and nothing is written."""
    base = make_model(tmp_path / "base")
    file = base / "model.safetensors"
    tensors = {name: np.clip(np.nan_to_num(array.astype(np.float32)), -6e4, 6e4).astype(array.dtype) for name, array in load_file(file).items()}
    save_file(tensors, file)
    run("from-hf", base, tmp_path / "fits")
    run("to-hf", tmp_path / "fits", tmp_path / "half", "--dtype", "float16")
    for number, dtype, largest in ((7e4, "float16", "65504"), (3.4e38, "bfloat16", "3.38953e+38")):
        tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
        tensors["model.layers.1.mlp.down_proj.weight"][3, 4] = number
        save_file(tensors, file)
        run("from-hf", base, tmp_path / f"ours-{dtype}")
        message = refusal(["to-hf", tmp_path / f"ours-{dtype}", tmp_path / "back", "--dtype", dtype])
        assert f"model.layers.1.mlp.down_proj.weight has numbers beyond {dtype}'s {largest}" in message
        assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_orbax_and_training_read_what_from_hf_made(dtype: str, tmp_path: Path) -> None:
    """Law: orbax itself loads the converted checkpoint, on eight devices, to what is loaded from the Hugging Face folder."""
    base = make_model(tmp_path / "base", "mistral")
    file = base / "model.safetensors"
    save_file({name: np.nan_to_num(array.astype(np.float32)).astype(array.dtype) for name, array in load_file(file).items()}, file)  # XLA may change which NaN
    run("from-hf", base, tmp_path / "ours")
    folder, converted = open_folder(str(base)), open_folder(str(tmp_path / "ours"))
    assert converted.converted
    trainer = Trainer(folder.config, TrainingConfig(), make_mesh(MeshConfig(data=2, fsdp=2, tensor=2)), dtype)
    read = hf_weights.load(folder, trainer.shardings.params, jnp.dtype(dtype))
    restored = load_params(converted.converted, trainer.shapes.params, trainer.shardings.params)
    assert jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), restored) == jax.tree.map(lambda leaf: (leaf.dtype, leaf.sharding), read)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8)), restored, read)


@pytest.mark.parametrize("devices", [1, 8])
def test_a_checkpoint_of_training_is_cut_into_chunks(devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: no chunk of a saved array is larger than the limit, so that no reader of a slice has to hold more."""
    monkeypatch.setattr(stored, "CHUNK_BYTES", 4096)
    folder = open_folder(str(make_model(tmp_path / "base")))
    trainer = Trainer(folder.config, TrainingConfig(), make_mesh(MeshConfig(), jax.devices()[:devices]))
    state = trainer.fresh(trainer.init_params(0))
    store = Checkpoints(tmp_path / "checkpoints", "identity", 1)
    store.save("1-all", Position(1, 1, 0, complete=False), state)
    store.wait()
    saved = Stored(store.committed()[0][1])
    assert saved.paths == {weight.path for weight in hf_weights.weights(folder)}
    for weight in hf_weights.weights(folder):
        assert int(np.prod(saved._open(weight.path).chunk_layout.read_chunk.shape)) * 4 <= 4096
        np.testing.assert_array_equal(saved.read(weight.path, None), np.asarray(hf_weights.get(state.params, weight.path)))


def test_nothing_is_done_twice_and_nothing_is_overwritten(tmp_path: Path) -> None:
    """Law: the same command again finds its work done; a folder of anything else is left alone; an empty one is taken."""
    base = make_model(tmp_path / "base")
    (tmp_path / "ours").mkdir()
    for arguments in (["from-hf", base, tmp_path / "ours"], ["to-hf", tmp_path / "ours", tmp_path / "back"]):
        run(*arguments)
        before = {path: path.stat().st_mtime_ns for path in arguments[-1].rglob("*")}
        run(*arguments)
        assert {path: path.stat().st_mtime_ns for path in arguments[-1].rglob("*")} == before
    assert "was not made from this source" in refusal(["to-hf", tmp_path / "ours", tmp_path / "back", "--dtype", "float32"])
    assert "was not made from this source" in refusal(["from-hf", base, tmp_path / "back"])
    other = make_model(tmp_path / "other", seed=1)
    assert "was not made from this source" in refusal(["from-hf", other, tmp_path / "ours"])
    assert "made by from-hf already" in refusal(["from-hf", tmp_path / "ours", tmp_path / "again"])
    assert "a Hugging Face folder already" in refusal(["to-hf", base, tmp_path / "again"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "base", "other", "ours"]


# --- faults of the source, and of the disk -------------------------------------------------------------------------------------


def _index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def fault(base: Path) -> None:
        index = json.loads((base / "model.safetensors.index.json").read_text())
        change(index["weight_map"])
        (base / "model.safetensors.index.json").write_text(json.dumps(index))

    return fault


def _config(**changes: Any) -> Callable[[Path], None]:
    return lambda base: (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes)) and None


def _truncate(base: Path) -> None:
    with open(base / "model-00002-of-00003.safetensors", "r+b") as file:
        file.truncate(file.seek(0, 2) - 1)


def _shape(base: Path) -> None:
    file = base / "model-00001-of-00003.safetensors"
    save_file(load_file(file) | {"model.embed_tokens.weight": np.zeros((96, 31), ml_dtypes.bfloat16)}, file)


def _bin(base: Path) -> None:
    for file in base.glob("model*"):
        file.unlink()
    (base / "pytorch_model-00001-of-00002.bin").write_bytes(b"PK")


def _gptq(base: Path) -> None:
    file = base / "model-00001-of-00003.safetensors"
    save_file(load_file(file) | {"model.layers.0.mlp.up_proj.qweight": np.zeros((4, 4), np.int32)}, file)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a missing shard": (lambda base: (base / "model-00003-of-00003.safetensors").unlink(), "lacks model-00003-of-00003.safetensors"),
    "a shard cut off": (_truncate, "model-00002-of-00003.safetensors' is cut off"),
    "an index that names a tensor that is not there": (_index(lambda where: where.update({"model.ghost": where["model.norm.weight"]})), "says that model.ghost is in"),
    "an index that names a wrong file": (
        _index(lambda where: where.update({"model.norm.weight": next(file for file in where.values() if file != where["model.norm.weight"])})),
        "says that model.norm.weight is in",
    ),
    "an index that leads out of the folder": (_index(lambda where: where.update({"model.norm.weight": "../../etc/passwd"})), "is not an index of safetensors"),
    "a tensor of another shape": (_shape, "model.embed_tokens.weight has shape (96, 31), config.json says (96, 32)"),
    "another architecture": (_config(architectures=["LlamaForSequenceClassification"]), "LlamaForSequenceClassification"),
    "quantized by GPTQ": (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    "quantized weights without a word of it": (_gptq, "qweight has dtype I32"),
    "torch files only": (_bin, "it has 'pytorch_model-00001-of-00002.bin'"),
    "more layers in config.json than in the files": (_config(num_hidden_layers=4), "has no tensor model.layers.3."),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_source_is_one_line_and_leaves_nothing(fault: str, tmp_path: Path) -> None:
    """Law: what is wrong with a checkpoint is found before anything is written, and named."""
    base = make_model(tmp_path / "base", count=3)
    FAULTS[fault][0](base)
    assert FAULTS[fault][1] in refusal(["from-hf", base, tmp_path / "ours"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_faulty_checkpoint_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    """Law: so is what is wrong with a checkpoint of ours: none at all, one by itself, one of other sizes."""
    base = make_model(tmp_path / "base")
    run("from-hf", base, tmp_path / "ours")
    checkpoint = tmp_path / "ours/checkpoint"
    (tmp_path / "empty").mkdir()
    assert "no such folder" in refusal(["to-hf", tmp_path / "nowhere", tmp_path / "back"])
    assert "--base" in refusal(["to-hf", checkpoint, tmp_path / "back"])
    assert "is not a whole orbax checkpoint" in refusal(["to-hf", tmp_path / "empty", tmp_path / "back", "--base", base])
    wide = make_model(tmp_path / "wide", vocab_size=97)
    assert "embed has shape (96, 32), the config.json of" in refusal(["to-hf", checkpoint, tmp_path / "back", "--base", wide])
    tied = make_model(tmp_path / "tied", tie_word_embeddings=True)
    assert "holds an unknown array lm_head" in refusal(["to-hf", checkpoint, tmp_path / "back", "--base", tied])
    assert not (tmp_path / "back").exists()
    run("to-hf", checkpoint, tmp_path / "back", "--base", base)
    assert contents(tmp_path / "back") == contents(base)


def _remove(name: str) -> Callable[[Path], object]:
    return lambda ours: next(ours.rglob(name)).unlink()


def _write(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda ours: next(ours.rglob(name)).write_bytes(content)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a chunk lost": (_remove("params.layers.mlp.gate/1.0.0"), "layers/mlp/gate cannot be read"),
    "a chunk cut off": (_write("params.layers.mlp.gate/1.0.0", b"short"), "layers/mlp/gate cannot be read"),
    "an array's description lost": (_remove("params.embed/.zarray"), "embed cannot be read"),
    "an array's description damaged": (_write("params.embed/.zarray", b"{"), "embed cannot be read"),
    "the tree's description cut off": (_write("_METADATA", b'{"tree_'), "cannot be read"),
    "never committed": (_remove("commit_success.txt"), "is not a whole orbax checkpoint"),
    "dtypes damaged": (_write("conversion.json", b"{}"), "conversion.json' is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_line_and_never_zeros(damage: str, tmp_path: Path) -> None:
    """Law: what was lost of a checkpoint since it was made is an error that names the array, and no export is made."""
    base = make_model(tmp_path / "base")
    run("from-hf", base, tmp_path / "ours")
    DAMAGES[damage][0](tmp_path / "ours")
    assert DAMAGES[damage][1] in refusal(["to-hf", tmp_path / "ours", tmp_path / "back"])
    assert not (tmp_path / "back").exists()


WHOLE = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
HEADERS = {
    "a list": "[1]",
    "null": "null",
    "no offsets": '{"a":{"dtype":"F32","shape":[1],"data_offsets":[]}}',
    "deep": "[" * 100_000,
    "overlapping": f'{{"a":{WHOLE},"b":{WHOLE}}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_an_odd_header_is_no_safetensors(header: str, tmp_path: Path) -> None:
    """Law: whatever a header holds, it is read as the format says or refused in one line."""
    base = make_model(tmp_path / "base")
    (base / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(4))
    assert "is not a safetensors file" in refusal(["from-hf", base, tmp_path / "ours"])


def test_odd_destinations_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: what nothing can be renamed to is refused before the work, and so is a name that the disk does not take."""
    base = make_model(tmp_path / "base")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    monkeypatch.chdir(tmp_path / "empty")
    for destination in (tmp_path / "link", tmp_path / "dangling", ".", "./"):
        assert "which nothing can be renamed to" in refusal(["from-hf", base, destination])
    assert "File name too long" in refusal(["from-hf", base, tmp_path / ("x" * 300)])
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["base", "dangling", "empty", "link"]


def test_the_command_line_is_refused_in_one_line(tmp_path: Path) -> None:
    """Law: what is wrong with the command line is said in one line."""
    for arguments in ([], ["from"], ["from-hf"], ["to-hf", "a", "b", "--dtype", "int8"], ["from-hf", "a", "b", "--dtype", "float32"]):
        refusal(arguments)
    base = make_model(tmp_path / "base")
    run("from-hf", base, tmp_path / "ours")
    assert "--push_to_hub" in refusal(["to-hf", tmp_path / "ours", tmp_path / "back", "--push_to_hub", "name"])
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(["from-hf", base, tmp_path / "file" / "ours"])


def test_a_disk_with_too_little_room_is_said_at_the_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: bytes needed and bytes free are named before anything is written."""
    base = make_model(tmp_path / "base")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    needed = sum(len(data) for *_, data in contents(base).values())
    assert f"needs {needed:,} bytes, '{tmp_path}' has 1,000 free" in refusal(["from-hf", base, tmp_path / "ours"])
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# the disk fills up while another process writes to it: the check at the door, which sees an empty one, is left out
FILL = """
set -e
mount -t tmpfs -o size=%d tmpfs "$1"
set +e
"$2" -c 'import sys
from phased_ift_jax import cli, convert
from phased_ift_jax.training import conversion
conversion._check_space = lambda *_: None
cli.run(convert.main, sys.argv[1:])' "$3" "$4" "$1/out"
echo "exit $?"
ls -A "$1"
mount -o remount,size=100M "$1"
"$2" -m phased_ift_jax.convert "$3" "$4" "$1/out" && cp -r "$1/out" "$5"
ls -A "$1"
"""


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_a_disk_that_fills_up_is_one_line_and_the_next_call_goes_on(way: str, tmp_path: Path) -> None:
    """Law: on a real file system that fills up in the middle, one line, exit 2, and no destination; given room, the same command ends well."""
    if subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)], capture_output=True, check=False).returncode:
        pytest.skip("needs unshare and user namespaces, to mount a small file system")
    base = make_model(tmp_path / "base", hidden_size=64, vocab_size=2000, intermediate_size=256)
    run("from-hf", base, tmp_path / "ours")
    (tmp_path / "small").mkdir()
    source = base if way == "from-hf" else tmp_path / "ours"
    size = sum(len(data) for *_, data in contents(base).values())
    command = ["unshare", "-Urm", "bash", "-c", FILL % (size * 2 // 3), "-", str(tmp_path / "small"), sys.executable, way, str(source), str(tmp_path / "copy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    told = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(told) == 1, done.stderr
    assert "no space left for" in told[0]
    assert "the same command goes on" in told[0]
    assert "Traceback" not in done.stderr
    assert done.stdout.split() == ["exit", "2", ".out.part", "done:", str(tmp_path / "small/out"), "out"]
    if way == "to-hf":
        assert contents(tmp_path / "copy") == contents(base)
    else:
        assert digest(tmp_path / "copy") == digest(tmp_path / "ours")


# --- stopped and started again --------------------------------------------------------------------------------------------------


START = """
import atexit, sys
atexit.register(lambda: print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1], file=sys.stderr))
from phased_ift_jax import cli, convert
from phased_ift_jax.models import tensor_files
tensor_files.SHARD_BYTES = int(sys.argv.pop(1))
cli.run(convert.main)
"""


def start(way: str, source: Path, destination: Path, shard_bytes: int = 40_000_000) -> subprocess.Popen[bytes]:
    """The verb in a process of its own; an export cut into several files, so that some are whole when it is killed."""
    command = [sys.executable, "-c", START, str(shard_bytes), way, str(source), str(destination)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_killed_at_ten_random_moments_and_run_again(way: str, tmp_path: Path) -> None:
    """Law: killed at ten moments, each after the work has begun, and run again: the result of a call that was never killed, byte for
    byte, with nothing else beside it."""
    base = make_model(tmp_path / "base", hidden_size=1024, intermediate_size=4096, num_attention_heads=8, num_hidden_layers=10, vocab_size=4000)
    source = base
    if way == "to-hf":
        source = tmp_path / "ours"
        run("from-hf", base, source)
    child = start(way, source, tmp_path / "whole")
    while not (tmp_path / ".whole.part").exists() and child.poll() is None:
        time.sleep(0.002)
    begun = time.monotonic()
    while not (tmp_path / "whole").exists() and child.poll() is None:
        time.sleep(0.002)
    length = time.monotonic() - begun
    assert child.wait(timeout=60) == 0
    rng, kills, partial, attempt = random.Random(5), 0, 0, 0
    while kills < 10:
        attempt += 1
        assert attempt <= 20, "the kills come too late to hit"
        destination = tmp_path / f"again{attempt}"
        for _ in range(2):  # the second of each pair finds what the first has left
            part = tmp_path / f".{destination.name}.part"
            child = start(way, source, destination)
            while not (part.exists() and any(part.iterdir())) and child.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.random() * length)
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                kills += 1
                partial += not destination.exists()
            child.wait(timeout=60)
            child.stderr.close()
        child = start(way, source, destination)
        _, said = child.communicate(timeout=120)
        assert child.returncode == 0, said
        assert digest(destination) == digest(tmp_path / "whole")
        assert not part.exists()
        if kills < 10:
            shutil.rmtree(destination)
    assert partial >= 5, "most kills came before the work was done"
    if way == "to-hf":
        assert contents(destination) == contents(base)
    else:
        run("to-hf", destination, tmp_path / "back")
        assert contents(tmp_path / "back") == contents(base)


def sources_of(way: str, bases: list[Path]) -> list[Path]:
    """What a conversion of these bases starts from: the bases themselves, or what from-hf makes of them."""
    if way == "from-hf":
        return bases
    sources = [base.with_name(f"{base.name}-ours") for base in bases]
    for base, source in zip(bases, sources, strict=True):
        run("from-hf", base, source)
    return sources


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_a_part_of_another_source_is_not_used(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: where the source has changed since a call was stopped, nothing of that call is in the result; where not, what was whole is kept."""
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 10_000)
    bases = [make_model(tmp_path / f"base{seed}", seed=seed) for seed in (0, 1)]
    sources = sources_of(way, bases)

    class Stop(Exception):
        pass

    def attempt(source: Path, stop_after: int) -> int:
        calls: list[int] = []

        def count(size: int) -> None:
            calls.append(size)
            if len(calls) == stop_after:
                raise Stop

        if way == "from-hf":
            conversion.from_hf(open_folder(str(source)), tmp_path / "out", lambda total: count)
        else:
            conversion.to_hf(conversion.find(str(source)), tmp_path / "out", None, lambda total: count)
        return len(calls)

    with pytest.raises(Stop):
        attempt(sources[0], 20)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.part").rglob("*") if path.is_file()}
    assert len(written) > 2
    with pytest.raises(Stop):
        attempt(sources[0], 1)
    weighty = [path for path in written if path.suffix == ".safetensors" or "params." in str(path)]
    assert len(weighty) > 2
    assert all(path.stat().st_mtime_ns == written[path] for path in weighty if not path.name.startswith("."))
    attempt(sources[1], -1)
    if way == "to-hf":
        assert contents(tmp_path / "out") == contents(bases[1])
    else:
        run("from-hf", bases[1], tmp_path / "clean")
        assert digest(tmp_path / "out") == digest(tmp_path / "clean")


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_stopped_in_clearing_or_in_settling(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: stopped while the part of another source is being cleared away, nothing of it is used; stopped while the finished part is
    being settled on the disk, nothing is made again."""
    bases = [make_model(tmp_path / f"base{seed}", seed=seed) for seed in (0, 1)]
    sources = sources_of(way, bases)
    out, part = tmp_path / "out", tmp_path / ".out.part"

    class Stop(Exception):
        pass

    def stop(*_: object) -> None:
        raise Stop

    def stop_at_files(path: Path) -> None:
        if path.is_file():  # folders are settled all along
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(files, "settle", stop_at_files)
        with pytest.raises(Stop):
            run(way, sources[0], out)
    done = {path: path.stat().st_mtime_ns for path in part.rglob("*") if path.suffix == ".safetensors" or "params." in path.parent.name}
    assert done
    with monkeypatch.context() as patch:
        patch.setattr(files, "settle", stop_at_files)
        with pytest.raises(Stop):
            run(way, sources[0], out)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    with monkeypatch.context() as patch:
        patch.setattr(Path, "iterdir", stop)  # after the marker has gone, before the rest
        with pytest.raises(Stop):
            conversion.from_hf(open_folder(str(sources[1])), out) if way == "from-hf" else conversion.to_hf(conversion.find(str(sources[1])), out)
    victim = next(path for path in done if path.name in ("model.safetensors", "1.0.0"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"!")  # were it kept, it would be seen
    run(way, sources[0], out)
    assert not part.exists()
    if way == "from-hf":
        run("to-hf", out, tmp_path / "back")
    assert contents(tmp_path / "back" if way == "from-hf" else out) == contents(bases[0])


def test_one_process_writes_a_destination(tmp_path: Path) -> None:
    """Law: while one call is at it, another of the same destination is refused in one line, and the first ends well."""
    base = make_model(tmp_path / "base")
    messages = []

    def meanwhile(size: int) -> None:
        if not messages:
            messages.append(refusal(["from-hf", base, tmp_path / "ours"]))

    conversion.from_hf(open_folder(str(base)), tmp_path / "ours", lambda total: meanwhile)
    assert messages == [f"another process is writing '{tmp_path / 'ours'}'; wait for it, or name another folder"]
    run("to-hf", tmp_path / "ours", tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base)


# --- memory --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_memory_is_a_few_tensors_whatever_the_number_of_layers(way: str, tmp_path: Path, measured: Callable[[str, float], None]) -> None:
    """Law: ten more layers add to the peak of resident memory less than a quarter of their 280 MB: it does not grow with the model (trap 29)."""
    peaks = []
    for layers in (2, 12):
        work = tmp_path / str(layers)
        base = make_model(work / "base", "llama", "float32", hidden_size=1024, intermediate_size=1024, num_hidden_layers=layers, vocab_size=1000)
        source = base
        if way == "to-hf":
            source = work / "ours"
            run("from-hf", base, source)
        _, said = (child := start(way, source, work / "out", 5_000_000_000)).communicate(timeout=60)
        assert child.returncode == 0, said
        peaks.append(int(said.split()[-1]) / 1024)  # not ru_maxrss, in which Linux counts the process that started this one, too
        shutil.rmtree(work)
    measured(f"{way}: MB of peak memory that ten layers of 28 MB add (<= 70)", peaks[1] - peaks[0])
    assert peaks[1] - peaks[0] <= 70


def test_loading_adds_the_models_own_bytes(tmp_path: Path, measured: Callable[[str, float], None]) -> None:
    """Law: a bfloat16 model of 0.4 GB loaded into eight devices adds its own bytes to resident memory, and at most a tenth beside."""
    base = make_model(tmp_path / "base", hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, vocab_size=1000, num_attention_heads=8, num_key_value_heads=8)
    sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
    try:
        from conversion import LOAD
    finally:
        sys.path.pop(0)
    told = json.loads(subprocess.run([sys.executable, "-c", LOAD, str(base)], capture_output=True, text=True, check=True, timeout=120).stdout.splitlines()[-1])
    measured("loading into 8 devices: bytes added / own bytes", told["added"] / told["own"])
    assert told["added"] <= 1.1 * told["own"]

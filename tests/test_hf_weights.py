"""Weights in and out: base -> load -> export is the identity, read by slices, written whole, refused in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from phased_ift_jax.config import MeshConfig, TrainingConfig
from phased_ift_jax.models import hf_export, hf_weights, tensor_files
from phased_ift_jax.models.hf_folder import FAMILIES, Folder, open_folder
from phased_ift_jax.records import UserError
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training.step import Trainer

pytest.importorskip("torch", reason="bases are made by transformers on torch")
safetensors = pytest.importorskip("safetensors", reason="exports are read back by the format's own library")

BESIDE = {
    "tokenizer.model": b"\x00\x01pieces\xff",
    "tokenizer.json": b"{ }\n\n",
    "tokenizer_config.json": b'{"a":1}',
    "special_tokens_map.json": b"{}",
    "LICENSE.txt": b"may be used\r\n",
}
MESHES = {"one device": (1, 1, 1), "eight": (2, 2, 2), "eight in fsdp": (1, 8, 1), "fsdp and tensor": (1, 4, 2)}


@pytest.fixture
def base(tiny_model: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A model folder of the test's own, with files beside the weights."""

    def make(family: str = "llama", **arguments: Any) -> Path:
        folder = tmp_path / "base"
        shutil.copytree(tiny_model(family, **arguments), folder)
        for name, content in BESIDE.items():
            (folder / name).write_bytes(content)
        return folder

    return make


def trainer_of(folder: Folder, mesh: tuple[int, int, int] = (1, 1, 1), param_dtype: str = "float32") -> Trainer:
    data, fsdp, tensor = mesh
    return Trainer(folder.config, TrainingConfig(), make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[: data * fsdp * tensor]), param_dtype)


def loaded(folder: Folder, mesh: tuple[int, int, int] = (1, 1, 1), param_dtype: str = "float32") -> Any:
    trainer = trainer_of(folder, mesh, param_dtype)
    return hf_weights.load(folder, trainer.shardings.params, trainer.shapes.params["embed"].dtype)


def export(params: Any, folder: Folder, destination: Path, dtype: str | None = None) -> None:
    """Parameters as they lie on the devices, written as a Hugging Face folder."""

    def read(path: str, layer: int | None) -> np.ndarray:
        array = hf_weights.get(params, path)
        return np.asarray(array if layer is None else array[layer])

    hf_export.export(hf_weights.tensors_of(folder, read, dtype), folder, destination, dtype=dtype)


def contents(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Name: (dtype, shape, bytes) of every tensor, by the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in safetensors.deserialize(file.read_bytes()):
            found[name] = (tensor["dtype"], tuple(tensor["shape"]), bytes(tensor["data"]))
    return found


def refusal(call: Callable[[], object]) -> str:
    """The message of the `UserError` that a call raises: one line."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    return message


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the one safetensors file of a folder through the format's own library."""
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **changes: object) -> None:
    attributes = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({name: value for name, value in attributes.items() if value is not ...}))


# --- the identity --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("llama", {"dtype": "float32"}),
        ("llama", {"dtype": "bfloat16", "tie_word_embeddings": True, "max_shard_size": "20KB"}),
        ("llama", {"dtype": "float16", "head_dim": 12, "num_key_value_heads": 1}),
        *((family, {"dtype": "bfloat16"}) for family in FAMILIES),
        ("mistral", {"dtype": "float16", "tie_word_embeddings": True, "max_shard_size": "20KB"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_load_and_export_is_the_identity(family: str, arguments: dict[str, Any], mesh: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Law: names, shapes, dtypes and bytes of the tensors, and the bytes of config, tokenizer and licence, come back as they were."""
    folder = open_folder(str(base(family, **arguments)))
    assert (len(list(folder.path.glob("*.safetensors"))) > 1) == ("max_shard_size" in arguments)
    export(loaded(folder, MESHES[mesh]), folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder.path)
    assert ("lm_head.weight" in contents(tmp_path / "out")) != arguments.get("tie_word_embeddings", False)
    for name in ("config.json", "generation_config.json", *BESIDE):
        assert (tmp_path / "out" / name).read_bytes() == (folder.path / name).read_bytes(), name


def test_export_in_shards_is_the_identity(base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: so it is when the export is cut into shards, none above the limit, and the index names each tensor's file."""
    monkeypatch.setattr(tensor_files, "SHARD_BYTES", 20_000)
    folder = open_folder(str(base(dtype="bfloat16")))
    export(loaded(folder), folder, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(folder.path)
    files = sorted(tmp_path.glob("out/*.safetensors"))
    assert [file.name for file in files] == [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
    assert len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    where = {name: file.name for file in files for name, _ in safetensors.deserialize(file.read_bytes())}
    assert index == {"metadata": {"total_size": sum(len(data) for _, _, data in contents(folder.path).values())}, "weight_map": where}
    for file in files:
        assert sum(len(tensor["data"]) for _, tensor in safetensors.deserialize(file.read_bytes())) <= 20_000


@pytest.mark.parametrize("shard_bytes", [20_000, 5_000_000_000])
def test_transformers_loads_an_export(shard_bytes: int, base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: `from_pretrained` of an export finds every tensor, none over, of another dtype too (trap 27: weights and config.json agree)."""
    import torch
    import transformers

    monkeypatch.setattr(tensor_files, "SHARD_BYTES", shard_bytes)
    folder = open_folder(str(base("mistral", sliding_window=8)))
    export(loaded(folder, MESHES["eight"]), folder, tmp_path / "out", "bfloat16")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    original = transformers.AutoModelForCausalLM.from_pretrained(folder.path, dtype="auto").state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, original[name].bfloat16()), name
    assert model.config.sliding_window == 8


def test_import_casts_once(base: Callable[..., Path]) -> None:
    """Law: the parameter's dtype is the one asked for, whatever the file's, and its numbers the file's rounded once."""
    folder = open_folder(str(base(dtype="float32")))
    narrow, wide = loaded(folder, param_dtype="bfloat16"), loaded(folder)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(narrow)} == {"bfloat16"}
    assert jax.tree.all(jax.tree.map(lambda n, w: np.array_equal(np.asarray(n), np.asarray(w).astype(n.dtype)), narrow, wide))


@pytest.mark.parametrize("mesh", MESHES)
def test_a_device_reads_only_its_slices(mesh: str, base: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: no read takes more from the files than one layer's share of one shard, and every slice is read once, however many devices
    hold it (trap 29)."""
    folder = open_folder(str(base(dtype="bfloat16")))
    trainer = trainer_of(folder, MESHES[mesh])
    sizes: dict[str, list[int]] = {}
    read = tensor_files.Tensors.read

    def counting(self: tensor_files.Tensors, name: str, index: Any) -> np.ndarray:
        piece = read(self, name, index)
        sizes.setdefault(name, []).append(piece.nbytes)
        return piece

    monkeypatch.setattr(tensor_files.Tensors, "read", counting)
    params = loaded(folder, MESHES[mesh])
    for weight in hf_weights.weights(folder):
        array = hf_weights.get(params, weight.path)
        shard = 2 * int(np.prod(array.sharding.shard_shape(array.shape))) // len(weight.names)  # bytes of one layer, in the file's bfloat16
        different = len({str(index) for index in array.sharding.devices_indices_map(array.shape).values()})
        for name in weight.names:
            assert sizes[name] == [shard] * different, name
        if weight.path == "layers/mlp/gate":
            assert shard * trainer.mesh.shape["fsdp"] * trainer.mesh.shape["tensor"] == 2 * 32 * 48


def test_the_head_of_a_tied_checkpoint_is_left_aside(base: Callable[..., Path], tmp_path: Path) -> None:
    """Law: a tied model's file may hold a copy of its head and old rotary buffers; neither is a parameter, neither is exported."""
    path = base(tie_word_embeddings=True)
    before = contents(path)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    rewrite(path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 0} | inv_freq))
    folder = open_folder(str(path))
    params = loaded(folder)
    assert "lm_head" not in params
    export(params, folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


# --- refusals ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures ['LlamaForSequenceClassification']"),
        ({"model_type": "gpt2"}, "model_type 'gpt2'"),
        ({"model_type": ...}, "model_type None"),
        ({"model_type": ["llama"]}, "model_type ['llama']"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 2.0}}, "longrope"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope scaling 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 2.0}}, "low_freq_factor"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"mlp_bias": True}, "mlp_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"hidden_size": ...}, "hidden_size missing"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_config_that_we_do_not_compute_is_refused(changes: dict[str, Any], words: str, base: Callable[..., Path]) -> None:
    """Law: what would change the mathematics is an error that names it, never ignored."""
    path = base()
    open_folder(str(path))
    reconfigure(path, **changes)
    message = refusal(lambda: open_folder(str(path)))
    assert words in message
    assert "config.json" in message


def test_a_folder_that_is_no_model_is_refused(base: Callable[..., Path], tmp_path: Path) -> None:
    """Law: no config.json, one that is no JSON, no weights, no folder: one line each, which names the path."""
    path = base()
    folder = open_folder(str(path))
    (path / "model.safetensors").unlink()
    assert "no model.safetensors" in refusal(lambda: loaded(folder))
    (path / "config.json").write_text("[]")
    assert "not a JSON object" in refusal(lambda: open_folder(str(path)))
    (path / "config.json").write_text("{")
    assert "not JSON" in refusal(lambda: open_folder(str(path)))
    (path / "config.json").unlink()
    assert f"'{path}' has no config.json" in refusal(lambda: open_folder(str(path)))
    assert "nowhere" in refusal(lambda: open_folder(str(tmp_path / "nowhere")))


def test_a_missing_shard_is_refused(base: Callable[..., Path]) -> None:
    """Law: a checkpoint that lacks a file is an error that names it, and so is an index that is none."""
    path = base(max_shard_size="20KB")
    lost = sorted(path.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refusal(lambda: loaded(open_folder(str(path))))
    for text in ("[]", "{", '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(text)
        assert "model.safetensors.index.json" in refusal(lambda: loaded(open_folder(str(path))))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_only_the_files_of_the_checkpoint_are_read(max_shard_size: str, base: Callable[..., Path], tmp_path: Path) -> None:
    """Law: safetensors beside the checkpoint (Mistral's consolidated.safetensors, adapters) are neither read nor exported."""
    from safetensors.numpy import save_file

    path = base("mistral", max_shard_size=max_shard_size)
    before = contents(path)
    save_file({"layers.0.attention.wq.weight": np.ones((32, 32), np.float32)}, path / "consolidated.safetensors")
    folder = open_folder(str(path))
    export(loaded(folder), folder, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize("mesh", ["one device", "eight"])
def test_damaged_weights_are_refused(mesh: str, base: Callable[..., Path]) -> None:
    """Law: a tensor missing, unknown or of another shape, a file cut off at any point or no safetensors at all: one line, no crash."""
    path = base()
    file = path / "model.safetensors"
    good = file.read_bytes()
    folder = open_folder(str(path))

    def fault(change: Callable[[dict[str, Any]], None]) -> str:
        file.write_bytes(good)
        rewrite(path, change)
        return refusal(lambda: loaded(folder, MESHES[mesh]))

    assert "has no tensor lm_head.weight" in fault(lambda tensors: tensors.pop("lm_head.weight"))
    assert "has no tensor model.layers.1.mlp.up_proj.weight" in fault(lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "unknown tensor model.layers.2.x" in fault(lambda tensors: tensors.update({"model.layers.2.x": np.zeros(2, np.float32)}))
    name = "model.layers.1.self_attn.k_proj.weight"
    message = fault(lambda tensors: tensors.update({name: tensors[name].T.copy()}))
    assert name in message
    assert "(32, 16)" in message
    assert "(16, 32)" in message
    assert "model.norm.weight" in fault(lambda tensors: tensors.update({"model.norm.weight": np.ones(31, np.float32)}))
    assert "I32" in fault(lambda tensors: tensors.update({"model.norm.weight": np.ones(32, np.int32)}))
    for keep in (0, 4, 8, 100, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:keep])
        assert str(file) in refusal(lambda: loaded(folder, MESHES[mesh]))
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n" * 4)
    assert str(file) in refusal(lambda: loaded(folder, MESHES[mesh]))
    file.write_bytes(good)
    loaded(folder, MESHES[mesh])


# --- whole, or not there -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 2])
def test_an_export_that_fails_leaves_nothing_half_written(after: int, base: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: when writing fails after any shard the destination is not there, beside it at most the hidden .part folder; and a second
    export of other weights succeeds, with nothing of the first in it."""
    folder = open_folder(str(base()))
    params = loaded(folder)
    out = tmp_path / "runs" / "out"
    write, done = hf_export.write_tensors, []

    def failing(file: Path, *rest: Any) -> None:
        if len(done) == after:
            file.write_bytes(b"half")
            raise OSError("broken")
        done.append(file)
        write(file, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files, "SHARD_BYTES", 20_000)
        patch.setattr(hf_export, "write_tensors", failing)
        with pytest.raises(OSError, match="broken"):
            export(jax.tree.map(lambda p: p + 1, params), folder, out)
    assert [file.name for file in out.parent.iterdir()] == [".out.part"]
    export(params, folder, out)
    assert contents(out) == contents(folder.path)
    assert [file.name for file in out.parent.iterdir()] == ["out"]
    assert {file.name for file in out.iterdir()} == {"model.safetensors", "config.json", "generation_config.json", *BESIDE}


@pytest.mark.parametrize(
    ("error", "line"),
    [
        ("GatedRepoError", "'org/name' is gated; accept the licence on its page, then set HF_TOKEN"),
        ("RepositoryNotFoundError", "no folder and no hub model 'org/name'"),
        ("RevisionNotFoundError", "model.revision: 'org/name' has no branch, tag or commit 'v9'"),
        ("LocalEntryNotFoundError", "hub: cannot reach it for 'org/name', and it is not in the cache"),
        ("HFValidationError", "no such folder 'org/name', and it is not a hub name"),
    ],
)
def test_what_the_hub_refuses_is_one_line(monkeypatch, error, line):
    import huggingface_hub
    from huggingface_hub import errors

    kind = getattr(errors, error)

    def refuse(*_, **__):
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError, match=re.escape(line)) as caught:
        open_folder("org/name", "v9")
    assert "\n" not in str(caught.value)

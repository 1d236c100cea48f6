"""The families' config.json: what each published one means, what transformers' defaults are, and what is refused by name."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from families import PUBLISHED, REFUSED, SIZES, YARN

from phased_ift_jax.models import llama, mistral
from phased_ift_jax.models.attention import Rope
from phased_ift_jax.models.decoder import DecoderConfig, parameter_dims, parameter_shapes
from phased_ift_jax.models.hf_folder import FAMILIES
from phased_ift_jax.records import UserError

transformers = pytest.importorskip("transformers", reason="the truth about a config.json is what transformers makes of it")
pytest.importorskip("torch", reason="rotary frequencies are compared with transformers' on torch")

CONFIGS = {family: transformers.CONFIG_MAPPING[family] for family in FAMILIES}


def opened(family: str, attributes: dict[str, Any]) -> DecoderConfig:
    return FAMILIES[family].decoder_config(json.loads(json.dumps(attributes)))


def refusal(family: str, attributes: dict[str, Any]) -> str:
    """The one line that these attributes are refused with."""
    with pytest.raises(UserError) as caught:
        opened(family, attributes)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("config.json: ")
    return message


# --- what is published, and what is left out -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_means_what_its_family_does(name: str) -> None:
    """Law: sizes, theta, window, eps and tying are those of the family, and the parameters count to its published total."""
    attributes, config, total = PUBLISHED[name]
    assert opened(attributes["model_type"], attributes) == config
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(parameter_shapes(config, jnp.dtype("float32")))) == total


@pytest.mark.parametrize("use_diff", [True, False])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_config_that_transformers_saved_again_means_the_same(name: str, use_diff: bool) -> None:
    """Law: what the installed transformers makes of a published config.json, short or in full, opens to the same sizes."""
    attributes, config, _ = PUBLISHED[name]
    again = json.loads(CONFIGS[attributes["model_type"]](**attributes).to_json_string(use_diff=use_diff))
    assert "rope_parameters" in again, "this is transformers 5's spelling"
    assert opened(attributes["model_type"], again) == config


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family: str) -> None:
    """Law: an attribute that config.json leaves out has the value that transformers' class of the family gives it."""
    sizes = SIZES | {"hidden_size": 64, "num_attention_heads": 32}
    config, theirs = opened(family, sizes), CONFIGS[family](**sizes)
    for name in ("rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.num_kv_heads == theirs.num_key_value_heads
    assert config.head_dim == getattr(theirs, "head_dim", 64 // 32)
    assert config.sliding_window == getattr(theirs, "sliding_window", None)
    assert config.rope == Rope(theirs.rope_parameters["rope_theta"]) == Rope(10_000.0)
    assert theirs.hidden_act == "silu"
    for name, value in FAMILIES[family].DEFAULTS.items():
        assert value is None or getattr(CONFIGS[family], name) == value, name
    assert opened(family, sizes | {"num_key_value_heads": None, "head_dim": None}) == replace(config, num_kv_heads=32)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_attribute_that_transformers_writes_has_a_decision(family: str) -> None:
    """Law: the table knows every attribute of the installed transformers' class, and a config of all their defaults opens."""
    attributes = json.loads(CONFIGS[family]().to_json_string(use_diff=False))
    assert set(attributes) - set(FAMILIES[family].ATTRIBUTES) == set()
    opened(family, attributes)
    generation = transformers.GenerationConfig._get_default_generation_params()
    assert set(generation) - set(FAMILIES[family].ATTRIBUTES) == set(), "transformers 4 wrote these into config.json"
    assert opened(family, attributes | generation) == opened(family, attributes)


# what transformers 4 wrote, and what is common in published files, without an effect on the mathematics
HARMLESS = {
    "transformers 4.31 in full": {
        "add_cross_attention": False,
        "cross_attention_hidden_size": None,
        "decoder_start_token_id": None,
        "finetuning_task": None,
        "is_decoder": False,
        "prefix": None,
        "pruned_heads": {},
        "sep_token_id": None,
        "task_specific_params": None,
        "tf_legacy_loss": False,
        "tie_encoder_decoder": False,
        "tokenizer_class": None,
        "torchscript": False,
        "use_bfloat16": False,
    },
    "4.48": {"_attn_implementation_autoset": True, "head_dim": 8},
    "the first Llama conversions": {"max_sequence_length": 2048, "pad_token_id": -1},
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}},
    "nothing set": {"quantization_config": None, "auto_map": None, "sliding_window": None, "layer_types": None, "use_sliding_window": False, "partial_rotary_factor": None},
    "swish": {"hidden_act": "swish"},
    "all layers attend fully": {"layer_types": ["full_attention", "full_attention"]},
    "split matmuls": {"pretraining_tp": 4},
    "whole rotation": {"partial_rotary_factor": 1.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1}},
    "both spellings that agree": {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 10000}, "rope_scaling": {"type": "default", "rope_type": "default"}},
}


@pytest.mark.parametrize("case", HARMLESS)
def test_what_has_no_effect_is_let_through(case: str) -> None:
    """Law: attributes without an effect on the mathematics, or that state what we compute, change nothing."""
    assert opened("llama", SIZES | HARMLESS[case]) == opened("llama", SIZES)
    no_window = SIZES | {"num_key_value_heads": 2, "sliding_window": None}
    assert opened("mistral", no_window | HARMLESS[case]) == opened("mistral", no_window)


def test_what_states_the_window_must_agree_with_it() -> None:
    """Law: `layer_types`, `use_sliding_window` and `max_window_layers` are let through where they say what every layer does here."""
    base = SIZES | {"num_key_value_heads": 2, "sliding_window": 8}
    sliding, full = ["sliding_attention"] * 2, ["full_attention"] * 2
    assert opened("mistral", base | {"layer_types": sliding, "use_sliding_window": True, "max_window_layers": 0}) == opened("mistral", base)
    for name, value in {"layer_types": full, "use_sliding_window": False, "max_window_layers": 1}.items():
        message = refusal("mistral", base | {name: value})
        assert f"{name} {value!r}" in message
        assert "sliding_window 8" in message
    for family, extra in {"llama": {}, "mistral": {"num_key_value_heads": 2, "sliding_window": None}}.items():
        for name, value in {"layer_types": sliding, "use_sliding_window": True}.items():
            assert f"{name} {value!r}" in refusal(family, SIZES | extra | {name: value})
        assert "layer_types ['full_attention']" in refusal(family, SIZES | extra | {"layer_types": ["full_attention"]})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_table_of_tensors_names_every_parameter_once(family: str) -> None:
    """Law: what is read and written is what the model consists of."""
    parameters = jax.tree.leaves_with_path(parameter_dims(opened(family, SIZES | {"num_key_value_heads": 4})))
    assert sorted(path for path, *_ in FAMILIES[family].WEIGHTS) == sorted(jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in parameters)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_is_the_one_of_every_layer_of_transformers(family: str) -> None:
    """Law: however config.json states windows, what opens has transformers' window in every layer; what has several is refused."""
    found = set()
    for window, used, first in itertools.product((..., None, 8), (..., True, False), (..., 0, 1, 2, 28)):
        stated = {"sliding_window": window, "use_sliding_window": used, "max_window_layers": first}
        attributes = SIZES | {"num_key_value_heads": 4} | {name: value for name, value in stated.items() if value is not ...}
        theirs = CONFIGS[family](**attributes)
        kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
        try:
            ours = opened(family, attributes).sliding_window
        except UserError:
            continue
        assert {getattr(theirs, "sliding_window", None) if kind == "sliding_attention" else None for kind in kinds} == {ours}, attributes
        found.add(ours)
    assert found == ({None} if family == "llama" else {None, 8, 4096})


# --- what is refused -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED, ids=lambda value: value[:60].encode("ascii", "backslashreplace").decode() if isinstance(value, str) else "")
def test_what_we_do_not_compute_is_refused_by_name(family: str, changes: dict[str, Any], words: str) -> None:
    """Law: an attribute or a value that we do not compute, or do not know, is one line that names it and its value."""
    fits = SIZES | ({"num_key_value_heads": 4} if family != "llama" and changes else {})
    assert words in refusal(family, fits | changes)


@pytest.mark.parametrize("name", SIZES)
def test_a_missing_size_is_refused(name: str) -> None:
    """Law: the five sizes have no default here: a config.json without one is not the model's."""
    assert f"{name} missing" in refusal("llama", {key: value for key, value in SIZES.items() if key != name})


def test_a_slip_of_the_pen_is_answered_with_the_name() -> None:
    """Law: an unknown attribute near a known one is refused with the known one's name."""
    assert "did you mean rms_norm_eps?" in refusal("llama", SIZES | {"rms_norm_epsilon": 1e-6})


def test_a_long_value_does_not_make_a_long_line() -> None:
    """Law: a value is shown, however long, in a line that a terminal holds."""
    assert len(refusal("llama", SIZES | {"quantization_config": {"bits": 4, "names": ["x" * 50] * 50}})) < 300


# --- rotary frequencies ----------------------------------------------------------------------------------------------------------


def drawn_ropes(count: int) -> list[tuple[str, dict[str, Any]]]:
    """Families and attributes with rotary scalings of every kind, their optional numbers there or not."""
    rng = np.random.default_rng(0)

    def some(options: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in options.items() if rng.random() < 0.5}

    drawn = []
    for _ in range(count):
        kind = str(rng.choice(["default", "linear", "llama3", "yarn"]))
        length = int(rng.choice([64, 2048, 8192]))
        numbers = {"rope_type": kind} | some({"rope_theta": float(rng.choice([500.0, 1e4, 5e5, 1e6]))})
        if kind != "default":
            numbers["factor"] = float(rng.choice([1.0, 2.0, 4.0, 40.0]))
        if kind == "llama3":
            numbers |= {"low_freq_factor": 1.0, "high_freq_factor": float(rng.choice([2.0, 4.0]))} | some({"original_max_position_embeddings": length})
        if kind == "yarn":
            numbers |= some({"original_max_position_embeddings": length, "truncate": bool(rng.random() < 0.5), "attention_factor": 0.7})
            numbers |= some({"beta_fast": int(rng.choice([2, 8, 32])), "beta_slow": float(rng.choice([1, 2]))})
            numbers |= some({"mscale": float(rng.choice([0.707, 1.0])), "mscale_all_dim": float(rng.choice([0.0, 0.5]))})
            numbers |= {name: None for name in ("factor", "beta_fast") if rng.random() < 0.2}
        attributes = SIZES | {"head_dim": int(rng.choice([4, 8, 64, 128])), "num_key_value_heads": 4} | some({"max_position_embeddings": 4 * length})
        outside = {} if "original_max_position_embeddings" in numbers else some({"original_max_position_embeddings": length // 2})
        drawn.append((str(rng.choice(sorted(FAMILIES))), attributes | outside | {"rope_parameters": numbers}))
    return drawn


def test_rotary_frequencies_are_those_of_transformers(measured: Callable[[str, float], None]) -> None:
    """Law: for scalings drawn at random, the frequencies are transformers' within two float32 roundings of the unscaled ones, and the
    factor on cosines and sines within 1e-7; an original length that is left out is the config's own, at last the family's."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    kinds: dict[str, int] = {}
    no_ramp = SIZES | {"rope_parameters": YARN | {"beta_fast": 2, "beta_slow": 2, "truncate": False}}
    for family, attributes in [*drawn_ropes(200), ("llama", no_ramp | {"head_dim": 8})]:
        config = CONFIGS[family](**json.loads(json.dumps(attributes)))
        compute = ROPE_INIT_FUNCTIONS.get(config.rope_parameters["rope_type"], LlamaRotaryEmbedding.compute_default_rope_parameters)
        theirs, attention_factor = compute(config)
        rope = opened(family, attributes).rope
        plain = Rope(rope.theta).frequencies(attributes["head_dim"])
        worst = np.abs((rope.frequencies(attributes["head_dim"]) - theirs.numpy()) / plain).max()
        measured("rotary frequencies against transformers, of the unscaled ones (<= 2.4e-7)", worst)
        assert worst <= 2.4e-7, attributes
        assert rope.attention_factor == pytest.approx(attention_factor, rel=1e-7), attributes
        again = json.loads(config.to_json_string(use_diff=False))
        assert opened(family, again).rope == rope, "transformers 5 saves it again"
        kinds[rope.kind] = kinds.get(rope.kind, 0) + (rope.attention_factor != 1.0 or rope.kind != "yarn")
    assert min(kinds.values()) > 10, kinds
    assert len(kinds) == 4


def test_old_spellings_of_a_scaling_mean_the_same() -> None:
    """Law: `rope_scaling` with `type` and a `rope_theta` beside it (transformers 4) is `rope_parameters` (transformers 5)."""
    numbers = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}
    new = opened("llama", SIZES | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6} | numbers})
    assert new.rope == Rope(1e6, "yarn", 4.0, original_max_position_embeddings=64, beta_fast=16.0, attention_factor=0.1 * math.log(4) + 1)
    for spelling in ({"type": "yarn"}, {"rope_type": "yarn"}, {"type": "yarn", "rope_type": "yarn"}):
        assert opened("llama", SIZES | {"rope_theta": 1e6, "rope_scaling": spelling | numbers}) == new
    assert hash(new) == hash(opened("llama", SIZES | {"rope_theta": 1e6, "rope_scaling": {"type": "yarn"} | numbers}))


def test_the_families_share_one_table() -> None:
    """Law: Mistral's table is Llama's but for the window, which is a number there and none here."""
    assert {name for name in mistral.ATTRIBUTES if mistral.ATTRIBUTES[name] is not llama.ATTRIBUTES.get(name)} == {"sliding_window"}
    assert llama.ATTRIBUTES.keys() == mistral.ATTRIBUTES.keys()

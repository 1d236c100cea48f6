"""The families' config.json: what each published one means, what transformers' defaults are, and what is refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from phased_ift_jax.models import llama, mistral
from phased_ift_jax.models.attention import Rope
from phased_ift_jax.models.decoder import DecoderConfig, parameter_shapes
from phased_ift_jax.models.hf_folder import FAMILIES
from phased_ift_jax.records import UserError

transformers = pytest.importorskip("transformers", reason="the truth about a config.json is what transformers makes of it")
pytest.importorskip("torch", reason="rotary frequencies are compared with transformers' on torch")

CONFIGS = {"llama": transformers.LlamaConfig, "mistral": transformers.MistralConfig}

# config.json as the repositories publish them, without what all of them share
SHARED = {"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "initializer_range": 0.02, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "use_cache": True}
LLAMA_2 = SHARED | {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "vocab_size": 32000,
}
# as first uploaded: matmuls in 2 slices, 2048 positions
LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 40}
LLAMA_2_13B = LLAMA_2 | LLAMA_13B | {"max_position_embeddings": 2048, "pad_token_id": 0, "pretraining_tp": 2}
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80, "num_key_value_heads": 8}
LLAMA_3 = LLAMA_2 | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": 128256,
}
LLAMA_3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
LLAMA_31 = LLAMA_3 | {"max_position_embeddings": 131072, "mlp_bias": False, "rope_scaling": LLAMA_3_ROPE, "transformers_version": "4.43.0.dev0"}
MISTRAL = SHARED | {
    "architectures": ["MistralForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 32768,
    "model_type": "mistral",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "vocab_size": 32000,
}
MISTRAL_2 = MISTRAL | {"attention_dropout": 0.0, "rope_theta": 1000000.0, "sliding_window": None, "transformers_version": "4.36.0"}
TINYLLAMA = LLAMA_2 | {"hidden_size": 2048, "intermediate_size": 5632, "max_position_embeddings": 2048, "num_hidden_layers": 22, "num_key_value_heads": 4, "torch_dtype": "float32"}

LLAMA_31_ROPE = Rope(5e5, "llama3", 8.0, 1.0, 4.0, 8192)
PUBLISHED: dict[str, tuple[dict[str, Any], DecoderConfig, int]] = {
    "Llama-2-7b-hf": (LLAMA_2, DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128), 6_738_415_616),
    "Llama-2-13b-hf": (LLAMA_2_13B, DecoderConfig(32000, 5120, 13824, 40, 40, 40, 128), 13_015_864_320),
    "Llama-2-70b-hf": (LLAMA_2 | LLAMA_70B, DecoderConfig(32000, 8192, 28672, 80, 64, 8, 128), 68_976_648_192),
    "Meta-Llama-3-8B": (LLAMA_3, DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, Rope(5e5)), 8_030_261_248),
    "Meta-Llama-3-70B": (LLAMA_3 | LLAMA_70B, DecoderConfig(128256, 8192, 28672, 80, 64, 8, 128, Rope(5e5)), 70_553_706_496),
    "Llama-3.1-8B": (LLAMA_31, DecoderConfig(128256, 4096, 14336, 32, 32, 8, 128, LLAMA_31_ROPE), 8_030_261_248),
    "Llama-3.1-70B": (LLAMA_31 | LLAMA_70B, DecoderConfig(128256, 8192, 28672, 80, 64, 8, 128, LLAMA_31_ROPE), 70_553_706_496),
    "Mistral-7B-v0.1": (MISTRAL, DecoderConfig(32000, 4096, 14336, 32, 32, 8, 128, sliding_window=4096), 7_241_732_096),
    "Mistral-7B-Instruct-v0.2": (MISTRAL_2, DecoderConfig(32000, 4096, 14336, 32, 32, 8, 128, Rope(1e6)), 7_241_732_096),
    "Mistral-7B-v0.3": (MISTRAL_2 | {"vocab_size": 32768, "transformers_version": "4.42.0.dev0"}, DecoderConfig(32768, 4096, 14336, 32, 32, 8, 128, Rope(1e6)), 7_248_023_552),
    "TinyLlama-1.1B": (TINYLLAMA, DecoderConfig(32000, 2048, 5632, 22, 32, 4, 64), 1_100_048_384),
}
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


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
    sizes = SIZES | {"num_attention_heads": 8}
    config, theirs = opened(family, sizes), CONFIGS[family](**sizes)
    for name in ("head_dim", "rms_norm_eps", "tie_word_embeddings", "initializer_range"):
        assert getattr(config, name) == getattr(theirs, name), name
    assert config.num_kv_heads == theirs.num_key_value_heads == 8
    assert config.sliding_window == getattr(theirs, "sliding_window", None) == {"llama": None, "mistral": 4096}[family]
    assert config.rope == Rope(theirs.rope_parameters["rope_theta"]) == Rope(10_000.0)
    assert theirs.hidden_act == "silu"
    for name, value in FAMILIES[family].DEFAULTS.items():
        assert value is None or getattr(CONFIGS[family](), name) == value, name
    assert opened(family, sizes | {"num_key_value_heads": None, "head_dim": None}) == config


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


# --- what is refused -------------------------------------------------------------------------------------------------------------

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
NAN = float("nan")
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    # numbers of a wrong kind
    *((family, {name: value}, f"{name} {value!r}") for family in FAMILIES for name in ("vocab_size", "hidden_size") for value in ("4096", -1, 0, 32.0, NAN, True, None)),
    *(("llama", {name: value}, f"{name} {value!r}") for name in ("rms_norm_eps", "rope_theta", "initializer_range") for value in ("1e-5", -1.0, NAN, True, float("inf"), None)),
    *(("llama", {name: value}, f"{name} {value!r}") for name in ("num_key_value_heads", "head_dim", "num_hidden_layers") for value in (0, -2, "2", 2.0, False)),
    ("mistral", {"max_position_embeddings": "32768"}, "max_position_embeddings '32768'"),
    ("llama", {"rms_norm_eps": 10**400}, "rms_norm_eps 1000"),
    ("llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings 'yes'"),
    ("llama", {"tie_word_embeddings": 1}, "tie_word_embeddings 1"),
    ("llama", {"pretraining_tp": 0}, "pretraining_tp 0"),
    # sizes that do not fit together
    ("llama", {"num_attention_heads": 5}, "hidden_size 32"),
    ("llama", {"num_key_value_heads": 3}, "num_key_value_heads 3"),
    ("mistral", {}, "num_key_value_heads 8"),
    ("llama", {"head_dim": 7}, "head_dim 7"),
    ("llama", {"hidden_size": 36}, "head_dim 9"),
    # other mathematics
    *((family, {name: True}, f"{name} True") for family in FAMILIES for name in ("attention_bias", "mlp_bias", "rope_interleaved")),
    *(("llama", {name: True}, f"{name} True") for name in ("is_encoder_decoder", "add_cross_attention", "torchscript")),
    ("llama", {"attention_bias": 0}, "attention_bias 0"),
    ("llama", {"is_causal": False}, "is_causal False"),
    ("mistral", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act ['silu']"),
    ("llama", {"sliding_window": 4096}, "sliding_window 4096"),
    *(("mistral", {"sliding_window": value}, f"sliding_window {value!r}") for value in (0, -1, "8", 8.0, True)),
    ("llama", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config {'quant_method': 'gptq', 'bits': 4}"),
    ("llama", {"quantization_config": {}}, "quantization_config {}"),
    ("mistral", {"auto_map": {"AutoModel": "modeling.Own"}}, "auto_map {'AutoModel': 'modeling.Own'}"),
    ("llama", {"pruned_heads": {"1": [0]}}, "pruned_heads {'1': [0]}"),
    ("llama", {"per_layer_config": {"0": {"hidden_act": "gelu"}}}, "per_layer_config {'0': {'hidden_act': 'gelu'}}"),
    ("llama", {"num_local_experts": 8}, "num_local_experts 8"),
    ("mistral", {"num_experts_per_tok": 2}, "num_experts_per_tok 2"),
    ("llama", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
    ("llama", {"an_invention": "x\ny"}, "an_invention 'x\\ny'"),
    # rotary positions
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"rope_theta": 1e6, "rope_parameters": {"rope_theta": 1e4}}, "rope_theta 1000000.0"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, "rope_scaling"),
    ("llama", {"rope_scaling": "linear"}, "rope_scaling 'linear'"),
    ("llama", {"rope_scaling": {"factor": 2.0}}, "rope_scaling.factor 2.0"),
    ("llama", {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}}, "rope_scaling.type 'linear'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor '2'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "needs factor"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "beta_fast": 32}}, "rope_scaling.beta_fast 32"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}}, "rope_scaling.partial_rotary_factor 0.25"),
    *(("llama", {"rope_scaling": {"type": kind, "factor": 2.0}}, f"rope scaling {kind!r}") for kind in ("dynamic", "longrope", "su", "proportional", "mrope", None, ["yarn"])),
    ("llama", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters.full_attention {'rope_type': 'default'}"),
    ("llama", {"rope_parameters": {key: value for key, value in YARN.items() if key != "factor"}}, "needs factor"),
    *(
        ("mistral", {"rope_parameters": YARN | {name: value}}, f"rope_parameters.{name} {value!r}")
        for name, value in {"factor": 0, "attention_factor": 0.0, "beta_fast": -1, "truncate": 1, "mscale": "1", "rope_theta": 1.0, "x": 1}.items()
    ),
    ("llama", {"rope_parameters": YARN, "original_max_position_embeddings": 32}, "original_max_position_embeddings 32"),
    ("llama", {"rope_parameters": {**LLAMA_3_ROPE, "low_freq_factor": 4.0}}, "high_freq_factor 4.0"),
    ("llama", {"rope_parameters": {key: value for key, value in LLAMA_3_ROPE.items() if key != "low_freq_factor"}}, "needs low_freq_factor"),
]


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED, ids=lambda value: value[:60].encode("ascii", "backslashreplace").decode() if isinstance(value, str) else "")
def test_what_we_do_not_compute_is_refused_by_name(family: str, changes: dict[str, Any], words: str) -> None:
    """Law: an attribute or a value that we do not compute, or do not know, is one line that names it and its value."""
    fits = SIZES | ({"num_key_value_heads": 4} if family == "mistral" and changes else {})
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

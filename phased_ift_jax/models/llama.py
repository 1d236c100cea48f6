"""The Llama family (2, and 3 with its RoPE scaling): what config.json means, and which tensor holds which parameter.

Every attribute of config.json has a decision in `ATTRIBUTES`: read as a size or a number, let through at the values that we compute, or
known to have no effect. Any other attribute may change the mathematics and is refused.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from phased_ift_jax.models.attention import Rope, yarn_attention_factor
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import UserError

# ours, theirs, and how a dim of one becomes dims of the other; read left to right on import, right to left on export
WEIGHTS = (
    ("embed", "model.embed_tokens.weight", "VD->VD"),
    ("layers/attention/q", "model.layers.{}.self_attn.q_proj.weight", "(NH)D->NHD"),
    ("layers/attention/k", "model.layers.{}.self_attn.k_proj.weight", "(KH)D->KHD"),
    ("layers/attention/v", "model.layers.{}.self_attn.v_proj.weight", "(KH)D->KHD"),
    ("layers/attention/o", "model.layers.{}.self_attn.o_proj.weight", "D(NH)->NHD"),
    ("layers/mlp/gate", "model.layers.{}.mlp.gate_proj.weight", "FD->DF"),
    ("layers/mlp/up", "model.layers.{}.mlp.up_proj.weight", "FD->DF"),
    ("layers/mlp/down", "model.layers.{}.mlp.down_proj.weight", "DF->FD"),
    ("layers/attention_norm", "model.layers.{}.input_layernorm.weight", "E->E"),
    ("layers/mlp_norm", "model.layers.{}.post_attention_layernorm.weight", "E->E"),
    ("norm", "model.norm.weight", "E->E"),
    ("lm_head", "lm_head.weight", "VD->DV"),
)
ARCHITECTURE = "LlamaForCausalLM"


@dataclass(frozen=True)
class Kind:
    """What an attribute's value must be, and in words."""

    words: str
    holds: Callable[[Any], bool]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.holds(value))


def _only(*values: Any, why: str = "") -> Kind:
    """One of these values: True is not 1, and 1 is 1.0."""
    words = " or ".join("null" if value is None else repr(value) for value in values)
    return Kind(words + why, lambda value: any(isinstance(value, bool) == isinstance(one, bool) and value == one for one in values))


ANYTHING = Kind("anything", lambda value: True)
COUNT = Kind("a whole number above 0", lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0)
COUNT_OR_NULL = _or_null(COUNT)
NUMBER = Kind("a number above 0", lambda value: _number(value) and value > 0)
NOT_BELOW_0 = Kind("a number not below 0", lambda value: _number(value) and value >= 0)
THETA = Kind("a number above 1", lambda value: _number(value) and value > 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
LIST = Kind("a list", lambda value: isinstance(value, list))

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
DTYPE = _only("float32", "bfloat16", "float16", "float64", None)
READ = dict.fromkeys(SIZES, COUNT) | {
    "num_key_value_heads": COUNT_OR_NULL,
    "head_dim": COUNT_OR_NULL,
    "max_position_embeddings": COUNT,
    "original_max_position_embeddings": COUNT_OR_NULL,
    "rms_norm_eps": NUMBER,
    "initializer_range": NOT_BELOW_0,
    "tie_word_embeddings": FLAG,
    "rope_theta": THETA,
    "rope_scaling": _or_null(OBJECT),
    "rope_parameters": _or_null(OBJECT),
    "layer_types": _or_null(LIST),
    "dtype": DTYPE,
    "torch_dtype": DTYPE,
    "use_sliding_window": _or_null(FLAG),
    "max_window_layers": _or_null(NOT_BELOW_0),
}
# A Llama with a window is refused: transformers masks none in the forward pass, but drops keys from the cache of `generate` (5.23).
# attention_dropout: transformers drops in training. torchscript: transformers 4 untied the head.
FIXED = {
    "hidden_act": _only("silu", "swish"),
    "sliding_window": _only(None),
    "partial_rotary_factor": _only(1.0, None),
    "rope_interleaved": _only(False),
    "use_mrope": _only(False),
    "attention_dropout": _only(0.0, why=": attention has no dropout here"),
    "attention_bias": _only(False),
    "mlp_bias": _only(False),
    "is_causal": _only(True),
    "is_encoder_decoder": _only(False),
    "add_cross_attention": _only(False),
    "cross_attention_hidden_size": _only(None),
    "tie_encoder_decoder": _only(False),
    "torchscript": _only(False),
    "pruned_heads": _only({}, None),
    "per_layer_config": _only({}, None),
    "quantization_config": _only(None, why=": give the weights as they were before quantization"),
    "auto_map": _only(None, why=": a model's own code is not run; remove it if transformers needs none"),
}
# Token ids, names, precision, file format; what is returned; heads of classifiers; speed switches; generation defaults that transformers 4
# kept here; marks that other tools leave. pretraining_tp, a whole number, belongs here too: transformers 4 split matmuls into so many
# slices with the same sum, transformers 5 does not read it, and Llama-2-13b was first uploaded with 2.
NO_EFFECT = """
    architectures model_type transformers_version _name_or_path name_or_path _commit_hash tokenizer_class
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id max_sequence_length
    use_cache return_dict use_return_dict output_attentions output_hidden_states tie_last_hidden_states is_decoder chunk_size_feed_forward
    id2label label2id num_labels problem_type finetuning_task task_specific_params prefix
    attn_implementation _attn_implementation _attn_implementation_autoset _flash_attn_2_enabled
    gradient_checkpointing use_bfloat16 tf_legacy_loss xla_device
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p
    repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size encoder_repetition_penalty bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id remove_invalid_values
    exponential_decay_length_penalty suppress_tokens begin_suppress_tokens epsilon_cutoff eta_cutoff
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    is_llama_config transformers.js_config unsloth_version unsloth_fixed
""".split()  # noqa: SIM905 - as a list, it would be 70 lines
ATTRIBUTES: dict[str, Kind] = READ | FIXED | {"pretraining_tp": COUNT_OR_NULL} | dict.fromkeys(NO_EFFECT, ANYTHING)
# transformers' values of what config.json leaves out; the sizes have none here, a file without them is not the model's
DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": None,
    "head_dim": None,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
    "sliding_window": None,
}

# inside rope_parameters (or rope_scaling): what all kinds may have, what each kind has, and which of that it must have
ROPE_SHARED = {"rope_type": ANYTHING, "type": ANYTHING, "rope_theta": THETA, "partial_rotary_factor": _only(1.0, None)}
ROPES: dict[str, dict[str, Kind]] = {
    "default": {},
    "linear": {"factor": NUMBER},
    "llama3": {"factor": NUMBER, "low_freq_factor": NUMBER, "high_freq_factor": NUMBER, "original_max_position_embeddings": COUNT},
    "yarn": {"factor": _or_null(NUMBER), "original_max_position_embeddings": COUNT, "attention_factor": _or_null(NUMBER), "truncate": FLAG}
    | dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), _or_null(NOT_BELOW_0)),
}
ROPE_NEEDS = ("factor", "low_freq_factor", "high_freq_factor")
ROPE_REASONS = {
    "dynamic": "; its frequencies follow the longest row seen, so that packing would change them",
    "longrope": "; its frequencies follow the length of the row, so that packing would change them",
}


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Sizes from a Llama config.json.

    Raises:
        UserError: a size is missing, or an attribute is unknown or has a value that this decoder does not compute.
    """
    return from_attributes(hf, ATTRIBUTES, DEFAULTS)


def from_attributes(hf: dict[str, Any], attributes: Mapping[str, Kind], defaults: Mapping[str, Any]) -> DecoderConfig:
    """A decoder from config.json, by a family's table and its defaults."""
    check(hf, attributes)
    if missing := [name for name in SIZES if name not in hf]:
        raise UserError(f"config.json: {', '.join(missing)} missing; the model's own config.json has every size")
    hf = {**defaults, **hf}
    hidden, heads = hf["hidden_size"], hf["num_attention_heads"]
    kv_heads, head_dim = hf["num_key_value_heads"] or heads, hf["head_dim"] or hidden // heads
    if heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if not hf["head_dim"] and hidden % heads:
        raise UserError(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}; then head_dim must be given")
    if head_dim % 2:
        raise UserError(f"config.json: head_dim {head_dim} is odd; rotary positions turn pairs of coordinates")
    _check_layers(hf)
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=rope_from(hf),
        rms_norm_eps=hf["rms_norm_eps"],
        sliding_window=hf["sliding_window"],
        tie_word_embeddings=hf["tie_word_embeddings"],
        initializer_range=hf["initializer_range"],
    )


def rope_from(hf: dict[str, Any]) -> Rope:
    """Rotary positions as transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) write them.

    Raises:
        UserError: a scaling that is not default, linear, llama3 or yarn, a number missing, unknown or wrong, two spellings that disagree.
    """
    found = {name: _rope(hf, name, hf[name]) for name in ("rope_parameters", "rope_scaling") if hf.get(name)} or {"": _rope(hf, "", {})}
    if len(set(found.values())) > 1:
        raise UserError(f"config.json: rope_scaling {_shown(hf['rope_scaling'])} disagrees with rope_parameters {_shown(hf['rope_parameters'])}; leave one of them out")
    return next(iter(found.values()))


def _rope(hf: dict[str, Any], where: str, scaling: dict[str, Any]) -> Rope:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if scaling.get("type", kind) != kind:
        raise UserError(f"config.json: {where}.type {_shown(scaling['type'])} disagrees with rope_type {_shown(kind)}; leave type out")
    if not isinstance(kind, str) or kind not in ROPES:
        raise UserError(f"config.json: rope scaling {_shown(kind)} is not supported (only {', '.join(ROPES)}){ROPE_REASONS.get(str(kind), '')}")
    check(scaling, ROPE_SHARED | ROPES[kind], f"{where}.")
    if missing := [name for name in ROPE_NEEDS if name in ROPES[kind] and name not in scaling]:
        raise UserError(f"config.json: rope scaling {kind!r} needs {', '.join(missing)}")
    theta = float(_agreed(hf, where, scaling, "rope_theta", 10_000.0))
    if kind in ("default", "linear"):
        return Rope(theta, kind, scaling.get("factor", 1.0))
    # as transformers 5 completes it: beside the scaling, else in it, else the length that the model was made for
    longest = hf.get("max_position_embeddings", DEFAULTS["max_position_embeddings"])
    original = _agreed(hf, where, scaling, "original_max_position_embeddings", longest)
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        if high <= low:
            raise UserError(f"config.json: {where}.high_freq_factor {high} is not above low_freq_factor {low}")
        return Rope(theta, kind, scaling["factor"], low, high, original)
    factor = scaling["factor"] or longest / original
    return Rope(
        theta,
        kind,
        factor,
        original_max_position_embeddings=original,
        beta_fast=scaling.get("beta_fast") or 32,
        beta_slow=scaling.get("beta_slow") or 1,
        truncate=scaling.get("truncate", True),
        attention_factor=scaling.get("attention_factor") or yarn_attention_factor(factor, scaling.get("mscale"), scaling.get("mscale_all_dim")),
    )


def _agreed(hf: dict[str, Any], where: str, scaling: dict[str, Any], name: str, default: float) -> Any:
    """A number that may stand beside the scaling or in it; in both places, it must be the same."""
    inside, beside = scaling.get(name), hf.get(name)
    if None not in (inside, beside) and inside != beside:
        raise UserError(f"config.json: {name} {beside!r} disagrees with {where}.{name} {inside!r}; leave one of them out")
    return next((value for value in (inside, beside) if value is not None), default)


def _check_layers(hf: dict[str, Any]) -> None:
    """Refuse a statement about the layers' windows that is not what every layer does here: the same window, or none."""
    window = hf["sliding_window"]
    stated = {"layer_types": ["full_attention" if window is None else "sliding_attention"] * hf["num_hidden_layers"], "use_sliding_window": window is not None}
    if window is not None:
        stated["max_window_layers"] = 0
    for name, value in stated.items():
        if hf.get(name) is not None and hf[name] != value:
            raise UserError(f"config.json: {name} {_shown(hf[name])} does not agree with sliding_window {window} in every layer; it must be {_shown(value)}")


def check(hf: dict[str, Any], table: Mapping[str, Kind], where: str = "") -> None:
    """Refuse the first attribute that the table does not know, or whose value is not of its kind."""
    for name, value in hf.items():
        if name not in table:
            near = difflib.get_close_matches(name, table, n=1, cutoff=0.8)
            advice = f"did you mean {where}{near[0]}?" if near else "it may change what the model computes; remove it if it does not"
            raise UserError(f"config.json: unknown attribute {where}{name} {_shown(value)}; {advice}")
        if not table[name].holds(value):
            raise UserError(f"config.json: {where}{name} {_shown(value)} is not supported; it must be {table[name].words}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

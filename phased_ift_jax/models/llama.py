"""The Llama family (2, and 3 with its RoPE scaling): how config.json gives sizes, and which tensor holds which parameter."""

from __future__ import annotations

from typing import Any

from phased_ift_jax.models.attention import Rope
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import UserError

# ours, theirs, and how a dim of one becomes dims of the other; read left to right on import, right to left on export
WEIGHTS = (
    ("embed", "model.embed_tokens.weight", "VD->VD"),
    ("layers/attention/q", "model.layers.{}.self_attn.q_proj.weight", "(NH)D->DNH"),
    ("layers/attention/k", "model.layers.{}.self_attn.k_proj.weight", "(KH)D->DKH"),
    ("layers/attention/v", "model.layers.{}.self_attn.v_proj.weight", "(KH)D->DKH"),
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
# attributes that change the mathematics and that this decoder computes for one value only
FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "quantization_config": None}


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Sizes from a Llama config.json.

    Raises:
        UserError: a size is missing, or an attribute has a value that this decoder does not compute.
    """
    return from_attributes(hf, FIXED, sliding_window=None)


def from_attributes(hf: dict[str, Any], fixed: dict[str, Any], sliding_window: int | None) -> DecoderConfig:
    """A decoder from attributes that Llama and Mistral spell alike; `fixed` names those with a single value that we compute."""
    for name, value in fixed.items():
        if hf.get(name, value) != value:
            raise UserError(f"config.json: {name} {hf[name]!r} is not supported (only {value!r})")
    missing = [name for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads") if not isinstance(hf.get(name), int)]
    if missing:
        raise UserError(f"config.json: {', '.join(missing)} missing or not a whole number")
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    return DecoderConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        intermediate_size=hf["intermediate_size"],
        num_layers=hf["num_hidden_layers"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=hf.get("head_dim") or hf["hidden_size"] // heads,
        rope=rope_from(hf),
        rms_norm_eps=hf.get("rms_norm_eps", 1e-6),
        sliding_window=sliding_window,
        tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
        initializer_range=hf.get("initializer_range", 0.02),
    )


def rope_from(hf: dict[str, Any]) -> Rope:
    """Rotary positions as transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`) write them.

    Raises:
        UserError: a scaling that is not default, linear or llama3, or one with a number missing.
    """
    scaling = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    theta = scaling.get("rope_theta", hf.get("rope_theta", 10_000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    numbers = {
        "default": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
    if kind not in numbers:
        raise UserError(f"config.json: rope scaling {kind!r} is not supported (only {', '.join(numbers)})")
    missing = [name for name in numbers[kind] if name not in scaling]
    if missing:
        raise UserError(f"config.json: rope scaling {kind!r} needs {', '.join(missing)}")
    return Rope(float(theta), kind, **{name: scaling[name] for name in numbers[kind]})

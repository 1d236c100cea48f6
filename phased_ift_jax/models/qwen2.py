"""The Qwen2 family (2 and 2.5): Llama with a bias on queries, keys and values, and a window that upper layers may have."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from phased_ift_jax.models import llama
from phased_ift_jax.models.decoder import DecoderConfig

ARCHITECTURE = "Qwen2ForCausalLM"
WEIGHTS = (
    *llama.WEIGHTS,
    ("layers/attention/q_bias", "model.layers.{}.self_attn.q_proj.bias", "(NH)->NH"),
    ("layers/attention/k_bias", "model.layers.{}.self_attn.k_proj.bias", "(KH)->KH"),
    ("layers/attention/v_bias", "model.layers.{}.self_attn.v_proj.bias", "(KH)->KH"),
)
ATTRIBUTES = llama.ATTRIBUTES | {"sliding_window": llama.COUNT_OR_NULL, "use_sliding_window": llama.FLAG, "max_window_layers": llama.NOT_BELOW_0}
# transformers' Qwen2Config, where it differs from LlamaConfig
WINDOWS = {"sliding_window": 4096, "use_sliding_window": False, "max_window_layers": 28}
DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 32, "max_position_embeddings": 32_768} | WINDOWS


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Sizes from a Qwen2 config.json; raises `UserError` as Llama's does, and where only some layers have a window."""
    llama.check(hf, ATTRIBUTES)
    window, used, first = ({**DEFAULTS, **hf}[name] for name in WINDOWS)
    if not used or window is None or first >= hf.get("num_hidden_layers", 0):  # the layers from `first` on would have it
        hf = hf | {"sliding_window": None, "use_sliding_window": False}
    return replace(llama.from_attributes(hf, ATTRIBUTES, DEFAULTS), qkv_bias=True)

"""The Mistral family: Llama's tensors, and a sliding window that is a number (v0.1: 4096) or none (v0.2 and later)."""

from __future__ import annotations

from typing import Any

from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.models.llama import WEIGHTS as WEIGHTS
from phased_ift_jax.models.llama import from_attributes

ARCHITECTURE = "MistralForCausalLM"
FIXED = {"hidden_act": "silu", "quantization_config": None}


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Sizes from a Mistral config.json; raises `UserError` as Llama's does.

    A config without the key has transformers' default window, 4096; without num_key_value_heads, its default of 8.
    """
    return from_attributes({"num_key_value_heads": 8} | hf, FIXED, sliding_window=hf.get("sliding_window", 4096))

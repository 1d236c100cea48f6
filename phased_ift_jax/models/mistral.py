"""The Mistral family: Llama's tensors, and a sliding window that is a number (v0.1: 4096) or none (v0.2 and later)."""

from __future__ import annotations

from typing import Any

from phased_ift_jax.models import llama
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.models.llama import WEIGHTS as WEIGHTS

ARCHITECTURE = "MistralForCausalLM"
ATTRIBUTES = llama.ATTRIBUTES | {"sliding_window": llama.COUNT_OR_NULL}
# transformers' MistralConfig, where it differs from LlamaConfig
DEFAULTS = llama.DEFAULTS | {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}


def decoder_config(hf: dict[str, Any]) -> DecoderConfig:
    """Sizes from a Mistral config.json; raises `UserError` as Llama's does."""
    return llama.from_attributes(hf, ATTRIBUTES, DEFAULTS)

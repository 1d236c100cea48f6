"""What the laws of the model families are put to: published config.json's, attributes that are refused, small models for parity with `transformers`."""

from __future__ import annotations

from typing import Any

from phased_ift_jax.models.attention import Rope
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.models.hf_folder import FAMILIES

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
QWEN_2 = SHARED | {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "max_window_layers": 28,
    "model_type": "qwen2",
    "num_attention_heads": 28,
    "num_hidden_layers": 28,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.41.2",
    "use_sliding_window": False,
    "vocab_size": 152064,
}
QWEN_SMALL = {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_hidden_layers": 24, "num_key_value_heads": 2, "vocab_size": 151936}
QWEN_25_SMALL = QWEN_2 | QWEN_SMALL | {"max_window_layers": 24, "sliding_window": 32768, "tie_word_embeddings": True, "use_mrope": False}

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
    "Qwen2-7B-Instruct": (QWEN_2, DecoderConfig(152064, 3584, 18944, 28, 28, 4, 128, Rope(1e6), 1e-6, qkv_bias=True), 7_615_616_512),
    "Qwen2.5-0.5B": (QWEN_25_SMALL, DecoderConfig(151936, 896, 4864, 24, 14, 2, 64, Rope(1e6), 1e-6, qkv_bias=True, tie_word_embeddings=True), 494_032_768),
    "TinyLlama-1.1B": (TINYLLAMA, DecoderConfig(32000, 2048, 5632, 22, 32, 4, 64), 1_100_048_384),
}

# --- what is refused, by the words that name it ---------------------------------------------------------------------------------

SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10_000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
YARN_DEEPSEEK = YARN | {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.5, "beta_fast": 16, "beta_slow": 2, "truncate": False}
YARN_GIVEN = YARN | {"rope_theta": 500.0, "attention_factor": 0.7, "original_max_position_embeddings": 32}
MILLION = {"rope_type": "default", "rope_theta": 1e6}
WINDOW_IN_ALL = {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
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
    *((family, {name: True}, f"{name} True") for family in FAMILIES for name in ("attention_bias", "mlp_bias", "rope_interleaved", "use_mrope")),
    *(("llama", {name: True}, f"{name} True") for name in ("is_encoder_decoder", "add_cross_attention", "torchscript")),
    ("llama", {"attention_bias": 0}, "attention_bias 0"),
    ("llama", {"is_causal": False}, "is_causal False"),
    ("mistral", {"attention_dropout": 0.1}, "attention_dropout 0.1"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("llama", {"hidden_act": ["silu"]}, "hidden_act ['silu']"),
    ("llama", {"sliding_window": 4096}, "sliding_window 4096"),
    *(("mistral", {"sliding_window": value}, f"sliding_window {value!r}") for value in (0, -1, "8", 8.0, True)),
    *(("qwen2", {"use_sliding_window": True, name: value}, f"{name} {value!r}") for name, value in {"max_window_layers": 1, "sliding_window": "8"}.items()),
    *(("qwen2", {name: value}, f"{name} {value!r}") for name, value in {"use_sliding_window": "yes", "layer_types": ["sliding_attention"] * 2}.items()),
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

# --- parity -------------------------------------------------------------------------------------------------------------------

# name: (family, attributes of config.json, longest example); attention goes in blocks of 64 queries, so that 150 is three of them
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "llama": ("llama", {"num_key_value_heads": 4}, 70),
    "grouped": ("llama", {}, 140),
    "one_kv_head": ("llama", {"num_key_value_heads": 1}, 40),
    "tied": ("llama", {"tie_word_embeddings": True}, 40),
    "tied_all_heads": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 4}, 40),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3, "head_dim": 16}, 140),
    "linear_rope": ("llama", {"rope_parameters": LINEAR}, 140),
    "head_dim": ("llama", {"head_dim": 12, "rms_norm_eps": 1e-3}, 40),
    "window": ("mistral", {"sliding_window": 20, "num_key_value_heads": 2}, 140),
    "window_is_length": ("mistral", {"sliding_window": 30}, 30),
    "window_and_one": ("mistral", {"sliding_window": 30}, 31),
    "no_window": ("mistral", {"sliding_window": None}, 70),
    "odd_sizes": ("llama", {"vocab_size": 331, "hidden_size": 40, "intermediate_size": 53, "num_attention_heads": 5, "num_key_value_heads": 5, "num_hidden_layers": 3}, 50),
    "odd_width": ("mistral", {"vocab_size": 97, "hidden_size": 33, "intermediate_size": 37, "head_dim": 10, "sliding_window": 7, "rms_norm_eps": 1e-2}, 50),
    "four_to_one": ("llama", {"hidden_size": 48, "num_attention_heads": 8, "num_key_value_heads": 2, "rope_parameters": MILLION, "rms_norm_eps": 1e-5}, 70),
    "eight_to_one": ("mistral", {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 2, "sliding_window": None, "rope_parameters": MILLION}, 40),
    "yarn": ("llama", {"rope_parameters": YARN, "head_dim": 32}, 140),
    "yarn_deepseek": ("llama", {"rope_parameters": YARN_DEEPSEEK, "head_dim": 24, "num_key_value_heads": 1, "vocab_size": 97}, 140),
    "yarn_given": ("mistral", {"rope_parameters": YARN_GIVEN, "sliding_window": 50, "head_dim": 16, "tie_word_embeddings": True}, 140),
    "llama3_and_window": ("mistral", {"rope_parameters": LLAMA3 | {"factor": 4.0}, "sliding_window": 64, "head_dim": 20}, 65),
    "linear_tied": ("llama", {"rope_parameters": LINEAR | {"factor": 2.5}, "tie_word_embeddings": True, "num_hidden_layers": 1, "vocab_size": 211}, 64),
    "window_of_two": ("mistral", {"sliding_window": 2, "num_key_value_heads": 4}, 20),  # with 1, transformers 5.23's own cache keeps every key
    "biases": ("qwen2", {"rope_parameters": MILLION}, 140),
    "biases_tied": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1, "vocab_size": 97}, 40),
    "biases_and_window": ("qwen2", WINDOW_IN_ALL | {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3}, 140),
    "window_beyond": ("mistral", {"sliding_window": 4096, "rope_parameters": MILLION, "num_hidden_layers": 3, "num_key_value_heads": 1}, 130),
}
PROMPTS = {"grouped": 1, "eight_to_one": 1, "tied_all_heads": 3, "llama3_rope": 1, "head_dim": 5, "window": 1, "yarn": 4, "yarn_given": 3, "llama3_and_window": 5}
PROMPTS |= {"biases_tied": 1, "biases_and_window": 1}

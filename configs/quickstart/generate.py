"""The quickstart's instructions, tokenizer and model sizes, made from nothing:  python configs/quickstart/generate.py

Writes data.jsonl (the official scored form: id, score, [instruction, response]) and model/ (config.json, tokenizer files; no weights)
beside this file. Every answer follows from its instruction by a rule, so that a response is right or wrong to the letter, and no
instruction stands twice. Difficulty rises with the number of items, the operation, and operations applied one after the other; harder
levels contain the easier operations too, as real instructions do.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).parent
ROWS = {"easy": 4000, "medium": 4000, "hard": 4000}
LETTERS = list(string.ascii_lowercase)

Items = list[str]
# wording, what it does, difficulty in itself
OPERATIONS: dict[str, tuple[Callable[[Items], Items], float]] = {
    "Repeat": (lambda items: items, 0.0),
    "Give the first of": (lambda items: items[:1], 0.0),
    "Give the last of": (lambda items: items[-1:], 0.1),
    "Reverse": (lambda items: items[::-1], 0.2),
    "Drop the first of": (lambda items: items[1:], 0.6),
    "Drop the last of": (lambda items: items[:-1], 0.6),
    "Double": (lambda items: [item for item in items for _ in range(2)], 0.7),
    "Swap the ends of": (lambda items: [items[-1], *items[1:-1], items[0]], 0.9),
    "Shift": (lambda items: [LETTERS[(LETTERS.index(item) + 1) % 26] for item in items], 1.2),
    "Sort": (sorted, 2.0),
}
EASY = ["Repeat", "Give the first of", "Give the last of", "Reverse"]
MEDIUM = [*EASY, "Drop the first of", "Drop the last of", "Double", "Swap the ends of"]
HARD = [*MEDIUM, "Shift", "Sort"]
# operations, items at least and at most, share of rows with two operations, lowest and highest score
LEVELS: dict[str, tuple[list[str], int, int, float, float, float]] = {
    "easy": (EASY, 2, 3, 0.0, 1.0, 1.4),
    "medium": (MEDIUM, 2, 4, 0.0, 1.5, 3.4),
    "hard": (HARD, 2, 4, 0.3, 3.5, 5.0),
}


def draw(rng: random.Random, level: str) -> tuple[str, str, float]:
    """An instruction of a level, its response, and its score."""
    operations, least, most, twofold, low, high = LEVELS[level]
    items = rng.sample(LETTERS, rng.randint(least, most))
    first = rng.choice(operations)
    second = rng.choice([name for name in EASY if name != "Repeat"]) if rng.random() < twofold else None
    result = OPERATIONS[first][0](items)
    wording, cost = first, OPERATIONS[first][1] + 0.3 * len(items)
    if second:
        result = OPERATIONS[second][0](result)
        wording, cost = f"{first} and then {second.lower()}", cost + 1.0
    # any rule that rises with the cost and stays inside the level would do; scores have two decimals, as averages of judges have
    return f"{wording}: {' '.join(items)}", " ".join(result), round(low + (high - low) * min(1.0, cost / 4.5), 2)


def rows(seed: int = 0) -> list[dict[str, object]]:
    """All rows, shuffled over levels, as read from real files; the same for the same seed."""
    rng = random.Random(seed)
    seen: set[str] = set()
    made = []
    for level, count in ROWS.items():
        while count:
            instruction, response, score = draw(rng, level)
            if instruction not in seen:
                seen.add(instruction)
                made.append((instruction, response, score))
                count -= 1
    rng.shuffle(made)
    return [{"id": f"quickstart-{i:05d}", "score": f"{score:g}", "data": [instruction, response]} for i, (instruction, response, score) in enumerate(made)]


def tokenizer_files(texts: list[str]) -> dict[str, dict]:
    """A word-level tokenizer in Hugging Face's format, with every word of the texts; spaces belong to the word behind them, as in Llama's."""
    words = sorted({word for text in texts for word in text.split()} | set(LETTERS))
    vocabulary = ["<unk>", "<s>", "</s>", "User:", "\n", "Assistant:", *(f"▁{word}" for word in words)]
    special = [{"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True} for i, text in enumerate(vocabulary[:3])]
    pieces = {"type": "Split", "pattern": {"Regex": r"\n|[^\n▁]+|▁[^\n▁]+"}, "behavior": "Isolated", "invert": False}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    words_back = [{"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": spaces,
        "pre_tokenizer": pieces,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": words_back},
        "model": {"type": "WordLevel", "vocab": {word: i for i, word in enumerate(vocabulary)}, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}


def model_config(vocabulary: int) -> dict[str, object]:
    """A Llama of about 180,000 parameters."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": -(-vocabulary // 8) * 8,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
        "torch_dtype": "float32",
    }


def files() -> dict[str, str]:
    """Every file that this script writes, by path below its folder."""
    data = rows()
    tokenizer = tokenizer_files([text for row in data for text in row["data"]])  # type: ignore[attr-defined]
    vocabulary = len(tokenizer["tokenizer.json"]["model"]["vocab"])
    made = {"data.jsonl": "".join(json.dumps(row) + "\n" for row in data)}
    for name, content in ({"config.json": model_config(vocabulary)} | tokenizer).items():
        made[f"model/{name}"] = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    return made


if __name__ == "__main__":
    for path, text in files().items():
        (HERE / path).parent.mkdir(exist_ok=True)
        (HERE / path).write_text(text, encoding="utf-8")
        print(f"wrote {HERE / path}, {len(text):,} characters")

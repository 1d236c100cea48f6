"""From text to token ids, jointly, with the response found by character offsets; the only place that loads a tokenizer.

The law of every example: its trained tokens decode to the response and end with the end-of-sequence token (a truncated one: to a prefix,
without it), and the tokens before are what generation is given. A row that breaks the law is quarantined with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from phased_ift_jax.data.templates import Rendered, render
from phased_ift_jax.records import InstructionRecord, Quarantined, TokenizedExample, UserError

BATCH = 1024  # rows handed to the Rust tokenizer at once


def load_tokenizer(folder: Path) -> Any:
    """The fast `transformers` tokenizer of a model folder.

    Raises:
        UserError: there is none, or it has no beginning- or end-of-sequence token.
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"model.model_name_or_path: '{folder}' has no tokenizer.json and no tokenizer.model")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        raise UserError(f"model.model_name_or_path: the tokenizer of '{folder}' does not load: " + " ".join(str(error).split())) from None
    for name in ("bos_token", "eos_token"):
        if not getattr(tokenizer, name):
            raise UserError(f"model.model_name_or_path: the tokenizer of '{folder}' has no {name}")
    if not tokenizer.is_fast:
        raise UserError(f"model.model_name_or_path: the tokenizer of '{folder}' gives no offsets; a tokenizer.json would do")
    return tokenizer


def tokenize(records: Sequence[InstructionRecord], tokenizer: Any, template: str, max_length: int, truncation: str = "truncate") -> Iterator[TokenizedExample | Quarantined]:
    """One example or one quarantined row for each record, in order."""
    control = sorted({*tokenizer.all_special_tokens} - {""})
    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        reasons = [_unusable(record, control) for record in part]
        rendered = [None if reason else render(template, record, tokenizer) for record, reason in zip(part, reasons, strict=True)]
        encodings = iter(tokenizer.backend_tokenizer.encode_batch([text.text for text in rendered if text], add_special_tokens=False))
        results: list[TokenizedExample | str] = [reason or _example(text, next(encodings), tokenizer, max_length, truncation) for text, reason in zip(rendered, reasons, strict=True)]
        yield from _verified(part, results, tokenizer)


def prompt_ids(record: InstructionRecord, tokenizer: Any, template: str) -> np.ndarray:
    """What generation is given for a record's last turn: int32 ids, equal to `tokens[:response_start]` of the same record."""
    text = render(template, record, tokenizer).prompt
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def decode(ids: Sequence[int] | np.ndarray, tokenizer: Any) -> str:
    """Text of an answer: control tokens left out, and the space that joins it to its prompt."""
    return tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip(" ")


def _unusable(record: InstructionRecord, control: list[str]) -> str | None:
    for turn in record.turns:
        if not turn.response.strip():
            return "empty response"
        for text in (record.system, turn.instruction, turn.input, turn.response):
            token = next((token for token in control if token in text), None)
            if token is not None:
                return f"the text contains the control token {token!r}"
    return None


def _example(rendered: Rendered, encoding: Any, tokenizer: Any, max_length: int, truncation: str) -> TokenizedExample | str:
    """An example, or the reason why there is none."""
    starts = np.array([start for start, _ in encoding.offsets], np.int64)
    ends = np.array([end for _, end in encoding.offsets], np.int64)
    tokens = np.array(encoding.ids, np.int32)
    spans = []
    for first, last in rendered.responses:
        # bytes of one character share its offsets, so the span begins at the first token that ends after the prompt
        begin = int(np.searchsorted(ends, first, side="right"))
        end = int(np.searchsorted(ends, last, side="right"))
        if begin == end or starts[begin] < first or ends[end - 1] != last:
            return "prompt and response share a token under this template"
        spans.append((begin, end))
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokens:
        return f"the tokenizer does not know {encoding.offsets and rendered.text[slice(*encoding.offsets[encoding.ids.index(tokenizer.unk_token_id)])]!r}"
    if tokens[0] != tokenizer.bos_token_id and rendered.text.startswith(tokenizer.bos_token):
        raise UserError("model.model_name_or_path: the tokenizer does not read its own beginning-of-sequence token")
    if len(tokens) <= max_length:
        return TokenizedExample(tokens, tuple(spans))
    if truncation == "quarantine":
        return f"{len(tokens)} tokens, data.max_length is {max_length}"
    kept = tuple((begin, min(end, max_length)) for begin, end in spans if begin < max_length)
    if not kept:
        return f"a prompt of {spans[0][0]} tokens leaves no room for a response in data.max_length {max_length}"
    return TokenizedExample(tokens[:max_length], kept, truncated=True)


def _verified(records: Sequence[InstructionRecord], results: list[TokenizedExample | str], tokenizer: Any) -> Iterator[TokenizedExample | Quarantined]:
    """Check the law on every row, by decoding what is trained."""
    examples = [result for result in results if isinstance(result, TokenizedExample)]
    spans = [example.tokens[begin:end].tolist() for example in examples for begin, end in example.responses]
    decoded = iter(tokenizer.backend_tokenizer.decode_batch(spans, skip_special_tokens=True))
    for record, result in zip(records, results, strict=True):
        if isinstance(result, str):
            yield Quarantined(record.source, record.id, result)
            continue
        texts = [next(decoded) for _ in result.responses]
        broken = next((pair for pair in zip(texts, record.turns, strict=False) if not _same(*pair, result.truncated and pair[0] is texts[-1])), None)
        yield result if broken is None else Quarantined(record.source, record.id, f"the response decodes to another text: {_difference(broken[0], broken[1].response)}")


def _same(text: str, turn: Any, prefix: bool) -> bool:
    text, response = text.strip(), turn.response.strip()
    # a truncated response may end within the bytes of one character, which decode to U+FFFD
    return response.startswith(text.rstrip("\ufffd")) if prefix else text == response


def _difference(text: str, response: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, response, strict=False)) if a != b), min(len(text), len(response)))
    return f"{text[at : at + 20]!r} for {response[at : at + 20]!r}"

"""From text to token ids, jointly, with the response found by character offsets; the only place that loads a tokenizer.

The law of every example: its trained tokens decode to the response and end with the end-of-sequence token (a truncated one: to a prefix,
without it), and the tokens before are what generation is given. A row that breaks the law is quarantined with the reason.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from phased_ift_jax import pictures
from phased_ift_jax.data.templates import Rendered, render
from phased_ift_jax.data.tokenizer_json import added_files
from phased_ift_jax.records import InstructionRecord, Quarantined, Source, TokenizedExample, Turn, UserError

BATCH = 1024  # rows handed to the Rust tokenizer at once
CONFIGURATION = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "additional_chat_templates/*.jinja")


def load_tokenizer(folder: Path, vocab_size: int | None = None) -> Any:
    """The fast `transformers` tokenizer of a model folder: its tokenizer.json as it is, or one with the ids of its SentencePiece tokenizer.model.

    Special tokens and chat template are those of tokenizer_config.json, special_tokens_map.json and the like. Only local files are read.

    Raises:
        UserError: there is none, it cannot be had exactly, it has no end-of-sequence token, or more tokens than the model (`vocab_size`).
    """
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"model.model_name_or_path: '{pictures.shown(folder)}' has no tokenizer.json and no tokenizer.model")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no PyTorch is as it should be
    from transformers import PreTrainedTokenizerFast

    with TemporaryDirectory() as complete:
        place = folder
        if added := added_files(folder):
            # what an export would hold: transformers would make a tokenizer.model into another tokenizer, so it is given none
            place = Path(complete)
            for file in (file for pattern in CONFIGURATION for file in folder.glob(pattern)):
                (place / file.relative_to(folder)).parent.mkdir(exist_ok=True)
                shutil.copyfile(file, place / file.relative_to(folder))
            for name, text in added.items():
                (place / name).write_text(text, encoding="utf-8")
        try:
            # AutoTokenizer would choose a class by name, and some (LlamaTokenizer) take the file's merges and put their own pipeline around them
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(place), local_files_only=True)
        except Exception as error:  # transformers raises many kinds for a folder it cannot read
            raise UserError(f"model.model_name_or_path: the tokenizer of '{pictures.shown(folder)}' does not load: " + " ".join(str(error).split())) from None
    tokenizer.name_or_path = str(folder)
    if not tokenizer.eos_token:
        raise UserError(f"model.model_name_or_path: the tokenizer of '{pictures.shown(folder)}' has no eos_token")
    if vocab_size is not None and len(tokenizer) > vocab_size:
        raise UserError(f"model.model_name_or_path: the tokenizer has {len(tokenizer)} tokens, the model's vocabulary {vocab_size}")
    return tokenizer


def tokenize(records: Sequence[InstructionRecord], tokenizer: Any, template: str, max_length: int, truncation: str = "truncate") -> Iterator[TokenizedExample | Quarantined]:
    """One example or one quarantined row for each record, in order."""
    control = _control(tokenizer)
    for start in range(0, len(records), BATCH):
        part = records[start : start + BATCH]
        reasons = [_unusable(record, control) for record in part]
        rendered = [None if reason else render(template, record, tokenizer) for record, reason in zip(part, reasons, strict=True)]
        encodings = iter(tokenizer.backend_tokenizer.encode_batch([text.text for text in rendered if text], add_special_tokens=False))
        results: list[TokenizedExample | str] = [
            _example(text, next(encodings), tokenizer, max_length, truncation) if text else str(reason) for text, reason in zip(rendered, reasons, strict=True)
        ]
        yield from _verified(part, results, tokenizer)


def prompt_ids(record: InstructionRecord, tokenizer: Any, template: str) -> np.ndarray:
    """What generation is given for a record's last turn: int32 ids, equal to `tokens[:response_start]` of the same record.

    Raises:
        UserError: a control token stands in the text.
    """
    if reason := _control_in(record, _control(tokenizer)):
        raise UserError(f"{record.source}: {reason}; leave it out")
    text = render(template, record, tokenizer).prompt
    return np.array(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids, np.int32)


def decode(ids: Sequence[int] | np.ndarray, tokenizer: Any) -> str:
    """Text of an answer: control tokens left out, and the space that joins it to its prompt."""
    return tokenizer.backend_tokenizer.decode([int(i) for i in ids], skip_special_tokens=True).strip(" ")


def end_of_response(tokenizer: Any, template: str) -> int:
    """The token that ends a response in training."""
    record = InstructionRecord("", (Turn("a", "a"),), Source("", 0))
    return int(tokenizer.backend_tokenizer.encode(render(template, record, tokenizer).text, add_special_tokens=False).ids[-1])


def _control(tokenizer: Any) -> list[str]:
    return sorted({*tokenizer.all_special_tokens, *(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)} - {""})


def _unusable(record: InstructionRecord, control: list[str]) -> str | None:
    if not record.has_responses:
        return "empty response"
    return _control_in(record, control)


def _control_in(record: InstructionRecord, control: list[str]) -> str | None:
    texts = [record.system, *(text for turn in record.turns for text in (turn.instruction, turn.input, turn.response))]
    token = next((token for text in texts for token in control if token in text), None)
    return None if token is None else f"the text contains the control token {token!r}"


def _example(rendered: Rendered, encoding: Any, tokenizer: Any, max_length: int, truncation: str) -> TokenizedExample | str:
    """An example, or the reason why there is none."""
    tokens = np.array(encoding.ids, np.int32)
    if tokenizer.bos_token and rendered.text.startswith(tokenizer.bos_token) and tokens[0] != tokenizer.bos_token_id:
        raise UserError("model.model_name_or_path: the tokenizer does not read its own beginning-of-sequence token")
    written = (rendered.text[slice(*encoding.offsets[at])] for at in np.flatnonzero(tokens == tokenizer.unk_token_id))
    unknown = next((text for text in written if text != tokenizer.unk_token), None)  # some tokenizers have one token for unk, BOS and EOS
    if unknown is not None:
        return f"the tokenizer does not know {unknown[:20]!r}: its vocabulary was made for other text; give another model.model_name_or_path"
    spans = _token_spans(rendered.responses, encoding.offsets)
    if spans is None:
        return "prompt and response share a token under this template"
    if len(tokens) <= max_length:
        return TokenizedExample(tokens, spans)
    if truncation == "quarantine":
        return f"{len(tokens)} tokens, data.max_length is {max_length}"
    kept = tuple((begin, min(end, max_length)) for begin, end in spans if begin < max_length)
    if not kept:
        return f"a prompt of {spans[0][0]} tokens leaves no room for a response in data.max_length {max_length}"
    return TokenizedExample(tokens[: kept[-1][1]], kept, truncated=True)


def _token_spans(responses: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...] | None:
    """Character spans as token spans, or None where a token lies across the border of one."""
    starts, ends = np.array(offsets, np.int64).T
    spans = []
    for first, last in responses:
        # bytes of one character share its offsets, so a span begins at the first token that ends after `first`
        begin, end = (int(at) for at in np.searchsorted(ends, (first, last), side="right"))
        if begin == end or starts[begin] < first or ends[end - 1] != last:
            return None
        spans.append((begin, end))
    return tuple(spans)


def _verified(records: Sequence[InstructionRecord], results: Sequence[TokenizedExample | str], tokenizer: Any) -> Iterator[TokenizedExample | Quarantined]:
    """Check the law on every row, by decoding what is trained."""
    spans = [result.tokens[begin:end].tolist() for result in results if isinstance(result, TokenizedExample) for begin, end in result.responses]
    decoded = iter(tokenizer.backend_tokenizer.decode_batch(spans, skip_special_tokens=True))
    for record, result in zip(records, results, strict=True):
        reason = result if isinstance(result, str) else _other_text(record, [next(decoded) for _ in result.responses], result.truncated)
        if reason is not None:
            yield Quarantined(record.source, record.id, reason)
        elif isinstance(result, TokenizedExample):
            yield result


def _other_text(record: InstructionRecord, texts: Sequence[str], truncated: bool) -> str | None:
    """Where the trained texts differ from the responses, apart from white space around them; only the last of a truncated example may end early."""
    for number, (text, turn) in enumerate(zip(texts, record.turns, strict=False), 1):
        text, response = text.strip(), turn.response.strip()
        if truncated and number == len(texts):
            text = text.rstrip("\ufffd")  # what the first bytes of a character decode to
            response = response[: len(text)].rstrip("\ufffd")
        if text != response:
            at = next((i for i, (a, b) in enumerate(zip(text, response, strict=False)) if a != b), min(len(text), len(response)))
            return f"the response decodes to another text: {text[at : at + 20]!r} for {response[at : at + 20]!r}"
    return None

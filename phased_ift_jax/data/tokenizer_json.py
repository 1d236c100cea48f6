"""A `tokenizer.json` (Hugging Face `tokenizers`) with exactly the ids of a SentencePiece BPE `tokenizer.model`.

Why the two agree. SentencePiece merges, again and again, the neighbours whose joined piece has the best score, the leftmost where scores are
equal. Hugging Face's BPE merges the neighbours whose *pair* has the best rank, the leftmost of one pair. Let SentencePiece join A and B to the
piece P anywhere in a text. No merge before it crossed the ends of A or B, and a choice among all neighbours is the choice among those within
A B whenever it falls there; so the merges within A B are those that SentencePiece makes in the text P alone. These have one last step. Hence
each piece has at most one pair by which it is ever made, the other ways to cut it in two never happen, and the pairs so found, ranked by
their pieces' scores, make the same merges in the same order: `merges`. What is left are pieces of one score, which two ranks put in an order
that SentencePiece leaves to the place in the text. `_check_ties` admits those where that makes no difference (independent pieces, and runs of
one character that grow from the left, as Llama-2's runs of spaces) and refuses the others.

The law holds for every text that does not spell a control or added token: there, as everywhere in `transformers`, `<s>` is the token and not its
letters. Decoding gives SentencePiece's text for the ids of every text, but for an unknown token (its name, where SentencePiece writes a sign)
and, in a model that removes extra spaces, U+2581 itself at the start of a text (kept or dropped there as the pieces fall). For ids of no text
it can differ: the bytes of a torn character make all the bytes beside it U+FFFD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from phased_ift_jax.records import UserError

SPACE = "\u2581"  # what SentencePiece writes for a space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # sentencepiece_model.proto, SentencePiece.Type
BPE = 2  # sentencepiece_model.proto, TrainerSpec.ModelType
AS_THEY_ARE = {None, "LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizer", "PreTrainedTokenizerFast", "TokenizersBackend"}
MADE = {"tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "add_eos_token": False, "clean_up_tokenization_spaces": False}
FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}  # of a token found in a text before it is cut
NAMES = {"bos_token": "bos_id", "eos_token": "eos_id", "unk_token": "unk_id"}


def added_files(folder: Path) -> dict[str, str]:
    """What a model folder with a `tokenizer.model` alone lacks, by name: with it, `AutoTokenizer` gives SentencePiece's ids.

    It is `tokenizer.json`, and a `tokenizer_config.json` where there is none. One that is there stays as it is, unless it does not say which
    tokens are BOS, EOS and unknown (they are added), or names a `tokenizer_class` that rebuilds its own pipeline (`PreTrainedTokenizerFast` then).
    A folder that has a `tokenizer.json` lacks nothing.

    Raises:
        UserError: SentencePiece's ids cannot be had from a `tokenizer.json`.
    """
    if (folder / "tokenizer.json").exists() or not (folder / "tokenizer.model").exists():
        return {}
    model = _read_model(folder / "tokenizer.model")
    before = _read_json(folder / "tokenizer_config.json")
    config = dict(MADE if before is None else before)
    # transformers reads special_tokens_map.json, and lets it win, unless the configuration lists all added tokens itself
    named = config | (_read_json(folder / "special_tokens_map.json") or {} if "added_tokens_decoder" not in config else {})
    for name, place in NAMES.items():
        number = getattr(model.trainer_spec, place)
        if name not in named and 0 <= number < len(model.pieces):
            config[name] = named[name] = model.pieces[number].piece
    if config.get("tokenizer_class") not in AS_THEY_ARE:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    files = {"tokenizer.json": build(model, named, _read_json(folder / "added_tokens.json") or {})}
    return files if config == before else files | {"tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False) + "\n"}


def build(model: Any, config: dict[str, Any], added: dict[str, int]) -> str:
    """The text of a `tokenizer.json`.

    Args:
        model: a parsed `tokenizer.model` (sentencepiece_model.proto, ModelProto).
        config: `tokenizer_config.json`: its special tokens, `added_tokens_decoder`, `add_bos_token` and `add_eos_token`.
        added: `added_tokens.json`: ids of tokens behind the model's pieces.

    Raises:
        UserError: SentencePiece's ids cannot be had from a `tokenizer.json`.
    """
    _check_model(model)
    prefix, squeeze = model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces
    vocabulary = {piece.piece: number for number, piece in enumerate(model.pieces)}
    tokens = _added_tokens(model, vocabulary, config, added)
    # SentencePiece puts one space before a text, whatever it begins with; Metaspace puts its own sign only before a text that does not begin
    # with it. Once every space is written SPACE, a Metaspace whose sign is the space itself always puts it, and the next one rewrites it.
    # Where extra spaces are removed, those before the text become the one that is put, which is Metaspace's own rule.
    # `first`: nothing is put behind a control token, where the text goes on with no space (a normalizer would put one there, 29871 in Llama-2).
    pretokenizers = [{"type": "Metaspace", "replacement": sign, "prepend_scheme": scheme, "split": False} for sign, scheme in ((" ", "first"), (SPACE, "never"))]
    if squeeze:
        normalizers = [_replace({"Regex": rf"[ {SPACE}]+\z"}, ""), _replace({"Regex": " {2,}"}, " ")] + [_replace({"Regex": r"\A "}, "")] * (not prefix)
    else:
        normalizers = [_replace({"String": " "}, SPACE)]
    decoders: list[dict[str, Any]] = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prefix or squeeze:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    whole = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": tokens,
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pretokenizers if prefix else pretokenizers[1:]},
        "post_processor": _post_processor({token["content"]: token["id"] for token in tokens}, config),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": next(piece.piece for piece in model.pieces if piece.type == UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.trainer_spec.byte_fallback,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges({piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}),
        },
    }
    return json.dumps(whole, ensure_ascii=False) + "\n"


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """For each piece that SentencePiece's BPE can make, the one pair by which it does, best score first (see this file's first lines).

    Raises:
        UserError: pieces of one score whose order depends on the text, or a piece made of a character that is none.
    """
    pairs = [pair for piece in scores if (pair := _last_merge(piece, scores))]
    lone = next((part for pair in pairs for part in pair if part not in scores), None)
    if lone is not None:
        raise _refused(f"character {lone!r} is part of a piece, and not a piece itself")
    # longest first among equals: a run of spaces goes on growing before the next one begins
    pairs.sort(key=lambda pair: (-scores["".join(pair)], -len("".join(pair))))
    _check_ties(pairs, scores)
    return pairs


def _last_merge(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """The pair that SentencePiece joins last when the text is the piece itself; None where it does not make the piece."""
    parts = list(piece)
    pair = None
    while len(parts) > 1:
        best, at = None, -1
        for i in range(len(parts) - 1):
            score = scores.get(parts[i] + parts[i + 1])
            if score is not None and (best is None or score > best):
                best, at = score, i
        if best is None:
            return None
        pair = (parts[at], parts[at + 1])
        parts[at : at + 2] = ["".join(pair)]
    return pair


def _check_ties(pairs: Sequence[tuple[str, str]], scores: dict[str, float]) -> None:
    """Refuse pieces of one score unless merging them in any order, or a run from its left, is merging the leftmost first.

    So it is where no merge of them takes what another of them needs or makes what a merge of a score as good needs. In a run of c, all merges are
    (c..c, c): with the longest ranked first, the leftmost (c, c) starts a run, which grows to its end, or the longest piece, before the next starts.
    """
    better: dict[str, str] = {}  # part -> a piece of a better score that is made of it
    for score, group in groupby(pairs, key=lambda pair: scores["".join(pair)]):
        equal = list(group)
        if len(equal) > 1:
            for one, other in _contacts(equal, better):
                if not (_run(one) and _run(other) and one[1] == other[1]):
                    raise _refused(f"the pieces {''.join(one)!r} and {''.join(other)!r} have scores ({score:g}) that leave their order to the place in the text")
        better |= {part: "".join(pair) for pair in equal for part in pair}


def _contacts(equal: Sequence[tuple[str, str]], better: dict[str, str]) -> Iterator[tuple[tuple[str, str], tuple[str, str]]]:
    """Merges of which one overlaps the other's pair, or makes a part of it or of a better piece's."""
    left, right = ({part: [pair for pair in equal if pair[side] == part] for part in {pair[side] for pair in equal}} for side in (0, 1))
    for pair in equal:
        piece = "".join(pair)
        if piece in better:
            yield pair, (better[piece], "")
        yield from ((pair, other) for other in [*left.get(pair[1], []), *left.get(piece, []), *right.get(piece, [])] if other != pair)


def _run(pair: tuple[str, str]) -> bool:
    return len(pair[1]) == 1 and set(pair[0]) == {pair[1]}


def _check_model(model: Any) -> None:
    """Refuse what a `tokenizer.json` cannot say exactly."""
    normalizer, trainer = model.normalizer_spec, model.trainer_spec
    if trainer.model_type != BPE:
        kind = trainer.DESCRIPTOR.enum_types_by_name["ModelType"].values_by_number[trainer.model_type].name
        raise _refused(f"model_type is {kind}, only BPE is read")
    if normalizer.precompiled_charsmap or model.denormalizer_spec.precompiled_charsmap:
        raise _refused(f"the normalization {(normalizer.name or model.denormalizer_spec.name)!r} maps characters, only 'identity' is read")
    if not normalizer.escape_whitespaces:
        raise _refused("escape_whitespaces is false, only true is read")
    if trainer.treat_whitespace_as_suffix:
        raise _refused("treat_whitespace_as_suffix is true, only false is read")
    for piece in model.pieces:
        if piece.type == UNUSED:
            raise _refused(f"the piece {piece.piece!r} is of type UNUSED")
        # at the start of a text SentencePiece puts a space before it, and removes none beside it; a token that is cut out first knows no neighbours
        if piece.type == USER_DEFINED and (normalizer.add_dummy_prefix or normalizer.remove_extra_whitespaces or re.search(rf"[ {SPACE}]", piece.piece)):
            raise _refused(f"the piece {piece.piece!r} is of type USER_DEFINED, in a model that treats spaces before a text or in the piece specially")


def _added_tokens(model: Any, vocabulary: dict[str, int], config: dict[str, Any], added: dict[str, int]) -> list[dict[str, Any]]:
    """Tokens found in a text before it is cut into pieces: the model's control and user-defined pieces, and what was added behind the pieces."""
    tokens = {
        number: _token(piece.piece, number, special=piece.type != USER_DEFINED) for number, piece in enumerate(model.pieces) if piece.type in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    named = [value["content"] if isinstance(value, dict) else value for key in NAMES if (value := config.get(key))]
    tokens |= {number: _token(text, number, special=text in named) for text, number in added.items()}
    for key, token in config.get("added_tokens_decoder", {}).items():
        tokens[int(key)] = _token(token["content"], int(key), **{flag: token[flag] for flag in FLAGS if flag in token})
    for number, token in tokens.items():
        if vocabulary.get(token["content"], number) != number or (number < len(vocabulary) and token["content"] not in vocabulary):
            raise UserError(f"added tokens: {token['content']!r} is given id {number}, where tokenizer.model has it elsewhere or another piece; a tokenizer.json would do")
    known = vocabulary | {token["content"]: number for number, token in tokens.items()}
    for text in named:
        if text not in known:
            known[text] = number = max(known.values()) + 1
            tokens[number] = _token(text, number)
        tokens.setdefault(known[text], _token(text, known[text]))
    behind = [number for number in sorted(tokens) if number >= len(vocabulary)]
    gap = next((number for place, number in enumerate(behind, len(vocabulary)) if number != place), None)
    if gap is not None:
        raise UserError(f"added tokens: {tokens[gap]['content']!r} has id {gap}, and none has the id before it; number them from {len(vocabulary)} on")
    return [tokens[number] for number in sorted(tokens)]


def _token(content: str, number: int, **flags: bool) -> dict[str, Any]:
    return {"id": number, "content": content, **FLAGS, **flags}


def _post_processor(ids: dict[str, int], config: dict[str, Any]) -> dict[str, Any]:
    """BOS in front of a text, unless `add_bos_token` is false; EOS behind it where `add_eos_token` says so."""
    marks = {}
    for name, default in (("bos", True), ("eos", False)):
        value = config.get(f"{name}_token")
        text = value["content"] if isinstance(value, dict) else value
        marks[name] = [text] if text and config.get(f"add_{name}_token", default) else []
    both = [text for name in ("bos", "eos") for text in marks[name]]

    def around(sequence: str, kind: int) -> list[dict[str, Any]]:
        special = {name: [{"SpecialToken": {"id": text, "type_id": kind}} for text in marks[name]] for name in marks}
        return [*special["bos"], {"Sequence": {"id": sequence, "type_id": kind}}, *special["eos"]]

    # A ByteLevel that trims no offsets does nothing. That the file names it makes AutoTokenizer use the file as it is even where
    # tokenizer_config.json says LlamaTokenizer, which otherwise keeps the merges but puts a pipeline of its own around them:
    # a text that begins with a space would lose one.
    nothing = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    template = {
        "type": "TemplateProcessing",
        "single": around("A", 0),
        "pair": [*around("A", 0), *around("B", 1)],
        "special_tokens": {text: {"id": text, "ids": [ids[text]], "tokens": [text]} for text in both},
    }
    return {"type": "Sequence", "processors": [nothing, template]}


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _read_model(file: Path) -> Any:
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError:
        model.Clear()
    if not any(piece.type == UNKNOWN for piece in model.pieces):
        raise UserError(f"'{file}' is not a SentencePiece model; a tokenizer.json beside it would do")
    return model


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"'{file}' is not JSON: {error}") from None


def _refused(what: str) -> UserError:
    return UserError(f"tokenizer.model: {what}, so no tokenizer.json can be made with its ids; a tokenizer.json beside it would do")

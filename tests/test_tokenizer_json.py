"""A tokenizer.json made from a tokenizer.model: SentencePiece's ids and SentencePiece's text, for every text, here and in what is exported."""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from phased_ift_jax.data import readers
from phased_ift_jax.data.phases import plain
from phased_ift_jax.data.templates import render
from phased_ift_jax.data.tokenization import load_tokenizer
from phased_ift_jax.data.tokenizer_json import added_files, merges
from phased_ift_jax.records import UserError

MODELS = ["llama2", "stories260k"]
CONTROL = re.compile(r"(<s>|</s>|<unk>)")
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
LLAMA2 = {  # what Llama-2's own tokenizer_config.json says
    "add_bos_token": True,
    "add_eos_token": False,
    **{name: {"__type": "AddedToken", "content": text, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False} for name, text in SPECIAL.items()},
    "clean_up_tokenization_spaces": False,
    "legacy": False,
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": None,
    "padding_side": "right",
    "sp_model_kwargs": {},
    "tokenizer_class": "LlamaTokenizer",
}
OLDER = LLAMA2 | {name: LLAMA2[name] | {"normalized": True} for name in SPECIAL}  # type: ignore[operator]
TOKENS = {str(i): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True} for i, t in enumerate(["<unk>", "<s>", "</s>"])}
CORPUS = [f"{'    ' * (n % 4)}def f{n}(x):  return x + {n % 7}\t# the water is wide {'and deep ' * (n % 3)}" for n in range(300)]


def make_folder(folder: Path, model: bytes, config: dict[str, Any] | None = None, **files: Any) -> Path:
    """A model folder with a tokenizer.model alone; further files by name, a dot written as two underscores."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    if config is not None:
        files["tokenizer_config__json"] = config
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def exported(base: Path, folder: Path, model_type: str = "llama") -> Path:
    """The base's files as they are, and the added ones."""
    shutil.copytree(base, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}), encoding="utf-8")
    for name, text in added_files(base).items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


def parsed(model: bytes) -> Any:
    return sentencepiece_model_pb2.ModelProto.FromString(model)


def processor(model: bytes) -> Any:
    loaded = sentencepiece.SentencePieceProcessor()
    loaded.LoadFromSerializedProto(model)
    return loaded


def without_prefix(model: bytes) -> Any:
    """The same SentencePiece model, but for the space it puts before a text."""
    other = parsed(model)
    other.normalizer_spec.add_dummy_prefix = False
    return processor(other.SerializeToString())


def made(folder: Path) -> Tokenizer:
    return Tokenizer.from_str(added_files(folder)["tokenizer.json"])


def differing(texts: Sequence[str], ours: Tokenizer, theirs: Any) -> list[str]:
    """Texts whose ids, or the text of whose ids, are not SentencePiece's."""
    expected = theirs.encode(list(texts))
    found = ours.encode_batch(list(texts), add_special_tokens=False)
    return [
        text
        for text, encoding, ids, back, back_expected in zip(texts, found, expected, ours.decode_batch(expected), theirs.decode(expected), strict=True)
        if encoding.ids != ids or (back != back_expected and theirs.unk_id() not in ids)
    ]


def trained(**options: Any) -> bytes:
    """A tiny SentencePiece model; by default as Llama-2's was made."""
    default = {"model_type": "bpe", "vocab_size": 340, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True, "split_digits": True}
    default |= {"allow_whitespace_only_pieces": True, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 1}
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(CORPUS), model_writer=model, **(default | options))
    return model.getvalue()


def crafted(pieces: Sequence[tuple[str, float]], prefix: bool = True, squeeze: bool = False, kinds: dict[str, int] | None = None) -> bytes:
    """A SentencePiece model of these pieces and scores, without byte fallback."""
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix, model.normalizer_spec.remove_extra_whitespaces = prefix, squeeze
    for piece, score, kind in [("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3), *((piece, score, (kinds or {}).get(piece, 1)) for piece, score in pieces)]:
        model.pieces.add(piece=piece, score=score, type=kind)
    return model.SerializeToString()


@pytest.fixture(scope="session")
def real(shared_data: Path) -> Callable[[str], tuple[bytes, Tokenizer, Any]]:
    """By name: the model's bytes, our tokenizer of it, and SentencePiece."""

    @cache
    def load(name: str) -> tuple[bytes, Tokenizer, Any]:
        model = (shared_data / name / "tokenizer.model").read_bytes()
        return model, made(shared_data / name), processor(model)

    return load


@pytest.fixture(scope="session")
def real_strings(shared_data: Path) -> list[str]:
    """Every string of the shared data: instructions, inputs, outputs, test sets, reviews."""

    def strings(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for part in value.values() if isinstance(value, dict) else value:
                yield from strings(part)

    found: set[str] = set()
    for file in shared_data.glob("*/*.json*"):
        if file.parent.name not in MODELS:
            text = file.read_text(encoding="utf-8")
            for part in text.strip().split("\n") if file.suffix == ".jsonl" else [text]:
                found.update(strings(json.loads(part)))
    return sorted(found)


# --- ids and text are SentencePiece's ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "every"), [("llama2", 1), ("stories260k", 5)])
def test_every_real_string(name: str, every: int, real: Callable, real_strings: list[str]) -> None:
    _, ours, theirs = real(name)
    assert len(real_strings) > 40_000
    assert differing(real_strings[::every], ours, theirs) == []


@pytest.mark.parametrize("name", MODELS)
def test_every_run_of_spaces(name: str, real: Callable) -> None:
    _, ours, theirs = real(name)
    shapes = ["{}", "{}x", "x{}", "x{}y", "{0}return {0}x{0}", "\n{}def f", "\t{}\tx", "x\r\n{}y\r\n", "{}\n", "{}\u2581{}x", "水{}水", "🙂{}é", "{}(", "{}1"]
    texts = [shape.format(run, run) for shape in shapes for n in range(65) for run in (" " * n, "\t" * n, "\n" * n, " \t" * n, "\u00a0" * n, "\u2581" * n)]
    assert differing(texts, ours, theirs) == []


LETTERS = st.sampled_from(
    [" "] * 6 + list("abetx\t\n\r.,;(){}=059\x00\u2581\u00a0é水\u200b\u200d\u0301\ufeff\ufffd\ufb01\U0001f642\U0010ffff") + ["\r\n", "    ", "👩\u200d💻", "🇫🇷", "한국어"]
)


@pytest.mark.parametrize("name", MODELS)
def test_texts_of_letters_and_of_pieces(name: str, real: Callable) -> None:
    _, ours, theirs = real(name)
    pieces = [theirs.id_to_piece(number).replace("\u2581", " ") for number in range(theirs.vocab_size()) if not (theirs.is_control(number) or theirs.is_unknown(number))]
    text = st.one_of(
        st.lists(LETTERS, max_size=60), st.lists(st.sampled_from(pieces), max_size=30), st.lists(st.one_of(st.sampled_from(pieces), LETTERS), max_size=30), st.text(max_size=40)
    )

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(text.map("".join), min_size=10, max_size=10))
    def check(texts: list[str]) -> None:
        assert differing([text for text in texts if not CONTROL.search(text)], ours, theirs) == []

    check()


@pytest.mark.parametrize("template", ["user_assistant", "alpaca", "llama2_chat", "mistral_instruct"])
def test_a_text_goes_on_after_a_control_token_with_no_space_put_in(template: str, shared_data: Path, real: Callable, tmp_path: Path) -> None:
    """A rendered conversation is its control tokens and, between them, what SentencePiece without its leading space makes of the text."""
    model, ours, _ = real("llama2")
    theirs = without_prefix(model)
    tokenizer = load_tokenizer(make_folder(tmp_path / "base", model, LLAMA2))
    records = [plain(row) for row in readers.read(str(shared_data / "phasedsft" / "en-alpaca52k-stage3.jsonl")).records]
    texts = [render(template, record, tokenizer).text for record in records[::7]]
    assert all(text.startswith("<s>") for text in texts)
    expected = [[i for part in CONTROL.split(text) for i in ([theirs.piece_to_id(part)] if CONTROL.fullmatch(part) else theirs.encode(part))] for text in texts]
    assert [encoding.ids for encoding in ours.encode_batch(texts, add_special_tokens=False)] == expected
    assert [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)] == expected


# --- models of other settings: exact, or refused --------------------------------------------------------------------------------


EXACT: list[dict[str, Any]] = [
    {},
    {"add_dummy_prefix": False},
    {"byte_fallback": False},
    {"remove_extra_whitespaces": True},
    {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    {"allow_whitespace_only_pieces": False, "split_by_whitespace": False},
    {"allow_whitespace_only_pieces": False, "split_digits": False, "byte_fallback": False, "control_symbols": ["[INST]", "[/INST]"]},
    {"user_defined_symbols": ["def", "defg", "水"], "add_dummy_prefix": False},
    {"pad_id": 3, "unk_id": 2, "bos_id": 0, "eos_id": 1},
]


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_a_trained_model_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    model = trained(**options)
    ours, theirs = made(make_folder(tmp_path, model)), processor(model)
    rng = random.Random(0)
    letters = [*"  \t\n.()+:#defg0123xwaterinsdup", "    ", "defg", "de", "水", "é", "🙂", "\u200b"]
    if not options.get("remove_extra_whitespaces"):
        letters.append("\u2581")  # at a text's start its decoding is not held, see the module
    texts = ["".join(rng.choices(letters, k=rng.randrange(40))) for _ in range(1500)] + CORPUS + [" " * n + word for n in range(40) for word in ("", "x", "the")]
    assert differing(texts, ours, theirs) == []
    marked = ours.encode("x").ids
    assert marked == [theirs.bos_id(), *theirs.encode("x")]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"model_type": "unigram"}, "model_type is UNIGRAM"),
        ({"model_type": "char"}, "model_type is CHAR"),
        ({"normalization_rule_name": "nmt_nfkc"}, "the normalization 'nmt_nfkc'"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix"),
        ({"user_defined_symbols": ["def"]}, "the piece 'def' is of type USER_DEFINED"),
    ],
)
def test_what_cannot_be_exact_is_refused_in_one_line(options: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path, trained(**options))
    for use in (added_files, load_tokenizer):
        with pytest.raises(UserError, match=complaint) as caught:
            use(folder)
        assert "\n" not in str(caught.value)
        assert "tokenizer.json beside it would do" in str(caught.value)


@pytest.mark.parametrize(
    ("pieces", "kinds", "complaint"),
    [
        ([("a", 0), ("b", -1), ("c", -2), ("ab", -3), ("bc", -3)], {}, "'ab' and 'bc' have scores"),
        ([("a", 0), ("b", -1), ("c", -2), ("ab", -3), ("abc", -3)], {}, "'ab' and 'abc' have scores"),
        ([("a", 0), ("ab", -3)], {}, "character 'b'"),
        ([("a", 0), ("b", -1), ("ab", -3)], {"ab": 5}, "'ab' is of type UNUSED"),
    ],
)
def test_pieces_that_ranks_cannot_order_are_refused(pieces: list[tuple[str, float]], kinds: dict[str, int], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        added_files(make_folder(tmp_path, crafted(pieces, kinds=kinds)))


def test_a_file_that_is_no_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"IQ== 0\nIg== 1\n"):
        with pytest.raises(UserError, match="is not a SentencePiece model"):
            load_tokenizer(make_folder(tmp_path, content))


def test_runs_of_spaces_of_one_score_grow_from_the_left() -> None:
    """As Llama-2's: fifteen pieces of spaces share the lowest score."""
    scores = {"x": -1.0, "\u2581": -2.0, "\u2581x": -3.0} | {"\u2581" * n: -1e9 for n in range(2, 5)}
    assert merges(scores) == [("\u2581", "x"), ("\u2581\u2581\u2581", "\u2581"), ("\u2581\u2581", "\u2581"), ("\u2581", "\u2581")]


@st.composite
def vocabularies(draw: st.DrawFn) -> tuple[bytes, bool]:
    """Pieces that no trainer would make: any letters, any scores, often equal ones."""
    letters = draw(st.sampled_from(["\u2581a", "\u2581ab", "\u2581abc"]))
    words = draw(
        st.lists(st.one_of(st.text(letters, min_size=2, max_size=5), st.sampled_from(letters).flatmap(lambda c: st.integers(2, 8).map(lambda n: c * n))), min_size=1, max_size=14)
    )
    score = draw(st.sampled_from([st.floats(-100, 0, width=32), st.integers(-40, 0), st.integers(-4, 0), st.just(0)]))
    squeeze = draw(st.booleans())
    return crafted([(piece, draw(score)) for piece in dict.fromkeys([*letters, *words])], prefix=draw(st.booleans()), squeeze=squeeze), squeeze


def test_a_vocabulary_of_any_scores_is_exact_or_refused(tmp_path: Path) -> None:
    """The merge law itself, where splits, scores and ties are as bad as they can be."""
    accepted = []

    @settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
    @given(vocabularies(), st.integers(0, 2**32))
    def check(vocabulary: tuple[bytes, bool], seed: int) -> None:
        model, squeeze = vocabulary
        try:
            ours = made(make_folder(tmp_path, model))
        except UserError as error:
            assume("leave their order" not in str(error))
            raise
        rng = random.Random(seed)
        texts = ["".join(rng.choices("  abcab\n" + "\u2581" * (not squeeze) + "é" * (seed % 2), k=rng.randrange(25))) for _ in range(60)]
        assert differing(texts + [c * n for c in " abc" for n in range(20)], ours, processor(model)) == []
        accepted.append(model)

    check()
    assert len(accepted) > 100


# --- a folder's tokenizer, loaded here ----------------------------------------------------------------------------------------------


TEXTS = ["", " ", "x", " x", "   leading", "a  b", "def f(x):\n    return x\n", "\n", "\u2581x", "水 é 🙂\u200d", "a\r\n\r\n  b  "]


def test_tokenizer_json_is_used_as_it_is(tmp_path: Path) -> None:
    """Whatever class tokenizer_config.json names: pipeline and merges are the file's, tokens and chat template the configuration's."""
    model = trained()
    whole = json.loads(added_files(make_folder(tmp_path / "made", model))["tokenizer.json"])
    whole["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}]}
    whole["pre_tokenizer"], whole["post_processor"] = None, whole["post_processor"]["processors"][1]  # Llama-2's own file
    whole["model"]["merges"] = whole["model"]["merges"][:-5]
    for number, name in enumerate(["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast", "MistralTokenizer", None]):
        config = LLAMA2 | {"pad_token": "</s>", "chat_template": "{{ bos_token }}{{ messages[0].content }}", "tokenizer_class": name}
        if name is None:
            del config["tokenizer_class"]
        folder = make_folder(tmp_path / str(number), model, config, tokenizer__json=whole)
        tokenizer = load_tokenizer(folder)
        loaded = json.loads(tokenizer.backend_tokenizer.to_str())
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder", "model"):
            assert loaded[part] == whole[part], part
        assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>", "</s>")
        assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi"
        assert tokenizer.is_fast
        assert added_files(folder) == {}


@pytest.mark.parametrize("config", [None, LLAMA2, OLDER, {"tokenizer_class": "LlamaTokenizer"}, LLAMA2 | {"legacy": True, "added_tokens_decoder": TOKENS}])
def test_a_model_alone_has_sentencepieces_ids_and_the_folders_tokens(config: dict[str, Any] | None, tmp_path: Path) -> None:
    model = trained()
    folder = make_folder(tmp_path, model, config, chat_template__jinja="{{ bos_token }}{{ messages[0].content }}")
    before = sorted(file.name for file in folder.iterdir())
    tokenizer, theirs = load_tokenizer(folder), processor(model)
    assert differing(TEXTS, tokenizer.backend_tokenizer, theirs) == []
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token) == ("<s>", "</s>", "<unk>", None)
    assert sorted(tokenizer.all_special_tokens) == ["</s>", "<s>", "<unk>"]
    assert [tokenizer(text).input_ids for text in TEXTS] == [[1, *theirs.encode(text)] for text in TEXTS]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "<s>Hi"
    assert (len(tokenizer), tokenizer.is_fast, tokenizer.name_or_path) == (theirs.vocab_size(), True, str(folder))
    assert sorted(file.name for file in folder.iterdir()) == before


def test_the_configuration_says_which_marks_are_put_around_a_text(tmp_path: Path) -> None:
    model = trained()
    for number, (bos, eos) in enumerate([(True, True), (False, False), (False, True)]):
        tokenizer = load_tokenizer(make_folder(tmp_path / str(number), model, LLAMA2 | {"add_bos_token": bos, "add_eos_token": eos}))
        assert tokenizer("x").input_ids == [1] * bos + processor(model).encode("x") + [2] * eos


@pytest.mark.parametrize("way", ["added_tokens.json", "added_tokens_decoder", "tokenizer_config.json alone", "special_tokens_map.json"])
def test_tokens_added_behind_the_pieces_keep_their_ids(way: str, tmp_path: Path) -> None:
    model = trained()
    size = processor(model).vocab_size()
    pad = {"content": "<pad>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    config: dict[str, Any] = LLAMA2 | {"pad_token": "<pad>"}
    files: dict[str, Any] = {}
    if way == "added_tokens.json":
        files["added_tokens__json"] = {"<pad>": size}
    elif way == "added_tokens_decoder":
        config["added_tokens_decoder"] = TOKENS | {str(size): pad}
    elif way == "special_tokens_map.json":
        del config["pad_token"]
        files["special_tokens_map__json"] = SPECIAL | {"pad_token": "<pad>"}
    base = make_folder(tmp_path / "base", model, config, **files)
    for tokenizer in (load_tokenizer(base), AutoTokenizer.from_pretrained(exported(base, tmp_path / "exported"))):
        assert (tokenizer.pad_token_id, len(tokenizer), "<pad>" in tokenizer.all_special_tokens) == (size, size + 1, True)
        assert tokenizer("x<pad>y", add_special_tokens=False).input_ids == [*processor(model).encode("x"), size, *without_prefix(model).encode("y")]


def test_a_special_token_that_is_no_piece_comes_behind_the_pieces(tmp_path: Path) -> None:
    model = trained()
    base = make_folder(tmp_path / "base", model, LLAMA2 | {"bos_token": "<|start|>"})
    size = processor(model).vocab_size()
    for tokenizer in (load_tokenizer(base), AutoTokenizer.from_pretrained(exported(base, tmp_path / "exported"))):
        assert tokenizer("x").input_ids == [size, *processor(model).encode("x")]


@pytest.mark.parametrize(("added", "complaint"), [({"<pad>": 9999}, "'<pad>' has id 9999"), ({"<pad>": 5}, "'<pad>' is given id 5"), ({"<s>": 0}, "'<s>' is given id 0")])
def test_added_tokens_that_cannot_have_their_ids_are_refused(added: dict[str, int], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint):
        added_files(make_folder(tmp_path, trained(), LLAMA2, added_tokens__json=added))


@pytest.mark.parametrize("beside", [True, False])
def test_no_local_folder_asks_the_network(beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        asked.append(args)
        raise OSError("no network in this test")

    asked: list[Any] = []
    base = make_folder(tmp_path / "base", trained(), LLAMA2)
    folder = exported(base, tmp_path / "exported", "mistral") if beside else base
    if beside:  # transformers asks the hub about large vocabularies (is this Mistral's?), unless it knows the folder as local
        whole = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        whole["model"]["vocab"] |= {f"piece {n}": n for n in range(len(whole["model"]["vocab"]), 100_100)}
        (folder / "tokenizer.json").write_text(json.dumps(whole), encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    load_tokenizer(folder)
    assert asked == []


# --- and loaded by others, from an exported folder -----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "mistral"])
@pytest.mark.parametrize(
    "config", [None, LLAMA2, OLDER, LLAMA2 | {"added_tokens_decoder": TOKENS}, {"tokenizer_class": "LlamaTokenizer"}, {}, LLAMA2 | {"tokenizer_class": "CodeLlamaTokenizer"}]
)
def test_an_exported_folder_has_sentencepieces_ids_in_autotokenizer(config: dict[str, Any] | None, model_type: str, tmp_path: Path) -> None:
    model = trained()
    base = make_folder(tmp_path / "base", model, config)
    tokenizer, theirs = AutoTokenizer.from_pretrained(exported(base, tmp_path / "exported", model_type)), processor(model)
    assert [tokenizer(text, add_special_tokens=False).input_ids for text in TEXTS] == theirs.encode(TEXTS)
    assert [tokenizer(text).input_ids for text in TEXTS] == [[1, *theirs.encode(text)] for text in TEXTS]
    assert [tokenizer.decode(theirs.encode(text)) for text in TEXTS] == theirs.decode(theirs.encode(TEXTS))
    assert [tokenizer.decode([1, *theirs.encode(text)], skip_special_tokens=True) for text in TEXTS] == theirs.decode(theirs.encode(TEXTS))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    here = load_tokenizer(base)
    assert json.loads(here.backend_tokenizer.to_str()) == json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (LLAMA2, set()),
        (OLDER, set()),
        (LLAMA2 | {"tokenizer_class": "LlamaTokenizerFast"}, set()),
        (LLAMA2 | {"tokenizer_class": "CodeLlamaTokenizer"}, {"tokenizer_class"}),
        ({"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}, {"bos_token", "unk_token"}),
    ],
)
def test_a_configuration_is_left_as_it_is_where_that_is_enough(config: dict[str, Any], changed: set[str], tmp_path: Path) -> None:
    files = added_files(make_folder(tmp_path, trained(), config))
    assert set(files) == {"tokenizer.json"} | ({"tokenizer_config.json"} if changed else set())
    after = json.loads(files.get("tokenizer_config.json", json.dumps(config)))
    assert {key for key in after.keys() | config.keys() if after.get(key) != config.get(key)} == changed


def test_special_tokens_map_names_the_tokens_too(tmp_path: Path) -> None:
    files = added_files(make_folder(tmp_path, trained(), {"tokenizer_class": "LlamaTokenizer"}, special_tokens_map__json=SPECIAL))
    assert set(files) == {"tokenizer.json"}


@pytest.mark.parametrize(("name", "config"), [("llama2", LLAMA2), ("llama2", None), ("stories260k", LLAMA2)])
def test_a_real_model_exported(name: str, config: dict[str, Any] | None, real: Callable, real_strings: list[str], tmp_path: Path) -> None:
    model, _, theirs = real(name)
    base = make_folder(tmp_path / "base", model, config)
    tokenizer = AutoTokenizer.from_pretrained(exported(base, tmp_path / "exported"))
    texts = [*real_strings[::50], *TEXTS]
    assert differing(texts, tokenizer.backend_tokenizer, theirs) == []
    assert [ids[0] for ids in tokenizer(texts).input_ids] == [1] * len(texts)

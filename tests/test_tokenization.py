"""Text to tokens: what is trained decodes to the response and ends in its end token, and what comes before is what generation is given."""

from __future__ import annotations

import ast
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from phased_ift_jax.config import TEMPLATES as CONFIG_TEMPLATES
from phased_ift_jax.data import readers
from phased_ift_jax.data.phases import plain
from phased_ift_jax.data.templates import TEMPLATES, render
from phased_ift_jax.data.tokenization import decode, end_of_response, load_tokenizer, prompt_ids, tokenize
from phased_ift_jax.records import InstructionRecord, Quarantined, Source, TokenizedExample, Turn, UserError

BOS, EOS, SPACE = 1, 2, 29871  # Llama-2
OURS = ["user_assistant", "alpaca", "llama2_chat", "mistral_instruct"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN2 = "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
QWEN2 += "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
QWEN2 += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
FORGETFUL = "{{ bos_token }}{% for m in messages[-2:] %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"


def record(*turns: Turn, system: str = "") -> InstructionRecord:
    return InstructionRecord("r1", turns, Source("data.jsonl", 7), system)


POEM = record(Turn("Create a poem.", "The water\nis  wide — 水."))
CHAT = record(Turn("Hello there", "Hi!"), Turn("Add these", "Five.\n", "2 and 3"), Turn("Thanks", "You are welcome"), system="Be brief.")


def one(record: InstructionRecord, tokenizer: Any, template: str = "user_assistant", max_length: int = 2048, truncation: str = "truncate") -> TokenizedExample:
    (result,) = tokenize([record], tokenizer, template, max_length, truncation)
    assert isinstance(result, TokenizedExample), result
    return result


def refused(record: InstructionRecord, tokenizer: Any, template: str = "user_assistant", max_length: int = 2048, truncation: str = "truncate") -> str:
    (result,) = tokenize([record], tokenizer, template, max_length, truncation)
    assert isinstance(result, Quarantined)
    assert (result.source, result.id) == (record.source, record.id)
    return result.reason


def trained(example: TokenizedExample) -> list[list[int]]:
    return [example.tokens[begin:end].tolist() for begin, end in example.responses]


def response_text(ids: Sequence[int], tokenizer: Any) -> str:
    """`transformers`' own decoding of trained tokens without their last, the end token."""
    return tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False)


@pytest.fixture(scope="module")
def llama2(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copy(shared_data / "llama2" / "tokenizer.model", folder)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def stage3(shared_data: Path) -> list[InstructionRecord]:
    return [plain(row) for row in readers.read(str(shared_data / "phasedsft" / "en-alpaca52k-stage3.jsonl")).records]


@pytest.fixture(scope="module")
def tokenized(llama2: Any, stage3: list[InstructionRecord]) -> Callable[[str], list[TokenizedExample | Quarantined]]:
    return cache(lambda template: list(tokenize(stage3, llama2, template, 2048)))


# --- real rows -------------------------------------------------------------------------------------------------------------------


def test_golden_ids_of_the_papers_format(llama2: Any) -> None:
    example = one(record(Turn("Create a poem.", "The water")), llama2)
    assert example.tokens.tolist() == [1, 2659, 29901, 6204, 263, 26576, 29889, 2, 13, 7900, 22137, 29901, 450, 4094, 2]
    assert example.responses == ((12, 15),)  # the space of "Assistant: The" is the first response token's
    assert prompt_ids(record(Turn("Create a poem.", "")), llama2, "user_assistant").tolist() == example.tokens[:12].tolist()


@pytest.mark.parametrize("template", OURS)
def test_every_real_row_keeps_the_law(template: str, tokenized: Callable, stage3: list[InstructionRecord], llama2: Any) -> None:
    rows = tokenized(template)
    assert len(rows) == len(stage3) == 6889
    assert Counter(row.reason for row in rows if isinstance(row, Quarantined)) == {"empty response": 9}
    pairs = [(record, row) for record, row in zip(stage3, rows, strict=True) if isinstance(row, TokenizedExample)]
    assert all(len(row.responses) == 1 and not row.truncated for _, row in pairs)
    assert all(row.responses[0][1] == len(row.tokens) and row.tokens[-1] == EOS for _, row in pairs)
    assert all((row.tokens == BOS).sum() == 1 and row.tokens[0] == BOS for _, row in pairs)

    inside = [row.tokens[row.response_start : -1].tolist() for _, row in pairs]
    assert not any({BOS, EOS} & set(ids) for ids in inside)
    texts = llama2.backend_tokenizer.decode_batch(inside, skip_special_tokens=False)
    # this decoder drops the one space that joins a text to what came before; llama2_chat has a space of its own before the end token
    tail = " " if template == "llama2_chat" else ""
    wrong = [text for text, (record, _) in zip(texts, pairs, strict=True) if text != (record.turns[0].response + tail).removeprefix(" " * (template == "alpaca"))]
    assert wrong == []


@pytest.mark.parametrize("template", OURS)
def test_generation_is_given_the_tokens_before_the_response(template: str, tokenized: Callable, stage3: list[InstructionRecord], llama2: Any) -> None:
    prompts = llama2.backend_tokenizer.encode_batch([render(template, record, llama2).prompt for record in stage3], add_special_tokens=False)
    rows = tokenized(template)
    assert all(isinstance(row, Quarantined) or prompt.ids == row.tokens[: row.response_start].tolist() for prompt, row in zip(prompts, rows, strict=True))
    for at in range(1, len(rows), 700):
        unanswered = record(Turn(stage3[at].turns[0].instruction, "", stage3[at].turns[0].input))
        assert np.array_equal(prompt_ids(unanswered, llama2, template), prompts[at].ids)


def test_no_space_is_inserted_before_a_response(tokenized: Callable, stage3: list[InstructionRecord]) -> None:
    rows = [(r.turns[0].response[:1], row) for r, row in zip(stage3, tokenized("user_assistant"), strict=True) if isinstance(row, TokenizedExample)]
    ordinary = [row for letter, row in rows if letter.isascii() and letter.isalpha()]
    assert len(ordinary) > 6000
    assert not any(row.tokens[row.response_start] == SPACE for row in ordinary)


def test_a_short_max_length_truncates_and_counts(shared_data: Path, stage3: list[InstructionRecord]) -> None:
    tokenizer = load_tokenizer(shared_data / "stories260k")
    rows = list(tokenize(stage3, tokenizer, "user_assistant", 512))
    used = [(record, row) for record, row in zip(stage3, rows, strict=True) if isinstance(row, TokenizedExample)]
    cut = [(record, row) for record, row in used if row.truncated]
    reasons = [row.reason for row in rows if isinstance(row, Quarantined)]
    assert (len(used), len(cut), reasons.count("empty response"), len(reasons)) == (6876, 1219, 9, 13)
    assert sorted(r for r in reasons if r != "empty response") == [f"a prompt of {n} tokens leaves no room for a response in data.max_length 512" for n in (832, 835, 836, 916)]
    assert all(len(row.tokens) == 512 and EOS not in row.tokens[row.response_start :] for _, row in cut)
    texts = tokenizer.backend_tokenizer.decode_batch([row.tokens[row.response_start :].tolist() for _, row in cut])
    assert all(whole.turns[0].response.lstrip(" ").startswith(text.rstrip("\ufffd").lstrip(" ")) for text, (whole, _) in zip(texts, cut, strict=True))
    assert all(row.tokens[-1] == EOS for _, row in used if not row.truncated)
    strictly = tokenize(stage3[:600], tokenizer, "user_assistant", 512, "quarantine")
    assert [isinstance(row, Quarantined) for row in strictly] == [isinstance(row, Quarantined) or row.truncated for row in rows[:600]]


# --- truncation and refusal ------------------------------------------------------------------------------------------------------


def test_truncation_at_every_length(llama2: Any) -> None:
    whole = one(POEM, llama2)
    start, end = whole.responses[0]
    for n in range(2, end + 2):
        if n <= start:
            assert refused(POEM, llama2, max_length=n) == f"a prompt of {start} tokens leaves no room for a response in data.max_length {n}"
        else:
            example = one(POEM, llama2, max_length=n)
            assert example.truncated == (n < end)
            assert example.tokens.tolist() == whole.tokens[:n].tolist()
            assert example.responses == ((start, min(n, end)),)
            assert example.response_tokens >= 1
        if n < end:
            assert refused(POEM, llama2, max_length=n, truncation="quarantine") == f"{end} tokens, data.max_length is {n}"


def test_truncation_inside_a_conversation_ends_with_a_response(llama2: Any) -> None:
    whole = one(CHAT, llama2)
    for n in range(whole.responses[0][0] + 1, len(whole.tokens)):
        example = one(CHAT, llama2, max_length=n)
        assert example.truncated
        assert len(example.tokens) == example.responses[-1][1] <= n
        assert example.tokens.tolist() == whole.tokens[: len(example.tokens)].tolist()
        for span, of_whole in zip(example.responses, whole.responses, strict=False):
            assert span == (of_whole[0], min(of_whole[1], n))


@pytest.mark.parametrize("place", ["system", "instruction", "input", "response"])
@pytest.mark.parametrize("token", ["<s>", "</s>", "<unk>"])
def test_control_tokens_in_the_users_text_are_quarantined(place: str, token: str, llama2: Any) -> None:
    texts = {"system": "", "instruction": "Say it", "input": "now", "response": "It."}
    texts[place] = f"HTML {token}struck out"
    bad = record(Turn(texts["instruction"], texts["response"], texts["input"]), system=texts["system"])
    assert refused(bad, llama2) == f"the text contains the control token {token!r}"


def test_further_control_tokens_of_a_tokenizer_are_quarantined_too() -> None:
    """Law: so is a text with a control token that is neither BOS nor EOS, such as Mistral v0.3's [INST]."""
    tokenizer = load_tokenizer(Path(__file__).parent.parent / "configs/quickstart/model")
    tokenizer.backend_tokenizer.add_special_tokens(["[INST]"])
    assert refused(record(Turn("Repeat: a [INST] b", "a")), tokenizer) == "the text contains the control token '[INST]'"


@pytest.mark.parametrize("response", ["", " \n\t"])
def test_an_empty_response_is_quarantined_in_any_turn(response: str, llama2: Any) -> None:
    assert refused(record(Turn("a", "b"), Turn("c", response)), llama2) == "empty response"


def test_results_keep_the_order_of_the_records(llama2: Any) -> None:
    rows = list(tokenize([POEM, record(Turn("a", "")), CHAT], llama2, "alpaca", 2048))
    assert [type(row) for row in rows] == [TokenizedExample, Quarantined, TokenizedExample]
    assert np.array_equal(rows[2].tokens, one(CHAT, llama2, "alpaca").tokens)


# --- several turns, and templates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", OURS)
def test_every_response_of_a_conversation_is_trained_and_nothing_else(template: str, llama2: Any) -> None:
    example = one(CHAT, llama2, template)
    assert [response_text(ids, llama2).strip(" ") for ids in trained(example)] == ["Hi!", "Five.\n", "You are welcome"]
    assert all(ids[-1] == EOS for ids in trained(example))
    assert (example.tokens == BOS).sum() == (3 if template == "llama2_chat" else 1)  # Meta's own: a BOS for each turn
    mask = np.zeros(len(example.tokens), bool)
    for begin, end in example.responses:
        mask[begin:end] = True
    untrained = llama2.decode(example.tokens[~mask])
    assert not any(text in untrained for text in ("Hi!", "Five", "welcome"))
    assert all(text in untrained for text in ("Be brief.", "Hello there", "2 and 3", "Thanks"))
    assert np.array_equal(prompt_ids(CHAT, llama2, template), example.tokens[: example.response_start])


@pytest.mark.parametrize("template", OURS)
def test_a_template_adds_nothing_to_an_instruction(template: str, llama2: Any) -> None:
    text = render(template, record(Turn("Name a flower", "A rose")), llama2).text
    assert "Name a flower" in text
    assert "Name a flower." not in text


def test_templates_are_those_of_the_configuration() -> None:
    assert tuple(TEMPLATES) == CONFIG_TEMPLATES


def test_a_prompt_is_spelt_once_in_the_whole_house() -> None:
    package = Path(readers.__file__).parents[1]
    spelt = {
        (path.relative_to(package).as_posix(), wording)
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        for wording in ("User: ", "Assistant:", "### Instruction", "### Response", "[INST]", "<<SYS>>")
        if wording in node.value
    }
    assert {wording for _, wording in spelt} == {"User: ", "Assistant:", "### Instruction", "### Response", "[INST]", "<<SYS>>"}
    assert {path for path, _ in spelt} == {"data/templates.py"}


def test_chat_template_in_chatml(llama2: Any) -> None:
    tokenizer = load_tokenizer(Path(llama2.name_or_path))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    example = one(CHAT, tokenizer, "tokenizer")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert [(response_text(ids, tokenizer), ids[-1]) for ids in trained(example)] == [("Hi!", end), ("Five.\n", end), ("You are welcome", end)]
    assert np.array_equal(prompt_ids(CHAT, tokenizer, "tokenizer"), example.tokens[: example.response_start])
    whole = tokenizer.apply_chat_template(
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}], return_dict=False
    )
    assert one(record(Turn("Hi", "Ho"), system="Be brief."), tokenizer, "tokenizer").tokens.tolist() == whole[: whole.index(end, len(whole) - 4) + 1]
    tokenizer.chat_template = CHATML + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
    assert trained(one(POEM, tokenizer, "tokenizer"))[0][-1] == end  # the first control token ends a response, whatever comes behind it
    assert "control token '<|im_end|>'" in refused(record(Turn("a", "b <|im_end|>")), tokenizer, "tokenizer")


def test_chat_template_like_llama2s(llama2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama2, "chat_template", LLAMA_CHAT)
    example = one(record(Turn("Hello there", " Hi!\n"), Turn("Thanks", "You are welcome")), llama2, "tokenizer")
    assert [response_text(ids, llama2).strip() for ids in trained(example)] == ["Hi!", "You are welcome"]
    assert all(ids[-1] == EOS for ids in trained(example))
    assert (example.tokens == BOS).sum() == 1


@pytest.mark.parametrize(
    ("template", "complaint"),
    [
        (None, "has no chat template of its own"),
        (FORGETFUL, "rewrites earlier text"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "ends a response with no control token"),
        ("{{ raise_exception('no system, please') }}", "no system, please"),
        ("{% for m in messages %}", "chat template fails"),
    ],
)
def test_an_unusable_chat_template_is_one_line(template: str | None, complaint: str, llama2: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama2, "chat_template", template)
    with pytest.raises(UserError, match=complaint) as caught:
        one(CHAT, llama2, "tokenizer")
    assert str(caught.value).startswith("data.prompt_template: ")
    assert "\n" not in str(caught.value)


# --- tokenizers --------------------------------------------------------------------------------------------------------------------


def small_tokenizer(folder: Path, normalizer: Any = None, **special: str) -> Any:
    """A byte-level tokenizer of 256 letters, or with a normalizer that loses some of what it reads."""
    folder.mkdir(exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = {"bos_token": "<s>", "eos_token": "</s>"} | special
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([*dict.fromkeys(special.values()), *alphabet])}, merges=[]))
    tokenizer.add_special_tokens(list(dict.fromkeys(special.values())))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special}), encoding="utf-8")
    return load_tokenizer(folder)


def test_bytes_of_one_character_are_not_torn_apart(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "bytes")
    response = "é水🙂 ok"
    example = one(record(Turn("¿Qué?", response)), tokenizer)
    assert response_text(trained(example)[0], tokenizer) == " " + response
    for n in range(example.response_start + 1, len(example.tokens)):
        assert one(record(Turn("¿Qué?", response)), tokenizer, max_length=n).truncated


def test_padding_with_the_end_token_does_not_mask_it(tmp_path: Path) -> None:
    plain_, padded = small_tokenizer(tmp_path / "plain"), small_tokenizer(tmp_path / "padded", pad_token="</s>")
    assert padded.pad_token_id == padded.eos_token_id
    a, b = one(CHAT, plain_), one(CHAT, padded)
    assert np.array_equal(a.tokens, b.tokens)
    assert a.responses == b.responses
    assert all(ids[-1] == padded.eos_token_id for ids in trained(b))


def test_one_token_may_be_beginning_end_and_unknown(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "one", bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")
    example = one(POEM, tokenizer)
    assert trained(example)[0][-1] == example.tokens[0] == tokenizer.eos_token_id


def test_rows_that_a_lossy_tokenizer_changes_are_quarantined(tmp_path: Path) -> None:
    tokenizer = small_tokenizer(tmp_path / "lower", normalizers.Lowercase())
    assert one(record(Turn("Name a Flower", "a rose")), tokenizer).response_tokens == len(" a rose") + 1  # a prompt may lose its capitals
    assert refused(record(Turn("Name a flower", "a Rose")), tokenizer) == "the response decodes to another text: 'rose' for 'Rose'"
    assert refused(record(Turn("a", "b"), Turn("c", "D")), tokenizer) == "the response decodes to another text: 'd' for 'D'"
    assert "'rose" in refused(record(Turn("Name a flower", "a Rose is a rose")), tokenizer, max_length=40)  # truncated: the prefix counts


def test_equal_texts_are_told_apart_by_place(tmp_path: Path) -> None:
    """Only the last response of a truncated row may be a prefix; an earlier one that reads the same must be whole."""
    tokenizer = small_tokenizer(tmp_path / "drops", normalizers.Replace("!", ""))
    two = record(Turn("a", "yes!"), Turn("b", "yes no"))
    start = one(record(Turn("a", "yes"), Turn("b", "yes no")), tokenizer).response_start
    assert refused(two, tokenizer, max_length=start + len(" yes")) == "the response decodes to another text: '' for '!'"


def test_characters_that_a_tokenizer_does_not_know_are_quarantined(tmp_path: Path) -> None:
    (tmp_path / "words").mkdir()
    words = ["<s>", "</s>", "<unk>", "User", ":", "Assistant", "Name", "a", "flower", "rose"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(words[:3])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words" / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (tmp_path / "words" / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    loaded = load_tokenizer(tmp_path / "words")
    assert one(record(Turn("Name a flower", "a rose")), loaded).tokens.tolist() == [0, 3, 4, 6, 7, 8, 1, 5, 4, 7, 9, 1]
    assert refused(record(Turn("Name a flower", "a tulip")), loaded).startswith("the tokenizer does not know 'tulip': ")
    assert refused(record(Turn("Name a tree", "a rose")), loaded).startswith("the tokenizer does not know 'tree': ")


def test_decode_is_the_inverse_for_an_answer(llama2: Any) -> None:
    example = one(POEM, llama2)
    assert decode(trained(example)[0], llama2) == POEM.turns[0].response


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({}, "has no tokenizer.json and no tokenizer.model"),
        ({"tokenizer.json": "{"}, "does not load"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_one_line(files: dict[str, str], complaint: str, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint) as caught:
        load_tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def configured(folder: Path, **settings: Any) -> Any:
    """The tokenizer of a folder with another tokenizer_config.json."""
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **settings}), encoding="utf-8")
    return load_tokenizer(folder)


def test_a_tokenizer_without_an_end_is_refused(tmp_path: Path) -> None:
    small_tokenizer(tmp_path / "t")
    with pytest.raises(UserError, match="has no eos_token"):
        configured(tmp_path / "t", bos_token="<s>")


@pytest.mark.parametrize("template", OURS)
def test_without_a_beginning_a_text_is_the_same_but_for_it(template: str, tmp_path: Path) -> None:
    begun = small_tokenizer(tmp_path / "t")
    tokenizer = configured(tmp_path / "t", bos_token=None, eos_token="</s>")
    for text in (CHAT, POEM):
        example, other = one(text, tokenizer, template), one(text, begun, template)
        assert example.tokens.tolist() == [token for token in other.tokens.tolist() if token != begun.bos_token_id]
        assert trained(example) == trained(other)
        assert np.array_equal(prompt_ids(text, tokenizer, template), example.tokens[: example.response_start])


def test_qwen2s_chat_template(tmp_path: Path) -> None:
    """Its tokenizer has no beginning-of-sequence token, reads what is composed in Unicode, and its template has a system text of its own."""
    small_tokenizer(tmp_path / "t", normalizers.NFC(), eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer = configured(tmp_path / "t", bos_token=None, eos_token="<|im_end|>", pad_token="<|endoftext|>", chat_template=QWEN2)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    example, written = one(POEM, tokenizer, "tokenizer"), POEM.turns[0]
    text = f"<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{written.instruction}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(example.tokens) == f"{text}{written.response}<|im_end|>"
    assert tokenizer.decode(prompt_ids(POEM, tokenizer, "tokenizer")) == text
    assert [response_text(ids, tokenizer) for ids in trained(one(CHAT, tokenizer, "tokenizer"))] == ["Hi!", "Five.\n", "You are welcome"]
    assert end_of_response(tokenizer, "tokenizer") == tokenizer.eos_token_id == trained(example)[0][-1]

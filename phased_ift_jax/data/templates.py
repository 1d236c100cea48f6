"""Prompt templates by name: how a conversation becomes text. Each is spelt once, for training and for inference alike.

A template renders the text before each response and around it; `tokenization` takes it from there. Control tokens stand in the text
as the tokenizer spells them, so that the whole is tokenised jointly, as a user of `transformers` would. A template adds nothing to an
instruction (no period); an Alpaca input is joined as the template says.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phased_ift_jax.records import InstructionRecord, Turn, UserError


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation; `responses` are the half-open character spans that are trained (response and end token)."""

    text: str
    responses: tuple[tuple[int, int], ...]

    @property
    def prompt(self) -> str:
        """What generation is given: the text up to the last response."""
        return self.text[: self.responses[-1][0]]


Template = Callable[[InstructionRecord, Any], Rendered]


def render(name: str, record: InstructionRecord, tokenizer: Any) -> Rendered:
    """The text of a record under a template; `tokenizer` is a `transformers` tokenizer (for its control tokens or chat template)."""
    return TEMPLATES[name](record, tokenizer)


def join_input(turn: Turn) -> str:
    """An instruction and its input on the next line, where there is one."""
    return f"{turn.instruction}\n{turn.input}" if turn.input else turn.instruction


def _turnwise(before: Callable[[InstructionRecord, int, Any], str], lead: str, tail: str) -> Template:
    """A template whose turns are: text before, `lead` + response + `tail` + EOS. Lead and tail are trained with the response."""

    def template(record: InstructionRecord, tokenizer: Any) -> Rendered:
        text, spans = "", []
        for number, turn in enumerate(record.turns):
            text += before(record, number, tokenizer)
            start = len(text)
            text += lead + turn.response + tail + tokenizer.eos_token
            spans.append((start, len(text)))
        return Rendered(text, tuple(spans))

    return template


def _begin(tokenizer: Any) -> str:
    """The beginning-of-sequence token, where the tokenizer has one (Qwen2's has none)."""
    return tokenizer.bos_token or ""


def _with_system(record: InstructionRecord, number: int) -> str:
    user = join_input(record.turns[number])
    return f"{record.system}\n{user}" if record.system and number == 0 else user


def _user_assistant(record: InstructionRecord, number: int, tokenizer: Any) -> str:
    # PhasedSFT's format; the space after the colon belongs to the response's first token, so the prompt ends in the colon
    return (_begin(tokenizer) if number == 0 else "") + f"User: {_with_system(record, number)}{tokenizer.eos_token}\nAssistant:"


def _alpaca(record: InstructionRecord, number: int, tokenizer: Any) -> str:
    # Stanford Alpaca's two wordings; the line break after "Response:" as in LLaMA-Factory and Axolotl
    turn = record.turns[number]
    paired = ", paired with an input that provides further context" if turn.input else ""
    opening = record.system or f"Below is an instruction that describes a task{paired}. Write a response that appropriately completes the request."
    opening = f"{_begin(tokenizer)}{opening}\n\n" if number == 0 else "\n\n"
    given = f"### Input:\n{turn.input}\n\n" if turn.input else ""
    return f"{opening}### Instruction:\n{turn.instruction}\n\n{given}### Response:\n"


def _llama2_chat(record: InstructionRecord, number: int, tokenizer: Any) -> str:
    # Meta's llama/generation.py: every turn has its own BOS and EOS
    system = f"<<SYS>>\n{record.system}\n<</SYS>>\n\n" if record.system and number == 0 else ""
    return f"{_begin(tokenizer)}[INST] {system}{join_input(record.turns[number])} [/INST]"


def _mistral_instruct(record: InstructionRecord, number: int, tokenizer: Any) -> str:
    # mistral-common's v1 instruct format: one BOS, an EOS after every response
    return (_begin(tokenizer) if number == 0 else "") + f"[INST] {_with_system(record, number)} [/INST]"


def _chat_template(record: InstructionRecord, tokenizer: Any) -> Rendered:
    """The tokenizer's own chat template; a response is trained up to the control token that ends it."""
    if not tokenizer.chat_template:
        raise UserError("data.prompt_template: this tokenizer has no chat template of its own; name one of " + ", ".join(sorted(TEMPLATES.keys() - {"tokenizer"})))
    messages = [{"role": "system", "content": record.system}] if record.system else []
    ends, spans = [token for token in tokenizer.all_special_tokens if token], []
    text = ""
    for turn in record.turns:
        messages.append({"role": "user", "content": join_input(turn)})
        prompt = _apply(tokenizer, messages, add_generation_prompt=True)
        messages.append({"role": "assistant", "content": turn.response})
        whole = _apply(tokenizer, messages, add_generation_prompt=False)
        if not (prompt.startswith(text) and whole.startswith(prompt)):
            raise UserError("data.prompt_template: this tokenizer's chat template rewrites earlier text when a response is added; name a template instead")
        found = [(at, len(token)) for token in ends if (at := whole.find(token, len(prompt))) >= 0]
        if not found:
            raise UserError("data.prompt_template: this tokenizer's chat template ends a response with no control token; name a template instead")
        at, length = min(found)
        spans.append((len(prompt), at + length))
        text = whole
    return Rendered(text[: spans[-1][1]], tuple(spans))


def _apply(tokenizer: Any, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
    import jinja2

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except jinja2.TemplateError as error:  # not a template, or one that refuses a role or an order of roles
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"data.prompt_template: this tokenizer's chat template fails on roles {roles}: " + " ".join(str(error).split()) + "; name a template instead") from None


TEMPLATES: dict[str, Template] = {
    "user_assistant": _turnwise(_user_assistant, " ", ""),
    "alpaca": _turnwise(_alpaca, "", ""),
    "llama2_chat": _turnwise(_llama2_chat, " ", " "),
    "mistral_instruct": _turnwise(_mistral_instruct, " ", ""),
    "tokenizer": _chat_template,
}

"""Instruction-Following Difficulty (Cherry LLM, Li et al. 2024): how little an instruction helps a model to its response.

The ratio of the mean loss of the response's tokens after their prompt to that of the same tokens after nothing but the
beginning-of-sequence token. End tokens are not counted: they are the template's, not the response's. Of several turns, all responses count.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from phased_ift_jax.config import MeshConfig, TrainingConfig
from phased_ift_jax.data.batches import Steps, batches
from phased_ift_jax.data.packing import choose_shapes, placed
from phased_ift_jax.data.tokenization import load_tokenizer, tokenize
from phased_ift_jax.models.decoder import Params
from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.records import InstructionRecord, Quarantined, TokenizedExample
from phased_ift_jax.sharding import batch_rows, make_mesh, put
from phased_ift_jax.training import conversion
from phased_ift_jax.training.plan import row_price
from phased_ift_jax.training.step import BATCH_DIMS, Trainer

LONGEST = 2048  # tokens of an example, where the model takes as many


def ratios(records: Sequence[InstructionRecord], model: str, template: str, max_length: int | None = None) -> tuple[list[float | Quarantined], dict[str, Any]]:
    """The ratio of each record, or why it has none; and what it was measured with. A response is cut where it does not fit in `max_length`.

    `model` is a folder, an address in a bucket or a hub name; it computes in float32, or in bfloat16 where its weights are no wider.

    Raises:
        UserError: the model cannot be read, or is none that we compute.
    """
    folder = open_folder(model)
    tokenizer = load_tokenizer(folder.path, folder.config.vocab_size)
    longest = max_length or min(LONGEST, folder.attributes.get("max_position_embeddings") or LONGEST)
    dtype = "float32" if folder.dtype == "float32" else "bfloat16"
    trainer = Trainer(folder.config, TrainingConfig(), make_mesh(MeshConfig()), dtype, dtype)
    made = list(tokenize(records, tokenizer, template, longest))
    special, usable = set(tokenizer.all_special_ids), [example for example in made if isinstance(example, TokenizedExample)]
    prompted = [_without_end(example, special) for example in usable]
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id  # without one, it is the end of a text before
    alone = [_alone(example, span, begin) for example in prompted for span in example.responses]
    owner = np.repeat(np.arange(len(prompted)), [len(example.responses) for example in prompted])

    sums = summed_losses(trainer, conversion.load_weights(folder, folder.converted, trainer.shardings.params, dtype), [*prompted, *alone]) if usable else np.zeros(0)
    without = np.bincount(owner, sums[len(prompted) :], len(prompted))
    with np.errstate(divide="ignore", invalid="ignore"):
        found = iter(sums[: len(prompted)] / without)
    results = [example if isinstance(example, Quarantined) else _finite(record, float(next(found))) for record, example in zip(records, made, strict=True)]
    facts = {"model": folder.name, "dtype": dtype, "prompt_template": template, "max_length": longest, "truncated": sum(example.truncated for example in usable)}
    return results, facts


def summed_losses(trainer: Trainer, params: Params, examples: Sequence[TokenizedExample], batch_size: int = 64, packed: bool = True) -> np.ndarray:
    """The summed loss of each example's trained tokens, (n,) in float64: the same whatever the batches, packed or not."""
    steps = Steps(np.arange(len(examples)), batch_size, 1, ("ifd",))
    lengths = np.array([len(example.tokens) for example in examples])
    price = row_price(trainer.model, trainer.compute.kernel_of(trainer.model), trainer.compute.platform)
    shapes = choose_shapes([lengths[steps[i]] for i in range(len(steps))], batch_rows(trainer.mesh.shape), 4, price, packed)
    sums = np.zeros(len(examples))
    for i, batch in enumerate(tqdm(batches(steps, 0, examples, shapes), total=len(steps), unit="batch", disable=None)):
        losses_BT = np.asarray(trainer.token_losses(params, put(batch, BATCH_DIMS, trainer.mesh)))[0]
        for row, held in enumerate(placed(lengths[steps[i]], shapes)[0]):
            sums[steps[i][held]] = np.bincount(batch.segments_BT[0, row], losses_BT[row], len(held) + 1)[1:]
    return sums


def _without_end(example: TokenizedExample, special: set[int]) -> TokenizedExample:
    spans = tuple((begin, end - (int(example.tokens[end - 1]) in special)) for begin, end in example.responses)
    return TokenizedExample(example.tokens, spans)


def _alone(example: TokenizedExample, span: tuple[int, int], begin: int) -> TokenizedExample:
    """The same tokens of a response, after the token alone that begins a sequence."""
    tokens = np.concatenate([[begin], example.tokens[slice(*span)]]).astype(np.int32)
    return TokenizedExample(tokens, ((1, len(tokens)),))


def _finite(record: InstructionRecord, ratio: float) -> float | Quarantined:
    return ratio if math.isfinite(ratio) else Quarantined(record.source, record.id, "the ratio of its losses is no finite number")

"""What a model knows of the held-out rows: the loss of each bin and, where asked for, greedy answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import jax
import numpy as np

from phased_ift_jax.data.batches import Steps, batches
from phased_ift_jax.data.packing import choose_shapes
from phased_ift_jax.data.tokenization import decode
from phased_ift_jax.models import generation
from phased_ift_jax.models.decoder import Params
from phased_ift_jax.sharding import batch_rows, put
from phased_ift_jax.training.plan import row_price
from phased_ift_jax.training.step import BATCH_DIMS

if TYPE_CHECKING:
    from phased_ift_jax.training.loop import Run


@dataclass(frozen=True)
class Answer:
    """A held-out prompt, the response of the data, and the model's."""

    id: str
    prompt: str
    response: str
    answer: str


@dataclass(frozen=True)
class Evaluation:
    """Held-out loss of each bin and, where asked for, greedy answers; both keyed by bin name."""

    losses: dict[str, float]
    answers: dict[str, list[Answer]]


class Results(Protocol):
    """Where figures of held-out rows are kept, by what was trained before: "base", or the folder of a phase."""

    def __contains__(self, after: object) -> bool: ...
    def add(self, after: str, evaluation: Evaluation) -> None: ...
    def drop(self, after: str) -> None: ...


def evaluate(run: Run, params: Params) -> Evaluation:
    """Measure parameters on the held-out rows of every bin."""
    trainer, config = run.trainer(run.plan.phases[0]), run.config
    steps = {name: Steps(rows, config.training.global_batch_size, 1, ("evaluation", name)) for name, rows in run.held_out}
    sizes = [run.plan.phases[0].lengths[s[i]] for s in steps.values() for i in range(len(s))]
    price = row_price(run.plan.model, trainer.compute.kernel_of(run.plan.model), trainer.compute.platform)
    shapes = choose_shapes(sizes, batch_rows(run.mesh.shape), 1, price, config.data.packing)
    losses = {}
    for name, chosen in steps.items():
        parts = [trainer.evaluate(params, put(batch, BATCH_DIMS, run.mesh)) for batch in batches(chosen, 0, run.dataset.examples, shapes)]
        losses[name] = float(sum(float(loss) for loss, _ in parts) / sum(float(count) for _, count in parts))
    answers = {name: _answers(run, params, rows) for name, rows in run.held_out} if config.evaluation.exact_match else {}
    return Evaluation(losses, answers)


def _answers(run: Run, params: Params, rows: np.ndarray) -> list[Answer]:
    examples = [run.dataset.examples[row] for row in rows]
    computing = jax.tree.map(lambda p: p.astype(run.config.model.dtype), params)
    prompts = [example.tokens[: example.response_start] for example in examples]
    generated = generation.greedy(run.plan.model, computing, prompts, run.config.evaluation.max_new_tokens, run.tokenizer.eos_token_id, mesh=run.mesh)
    # a conversation cut at max_length is asked for the last response that is left of it
    turns = [run.dataset.records[row].turns[len(example.responses) - 1] for row, example in zip(rows, examples, strict=True)]
    return [
        Answer(run.dataset.records[row].id, f"{turn.instruction}\n{turn.input}".rstrip("\n"), turn.response, decode(ids, run.tokenizer))
        for row, turn, ids in zip(rows, turns, generated, strict=True)
    ]

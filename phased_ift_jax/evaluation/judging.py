"""Judgments of pairs of answers: what all of them are made with, and the judges that ask nobody."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from phased_ift_jax.data.answers import Pair
from phased_ift_jax.evaluation.forgetting import is_exact
from phased_ift_jax.evaluation.judgments import UNNAMED, lengths_of
from phased_ift_jax.records import Judged, Judgment

Orders = tuple[Judged, Judged]
RIGHT, WRONG = 1.0, 0.0
EQUAL = Judged("ok", (5.0, 5.0), "equal answers: a tie, not asked")


def judgment_of(pair: Pair, candidate: str, baseline: str, judge: str, orders: Orders) -> Judgment:
    """A pair as it was judged; lengths only where there are two answers."""
    tokens = {"tokens": pair.tokens} if pair.tokens else {}
    lengths = {} if pair.missing else lengths_of(pair.candidate, pair.baseline) | tokens
    return Judgment(pair.prompt.id, pair.prompt.test_set, candidate, baseline, judge, orders, lengths)


def nothing(reason: str) -> Orders:
    """There was nothing to judge, in neither order."""
    order = Judged("no_answer", reason=reason)
    return order, order


def exact(pair: Pair, references: Mapping[tuple[str, str], str]) -> Orders:
    """Right or wrong by the prompt's own reference, else by the one of (id, instruction): the same text, white space aside."""
    reference = pair.prompt.reference if pair.prompt.reference is not None else references.get((pair.prompt.id, pair.prompt.instruction))
    if pair.missing or reference is None:
        return nothing(pair.missing or "the prompt has no reference")
    scores = [RIGHT if is_exact(reference, answer) else WRONG for answer in (pair.candidate, pair.baseline)]
    order = Judged("ok", (scores[0], scores[1]))
    return order, order


def replayed(recorded: Iterable[Judgment], models: tuple[str, str]) -> Callable[[Pair], Orders]:
    """Judgments that are there, by set and id. One of other models, or of answers of other or unknown lengths, is of other answers, and counts for nothing."""
    known = {(judgment.test_set, judgment.id): judgment for judgment in recorded}

    def orders(pair: Pair) -> Orders:
        judgment = known.get((pair.prompt.test_set, pair.prompt.id))
        if pair.missing or judgment is None:
            return nothing(pair.missing or "not among the recorded judgments")
        if (of := (judgment.candidate, judgment.baseline)) not in (models, UNNAMED):
            return nothing(f"the recorded judgment is of '{of[0]}' against '{of[1]}'")
        if any(judgment.lengths.get(unit) != length for unit, length in lengths_of(pair.candidate, pair.baseline).items()):
            return nothing("the recorded judgment is of answers of other or unknown lengths")
        return judgment.orders

    return orders

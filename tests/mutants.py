"""Faults put into the laws that matter, one at a time, each of which one or two fast tests must find:  python tests/mutants.py [LAW or words of a fault ...]

A mutant is a line of the package with something wrong in it, and the tests that should fail then (`-x`). They are run in a copy of the tree,
at first as it is, where all must pass. Exit code 1: a mutant survived, or its text is not in the file just once, or its tests did not run.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TREE = ("phased_ift_jax", "tests", "configs")
SECONDS = 600  # far more than any of the tests takes
KILLED = "killed"


class Mutant(NamedTuple):
    """One fault: in a file of the package, this text for that, and which tests are to find it."""

    law: str
    fault: str
    file: str
    old: str
    new: str
    tests: str


IN_ROWS = "test_packing.py::test_a_batch_taken_apart_is_its_examples"
FIRST_FIT = "test_packing.py::test_first_fit_places_every_example_once_and_overfills_no_row"
EVEN = "test_packing.py::test_long_examples_are_shared_out"
OF_SETS = "test_win_rate.py::test_sets_weigh_by_their_prompts"
BRANCHES = "test_win_rate.py::test_nine_branches"
INTERRUPTED = "test_run.py::test_interrupted_at_a_random_step_of_each_phase"
TRANSFORMERS = "test_phases.py::test_schedules_are_those_of_transformers"
MUTANTS = [
    # what is trained: a response and the token that ends it, and the mean is over these
    Mutant("loss mask", "a response's first token is not trained", "data/packing.py", "start + begin - 1 : start + end - 1", "start + begin : start + end - 1", IN_ROWS),
    Mutant("loss mask", "the token that ends a response is not trained", "data/packing.py", "start + begin - 1 : start + end - 1", "start + begin - 1 : start + end - 2", IN_ROWS),
    Mutant("loss mask", "prompts are trained", "data/packing.py", "weights[row, start + begin - 1 :", "weights[row, start :", IN_ROWS),
    Mutant("loss mask", "a token is its own target", "data/packing.py", "example.tokens[1:]", "example.tokens[:-1]", IN_ROWS),
    Mutant(
        "loss mask",
        "a template leaves the end token out",
        "data/templates.py",
        "spans.append((start, len(text)))",
        "spans.append((start, len(text) - len(tokenizer.eos_token)))",
        "test_tokenization.py::test_padding_with_the_end_token_does_not_mask_it",
    ),
    Mutant(
        "loss mask",
        "a response begins amid a character",
        "data/tokenization.py",
        "np.searchsorted(ends, (first, last), side=",
        "np.searchsorted(ends, (first + 1, last), side=",
        "test_tokenization.py::test_bytes_of_one_character_are_not_torn_apart",
    ),
    Mutant(
        "loss mask",
        "all positions count in the loss",
        "training/loss.py",
        "jnp.sum(losses_BT * weights_BT)",
        "jnp.sum(losses_BT)",
        "test_equality.py::test_summed_loss_counts_trained_tokens_only",
    ),
    Mutant(
        "loss mask",
        "all positions count in the gradient",
        "training/loss.py",
        "* weights_BT[..., None]).astype(hidden_BTD.dtype)",
        ").astype(hidden_BTD.dtype)",
        "test_equality.py::test_the_gradient_that_the_loss_makes_is_the_plain_formulas",
    ),
    Mutant(
        "loss mask",
        "the mean is over positions",
        "training/step.py",
        "jnp.maximum(jnp.sum(batch.weights_BT), 1.0)",
        "jnp.float32(batch.weights_BT.size)",
        "test_equality.py::test_packed_is_unpacked",
    ),
    Mutant(
        "loss mask",
        "a mean of the parts' means",
        "training/step.py",
        "return total / trained.astype(total.dtype)",
        "return total / (batch.tokens_BT.shape[0] * jnp.maximum(jnp.sum(part.weights_BT), 1.0)).astype(total.dtype)",
        "test_equality.py::test_accumulation_changes_nothing",
    ),
    # who is better
    Mutant("verdict", "candidate and baseline exchanged", "evaluation/win_rate.py", "scores[..., 0] - scores[..., 1]", "scores[..., 1] - scores[..., 0]", BRANCHES),
    Mutant("verdict", "a win and a tie is a tie", "evaluation/win_rate.py", 'if rule == "conservative" else', 'if rule != "official_script" else', BRANCHES),
    Mutant("verdict", "a win and a loss is a loss", "evaluation/win_rate.py", "preferences(scores).sum(-1)", "preferences(scores).min(-1)", BRANCHES),
    Mutant("verdict", "the second order alone decides", "evaluation/win_rate.py", "preferences(scores).sum(-1)", "preferences(scores)[..., 1]", BRANCHES),
    Mutant("verdict", "the official script keeps a zero", "evaluation/win_rate.py", "(scores <= 0)", "(scores < 0)", BRANCHES),
    Mutant("verdict", "a tie counts as won", "evaluation/win_rate.py", '"win": points > 0', '"win": points >= 0', "test_win_rate.py::test_a_mean_of_points_is_the_papers_formula"),
    Mutant(
        "verdict",
        "an invalid pair is a tie",
        "evaluation/win_rate.py",
        "valid = points[~np.isnan(points)]",
        "valid = np.nan_to_num(points)",
        "test_win_rate.py::test_invalid_pairs_by_hand test_win_rate.py::test_a_mean_of_points_is_the_papers_formula",
    ),
    Mutant("verdict", "sets weigh the same", "evaluation/win_rate.py", "weights = known * np.asarray(sizes,", "weights = known * np.ones_like(sizes,", OF_SETS),
    Mutant(
        "verdict",
        "the second order's scores are not turned",
        "scoring/preference.py",
        "other.value[::-1] if",
        "other.value if",
        "test_preference.py::test_scores_by_place_become_scores_by_model",
    ),
    Mutant(
        "verdict",
        "a recorded second order is not turned",
        "evaluation/judgments.py",
        "reverse and reverse[::-1]",
        "reverse",
        "test_win_rate.py::test_recorded_scores_by_place_become_scores_by_model",
    ),
    # the learning rate of every step
    Mutant("learning rate", "the first step is not at zero", "training/schedule.py", "rising = step / max(1, warmup)", "rising = (step + 1) / max(1, warmup)", TRANSFORMERS),
    Mutant("learning rate", "warmup is rounded down", "training/schedule.py", "math.ceil(", "math.floor(", TRANSFORMERS),
    Mutant("learning rate", "the cosine counts from the first step", "training/schedule.py", "(step - warmup) / max(1, steps - warmup)", "step / max(1, steps)", TRANSFORMERS),
    Mutant("learning rate", "the end of warmup is a step late", "training/schedule.py", "np.where(step < warmup,", "np.where(step <= warmup,", TRANSFORMERS),
    Mutant("learning rate", "linear does not fall", "training/schedule.py", "np.maximum(0.0, 1.0 - progress)", "np.ones(steps)", TRANSFORMERS),
    Mutant(
        "learning rate",
        "the schedule goes on into the next phase",
        "training/schedule.py",
        "lengths, owners = list(steps), list(training)",
        "lengths, owners = [sum(steps)], [training[0]]",
        "test_phases.py::test_a_restarted_schedule_is_each_phases_own",
    ),
    Mutant(
        "learning rate",
        "every phase has the first one's peak",
        "training/schedule.py",
        "phase.learning_rate for phase in training",
        "training[0].learning_rate for _ in training",
        "test_phases.py::test_a_restarted_schedule_is_each_phases_own",
    ),
    Mutant(
        "learning rate",
        "one_off restarts where the phased arm did, unscaled",
        "training/schedule.py",
        "round(total * edge / sum(phased_steps))",
        "min(total, int(edge))",
        "test_phases.py::test_one_off_has_one_schedule_unless_it_restarts_at_the_phased_boundaries",
    ),
    # an example in a row is as if alone
    Mutant("packing", "positions run on", "data/packing.py", "positions[row, place] = np.arange(n)", "positions[row, place] = np.arange(start, start + n)", IN_ROWS),
    Mutant("packing", "a row is one segment", "data/packing.py", "segments[row, place] = segment", "segments[row, place] = 1", IN_ROWS),
    Mutant("packing", "the first example of a row is taken for padding", "data/packing.py", "in enumerate(indices, 1)", "in enumerate(indices)", IN_ROWS),
    Mutant("packing", "a row that is just full enough is passed over", "data/packing.py", "if space >= length", "if space > length", FIRST_FIT),
    Mutant("packing", "a row is overfilled by one", "data/packing.py", "if space >= length", "if space + 1 >= length", FIRST_FIT),
    Mutant("packing", "the shortest first", "data/packing.py", "-lengths[i]):\n        length = lengths[index]\n", "lengths[i]):\n        length = lengths[index]\n", FIRST_FIT),
    Mutant("packing", "no row is chosen for what it has to do", "data/packing.py", "weights[row] += length * (length + extra)", "pass", EVEN),
    Mutant("packing", "where tokens are shared out, a row just full enough is passed over", "data/packing.py", "np.where(free >= length,", "np.where(free > length,", EVEN),
    Mutant(
        "packing",
        "for many steps, a row that is just full enough is passed over",
        "data/packing.py",
        "free_SR >= length_S[:, None]",
        "free_SR > length_S[:, None]",
        "test_packing.py::test_fits_is_first_fit_for_many_steps",
    ),
    Mutant(
        "packing",
        "examples of a row see each other",
        "models/blocks.py",
        "(segments_BT != jnp.roll(segments_BT, 1, axis=1))",
        "(segments_BT < 0)",
        "test_equality.py::test_what_another_example_says_changes_no_bit",
    ),
    Mutant(
        "packing",
        "the window is wider by one",
        "models/blocks.py",
        "position_T - (window - 1)",
        "position_T - window",
        "test_equality.py::test_a_query_sees_its_example_up_to_itself_and_no_further_than_the_window",
    ),
    # stopped and started again is never stopped
    Mutant("resume", "the data start over", "training/loop.py", "batches(steps, start, run.dataset.examples", "batches(steps, 0, run.dataset.examples", INTERRUPTED),
    Mutant("resume", "the schedule starts over", "training/loop.py", "np.asarray(rates[step],", "np.asarray(rates[step - start],", INTERRUPTED),
    Mutant(
        "resume",
        "the moments are forgotten",
        "training/loop.py",
        "return load_arrays(store.root / phase.phase.folder / str(position.step), trainer.shapes, trainer.shardings), position.step",
        "return trainer.fresh(load_params(store.root / phase.phase.folder / str(position.step), trainer.shapes.params, trainer.shardings.params)), position.step",
        INTERRUPTED,
    ),
    Mutant("resume", "a step is trained twice", "training/loop.py", "trainer.shardings), position.step\n", "trainer.shardings), position.step - 1\n", INTERRUPTED),
    Mutant("resume", "a step is left out", "training/loop.py", "trainer.shardings), position.step\n", "trainer.shardings), position.step + 1\n", INTERRUPTED),
    Mutant(
        "resume",
        "a phase that is done is trained again",
        "training/loop.py",
        "return (phase.phase.index, True) <= (position.phase, position.complete)",
        "return (phase.phase.index, True) < (position.phase, position.complete)",
        "test_run.py::test_interrupted_between_a_phase_and_the_next",
    ),
    Mutant(
        "resume",
        "a phase starts from the first one's end",
        "training/loop.py",
        "run.plan.phases[phase.phase.index - 2]",
        "run.plan.phases[0]",
        "test_run.py::test_next_phase_starts_from_the_checkpoint_of_the_one_before",
    ),
    Mutant("resume", "every epoch has one order", "data/batches.py", "*self.name, epoch)", "*self.name)", "test_phases.py::test_the_order_is_named_by_seed_phase_and_epoch"),
    Mutant(
        "resume",
        "an order depends on those drawn before",
        "data/batches.py",
        'digest = hashlib.sha256("/".join(map(str, name)).encode()).digest()',
        "digest = np.random.bytes(32)",
        "test_phases.py::test_the_order_is_named_by_seed_phase_and_epoch",
    ),
    Mutant(
        "resume",
        "a checkpoint is checked by its files' sizes alone",
        "training/manifest.py",
        "if now != then:",
        "if now[0] != then[0]:",
        "test_nothing_is_lost.py::test_every_damage_to_every_file_is_found",
    ),
]


def tried(mutants: Sequence[Mutant]) -> Iterator[tuple[str, str, str, float]]:
    """Law, fault, what became of the mutant ("killed", or why not), and the seconds that took; at first, of the tree as it is."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder, "tree")
        for name in TREE:
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        named = " ".join(dict.fromkeys(" ".join(mutant.tests for mutant in mutants).split()))
        yield "", "none", *outcome(tree, named, {0: "as it should be"})
        for mutant in mutants:
            path = tree / "phased_ift_jax" / mutant.file
            text = path.read_text(encoding="utf-8")
            path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            count = text.count(mutant.old)
            end = outcome(tree, mutant.tests, {0: "SURVIVED", 1: KILLED}) if count == 1 else (f"ITS TEXT STANDS {count} TIMES IN {mutant.file}", 0.0)
            yield mutant.law, mutant.fault, *end
            path.write_text(text, encoding="utf-8")


def outcome(tree: Path, tests: str, words: dict[int, str]) -> tuple[str, float]:
    """What the exit code of these tests in a tree is in words, and the seconds they took."""
    began = time.monotonic()
    # a mutant may have the size and the second of the file before it, by which Python would tell them apart
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", *(f"tests/{test}" for test in tests.split())]
    child = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = child.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return f"HAS NOT ENDED IN {SECONDS} s", time.monotonic() - began
    return words.get(child.returncode) or f"ITS TESTS FAIL OR DO NOT RUN\n{said}", time.monotonic() - began


def main(words: Sequence[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not words or any(word in f"{mutant.law}: {mutant.fault}" for word in words)]
    ends = []
    for law, fault, end, seconds in tried(chosen):
        print(f"{law:<14} {fault:<62} {seconds:4.0f} s  {end}", flush=True)
        ends.append(end)
    print(f"{ends.count(KILLED)} of {len(chosen)} killed")
    return 0 if chosen and ends == ["as it should be", *[KILLED] * len(chosen)] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

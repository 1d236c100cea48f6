"""Bins, the matrix behind every arm, and which rows each step trains: every row is somewhere, once, and known before the run starts."""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from phased_ift_jax.config import Bins, CurriculumConfig, DataConfig, TrainingConfig
from phased_ift_jax.data import dataset as datasets
from phased_ift_jax.data.batches import Steps, batches
from phased_ift_jax.data.dataset import Dataset
from phased_ift_jax.data.packing import choose_shapes
from phased_ift_jax.data.phases import assign_bins, curriculum_of, draw_phases, hold_out
from phased_ift_jax.data.tokenization import load_tokenizer
from phased_ift_jax.records import InstructionRecord, ScoredRecord, Source, TokenizedExample, Turn, UserError
from phased_ift_jax.training.plan import steps_of, training_of
from phased_ift_jax.training.schedule import learning_rates, scales

BY_SCORE = {"by": "score", "thresholds": [1.5, 3.5]}
NAMES = ("stage1", "stage2", "stage3")


def curriculum(**keys: Any) -> CurriculumConfig:
    return CurriculumConfig.model_validate({"bins": BY_SCORE} | keys)


def scored(*scores: float | None, path: str = "data.jsonl") -> list[InstructionRecord | ScoredRecord]:
    records = [InstructionRecord(f"r{i}", (Turn("a", "b"),), Source(path, i)) for i in range(1, len(scores) + 1)]
    return [record if score is None else ScoredRecord(record, score) for record, score in zip(records, scores, strict=True)]


def responses(*lengths: int | None) -> list[TokenizedExample | None]:
    return [None if n is None else TokenizedExample(np.zeros(n + 1, np.int32), ((1, n + 1),)) for n in lengths]


def matrix(**keys: Any) -> list[list[float]]:
    return [list(row) for row in curriculum_of(curriculum(**keys), NAMES).shares]


# --- bins ------------------------------------------------------------------------------------------------------------------------


def test_bins_are_half_open_and_the_last_is_closed() -> None:
    binning = assign_bins(Bins(**BY_SCORE), scored(1.0, 1.49, 1.5, 3.49, 3.5, 5.0), responses(*[3] * 6), [])
    assert (binning.names, binning.bin_of.tolist()) == (NAMES, [1, 1, 2, 2, 3, 3])


@given(st.lists(st.floats(1, 5), min_size=1, max_size=30), st.lists(st.floats(1, 5), min_size=1, max_size=4, unique=True))
def test_every_score_is_in_the_bin_between_its_bounds(scores: list[float], bounds: list[float]) -> None:
    bounds = sorted(bounds)
    binning = assign_bins(Bins.model_validate({"by": "score", "thresholds": bounds}), scored(*scores), responses(*[3] * len(scores)), [])
    edges = [-math.inf, *bounds, math.inf]
    assert all(edges[b - 1] <= score < edges[b] for score, b in zip(scores, binning.bin_of, strict=True))


def test_bins_by_length_of_the_response() -> None:
    rows = responses(3, None, 9, 10, 50)
    assert assign_bins(Bins.model_validate({"by": "length", "thresholds": [10]}), scored(*[None] * 5), rows, []).bin_of.tolist() == [1, 0, 1, 2, 2]
    halves = assign_bins(Bins.model_validate({"by": "length", "quantiles": [0.5]}), scored(*[None] * 5), rows, [])
    assert halves.bin_of.tolist() == [1, 0, 1, 2, 2]


@given(st.lists(st.integers(1, 40), min_size=4, max_size=60), st.floats(0.1, 0.9))
def test_a_quantile_leaves_its_share_below(lengths: list[int], share: float) -> None:
    binning = assign_bins(Bins.model_validate({"by": "length", "quantiles": [share]}), scored(*[None] * len(lengths)), responses(*lengths), [])
    bound = np.quantile(lengths, share, method="higher")
    assert binning.bin_of.tolist() == [1 if n < bound else 2 for n in lengths]
    assert (binning.bin_of == 1).sum() <= share * len(lengths) + 1


def test_rows_without_a_score_are_in_no_bin() -> None:
    binning = assign_bins(Bins(**BY_SCORE), scored(1.0, None, 4.0), responses(3, 3, 3), [])
    assert binning.bin_of.tolist() == [1, 0, 3]
    assert "no score" in binning.unbinned
    with pytest.raises(UserError, match="no row has a score"):
        assign_bins(Bins(**BY_SCORE), scored(None, None), responses(3, 3), [])


def test_bins_by_file() -> None:
    files = ["easy.jsonl", "b/my hard (2).jsonl"]
    records = [*scored(1.0, path=files[1]), *scored(1.0, 2.0, path=files[0])]
    binning = assign_bins(Bins(by="file"), records, responses(3, 3, 3), files)
    assert (binning.names, binning.bin_of.tolist()) == (("easy", "my_hard_2_"), [2, 1, 1])
    assert curriculum_of(curriculum(), binning.names).names == binning.names  # a file's name, made fit to name a folder
    assert assign_bins(Bins(by="file"), [], [], ["a/x.json", "b/x.json"]).names == ("1-x", "2-x")
    assert assign_bins(Bins.model_validate({"by": "file", "names": ["one", "two"]}), records, [], files).names == ("one", "two")
    with pytest.raises(UserError, match="1 names for 2 bins"):
        assign_bins(Bins.model_validate({"by": "file", "names": ["one"]}), records, [], files)


def listed(tmp_path: Path, content: object) -> Bins:
    (tmp_path / "phases.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return Bins.model_validate({"from": str(tmp_path / "phases.json")})


def test_bins_from_a_file_of_ids(tmp_path: Path) -> None:
    bins = listed(tmp_path, {"bins": [{"name": "easy", "ids": ["r3", "r1"]}, {"name": "hard", "ids": ["r4"]}]})
    binning = assign_bins(bins, scored(*[None] * 4), responses(3, 3, 3, 3), [])
    assert (binning.names, binning.bin_of.tolist()) == (("easy", "hard"), [1, 0, 1, 2])
    assert "is not in" in binning.unbinned


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ({"bins": [{"name": "easy", "ids": ["r1"]}, {"name": "hard", "ids": ["r2", "r1"]}]}, "id 'r1' is in bins 'easy' and 'hard'"),
        ({"bins": [{"name": "easy", "ids": ["r1", "r8", "r9"]}]}, "lists 2 ids that the data does not have, such as 'r8'"),
        ({"bins": [{"name": "a/b", "ids": ["r1"]}]}, "must be distinct and made of letters"),
        ({"bins": [{"name": "a", "ids": ["r1"]}, {"name": "a", "ids": ["r2"]}]}, "must be distinct and made of letters"),
        ({"phases": []}, "is not of the form"),
        ("{", "is not of the form"),
    ],
)
def test_a_file_of_ids_that_cannot_be_used_is_one_line(content: object, complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        assign_bins(listed(tmp_path, content), scored(1.0, 1.0), responses(3, 3), [])
    assert str(caught.value).startswith("curriculum.bins.from: ")
    assert "\n" not in str(caught.value)


# --- the matrix ------------------------------------------------------------------------------------------------------------------


def test_arms_and_orders_are_names_for_matrices() -> None:
    assert matrix() == matrix(order=[1, 2, 3]) == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert matrix(arm="random") == matrix()
    assert matrix(arm="one_off") == [[1, 1, 1]]
    assert matrix(order=[3, 2, 1]) == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]
    assert matrix(order=[[1, 2], 3]) == [[1, 1, 0], [0, 0, 1]]
    assert matrix(order=[3]) == [[0, 0, 1]]
    assert matrix(order=[3], arm="one_off") == [[0, 0, 1]]
    replay = [{"name": "a", "bins": [1]}, {"name": "b", "bins": [2], "replay": 0.25}, {"name": "c", "bins": [3], "replay": 0.5}]
    assert matrix(phases=replay) == [[1, 0, 0], [0.25, 1, 0], [0.5, 0.5, 1]]
    assert matrix(phases=replay, arm="one_off") == [[1, 1, 1]]


def test_phases_are_named_by_their_bins() -> None:
    assert curriculum_of(curriculum(order=[[2, 3], 1]), NAMES).names == ("stage2+stage3", "stage1")


@pytest.mark.parametrize(
    ("order", "complaint"), [([1, 4], "phase 2 names bin 4; there are bins 1 to 3"), ([0], "names bin 0"), ([1, [2, 1]], r"bin 1 \(stage1\) is trained in two")]
)
def test_an_order_that_does_not_fit_the_bins_is_refused(order: list, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        matrix(order=order)


BIN_OF = np.array([1] * 20 + [3] * 7 + [2] * 12 + [0] * 2 + [1] * 3)
TRAINABLE = np.arange(len(BIN_OF)) % 5 != 0


def rows_of(seed: int = 0, **keys: Any) -> list[list[int]]:
    made = draw_phases(curriculum_of(curriculum(**keys), NAMES), keys.get("arm", "phased"), BIN_OF, TRAINABLE, seed)
    return [phase.rows.tolist() for phase in made]


ALL = np.flatnonzero((BIN_OF > 0) & TRAINABLE).tolist()


def test_phases_are_disjoint_and_cover() -> None:
    for keys in ({}, {"order": [3, 1, 2]}, {"order": [[1, 3], 2]}, {"arm": "one_off"}, {"arm": "random"}):
        rows = rows_of(**keys)
        assert sorted(itertools.chain(*rows)) == ALL, keys
        assert all(part == sorted(part) for part in rows)
    for number, part in enumerate(rows_of(), 1):
        assert part == [row for row in ALL if BIN_OF[row] == number]


def test_random_phases_have_the_phased_sizes_and_depend_on_the_seed_alone() -> None:
    phased, drawn = rows_of(), rows_of(arm="random", seed=1)
    assert list(map(len, drawn)) == list(map(len, phased))
    assert drawn == rows_of(arm="random", seed=1) != rows_of(arm="random", seed=2)
    assert [len(part) for part in rows_of(arm="random", order=[3, 1, 2])] == [len(part) for part in rows_of(order=[3, 1, 2])]
    assert all(len({BIN_OF[row] for row in part}) > 1 for part in drawn)
    named = draw_phases(curriculum_of(curriculum(arm="random"), NAMES), "random", BIN_OF, TRAINABLE, 1)
    assert [phase.name for phase in named] == ["random1", "random2", "random3"]
    relabelled = BIN_OF.copy()
    relabelled[[1, 36]] = relabelled[[36, 1]]  # two rows change places between bins: sizes stay, and so do the rows drawn
    other = draw_phases(curriculum_of(curriculum(arm="random"), NAMES), "random", relabelled, TRAINABLE, 1)
    assert relabelled.tolist() != BIN_OF.tolist()
    assert [phase.rows.tolist() for phase in other] == drawn


def test_replay_repeats_its_share_of_earlier_bins() -> None:
    phases = [{"name": "a", "bins": [1]}, {"name": "b", "bins": [2, 3], "replay": 0.5}]
    first, second = rows_of(phases=phases)
    again = set(first) & set(second)
    assert len(again) == round(0.5 * len(first))
    assert set(second) - again == set(ALL) - set(first)
    assert rows_of(phases=phases) == [first, second] != rows_of(phases=phases, seed=1)


def test_a_phase_without_rows_is_one_line() -> None:
    with pytest.raises(UserError, match="phase 'stage3' is empty") as caught:
        draw_phases(curriculum_of(curriculum(), NAMES), "phased", BIN_OF, BIN_OF != 3, 0)
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith("or train the bins that have rows: --curriculum.order '[1, 2]'")
    draw_phases(curriculum_of(curriculum(order=[1, 2]), NAMES), "phased", BIN_OF, BIN_OF != 3, 0)  # and that does
    with pytest.raises(UserError) as caught:
        draw_phases(curriculum_of(curriculum(), NAMES), "phased", BIN_OF, BIN_OF == 0, 0)
    assert "--curriculum.order" not in str(caught.value), "no bin has rows"


# --- held-out rows ---------------------------------------------------------------------------------------------------------------


def test_held_out_rows_are_usable_and_as_many_as_asked() -> None:
    held = hold_out(BIN_OF, TRAINABLE, "hash", 4, 0)
    assert not (held & ~TRAINABLE).any()
    assert Counter(BIN_OF[held].tolist()) == {1: 4, 2: 4, 3: 4}
    assert np.array_equal(held, hold_out(BIN_OF, TRAINABLE, "hash", 4, 0))
    assert not np.array_equal(held, hold_out(BIN_OF, TRAINABLE, "hash", 4, 1))
    assert not np.array_equal(held, hold_out(BIN_OF, TRAINABLE, "other data", 4, 0))
    assert not hold_out(BIN_OF, TRAINABLE, "hash", 0, 0).any()
    assert (held <= hold_out(BIN_OF, TRAINABLE, "hash", 5, 0)).all()  # more rows are further rows


# --- a small corpus, through `prepare` ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Bytes as tokens."""
    folder = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    made.add_special_tokens(["<s>", "</s>"])
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}), encoding="utf-8")
    return load_tokenizer(folder)


BAD = {  # line of the corpus: row, id, reason
    5: ("{no json", None, "not valid JSON"),
    11: (json.dumps({"id": "mute", "instruction": "Say", "output": " ", "score": 2}), "mute", "empty response"),
    12: (json.dumps({"id": "high", "instruction": "Say", "output": "it", "score": 9}), "high", "wanted: a number from 1 to 5"),
    40: (json.dumps({"id": "none", "instruction": "Say", "output": "it"}), "none", "no score"),
    41: (json.dumps({"id": "long", "instruction": "Say " * 40, "output": "it", "score": 4}), "long", "leaves no room for a response"),
    42: (json.dumps({"id": "ends", "instruction": "Say </s>", "output": "it", "score": 5}), "ends", "control token '</s>'"),
}
ROWS = 120


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("corpus") / "rows.jsonl"
    good = (json.dumps({"id": f"i{n}", "instruction": f"Add {n}", "output": "one " * (1 + n % 7) * (9 if n == 60 else 1), "score": 1 + n % 5}) for n in range(1, ROWS + 1))
    path.write_text("".join((BAD[n][0] if n in BAD else row) + "\n" for n, row in enumerate(good, 1)), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def prepare(corpus: str, tokenizer: Any) -> Callable[..., Dataset]:
    def make(seed: int = 3517, data: dict[str, Any] | None = None, **keys: Any) -> Dataset:
        described = {"path": corpus, "max_length": 100, "eval_size": 5, "max_quarantined": 0.2} | (data or {})
        return datasets.prepare(DataConfig.model_validate(described), curriculum(**keys), seed, tokenizer)

    return make


def ids(dataset: Dataset, rows: Sequence[int] | np.ndarray) -> list[str]:
    return [dataset.records[row].id for row in rows]


def test_every_row_read_is_used_or_quarantined(prepare: Callable[..., Dataset], tmp_path: Path, corpus: str) -> None:
    made = prepare()
    assert made.rows_read == ROWS == len(made.records) + len(made.quarantined)
    assert [count.name for count in made.counts] == list(NAMES)
    for number, count in enumerate(made.counts, 1):
        assert count.read == count.used + count.quarantined
        assert count.used == (made.bin_of == number).sum()
        assert count.held_out == len(made.held_out_rows(number)) == 5
    assert sum(count.used for count in made.counts) == len(made.records) == ROWS - len(BAD)
    assert [(count.truncated, count.quarantined) for count in made.counts] == [(1, 0), (0, 1), (0, 2)]  # in a bin: mute; long and ends
    datasets.write_quarantine(made.quarantined, tmp_path / "quarantine.jsonl")
    written = {row["line"]: row for row in map(json.loads, (tmp_path / "quarantine.jsonl").read_text().splitlines())}
    assert len(made.quarantined) == len(written)
    assert written.keys() == BAD.keys()
    for line, (_, identifier, reason) in BAD.items():
        assert written[line].keys() == {"file", "line", "id", "reason"}
        assert (written[line]["file"], written[line]["id"]) == (corpus, identifier)
        assert reason in written[line]["reason"]


def test_more_quarantined_rows_than_allowed_refuse_the_run(prepare: Callable[..., Dataset], corpus: str) -> None:
    with pytest.raises(UserError, match=rf"6 of 120 rows cannot be used, more than data.max_quarantined 0.04 allows; the first is {corpus}:5 "):
        prepare(data={"max_quarantined": 0.04})
    assert len(prepare(data={"max_quarantined": 0.05}).quarantined) == 6


def test_rows_that_the_file_of_ids_leaves_out_are_quarantined(prepare: Callable[..., Dataset], tmp_path: Path) -> None:
    (tmp_path / "phases.json").write_text(json.dumps({"bins": [{"name": "few", "ids": [f"i{n}" for n in range(50, 80)]}]}))
    made = prepare(bins={"from": str(tmp_path / "phases.json")}, data={"max_quarantined": 1.0})
    assert (made.bin_names, len(made.records), made.rows_read) == (("few",), 30, len(made.records) + len(made.quarantined))
    assert sum("its id is not in" in row.reason for row in made.quarantined) == ROWS - 30 - 5  # the file is what is wrong with `none` too


def test_held_out_rows_are_the_same_for_all_and_trained_by_none(prepare: Callable[..., Dataset]) -> None:
    held = ids(base := prepare(), np.flatnonzero(base.held_out))
    assert len(held) == 15
    for seed, keys in ((1, {}), (3517, {"order": [3, 1, 2]}), (3517, {"arm": "one_off"}), (1, {"arm": "random"}), (2, {"arm": "random", "order": [[1, 3]]}), (1, {"order": [2]})):
        made = prepare(seed, **keys)
        assert ids(made, np.flatnonzero(made.held_out)) == held, keys
        assert not any(set(ids(made, phase.rows)) & set(held) for phase in (*made.phases, *made.phased)), keys
    assert set(ids(base, np.flatnonzero(prepare(data={"eval_seed": 1}).held_out))) != set(held)


def test_a_sample_is_of_trained_rows_in_the_bins_own_proportions(prepare: Callable[..., Dataset]) -> None:
    whole = prepare()
    held, trained = ids(whole, np.flatnonzero(whole.held_out)), {i for phase in whole.phases for i in ids(whole, phase.rows)}
    seen = set()
    for size in (30, 60, len(trained)):
        for seed, keys in ((1, {}), (2, {"order": [3, 2, 1]}), (3, {"arm": "one_off"}), (4, {"arm": "random"})):
            made = prepare(seed, {"sample_size": size}, **keys)
            assert ids(made, np.flatnonzero(made.held_out)) == held, "held-out rows do not depend on the sample"
            sampled = [i for phase in made.phases for i in ids(made, phase.rows)]
            assert len(sampled) == len(set(sampled)) == size
            assert set(sampled) <= trained
            seen.add((size, *sorted(sampled)))
            for number, (some, all_) in enumerate(zip(made.counts, whole.counts, strict=True), 1):
                assert (some.read, some.quarantined, some.held_out) == (all_.read, all_.quarantined, all_.held_out)
                assert some.read == some.used + some.left_out + some.quarantined
                assert abs((some.used - 5) - size * (all_.used - 5) / len(trained)) <= 1, number
    assert len(seen) == 3, "one sample of a size, whatever arm, order and seed"
    with pytest.raises(UserError, match=rf"data.sample_size: {len(trained) + 1} rows, and there are {len(trained)} to train"):
        prepare(data={"sample_size": len(trained) + 1})


def test_bins_of_their_own_keep_held_out_rows_and_sample_when_phases_go_by_something_else(prepare: Callable[..., Dataset]) -> None:
    by_score = {"by": "score", "thresholds": [1.5, 3.5], "names": list(NAMES)}
    base = prepare(data={"sample_size": 60})
    other = prepare(data={"sample_size": 60, "eval_bins": by_score}, bins={"by": "length", "quantiles": [0.5]})
    assert [len(phase.rows) for phase in other.phases] != [len(phase.rows) for phase in base.phases]
    assert other.eval_bin_names == base.bin_names
    for number in (1, 2, 3):
        assert ids(other, other.held_out_rows(number)) == ids(base, base.held_out_rows(number))
    rows = [sorted(i for phase in made.phases for i in ids(made, phase.rows)) for made in (base, other)]
    assert rows[0] == rows[1]


def test_more_held_out_rows_than_a_bin_has_leave_an_empty_phase(prepare: Callable[..., Dataset]) -> None:
    with pytest.raises(UserError, match=r"phase 'stage1' is empty.*data.eval_size") as caught:
        prepare(data={"eval_size": 60})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arm", ["phased", "one_off", "random"])
def test_an_epoch_trains_each_row_of_its_phase_once(arm: str, prepare: Callable[..., Dataset]) -> None:
    made = prepare(arm=arm)
    training = TrainingConfig(global_batch_size=8, num_train_epochs=3)
    seen: list[str] = []
    for phase in made.phases:
        steps = steps_of(training, phase, 3517)
        assert len(steps) == 3 * math.ceil(len(phase.rows) / 8)
        for epoch in range(3):
            chosen = [steps[i] for i in range(epoch * steps.per_epoch, (epoch + 1) * steps.per_epoch)]
            assert [len(step) for step in chosen[:-1]] == [8] * (len(chosen) - 1)
            assert len(chosen[-1]) == (len(phase.rows) % 8 or 8)
            assert sorted(np.concatenate(chosen)) == phase.rows.tolist()
        seen += ids(made, phase.rows)
    assert Counter(seen) == Counter(ids(made, np.flatnonzero(~made.held_out)))


# --- steps -----------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 60), st.integers(1, 20), st.integers(1, 4), st.integers(0, 5))
def test_steps_are_arithmetic(rows: int, batch: int, epochs: int, seed: int) -> None:
    steps, again = (Steps(np.arange(rows) * 3, batch, epochs, (seed, 1)) for _ in range(2))
    every = [steps[i] for i in range(len(steps))]
    for i in reversed(range(len(steps))):  # a step does not depend on those asked for before it
        assert np.array_equal(again[i], every[i])
    assert Counter(np.concatenate(every).tolist()) == {3 * row: epochs for row in range(rows)}
    for outside in (-1, len(steps)):
        with pytest.raises(IndexError):
            steps[outside]


def test_the_order_is_named_by_seed_phase_and_epoch() -> None:
    def order(seed: int, phase: int, epoch: int) -> list[int]:
        return Steps(np.arange(50), 50, 9, (seed, phase))[epoch].tolist()

    drawn = [tuple(order(seed, phase, epoch)) for seed in (0, 1) for phase in (1, 2) for epoch in (0, 1, 2)]
    assert len(set(drawn)) == len(drawn)
    assert order(1, 2, 1) == order(1, 2, 1)
    steps = Steps(np.arange(50), 50, 1, (1, 2), max_steps=5)
    assert len(steps) == 5
    assert steps[4].tolist() == order(1, 2, 4)  # epochs go on as long as steps are wanted


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("packed", [True, False])
def test_a_step_trains_the_same_examples_on_any_device_count(devices: int, packed: bool, prepare: Callable[..., Dataset]) -> None:
    made = prepare()
    steps = steps_of(TrainingConfig(global_batch_size=8, num_train_epochs=2), made.phases[0], 3517)
    lengths = np.array([len(example.tokens) for example in made.examples])
    shapes = choose_shapes([lengths[steps[i]] for i in range(len(steps))], devices, 4, 1000.0, packed)
    for start in (0, 3):
        made_batches = list(batches(steps, start, made.examples, shapes))
        assert len(made_batches) == len(steps) - start
        for number, batch in enumerate(made_batches, start):
            found = [tuple(row[segments == s].tolist()) for row, segments in zip(batch.tokens_BT[0], batch.segments_BT[0], strict=True) for s in range(1, segments.max() + 1)]
            assert sorted(found) == sorted(tuple(made.examples[row].tokens.tolist()) for row in steps[number])


# --- learning rates ----------------------------------------------------------------------------------------------------------------


def cosine(step: int, steps: int, warmup: float, peak: float) -> float:
    first = math.ceil(warmup * steps)
    return peak * (step / first if step < first else 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first))))


def linear(step: int, steps: int, warmup: float, peak: float) -> float:
    first = math.ceil(warmup * steps)
    return peak * (step / first if step < first else 1 - (step - first) / max(1, steps - first))


def trace(form: Callable[..., float], steps: int, warmup: float = 0.1, peak: float = 1e-3) -> list[float]:
    return [form(i, steps, warmup, peak) for i in range(steps)]


def rates(steps: list[int], phased: list[int] | None = None, training: Sequence[dict[str, Any]] | None = None, **keys: Any) -> list[list[float]]:
    trainings = [TrainingConfig.model_validate({"learning_rate": 1e-3} | keys_) for keys_ in training or [{}] * len(steps)]
    made = learning_rates(curriculum(**keys), trainings, steps, phased or steps)
    assert [len(part) for part in made] == steps
    assert all(part.dtype == np.float32 for part in made)
    return [part.tolist() for part in made]


def near(values: list[float]) -> Any:
    return pytest.approx(values, rel=1e-6, abs=1e-12)


def test_a_restarted_schedule_is_each_phases_own() -> None:
    assert rates([20, 7, 1]) == [near(trace(cosine, 20)), near(trace(cosine, 7)), near(trace(cosine, 1))]
    assert rates([20, 7], training=[{}, {"learning_rate": 2e-4, "lr_scheduler_type": "linear", "warmup_ratio": 0.3}]) == [
        near(trace(cosine, 20)),
        near(trace(linear, 7, 0.3, 2e-4)),
    ]
    assert rates([20, 7], arm="random") == rates([20, 7])


def test_a_continued_schedule_is_one_over_the_run() -> None:
    parts = rates([20, 7, 3], lr_schedule="continue")
    assert list(itertools.chain(*parts)) == near(trace(cosine, 30))
    parts = rates([20, 10], training=[{}, {"learning_rate": 5e-4}], lr_schedule="continue")
    assert parts == [near(trace(cosine, 30)[:20]), near([rate / 2 for rate in trace(cosine, 30)[20:]])]


def test_one_off_has_one_schedule_unless_it_restarts_at_the_phased_boundaries() -> None:
    assert rates([30], [15, 10, 5], arm="one_off") == [near(trace(cosine, 30))]
    assert rates([30], [15, 10, 5], arm="one_off", lr_schedule="restart") == [near(trace(cosine, 15) + trace(cosine, 10) + trace(cosine, 5))]
    assert rates([28], [15, 10, 5], arm="one_off", lr_schedule="restart") == [near(trace(cosine, 14) + trace(cosine, 9) + trace(cosine, 5))]  # scaled to its own steps


@pytest.mark.parametrize("warmup", [0.0, 0.03, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_schedules_are_those_of_transformers(kind: str, warmup: float) -> None:
    transformers = pytest.importorskip("transformers.optimization", reason="compares with transformers")
    torch = pytest.importorskip("torch")
    for steps in (1, 2, 10, 97):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        schedule = transformers.get_scheduler(kind, optimizer, num_warmup_steps=math.ceil(warmup * steps), num_training_steps=steps)
        theirs = []
        for _ in range(steps):
            theirs.append(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
        assert scales(kind, steps, warmup).tolist() == pytest.approx(theirs, rel=1e-12, abs=1e-15)


def test_max_steps_count_for_each_phase(prepare: Callable[..., Dataset]) -> None:
    made = prepare(phases=[{"name": "a", "bins": [1]}, {"name": "b", "bins": [2, 3], "max_steps": 3, "learning_rate": "1e-4"}])
    base = TrainingConfig(global_batch_size=8, num_train_epochs=1, max_steps=40, learning_rate=1e-3)
    trainings = [training_of(base, phase) for phase in made.phases]
    steps = [len(steps_of(training, phase, 0)) for training, phase in zip(trainings, made.phases, strict=True)]
    assert steps == [40, 3]
    assert [part.tolist() for part in learning_rates(curriculum(), trainings, steps, steps)] == [near(trace(cosine, 40)), near(trace(cosine, 3, peak=1e-4))]


# --- real rows -------------------------------------------------------------------------------------------------------------------


def test_the_released_stage_3_in_three_bins(shared_data: Path, tmp_path: Path) -> None:
    shutil.copy(shared_data / "llama2" / "tokenizer.model", tmp_path)
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    data = DataConfig(path=str(shared_data / "phasedsft" / "en-alpaca52k-stage3.jsonl"))
    made = datasets.prepare(data, curriculum(bins={"by": "score", "thresholds": [4.0, 4.75]}), 3517, load_tokenizer(tmp_path))
    counted = [SimpleNamespace(read=c.read, used=c.used, held_out=c.held_out) for c in made.counts]
    assert [c.read for c in counted] == [2140, 3287, 1462]
    assert [c.used for c in counted] == [2140, 3285, 1455]
    assert [c.held_out for c in counted] == [256] * 3
    assert [len(phase.rows) for phase in made.phases] == [2140 - 256, 3285 - 256, 1455 - 256]
    assert [row.reason for row in made.quarantined] == ["empty response"] * 9

"""Packing changes how many rows a step fills, and nothing of what it trains."""

from __future__ import annotations

import itertools
import json
import shutil
import time
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from phased_ift_jax.data import batches, packing, readers
from phased_ift_jax.data.batches import Steps
from phased_ift_jax.data.packing import GRANULE, Shapes, choose_shapes, first_fit, fits, group, pack, placed, row_lengths, shortest_rows
from phased_ift_jax.data.phases import plain
from phased_ift_jax.data.tokenization import load_tokenizer, tokenize
from phased_ift_jax.models.decoder import DecoderConfig
from phased_ift_jax.records import PackedBatch, TokenizedExample
from phased_ift_jax.training.plan import row_price

LLAMA2_7B = DecoderConfig(32000, 4096, 11008, 32, 32, 32, 128)
LENGTHS = st.lists(st.integers(2, 200), min_size=1, max_size=24)
SHORT = st.lists(st.integers(1, 9), min_size=1, max_size=24)  # of so few lengths, rows are often full to the last token


def example(number: int, length: int, *spans: tuple[int, int]) -> TokenizedExample:
    """Tokens that name their example and place, so that nothing can be taken for something else."""
    return TokenizedExample(np.arange(1000 * (number + 1), 1000 * (number + 1) + length, dtype=np.int32), spans or ((1, length),))


@st.composite
def examples(draw: st.DrawFn) -> list[TokenizedExample]:
    made = []
    for number, length in enumerate(draw(LENGTHS)):
        edges = sorted(draw(st.sets(st.integers(1, length), min_size=2, max_size=4))) if length > 2 else [1, 2]
        made.append(example(number, length, *zip(edges[::2], edges[1::2], strict=False)))
    return made


def padded(steps: list[list[int]]) -> np.ndarray:
    lengths_SB = np.zeros((len(steps), max(map(len, steps))), np.int64)
    for row, lengths in zip(lengths_SB, steps, strict=True):
        row[: len(lengths)] = sorted(lengths, reverse=True)
    return lengths_SB


# --- rows of lengths -------------------------------------------------------------------------------------------------------------


@given(st.tuples(LENGTHS, st.integers(200, 500)) | st.tuples(SHORT, st.integers(9, 30)))
def test_first_fit_places_every_example_once_and_overfills_no_row(given: tuple[list[int], int]) -> None:
    lengths, capacity = given
    rows = first_fit(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in row) <= capacity for row in rows)
    opened = [lengths[row[0]] for row in rows]
    assert opened == sorted(opened, reverse=True)
    for earlier, later in itertools.combinations(rows, 2):  # a row is opened only where no earlier one has room
        before = [i for i in earlier if (-lengths[i], i) < (-lengths[later[0]], later[0])]
        assert sum(lengths[i] for i in before) + lengths[later[0]] > capacity


def squares(lengths: Sequence[int], rows: list[list[int]]) -> list[int]:
    """What attention has to do in each row."""
    return [sum(int(lengths[i]) ** 2 for i in row) for row in rows]


@given(LENGTHS, st.integers(1, 6))
def test_no_row_is_heavier_than_the_heaviest_of_first_fit(lengths: list[int], count: int) -> None:
    rows, capacity = placed(lengths, Shapes(count, (1,)))
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    assert len(rows) <= count
    assert all(sum(lengths[i] for i in row) <= capacity for row in rows)
    assert max(squares(lengths, rows)) <= max(squares(lengths, first_fit(lengths, capacity)))


def test_long_examples_are_shared_out() -> None:
    """First-fit decreasing would put both of the long ones into one row, and all short ones into the other."""
    rows, _ = placed([160] * 2 + [40] * 8, Shapes(2, (320,)))
    assert [sorted(row) for row in rows] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


@pytest.mark.parametrize(("count", "most"), [(2, 1.1), (8, 1.15)])
def test_rows_have_about_the_same_to_do(count: int, most: float, real_lengths: dict[str, np.ndarray], measured: Callable[[str, float], None]) -> None:
    """A step waits for the row that attention takes longest for: hardly longer than an even share, or than its longest example takes."""
    lengths = real_lengths["phasedsft/en-alpaca52k-stage3.jsonl"]
    steps = np.random.default_rng(0).permutation(lengths)[: 100 * 8 * count].reshape(-1, 8 * count).tolist()
    weights = [squares(step, placed(step, Shapes(count, (1,)))[0]) for step in steps]
    longer = [max(has) / max(sum(has) / count, max(step) ** 2) for has, step in zip(weights, steps, strict=True)]
    measured(f"{count} rows, heaviest over the least that can be ({most})", float(np.mean(longer)))
    assert np.mean(longer) < most


def test_first_fit_refuses_an_example_longer_than_a_row() -> None:
    with pytest.raises(ValueError, match="an example of 9 tokens does not fit in a row of 8"):
        first_fit([3, 9], 8)


@given(st.tuples(st.lists(LENGTHS, min_size=1, max_size=6), st.integers(200, 400)) | st.tuples(st.lists(SHORT, min_size=1, max_size=6), st.integers(9, 30)), st.integers(1, 8))
def test_fits_is_first_fit_for_many_steps(given: tuple[list[list[int]], int], rows: int) -> None:
    steps, capacity = given
    assert fits(padded(steps), np.full(len(steps), capacity), rows).tolist() == [len(first_fit(step, capacity)) <= rows for step in steps]


@given(st.lists(LENGTHS, min_size=1, max_size=6), st.integers(1, 8))
def test_shortest_rows_are_the_shortest(steps: list[list[int]], rows: int) -> None:
    for step, needed in zip(steps, shortest_rows(padded(steps), rows), strict=True):
        assert needed % GRANULE == 0
        assert len(first_fit(step, int(needed))) <= rows
        floor = max(max(step), -(-sum(step) // rows))
        assert all(len(first_fit(step, shorter)) > rows for shorter in range(-(-floor // GRANULE) * GRANULE, int(needed), GRANULE))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=14), st.integers(1, 5), st.sampled_from([64.0, 1000.0, float("inf")]))
def test_grouping_is_the_cheapest(multiples: list[int], shapes: int, tau: float) -> None:
    needed = np.array(multiples) * GRANULE
    lengths, cost = group(needed, shapes, tau)

    def price(chosen: tuple[int, ...]) -> float:
        return sum((t := min(c for c in chosen if c >= n)) * (1 + t / tau) for n in needed.tolist())

    values = sorted(set(needed.tolist()))
    possible = [(*some, values[-1]) for k in range(min(shapes, len(values))) for some in itertools.combinations(values[:-1], k)]
    assert cost == pytest.approx(min(map(price, possible)), rel=1e-12)
    assert price(lengths) == pytest.approx(cost, rel=1e-12)
    assert list(lengths) == sorted(set(lengths))
    assert 1 <= len(lengths) <= shapes


@given(st.lists(LENGTHS, min_size=1, max_size=6), st.integers(1, 4), st.integers(1, 4), st.booleans())
@settings(max_examples=50)
def test_chosen_shapes_hold_every_step(steps: list[list[int]], multiple: int, shapes: int, packed: bool) -> None:
    chosen = choose_shapes([np.array(step) for step in steps], multiple, shapes, 1000.0, packed)
    assert chosen.rows % multiple == 0
    assert 1 <= len(chosen.lengths) <= shapes
    assert list(chosen.lengths) == sorted(set(chosen.lengths))
    for step in steps:
        if packed:
            assert len(first_fit(step, chosen.lengths[-1])) <= chosen.rows
        else:
            assert len(step) <= chosen.rows
            assert max(step) <= chosen.lengths[-1]


def test_where_epochs_meet_no_order_is_drawn_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of the next epoch are made in a thread while the last steps of one are noted: of ten million rows, a draw takes a second."""
    drawn, steps = [], Steps(np.arange(50), 10, 3, (7, 1))
    expected = [steps[i].tolist() for i in range(15)]
    monkeypatch.setattr(batches, "generator", lambda *name, real=batches.generator: drawn.append(name[-1]) or real(*name))
    steps = Steps(np.arange(50), 10, 3, (7, 1))
    assert [(steps[i].tolist(), steps[i + 2].tolist()) for i in range(13)] == list(zip(expected, expected[2:], strict=False))
    assert drawn == [0, 1, 2]


def test_of_ten_million_records_a_step_asks_for_its_own(measured: Callable[[str, float], None]) -> None:
    """Where one epoch ends and the next begins, too: what is held are row numbers and the orders of two epochs, under 1 GB with what drawing them takes."""
    asked = []

    class Records(Sequence[TokenizedExample]):
        def __len__(self) -> int:
            return 10**7

        def __getitem__(self, index: Any) -> Any:
            asked.append(int(index))
            return example(0, 5 + int(index) % 40)

    tracemalloc.start()
    steps = Steps(np.arange(10**7), 128, 2, (7, 1))
    start = steps.per_epoch - 2
    source = batches.batches(steps, start, Records(), Shapes(32, (128,)))
    seen = [int(next(source).segments_BT.max(axis=-1).sum()) for _ in range(4)]
    until = time.monotonic() + 60
    while len(asked) <= sum(seen) and time.monotonic() < until:
        time.sleep(0.01)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(asked) > sum(seen), "the next batch is made while the device works on this one"
    assert seen == [128, 10**7 % 128 or 128, 128, 128]
    assert asked[: sum(seen)] == [row for step in range(start, start + 4) for row in steps[step].tolist()]
    assert len(asked) <= (4 + 4) * 128, "two batches are made ahead, and one is on its way"
    measured("bytes for the order of ten million records (below 1e9)", peak)
    assert peak < 1e9


# --- batches ---------------------------------------------------------------------------------------------------------------------


def rows_of(batch: PackedBatch) -> PackedBatch:
    """The batch with accumulation's parts laid one under another."""
    return PackedBatch(*(array.reshape(-1, array.shape[-1]) for array in (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT)))


def check_law(batch: PackedBatch, given: list[TokenizedExample]) -> None:
    """Taken apart by its segments, a batch is its examples, each as if alone; the rest is padding."""
    flat, found = rows_of(batch), {}
    for row in range(len(flat.tokens_BT)):
        segments = flat.segments_BT[row]
        assert set(segments[segments > 0]) == set(range(1, segments.max() + 1))
        for segment in range(1, segments.max() + 1):
            (places,) = np.nonzero(segments == segment)
            assert np.array_equal(places, np.arange(places[0], places[0] + len(places)))
            tokens, targets, weights = flat.tokens_BT[row, places], flat.targets_BT[row, places], flat.weights_BT[row, places]
            assert np.array_equal(flat.positions_BT[row, places], np.arange(len(places)))
            assert np.array_equal(targets[:-1], tokens[1:])
            assert weights[-1] == 0.0
            found[tokens[0] // 1000 - 1] = (tokens, [place + 1 for place in np.flatnonzero(weights)])
        padding = segments == 0
        assert not flat.weights_BT[row, padding].any()
        assert not flat.tokens_BT[row, padding].any()
    assert sorted(found) == list(range(len(given)))
    for number, (tokens, trained) in found.items():
        assert np.array_equal(tokens, given[number].tokens)
        assert trained == [place for begin, end in given[number].responses for place in range(begin, end)]
    assert set(np.unique(flat.weights_BT)) <= {0.0, 1.0}
    assert flat.weights_BT.sum() == sum(e.response_tokens for e in given)


@given(examples(), st.sampled_from([1, 2, 4]), st.booleans())
def test_a_batch_taken_apart_is_its_examples(given_: list[TokenizedExample], accumulation: int, packed: bool) -> None:
    shapes = choose_shapes([np.array([len(e.tokens) for e in given_])], accumulation, 2, 1000.0, packed)
    batch = pack(given_, shapes, accumulation)
    assert batch.tokens_BT.shape == (accumulation, shapes.rows // accumulation, shapes.lengths[-1])
    assert {array.shape for array in (batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT)} == {batch.tokens_BT.shape}
    assert [a.dtype for a in (batch.tokens_BT, batch.targets_BT, batch.weights_BT, batch.segments_BT, batch.positions_BT)] == [np.int32, np.int32, np.float32, np.int32, np.int32]
    check_law(batch, given_)
    if not packed:
        assert rows_of(batch).segments_BT.max() == 1
        assert [row[0] // 1000 - 1 for row in rows_of(batch).tokens_BT[: len(given_)]] == list(range(len(given_)))


@given(examples())
def test_parts_are_the_same_rows(given_: list[TokenizedExample]) -> None:
    shapes = choose_shapes([np.array([len(e.tokens) for e in given_])], 4, 2, 1000.0)
    whole, parts = pack(given_, shapes, 1), pack(given_, shapes, 4)
    assert np.array_equal(rows_of(whole).tokens_BT, rows_of(parts).tokens_BT)
    assert np.array_equal(rows_of(whole).weights_BT, rows_of(parts).weights_BT)


@given(examples(), st.lists(st.integers(1, 40), min_size=0, max_size=3))
def test_a_step_that_no_shape_was_chosen_for_still_packs(given_: list[TokenizedExample], others: list[int]) -> None:
    chosen = choose_shapes([np.array([2, *others])], 2, 2, 1000.0)
    batch = pack(given_, chosen)
    assert batch.tokens_BT.shape[-1] % GRANULE == 0
    check_law(batch, given_)


def test_a_longer_row_only_adds_padding() -> None:
    """The same examples lie in the same places whatever lengths were chosen."""
    given_ = [example(i, n) for i, n in enumerate((50, 40, 30, 60, 9))]
    short, long = pack(given_, Shapes(2, (128,))), pack(given_, Shapes(2, (512,)))
    assert long.tokens_BT.shape == (1, 2, 512)
    assert np.array_equal(long.tokens_BT[..., :128], short.tokens_BT)
    assert not long.segments_BT[..., 128:].any()


# --- real rows -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_lengths(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    """Tokens of every usable row under the official template and Llama-2's tokenizer."""
    folder = tmp_path_factory.mktemp("llama2")
    shutil.copy(shared_data / "llama2" / "tokenizer.model", folder)
    described = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")
    tokenizer, found = load_tokenizer(folder), {}
    for name in ("phasedsft/en-alpaca52k-stage3.jsonl", "alpaca/random_9k.json"):
        records = [plain(row) for row in readers.read(str(shared_data / name)).records]
        found[name] = np.array([len(row.tokens) for row in tokenize(records, tokenizer, "user_assistant", 2048) if isinstance(row, TokenizedExample)])
    return found


@pytest.mark.parametrize(("devices", "least"), [(1, 0.94), (8, 0.94), (16, 0.85), (32, 0.75)])
def test_rows_of_the_papers_batch_hold_little_padding(devices: int, least: float, real_lengths: dict[str, np.ndarray], measured: Callable[[str, float], None]) -> None:
    """Of Alpaca's hardest third and of a sample of it all, 128 examples a step, two epochs, with four shapes for Llama-2-7B. On 32 devices the longest
    example of a step sets its row length, which leaves little more than this bound to any choice of four."""
    for name, lengths in real_lengths.items():
        steps = Steps(np.arange(len(lengths)), 128, 2, (3517, 1))
        sizes = [lengths[steps[i]] for i in range(len(steps))]
        shapes = choose_shapes(sizes, devices, 4, row_price(LLAMA2_7B, "splash", "tpu"))
        assert len(shapes.lengths) <= 4
        assert shapes.rows % devices == 0
        taken = [min(t for t in shapes.lengths if t >= needed) for needed in shortest_rows(padded([s.tolist() for s in sizes]), shapes.rows)]
        assert row_lengths(sizes, shapes).tolist() == taken
        share = sum(map(np.sum, sizes)) / (shapes.rows * sum(taken))
        measured(f"padding, {devices} devices (at most {1 - least:.2f})", 1 - share)
        assert share >= least, (name, share, shapes)


def test_the_length_of_a_row_costs_nothing_where_attention_passes_over_other_examples() -> None:
    """One row of what a step needs, where a kernel that goes along whole rows has several short ones."""
    steps = [np.full(16, length) for length in (100, 110, 120)]
    tiny = DecoderConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)
    assert choose_shapes(steps, 1, 4, row_price(tiny, "xla", "cpu")).rows == 1
    assert choose_shapes(steps, 1, 4, row_price(tiny, "xla", "gpu")).rows > 4


@pytest.mark.parametrize("packed", [True, False])
def test_shapes_chosen_from_a_sample_hold_the_fullest_step(packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SAMPLED_STEPS", 3)
    steps = [np.full(5 + 5 * (i == 17), 10 * i + 10) for i in range(60)]
    given_ = [example(number, int(length)) for number, length in enumerate(steps[17])]
    check_law(pack(given_, choose_shapes(steps, 1, 3, 1000.0, packed)), given_)

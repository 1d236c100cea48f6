"""Laws of answers: those of transformers, whatever the batch and the mesh; killed and started again is never stopped; one line for every fault."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from phased_ift_jax import convert, generate
from phased_ift_jax import train as train_verb
from phased_ift_jax.config import MeshConfig, RunConfig
from phased_ift_jax.data import prompts as readers
from phased_ift_jax.data import templates
from phased_ift_jax.data.tokenization import decode, load_tokenizer, prompt_ids, tokenize
from phased_ift_jax.evaluation.forgetting import ForgettingMatrix
from phased_ift_jax.models.decoder import unrolled
from phased_ift_jax.models.generation import Decoding, Generator, Prompt, choose, in_batches, sample_key
from phased_ift_jax.models.hf_folder import open_folder
from phased_ift_jax.records import InstructionRecord, TokenizedExample, Turn, UserError
from phased_ift_jax.sharding import make_mesh
from phased_ift_jax.training import answers, loop

torch = pytest.importorskip("torch", reason="compared with transformers' own generate")
import transformers  # noqa: E402

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("compilation_cache")
GREEDY = Decoding()
SETS = {"sinstruct": 252, "wizardlm": 218, "koala": 180, "vicuna": 80, "oasst": 188, "anthropic": 129}


def mesh_of(devices: int = 1, **axes: int) -> jax.sharding.Mesh:
    return make_mesh(MeshConfig(**{"data": 1, "fsdp": 1, "tensor": -1} | axes), jax.devices()[:devices])


def respond(
    path: Path, prompts: Sequence[Prompt], batch_size: int, eos: tuple[int, ...] = (2,), decoding: Decoding = GREEDY, mesh: jax.sharding.Mesh | None = None
) -> list[list[int]]:
    """The ids that a model folder answers with, in float32."""
    mesh = mesh or mesh_of()
    with answers.opened(str(path)) as model:
        params = unrolled(model.load("float32", mesh))
    generator, found = Generator(model.folder.config, eos, decoding, mesh, batch_size), {}
    batches = in_batches([len(prompt.ids) for prompt in prompts], batch_size)
    for batch, responses in zip(batches, generator.in_turn(params, [[prompts[at] for at in batch] for batch in batches]), strict=True):
        found |= dict(zip(batch, responses, strict=True))
    return [found[at].ids.tolist() for at in range(len(prompts))]


@pytest.fixture(scope="module")
def real(shared_data: Path) -> list[np.ndarray]:
    """A hundred real prompts from all six sets, as the small model's tokens: those that leave it room for 64 more."""
    tokenizer = load_tokenizer(shared_data / "stories260k")
    every = readers.read([f"{name}={shared_data}/testsets/{name}_test_set.jsonl" for name in SETS])
    ids = [one for one in (prompt_ids(prompt.record, tokenizer, "user_assistant") for prompt in every) if len(one) <= 448]
    return [ids[len(ids) * k // 100] for k in range(100)]


# --- the tokens ----------------------------------------------------------------------------------------------------------------


def test_the_published_story_is_told(shared_data: Path) -> None:
    """Law: from the BOS token alone, greedy, 257 tokens with it, the text is the published one, character for character."""
    path = shared_data / "stories260k"
    published = (path / "reference.md").read_text(encoding="utf-8").split("-t 0.0\n")[1].split("\n```")[0]
    ids = respond(path, [Prompt(np.array([1], np.int32), 256)], 1, eos=(1,))[0]
    assert decode(ids, load_tokenizer(path)) == published


def their_tokens(path: Path, prompts: list[np.ndarray], count: int) -> tuple[list[list[int]], float]:
    """What transformers' generate answers, prompts padded on the left in batches of similar length; and the least margin of a best logit that it chose by."""
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    found, least = {}, float("inf")
    for batch in in_batches([len(prompt) for prompt in prompts], 10):
        longest = max(len(prompts[at]) for at in batch)
        ids = torch.tensor([[0] * (longest - len(prompts[at])) + prompts[at].tolist() for at in batch])
        mask = torch.tensor([[0] * (longest - len(prompts[at])) + [1] * len(prompts[at]) for at in batch])
        out = model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=count, eos_token_id=2, pad_token_id=2, output_scores=True, return_dict_in_generate=True
        )
        chosen = out.sequences[:, longest:].tolist()
        best = torch.stack(out.scores).topk(2, dim=-1).values  # of each step and row
        for row, at in enumerate(batch):
            end = chosen[row].index(2) if 2 in chosen[row] else count
            found[at] = chosen[row][:end]
            least = min(least, float((best[: end + 1, row, 0] - best[: end + 1, row, 1]).min()))
    return [found[at] for at in range(len(prompts))], least


@pytest.mark.parametrize("which", ["stories260k", "llama", "mistral"])
def test_greedy_tokens_are_those_of_transformers(
    which: str, real: list[np.ndarray], shared_data: Path, tiny_model: Callable[..., Path], measured: Callable[[str, float], None]
) -> None:
    """Law: on 100 real prompts, 64 greedy tokens are those of `generate`, one by one and in batches of 16; most prompts go beyond Mistral's window."""
    sizes = {"vocab_size": 512, "max_position_embeddings": 512}
    path = {
        "stories260k": lambda: shared_data / "stories260k",
        "llama": lambda: tiny_model("llama", seed=3, num_attention_heads=8, **sizes),
        "mistral": lambda: tiny_model("mistral", seed=4, sliding_window=48, **sizes),
    }[which]()
    their, margin = their_tokens(path, real, 64)
    measured(f"100 prompts, {which}: 1 / least margin of a best logit", 1 / margin)
    assert sum(len(prompt) > 48 for prompt in real) > 50
    for batch_size in (16, 1):
        assert respond(path, [Prompt(ids, 64) for ids in real], batch_size) == their, f"batches of {batch_size}"


@pytest.mark.parametrize("decoding", [Decoding(), Decoding(1.3, 0, 0.95)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("window", [None, 8, 40])
def test_a_response_does_not_depend_on_its_batch(decoding: Decoding, window: int | None, tiny_model: Callable[..., Path]) -> None:
    """Law: whatever prompts stand beside it, and however early they end; with rings that go round, that grow, and batches that shrink."""
    path = tiny_model("mistral" if window else "llama", **({"sliding_window": window} if window else {}))
    rng = np.random.default_rng(0)
    sizes = [(1, 200), (2, 1), (7, 64), (8, 65), (9, 66), (31, 3), (33, 4), (40, 129), (41, 5), (90, 150), (90, 7), (3, 8)]
    prompts = [Prompt(rng.integers(3, 96, n, dtype=np.int32), most, int(rng.integers(2**32))) for n, most in sizes]
    alone = respond(path, prompts, 1, (5,), decoding)
    assert respond(path, prompts, len(prompts), (5,), decoding) == alone
    assert respond(path, prompts[::-1], 5, (5,), decoding) == alone[::-1]
    assert all(len(ids) <= most and 5 not in ids for ids, (_, most) in zip(alone, sizes, strict=True))
    assert max(map(len, alone)) > 64, "a response goes on after the host has looked"
    if decoding != GREEDY:
        assert any(len(ids) < most for ids, (_, most) in zip(alone, sizes, strict=True)), "another has ended before"


@pytest.mark.parametrize("axes", [{"data": 8}, {"tensor": 8}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_eight_devices_are_one(axes: dict[str, int], tiny_model: Callable[..., Path]) -> None:
    """Law: greedy and sampled tokens on any mesh are those of one device."""
    path = tiny_model("mistral", sliding_window=40, num_attention_heads=8)
    rng = np.random.default_rng(1)
    prompts = [Prompt(rng.integers(3, 96, n, dtype=np.int32), 70 + n, n) for n in (3, 17, 60, 61, 5)]
    for decoding in (Decoding(), Decoding(0.8, 0, 0.95)):
        one = respond(path, prompts, 5, decoding=decoding)
        assert respond(path, prompts, 5, decoding=decoding, mesh=mesh_of(8, **{"tensor": 1} | axes)) == one


# --- the choice ----------------------------------------------------------------------------------------------------------------


def drawn(decoding: Decoding, logits_V: np.ndarray, count: int) -> np.ndarray:
    keys = jnp.asarray([sample_key(7, str(i)) for i in range(count)], jnp.uint32)
    return np.asarray(jax.jit(choose, static_argnums=0)(decoding, jnp.tile(jnp.asarray(logits_V, jnp.float32), (count, 1)), keys, jnp.arange(count) % 50))


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.6, 0, 1.0), (1.0, 3, 1.0), (1.7, 0, 0.8), (1.2, 6, 0.7), (1.0, 0, 0.05)])
def test_samples_follow_the_filtered_distribution(temperature: float, top_k: int, top_p: float) -> None:
    """Law: the tokens that may be drawn are those that transformers' filters leave, each as often as its share says (chi-squared, 20,000 draws)."""
    logits = np.random.default_rng(3).normal(size=12) * 1.5
    scores = torch.tensor(logits[None]) / temperature
    if top_k:
        scores = transformers.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = transformers.TopPLogitsWarper(top_p)(None, scores)
    shares = scores.softmax(-1)[0].numpy()
    seen = np.bincount(drawn(Decoding(temperature, top_k, top_p), logits, 20_000), minlength=12)
    assert (seen[shares == 0] == 0).all()
    left = shares > 0
    if left.sum() > 1:
        assert stats.chisquare(seen[left], 20_000 * shares[left] / shares[left].sum()).pvalue > 1e-3
    else:
        assert seen[left] == 20_000


def test_the_most_likely_token_is_argmax_and_top_k_of_one() -> None:
    """Law: greedy is argmax, the first of equals; with top_k 1 a sample is the same token where there are no equals."""
    rows = np.random.default_rng(0).normal(size=(200, 33)).astype(np.float32)
    tied = np.round(rows)
    keys, positions = jnp.zeros(200, jnp.uint32), jnp.arange(200)
    np.testing.assert_array_equal(choose(Decoding(), jnp.asarray(tied), keys, positions), tied.argmax(-1))
    np.testing.assert_array_equal(choose(Decoding(0.7, 1), jnp.asarray(rows), keys, positions), rows.argmax(-1))


# --- prompts -------------------------------------------------------------------------------------------------------------------


def test_the_six_sets_are_read_by_their_keys(shared_data: Path, tmp_path: Path) -> None:
    """Law: every prompt once, whatever the file is called and whether its set is declared or not; the input stands apart."""
    for at, (name, count) in enumerate(SETS.items()):
        anywhere = tmp_path / f"{at}.jsonl"
        shutil.copy(shared_data / f"testsets/{name}_test_set.jsonl", anywhere)
        declared, found = readers.read([f"{name}={anywhere}"]), readers.read([str(anywhere)])
        assert len(declared) == count
        assert [prompt.record for prompt in declared] == [prompt.record for prompt in found]
        assert {prompt.set for prompt in declared} == {name}
        assert {prompt.set for prompt in found} == {str(at)}
        assert len({prompt.name for prompt in declared}) == count
        rows = [json.loads(line) for line in anywhere.read_text().splitlines()]
        assert [prompt.fields for prompt in declared] == rows
        texts = [prompt.record.turns[0] for prompt in declared]
        if name == "sinstruct":
            assert [(t.instruction, t.input) for t in texts] == [(row["instruction"], row["instances"][0]["input"]) for row in rows]
        else:
            assert all(t.instruction in row.values() and t.input == row.get("input", "") for t, row in zip(texts, rows, strict=True))


def test_generation_is_given_what_training_put_before_a_response(shared_data: Path) -> None:
    """Law: prompt ids are tokens[:response_start], with one BOS, the input on a line of its own, and no period added; six Koala prompts have over 1,024."""
    folder = shared_data / "stories260k"
    llama = load_tokenizer(shared_data / "llama2")
    every = readers.read([f"{name}={shared_data}/testsets/{name}_test_set.jsonl" for name in SETS])
    assert Counter(prompt.set for prompt in every if len(prompt_ids(prompt.record, llama, "user_assistant")) >= 1024) == {"koala": 6}
    for tokenizer, some in ((llama, every), (load_tokenizer(folder), every[::10])):
        for template in ("user_assistant", "alpaca", "llama2_chat"):
            records = [InstructionRecord(p.record.id, (Turn(p.record.turns[0].instruction, "Yes.", p.record.turns[0].input),), p.record.source) for p in some[::7]]
            for prompt, example in zip(some[::7], tokenize(records, tokenizer, template, 10_000), strict=True):
                assert isinstance(example, TokenizedExample), example
                ids = prompt_ids(prompt.record, tokenizer, template)
                np.testing.assert_array_equal(ids, example.tokens[: example.response_start])
                assert (ids == tokenizer.bos_token_id).sum() == 1
    turn = next(prompt.record for prompt in every if prompt.record.turns[0].input).turns[0]
    assert templates.join_input(turn) == f"{turn.instruction}\n{turn.input}"


@pytest.mark.parametrize(
    ("name", "rows", "fault"),
    [
        ("", [{"id": 1, "question": "Why?"}], "rows.jsonl:1: keys id, question; wanted: `instruction + instances` or `Instruction` or `text` or `prompt` or `instruction`"),
        ("vicuna=", [{"id": 1, "instruction": "Why?"}], "rows.jsonl:1: keys id, instruction; wanted: `text`"),
        ("", [{"id": 1, "instruction": "Why?"}, {"id": "1", "instruction": "How?"}], "rows.jsonl:2: id '1' was used before, at "),
        ("", [{"id": 1.5, "instruction": "Why?"}], "rows.jsonl:1: `id` is 1.5; wanted: text or a whole number"),
        ("", [{"instruction": "Why?", "instances": []}], "rows.jsonl:1: `instances` is not a list of objects with an `input`"),
        ("", [{"instruction": "  "}], "rows.jsonl:1: no text: instruction and input are empty"),
        ("", [], "rows.jsonl' has no rows"),
    ],
)
def test_a_row_that_is_no_prompt_is_named(name: str, rows: list[dict[str, Any]], fault: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"^--prompts: ") as caught:
        readers.read([f"{name}{file}"])
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)


# --- the verb ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shared_data: Path, compilation_cache: None) -> Path:
    """A run of two short phases from the small model on the quickstart's data, under a template that is not the default."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "rows.jsonl").write_text("".join((ROOT / "configs/quickstart/data.jsonl").read_text().splitlines(keepends=True)[:60]))
    tree = {
        "output_dir": str(folder / "run"),
        "model": {"model_name_or_path": str(shared_data / "stories260k"), "dtype": "float32"},
        "data": {"path": str(folder / "rows.jsonl"), "max_length": 128, "eval_size": 0, "prompt_template": "mistral_instruct"},
        "curriculum": {"bins": {"by": "length", "quantiles": [0.5]}},
        "training": {"num_train_epochs": 1, "global_batch_size": 16, "learning_rate": 1e-3},
    }
    prepared = loop.prepare(RunConfig.model_validate(tree))
    loop.train(prepared, train_verb.Results(ForgettingMatrix(prepared.output / "forgetting.json")))
    return folder / "run"


def ask(model: object, prompts: Path, out: Path, *more: object) -> list[dict[str, Any]]:
    words = ["--model", model, "--prompts", prompts, "--out", out, "--max_new_tokens", 12, "--batch_size", 4, "--mesh.tensor", 1, "--mesh.data", 8, *more]
    assert generate.main([str(word) for word in words]) == 0
    return [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("questions") / "asked.jsonl"
    rows = [json.loads(line) for line in (ROOT / "configs/quickstart/data.jsonl").read_text().splitlines()[:22]]
    file.write_text("".join(json.dumps({"id": row["id"], "instruction": row["data"][0], "output": row["data"][1]}) + "\n" for row in rows))
    return file


def test_every_form_of_a_run_answers_alike(run: Path, questions: Path, tmp_path: Path) -> None:
    """Law: a run, its phase, its checkpoint and its export give the same answers, under the run's template; an earlier phase gives others."""
    phases = sorted((run / "checkpoints").iterdir())
    last = next(phases[-1].iterdir())
    forms = [run, phases[-1], last, run / "hf" / phases[-1].name]
    told = [ask(form, questions, tmp_path / f"{at}.jsonl") for at, form in enumerate(forms)]
    assert all([line["response"] for line in lines] == [line["response"] for line in told[0]] for lines in told)
    assert {line["prompt_template"] for lines in told for line in lines} == {"mistral_instruct"}
    assert {line["dtype"] for line in told[0]} == {"float32"}
    assert told[0][0]["model"] == str(last)
    first = ask(phases[0], questions, tmp_path / "first.jsonl")
    assert [line["response"] for line in first] != [line["response"] for line in told[0]]
    with pytest.raises(UserError, match="was trained with mistral_instruct, not alpaca; leave the flag out"):
        ask(run, questions, tmp_path / "other.jsonl", "--prompt_template", "alpaca")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert all(line.items() >= row.items() for line, row in zip(told[0], rows, strict=True)), "a line has its prompt's fields, in order"


def test_a_converted_model_answers_as_its_base(shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Law: the same responses from a Hugging Face folder and from what from-hf makes of it; a prompt with no room is recorded, and counted by set."""
    base, questions = shared_data / "stories260k", tmp_path / "q.jsonl"
    rows = [{"id": f"q{n}", "instruction": "Tell me of a cat. " * n} for n in (1, 40, 2)] + [{"id": "w", "instruction": "Sing", "input": "a song", "response": "La.", "by": "me"}]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    convert.main(["from-hf", str(base), str(tmp_path / "converted")])
    flags = ["--dtype", "float32", "--max_length", 60]
    told = [ask(model, questions, tmp_path / f"{name}.jsonl", *flags) for name, model in (("base", base), ("converted", tmp_path / "converted"))]
    assert [line["response"] for line in told[0]] == [line["response"] for line in told[1]]
    assert [line["finish_reason"] for line in told[0]] == ["length", "too_long", "length", "length"]
    assert [line["response"] is None for line in told[0]] == [False, True, False, False]
    assert all(line["response_tokens"] == min(12, 60 - line["prompt_tokens"]) for line in told[0] if line["response"])
    assert ask(base, questions, tmp_path / "base.jsonl", *flags) == told[0], "an answer that came with the prompt is not ours"
    assert told[0][3] | {"set": "q", "by": "me", "input": "a song", "max_length": 60, "temperature": 0.0, "seed": 0, "model": str(base)} == told[0][3]
    assert "q          4         3         1    0       3" in capsys.readouterr().out


def test_every_end_of_generation_config_stops(shared_data: Path, tmp_path: Path) -> None:
    """Law: a response ends at whichever of its ids comes first, and says so."""
    model = tmp_path / "model"
    shutil.copytree(shared_data / "stories260k", model)
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": 1, "instruction": "Once upon a time"}\n')
    free = ask(model, questions, tmp_path / "free.jsonl", "--dtype", "float32")[0]
    tokenizer = load_tokenizer(model)
    stop = tokenizer.encode(free["response"], add_special_tokens=False)[4]
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    ended = ask(model, questions, tmp_path / "ended.jsonl", "--dtype", "float32")[0]
    assert (free["finish_reason"], ended["finish_reason"]) == ("length", "eos")
    assert free["response"].startswith(ended["response"])
    assert ended["response_tokens"] <= 4


def test_one_question_is_answered(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--model", str(run), "--prompt", "Reverse: a b c", "--max_new_tokens", "5", "--mesh.tensor", "1", "--mesh.data", "8"]) == 0
    assert capsys.readouterr().out.endswith("\n")


def test_killed_and_started_again_is_never_stopped(run: Path, questions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law: after a kill in the middle of writing, the same command makes the same file, byte for byte, and generates no finished batch again."""
    whole, cut, flags = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl", ("--temperature", 0.9, "--seed", 5)
    add, respond, batches = answers.Book.add, Generator.respond, []

    def dying(book: answers.Book, lines: list[dict[str, Any]]) -> None:
        add(book, lines if len(batches) < 3 else lines[:1])
        if len(batches) == 3:
            book._part.write(b'{"set": "asked", "id": "to')
            book._part.flush()
            raise KeyboardInterrupt

    def counted(*given: Any) -> Any:
        batches.append(len(given[2]))
        return respond(*given)

    monkeypatch.setattr(Generator, "respond", counted)
    ask(run, questions, whole, *flags)
    whole_run = len(batches)
    batches.clear()
    monkeypatch.setattr(answers.Book, "add", dying)
    with pytest.raises(KeyboardInterrupt):
        ask(run, questions, cut, *flags)
    assert not cut.exists()
    monkeypatch.setattr(answers.Book, "add", add)
    batches.clear()
    ask(run, questions, cut, *flags)
    assert cut.read_bytes() == whole.read_bytes()
    assert len(batches) == whole_run - 2 > 1, "two batches were there"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cut.jsonl", "whole.jsonl"]
    batches.clear()
    ask(run, questions, cut, *flags)
    assert (cut.read_bytes(), batches) == (whole.read_bytes(), [])


def test_a_process_that_is_killed_goes_on(run: Path, questions: Path, tmp_path: Path) -> None:
    """Law: the same with kill -9, wherever it hits."""
    out = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "phased_ift_jax.generate", "--model", run, "--prompts", questions, "--out", out, "--max_new_tokens", "40", "--batch_size", "2"]
    environment = os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    part = tmp_path / ".out.jsonl.answers"
    while process.poll() is None and not (part.exists() and part.stat().st_size):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    for target in (out, tmp_path / "whole.jsonl"):
        done = subprocess.run([str(word) for word in [*command[:8], target, *command[9:]]], env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
    assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("flags", "fault"),
    [
        (["--temperature", "-1"], "--temperature: -1.0 is not 0 (greedy) or more"),
        (["--temperature", "1", "--top_p", "0"], "--top_p: 0.0 is not above 0 and at most 1"),
        (["--top_k", "5"], "--top_p and --top_k choose among samples; give a --temperature above 0, too"),
        (["--max_new_tokens", "0"], "--max_new_tokens: 0 is not at least 1"),
        (["--max_length", "100000"], "--max_length: 100000 is more than the"),
        (["--mesh.tensor", "3"], "mesh: data 8 x fsdp 1 x tensor 3 does not make 8 devices"),
        (["--mesh.data", "-2"], "mesh.data: input should be greater than or equal to -1, got -2"),
        (["--seed", "8"], "was made with seed 0 (asked/"),
        (["--max_new_tokens", "13"], "was made with max_new_tokens 12 (asked/"),
        (["--out", "gs://bucket/answers.jsonl"], "--out: 'gs://bucket/answers.jsonl' is in a bucket"),
        (["--model", "nowhere/at/all"], "--model: no such folder 'nowhere/at/all'"),
        (["--prompts", "nowhere.jsonl"], "--prompts: no such file 'nowhere.jsonl'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags: list[str], fault: str, run: Path, questions: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    out = tmp_path_factory.getbasetemp() / "answered.jsonl"
    if not out.exists():
        ask(run, questions, out)
    before = out.read_bytes()
    with pytest.raises(UserError) as caught:
        ask(run, questions, out, *flags)
    assert fault in str(caught.value)
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == before


def test_one_process_writes(run: Path, questions: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    with answers.writing(out), pytest.raises(UserError, match="another process is writing"):
        ask(run, questions, out)


def test_a_prompt_that_holds_a_control_token_is_refused(shared_data: Path, tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    questions.write_text('{"id": 1, "instruction": "What is </s>?"}\n')
    with pytest.raises(UserError, match=r"q.jsonl:1: the text contains the control token '</s>'; leave it out"):
        ask(shared_data / "stories260k", questions, tmp_path / "out.jsonl")


def test_folders_say_how_long_and_where_to_end(shared_data: Path) -> None:
    folder = open_folder(str(shared_data / "stories260k"))
    assert (folder.max_length, folder.end_tokens) == (512, {2})

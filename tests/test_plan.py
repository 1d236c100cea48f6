"""Laws of the plan: what it says is what the run then does; what is wrong with a run is found before it begins."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_run import ROOT, make_config, metrics, rows, train  # noqa: F401

from phased_ift_jax import config as config_module
from phased_ift_jax import plan as plan_verb
from phased_ift_jax.records import UserError
from phased_ift_jax.training import doctor
from phased_ift_jax.training.survey import facts, survey

ONE = {"data": 1, "fsdp": 1, "tensor": 1}


def written(folder: Path, rows: Path, **changes: object) -> str:  # noqa: F811
    path = folder / f"{len(list(folder.iterdir()))}.yaml"
    path.write_text(config_module.dump(make_config(rows, folder / path.stem, **changes)))
    return str(path)


def told(capsys, *words: object) -> dict:
    assert plan_verb.main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("changes", [{}, {"data__packing": False}, {"curriculum__arm": "one_off"}])
def test_what_is_planned_is_what_is_done(rows, tmp_path, capsys, changes):  # noqa: F811
    """Steps, examples, tokens, rates, row lengths and the share of real tokens, phase by phase, as the run then logs them."""
    path = written(tmp_path, rows, **changes)
    [run] = told(capsys, path)["runs"]
    train(config_module.load(path))
    logged = metrics(tmp_path / Path(path).stem)
    for number, phase in enumerate(run["phases"], 1):
        done = [line for line in logged if line["phase_index"] == number]
        assert phase["steps"] == len(done)
        for name in ("examples", "tokens", "response_tokens"):
            assert phase[name] == sum(line[name] for line in done)
        assert (phase["lr_first"], phase["lr_last"]) == (done[0]["learning_rate"], done[-1]["learning_rate"])
        positions = sum(line["tokens"] / line["real_token_share"] for line in done)
        assert phase["real_token_share"] == pytest.approx(phase["tokens"] / positions)
    assert {line["row_length"] for line in logged} <= {length for shapes in run["shapes"] for length in shapes["lengths"]}
    assert run["budget"]["optimizer_steps"] == len(logged)


def test_nothing_is_read_but_data_tokenizer_and_sizes_and_nothing_is_written(rows, tmp_path, capsys):  # noqa: F811
    """Pretrained weights that are not there do not matter, and neither does an output_dir that is in use."""
    path = written(tmp_path, rows, model__init="pretrained")
    output = tmp_path / "0"
    output.mkdir()
    (output / "something").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert told(capsys, path)["runs"][0]["parameters"] > 100_000
    assert sorted(tmp_path.rglob("*")) == before


def test_bytes_are_counted(rows, tmp_path):  # noqa: F811
    """Adam holds two numbers a weight; checkpoints within a phase hold all three, one more than is kept while it is saved."""
    run = survey(make_config(rows, tmp_path / "run", checkpoint__save_total_limit=2), ONE)
    told = facts(run)
    weights = 4 * told["parameters"]
    assert (told["state_bytes"], told["gradient_bytes"]) == (3 * weights, weights)
    assert told["disk_bytes"] == 3 * weights + 3 * weights + 3 * (3 * weights)
    lean = facts(survey(make_config(rows, tmp_path / "run", model__dtype="bfloat16", training__adam_mu_dtype="bfloat16", training__gradient_dtype="bfloat16"), ONE))
    embedding = run.plan.model.vocab_size * run.plan.model.hidden_size  # whose gradient stays wide
    assert (lean["state_bytes"], lean["gradient_bytes"]) == (10 * told["parameters"], 2 * told["parameters"] + 2 * embedding)
    kept = facts(survey(make_config(rows, tmp_path / "run", curriculum__optimizer_state="keep", export__after_each_phase=False), ONE))
    assert kept["disk_bytes"] == 3 * (3 * weights) + weights + 3 * (3 * weights)


def test_planned_for_other_devices(rows, tmp_path, capsys):  # noqa: F811
    path = written(tmp_path, rows)
    assert told(capsys, path, "--devices", 4)["runs"][0]["mesh"] == {"data": 1, "fsdp": 4, "tensor": 1}
    with pytest.raises(UserError, match="mesh: data 1 x fsdp 3 x tensor 1 does not make 4 devices"):
        plan_verb.main([path, "--devices", "4", "--mesh.fsdp", "3"])


def test_budgets_side_by_side(rows, tmp_path, capsys):  # noqa: F811
    """Arms with the same examples and steps are alike; one with half the epochs is not, and it is said by how much."""
    paths = [written(tmp_path, rows), written(tmp_path, rows, curriculum__arm="random"), written(tmp_path, rows, training__num_train_epochs=1)]
    assert plan_verb.main(paths[:2]) == 0
    assert "no like for like" not in capsys.readouterr().out
    plan_verb.main([paths[0], paths[2]])
    assert "note: examples differs by 50.0%: no like for like" in capsys.readouterr().out


def test_examples_are_shown_as_the_model_gets_them(rows, tmp_path, capsys):  # noqa: F811
    """What is trained stands in brackets: the response and the token that ends it."""
    path = written(tmp_path, rows)
    plan_verb.main([path, "--show", "2"])
    out = capsys.readouterr().out
    run = survey(config_module.load(path), ONE)
    of_each = [row for phase in run.plan.phases for row in phase.steps[0][:2]]
    assert len(of_each) == 2 * len(run.plan.phases) > 2
    assert re.search(r"(?m)^batch   8 sequences of [\d, ]+ tokens \(examples packed into each\)$", out)  # tests see eight devices
    for row in of_each:
        [turn] = run.dataset.records[row].turns
        shown = out.split(f"{run.dataset.records[row].source}: ")[1].split("\n\n")[0]
        assert re.search(rf"\[\s*{re.escape(turn.response)}\s*</s>\]", shown), shown
        assert turn.instruction in shown.split("[")[0]


def test_a_serious_fault_is_exit_code_2(rows, tmp_path):  # noqa: F811
    path = written(tmp_path, rows, model__param_dtype="bfloat16", training__learning_rate=5e-6)
    done = subprocess.run([sys.executable, "-m", "phased_ift_jax.plan", path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: 1-easy: steps of 5e-06 on bfloat16 master weights round away" in done.stderr
    assert "phase" in done.stdout


def test_rounding_away_is_true(rows, tmp_path):  # noqa: F811
    """The rule, held to arithmetic: below the bound a typical weight does not move at all, above it does."""
    import ml_dtypes

    for rate, serious in ((5e-6, True), (1e-4, False)):
        run = survey(make_config(rows, tmp_path / "run", model__param_dtype="bfloat16", training__learning_rate=rate, training__warmup_ratio=0.0), ONE)
        assert bool(doctor.examine(run)) == serious
        weight = np.array(doctor.TYPICAL_WEIGHT, ml_dtypes.bfloat16)
        moved = (weight.astype(np.float32) - np.float32(rate)).astype(ml_dtypes.bfloat16)
        assert (moved == weight) == serious
    assert not doctor.examine(survey(make_config(rows, tmp_path / "run", model__param_dtype="float32", training__learning_rate=5e-6), ONE))


def forged(run, **changes):
    """The survey with its first example changed."""
    examples = (dataclasses.replace(run.dataset.examples[0], **changes), *run.dataset.examples[1:])
    return dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, examples=examples))


def test_what_is_wrong_with_rows_is_found(rows, tmp_path):  # noqa: F811
    run = survey(make_config(rows, tmp_path / "run"), ONE)
    assert doctor.examine(run) == []
    example, begin = run.dataset.examples[0], run.tokenizer.bos_token_id
    [(start, end)] = example.responses
    twice = np.concatenate([np.array([begin], np.int32), example.tokens])
    [finding] = doctor.examine(forged(run, tokens=twice, responses=((start + 1, end + 1),)))
    assert finding.serious
    assert re.match(r"1 of 100 rows, such as .*rows\.jsonl:\d+: two <s> in a row", finding.text)
    [finding] = doctor.examine(forged(run, responses=((start, start),)))
    assert finding.serious
    assert finding.text.endswith("no token is trained")
    [finding] = doctor.examine(forged(run, responses=((start, end - 1),)))
    assert not finding.serious
    assert "the last trained token is not </s>" in finding.text


def test_truncation_and_templates_are_noted(rows, tmp_path):  # noqa: F811
    run = survey(make_config(rows, tmp_path / "run"), ONE)
    for count, noted in ((5, False), (6, True)):  # of a hundred
        examples = [dataclasses.replace(example, truncated=i < count) for i, example in enumerate(run.dataset.examples)]
        found = doctor.examine(dataclasses.replace(run, dataset=dataclasses.replace(run.dataset, examples=tuple(examples))))
        assert [finding.text for finding in found if "6% of the rows are cut at data.max_length 64" in finding.text] == [finding.text for finding in found]
        assert bool(found) == noted
    run = survey(make_config(rows, tmp_path / "run"), ONE)
    run.tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    [finding] = doctor.examine(run)
    assert not finding.serious
    assert "not the chat template that this tokenizer comes with" in finding.text


def test_the_shipped_config_on_real_data(shared_data, tmp_path, capsys):
    """Llama-2-7B's sizes and tokenizer, the paper's stage 3: every row is accounted for."""
    model = tmp_path / "model"
    model.mkdir()
    sizes = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008}
    sizes |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-5, "hidden_act": "silu"}
    (model / "config.json").write_text(json.dumps(sizes | {"bos_token_id": 1, "eos_token_id": 2}))
    (model / "tokenizer.model").symlink_to(shared_data / "llama2/tokenizer.model")
    stage3 = shared_data / "phasedsft/en-alpaca52k-stage3.jsonl"
    words = ("--model.model_name_or_path", model, "--data.path", stage3, "--curriculum.order", "[3]", "--devices", 16)
    [run] = told(capsys, ROOT / "configs/llama2_7b.yaml", *words)["runs"]
    assert run["parameters"] == 6_738_415_616
    read, used, quarantined = (run["rows"][name] for name in ("read", "used", "quarantined"))
    assert (read, used, quarantined) == (6889, 6880, 9)
    [phase] = run["phases"]
    assert phase["rows"] == used - 256
    assert phase["examples"] == 2 * phase["rows"]
    assert phase["steps"] == 2 * -(-phase["rows"] // 128)
    assert phase["real_token_share"] > 0.9

"""The product as its user meets it: the README's commands, run as they stand there, and what they promise.

The slow ones (`-m slow`) train for minutes; continuous integration runs them too.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SLOW = pytest.mark.slow


def run_command(arguments: list[str], output: Path) -> str:
    """Run a verb as a user does, in the repository, with the devices that the machine has."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, *arguments, "--output_dir", str(output)], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def readme_command() -> list[str]:
    """The last part of the README's first line, without the interpreter."""
    line = next(line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 -m venv"))
    return shlex.split(line.split("&&")[-1])[1:]


@pytest.mark.parametrize(("seed", "easy"), [(3517, 0.75), pytest.param(1, 0.60, marks=pytest.mark.long), pytest.param(2, 0.60, marks=pytest.mark.long)])
def test_quickstart_learns_in_three_phases_and_exports(tmp_path, seed, easy):
    command = readme_command() + (["--seed", str(seed)] if seed != 3517 else [])
    told = run_command(command, tmp_path / "run")
    matrix = {row["after"]: row for row in json.loads((tmp_path / "run/forgetting.json").read_text())["rows"]}
    assert list(matrix) == ["base", "1-easy", "2-medium", "3-hard"]
    assert max(matrix["base"]["exact_match"].values()) <= 0.05
    assert matrix["3-hard"]["exact_match"]["easy"] >= easy
    assert re.search(r"answered '\w", told)
    assert_loads_in_transformers(tmp_path / "run/hf/3-hard", tmp_path / "run/checkpoints/3-hard")


def assert_loads_in_transformers(exported: Path, checkpoints: Path) -> None:
    """The export opens in transformers, and its logits are those of the checkpoint it was made from."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed: parity with transformers was not looked at")
    import jax.numpy as jnp
    import transformers

    from phased_ift_jax.config import MeshConfig
    from phased_ift_jax.models import decoder
    from phased_ift_jax.models.hf_folder import open_folder
    from phased_ift_jax.sharding import make_mesh, tree_shardings
    from phased_ift_jax.training.checkpoint import Checkpoints, load_params

    theirs = transformers.AutoModelForCausalLM.from_pretrained(exported)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    tokens = np.array(tokenizer("<s>User: Reverse: a b c</s>\nAssistant: c b a</s>", add_special_tokens=False)["input_ids"])[None]
    config = open_folder(str(exported)).config
    shapes = decoder.parameter_shapes(config, jnp.float32)
    shardings = tree_shardings(decoder.parameter_dims(config), shapes, make_mesh(MeshConfig()))
    store = Checkpoints(checkpoints.parent, "", 1)
    params = load_params(store.of_phase(checkpoints.name), shapes, shardings)
    positions = np.arange(tokens.shape[1])[None]
    ours = decoder.logits(config, params, decoder.hidden_states(config, params, tokens, np.ones_like(tokens), positions))
    np.testing.assert_allclose(np.asarray(ours), theirs(torch.tensor(tokens)).logits.detach().numpy(), atol=1e-4, rtol=0)


@SLOW
def test_real_model_on_real_scored_alpaca(shared_data, tmp_path):
    """Every row accounted for, and the loss of every difficulty lower after the run than before."""
    told = run_command(["-m", "phased_ift_jax.train", "tests/configs/stories260k_alpaca.yaml"], tmp_path / "run")
    assert "6889 rows read = 5657 used whole + 1219 truncated + 13 quarantined" in told
    for bin_name, read, used in (("stage1", 2140, 2140), ("stage2", 3287, 3282), ("stage3", 1462, 1454)):
        assert re.search(rf"^{bin_name} +{read} +{used} ", told, re.MULTILINE)
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "run/quarantine.jsonl").read_text().splitlines()]
    assert sum(reason == "empty response" for reason in reasons) == 9
    assert sum("leaves no room" in reason for reason in reasons) == 4
    rows = json.loads((tmp_path / "run/forgetting.json").read_text())["rows"]
    assert [row["after"] for row in rows] == ["base", "1-stage1", "2-stage2", "3-stage3"]
    for name in ("stage1", "stage2", "stage3"):
        assert rows[-1]["loss"][name] < rows[0]["loss"][name]


def test_launch_loop_tries_again_until_done_and_gives_up_on_bad_input(tmp_path):
    def run(script: str, **environment: str) -> subprocess.CompletedProcess:
        (tmp_path / "count").unlink(missing_ok=True)
        command = f"echo x >> {tmp_path}/count; n=$(wc -l < {tmp_path}/count); {script}"
        environment = os.environ | {"PAUSE": "0"} | environment
        return subprocess.run([ROOT / "launch/until_done.sh", "bash", "-c", command], env=environment, capture_output=True, text=True, timeout=60, check=False)

    def calls() -> int:
        return len((tmp_path / "count").read_text().splitlines())

    assert (run("[ $n -ge 3 ] || kill -9 $$").returncode, calls()) == (0, 3)
    assert (run("exit 2").returncode, calls()) == (2, 1)
    assert (run("exit 75").returncode, calls()) == (75, 1)
    assert (run("exit 1", ATTEMPTS="4").returncode, calls()) == (1, 4)

"""The sides that `training.py` measures beside ours, each a process of its own:  python benchmarks/training_peers.py JOB.json

Knows nothing of the package: examples come as a file of token ids, in the order in which they are trained, models as a Hugging Face folder. So it runs
where a peer is installed. TRL and plain torch train that folder's weights; Tunix and Levanter train models of the same sizes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
WARM = 8.0


class Turns:
    """A training loop that goes on by so many steps as a line of standard input asks for, and tells on standard output what they took.

    `tokens[i]` are the real tokens of step i. Steps of the first `WARM` seconds after a wait are not counted: a virtual machine's host takes back the memory of who waits,
    and gives it again page by page. What else is printed goes to standard error.
    """

    def __init__(self, warm: int, warm_seconds: float = WARM) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.tokens: list[int] = []
        self.facts: Callable[[], dict[str, Any]] = dict
        self._done, self._left, self._asked = 0, warm, warm
        self._warm_seconds = warm_seconds
        self._began: tuple[float, float] | None = None  # None: warming up
        self._again: float | None = None  # getting warm since then, after a wait

    def step_done(self, wait: Callable[[], object] = lambda: None) -> None:
        """To be called after each step; `wait` returns when the step's work is done."""
        self._done += 1
        self._left -= 1
        while self._left == 0:
            wait()
            if self._again is not None:
                if time.perf_counter() - self._again < self._warm_seconds:
                    self._left = 1
                else:
                    self._again, self._left, self._began = None, self._asked, (time.perf_counter(), time.process_time())
                return
            if self._began is None:
                self.tell({"ready": self.facts()})
            else:
                clock, cpu = self._began
                taken = {"seconds": time.perf_counter() - clock, "cpu_seconds": time.process_time() - cpu}
                self.tell(taken | {"steps": self._asked, "tokens": int(sum(self.tokens[self._done - self._asked : self._done]))})
            line = sys.stdin.readline()
            if not line:
                os._exit(0)  # no more is wanted: neither a save nor a farewell
            self._asked, self._left, self._again = int(line), 1, time.perf_counter()

    def tell(self, said: dict[str, Any]) -> None:
        print(json.dumps(said), file=self._out, flush=True)


def load(path: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Token ids of every example, and which of them are trained (1) or not (0)."""
    with np.load(path) as file:
        edges = np.cumsum(file["lengths"])[:-1]
        return np.split(file["tokens"], edges), np.split(file["trained"], edges)


def padded(rows: list[np.ndarray], length: int) -> np.ndarray:
    """Rows (B, length) of what is at most so long, zeros after it."""
    out = np.zeros((len(rows), length), np.int32)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row[:length]
    return out


def in_steps(examples: list[Any], size: int) -> Iterator[list[Any]]:
    return (examples[at : at + size] for at in range(0, len(examples), size))


def trl(job: Job, turns: Turns) -> None:
    """SFTTrainer: `batch` x `accumulate` rows a step, padded to the longest, flattened (`padding_free`) or packed into rows of `packed` tokens."""
    import datasets
    import torch
    import transformers
    from trl import SFTConfig, SFTTrainer

    torch.set_num_threads(job["cores"])
    datasets.disable_progress_bars()
    transformers.utils.logging.set_verbosity_error()
    tokens, trained = load(job["examples"])
    rows = datasets.Dataset.from_dict({"input_ids": [row.tolist() for row in tokens], "completion_mask": [row.tolist() for row in trained]})
    steps = job["steps"]
    config = SFTConfig(
        output_dir=job["work"], max_steps=steps, per_device_train_batch_size=job["batch"], gradient_accumulation_steps=job["accumulate"],
        max_length=job["packed"], packing=job["packed"] is not None, padding_free=job["padding_free"], completion_only_loss=True,
        learning_rate=job["learning_rate"], lr_scheduler_type="cosine", warmup_steps=math.ceil(0.1 * steps), weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.95, max_grad_norm=1.0,
        gradient_checkpointing=job["gradient_checkpointing"], train_sampling_strategy="sequential", use_cpu=True, bf16=False, dataloader_pin_memory=False,
        logging_steps=1, logging_nan_inf_filter=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(job["tokenizer"])

    class Paced(transformers.TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if not job["whole"]:
                turns.step_done()

    trainer = SFTTrainer(model, args=config, train_dataset=rows, processing_class=tokenizer, callbacks=[Paced()])
    turns.tokens = [sum(part) for part in in_steps([len(row) for row in trainer.train_dataset["input_ids"]], job["batch"] * job["accumulate"])]
    turns.facts = lambda: {"rows": len(trainer.train_dataset), "versions": {name: version(name) for name in ("trl", "torch", "transformers", "accelerate")}}
    trainer.train()
    turns.tell({"losses": [line["loss"] for line in trainer.state.log_history if "loss" in line]})


def torch_padded(job: Job, turns: Turns) -> None:
    """The usual loop over transformers and torch.optim: every example padded to `length`, `batch` rows at a time, one optimizer step for `examples_per_step`."""
    import torch
    import transformers

    torch.set_num_threads(job["cores"])
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).train()
    decayed = [weight for weight in model.parameters() if weight.ndim > 1]
    groups = [{"params": decayed}, {"params": [weight for weight in model.parameters() if weight.ndim == 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=job["learning_rate"], betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    size, length = job["examples_per_step"], job["length"]
    examples = list(zip(*load(job["examples"]), strict=True))
    turns.tokens = [sum(min(len(row), length) for row, _ in part) for part in in_steps(examples, size)]
    turns.facts = lambda: {"versions": {name: version(name) for name in ("torch", "transformers")}}
    for step in in_steps(examples, size):
        wanted = sum(int(trained[1:length].sum()) for _, trained in step)
        for part in in_steps(step, job["batch"]):
            ids = torch.from_numpy(padded([row for row, _ in part], length)).long()
            mask = torch.from_numpy(padded([np.ones_like(row) for row, _ in part], length))
            labels = ids.masked_fill(torch.from_numpy(padded([trained for _, trained in part], length)) == 0, -100)
            model(input_ids=ids, attention_mask=mask, labels=labels, num_items_in_batch=wanted, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        turns.step_done()


def tunix(job: Job, turns: Turns) -> None:
    """PeftTrainer over Tunix's llama3 model of the same sizes (weights of its own), examples padded to `length`, auto axis types."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import nnx
    from tunix.models.llama3 import model as llama3
    from tunix.sft import peft_trainer
    from tunix.sft import utils as sft

    sizes, length = json.loads((Path(job["model"]) / "config.json").read_text()), job["length"]
    heads = sizes["num_attention_heads"]
    config = llama3.ModelConfig(
        num_layers=sizes["num_hidden_layers"], vocab_size=sizes["vocab_size"], embed_dim=sizes["hidden_size"], hidden_dim=sizes["intermediate_size"], num_heads=heads,
        head_dim=sizes["hidden_size"] // heads, num_kv_heads=sizes.get("num_key_value_heads") or heads, rope_theta=10_000, norm_eps=sizes["rms_norm_eps"], weight_tying=True,
    )  # fmt: skip
    tokens, trained = load(job["examples"])
    steps = list(in_steps(list(zip(tokens, trained, strict=True)), job["examples_per_step"]))
    turns.tokens = [sum(min(len(row), length) for row, _ in step) for step in steps]
    turns.facts = lambda: {"versions": {"tunix": version("google-tunix")} | {name: version(name) for name in ("jax", "flax", "optax")}}

    def of(batch: peft_trainer.TrainingInput) -> dict[str, Any]:
        real = batch.input_tokens != 0
        return {
            "input_tokens": batch.input_tokens,
            "input_mask": batch.input_mask,
            "positions": sft.build_positions_from_mask(real),
            "attention_mask": sft.make_causal_attn_mask(real),
        }

    schedule = optax.warmup_cosine_decay_schedule(0.0, job["learning_rate"], math.ceil(0.1 * len(steps)), len(steps))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, 0.9, 0.95, weight_decay=0.1))
    with jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2):
        model = llama3.Llama3(config, rngs=nnx.Rngs(0))
        assert all(weight.dtype == jnp.float32 for weight in jax.tree.leaves(nnx.state(model, nnx.Param)))
        trainer = peft_trainer.PeftTrainer(model, optimizer, peft_trainer.TrainingConfig(eval_every_n_steps=len(steps) + 1)).with_gen_model_input_fn(of)

        def source() -> Iterator[peft_trainer.TrainingInput]:
            for number, step in enumerate(steps):
                if number:  # asked for the next: the one before is under way
                    turns.step_done(trainer._throttler.wait_for_all)
                yield peft_trainer.TrainingInput(input_tokens=padded([row for row, _ in step], length), input_mask=padded([mask for _, mask in step], length))

        trainer.train(source())


def levanter(job: Job, turns: Turns) -> None:
    """Trainer over Levanter's Llama of the same sizes (weights of its own); examples packed by its own packer into rows of `length`, about as many examples a step."""
    import haliax
    import jax
    import jmp
    from levanter.data.loader import stack_batches
    from levanter.data.packing import PromptCompletion, greedy_pack_prompt_completions
    from levanter.layers.attention import AttentionBackend
    from levanter.models.llama import LlamaConfig
    from levanter.models.lm_model import compute_next_token_loss
    from levanter.optim import AdamConfig
    from levanter.tracker import NoopConfig
    from levanter.trainer import Trainer, TrainerConfig

    sizes, length = json.loads((Path(job["model"]) / "config.json").read_text()), job["length"]
    heads = sizes["num_attention_heads"]
    config = LlamaConfig(
        seq_len=length, hidden_dim=sizes["hidden_size"], intermediate_dim=sizes["intermediate_size"], num_layers=sizes["num_hidden_layers"], num_heads=heads,
        num_kv_heads=sizes.get("num_key_value_heads") or heads, layer_norm_epsilon=sizes["rms_norm_eps"], tie_word_embeddings=True, gradient_checkpointing=False,
        attn_backend=AttentionBackend[job["attention"]],
    )  # fmt: skip
    examples = [PromptCompletion(row[:length].tolist(), int(trained.argmax())) for row, trained in zip(*load(job["examples"]), strict=True) if trained.argmax() < length - 1]
    packed = greedy_pack_prompt_completions(config.Pos, examples, 0)
    rows = max(1, round(job["examples_per_step"] * job["mean"] / length))
    turns.tokens = [sum(int((np.asarray(row.attn_mask.segment_ids[0].array) >= 0).sum()) for row in part) for part in in_steps(packed, rows)]
    turns.facts = lambda: {"rows": rows, "versions": {name: version(name) for name in ("levanter", "haliax", "jax", "equinox")}}
    steps = len(packed) // rows
    trained_by = TrainerConfig(
        id="benchmark", tracker=NoopConfig(), train_batch_size=rows, num_train_steps=steps, mp=jmp.get_policy("f32"), log_jaxprs=False, log_xla_hlo=False,
        require_accelerator=False,
    )  # fmt: skip
    optimizer = AdamConfig(learning_rate=job["learning_rate"], weight_decay=0.1, warmup=0.1).build(steps)

    def loss(model: Any, example: Any, **keys: Any) -> Any:  # its packer's marks are numbers, which jnp.mean refuses as `where`
        return compute_next_token_loss(model, dataclasses.replace(example, loss_mask=example.loss_mask != 0), **keys)

    with Trainer(trained_by, optimizer, loss, add_default_hooks=False) as trainer:
        model, training = jax.random.split(jax.random.PRNGKey(0))
        state = trainer.initial_state(training, model_init=lambda: config.build(haliax.Axis("vocab", sizes["vocab_size"]), key=model))
        trainer.add_hook(lambda info: turns.step_done(lambda: jax.block_until_ready(info.state)), every=1)
        trainer.train(state, stack_batches(iter(packed), config.Pos, trainer.TrainBatch))


SIDES = {"levanter": levanter, "trl": trl, "torch": torch_padded, "tunix": tunix}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    SIDES[job["kind"]](job, Turns(job["warm"], job.get("warm_seconds", WARM)))


if __name__ == "__main__":
    main()

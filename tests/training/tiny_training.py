"""A training that takes a second, in this process or in ones that a fork server has loaded the libraries for."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import (
    DataCollatorWithFlattening,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from llmrec.storage import write_json
from llmrec.training.checkpoints import WholeCheckpoints, checkpoint_to_resume

PAD = 0


class WholeTrainer(WholeCheckpoints, Trainer):
    """What the library's own trainer is, as far as checkpoints are concerned."""


class SlowTrainer(WholeTrainer):
    """Writes slowly, so that a kill is likely to meet it."""

    def _save_optimizer_and_scheduler(self, output_dir):
        time.sleep(0.02)
        super()._save_optimizer_and_scheduler(output_dir)
        time.sleep(0.02)


class Recorder(TrainerCallback):
    """Does something at the beginning of a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def rows(count=20, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"input_ids": (ids := rng.integers(1, 32, size=rng.integers(3, 9)).tolist()), "labels": ids}
        for _ in range(count)
    ]


def padded(batch):
    longest = max(len(row["input_ids"]) for row in batch)
    ids = [row["input_ids"] + [PAD] * (longest - len(row["input_ids"])) for row in batch]
    labels = [row["labels"] + [-100] * (longest - len(row["labels"])) for row in batch]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": (torch.tensor(ids) != PAD).long(),
    }


def tiny_trainer(
    folder, *, kind=WholeTrainer, lora=False, table=False, packed=False, callbacks=(), evaluated=False, **arguments
):
    """A trainer of a GPT-2 with dropout on 20 rows of random lengths: 10 steps an epoch."""
    arguments = {
        "max_steps": 12,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 3,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 5,
        **arguments,
    }
    set_seed(arguments["seed"])
    width = arguments.pop("width", 16)
    config = GPT2Config(
        vocab_size=32, n_positions=64, n_embd=width, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    model = GPT2LMHeadModel(config)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=2, target_modules=["c_attn"], lora_dropout=0.1, fan_in_fan_out=True)
        )
    data = rows()
    if table:
        import datasets

        data = datasets.Dataset.from_list(data)
    return kind(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data,
        eval_dataset=rows(4, seed=1) if evaluated else None,
        data_collator=DataCollatorWithFlattening() if packed else padded,
        callbacks=list(callbacks),
    )


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.state_dict().items()}


def losses(trainer):
    """What was logged, step by step, without the clock's part."""
    kept = ("step", "loss", "grad_norm", "learning_rate", "eval_loss")
    return [
        {name: value for name, value in entry.items() if name in kept}
        for entry in trainer.state.log_history
        if "loss" in entry or "eval_loss" in entry
    ]


def same_weights(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- in processes of their own ----

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["transformers.trainer", "transformers.models.gpt2.modeling_gpt2", "accelerate", "peft", "torch.distributed"]
)


def start(function, *arguments):
    """A process that runs `function`, which a module of this folder holds."""
    process = _context.Process(target=function, args=arguments)
    process.start()
    return process


def finish(processes, seconds=120):
    """Waits for processes; returns their exit codes."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert None not in codes, "a process hangs"
    return codes


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def start_ranks(function, arguments_of):
    """One process per entry of `arguments_of`, which together are a distributed run."""
    port = free_port()
    return [start(_as_rank, rank, len(arguments_of), port, function, of) for rank, of in enumerate(arguments_of)]


def _as_rank(rank, world, port, function, arguments):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    function(*arguments)


def train_to_the_end(folder, result, options=None):
    """Continues or begins a training and writes its result."""
    trainer = tiny_trainer(folder, **(options or {}))
    resume = checkpoint_to_resume(folder, ["one run"])
    trainer.train(str(resume) if resume else None)
    trainer.save_model(str(Path(result) / "weights"))
    write_json(Path(result) / "result.json", losses(trainer))


def result_of(folder):
    """(losses, weights) that `train_to_the_end` wrote."""
    return json.loads((Path(folder) / "result.json").read_text()), load_file(
        Path(folder) / "weights" / "model.safetensors"
    )


def die_at(folder, count):
    """Kills this process at the `count`-th file that is opened, renamed, made or removed in `folder`."""
    seen = 0

    def watch(event, arguments):
        nonlocal seen
        if event not in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir"):
            return
        # A tree is removed by names relative to its folders.
        if event in ("os.remove", "os.rmdir") or str(arguments[0]).startswith(folder):
            seen += 1
            if seen == count:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)

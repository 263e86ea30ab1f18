"""Processes draw differently what is each one's own, and alike what they share."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_training import rows
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from llmrec.training.randomness import OwnRandomState
from llmrec.training.trainer import GenerativeTrainer


class OwnTrainer(OwnRandomState, Trainer):
    """The mixin over the Trainer alone."""


def model():
    torch.manual_seed(7)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=1))


def arguments(folder, **options):
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=2,
        report_to="none",
        use_cpu=True,
        seed=5,
        save_strategy="no",
        **options,
    )


def report(folder):
    """What this process of a distributed training reads in two epochs, and draws."""
    trainer = GenerativeTrainer(model(), arguments(folder, ddp_backend="gloo", data_seed=None), rows(12))
    drawn = torch.rand(4).tolist()
    loader = trainer.get_train_dataloader()
    read = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        read.append([row for batch in loader for row in batch["input_ids"].tolist()])
    weights = float(sum(parameter.detach().double().sum() for parameter in trainer.model.parameters()))
    line = {"drawn": drawn, "read": read, "weights": weights, "processes": trainer.args.world_size}
    Path(folder, f"{trainer.args.process_index}.json").write_text(json.dumps(line))


def test_two_processes(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        program = f"import test_randomness; test_randomness.report({str(tmp_path)!r})"
        started.append(subprocess.Popen([sys.executable, "-c", program], env=os.environ | variables))
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first["processes"] == second["processes"] == 2
    assert first["weights"] == second["weights"]
    assert first["drawn"] != second["drawn"]
    every = sorted(tuple(row["input_ids"]) for row in rows(12))
    orders = []
    for mine, other in zip(first["read"], second["read"], strict=True):
        found = [tuple(token for token in row if token) for row in mine + other]
        assert sorted(found) == every  # nothing twice, nothing left out
        orders.append(found)
    assert orders[0] != orders[1] != every


@pytest.mark.parametrize("process", [0, 1])
def test_the_state_is_the_seed_and_the_process(tmp_path, monkeypatch, process):
    monkeypatch.setattr(TrainingArguments, "process_index", property(lambda _: process))
    OwnTrainer(model(), arguments(tmp_path), train_dataset=rows())
    drawn = torch.rand(4)
    torch.manual_seed(5 + process)
    assert torch.equal(drawn, torch.rand(4))


def test_a_seed_for_the_order_of_rows_stays(tmp_path):
    trainer = OwnTrainer(model(), arguments(tmp_path, data_seed=9), train_dataset=rows())
    assert trainer.accelerator.dataloader_config.data_seed == 9
    assert OwnTrainer(model(), arguments(tmp_path)).accelerator.dataloader_config.data_seed == 5

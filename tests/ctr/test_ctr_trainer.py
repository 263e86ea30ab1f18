import json
import math

import numpy as np
import pytest
import torch
from ctr_factories import make_rows, random_rows, tiny_ctr
from transformers import TrainingArguments, set_seed
from transformers.trainer_callback import TrainerCallback

from llmrec.ctr.dataset import Cases, Windows, collate
from llmrec.ctr.histories import Histories
from llmrec.ctr.rows import MISSING
from llmrec.ctr.trainer import CTRTrainer, measures_of, multi_task_loss
from llmrec.exceptions import BackboneError
from llmrec.rating import measures
from llmrec.training.checkpoints import newest_whole_checkpoint
from llmrec.training.shutdown import ShutdownCallback


def catalogue_of(rows):
    return np.arange(len(rows.item_ids), dtype=np.int64)


def cases_of(rows, chosen=None, weights=None):
    places = np.arange(len(rows)) if chosen is None else chosen
    return Cases(rows, Histories.of(rows), catalogue_of(rows), places, 6, weights)


def make_trainer(
    folder, train, valid=None, labels=("like",), layout="interleaved", label_weights=None, callbacks=(), **given
):
    set_seed(0)
    model = tiny_ctr("hstu", layout, labels=labels, num_items=15)
    arguments = TrainingArguments(
        output_dir=str(folder),
        **(
            {
                "per_device_train_batch_size": 8,
                "per_device_eval_batch_size": 16,
                "max_steps": 8,
                "learning_rate": 0.01,
                "report_to": [],
                "disable_tqdm": True,
                "save_strategy": "no",
                "logging_steps": 2,
                "remove_unused_columns": False,
                "use_cpu": True,
                "dataloader_pin_memory": False,
            }
            | given
        ),
    )
    return CTRTrainer(model, arguments, train, valid, label_weights=label_weights, callbacks=list(callbacks))


def test_the_loss_is_its_definition():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20, 3, generator=generator, dtype=torch.float64) * 4
    labels = torch.randint(0, 2, (20, 3), generator=generator)
    labels[torch.rand(20, 3, generator=generator) < 0.3] = MISSING
    weights, each = torch.rand(20, generator=generator), torch.tensor([1.0, 0.5, 2.0])
    wanted = 0.0
    for place in range(20):
        for label in range(3):
            if labels[place, label] != MISSING:
                p = 1 / (1 + math.exp(-logits[place, label]))
                own = -math.log(p if labels[place, label] == 1 else 1 - p)
                wanted += own * float(weights[place]) * float(each[label])
    assert float(multi_task_loss(logits, labels, weights, each)) == pytest.approx(wanted)
    assert multi_task_loss(logits.bfloat16(), labels, weights, each).dtype == torch.float32


def test_accumulated_batches_are_one_large_batch(tmp_path):
    rows = random_rows(1, count=48, num_labels=2, missing=True)
    weights = np.random.default_rng(0).random(48).astype(np.float32)
    chosen = np.flatnonzero((rows.labels >= 0).any(axis=1))
    found = []
    for size, steps in ((8, 4), (32, 1)):
        train = cases_of(rows, chosen, weights)
        trainer = make_trainer(
            *(tmp_path / str(size), train),
            labels=("a", "b"),
            label_weights=[1.0, 0.3],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            max_grad_norm=0.0,
            optim="sgd",
        )
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        trainer.train()
        found.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4)


def test_the_logged_loss_is_the_mean_over_known_labels(tmp_path):
    rows = random_rows(2, count=24, num_labels=2, missing=True)
    chosen = np.flatnonzero((rows.labels >= 0).any(axis=1))
    train = cases_of(rows, chosen)
    trainer = make_trainer(tmp_path, train, labels=("a", "b"), per_device_train_batch_size=len(chosen))
    batch = collate([train[case] for case in range(len(chosen))])
    trainer.model.eval()
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    labels = rows.labels[chosen]
    logits = outputs["logits"].detach().double().numpy()
    found = measures_of(labels, logits, rows.users[chosen], ["a", "b"])
    assert loss.item() == pytest.approx(found["loss"], rel=1e-5)
    assert found["AUC"] == found["AUC/a"]
    known = labels[:, 1] >= 0
    sigmoid = 1 / (1 + np.exp(-logits[known, 1]))
    assert found["UAUC/b"] == measures(labels[known, 1], sigmoid, rows.users[chosen][known])["UAUC"]


def test_an_evaluation_measures_all_cases_whatever_their_order(tmp_path):
    rows = random_rows(3, count=50)
    valid = cases_of(rows, np.arange(50)[::-1])
    trainer = make_trainer(tmp_path, cases_of(rows), valid, layout="target")
    logits = trainer.logits(valid)
    trainer.model.eval()
    with torch.no_grad():
        for case in (0, 13, 49):
            batch = collate([valid[case]])
            alone = trainer.model(**{name: batch[name] for name in ("items", "mask", "timestamps", "actions")})
            np.testing.assert_allclose(logits[case], alone[0].numpy(), atol=1e-5)
    wanted = measures_of(rows.labels[::-1], logits, rows.users[::-1], ["like"])
    found = trainer.evaluate()
    for name, value in wanted.items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-6)


def test_what_users_and_items_are_like_is_learnt(tmp_path):
    # Everyone likes every second item, but user 0 likes nothing, which the history tells.
    rng = np.random.default_rng(0)
    users, items = rng.integers(0, 8, 400), rng.integers(0, 15, 400)
    rows = make_rows(users, items, (items % 2 == 0) & (users > 0))
    train, valid = Windows(rows, catalogue_of(rows), np.arange(320), 6), cases_of(rows, np.arange(320, 400))
    trainer = make_trainer(tmp_path, train, valid, max_steps=60, per_device_train_batch_size=32)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_AUC"] > 0.85 > before["eval_AUC"]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert any("eval_UAUC" in line for line in lines)


class Stop(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("windows", [False, True], ids=["cases", "windows"])
def test_a_stopped_training_continues_as_if_it_had_not_been(tmp_path, windows):
    rows = random_rows(4, count=60)

    def trainer(folder, *callbacks):
        train = Windows(rows, catalogue_of(rows), np.arange(60), 6) if windows else cases_of(rows)
        return make_trainer(
            *(folder, train), callbacks=[*callbacks, ShutdownCallback()],
            save_strategy="steps", save_steps=100, train_sampling_strategy="group_by_length",
            per_device_train_batch_size=4,
        )  # fmt: skip

    whole = trainer(tmp_path / "whole")
    whole.train()
    stopped = trainer(tmp_path / "stopped", Stop(3))
    stopped.train()
    assert newest_whole_checkpoint(tmp_path / "stopped").name == "checkpoint-4"
    again = trainer(tmp_path / "stopped")
    again.train(resume_from_checkpoint=True)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, again.model.state_dict()[name]), name


def test_what_does_not_fit_is_refused(tmp_path):
    rows = random_rows(5)
    with pytest.raises(BackboneError, match="label weights"):
        make_trainer(tmp_path, cases_of(rows), label_weights=[1.0, 2.0])
    with pytest.raises(BackboneError, match="label weights"):
        make_trainer(tmp_path, cases_of(rows), label_weights=[-1.0])
    with pytest.raises(BackboneError, match="one pass"):
        make_trainer(tmp_path, Windows(rows, catalogue_of(rows), np.arange(60), 6), layout="target")
    with pytest.raises(BackboneError, match=r"label_smoothing_factor is 0\.1"):
        make_trainer(tmp_path, cases_of(rows), label_smoothing_factor=0.1)

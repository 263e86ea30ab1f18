import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from tiny_models import WORDS, random_rows, reference_losses, tiny
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments

from llmrec.exceptions import BackboneError, DataError
from llmrec.script import leave_processes
from llmrec.training.curve import read_log
from llmrec.training.trainer import GenerativeTrainer

TASKS = ("next_item", "search")


def arguments(folder, **options):
    usual = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "use_cpu": True,
        "seed": 0,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **(usual | options))


def train(folder, rows, model=None, eval_rows=None, keep=(), **options):
    """The trained trainer; options of TrainingArguments go there, `keep` names the trainer's own."""
    own = {name: options.pop(name) for name in keep}
    model = model or tiny(dtype=torch.float32)
    trainer = GenerativeTrainer(model, arguments(folder, **options), rows, eval_rows, **own)
    trainer.train()
    return trainer


def losses(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def weights(trainer):
    return torch.cat([parameter.detach().reshape(-1) for parameter in trainer.model.parameters()])


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_accumulation_is_one_large_batch(tmp_path, optim):
    rows = random_rows(0, 64)
    large = train(tmp_path, rows, per_device_train_batch_size=16, optim=optim, learning_rate=1e-3)
    parts = train(tmp_path, rows, gradient_accumulation_steps=4, optim=optim, learning_rate=1e-3)
    assert losses(parts) == pytest.approx(losses(large), abs=1e-6)
    assert losses(parts, "grad_norm") == pytest.approx(losses(large, "grad_norm"), rel=1e-4)
    assert len(losses(large)) == 4
    if optim == "sgd":
        torch.testing.assert_close(weights(parts), weights(large), rtol=0, atol=1e-6)


def test_the_first_loss_is_the_mean_over_the_labelled_tokens_of_the_step(tmp_path):
    rows = random_rows(1, 16)
    expected = torch.cat(reference_losses(tiny(dtype=torch.float32), rows)).mean().item()
    trainer = train(tmp_path, rows, max_steps=1, gradient_accumulation_steps=4)
    assert losses(trainer) == pytest.approx([expected], abs=1e-5)


@pytest.mark.parametrize("layout", ["auto", "padded", "folded", "packed"])
def test_the_weights_are_those_of_transformers_trainer(tmp_path, layout):
    rows = random_rows(2, 16, longest=12)
    theirs = Trainer(
        tiny(dtype=torch.float32),
        arguments(tmp_path / "theirs", optim="sgd"),
        data_collator=lambda some: {
            name: torch.tensor([[fill] * (12 - len(row[name])) + row[name] for row in some])
            for name, fill in (("input_ids", 0), ("labels", -100), ("attention_mask", 0))
        },
        train_dataset=[{**row, "labels": [-100, *row["labels"][1:]], "attention_mask": [1] * len(row["labels"])}
                       for row in rows],
    )  # fmt: skip
    theirs.train()
    ours = train(tmp_path / "ours", rows, optim="sgd", layout=layout, keep=["layout"])
    assert ours.layout == ("folded" if layout == "auto" else layout)
    assert losses(ours) == pytest.approx(losses(theirs), abs=1e-5)
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=0, atol=1e-5)


def by_task(rows, model):
    found = {task: [] for task in TASKS}
    for row, each in zip(rows, reference_losses(model, rows), strict=True):
        found[row["task"]].append(each.detach())
    return {task: torch.cat(each).mean().item() for task, each in found.items()}


def test_losses_of_tasks_in_training(tmp_path):
    rows = random_rows(3, 32, tasks=TASKS)
    trainer = train(tmp_path, rows, learning_rate=0.0, logging_steps=2, gradient_accumulation_steps=2)
    for place, some in enumerate((rows[:16], rows[16:])):
        expected = by_task(some, tiny(dtype=torch.float32))
        for task in TASKS:
            assert losses(trainer, f"loss/{task}")[place] == pytest.approx(expected[task], abs=1e-5)
    # With one task, or none, its loss is the loss.
    alone = train(tmp_path, [{**row, "task": "search"} for row in rows])
    assert not any("loss/" in name for entry in alone.state.log_history for name in entry)


@pytest.mark.parametrize("kind", ["list", "dataset", "stream"])
def test_the_evaluation_is_the_mean_over_all_tokens(tmp_path, kind):
    rows = random_rows(4, 23, tasks=TASKS)
    model = tiny(dtype=torch.float32)
    expected = torch.cat(reference_losses(model, rows)).mean().item()
    data = {
        "list": lambda: rows,
        "dataset": lambda: datasets.Dataset.from_list(rows),
        "stream": lambda: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    }[kind]()
    trainer = GenerativeTrainer(model, arguments(tmp_path), None, data, tasks=TASKS)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-5)
    for task, value in by_task(rows, model).items():
        assert metrics[f"eval_loss/{task}"] == pytest.approx(value, abs=1e-5)
    assert trainer.predict(data).metrics["test_loss"] == pytest.approx(expected, abs=1e-5)
    plain = [{name: row[name] for name in ("input_ids", "labels")} for row in rows]
    found = GenerativeTrainer(model, arguments(tmp_path), None, plain).evaluate()
    assert found["eval_loss"] == pytest.approx(expected, abs=1e-5)
    assert not any("/" in name for name in found)
    # It does not count in the training's losses.
    assert not trainer._sums[True].any()


def test_a_stream_trains_as_the_list_does(tmp_path):
    rows = random_rows(5, 16, tasks=TASKS)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    streamed = train(tmp_path / "1", stream, tasks=TASKS, keep=["tasks"])
    listed = train(tmp_path / "2", rows)
    assert losses(streamed) == losses(listed)
    assert losses(streamed, "loss/search") == losses(listed, "loss/search")


def test_every_pass_over_a_stream_of_shards_has_its_order_and_is_resumed_in_it(tmp_path):
    rows = random_rows(6, 16)
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=8)
    size = {"max_steps": 11, "save_strategy": "steps", "save_steps": 7}  # the eleventh step is in the third pass
    streamed = train(tmp_path / "1", stream, tasks=(), keep=["tasks"], **size)
    assert losses(streamed) == losses(train(tmp_path / "2", rows, **size))
    again = GenerativeTrainer(tiny(dtype=torch.float32), arguments(tmp_path / "1", **size), stream, tasks=())
    again.train(resume_from_checkpoint=str(tmp_path / "1" / "checkpoint-7"))
    assert losses(again) == losses(streamed)


class Ended(TrainerCallback):
    """Counts the steps that are begun."""

    steps = 0

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps += 1


@pytest.mark.parametrize("stopped", [False, True])
def test_a_training_that_had_ended_takes_no_step_when_it_is_resumed(tmp_path, stopped):
    rows, valid = random_rows(6, 32), random_rows(7, 8)
    options = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    if stopped:  # nothing is learnt, so that no evaluation is better than the first
        options |= {"max_steps": 20, "learning_rate": 0.0, "load_best_model_at_end": True, "greater_is_better": False}
        options |= {"metric_for_best_model": "eval_loss"}

    def trained(resume):
        counted = Ended()
        patience = [EarlyStoppingCallback(3)] if stopped else []
        model = tiny(dtype=torch.float32)
        given = arguments(tmp_path, **options)
        trainer = GenerativeTrainer(model, given, rows, valid, callbacks=[*patience, counted])
        trainer.train(resume)
        return trainer, counted.steps

    first, steps = trained(None)
    last = 4 if stopped else 5  # the first evaluation, and three that are no better
    assert (steps, first.state.global_step) == (last, last)
    second, steps = trained(str(tmp_path / f"checkpoint-{last}"))
    assert (steps, second.state.global_step) == (0, last)
    assert torch.equal(weights(first), weights(second))
    # From before its end it ends where it did: with the patience that was left.
    third, steps = trained(str(tmp_path / f"checkpoint-{last - 1}"))
    assert (steps, third.state.global_step) == (1, last)
    assert torch.equal(weights(first), weights(third))


def test_batches_up_to_a_budget_of_tokens(tmp_path):
    rows = random_rows(6, 60)
    seen = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            for batch in kwargs["train_dataloader"]:
                seen.append(batch["input_ids"].numel())

    options = {"max_tokens_per_batch": 40, "callbacks": [Watch()], "layout": "padded"}
    own = ["max_tokens_per_batch", "callbacks", "layout"]
    trainer = train(
        tmp_path, rows, per_device_train_batch_size=1, num_train_epochs=1, max_steps=-1, **options, keep=own
    )
    assert max(seen) <= 40
    assert trainer.state.global_step == len(seen) == len(trainer.train_dataset)
    assert sum(seen) >= sum(len(row["input_ids"]) for row in rows)
    with pytest.raises(BackboneError, match="per_device_train_batch_size of 4"):
        train(tmp_path, rows, **options, keep=own)
    with pytest.raises(DataError, match="a batch at most 5"):
        train(tmp_path, rows, per_device_train_batch_size=1, max_tokens_per_batch=5, keep=own[:1])


def test_the_loss_over_semantic_ids(tmp_path):
    rows = random_rows(7, 16, least=40)
    ids = list(range(40, WORDS))
    model = tiny(dtype=torch.float32)
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1, 40:]
        labels = torch.tensor(row["labels"])[1:]
        kept = labels != -100
        found.append(torch.nn.functional.cross_entropy(logits[kept], labels[kept] - 40, reduction="none"))
    own = {"loss_vocabulary": "semantic_ids", "semantic_ids": ids}
    trainer = train(tmp_path, rows, max_steps=1, gradient_accumulation_steps=4, **own, keep=list(own))
    assert losses(trainer) == pytest.approx([torch.cat(found).mean().item()], abs=1e-5)
    with pytest.raises(BackboneError, match="0 tokens of semantic IDs"):
        train(tmp_path, rows, loss_vocabulary="semantic_ids", keep=["loss_vocabulary"])


def test_lora_trains_its_own_weights_alone(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = tiny(dtype=torch.float32)
    before = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    config = LoraConfig(r=4, target_modules="all-linear", trainable_token_indices={"embed_tokens": [50, 60]})
    trainer = train(tmp_path, random_rows(8, 16), get_peft_model(model, config), max_steps=8)
    assert sum(losses(trainer)[4:]) < sum(losses(trainer)[:4])  # the same rows again
    assert torch.equal(trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight, before)


def test_rows_are_grouped_by_length_and_every_row_is_seen(tmp_path):
    rows = random_rows(9, 64, longest=30)
    options = {"train_sampling_strategy": "group_by_length"}
    trainer = GenerativeTrainer(tiny(), arguments(tmp_path, **options), rows, layout="padded")
    theirs = Trainer(tiny(), arguments(tmp_path, **options), train_dataset=rows)
    for data in (rows, datasets.Dataset.from_list(rows)):
        torch.manual_seed(0)
        order = list(trainer._get_train_sampler(data))
        assert sorted(order) == list(range(64))
        torch.manual_seed(0)
        assert order == list(theirs._get_train_sampler(rows))


def test_models_whose_rows_cannot_share_a_line_are_padded(tmp_path):
    bloom = tiny("bloom", "eager", dtype=torch.float32, n_layer=1, n_head=2)
    rows = random_rows(10, 16)
    assert train(tmp_path, rows, bloom).layout == "padded"
    bloom = tiny("bloom", "eager", dtype=torch.float32, n_layer=1, n_head=2)
    with pytest.raises(BackboneError, match="Use the layout 'padded'"):
        train(tmp_path, rows, bloom, layout="folded", keep=["layout"])


def test_everything_logged_is_a_line(tmp_path):
    trainer = train(tmp_path, random_rows(11, 16, tasks=TASKS), eval_rows=random_rows(12, 5), eval_strategy="steps",
                    eval_steps=2)  # fmt: skip
    lines = read_log(tmp_path / "log.jsonl")
    assert [{**line} for line in trainer.state.log_history] == [
        {name: value for name, value in line.items() if name in entry}
        for line, entry in zip(lines, trainer.state.log_history, strict=True)
    ]
    assert [line["step"] for line in lines if "eval_loss" in line] == [2, 4]


def test_what_does_not_go_together_is_refused(tmp_path):
    rows = random_rows(0, 4)
    with pytest.raises(BackboneError, match="label_smoothing_factor"):
        train(tmp_path, rows, label_smoothing_factor=0.1)
    with pytest.raises(BackboneError, match="'half'"):
        train(tmp_path, rows, loss_vocabulary="half", keep=["loss_vocabulary"])
    with pytest.raises(DataError, match="no rows to evaluate"):
        GenerativeTrainer(tiny(), arguments(tmp_path), rows).evaluate()
    several = arguments(tmp_path)
    several._n_gpu = 2
    with pytest.raises(BackboneError, match="accelerate launch"):
        GenerativeTrainer(tiny(), several, rows)


def distributed_run(folder, processes):
    """The losses of a training whose step has 16 rows, and of an evaluation of 11."""
    rows, valid = random_rows(20, 64, tasks=TASKS), random_rows(21, 11, tasks=TASKS)
    trainer = train(folder, rows, eval_rows=valid, per_device_train_batch_size=16 // processes, eval_strategy="steps",
                    eval_steps=2, optim="sgd", per_device_eval_batch_size=2)  # fmt: skip
    names = ("loss", "loss/search", "loss/next_item", "eval_loss", "eval_loss/search", "grad_norm")
    found = {name: losses(trainer, name) for name in names} | {"weights": weights(trainer)[::50].tolist()}
    # A stream whose last round leaves a process without rows, twice over.
    stream = datasets.Dataset.from_list(random_rows(22, 33)).to_iterable_dataset()
    size = {"per_device_train_batch_size": 8 // processes, "max_steps": 8}
    streamed = train(folder / "stream", stream, tasks=(), keep=["tasks"], optim="sgd", **size)
    return found | {"streamed": losses(streamed), "streamed grad_norm": losses(streamed, "grad_norm")}


def test_two_processes_train_and_evaluate_as_one(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", __file__, str(tmp_path)]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    alone = distributed_run(tmp_path / "alone", 1)
    for process in range(2):
        found = json.loads((tmp_path / f"{process}.json").read_text())
        for name, values in alone.items():
            assert found[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
    assert len(alone["eval_loss"]) == 2
    # One process writes, and each event once.
    assert len(read_log(tmp_path / "two" / "log.jsonl")) == len(read_log(tmp_path / "alone" / "log.jsonl"))


if __name__ == "__main__":
    base, rank = Path(sys.argv[1]), os.environ["RANK"]
    (base / f"{rank}.json").write_text(json.dumps(distributed_run(base / "two", 2)))
    leave_processes()

"""The trainers: a student that has nothing left to learn gives the teacher's items, and the control is the control."""

import copy
import json

import numpy as np
import pytest
import torch
from small_teachers import language_model, sequence_model, split_of, token_rows
from transformers import set_seed

from llmrec.distillation.asked_windows import AskedWindows
from llmrec.distillation.head_states import HeadStates
from llmrec.distillation.item_distributions import ItemDistributions
from llmrec.distillation.item_lessons import TableLesson, TeacherLesson
from llmrec.distillation.language_trainer import DistillationTrainer, PairedRows
from llmrec.distillation.lessons import LogitsLesson
from llmrec.distillation.sequence_trainer import SequenceDistillationTrainer
from llmrec.exceptions import DataError
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.trainer import SequenceTrainer
from llmrec.sequence.windows import TrainingWindows
from llmrec.training.arguments import StageArguments
from llmrec.training.trainer import GenerativeTrainer

N = 40
RANGE = np.arange(40, 61)


def arguments(folder, **options):
    defaults = {
        "max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 0.01, "use_cpu": True, "logging_steps": 2,
        "disable_tqdm": True, "save_strategy": "no", "report_to": "none", "lr_scheduler_type": "constant",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    return StageArguments(output_dir=str(folder), **(defaults | options))


def logged(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def sequence_trainer(folder, model, lesson, kind=SequenceDistillationTrainer, windows=TrainingWindows, **options):
    split = split_of(N)
    histories = LoggedHistories(split, model.events)
    given = {} if kind is SequenceTrainer else {"lesson": lesson}
    cases = histories.cases("valid"), split.targets("valid")
    made = windows(histories, 8)
    return kind(model, arguments(folder, **options), made, FullSoftmax(), *cases, **given)


def test_a_sequence_student_without_a_loss_left_ranks_as_its_teacher(tmp_path):
    teacher = sequence_model("sasrec", layers=2, items=N, dtype=torch.float32)
    with torch.no_grad():
        teacher.encoder.norm.weight.mul_(4)  # a teacher that is sure of its items
    student = copy.deepcopy(teacher)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    windows = TrainingWindows(LoggedHistories(split_of(N), teacher.events), 8)
    batch = windows.__getitems__([(0, number) for number in range(len(windows))])
    there = batch["labels"] != -100

    def best(model):
        with torch.no_grad():
            queries = model.eval()(batch["items"], batch["mask"])[there]
            return (queries @ model.table().T).argmax(-1)

    before = (best(student) == best(teacher)).float().mean()
    options = {"max_steps": 300, "logging_steps": 50, "lr_scheduler_type": "cosine", "learning_rate": 0.005}
    trainer = sequence_trainer(tmp_path, student, TeacherLesson(teacher, 1.0, 1.0), **options)
    trainer.train()
    parts = [line["distillation/kl"] for line in logged(tmp_path) if "distillation/kl" in line]
    assert parts[-1] < 0.1 * parts[0]
    after = (best(student) == best(teacher)).float().mean()
    assert before < 0.9 < 0.95 < after


def test_a_language_student_without_a_loss_left_ranks_as_its_teacher(tmp_path):
    teacher = language_model(layers=2, dtype=torch.float32)
    with torch.no_grad():
        teacher.model.norm.weight.mul_(3)  # as above
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.06 * torch.randn_like(parameter))
    rows = token_rows(0, 32, least=40)

    def best(model):
        found = []
        for row in rows:
            with torch.no_grad():
                logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0, :-1, RANGE]
            found.append(logits[torch.tensor(row["labels"][1:]) != -100].argmax(-1))
        return torch.cat(found)

    before = (best(student) == best(teacher)).float().mean()
    trainer = DistillationTrainer(
        student,
        arguments(tmp_path, max_steps=200, learning_rate=0.003, logging_steps=40, lr_scheduler_type="cosine"),
        rows,
        rows,
        lesson=LogitsLesson(HeadStates(teacher), RANGE, RANGE, alpha=1.0),
    )
    trainer.train()
    parts = [line["distillation/kl"] for line in logged(tmp_path) if "distillation/kl" in line]
    assert parts[-1] < 0.1 * parts[0]
    after = (best(student) == best(teacher)).float().mean()
    assert before < 0.9 < 0.95 < after


def test_the_teacher_reads_in_the_precision_of_the_student(tmp_path):
    """A copy of the teacher has nothing to learn from it in bfloat16 either."""
    once = {"bf16": True, "max_steps": 1, "logging_steps": 1, "gradient_checkpointing": False}
    rows = token_rows(1, 24)
    for ids in (RANGE, None):
        teacher = language_model(layers=2, dtype=torch.float32)
        student = copy.deepcopy(teacher)
        lesson = LogitsLesson(HeadStates(teacher), ids, ids, alpha=0.5)
        folder = tmp_path / f"language-{ids is None}"
        DistillationTrainer(student, arguments(folder, **once), rows, rows, lesson=lesson).train()
        assert [line["distillation/kl"] for line in logged(folder) if "distillation/kl" in line] == [0.0]
    taught = sequence_model("sasrec", items=N, dtype=torch.float32)
    sequence_trainer(tmp_path / "items", copy.deepcopy(taught), TeacherLesson(taught, 0.5, 1.0), **once).train()
    assert [line["distillation/kl"] for line in logged(tmp_path / "items") if "distillation/kl" in line] == [0.0]


def test_the_control_is_the_house_trainer_step_by_step(tmp_path):
    weights = []
    for name, kind in (("control", SequenceDistillationTrainer), ("house", SequenceTrainer)):
        set_seed(0)
        trainer = sequence_trainer(tmp_path / name, sequence_model(items=N, dtype=torch.float32), None, kind)
        trainer.train()
        weights.append(trainer.model.state_dict())
        assert not any("distillation/kl" in line for line in logged(tmp_path / name))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    weights, rows = [], token_rows(1, 24)
    for name in ("control", "house"):
        set_seed(0)
        student, args = language_model(layers=1, dtype=torch.float32), arguments(tmp_path / f"language-{name}")
        if name == "control":
            trainer = DistillationTrainer(student, args, rows, rows, lesson=None)
        else:
            trainer = GenerativeTrainer(student, args, rows, rows)
        trainer.train()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_batches_that_are_accumulated_are_one_large_batch(tmp_path):
    teacher, rows = language_model(layers=2, seed=1, dtype=torch.float32), token_rows(1, 16)
    found = []
    for size, steps in ((8, 1), (2, 4)):
        student = language_model(layers=1, seed=2, dtype=torch.float32)
        args = arguments(
            tmp_path / str(size), per_device_train_batch_size=size, gradient_accumulation_steps=steps, max_steps=4
        )
        lesson = LogitsLesson(HeadStates(teacher), RANGE, RANGE, alpha=0.5, temperature=2.0)
        trainer = DistillationTrainer(student, args, rows, rows, lesson=lesson)
        trainer.train()
        found.append(
            (trainer.model.state_dict(), [line.get("distillation/kl") for line in logged(tmp_path / str(size))])
        )
    for name, weight in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], weight, rtol=0, atol=2e-4)
    assert found[0][1][:2] == pytest.approx(found[1][1][:2], abs=1e-3)


def test_rows_of_two_vocabularies_are_trained_side_by_side(tmp_path):
    teacher, rows = language_model(layers=2, seed=1, dtype=torch.float32), token_rows(1, 16, least=40)
    order = torch.randperm(61, generator=torch.Generator().manual_seed(0))
    moved = copy.deepcopy(teacher)
    moved.get_input_embeddings().weight.data[order] = teacher.get_input_embeddings().weight.data
    theirs = [
        {
            "input_ids": [int(order[token]) for token in row["input_ids"]],
            "labels": [token if token < 0 else int(order[token]) for token in row["labels"]],
        }
        for row in rows
    ]
    found = []
    for name, given, model, ids, paired in (
        ("one", rows, teacher, RANGE, False),
        ("two", PairedRows(rows, theirs), moved, order.numpy()[RANGE], True),
    ):
        student = language_model("gpt2", layers=1, seed=2, dtype=torch.float32)
        lesson = LogitsLesson(HeadStates(model), ids, RANGE, alpha=0.5)
        args = arguments(tmp_path / name, eval_strategy="steps", eval_steps=3)
        trainer = DistillationTrainer(
            student, args, given, rows, lesson=lesson, paired=paired, layout="padded", tasks=()
        )
        trainer.train()
        found.append(trainer.model.state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, rtol=0, atol=1e-5)
    with pytest.raises(DataError, match="16 training rows and the teacher 15"):
        PairedRows(rows, theirs[:15])


def test_a_table_is_learnt_from_in_a_trainer(tmp_path):
    split = split_of(N)
    places = np.flatnonzero(split.in_training)
    rows = ((split.rows[places] + 1) % N)[:, None].astype(np.int64)  # not the label, but the item after it
    table = ItemDistributions(places, rows, np.full((len(places), 1), np.log(0.9), np.float32), np.ones(N, bool))
    student = sequence_model(items=N, layers=1, dtype=torch.float32)
    options = {"windows": AskedWindows, "max_steps": 60, "logging_steps": 10}
    trainer = sequence_trainer(tmp_path, student, TableLesson(table, 1.0, 1.0), **options)
    trainer.train()
    parts = [line["distillation/kl"] for line in logged(tmp_path) if "distillation/kl" in line]
    assert parts[-1] < parts[0] / 2

import json
import math

import pytest
from pages import Seen
from transformers import TrainerControl, TrainerState

from llmrec.exceptions import DataError
from llmrec.training.curve import LogLines, log_curve, read_log, training_page


def state(step, main=True):
    return TrainerState(global_step=step, epoch=step / 10, is_world_process_zero=main)


def run(folder, begin, steps, main=True):
    """A run that begins at a step and logs a loss at each of `steps`."""
    lines = LogLines(folder / "log.jsonl")
    lines.on_train_begin(None, state(begin, main), TrainerControl())
    for step in steps:
        lines.on_log(None, state(step, main), TrainerControl(), logs={"loss": 10.0 / step})
    return lines


def test_every_event_is_a_line_at_once(tmp_path):
    lines = run(tmp_path, 0, [1])
    assert read_log(tmp_path / "log.jsonl") == [{"step": 1, "epoch": 0.1, "loss": 10.0}]
    lines.on_log(None, state(2), TrainerControl(), logs={"eval_loss": math.nan, "grad_norm": math.inf, "epoch": 0.2})
    text = (tmp_path / "log.jsonl").read_text()
    assert json.loads(text.splitlines()[1]) == {"step": 2, "epoch": 0.2, "eval_loss": None, "grad_norm": None}


def test_a_resumed_run_drops_what_lies_behind_its_checkpoint(tmp_path):
    run(tmp_path, 0, [2, 4, 6, 8]).on_log(None, state(8), TrainerControl(), logs={"train_runtime": 3.0})
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 9, "lo')  # a kill tore it
    run(tmp_path, 6, [8, 10])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 10]
    # From the last checkpoint of a finished run, only the summary is written again.
    run(tmp_path, 10, []).on_log(None, state(10), TrainerControl(), logs={"train_runtime": 0.1})
    run(tmp_path, 10, []).on_log(None, state(10), TrainerControl(), logs={"train_runtime": 0.1})
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [2, 4, 6, 8, 10, 10]


def test_a_run_that_begins_anew_begins_the_file_anew(tmp_path):
    run(tmp_path, 0, [2, 4]).on_log(None, state(0), TrainerControl(), logs={"eval_loss": 4.0})
    run(tmp_path, 0, [1])
    assert [line["step"] for line in read_log(tmp_path / "log.jsonl")] == [1]


def test_an_evaluation_before_the_training_is_kept(tmp_path):
    lines = LogLines(tmp_path / "log.jsonl")
    lines.on_log(None, state(0), TrainerControl(), logs={"eval_loss": 4.0})
    lines.on_train_begin(None, state(0), TrainerControl())
    assert read_log(tmp_path / "log.jsonl") == [{"step": 0, "epoch": 0.0, "eval_loss": 4.0}]


def test_only_the_main_process_writes(tmp_path):
    run(tmp_path, 0, [1, 2], main=False)
    assert not (tmp_path / "log.jsonl").exists()


def test_a_row_of_the_curve_is_a_step_with_finite_numbers():
    history = [
        {"step": 1, "loss": 3.0},
        {"step": 2, "eval_loss": 2.0},
        {"step": 2, "eval_loss": 2.0, "eval_HR@10": 0.5},
        {"step": 4, "eval_loss": math.nan, "eval_HR@10": 0.25},
    ]
    assert log_curve(history) == [
        {"step": 2, "eval_loss": 2.0, "eval_HR@10": 0.5},
        {"step": 4, "eval_HR@10": 0.25},
    ]


def test_the_page_shows_losses_and_ranking(tmp_path):
    lines = LogLines(tmp_path / "log.jsonl")
    for step in range(1, 7):
        lines.on_log(None, state(step), TrainerControl(), logs={"loss": 5.0 - 0.3 * step, "loss/<b>search": 4.0})
        if step % 2 == 0:
            evaluated = {"eval_loss": 3.0 + abs(step - 4) / 10, "eval_HR@10": step / 100, "eval_NDCG@10": math.nan}
            lines.on_log(None, state(step), TrainerControl(), logs=evaluated)
    lines.on_log(None, state(6), TrainerControl(), logs={"train_runtime": 3.0, "train_loss": 1.0})
    text = training_page(tmp_path).render()
    assert "lowest at step 4, 3.0000" in text
    assert "HR@10 is highest at step 6, 0.0600" in text
    assert "Not finite at some step: eval_NDCG@10" in text
    assert text.count("<figure") == 3
    assert text.count("<tr>") == 4
    assert "&lt;b&gt;search" in text
    assert "<b>search" not in text
    assert "svg" in Seen(text).tags
    assert training_page(tmp_path).render() == text


def test_a_page_without_evaluations(tmp_path):
    run(tmp_path, 0, [1, 2, 3])
    text = training_page(tmp_path).render()
    assert text.count("<figure") == 1
    assert "Evaluations" not in text


def test_without_a_log_there_is_no_page(tmp_path):
    with pytest.raises(DataError, match=r"log\.jsonl is missing"):
        training_page(tmp_path)

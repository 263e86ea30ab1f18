import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_training import (
    Recorder,
    finish,
    losses,
    same_weights,
    start,
    start_ranks,
    tiny_trainer,
    weights,
)
from transformers import TrainerCallback

from llmrec.training.checkpoints import newest_whole_checkpoint
from llmrec.training.manifest import why_not_whole
from llmrec.training.shutdown import ShutdownCallback


def term():
    os.kill(os.getpid(), signal.SIGTERM)


def interrupt():
    os.kill(os.getpid(), signal.SIGINT)


RUNS = {
    "steps": {"save_steps": 100},
    "accumulated": {"save_steps": 100, "gradient_accumulation_steps": 2},
    "epochs": {"evaluated": True, "eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"},
    "evaluated": {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 100},
    "epochs and steps": {"evaluated": True, "eval_strategy": "epoch", "save_steps": 100, "logging_steps": 3},
    "best": {
        "evaluated": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "best",
        # The loss falls: the first evaluation stays the best, and no later one is a reason to save.
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    },
}


@pytest.mark.parametrize("run", RUNS)
def test_a_stopped_training_continues_as_if_it_had_not_been(tmp_path, run):
    reference = tiny_trainer(tmp_path / "whole", **RUNS[run])
    reference.train()
    for step in (4, 10):  # between two logs; the tenth ends the epoch, where there is no accumulation
        shutdown, folder = ShutdownCallback(), tmp_path / f"stopped-{step}"
        stopped = tiny_trainer(folder, callbacks=[Recorder(step - 1, term), shutdown], **RUNS[run])
        stopped.train()
        assert shutdown.signal is signal.SIGTERM
        assert stopped.state.global_step == step
        assert newest_whole_checkpoint(folder) == folder / f"checkpoint-{step}"
        trainer = tiny_trainer(folder, callbacks=[ShutdownCallback()], **RUNS[run])
        trainer.train(resume_from_checkpoint=True)
        assert trainer.state.global_step == 12
        assert losses(trainer) == losses(reference)
        assert same_weights(weights(trainer), weights(reference))


@pytest.mark.parametrize(("send", "code"), [(term, 143), (interrupt, 130)])
def test_the_exit_code_is_the_shells(tmp_path, caplog, send, code):
    shutdown = ShutdownCallback()
    assert shutdown.exit_code is None
    shutdown.exit_if_stopped()
    tiny_trainer(tmp_path, callbacks=[Recorder(2, send), shutdown]).train()
    with pytest.raises(SystemExit) as caught:
        shutdown.exit_if_stopped()
    assert caught.value.code == code
    assert "after step 3; the same command continues" in caplog.text


def test_only_the_first_process_speaks(tmp_path, caplog, capfd, monkeypatch):
    shutdown = ShutdownCallback()
    tiny_trainer(tmp_path, callbacks=[Recorder(2, term), shutdown]).train()
    assert "SIGTERM: the training finishes its step" in capfd.readouterr().err
    monkeypatch.setenv("RANK", "1")
    shutdown._received = None
    shutdown._receive(signal.SIGTERM, None)
    with pytest.raises(SystemExit):
        shutdown.exit_if_stopped()
    assert "SIGTERM" not in caplog.text
    assert "SIGTERM" not in capfd.readouterr().err


def test_a_training_that_was_not_stopped_says_nothing(tmp_path):
    shutdown = ShutdownCallback()
    tiny_trainer(tmp_path, callbacks=[shutdown]).train()
    assert shutdown.exit_code is None
    shutdown.exit_if_stopped()


@pytest.mark.parametrize("crashes", [False, True])
def test_the_signals_are_given_back(tmp_path, crashes):
    received = []

    def handler(number, frame):
        received.append(number)

    class Own(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            inside.append(signal.getsignal(signal.SIGTERM))
            if crashes:
                raise KeyError("crash")

    inside = []
    before = signal.signal(signal.SIGTERM, handler), signal.getsignal(signal.SIGINT)
    try:
        trainer = tiny_trainer(tmp_path, max_steps=1, callbacks=[ShutdownCallback(), Own()])
        if crashes:
            with pytest.raises(KeyError):
                trainer.train()
        else:
            trainer.train()
        assert inside[0] is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGINT) is before[1]
        term()
        assert received == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before[0])


def test_what_was_saved_on_the_way_out_is_not_removed_for_the_best(tmp_path):
    """The Trainer takes the stop for the end, where a limit of one leaves the best checkpoint alone."""
    options = RUNS["best"] | {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True}
    trainer = tiny_trainer(tmp_path, callbacks=[Recorder(6, term), ShutdownCallback()], **options)
    trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-7"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    again = tiny_trainer(tmp_path, callbacks=[ShutdownCallback()], **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2"]


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    class Late(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            if state.global_step == state.max_steps:
                term()

    shutdown = ShutdownCallback()
    options = {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2}
    tiny_trainer(tmp_path, callbacks=[Late(), shutdown], **options).train()
    assert shutdown.exit_code == 143


def test_beside_the_main_thread_signals_are_left_alone(tmp_path, caplog):
    before = signal.getsignal(signal.SIGTERM)
    failed = []

    def train():
        try:
            tiny_trainer(tmp_path, max_steps=2, callbacks=[ShutdownCallback()]).train()
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=train)
    thread.start()
    thread.join()
    assert failed == []
    assert "beside the main thread" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


# ---- in processes of their own ----


class Slow(TrainerCallback):
    """Says which step it is at, and takes its time."""

    def __init__(self, path, seconds):
        self.path, self.seconds = path, seconds

    def on_step_begin(self, args, state, control, **kwargs):
        if not self.path.exists():
            self.path.write_text("begun")
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)


def train_slowly(folder, begun, seconds, together, code=None):
    shutdown = ShutdownCallback(together)
    options = {"save_steps": 100, "max_steps": 1000} | ({"ddp_backend": "gloo"} if "RANK" in os.environ else {})
    trainer = tiny_trainer(folder, callbacks=[Slow(Path(begun), seconds), shutdown], **options)
    trainer.train()
    if code is not None:
        Path(code).write_text(json.dumps([shutdown.exit_code, trainer.state.global_step]))
    shutdown.exit_if_stopped()


def wait_for(path, seconds=60):
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_the_process(tmp_path, number, code):
    process = start(train_slowly, tmp_path / "run", tmp_path / "begun", 0.02, 3.0)
    wait_for(tmp_path / "begun")
    for _ in range(3):  # as a launcher and a scheduler do together
        os.kill(process.pid, number)
    assert finish([process]) == [code]
    (checkpoint,) = (tmp_path / "run").iterdir()
    assert why_not_whole(checkpoint) is None


def test_the_second_signal_ends_it_at_once(tmp_path):
    process = start(train_slowly, tmp_path / "run", tmp_path / "begun", 600, 0.2)
    wait_for(tmp_path / "begun")
    os.kill(process.pid, signal.SIGTERM)
    time.sleep(0.6)
    assert process.is_alive()
    os.kill(process.pid, signal.SIGTERM)
    assert finish([process], seconds=20) == [-signal.SIGTERM]
    assert list(tmp_path.glob("run/checkpoint-*")) == []


def test_all_processes_stop_though_one_got_the_signal(tmp_path):
    arguments = [
        (tmp_path / "run", tmp_path / f"begun-{rank}", 0.02, 3.0, tmp_path / f"code-{rank}") for rank in (0, 1)
    ]
    processes = start_ranks(train_slowly, arguments)
    wait_for(tmp_path / "begun-1")
    os.kill(processes[1].pid, signal.SIGTERM)
    assert finish(processes) == [143, 143]
    said = [json.loads((tmp_path / f"code-{rank}").read_text()) for rank in (0, 1)]
    assert said[0] == said[1]
    (checkpoint,) = (tmp_path / "run").iterdir()
    assert checkpoint.name == f"checkpoint-{said[0][1]}"
    assert why_not_whole(checkpoint) is None
    assert torch.load(checkpoint / "rng_state_1.pth", weights_only=False).keys() >= {"python", "cpu"}

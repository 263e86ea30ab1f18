import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from safetensors.torch import load_file
from tiny_training import (
    Recorder,
    WholeTrainer,
    finish,
    losses,
    same_weights,
    start,
    start_ranks,
    tiny_trainer,
    weights,
)
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from llmrec.exceptions import BackboneError
from llmrec.training import checkpoints
from llmrec.training.checkpoints import WholeCheckpoints, checkpoint_to_resume, newest_whole_checkpoint, seconds_of
from llmrec.training.manifest import MANIFEST, why_not_whole, write_manifest
from llmrec.training.patience import KeptPatience


def old_checkpoint(folder, step):
    """As the Trainer itself writes it, without a manifest."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    save_file({"weight": np.zeros(3)}, path / "model.safetensors")
    torch.save({}, path / "optimizer.pt")
    torch.save({}, path / "scheduler.pt")
    return path


def checkpoint(folder, step, content=b"weights", resumable=True):
    path = folder / f"checkpoint-{step}"
    (path / "shards").mkdir(parents=True)
    (path / "shards" / "one.bin").write_bytes(content)
    (path / "trainer_state.json").write_text("{}")
    write_manifest(path, step, processes=1, resumable=resumable)
    return path


class CrashError(Exception):
    pass


def crash():
    raise CrashError


# ---- which one is whole ----


def test_the_newest_by_number_not_by_name(tmp_path):
    for step in (90, 100, 9):
        old_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-of-200").mkdir()
    assert newest_whole_checkpoint(tmp_path) == tmp_path / "checkpoint-100"
    assert newest_whole_checkpoint(tmp_path, below=100) == tmp_path / "checkpoint-90"


@pytest.mark.parametrize("file", ["trainer_state.json", "model.safetensors", "optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("tear", ["cut", "gone"])
def test_torn_ones_without_a_manifest_are_passed_over(tmp_path, file, tear):
    whole, torn = old_checkpoint(tmp_path, 10), old_checkpoint(tmp_path, 20)
    content = (torn / file).read_bytes()
    if tear == "cut":
        (torn / file).write_bytes(content[: len(content) // 2])
    else:
        (torn / file).unlink()
    assert newest_whole_checkpoint(tmp_path) == whole


def test_a_missing_shard_without_a_manifest_is_found(tmp_path):
    path = old_checkpoint(tmp_path, 10)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "model.safetensors"}}))
    assert why_not_whole(path) is None
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"weight": "other.safetensors"}}))
    assert "torn" in why_not_whole(path)


def altered(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (lambda path: altered(path / "shards" / "one.bin", b"weightz"), "bytes of shards/one.bin"),
        (lambda path: altered(path / "shards" / "one.bin", b"weight"), "6 bytes, and its manifest.json says 7"),
        (lambda path: altered(path / "shards" / "one.bin", b"weights!"), "8 bytes"),
        (lambda path: (path / "shards" / "one.bin").unlink(), "shards/one.bin is missing"),
        (lambda path: altered(path / MANIFEST, b"{"), "cannot be read"),
        (lambda path: altered(path / MANIFEST, b"[]"), "cannot be read"),
        (lambda path: altered(path / MANIFEST, b'{"step": 20, "resumable": true}'), "cannot be read"),
        (
            lambda path: altered(
                path / MANIFEST,
                b'{"step": 20, "resumable": true, "files": {"../run.json": {"size": 0, "sha256": ""}}}',
            ),
            "lies outside",
        ),
        (lambda path: path.rename(path.with_name("checkpoint-30")), "is of step 20"),
    ],
)
def test_damage_is_found_and_named(tmp_path, caplog, damage, why):
    whole, torn = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20)
    assert newest_whole_checkpoint(tmp_path) == torn
    assert caplog.text == ""
    damage(torn)
    with caplog.at_level(logging.WARNING, logger="llmrec"):
        assert newest_whole_checkpoint(tmp_path) == whole
    assert why in caplog.text
    assert "passed over" in caplog.text


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("bytes")
    path = checkpoint(folder, 1, content=bytes(range(64)))
    file = path / data.draw(st.sampled_from(["shards/one.bin", "trainer_state.json"]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(bytes(content))
    assert why_not_whole(path) is not None


def test_a_big_one_shows_a_bar(tmp_path, capsys, monkeypatch):
    checkpoint(tmp_path, 1)
    assert newest_whole_checkpoint(tmp_path) is not None
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("llmrec.training.manifest._SHOW_FROM", 1)
    assert newest_whole_checkpoint(tmp_path) is not None
    assert "Checking checkpoint-1" in capsys.readouterr().err


def test_weights_alone_are_not_resumed_from(tmp_path, caplog):
    trainer = tiny_trainer(tmp_path, max_steps=2, save_only_model=True)
    trainer.train()
    assert (tmp_path / "checkpoint-2" / MANIFEST).is_file()
    assert newest_whole_checkpoint(tmp_path) is None
    assert "weights alone" in caplog.text


# ---- whose they are ----


def test_nothing_to_resume(tmp_path):
    assert newest_whole_checkpoint(tmp_path / "nowhere") is None
    assert checkpoint_to_resume(tmp_path / "nowhere", ["one"]) is None


def test_only_the_same_run_is_resumed(tmp_path):
    assert checkpoint_to_resume(tmp_path, ["one"]) is None
    path = checkpoint(tmp_path, 10)
    assert checkpoint_to_resume(tmp_path, ["one"]) == path
    assert checkpoint_to_resume(tmp_path, ["two"]) is None
    assert not path.exists()
    path = checkpoint(tmp_path, 10)
    checkpoint(tmp_path / ".saving", 20)
    assert checkpoint_to_resume(tmp_path, ["two"], fresh=True) is None
    assert not path.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.json"]


def test_a_torn_run_file_removes_nothing(tmp_path):
    checkpoint_to_resume(tmp_path, ["one"])
    path = checkpoint(tmp_path, 10)
    (tmp_path / "run.json").write_text('{"ru')
    with pytest.raises(BackboneError, match=r"run\.json cannot be read.*--fresh"):
        checkpoint_to_resume(tmp_path, ["one"])
    assert path.exists()
    assert checkpoint_to_resume(tmp_path, ["one"], fresh=True) is None
    assert not path.exists()


def test_what_a_kill_left_is_put_right(tmp_path):
    checkpoint_to_resume(tmp_path, ["one"])
    checkpoint(tmp_path, 10)
    # Killed between the manifest and the last rename, once with an older one of the same step moved aside.
    checkpoint(tmp_path / ".saving", 20, content=b"new")
    old = checkpoint(tmp_path / "elsewhere", 20, content=b"old")
    old.rename(tmp_path / ".saving" / "replaced-checkpoint-20")
    assert checkpoint_to_resume(tmp_path, ["one"]) == tmp_path / "checkpoint-20"
    assert (tmp_path / "checkpoint-20" / "shards" / "one.bin").read_bytes() == b"new"
    assert not (tmp_path / ".saving").exists()
    # Killed while it was written: without its manifest, or with one of another's.
    half = checkpoint(tmp_path / ".saving", 30)
    (half / MANIFEST).unlink()
    altered(checkpoint(tmp_path / ".saving", 40) / "trainer_state.json", b"{ ")
    old_checkpoint(tmp_path / ".saving", 50)
    assert checkpoint_to_resume(tmp_path, ["one"]) == tmp_path / "checkpoint-20"
    assert sorted(path.name for path in tmp_path.glob("[!e]*")) == ["checkpoint-10", "checkpoint-20", "run.json"]


def test_a_checkpoint_of_the_same_step_is_replaced_or_kept(tmp_path, monkeypatch):
    final, staged = checkpoint(tmp_path, 10, b"old"), checkpoint(tmp_path / ".saving", 10, b"new")
    real = os.replace

    def fails(source, target):
        if Path(target) == final and Path(source) == staged:
            raise OSError(5, "Input/output error")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", fails)
        with pytest.raises(OSError, match="Input/output"):
            checkpoints._put_in_place(staged, final)
    assert (final / "shards" / "one.bin").read_bytes() == b"old"
    checkpoints._put_in_place(staged, final)
    assert (final / "shards" / "one.bin").read_bytes() == b"new"


# ---- saving ----


@pytest.mark.parametrize("limit", [None, 1, 2, 3])
@pytest.mark.parametrize("best", [False, True])
def test_the_folder_is_what_the_trainer_itself_would_leave(tmp_path, limit, best):
    options = {"save_total_limit": limit, "save_steps": 2}
    if best:
        options |= {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
        # The loss falls, so the first one is the best for who wants it high.
        options |= {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    ours = tiny_trainer(tmp_path / "a", **options)
    ours.train()
    theirs = tiny_trainer(tmp_path / "b", kind=Trainer, **options)
    theirs.train()
    assert losses(ours) == losses(theirs)
    assert same_weights(weights(ours), weights(theirs))
    names = sorted(path.name for path in (tmp_path / "b").iterdir())
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == names
    for name in names:
        assert why_not_whole(tmp_path / "a" / name) is None
        mine = json.loads((tmp_path / "a" / name / "trainer_state.json").read_text())
        own = json.loads((tmp_path / "b" / name / "trainer_state.json").read_text())
        for state in (mine, own):
            state["log_history"] = None  # holds times
        assert mine == json.loads(json.dumps(own).replace(str(tmp_path / "b"), str(tmp_path / "a")))
        first, second = tmp_path / "a" / name / "model.safetensors", tmp_path / "b" / name / "model.safetensors"
        assert first.read_bytes() == second.read_bytes()
    if best:
        assert ours.state.best_model_checkpoint == str(tmp_path / "a" / f"checkpoint-{ours.state.best_global_step}")
        assert ours.state.best_global_step < 6


@settings(max_examples=40, deadline=None)
@given(steps=st.sets(st.integers(1, 99), min_size=1, max_size=7), limit=st.integers(0, 8) | st.none(), data=st.data())
def test_old_ones_go_by_the_trainers_rules(tmp_path_factory, steps, limit, data):
    best = data.draw(st.sampled_from([*sorted(steps), None]))
    left = []
    for folder in (tmp_path_factory.mktemp("ours"), tmp_path_factory.mktemp("theirs")):
        for step in steps:
            (folder / f"checkpoint-{step}").mkdir()
        path = None if best is None else str(folder / f"checkpoint-{best}")
        if not left:
            (folder / ".saving").mkdir()
            checkpoints._rotate(folder, max(steps), limit, path)
            shutil.rmtree(folder / ".saving")
        else:
            rotate_checkpoints(str(folder), limit, path)
        left.append(sorted(path.name for path in folder.iterdir()))
    assert left[0] == left[1]


@pytest.mark.parametrize(("limit", "left"), [(1, [20]), (2, [10, 20]), (3, [10, 20, 40]), (4, [10, 20, 30, 40])])
def test_those_of_a_future_that_did_not_come_go_first(tmp_path, limit, left):
    for step in (10, 20, 30, 40):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / ".saving").mkdir()
    checkpoints._rotate(tmp_path, 20, limit, None)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [f"checkpoint-{step}" for step in left]


def test_all_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    trainer = tiny_trainer(tmp_path, max_steps=1, save_steps=1)
    synced, order = set(), []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        order.append(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(source, target):
        if Path(target).name == "checkpoint-1":
            inside = list(Path(source).rglob("*"))
            assert {path.name for path in inside} >= {MANIFEST, "optimizer.pt", "model.safetensors", "rng_state.pth"}
            assert all(path.stat().st_ino in synced for path in [*inside, Path(source)])
            order.append("renamed")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    trainer.train()
    assert order.count("renamed") == 1
    assert tmp_path.stat().st_ino in order[order.index("renamed") :]


def test_uploads_take_the_place_where_the_files_stay(tmp_path):
    pushed = []

    class Pushing(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder):
            pushed.append((checkpoint_folder, why_not_whole(checkpoint_folder)))

    class Both(WholeCheckpoints, Pushing):
        pass

    trainer = tiny_trainer(tmp_path, kind=Both, max_steps=4)
    trainer.args.push_to_hub, trainer.push_in_progress = True, None
    trainer.train()
    assert pushed == [(str(tmp_path / f"checkpoint-{step}"), None) for step in (2, 4)]


def test_leftovers_go_when_a_training_begins(tmp_path):
    altered(checkpoint(tmp_path / ".saving", 2) / "trainer_state.json", b"torn")
    (tmp_path / ".saving" / "checkpoint-2" / "foreign.bin").write_bytes(b"of the killed run")
    tiny_trainer(tmp_path, max_steps=2).train()
    assert not (tmp_path / "checkpoint-2" / "foreign.bin").exists()
    assert not (tmp_path / ".saving").exists()


# ---- resuming ----

RUNS = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 3},
    "lora": {"lora": True},
    "table": {"table": True, "packed": True},
    "by length": {"train_sampling_strategy": "group_by_length", "table": True},
    "evaluated": {"evaluated": True, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True},
    "epochs": {"evaluated": True, "eval_strategy": "epoch", "save_strategy": "epoch"},
}


@pytest.mark.parametrize("run", RUNS)
def test_a_resumed_training_is_the_same_bit_for_bit(tmp_path, run):
    reference = tiny_trainer(tmp_path / "whole", **RUNS[run])
    reference.train()
    # Between two logs: in the first epoch, and after its end.
    for at in (5, 11):
        folder = tmp_path / f"crash-{at}"
        crashing = tiny_trainer(folder, callbacks=[Recorder(at, crash)], **RUNS[run])
        with pytest.raises(CrashError):
            crashing.train()
        trainer = tiny_trainer(folder, **RUNS[run])
        trainer.train(resume_from_checkpoint=True if newest_whole_checkpoint(folder) else None)
        assert losses(trainer) == losses(reference)
        assert same_weights(weights(trainer), weights(reference))


def test_resume_is_of_the_newest_whole_one(tmp_path, caplog):
    reference = tiny_trainer(tmp_path / "whole")
    reference.train()
    tiny_trainer(tmp_path / "cut", max_steps=12, callbacks=[]).train()
    for step in (12, 10, 8):
        path = tmp_path / "cut" / f"checkpoint-{step}" / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-5])
    trainer = tiny_trainer(tmp_path / "cut")
    trainer.train(resume_from_checkpoint=True)
    assert caplog.text.count("passed over: optimizer.pt has") == 3
    assert losses(trainer) == losses(reference)
    assert same_weights(weights(trainer), weights(reference))
    # The torn ones were saved again, in their places.
    assert newest_whole_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-12"
    assert why_not_whole(tmp_path / "cut" / "checkpoint-8") is None


def test_nothing_whole_to_resume_from(tmp_path):
    with pytest.raises(BackboneError, match="no whole checkpoint"):
        tiny_trainer(tmp_path).train(resume_from_checkpoint=True)


def test_the_mean_loss_of_a_start_is_of_its_own_steps(tmp_path):
    each = tiny_trainer(tmp_path / "each", logging_steps=1)
    each.train()
    with pytest.raises(CrashError):
        tiny_trainer(tmp_path / "cut", callbacks=[Recorder(9, crash)]).train()
    found = tiny_trainer(tmp_path / "cut").train(resume_from_checkpoint=True)
    own = [entry["loss"] for entry in losses(each) if entry["step"] > 8]
    assert found.training_loss == pytest.approx(np.mean(own), rel=1e-6)


def test_the_seconds_of_a_training_are_those_of_all_its_starts(tmp_path, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(checkpoints, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            now[0] += 10.0

    with pytest.raises(CrashError):
        tiny_trainer(tmp_path, callbacks=[Clock(), Recorder(9, crash)]).train()
    assert seconds_of(newest_whole_checkpoint(tmp_path)) == 80.0  # the ninth step is lost, and so is its time
    now[0] = 5000.0
    trainer = tiny_trainer(tmp_path, callbacks=[Clock()])
    assert trainer.fit_seconds == 0.0
    trainer.train(resume_from_checkpoint=True)
    now[0] += 700.0
    assert trainer.fit_seconds == 120.0
    trainer.train()
    assert trainer.fit_seconds == 120.0  # of a training from its beginning, not of two

    class Ending(KeptPatience, WholeTrainer):
        """As the library's own, it takes no step more when it had ended."""

    ended = tiny_trainer(tmp_path, kind=Ending, callbacks=[Clock()])
    ended.train(resume_from_checkpoint=True)
    assert ended.fit_seconds == 120.0
    (tmp_path / "checkpoint-12" / "running_loss_0.json").unlink()
    assert seconds_of(tmp_path / "checkpoint-12") == 0.0


def test_a_loss_that_is_not_finite_is_carried_on(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=1, save_steps=1)
    trainer.train()
    trainer._tr_loss = torch.tensor(float("nan"))
    trainer._save_rng_state(str(tmp_path))
    text = (tmp_path / "running_loss_0.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["loss"] == "nan"
    trainer._tr_loss = torch.tensor(0.0)
    trainer._load_rng_state(str(tmp_path))
    assert trainer._tr_loss.isnan()


# ---- a full disk ----


@pytest.fixture
def small_disk(tmp_path):
    """A function of a size in KiB that mounts a disk of that size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this system mounts no tmpfs for us")
        mounted.append(folder)
        return folder

    yield mount
    for path in mounted:  # lazily: a failed save of torch may still hold its file
        subprocess.run(["umount", "-l", str(path)], check=True)


def kib(folder):
    """What a folder's files take of a tmpfs, in KiB, by pages of 4."""
    return sum(-(-path.stat().st_size // 4096) * 4 for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("part", [0.02, 0.2, 0.6, 0.9, 0.995])
def test_a_full_disk_ends_the_training_and_leaves_the_older_ones(tmp_path, small_disk, part):
    options = {"width": 64, "max_steps": 8, "save_steps": 2}
    reference = tiny_trainer(tmp_path / "room", **options)
    reference.train()
    each = kib(tmp_path / "room" / "checkpoint-2")
    folder = small_disk(int(each * (2 + part)))
    trainer = tiny_trainer(folder, **options)
    with pytest.raises(BackboneError) as caught:
        trainer.train()
    message = str(caught.value)
    assert message.startswith(f"checkpoint-6 could not be written to {folder}: ")
    assert "MB are free there" in message
    assert "continues from checkpoint-4" in message
    assert trainer.state.global_step == 6
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert [why_not_whole(folder / f"checkpoint-{step}") for step in (2, 4)] == [None, None]
    # With room again, it goes on as if nothing had been.
    shutil.rmtree(folder / "checkpoint-2")
    again = tiny_trainer(folder, **(options | {"save_total_limit": 1}))
    again.train(resume_from_checkpoint=True)
    assert same_weights(weights(again), weights(reference))


def train_with_short_files(folder, limit, result):
    quiet = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # where they go may be a file, too
        os.dup2(quiet, descriptor)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        tiny_trainer(folder, width=64).train()
    except BackboneError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        Path(result).write_text(str(error))


@pytest.mark.parametrize("limit", [500, 20_000, 300_000])
def test_a_file_that_cannot_be_written_to_its_end(tmp_path, limit):
    """As on a full disk, where none can be mounted: JSON's, safetensors' and torch's writers each fail."""
    assert finish([start(train_with_short_files, tmp_path / "run", limit, tmp_path / "said")]) == [0]
    message = (tmp_path / "said").read_text()
    assert message.startswith("checkpoint-2 could not be written")
    assert "begins anew" in message
    assert list((tmp_path / "run").iterdir()) == []


def test_an_error_that_is_not_the_disks_stays_what_it_is(tmp_path):
    class Broken(WholeTrainer):
        def _save_scaler(self, output_dir):
            raise TypeError("of the program")

    with pytest.raises(TypeError, match="of the program"):
        tiny_trainer(tmp_path, kind=Broken).train()
    assert list(tmp_path.iterdir()) == []


# ---- several processes ----


class FailsOnOne(WholeTrainer):
    """The second process cannot write its part of checkpoint-4."""

    def _save_rng_state(self, output_dir):
        if self.args.process_index == 1 and self.state.global_step == 4:
            raise OSError(28, "No space left on device")
        super()._save_rng_state(output_dir)


def train_together(folder, result, kind=WholeTrainer):
    options = {"max_steps": 8, "save_total_limit": 1, "logging_steps": 3, "ddp_backend": "gloo"}
    rank = os.environ["RANK"]
    trainer = tiny_trainer(folder, kind=kind, **options)
    resume = checkpoint_to_resume(folder, ["run"])
    try:
        trainer.train(str(resume) if resume else None)
    except BackboneError as error:
        (Path(result) / f"error-{rank}").write_text(str(error))
        sys.exit(1)
    torch.save(weights(trainer), Path(result) / f"weights-{rank}.pt")
    (Path(result) / f"losses-{rank}.json").write_text(json.dumps([resume and resume.name, losses(trainer)]))


def test_two_processes_save_one_checkpoint(tmp_path):
    assert finish(start_ranks(train_together, [(tmp_path / "run", tmp_path)] * 2)) == [0, 0]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["checkpoint-8", "run.json"]
    assert why_not_whole(tmp_path / "run" / "checkpoint-8") is None
    manifest = json.loads((tmp_path / "run" / "checkpoint-8" / MANIFEST).read_text())
    assert manifest["processes"] == 2
    own = {"rng_state_0.pth", "rng_state_1.pth", "running_loss_0.json", "running_loss_1.json"}
    assert own <= set(manifest["files"])


def test_one_process_that_cannot_write_ends_all_and_they_continue_together(tmp_path):
    for name in ("whole", "failed"):
        (tmp_path / name).mkdir()
    processes = start_ranks(train_together, [(tmp_path / "run", tmp_path / "whole")] * 2)
    failing = start_ranks(train_together, [(tmp_path / "cut", tmp_path / "failed", FailsOnOne)] * 2)
    assert finish(failing) == [1, 1]
    for rank in (0, 1):
        message = (tmp_path / "failed" / f"error-{rank}").read_text()
        assert "checkpoint-4 could not be written" in message
        assert "No space left on device" in message
    assert sorted(path.name for path in (tmp_path / "cut").iterdir()) == ["checkpoint-2", "run.json"]
    processes += start_ranks(train_together, [(tmp_path / "cut", tmp_path / "failed")] * 2)
    assert finish(processes) == [0] * 4
    for rank in (0, 1):
        resumed, found = json.loads((tmp_path / "failed" / f"losses-{rank}.json").read_text())
        assert resumed == "checkpoint-2"
        assert [None, found] == json.loads((tmp_path / "whole" / f"losses-{rank}.json").read_text())
        first, second = (torch.load(tmp_path / name / f"weights-{rank}.pt") for name in ("failed", "whole"))
        assert same_weights(first, second)


def agree_on_one(folder, result):
    os.environ["LOCAL_RANK"] = "0"  # each is the first of its own machine
    torch.distributed.init_process_group("gloo")
    found = checkpoint_to_resume(folder, ["run"])
    Path(result).write_text(json.dumps(found and found.name))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("first", "second", "agreed"),
    [([10, 20, 30], [10, 20], 20), ([10, 30], [10, 20], 10), ([10], [20], None), ([10, 20], [10, 20], 20)],
)
def test_machines_with_folders_of_their_own_resume_from_the_same_step(tmp_path, first, second, agreed):
    arguments = []
    for number, steps in enumerate((first, second)):
        checkpoint_to_resume(tmp_path / str(number), ["run"])
        for step in steps:
            checkpoint(tmp_path / str(number), step)
        arguments.append((tmp_path / str(number), tmp_path / f"said-{number}"))
    assert finish(start_ranks(agree_on_one, arguments)) == [0, 0]
    said = {json.loads((tmp_path / f"said-{number}").read_text()) for number in (0, 1)}
    assert said == {None if agreed is None else f"checkpoint-{agreed}"}


def test_the_final_weights_open(tmp_path):
    trainer = tiny_trainer(tmp_path, max_steps=2)
    trainer.train()
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    found = weights(trainer)
    assert saved.keys() <= found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)

"""Checkpoints of a training that are whole or not there, and which of them to continue from."""

import hashlib
import json
import logging
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from llmrec.exceptions import BackboneError
from llmrec.storage import fsync, write_json
from llmrec.training.manifest import MANIFEST, why_not_whole, write_manifest
from llmrec.training.shutdown import ShutdownCallback

if TYPE_CHECKING:
    from transformers import Trainer
else:
    Trainer = object

logger = logging.getLogger(__name__)

# Where a run keeps what is being written, replaced or removed: no checkpoint-* pattern finds it.
_STAGING = ".saving"


class WholeCheckpoints(Trainer):
    """A mixin over `transformers.Trainer`: a checkpoint is whole, or it is not there.

        class MyTrainer(WholeCheckpoints, transformers.Trainer): ...

    The Trainer writes a checkpoint in place, file by file. Here it is written to a hidden folder in `output_dir`;
    after all processes have written their parts, the first one fsyncs every file, writes `manifest.json` (each file's
    size and sha256), and renames the folder to `checkpoint-N`. Only then are old checkpoints removed, by the Trainer's
    rules (`save_total_limit`; the best one stays), so for a moment the disk holds one more than the limit.

    A checkpoint that cannot be written ends the training with a `BackboneError` in every process: the next one would
    fail as well, the artefact at the end too, and until then each hour trained would be an hour to lose. The older
    checkpoints are left as they are and the torn one is removed. With FSDP or DeepSpeed a process that fails inside a
    collective save leaves the others waiting until the backend's timeout; the checkpoints before it stay whole there,
    too. `output_dir` is one folder that all processes see, or one on each machine with `save_on_each_node`.

    The mean loss that is logged continues across a restart: each process keeps its sum since the last log. So do the
    seconds of training (`fit_seconds`); what a killed training did behind its last checkpoint is not among them.
    """

    _staging: Path | None = None
    _push: bool = False
    _seconds: float = 0.0
    _begun: float | None = None

    @property
    def fit_seconds(self) -> float:
        """Seconds of training with evaluations and checkpoints: this start's, and those before what it continued."""
        return self._seconds + (0.0 if self._begun is None else time.monotonic() - self._begun)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; `resume_from_checkpoint=True` takes the newest whole checkpoint, not the newest.

        Raises:
            BackboneError: there is no whole checkpoint to resume from, or one could not be written.
        """
        folder = Path(self.args.output_dir)
        if resume_from_checkpoint is True:
            found = _newest_agreed(folder, settle=True)
            if found is None:
                raise BackboneError(f"{folder} holds no whole checkpoint to resume from. Begin anew.")
            resume_from_checkpoint = str(found)
        if self.args.should_save:
            shutil.rmtree(folder / _STAGING, ignore_errors=True)
        # Read here: of a training that had ended the Trainer reads little else.
        self._seconds = seconds_of(resume_from_checkpoint) if resume_from_checkpoint else 0.0
        self._begun = time.monotonic()
        try:
            return super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self._seconds, self._begun = self.fit_seconds, None
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, ShutdownCallback):
                    callback.restore()

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder, step, best = Path(self._get_output_dir(trial)), self.state.global_step, self.state.best_global_step
        final = folder / f"checkpoint-{step}"
        if best and (best == step or (folder / f"checkpoint-{best}").is_dir()):
            self.state.best_model_checkpoint = str(folder / f"checkpoint-{best}")
        error = None
        self._staging, self._push = folder / _STAGING, False
        staged = self._staging / final.name
        # Hidden from the Trainer, which would look for the best checkpoint in the hidden folder, and wait there for
        # processes that may have failed.
        self.state.best_global_step = None
        try:
            super()._save_checkpoint(model, trial)
        except Exception as caught:
            error = caught
        finally:
            self._staging, self.state.best_global_step = None, best
        self._agree(error, folder, step)
        try:
            if self.args.should_save:
                self.state.save_to_json(str(staged / "trainer_state.json"))
                write_manifest(staged, step, self.args.world_size, resumable=not self.args.save_only_model)
                _put_in_place(staged, final)
        except Exception as caught:
            error = caught
        self._agree(error, folder, step)
        if self.args.should_save:
            _rotate(folder, step, self.args.save_total_limit, self.state.best_model_checkpoint)
            shutil.rmtree(folder / _STAGING, ignore_errors=True)
        if self._push:
            super()._push_from_checkpoint(str(final))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # An upload runs on while training goes on: it must find its files where they stay.
        if self._staging is None:
            super()._push_from_checkpoint(checkpoint_folder)
        else:
            self._push = True

    def _agree(self, error: Exception | None, folder: Path, step: int) -> None:
        """Waits for all processes; if one could not write, removes what is there of the checkpoint and raises."""
        errors = [one for one in _gathered(None if error is None else _described(error)) if one is not None]
        if not errors:
            return
        if self.args.should_save or self.args.local_process_index == 0:
            shutil.rmtree(folder / _STAGING, ignore_errors=True)
        if error is not None and not _is_of_the_disk(error):
            raise error
        whole = _checkpoints(folder)
        then = f"training continues from {whole[-1].name}" if whole else "training begins anew, for there is none yet"
        raise BackboneError(
            f"checkpoint-{step} could not be written to {folder}: {errors[0]}; {_free(folder)} are free there without "
            "it. Training stops here, because it could not be saved from now on: make room, or keep fewer checkpoints "
            f"(--save_total_limit), and start again; {then}."
        ) from error

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        since = {"processes": self.args.world_size, "step": self._globalstep_last_logged, "seconds": self.fit_seconds}
        # In hexadecimal, exactly, and with words for what JSON has none for.
        write_json(_running(output_dir, self.args.process_index), since | {"loss": self._tr_loss.item().hex()})

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = None if checkpoint is None else _running(checkpoint, self.args.process_index)
        since = json.loads(path.read_text(encoding="utf-8")) if path is not None and path.is_file() else {}
        loss = 0.0
        if since.get("processes") == self.args.world_size:
            loss = float.fromhex(since["loss"])
            self._tr_loss += loss
            self._globalstep_last_logged = since["step"]
        # What was lost before this start is no part of this start's mean.
        losses = _gathered(loss)
        self._total_loss_scalar -= sum(losses) / len(losses)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        # A training that was stopped goes on later. The Trainer, which believes that it has ended, would load the best
        # checkpoint, and with a save_total_limit of 1 remove the one that was just saved to go on from.
        callbacks = self.callback_handler.callbacks
        stopped = any(isinstance(one, ShutdownCallback) and one.signal is not None for one in callbacks)
        best = self.state.best_model_checkpoint
        if stopped:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best


def seconds_of(checkpoint: str | Path) -> float:
    """The seconds of training up to a checkpoint; 0 of one that does not say."""
    path = _running(checkpoint, 0)
    return float(json.loads(path.read_text(encoding="utf-8")).get("seconds", 0.0)) if path.is_file() else 0.0


def checkpoint_to_resume(folder: str | Path, described: Any, fresh: bool = False) -> Path | None:
    """The checkpoint to continue from, or None to begin anew; then the folder's old checkpoints are removed.

    Every process of a distributed training calls it, and all get the same answer: where each machine has a folder of
    its own, the newest checkpoint that is whole on all of them.

    Args:
        folder: the Trainer's output folder.
        described: what makes this run this run, JSON-ready or printable. Its hash is kept in the folder, and
            checkpoints that carry another hash belong to another run.
        fresh: begin anew whatever is there.

    Raises:
        BackboneError: the folder's `run.json` cannot be read, so whose checkpoints these are is not known.
    """
    folder = Path(folder)
    identity = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    # The first process alone, then the first of each other machine, which may or may not see the same folder.
    for turn in (_rank() == 0, _rank() != 0 and _leads()):
        if turn:
            _make_ready(folder, identity, fresh)
        _gathered(None)
    return _newest_agreed(folder, settle=False)


def newest_whole_checkpoint(folder: str | Path, below: int | None = None) -> Path | None:
    """The newest `checkpoint-N` in `folder` that can be resumed from, or None; says what it passes over, and why.

    With a manifest (`WholeCheckpoints` writes it), every file must have its size and sha256. Without one, of an older
    llmrec or another program, a checkpoint counts as whole if its state is valid JSON, its weights open as safetensors
    and its optimiser and scheduler are complete archives; these are looked at, not loaded.

    Args:
        below: only checkpoints of fewer steps.
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        if below is not None and _step(checkpoint) >= below:
            continue
        why = why_not_whole(checkpoint)
        if why is None:
            return checkpoint
        logger.warning("%s is passed over: %s", checkpoint, why)
    return None


def _running(checkpoint: str | Path, process: int) -> Path:
    """A process's running loss, and the seconds so far."""
    return Path(checkpoint) / f"running_loss_{process}.json"


def _put_in_place(staged: Path, final: Path) -> None:
    """Renames a whole checkpoint to its name; one that had the name is moved aside, and back if that fails."""
    replaced = staged.with_name(f"replaced-{final.name}")
    if final.exists():
        os.replace(final, replaced)
    try:
        os.replace(staged, final)
    except OSError:
        if replaced.exists():
            os.replace(replaced, final)
        raise
    fsync(final.parent)


def _settle(folder: Path) -> None:
    """Puts right what a killed run left: a checkpoint that was whole but not yet in its place is put there."""
    for staged in _checkpoints(folder / _STAGING):
        if (staged / MANIFEST).exists() and why_not_whole(staged) is None:
            _put_in_place(staged, folder / staged.name)
    shutil.rmtree(folder / _STAGING, ignore_errors=True)


def _rotate(folder: Path, step: int, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints beyond `limit`, but never the one just saved nor the best.

    Those of more steps than the one just saved are of a future that did not come (torn, or resumed from an earlier
    one), and go first.
    """
    if limit is None or limit <= 0:
        return
    found = sorted(_checkpoints(folder), key=lambda path: (_step(path) <= step, _step(path)))
    kept = {folder / f"checkpoint-{step}", *([] if best is None else [Path(best)])}
    for path in [path for path in found if path not in kept][: max(0, len(found) - limit)]:
        # Out of sight first, so that a kill leaves no half of it.
        os.replace(path, folder / _STAGING / f"removed-{path.name}")


def _make_ready(folder: Path, identity: str, fresh: bool) -> None:
    """Keeps the folder's checkpoints if they are of the run `identity`; else removes them and gives it the name."""
    run = folder / "run.json"
    try:
        same = run.is_file() and json.loads(run.read_text(encoding="utf-8"))["run"] == identity
    except (OSError, ValueError, KeyError, TypeError) as error:
        if not fresh:
            raise BackboneError(
                f"{run} cannot be read ({type(error).__name__}: {error}), so it is not known whether the checkpoints "
                "beside it are of this run. Begin anew with --fresh, or give another --output_dir."
            ) from error
        same = False
    if same and not fresh:
        _settle(folder)
        return
    shutil.rmtree(folder / _STAGING, ignore_errors=True)
    for checkpoint in _checkpoints(folder):
        logger.info("%s is of another run and is removed", checkpoint)
        shutil.rmtree(checkpoint)
    write_json(run, {"run": identity})


def _newest_agreed(folder: Path, settle: bool) -> Path | None:
    """The newest checkpoint that is whole on every machine; each machine's first process looks, all get the answer."""
    leads, below = _leads(), None
    if settle and leads:
        _settle(folder)
    while True:
        found = newest_whole_checkpoint(folder, below) if leads else None
        steps = {step for leader, step in _gathered((leads, -1 if found is None else _step(found))) if leader}
        least = min(steps)
        if len(steps) == 1 or least < 0:
            return folder / f"checkpoint-{least}" if least >= 0 else None
        below = least + 1


def _gathered(value: Any) -> list[Any]:
    """Every process's `value`, by rank; it returns when all have given theirs."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _rank() -> int:
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def _leads() -> bool:
    """Whether this is the first process of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def _checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders, ascending by N."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _described(error: Exception) -> str:
    """An error's first line; torch's own for a file that it could not write to its end says nothing."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return "a file could not be written to its end" if "inline_container" in text else text


def _is_of_the_disk(error: Exception) -> bool:
    """Whether an error came from writing: Python's, safetensors' or torch's own kind."""
    if isinstance(error, SafetensorError):
        return "os error" in str(error)
    return isinstance(error, OSError) or (
        isinstance(error, RuntimeError) and ("inline_container" in str(error) or "PytorchStreamWriter" in str(error))
    )


def _free(folder: Path) -> str:
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB"

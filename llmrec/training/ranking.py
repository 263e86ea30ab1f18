"""What fine-tuning needs beside a trainer: ranking metrics while it runs, and checkpoints that are whole."""

import hashlib
import json
import logging
import math
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrec.evaluation.metrics import ranking_metrics, ranks_of
from llmrec.storage import write_json

logger = logging.getLogger(__name__)

Recommend = Callable[[Sequence[Sequence[int]], int], Sequence[Sequence[int]]]


class RankingCallback(TrainerCallback):
    """Adds HR@10 and NDCG@10 of held-out users to every evaluation of a transformers Trainer.

    The metrics are written into the evaluation's own dictionary as `eval_HR@10` and `eval_NDCG@10`, so the Trainer can
    choose its best checkpoint and stop early by them. Every process ranks all users: the numbers agree everywhere.
    """

    def __init__(
        self,
        recommend: Callable[[Any], Recommend],
        histories: Sequence[npt.NDArray[np.integer]],
        targets: npt.NDArray[np.integer],
        k: int = 10,
    ) -> None:
        """
        Args:
            recommend: model -> (histories, k) -> catalog rows per history, best first.
            histories: catalog rows of the users that are ranked.
            targets: (U,) the row that each of them took next.
            k: cut-off.
        """
        self._recommend = recommend
        self._histories = [history.tolist() for history in histories]
        self._targets = targets
        self._k = k

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, metrics = kwargs["model"], kwargs["metrics"]
        training = model.training
        model.eval()
        lists = self._recommend(model)(self._histories, self._k)
        model.train(training)
        found = ranking_metrics(ranks_of(lists, self._targets), ks=(self._k,))
        metrics |= {f"eval_{name}": value for name, value in found.items()}
        state.log_history.append({"step": state.global_step, "epoch": state.epoch, **metrics})
        if state.is_world_process_zero:
            shown = ", ".join(f"{name} {value:.4f}" for name, value in found.items())
            logger.info("step %d: %s on %d validation users", state.global_step, shown, len(self._targets))


def checkpoint_to_resume(folder: str | Path, described: Any, fresh: bool = False) -> Path | None:
    """The checkpoint to continue from, or None to begin anew; then the folder's old checkpoints are removed.

    Args:
        folder: the Trainer's output folder.
        described: what makes this run this run, JSON-ready or printable. Its hash is kept in the folder, and
            checkpoints that carry another hash belong to another run.
        fresh: begin anew whatever is there.
    """
    folder = Path(folder)
    run = folder / "run.json"
    identity = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()
    if run.is_file() and not fresh and json.loads(run.read_text(encoding="utf-8"))["run"] == identity:
        return newest_whole_checkpoint(folder)
    for checkpoint in _checkpoints(folder):
        logger.info("%s is of another run and is removed", checkpoint)
        shutil.rmtree(checkpoint)
    write_json(run, {"run": identity})
    return None


def newest_whole_checkpoint(folder: str | Path) -> Path | None:
    """The newest `checkpoint-N` in `folder` that can be resumed from, or None.

    The Trainer writes a checkpoint file by file; a kill in the middle leaves a torn one, from which resuming would
    crash. A checkpoint counts as whole if its state is valid JSON, its weights open as safetensors and its optimiser
    and scheduler are complete archives. The archives are looked at, not loaded.
    """
    for checkpoint in reversed(_checkpoints(Path(folder))):
        if _is_whole(checkpoint):
            return checkpoint
        logger.warning("%s is torn (a kill while it was written?) and is passed over", checkpoint)
    return None


def _checkpoints(folder: Path) -> list[Path]:
    """The `checkpoint-N` folders, ascending by N."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.glob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="numpy") as file:
                file.keys()
        archives = [checkpoint / "optimizer.pt", checkpoint / "scheduler.pt"]
        return bool(weights) and all(zipfile.is_zipfile(path) for path in archives)
    except (OSError, ValueError, SafetensorError):
        return False


def log_curve(history: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """The evaluations of a Trainer's `log_history`, one row a step: loss and ranking metrics."""
    curve: dict[int, dict[str, float]] = {}
    for entry in history:
        if "eval_loss" in entry:
            # A diverged loss is NaN, which JSON has no word for.
            finite = (name for name, value in entry.items() if isinstance(value, int | float) and math.isfinite(value))
            numbers = {name: float(entry[name]) for name in finite}
            curve.setdefault(int(entry["step"]), {}).update(numbers)
    return list(curve.values())

"""Ranking metrics of held-out users while a model is trained."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from llmrec.evaluation.metrics import ranking_metrics, ranks_of

logger = logging.getLogger(__name__)

Recommend = Callable[[Sequence[int], int], Sequence[Sequence[int]]]  # users' places, k -> catalog rows, best first

_AT_ONCE = 256  # users between two moves of the progress bar


class RankingCallback(TrainerCallback):
    """Adds HR@10 and NDCG@10 of held-out users to every evaluation of a transformers Trainer.

    The metrics are written into the evaluation's own dictionary as `eval_HR@10` and `eval_NDCG@10`, so the Trainer can
    choose its best checkpoint by them. `GenerativeTrainer` asks for them before it logs the evaluation; behind another
    Trainer, callbacks that go by them (early stopping) must come after this one.

    Several processes share the users and gather what they found: the numbers agree everywhere. If the parameters are
    sharded, every process ranks all users, because the model only computes where all processes compute.
    """

    def __init__(
        self,
        recommend: Callable[[Any], Recommend],
        targets: npt.NDArray[np.integer],
        k: int = 10,
    ) -> None:
        """
        Args:
            recommend: model -> (users, k) -> catalog rows for each of the users, best first. A user is known by the
                place in `targets`: whoever recommends holds the histories, and what else a prompt shows of them.
            targets: (U,) the row that each of them took next.
            k: cut-off.
        """
        self._recommend = recommend
        self._targets = np.asarray(targets)
        self._k = k

    def measure(self, model: Any, progress: bool = False) -> dict[str, float]:
        """`eval_HR@k` and `eval_NDCG@k` of the model as it is; every process must call it.

        Args:
            model: what `recommend` takes; computes in evaluation mode meanwhile.
            progress: shows a bar, on the main process.
        """
        training = model.training
        model.eval()
        try:
            places = self._places(model, progress)
        finally:
            model.train(training)
        return {f"eval_{name}": value for name, value in ranking_metrics(places, ks=(self._k,)).items()}

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        metrics = kwargs["metrics"]
        if f"eval_HR@{self._k}" not in metrics:
            metrics |= self.measure(kwargs["model"])
            state.log_history.append({"step": state.global_step, "epoch": state.epoch, **metrics})
        if state.is_world_process_zero:
            found = {name: metrics[f"eval_{name}@{self._k}"] for name in ("HR", "NDCG")}
            shown = ", ".join(f"{name}@{self._k} {value:.4f}" for name, value in found.items())
            logger.info("step %d: %s on %d validation users", state.global_step, shown, len(self._targets))

    def _places(self, model: Any, progress: bool) -> npt.NDArray[np.int64]:
        """The target's place (U,) in each user's list, -1 where it is absent."""
        from tqdm import tqdm

        process, processes = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            process, processes = torch.distributed.get_rank(), torch.distributed.get_world_size()
        shared = processes > 1 and not is_sharded(model)
        users = np.arange(process, len(self._targets), processes) if shared else np.arange(len(self._targets))
        recommend = self._recommend(model)
        found = np.full((2, len(self._targets)), 0, dtype=np.int64)  # places from 1, and how often each was ranked
        with tqdm(total=len(users), desc="Ranking", leave=False, disable=not progress or process > 0) as bar:
            for begin in range(0, len(users), _AT_ONCE):
                some = users[begin : begin + _AT_ONCE]
                lists = recommend(some.tolist(), self._k)
                found[0, some] = ranks_of(lists, self._targets[some]) + 1
                found[1, some] += 1
                bar.update(len(some))
        if shared:
            gathered = torch.from_numpy(found).to(next(model.parameters()).device)
            torch.distributed.all_reduce(gathered)
            found = gathered.cpu().numpy()
        if not (found[1] == 1).all():
            raise RuntimeError(f"{int((found[1] != 1).sum())} users were not ranked exactly once. Report this.")
        places: npt.NDArray[np.int64] = found[0] - 1
        return places


def is_sharded(model: Any) -> bool:
    """Whether processes hold parts of the model's parameters (FSDP, DeepSpeed ZeRO-3), so that all compute in step."""
    for parameter in model.parameters():
        placements = getattr(parameter, "placements", ())  # DTensor's
        if any(placement.is_shard() for placement in placements):
            return True
        if hasattr(parameter, "ds_status") or type(parameter).__name__ == "FlatParameter":
            return True
    return False

"""CaseScores: a sequence model's scores of all items for the cases of an evaluation, in batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.sequence.histories import History, collate, moved
from llmrec.sequence.model import SequenceModel


class CaseScores:
    """Scores histories, whose events it holds, for `llmrec.evaluation.evaluate`, which asks batch by batch, in order.

    evaluate("hstu", split, "test", scores=CaseScores(model, LoggedHistories(split, model.events).cases("test")))
    """

    def __init__(
        self, model: SequenceModel, cases: Sequence[History], batch_size: int = 256, progress: str = ""
    ) -> None:
        """
        Args:
            model: computes where it lies, in evaluation mode.
            cases: in the order in which they will be asked for.
            batch_size: histories at once.
            progress: the name of a bar; "" for none.
        """
        self.model, self.cases, self.batch_size, self.progress = model, list(cases), batch_size, progress
        self._place = 0
        self._bar: Any = None

    def __call__(self, histories: Sequence[npt.NDArray[np.integer[Any]]]) -> npt.NDArray[np.float32]:
        """(B, N) the scores of the next B cases, which must be these histories."""
        chosen = self.cases[self._place : self._place + len(histories)]
        if [len(one.rows) for one in chosen] != [len(one) for one in histories]:
            raise RuntimeError("Cases were not asked for in their order. Score them as they came.")
        if self.progress and self._bar is None:
            from tqdm.auto import tqdm

            self._bar = tqdm(total=len(self.cases), desc=self.progress, unit="case")
        self._place += len(histories)
        found = [scores.float().cpu().numpy() for scores in self.batches(chosen)]
        if self._bar is not None:
            self._bar.update(len(histories))
            if self._place == len(self.cases):
                self._bar.close()
        return np.concatenate(found) if found else np.zeros((0, self.model.num_items), dtype=np.float32)

    def batches(self, cases: Sequence[History]) -> Iterator[Tensor]:
        """Scores (b, N) of the cases, batch by batch; every item's logit in float32."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                table = self.model.table().float()
                for begin in range(0, len(cases), self.batch_size):
                    yield self.queries(cases[begin : begin + self.batch_size]).float() @ table.T
        finally:
            self.model.train(training)

    def queries(self, cases: Sequence[History]) -> Tensor:
        """(b, D) the queries of some cases."""
        batch = collate(cases, self.model.config.max_history)
        return self.model.last(**moved(batch, self.model.device))

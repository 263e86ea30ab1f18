"""The temporal slice: the validation cases that a training after SFT is watched on, and where their targets stand."""

import logging
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.data.split import Split
from llmrec.exceptions import DataError
from llmrec.training.ranking import RankingCallback

logger = logging.getLogger(__name__)

Places = npt.NDArray[np.int64]

DEPTH = 50  # of the lists: what candidates a later stage would get


def temporal_slice(split: Split, size: int, seed: int = 0) -> Places:
    """Validation cases, ascending: those whose targets are the latest of all users'.

    What comes last is the nearest that validation has to what a recommender is asked after its training. Of targets at
    one time those of later cases are taken. Without a clock times of different users cannot be compared, and cases are
    drawn with the seed instead; that is logged. Cases that the headline figure leaves out are no part of it.

    Args:
        split: whose validation part is taken.
        size: the most cases; 0 for all.
        seed: of the draw.

    Raises:
        DataError: if the size is negative, or there is no case.
    """
    if size < 0:
        raise DataError(f"The slice's size is {size}. Give 1 or more, or 0 for all cases.")
    cases = np.flatnonzero(split.headline("valid"))
    if not len(cases):
        raise DataError(
            "There is no validation case to watch the training on. Leave-one-out needs a user of three interactions: "
            "one to train on, one to validate, one to test."
        )
    if not size or size >= len(cases):
        return cases
    if split.timestamps is None or not split.clock:
        logger.info(
            "the interactions have no clock: the validation cases are drawn with seed %d, not the latest", seed
        )
        return np.sort(np.random.default_rng(seed).permutation(cases)[:size])
    times = split.timestamps[split.positions["valid"][cases]]
    order = np.argsort(np.where(np.isnan(times), -np.inf, times), kind="stable")
    latest: Places = np.sort(cases[order[-size:]])
    return latest


class SliceRanking(RankingCallback):
    """Where the targets of the slice's cases stand with a model as it is; the processes share the cases.

    It is asked, and no Trainer's callback: a training after SFT is not evaluated by its loss.
    """

    def places(self, model: Any, progress: bool = False) -> Places:
        """(U,) the target's place in each list, from 0; -1 where it is absent. Every process must call it.

        Args:
            model: what `recommend` takes; computes in evaluation mode meanwhile.
            progress: shows a bar, on the main process.
        """
        training = model.training
        model.eval()
        try:
            return self._places(model, progress)
        finally:
            model.train(training)

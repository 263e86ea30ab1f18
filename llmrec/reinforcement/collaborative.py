"""The collaborative reward: what another recommender, which knows items by who took them, thinks of a rollout."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import BackboneError, RecipeError
from llmrec.reinforcement.cases import RolloutCases, Rows

if TYPE_CHECKING:
    from llmrec.data.split import Split
    from llmrec.evaluation.baselines import ItemCF
    from llmrec.sequence.recommender import SequenceRecommender

# Cases (B,) -> (B, N), a score for every item of the catalog after each one's history.
Scores = Callable[[RolloutCases, Rows], npt.NDArray[np.floating]]

_CELLS = 1 << 22  # scores that are held at once


def collaborative(
    items: Rows, cases: RolloutCases, chosen: Rows, *, scores: Scores, live: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float64]:
    """The place of an item among all live ones by another recommender's scores, as a share in [0, 1].

    It is the share of the other live items that this recommender scores lower after the case's history, of which
    those with an equal score count half: 1 for its favourite, 0 for the last, 1/2 if it has nothing to say. A share
    of places, because scores of different models have different scales, and a probability would be next to nothing
    for all but a few items. Items of the history are among the others. Of a single live item it is 1.

    That recommender learnt from the same training interactions, so it has seen what followed this history: it knows
    these cases better than it will know new ones.

    Args:
        items, cases, chosen: see `llmrec.reinforcement.rewards`.
        scores: of the other recommender.
        live: (N,) which items may be recommended.

    Raises:
        BackboneError: if a score is no number.
    """
    others = int(live.sum()) - 1
    found = np.ones(items.shape)
    if others < 1:
        return found
    step = max(1, _CELLS // len(live))
    for begin in range(0, len(chosen), step):
        some = slice(begin, begin + step)
        every = scores(cases, chosen[some])
        if np.isnan(every).any():
            raise BackboneError(
                f"The collaborative reward's recommender scored {int(np.isnan(every).sum())} item(s) with what is no "
                "number. Its weights are broken: train it again."
            )
        own = np.take_along_axis(every, items[some], axis=1)
        ascending = np.sort(every[:, live], axis=1)
        for place, (line, values) in enumerate(zip(ascending, own, strict=True), start=begin):
            lower = np.searchsorted(line, values, side="left")
            equal = np.searchsorted(line, values, side="right") - lower - 1  # without the item itself
            found[place] = (lower + equal / 2) / others
    return found


def item_cf_scores(model: "ItemCF") -> Scores:
    """The scores of a fitted item-CF."""

    def scores(cases: RolloutCases, chosen: Rows) -> npt.NDArray[np.floating]:
        return model.scores([cases.histories[case] for case in chosen.tolist()])

    return scores


def sequence_scores(recommender: "SequenceRecommender", split: "Split | None" = None) -> Scores:
    """The logits of a sequence model, which is told of a case what an evaluation tells: all but the item.

    Args:
        recommender: its artefact; its items' vectors are computed once.
        split: of the cases, for the times, actions and domains of their histories; without it they are unknown.

    Raises:
        RecipeError: when asked about cases that are of no split, though one was given.
    """
    import torch

    from llmrec.sequence.histories import History, LoggedHistories
    from llmrec.sequence.recommender import queries_of

    logged = None if split is None else LoggedHistories(split, recommender.model.events)

    def history(cases: RolloutCases, case: int) -> History:
        if logged is None:
            return History(cases.histories[case])
        if cases.places is None:
            raise RecipeError(
                "These cases do not say where in the split they lie, so their times are not known. Draw them with "
                "RolloutCases.of, or score without the split."
            )
        place = int(cases.places[case])
        return logged.before(place - len(cases.histories[case]), place)

    def scores(cases: RolloutCases, chosen: Rows) -> npt.NDArray[np.floating]:
        queries = queries_of(recommender.model, [history(cases, case) for case in chosen.tolist()])
        with torch.inference_mode():
            logits: npt.NDArray[np.floating] = recommender.index.logits(queries, slice(None)).cpu().numpy()
        return logits

    return scores

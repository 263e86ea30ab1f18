"""Rewards of rollouts, as plain functions of items and cases; their names, weights, and what each needs.

A reward takes a batch of groups, `items` (B, G): catalog rows, the best or first drawn of a group first; the `cases`;
and `chosen` (B,), which case each group answers. It gives (B, G) float64. What is computed once and for all (codes,
embeddings, another recommender) is bound by `build_rewards`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import RecipeError
from llmrec.reinforcement.cases import RolloutCases, Rows
from llmrec.reinforcement.similarity import code_lengths, diversity, prefix, semantic

if TYPE_CHECKING:
    from llmrec.tasks.task_data import TaskData

Reward = Callable[[Rows, RolloutCases, Rows], npt.NDArray[np.float64]]

NAMES = ("exact", "rank", "prefix", "semantic", "collaborative", "diversity", "later")
ITEM_CF = "item-cf"  # where an artefact's folder may stand: item-CF, fitted on the training part


@dataclass(frozen=True)
class NamedReward:
    """A reward, and how much it counts.

    Attributes:
        name: one of `NAMES`, by which it is logged.
        weight: 0 or more; one of weight 0 is logged, and nothing learns from it.
        function: (items, cases, chosen) -> (B, G).
    """

    name: str
    weight: float
    function: Reward


def exact(items: Rows, cases: RolloutCases, chosen: Rows) -> npt.NDArray[np.float64]:
    """1 for the target, 0 for any other item.

    >>> two = RolloutCases([[0], [0]], [np.array([4])] * 2, np.array([7, 8]), [np.array([7]), np.array([8])], [0, 1])
    >>> exact(np.array([[8, 7], [3, 5]]), two, np.array([0, 1])).tolist()
    [[0.0, 1.0], [0.0, 0.0]]
    """
    return np.asarray(items == cases.targets[chosen][:, None], dtype=np.float64)


def rank(items: Rows, cases: RolloutCases, chosen: Rows) -> npt.NDArray[np.float64]:
    """The rank-aware penalty: what stands high without being the target costs more (MiniOneRec, arXiv 2510.24431).

    With g = 0, 1, … the place in the group and w_g = 1 / log2(g + 2), an item gets

        -w_g / Σ_j w_j   (the sum over all G places, the target's among them)

    if its group holds the target and it is another item; 0 if it is the target, or if the group does not hold it,
    because then all its items are equally wrong. A group's penalties sum to more than -1, because the target's own
    place is not paid for. Of beams the place is the rank by probability, of samples the order of the draw.

    >>> one = RolloutCases([[0]], [np.array([4])], np.array([7]), [np.array([7])], np.array([0]))
    >>> [round(value, 4) for value in rank(np.array([[8, 7, 9]]), one, np.array([0]))[0].tolist()]
    [-0.4693, 0.0, -0.2346]
    """
    hits = items == cases.targets[chosen][:, None]
    weights = 1.0 / np.log2(np.arange(items.shape[1]) + 2.0)
    lost = np.where(hits, 0.0, -weights / weights.sum())
    return np.where(hits.any(axis=1, keepdims=True), lost, 0.0)


def later(items: Rows, cases: RolloutCases, chosen: Rows) -> npt.NDArray[np.float64]:
    """1 / log2(2 + d) for what the user took d items after the target: 1 for the target itself, 0 for all else.

    What was taken several times counts for the first. How far it looks is `later_items` of `RolloutCases.of`.

    >>> one = RolloutCases([[0]], [np.array([4])], np.array([7]), [np.array([7, 3, 9, 3])], np.array([0]))
    >>> [round(value, 4) for value in later(np.array([[9, 3, 7, 1]]), one, np.array([0]))[0].tolist()]
    [0.5, 0.6309, 1.0, 0.0]
    """
    found = np.zeros(items.shape)
    for place, case in enumerate(chosen.tolist()):
        taken = cases.later[case]
        gains = 1.0 / np.log2(np.arange(len(taken)) + 2.0)
        # Item by item and step by step; of several steps the first has the largest gain.
        found[place] = ((items[place][:, None] == taken) * gains).max(axis=1, initial=0.0)
    return found


def parse_weights(texts: Sequence[str]) -> dict[str, float]:
    """Reads one `NAME` or `NAME=WEIGHT` per text; without a weight it is 1.

    Raises:
        RecipeError: if a name is unknown or comes twice, a weight is no finite number of 0 or more, or none is above
            0.

    >>> parse_weights(["exact", "rank=0.5"])
    {'exact': 1.0, 'rank': 0.5}
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in str(text).partition("="))
        if name not in NAMES:
            raise RecipeError(f"There is no reward {name!r}. Name one of: {', '.join(NAMES)}.")
        if name in weights:
            raise RecipeError(f"The reward {name!r} is named twice. Give it one weight.")
        try:
            weights[name] = float(value) if equals else 1.0
        except ValueError as error:
            raise RecipeError(f"The weight {value!r} of {name!r} is no number. Write {name}=0.5, say.") from error
    check_weights(weights)
    return weights


def check_weights(weights: Mapping[str, float]) -> None:
    """Raises RecipeError for unknown names, a weight that is no finite number of 0 or more, or none above 0."""
    for name, weight in weights.items():
        if name not in NAMES:
            raise RecipeError(f"There is no reward {name!r}. Name one of: {', '.join(NAMES)}.")
        if not (math.isfinite(weight) and weight >= 0):
            raise RecipeError(f"The weight of the reward {name!r} is {weight}. Give a finite number of 0 or more.")
    if not any(weights.values()):
        raise RecipeError(
            f"No reward has a weight above 0 (given: {', '.join(weights) or 'none'}), so there would be nothing to "
            "learn. Give at least one, such as exact=1.0."
        )


def build_rewards(
    weights: Mapping[str, float],
    held: "TaskData",
    embeddings: str | Path | npt.NDArray[np.floating] | None = None,
    collaborative: str | Path | None = None,
    split_hash: str | None = None,
) -> list[NamedReward]:
    """The rewards of these names, in this order, with what each needs.

    `exact`, `rank` and `later` need nothing, `prefix` and `diversity` the catalog's codes, `semantic` embeddings,
    `collaborative` another recommender.

    Args:
        weights: by name, as `parse_weights` reads them.
        held: catalog and split.
        embeddings: for `semantic`: a folder that semantic_ids/embed.py wrote, or a matrix (N, E) by catalog row.
        collaborative: for `collaborative`: a sequence model's artefact that train/seqrec.py wrote, or "item-cf".
        split_hash: of the split that this artefact has to be of; default: that of `held`. It differs where only a
            share of the users is learnt from.

    Raises:
        RecipeError: if the weights are none (`check_weights`), something is missing, or the sequence model is of
            other items, or of another split, whose training may hold what is tested here.
        ArtefactError, DataError: if a folder cannot be read, or items have no embedding.
    """
    check_weights(weights)
    made: list[NamedReward] = []
    for name, weight in weights.items():
        function: Reward
        if name == "prefix":
            function = partial(prefix, codes=held.catalog.codes, lengths=code_lengths(held.catalog))
        elif name == "diversity":
            function = partial(diversity, codes=held.catalog.codes)
        elif name == "semantic":
            function = partial(semantic, vectors=_vectors(held, embeddings))
        elif name == "collaborative":
            function = _collaborative(held, collaborative, split_hash or held.split.content_hash)
        else:
            function = {"exact": exact, "rank": rank, "later": later}[name]
        made.append(NamedReward(name, float(weight), function))
    return made


def _vectors(held: "TaskData", embeddings: str | Path | npt.NDArray[np.floating] | None) -> npt.NDArray[np.floating]:
    from llmrec.embedding.store import EmbeddingStore

    if embeddings is None:
        raise RecipeError(
            "The reward 'semantic' compares items' embeddings, and there are none. Name the folder that "
            "semantic_ids/embed.py wrote, or leave the reward out."
        )
    ids = held.catalog.ids
    if isinstance(embeddings, str | Path):
        return EmbeddingStore.load(embeddings).aligned(ids).embeddings
    return EmbeddingStore(ids, embeddings).embeddings


def _collaborative(held: "TaskData", source: str | Path | None, split_hash: str) -> Reward:
    from llmrec.evaluation.baselines import ItemCF
    from llmrec.reinforcement.collaborative import collaborative, item_cf_scores, sequence_scores

    if source is None:
        raise RecipeError(
            "The reward 'collaborative' asks another recommender, and none is named. Name a sequence model's artefact "
            f"that train/seqrec.py wrote, or {ITEM_CF!r}; or leave the reward out."
        )
    if str(source) == ITEM_CF:
        scores = item_cf_scores(ItemCF().fit(held.split.train, held.split.num_items))
    else:
        from llmrec.sequence.recommender import SequenceRecommender

        recommender = SequenceRecommender.from_pretrained(source)
        if recommender.catalog.ids != held.catalog.ids:
            raise RecipeError(
                f"The sequence model in {source} knows {len(recommender.catalog)} items, which are not the "
                f"{len(held.catalog)} of this catalog, or in another order. Train it on the same item table."
            )
        if recommender.settings.split not in ("", split_hash):
            raise RecipeError(
                f"The sequence model in {source} was trained on the split {recommender.settings.split[:12]}, and this "
                f"is {split_hash[:12]}: it may know what is tested here. Train it on the same split."
            )
        scores = sequence_scores(recommender, held.split)
    return partial(collaborative, scores=scores, live=~held.catalog.retired)

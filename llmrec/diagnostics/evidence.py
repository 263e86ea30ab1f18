"""Evidence: what a log and the items' texts say of items, by which their codes are judged."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from llmrec.data.split import Split
from llmrec.diagnostics.identifiers import SemanticIDs
from llmrec.diagnostics.neighbours import co_sold, nearest_texts
from llmrec.exceptions import DataError

Places = npt.NDArray[np.int64]
Score = Callable[[Sequence[npt.NDArray[np.integer]]], npt.NDArray[np.floating]]

NEIGHBOURS = 10
WINDOW = 5
CASES = 500  # test cases on which beams are tried: the standard error of what they keep is below 0.02 then
# All items are asked for their nearest texts up to the first number, beyond it a sample of the second.
ALL_QUERIES, SAMPLED_QUERIES = 20_000, 5_000


@dataclass(frozen=True)
class Evidence:
    """What is known of the items beside their codes, in rows of the semantic IDs.

    Attributes:
        co_sold: (N, k) the items that each is sold with, -1 padding; or None.
        texts: rows (M,) and their nearest texts (M, k); or None.
        targets: (C,) what the ceiling is taken over.
        seen: (C) what each target's user had before it, which is no candidate; or None.
        histories: of the cases on which beams are tried.
        score: the reference recommender, histories (B) -> (B, N); or None.
    """

    co_sold: Places | None
    texts: tuple[Places, Places] | None
    targets: Places
    seen: list[Places] | None
    histories: list[Places]
    score: Score | None

    @classmethod
    def gather(
        cls, ids: SemanticIDs, split: Split | None, texts: npt.NDArray[np.floating] | None, seed: int
    ) -> tuple[Self, int]:
        """What the log and the texts say, and how many test targets have no semantic ID.

        Args:
            ids: the semantic IDs, N items.
            split: of a log of these items, which may hold others; items are matched by id.
            texts: (N, D) embeddings of the items' texts.
            seed: of the samples of texts and of test cases.

        Raises:
            DataError: if the split and the semantic IDs share no item.
        """
        near: tuple[Places, Places] | None = None
        if texts is not None and len(texts) > 1:
            sample = None if len(texts) <= ALL_QUERIES else SAMPLED_QUERIES
            near = nearest_texts(texts, NEIGHBOURS, sample, seed)
        everything = np.arange(len(ids))
        if split is None:
            return cls(None, near, everything, None, [], None), 0
        mine = ids.rows_of(split.item_ids)  # rows of the split -> rows here, -1 for those without an ID
        known = np.flatnonzero(mine >= 0)
        if not len(known):
            raise DataError(
                f"None of the {split.num_items} items of the log has a semantic ID here. "
                "Give the log that the semantic IDs belong to, and name its column of item ids."
            )
        sold = np.full((len(ids), NEIGHBOURS), -1, dtype=np.int64)
        partners = co_sold(split.train, split.num_items, NEIGHBOURS, WINDOW)
        sold[mine[known]] = np.append(mine, -1)[partners[known]]
        targets = mine[split.targets("test")]
        reachable = np.flatnonzero(targets >= 0).tolist()
        histories = split.histories("test")
        chosen = np.sort(np.random.default_rng(seed).permutation(len(histories))[:CASES])
        mapped = [_there(mine[histories[case]]) for case in chosen.tolist()]
        asked = [history for history in mapped if len(history)]
        score = _reference(split, mine, len(ids)) if asked else None
        if len(targets):
            seen = [_there(mine[histories[case]]) for case in reachable]
            evidence = cls(sold, near, targets[reachable], seen, asked, score)
        else:
            evidence = cls(sold, near, everything, None, asked, score)
        return evidence, len(targets) - len(reachable)

    def of(self, rows: Places, items: int) -> Self:
        """The same for the catalog of `rows` alone, out of N `items`."""
        place = np.full(items + 1, -1, dtype=np.int64)  # the last one is for the padding
        place[rows] = np.arange(len(rows))
        texts = None
        if self.texts is not None:
            queried = place[self.texts[0]] >= 0
            texts = place[self.texts[0][queried]], place[self.texts[1][queried]]
        targets = place[self.targets]
        seen = None
        if self.seen is not None:
            seen = [_there(place[self.seen[case]]) for case in np.flatnonzero(targets >= 0).tolist()]
        return type(self)(
            co_sold=None if self.co_sold is None else place[self.co_sold[rows]],
            texts=texts,
            targets=_there(targets),
            seen=seen,
            histories=[_there(place[history]) for history in self.histories],
            score=None if self.score is None else _restricted(self.score, rows),
        )


def _there(rows: Places) -> Places:
    """Without the -1 of what has no row."""
    return rows[rows >= 0]


def _restricted(score: Score, rows: Places) -> Score:
    """The same reference for the catalog of `rows` alone."""
    return lambda histories: score([rows[history] for history in histories])[:, rows]


def _reference(split: Split, mine: Places, items: int) -> Score:
    """Item-CF on the training histories, as a function of histories in rows of the semantic IDs."""
    from llmrec.evaluation.baselines import ItemCF

    model = ItemCF().fit(split.train, split.num_items)
    known = np.flatnonzero(mine >= 0)
    theirs = np.full(items, -1, dtype=np.int64)
    theirs[mine[known]] = known

    def score(histories: Sequence[npt.NDArray[np.integer]]) -> npt.NDArray[np.floating]:
        scores = np.zeros((len(histories), items))
        scores[:, mine[known]] = model.scores([theirs[history] for history in histories])[:, known]
        return scores

    return score

"""CTRTask: labelled rows, divided into training, choice and test, as the data sets of a ranking model."""

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from llmrec.ctr.arguments import CTRDataArguments
from llmrec.ctr.dataset import Cases, Windows
from llmrec.ctr.histories import Histories
from llmrec.ctr.items import CandidateItems
from llmrec.ctr.negatives import draw_negatives, thin_negatives
from llmrec.ctr.rows import LabelledRows, Numbers
from llmrec.exceptions import DataError

if TYPE_CHECKING:
    from llmrec.representations.item_features import ItemFeatures
    from llmrec.sequence.arguments import ItemArguments

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CTRTask:
    """What a ranking model learns from and is measured on.

    Attributes:
        rows: all, drawn negatives included.
        histories: of all rows.
        items: what the model has rows for.
        features: what its representation is made of, row by row.
        catalogue: (number of `rows.item_ids`,) each item's row in the model.
        train, dev, test: places in `rows`.
        weights: (I,) what each row counts in training.
    """

    rows: LabelledRows
    histories: Histories
    items: CandidateItems
    features: "ItemFeatures"
    catalogue: Numbers = field(repr=False)
    train: Numbers = field(repr=False)
    dev: Numbers = field(repr=False)
    test: Numbers = field(repr=False)
    weights: npt.NDArray[np.float32] = field(repr=False)

    @classmethod
    def make(cls, data: CTRDataArguments, items: "ItemArguments", seed: int) -> Self:
        """Reads and divides the rows.

        Args:
            data: where and how.
            items: what the items are represented by.
            seed: of negatives that are dropped or drawn.

        Raises:
            DataError: if the files cannot be read, or a part has no row of a label.
        """
        rows = data.read()
        histories = Histories.of(rows, data.history, data.simultaneous)
        if data.drawn_negatives:
            rows, histories = draw_negatives(rows, histories, data.drawn_negatives, seed)
        labelled = (rows.labels >= 0).any(axis=1)
        train, test = (np.flatnonzero(labelled & (rows.part == part)) for part in (0, 1))
        late = rows.latest(data.dev_share, train) if data.dev_share else np.zeros(len(train), dtype=np.bool_)
        train, dev = train[~late], train[late]
        if not len(train) or not len(test):
            raise DataError(
                f"{len(train)} training rows and {len(test)} test rows have a label. Give at least one of each."
            )
        known = CandidateItems.of_training(rows, train, data.min_count)
        if items.representation not in ("ids", "hashed"):
            # What an item is made of is known before anyone has seen it.
            known = CandidateItems(rows.item_ids)
        weights = thin_negatives(rows, train, data.negative_share, data.reweigh_negatives, seed)
        task = cls(
            rows=rows,
            histories=histories,
            items=known,
            features=features_of(known, items, {rows.item_ids[item] for item in np.unique(rows.items[train])}),
            catalogue=known.rows(rows.item_ids),
            train=train,
            dev=dev,
            test=test,
            weights=weights,
        )
        unknown = int((task.catalogue[rows.items[test]] == 0).sum())
        logger.info(
            "%s rows to train on, %s to choose by, %s to report on (%d of them on items the model does not know)",
            *(f"{len(part):,}" for part in (train, dev, test)),
            unknown,
        )
        return task

    def cases(self, chosen: Numbers, max_history: int, weighted: bool = False) -> Cases:
        """Rows as cases; `weighted` leaves out those that count nothing in training."""
        kept = chosen[self.weights[chosen] > 0] if weighted else chosen
        weights = self.weights if weighted else None
        return Cases(self.rows, self.histories, self.catalogue, kept, max_history, weights)

    def windows(self, max_history: int) -> Windows:
        """The training rows as whole histories."""
        return Windows(self.rows, self.catalogue, self.train, max_history, self.weights)


def features_of(known: CandidateItems, items: "ItemArguments", trained: set[str]) -> "ItemFeatures":
    """What the representation of known items is made of; the unknown item, row 0, is what no item is.

    Its text is the mean of all texts, and its semantic ID consists of codes that no item has.

    Args:
        known: the items.
        items: the flags.
        trained: ids that training rows are about.

    Raises:
        DataError: if an item has no embedding.
        CatalogError: if an item has no code.
    """
    from llmrec.representations.item_features import ItemFeatures

    ids = list(known.ids)
    vectors = codes = None
    if items.item_embeddings is not None:
        from llmrec.embedding.store import EmbeddingStore

        own = EmbeddingStore.load(items.item_embeddings).rows(ids)
        vectors = np.concatenate([own.mean(axis=0, dtype=np.float64, keepdims=True).astype(np.float32), own])
    if items.semantic_ids is not None:
        from llmrec.catalog import Catalog

        catalog = Catalog.from_build(items.semantic_ids)
        found = np.asarray(catalog.codes[catalog.rows(ids)], dtype=np.int64)
        codes = np.concatenate([found.max(axis=0, keepdims=True) + 1, found])
    seen = np.array([False, *(item in trained for item in ids)])
    return ItemFeatures(["", *ids], vectors, codes, seen)

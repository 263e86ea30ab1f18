"""SequenceRecommender: a sequence model's artefact (model, catalog, settings) that answers histories with items."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from llmrec import __version__, artefact
from llmrec.artefact_parts import SETTINGS_FILE, Settings, is_sequence, read_settings
from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_versions import CatalogVersions, refuse_to_replace
from llmrec.exceptions import ArtefactError, BackboneError, RequestError
from llmrec.recommendation import Selection
from llmrec.recommender import Recommender
from llmrec.selection import require_levels
from llmrec.sequence.histories import History, collate, moved
from llmrec.sequence.history_encoder import HistoryEncoder, history_of
from llmrec.sequence.index import ItemIndex, ItemPool, Retrieval, Wanted, open_index
from llmrec.sequence.new_items import Features, model_of, with_new_items
from llmrec.service.filters import Rows
from llmrec.storage import atomic_folder, write_json

if TYPE_CHECKING:
    from llmrec.sequence.model import SequenceModel

_BATCH = 256  # histories that the model reads at once


class SequenceRecommender(Recommender):
    """Recommends the next items of a history with a sequence model: every item of the catalog is looked at.

    It has the methods of `Recommender`. Scores are exact log-probabilities, over all rows of the catalog, the retired
    ones among them ("vocabulary"), or over the items that may come back ("legal"); beams have no meaning, and every
    search is exhaustive, unless `retrieval` is faiss's. What is asked for may be described by `target`, an event of
    which some attributes are given: `recommend(["a"], target={"action": "buy", "timestamp": 1.7e9})`;
    `recommend_rows` takes one per history.

    Items' vectors are computed once, at the first search: after training on, make a new recommender.
    """

    model: "SequenceModel"

    def __init__(
        self,
        model: "SequenceModel",
        catalog: Catalog,
        settings: Settings | None = None,
        retrieval: Retrieval = "exact",
    ) -> None:
        """
        Args:
            model: in evaluation mode.
            catalog: of rows (`Catalog.of_rows`): the model's items in their order, and others behind them only if
                the catalog has their features.
            settings: default: the model's own longest history.
            retrieval: how items are found.

        Raises:
            CatalogError: if the catalog is not the model's.
            RequestError: if the settings' histories are longer than the model's, or there is no such retrieval.
        """
        longest = int(model.config.max_history)
        self.model = model_of(model, catalog)
        self.catalog = catalog
        self.settings = settings or Settings(max_history=longest, num_beams=1)
        if self.settings.max_history > longest:
            raise RequestError(
                f"Histories of {self.settings.max_history} items are asked for, and the model reads {longest}. "
                "Set max_history to what it was trained with."
            )
        self.retrieval = retrieval
        self.encoder = HistoryEncoder(catalog, self.settings, model.events)
        self.item_tokenizer = None
        live = torch.from_numpy(~catalog.retired).to(self.model.device)
        self._trie = ItemPool(live)  # type: ignore[assignment]  # of which, too, a part can be had

    @cached_property
    def index(self) -> ItemIndex:
        """Its items' vectors, ready to be searched."""
        with torch.inference_mode():
            return open_index(self.model.table(), self.retrieval)

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype = "auto",
        catalog_version: str | None = None,
        retrieval: Retrieval = "exact",
    ) -> Self:
        """Loads an artefact, as `Recommender.from_pretrained`.

        Raises:
            ArtefactError: also if it is a language model's.
        """
        folder = artefact.resolve(str(path_or_repo_id), revision)
        if not is_sequence(folder):
            raise ArtefactError(
                f"{folder} is no sequence model's artefact. Load a language model's with Recommender.from_pretrained."
            )
        settings = read_settings(folder)
        catalog = CatalogVersions(folder / CATALOG_FOLDER).load(catalog_version)
        return cls(load_model(folder, dtype, device), catalog, settings, retrieval)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the artefact folder, whole or not at all: config.json, model.safetensors, catalog, settings, hashes.

        The catalog becomes the base there, as it is, and the model knows all of its items.

        Raises:
            CatalogError: if an artefact lies there whose catalog has versions, which would be lost.
        """
        refuse_to_replace(Path(folder) / CATALOG_FOLDER)
        with atomic_folder(folder) as temporary:
            self.model.save_pretrained(temporary, safe_serialization=True)
            self.catalog.save(temporary / CATALOG_FOLDER)
            write_json(temporary / SETTINGS_FILE, {"llmrec": __version__, **asdict(self.settings)})
            artefact.write_manifest(temporary)

    def with_items(
        self, items: Sequence[Mapping[str, Any]], features: Features | None = None
    ) -> "SequenceRecommender":
        """A recommender that knows new items too, without training; `add_items` does the same to an artefact.

        Args:
            items: mappings with "item_id" and "title".
            features: what the model makes their vectors of, a row per item: "vectors" (M, E) where it reads texts,
                "codes" (M, L) where it reads semantic IDs.

        Raises:
            BackboneError: if the model knows items by their ids alone.
            DataError: if the features do not fit.
            CatalogError: if an item is there already.
        """
        count = len(self.catalog)
        catalog = self.catalog.with_items(items, np.arange(count, count + len(items))[:, None])
        model = with_new_items(self.model, catalog.ids, features or {})
        return SequenceRecommender(model, catalog, self.settings, self.retrieval)

    def recommend_histories(
        self, histories: Sequence[History], k: int = 10, exclude_seen: bool = True, progress: bool = False
    ) -> tuple[list[list[int]], list[list[float]]]:
        """`recommend_rows` for histories as numbers, such as `LoggedHistories.cases` gives."""
        excluded = [one.rows if exclude_seen else np.zeros(0, dtype=np.int64) for one in histories]
        found = self._ranked(histories, k, excluded, progress)
        return [[row for row, _, _ in one] for one in found], [[score for _, score, _ in one] for one in found]

    def _decoded(
        self,
        prompts: Sequence[Sequence[int]],
        k: int,
        beams: int,
        excluded: Sequence[Rows],
        progress: bool = False,
        trie: Any = None,
        selection: Selection | None = None,
    ) -> list[list[tuple[int, float, list[float]]]]:
        histories = [history_of(prompt, len(self.catalog)) for prompt in prompts]
        return self._ranked(histories, k, excluded, progress, trie, selection)

    def _ranked(
        self,
        histories: Sequence[History],
        k: int,
        excluded: Sequence[Rows],
        progress: bool = False,
        pool: ItemPool | None = None,
        selection: Selection | None = None,
    ) -> list[list[tuple[int, float, list[float]]]]:
        """Row, log-probability, and that of the one level, of the best items after each history."""
        everything: Any = self._trie
        pool, selection = pool or everything, selection or Selection()
        assert pool is not None
        if selection.cap is not None:
            require_levels(selection.cap.levels, self.catalog.num_levels)  # every item is a branch of its own
        answers = []
        for begin in _batches(len(histories), progress):
            some = histories[begin : begin + _BATCH]
            queries = queries_of(self.model, some)
            gone = excluded[begin : begin + _BATCH]
            wanted = [Wanted(k, pool, rows, selection.renormalize, selection.draw) for rows in gone]
            for one, ranked in zip(wanted, self.index.search(queries, wanted), strict=True):
                if len(ranked.rows) != min(k, pool.count - len(pool.without(one.excluded))):
                    raise BackboneError(
                        f"The model's scores are not numbers: a search for {k} items found {len(ranked.rows)}. Its "
                        "weights are broken or its dtype overflows; load it in float32."
                    )
                pairs = zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True)
                answers.append([(row, score, [score]) for row, score in pairs])
        return answers


def load_model(
    folder: Path, dtype: str | torch.dtype = "auto", device: str | torch.device | None = None
) -> "SequenceModel":
    """A checked artefact's model, in evaluation mode; default device: a GPU if there is one."""
    from llmrec.sequence.model import SequenceModel

    model: SequenceModel = SequenceModel.from_pretrained(folder, dtype=dtype)
    model.eval().to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return model


def queries_of(model: "SequenceModel", histories: Sequence[History]) -> torch.Tensor:
    """(B, D) what the model asks for after each history; of longer ones the last items count."""
    with torch.inference_mode():
        batch = collate(histories, model.config.max_history)
        return model.last(**moved(batch, model.device))


def _batches(count: int, progress: bool) -> Any:
    """The first places of batches."""
    begins = range(0, count, _BATCH)
    if not progress:
        return begins
    from tqdm.auto import tqdm

    return tqdm(begins, desc="recommending", unit="batch")

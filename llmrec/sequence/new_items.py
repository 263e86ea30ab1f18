"""New items for a trained sequence model: their vectors are made of their texts or codes, and nothing is trained."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from llmrec.catalog import CATALOG_FOLDER, Catalog
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import BackboneError, CatalogError, DataError
from llmrec.representations.item_features import ItemFeatures
from llmrec.sequence.model import SequenceModel

Features = Mapping[str, npt.NDArray[Any]]


def with_new_items(model: SequenceModel, item_ids: Sequence[str], features: Features) -> SequenceModel:
    """A model that knows more items; it shares all but what is kept per item with the one given, which stays as it is.

    Args:
        model: of N items.
        item_ids: all N + M ids, the new ones last.
        features: of the M new items "vectors" (M, E) for texts, "codes" (M, L) for semantic IDs; nothing for hashes.

    Raises:
        BackboneError: if the model knows items by their ids alone.
        DataError: if what its representation is made of is not there, or does not fit.
    """
    known, count = model.num_items, len(item_ids)
    rows = np.where(np.arange(count) < known, np.arange(count), -1)
    # What old items are made of is in the model, and comes from there.
    filled = {
        name: np.concatenate([np.zeros((known, *values.shape[1:]), dtype=values.dtype), values])
        for name, values in features.items()
    }
    given = ItemFeatures(item_ids, filled.get("vectors"), filled.get("codes"))
    representation = model.representation.with_items(given, rows)
    before = model.representation.state_dict()
    with torch.no_grad():
        for name, tensor in representation.state_dict().items():
            if tensor.shape != before[name].shape:  # what has a row per item
                tensor[:known] = before[name]
    grown = copy.copy(model)
    grown.__dict__["_modules"] = dict(model._modules)
    grown.representation = representation
    grown.config = copy.deepcopy(model.config)
    grown.config.num_items = count
    return grown


def model_of(model: SequenceModel, catalog: Catalog) -> SequenceModel:
    """The model for a version of its catalog: itself, or one that knows the items behind its own too.

    Raises:
        CatalogError: if the catalog is none of rows, has fewer items than the model, or new ones that the model cannot
            make vectors of.
    """
    if not catalog.is_rows:
        raise CatalogError(
            f"The catalog spells items in {catalog.num_levels} levels, and a sequence model knows their rows alone. "
            "Make it with Catalog.of_rows."
        )
    more = len(catalog) - model.num_items
    if more < 0:
        raise CatalogError(
            f"The catalog has {len(catalog)} items and the model {model.num_items}. Give the catalog that it was "
            "trained on; retired items stay in it."
        )
    if not more:
        return model
    behind = len(catalog) - catalog.base_items
    if behind < more:
        raise CatalogError(
            f"The model has no vectors for the last {more} of {len(catalog)} items. Train it on this catalog, or add "
            "the items to its own with add_items."
        )
    features = {name: values[behind - more :] for name, values in catalog.features.items()}
    try:
        return with_new_items(model, catalog.ids, features)
    except (BackboneError, DataError) as error:
        raise CatalogError(f"The model cannot make vectors of the catalog's last {more} items: {error}") from error


def add_items(
    folder: str | Path,
    items: Sequence[Mapping[str, Any]],
    features: Features | None = None,
    note: str = "",
) -> str:
    """New items for an artefact: a version of its catalog, which is then current, and which servers can be sent to.

    Args:
        folder: a sequence model's artefact.
        items: mappings with "item_id" and "title".
        features: see `with_new_items`.
        note: for the catalog's log.

    Returns:
        The version's name.

    Raises:
        CatalogError: if an item is there already.
        BackboneError, DataError: if the model cannot make vectors of the features; nothing is added then.
        ArtefactError: if the folder holds no sequence model's artefact.
    """
    from llmrec.sequence.recommender import SequenceRecommender

    recommender = SequenceRecommender.from_pretrained(folder, device="cpu")
    recommender.with_items(items, features)  # raises where they do not fit
    count = len(recommender.catalog)
    codes = np.arange(count, count + len(items), dtype=np.int32)[:, None]
    versions = CatalogVersions(Path(folder) / CATALOG_FOLDER)
    return versions.add(items, codes, note, recommender.catalog.version, features)

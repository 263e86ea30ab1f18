"""The split that an artefact was trained on, made again from its log."""

from collections.abc import Sequence
from dataclasses import asdict

import polars as pl

from llmrec.artefact_parts import Settings
from llmrec.catalog import Catalog
from llmrec.data.arguments import SplitArguments
from llmrec.data.columns import ITEM
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.split import Split
from llmrec.data.subset import learnt_split
from llmrec.exceptions import DataError, RecipeError


def trained_split(
    log: Interactions,
    catalog: Catalog,
    settings: Settings,
    splits: SplitArguments | None = None,
    any_split: bool | None = None,
) -> Split:
    """The log's split over the items of an artefact, as its own training made it.

    Items that came to the catalog after the training have its last rows; where the log knows none of them they are no
    part of the split, which then has the first rows alone.

    Args:
        log: what it was trained on.
        catalog: the artefact's.
        settings: the artefact's.
        splits: how the log is split; None, or all at their defaults: as the artefact says.
        any_split: whether another split is one to go on with; None: no, and the caller has no flag that says so.

    Raises:
        DataError: if it is another split than the artefact's, whose training may then hold what is held out here.
    """
    given = splits is not None and asdict(splits) != asdict(SplitArguments())
    if splits is None or not given:
        splits = SplitArguments.from_protocol(settings.protocol) if settings.protocol else SplitArguments()
    ids: Sequence[str] = catalog.ids
    first = ids[: catalog.base_items]
    if len(first) < len(ids) and set(first).issuperset(log.frame[ITEM].unique().to_list()):
        ids = first
    split = splits.make(log, Items.from_frame(pl.DataFrame({ITEM: ids})))
    if split.content_hash != settings.split and not any_split:
        raise DataError(
            f"The interactions have the split {split.content_hash[:12]}, and the artefact was trained on "
            f"{settings.split[:12] or 'an unknown one'}: its training may hold what is held out here. Give the file "
            f"and the split that it was trained on{'' if any_split is None else ', or say --any_split'}."
        )
    return split


def learnt_part(split: Split, settings: Settings) -> Split:
    """The same split with the training interactions of those users alone whom the artefact learnt from.

    `--train_share` may have left some out; they stay in the split, and are asked about like all others.
    """
    recorded = settings.training.get("data", {})
    return learnt_split(split, recorded.get("train_share", 1.0), recorded.get("train_share_seed", 0))


def refuse_grown(catalog: Catalog, name: str) -> None:
    """Raises RecipeError if items came to an artefact's catalog after its training.

    Args:
        catalog: the artefact's.
        name: what the artefact is called in the error.
    """
    if catalog.base_items < len(catalog):
        raise RecipeError(
            f"The catalog of {name} has {len(catalog) - catalog.base_items} item(s) that came after its training, of "
            "which its interactions teach nothing. Roll it back to its base version."
        )

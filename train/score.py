"""Scores an artefact on held-out items: full ranking of the catalog, beside popularity and item-CF on the same split.

    python train/score.py --artefact runs/artefact --interactions interactions.parquet --out runs/result.json

Every user's last item is the test item (`--part valid`: the one before it). Items are ranked, not ID strings.
"""

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from llmrec.data.arguments import ColumnArguments
from llmrec.data.columns import ITEM
from llmrec.exceptions import DataError
from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser


@dataclass
class ScoreArguments:
    """What to score, on what."""

    artefact: str = field(metadata={"help": "Artefact folder, or a Hub id."})
    interactions: str = field(metadata={"help": "Interactions: parquet, csv, tsv or jsonl, gzipped or not."})
    out: str = field(metadata={"help": "JSON file for the result."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit on the Hub."})
    part: str = field(default="test", metadata={"help": "Held-out item.", "choices": ["test", "valid"]})
    ks: list[int] = field(default_factory=lambda: [5, 10, 20], metadata={"help": "Cut-offs."})
    num_beams: int | None = field(default=None, metadata={"help": "Beams; default: the artefact's."})
    max_users: int = field(default=0, metadata={"help": "Score only so many users, drawn with the seed; 0: all."})
    any_split: bool = field(
        default=False,
        metadata={
            "help": "Score interactions that the artefact was not trained on; its training may hold their items."
        },
    )
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    seed: int = field(default=0, metadata={"help": "Of the users that are drawn."})


def make_parser() -> "TrlParser":
    return parser((ScoreArguments, ColumnArguments), __doc__)


def main(arguments: ScoreArguments, names: ColumnArguments) -> None:
    import numpy as np
    import polars as pl
    import torch
    import transformers
    from rich.console import Console
    from rich.table import Table

    import llmrec
    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out
    from llmrec.evaluation.baselines import ItemCF, Popularity
    from llmrec.evaluation.comparison import compare
    from llmrec.recommender import Recommender
    from llmrec.storage import write_json

    begin = time.monotonic()
    recommender = Recommender.from_pretrained(arguments.artefact, arguments.revision, arguments.device)
    items = Items.from_frame(pl.DataFrame({ITEM: recommender.catalog.ids}))
    split = leave_one_out(Interactions.read(arguments.interactions, names.names()), items)
    if split.content_hash != recommender.settings.split and not arguments.any_split:
        raise DataError(
            f"The interactions have the split {split.content_hash[:12]}, the artefact was trained on "
            f"{recommender.settings.split[:12] or 'an unknown one'}: its training may hold these test items. "
            "Score the file that it was trained on, or say --any_split."
        )
    users = None
    if arguments.max_users and arguments.max_users < len(split.user_ids):
        drawn = np.random.default_rng(arguments.seed).permutation(len(split.user_ids))
        users = np.sort(drawn[: arguments.max_users])
    popularity = Popularity().fit(split.train, split.num_items)
    item_cf = ItemCF().fit(split.train, split.num_items)
    result = compare(
        {
            "popularity": popularity.recommend,
            "item_cf": item_cf.recommend,
            "llmrec": lambda histories, k: recommender.recommend_rows(
                [history.tolist() for history in histories], k, num_beams=arguments.num_beams, progress=True
            )[0],
        },
        split,
        arguments.part,
        arguments.ks,
        users,
    )
    result |= {
        "artefact": arguments.artefact,
        "catalog_version": recommender.catalog.version,
        "num_beams": max(arguments.num_beams or recommender.settings.num_beams, max(arguments.ks)),
        "seeds": {"training": recommender.settings.training.get("trainer", {}).get("seed"), "users": arguments.seed},
        "versions": {m.__name__: str(m.__version__) for m in (llmrec, torch, transformers)},
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_json(arguments.out, result)
    table = Table(
        "system", *(f"{metric}@{k}" for k in arguments.ks for metric in ("HR", "NDCG")), "invalid", "duplicate"
    )
    for name, metrics in result["systems"].items():
        numbers = [f"{metrics[f'{metric}@{k}']:.4f}" for k in arguments.ks for metric in ("HR", "NDCG")]
        table.add_row(name, *numbers, f"{metrics['invalid_rate']:.4f}", f"{metrics['duplicate_rate']:.4f}")
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    console.print(
        f"{result['users']:,} users, {split.num_items:,} items, split {split.content_hash[:12]}: {arguments.out}",
        markup=False,
    )


if __name__ == "__main__":
    run(main, make_parser())

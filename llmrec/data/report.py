"""The guard's report on a log and its split: what is in it, and what makes figures on it mean less than they seem."""

from typing import Any

import numpy as np
import polars as pl

from llmrec.data import copies, distribution, leaks, order
from llmrec.data.columns import ITEM, TITLE
from llmrec.data.findings import findings
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.split import Split
from llmrec.exceptions import DataError
from llmrec.scaling.entropy import entropies


def report(
    interactions: Interactions, items: Items, split: Split, seed: int = 0, seen: Interactions | None = None
) -> dict[str, Any]:
    """Looks at a log and its split; the same arguments give the same report.

    Args:
        interactions: the log that was split.
        items: the table of items that it was split with.
        split: how it is split.
        seed: for shuffled ties, random numberings of items, and the sample of users whose entropy is taken.
        seen: what a model to be judged was trained on, if it should be searched for test items.

    Returns:
        JSON-ready, all numbers finite; a section is None where the log has nothing for it, such as times:

        * split: protocol, content hash, whether times are a clock's and whether positions decide the order of ties;
        * counts: users, items, interactions, density and the parts' sizes;
        * lengths, popularity, times: see `llmrec.data.distribution`;
        * repeats, overlap and history (of test and valid), seen (likewise), look_ahead, equal_users, unseen:
          `llmrec.data.leaks`;
        * ties, sensitivity, id_order, fixed_order (of ties), fixed_order_day, fixed_order_untimed:
          `llmrec.data.order`;
        * text: items without title and without any text;
        * entropy: of the training sequences, see `llmrec.scaling.entropy`;
        * findings: see `llmrec.data.findings`, warnings first.

    Raises:
        DataError: if the split was not made of these interactions and items.
    """
    if len(interactions) != len(split.rows) or len(items) != split.num_items:
        raise DataError(
            f"The split has {len(split.rows)} interactions and {split.num_items} items, but {len(interactions)} and "
            f"{len(items)} were given. Give the interactions and items that the split was made of."
        )
    parts: tuple[Any, ...] = ("test", "valid")
    found: dict[str, Any] = {
        "split": {
            "protocol": dict(split.protocol),
            "content_hash": split.content_hash,
            "clock": bool(split.clock),
            "positions_decide": split.positions_decide,
        },
        "counts": _counts(split),
        "lengths": distribution.lengths(split),
        "popularity": distribution.popularity(split),
        "times": distribution.times(split),
        "repeats": leaks.repeats(split),
        "ties": order.ties(split),
        "sensitivity": order.order_sensitivity(split, seed),
        "id_order": order.id_order(split, seed),
        "fixed_order": order.fixed_order(split),
        "fixed_order_day": order.fixed_order(split, "day"),
        "fixed_order_untimed": order.fixed_order(split, "untimed"),
        "overlap": {part: leaks.overlap(split, part) for part in parts},
        "history": {part: leaks.history_overlap(split, part) for part in parts},
        "seen": None if seen is None else {part: leaks.seen_overlap(split, seen, part) for part in parts},
        "look_ahead": leaks.look_ahead(split),
        "equal_users": copies.equal_users(split),
        "unseen": leaks.unseen(split),
        "text": _text(items, split),
        "entropy": entropies(split.rows, split.offsets[:-1], split.train_ends, seed),
    }
    return {**found, "findings": findings(found)}


def _counts(split: Split) -> dict[str, int | float]:
    counts = np.bincount(split.rows, minlength=split.num_items)
    pairs = len(np.unique(split.owner * split.num_items + split.rows))
    return {
        "users": len(split.all_users),
        "users_tested": len(np.unique(split.case_users("test"))),
        "items": split.num_items,
        "items_used": int((counts > 0).sum()),
        "interactions": len(split.rows),
        "distinct_pairs": pairs,
        "density": pairs / max(1, len(split.all_users) * split.num_items),
        "training_interactions": int(split.in_training.sum()),
        "validation_cases": len(split.positions["valid"]),
        "test_cases": len(split.positions["test"]),
    }


def _text(items: Items, split: Split) -> dict[str, int]:
    """Items without a title of their own, and those that have not even another column with a letter in it."""
    others = [name for name, dtype in items.frame.schema.items() if dtype == pl.String and name not in (ITEM, TITLE)]
    worded = [pl.col(name).str.contains(r"\pL").fill_null(False) for name in others]
    bare = items.frame.select(
        ((pl.col(TITLE) == pl.col(ITEM)) & ~pl.any_horizontal(pl.lit(False), *worded)).alias("bare")
    )["bare"].to_numpy()
    used = np.bincount(split.rows, minlength=split.num_items) > 0
    return {
        "without_title": items.missing_titles,
        "without_text": int(bare.sum()),
        "used_without_text": int((bare & used).sum()),
        "appended": items.appended,
    }

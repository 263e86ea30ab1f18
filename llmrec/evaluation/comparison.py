"""One comparison for every recommender: the same users, the same candidates, items counted as items.

A system is a function from histories to lists of catalog rows; nothing here knows how it found them.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec.data.split import Part, Split
from llmrec.evaluation.metrics import duplicate_rate, interval95, invalid_rate, ranking_metrics, ranks_of

Histories = Sequence[npt.NDArray[np.integer]]
System = Callable[[Histories, int], Sequence[Sequence[int]]]


def compare(
    systems: Mapping[str, System],
    split: Split,
    part: Part = "test",
    ks: Sequence[int] = (5, 10, 20),
    users: npt.NDArray[np.integer] | None = None,
) -> dict[str, Any]:
    """Ranks the held-out item of every user with every system, over the full catalog.

    The items of a history are no candidates, for any system. Intervals are 95 % ones over users, for one training run:
    they hold the chance of who was sampled, not of seeds.

    Args:
        systems: by name; each returns up to k rows per history, best first.
        split: where the histories and targets come from.
        part: which held-out item.
        ks: cut-offs.
        users: places in `split.user_ids` to rank; default: all.

    Returns:
        A JSON-ready mapping: split, part, users, items, systems (metrics with intervals, invalid and duplicate rate),
        and the worst invalid and duplicate rate over all systems.
    """
    chosen = np.arange(len(split.user_ids)) if users is None else np.asarray(users)
    histories, targets = split.histories(part), split.targets(part)[chosen]
    ranked = [histories[user] for user in chosen]
    results: dict[str, dict[str, Any]] = {}
    for name, system in systems.items():
        lists = system(ranked, max(ks))
        ranks = ranks_of(lists, targets)
        metrics: dict[str, Any] = dict(ranking_metrics(ranks, ks))
        for k in ks:
            metrics[f"HR@{k} interval95"] = list(interval95(ranks, k, "HR"))
            metrics[f"NDCG@{k} interval95"] = list(interval95(ranks, k, "NDCG"))
        metrics["invalid_rate"] = invalid_rate(lists, split.num_items)
        metrics["duplicate_rate"] = duplicate_rate(lists)
        results[name] = metrics
    return {
        "split": split.content_hash,
        "part": part,
        "users": len(chosen),
        "items": split.num_items,
        "systems": results,
        "invalid_rate": max((result["invalid_rate"] for result in results.values()), default=0.0),
        "duplicate_rate": max((result["duplicate_rate"] for result in results.values()), default=0.0),
    }

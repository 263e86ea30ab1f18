"""How long full ranking takes from a score function: 22,363 users x 12,101 items, the size of Amazon Beauty.

    python benchmarks/evaluation.py [--users 22363] [--items 12101] [--quick] [--json FILE]

Scores are products of random user and item vectors (width 64, float32), made batch by batch as a model would make
them; histories of 8 items are excluded. Three ways to HR@10, NDCG@10 and MRR@10, in one run:

* evaluate:     llmrec.evaluation.evaluation.evaluate, which counts what stands before the target
* argsort:      every user's scores sorted by numpy, the target looked up: what many scripts do
* torchmetrics: its retrieval metrics over (user, score, relevance), on --rival-users users

The script checks that the three agree. Seconds of the rivals are scaled to all users; peak memory is the process's.
"""

import argparse
import resource
import sys
import time
from typing import Any

import numpy as np
import polars as pl
from environment import add_flags, environment, report

WIDTH = 64
HISTORY = 8
BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=22_363)
    parser.add_argument("--items", type=int, default=12_101)
    parser.add_argument("--rival-users", type=int, default=1_000)
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.rival_users = 300

    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out
    from llmrec.evaluation.evaluation import evaluate

    before = environment()
    rng = np.random.default_rng(0)
    taken = np.argsort(rng.random((options.users, 4 * (HISTORY + 1))), axis=1)[:, : HISTORY + 1]
    rows = (taken + rng.integers(0, options.items - 4 * (HISTORY + 1), (options.users, 1))).reshape(-1)
    log = pl.DataFrame(
        {"user_id": np.repeat(np.arange(options.users), HISTORY + 1), "item_id": rows},
    )
    items = Items.from_frame(pl.DataFrame({"item_id": np.arange(options.items)}))
    split = leave_one_out(Interactions.from_frame(log), items)
    vectors = rng.standard_normal((options.items, WIDTH), dtype=np.float32)

    def score(histories: Any) -> Any:
        users = np.stack([vectors[history].mean(axis=0) for history in histories])
        return users @ vectors.T

    peak_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    evaluation = evaluate("random", split, scores=score, ks=(10,))
    seconds = {"evaluate": time.perf_counter() - begin}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begin = time.perf_counter()
    document = evaluation.document()
    seconds["document (bootstrap, slices)"] = time.perf_counter() - begin

    table = evaluation.table()
    chosen = np.arange(options.rival_users)
    histories, targets = split.histories("test"), split.targets("test")
    scale = options.users / options.rival_users

    begin = time.perf_counter()
    sorted_values = []
    for start in range(0, options.rival_users, BATCH):
        part = chosen[start : start + BATCH]
        scores = score([histories[user] for user in part])
        for user, row in zip(part, scores, strict=True):
            row[histories[user]] = -np.inf
            rank = int(np.flatnonzero(np.argsort(-row, kind="stable") == targets[user])[0])
            hit = rank < 10
            sorted_values.append((float(hit), hit / np.log2(rank + 2), hit / (rank + 1)))
    seconds["argsort"] = scale * (time.perf_counter() - begin)

    import torch
    from torchmetrics.retrieval import RetrievalHitRate, RetrievalMRR, RetrievalNormalizedDCG

    begin = time.perf_counter()
    metrics = [RetrievalHitRate(top_k=10), RetrievalNormalizedDCG(top_k=10), RetrievalMRR(top_k=10)]
    scores = score([histories[user] for user in chosen])
    relevant = np.zeros(scores.shape, dtype=bool)
    relevant[chosen, targets[chosen]] = True
    keep = np.ones(scores.shape, dtype=bool)
    for user in chosen:
        keep[user, histories[user]] = False
    indexes = torch.from_numpy(np.broadcast_to(chosen[:, None], scores.shape)[keep])
    found = []
    for metric in metrics:
        metric.update(torch.from_numpy(scores[keep]), torch.from_numpy(relevant[keep]), indexes=indexes)
        found.append(float(metric.compute()))
    seconds["torchmetrics"] = scale * (time.perf_counter() - begin)

    assert np.allclose(table[chosen], sorted_values, atol=1e-12), "argsort finds other places"
    assert np.allclose(table[chosen].mean(axis=0), found, atol=1e-5), "torchmetrics finds other values"
    result = {
        "environment": before,
        "options": {name: value for name, value in vars(options).items() if name != "json"}
        | {"width": WIDTH, "history": HISTORY},
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "peak_mebibytes": round(peak / 1024, 1),
        "peak_mebibytes_before": round(peak_before / 1024, 1),
        "HR@10": document["HR@10"],
    }
    ratios = {
        f"{rival} over evaluate": round(seconds[rival] / seconds["evaluate"], 2)
        for rival in ("argsort", "torchmetrics")
    }
    report("evaluation", {**result, "ratios": ratios}, ratios, before, options)
    for name, value in seconds.items():
        print(f"{name}: {value:.2f} s for {options.users:,} users x {options.items:,} items")
    print(f"peak memory of evaluate: {peak / 1024:.0f} MiB, before it {peak_before / 1024:.0f} MiB")
    for name, value in ratios.items():
        print(f"{name}: {value}")


if __name__ == "__main__":
    sys.exit(main())

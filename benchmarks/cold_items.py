"""What a trained model makes of items that it never saw: 5 % of the catalog held out, assigned codes, recommended.

    python benchmarks/cold_items.py [--data ../shared/data] [--runs runs/cold_items] [--quick] [--json FILE]

For every data set and seed, a share of the items that are somebody's last is drawn and taken out of everything: the
item table, the interactions, the tokenizer, the training. A tokenizer and a small model are trained on the rest by the
stages. Then `semantic_ids/assign.py` gives the held-out items codes from the frozen codebooks, by their text alone.
The cases are the users whose last item is one of them; histories are all that came before, held-out items left out.

* all items: the place of the cold item among all items, old and new. A model that was only ever rewarded for old
  items puts new ones low, which is a known pain; the share of new items among the first 10 says how low.
* among cold items: the same model with every old item retired, so that it chooses among the new ones alone. Chance is
  k over their number.
* text kNN: nearest items by the text embedding of the last history items, which needs no training, on the same cases.
* warm: what assigning did to the old items' cases: the same test cases before and after.

Intervals are Student's over the seeds, which vary the items held out, the tokenizer and the training.
--quick: one seed, a short training on the synthetic sample, whose text embedding is fitted on all items; its numbers
only show that all works.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from environment import add_flags, environment, report
from item_tokenizers import ROOT, check_options, over_seeds, prepared, stage

SHARE = 0.05
KS = (10, 50)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data", help="Folder of data sets.")
    parser.add_argument("--runs", type=Path, default=Path("runs/cold_items"), help="Folder for the run folders.")
    parser.add_argument("--datasets", nargs="+", default=["amazon-scientific"], help="Names of folders below --data.")
    parser.add_argument("--seeds", type=int, default=3, help="Of the items held out, tokenizer and training.")
    parser.add_argument("--epochs", type=float, default=8, help="Passes over the training rows.")
    parser.add_argument("--warm-cases", type=int, default=1000, help="Old items' test cases, before and after.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.datasets, options.seeds, options.epochs, options.warm_cases = ["sample"], 1, 0.5, 100
    before = environment()
    begin = time.perf_counter()
    found: dict[str, Any] = {}
    ratios = {}
    for name in options.datasets:
        runs, items, interactions = prepared(name, options)
        seeds = [measure(runs, items[1], interactions[1], seed, options) for seed in range(options.seeds)]
        numbers = [key for key, value in seeds[0].items() if isinstance(value, float)]
        found[name] = {"mean": {key: over_seeds([one[key] for one in seeds]) for key in numbers}, "runs": seeds}
        for key in numbers:
            low, high = found[name]["mean"][key]["interval95"] or (float("nan"), float("nan"))
            print(f"{name}: {key:44} {found[name]['mean'][key]['mean']:.4f} [{low:.4f}, {high:.4f}]")
        mean = {key: found[name]["mean"][key]["mean"] for key in numbers}
        ratios[f"{name}: HR@10 among cold items over chance"] = mean["HR@10 among cold items"] / mean["chance@10"]
        if mean["warm NDCG@10 before"]:
            ratios[f"{name}: warm NDCG@10, after over before"] = (
                mean["warm NDCG@10 after"] / mean["warm NDCG@10 before"]
            )
    result = {
        "protocol": f"{SHARE:.0%} of the items held out of tokenizer and training, then assigned; full ranking",
        "options": {"epochs": options.epochs, "seeds": options.seeds, "warm_cases": options.warm_cases},
        "seconds": round(time.perf_counter() - begin, 1),
        "datasets": found,
    }
    report("cold_items", result, {key: round(value, 3) for key, value in ratios.items()}, before, options)


def measure(runs: Path, table: str, log: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """One seed: hold out, train, assign, rank."""
    folder = runs / f"cold-{seed}"
    path = folder / "cold.json"
    check_options(folder / "options.json", {"epochs": options.epochs, "warm_cases": options.warm_cases})
    if not path.is_file():
        cold = held_out(table, log, seed, folder)
        trained(runs, folder, seed, options)
        path.write_text(json.dumps(ranked(runs, folder, cold, options)), encoding="utf-8")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def held_out(table: str, log: str, seed: int, folder: Path) -> dict[str, list[str]]:
    """Writes the old and the new items and the old ones' interactions; the cases as user id -> old history, target."""
    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out

    interactions = Interactions.read(log)
    items = Items.read(table).with_missing(interactions)
    split = leave_one_out(interactions, items)
    histories, targets = split.histories("test"), split.targets("test")
    eligible = np.unique(targets)
    count = min(len(eligible), round(SHARE * len(items)))
    cold = np.sort(np.random.default_rng(seed).permutation(eligible)[:count])
    names = {items.ids[row] for row in cold}
    folder.mkdir(parents=True, exist_ok=True)
    interactions.frame.filter(~pl.col("item_id").is_in(names)).write_parquet(folder / "interactions.parquet")
    items.frame.filter(~pl.col("item_id").is_in(names)).write_parquet(folder / "items.parquet")
    items.frame.filter(pl.col("item_id").is_in(names)).write_parquet(folder / "new_items.parquet")
    cases = {}
    for case in np.flatnonzero(np.isin(targets, cold)):
        history = [items.ids[row] for row in histories[case] if items.ids[row] not in names]
        if history:
            cases[str(case)] = [*history, items.ids[targets[case]]]
    return cases


def trained(runs: Path, folder: Path, seed: int, options: argparse.Namespace) -> None:
    """The artefact of the old items, and a copy of it in which the new ones have joined."""
    import shutil

    data = ["--interactions", str(folder / "interactions.parquet")]
    items, embeddings = ["--items", str(folder / "items.parquet")], ["--embeddings", str(runs / "embeddings")]
    chosen = ["--seed", str(seed)]
    stage("semantic_ids/build.py", [*data, *items, *embeddings, *chosen, "--out", str(folder / "ids")])
    training = ["--config", str(ROOT / "train/recipes/llama_scratch.yaml"), *data, *chosen]
    training += ["--semantic_ids", str(folder / "ids"), "--artefact", str(folder / "artefact")]
    training += ["--output_dir", str(folder / "training"), "--num_train_epochs", f"{options.epochs:g}"]
    stage("train/sft.py", [*training, "--eval_steps", "0.5", "--save_steps", "0.5"])
    shutil.rmtree(folder / "grown", ignore_errors=True)
    shutil.copytree(folder / "artefact", folder / "grown")
    new = ["--items", str(folder / "new_items.parquet"), *embeddings, "--json", str(folder / "assigned.json")]
    stage("semantic_ids/assign.py", ["--catalog", str(folder / "grown"), *new])


def ranked(runs: Path, folder: Path, cases: dict[str, list[str]], options: argparse.Namespace) -> dict[str, Any]:
    """Hits and NDCG of the cold cases by model and text kNN, of warm ones before and after."""
    from llmrec import Recommender
    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out
    from llmrec.embedding import EmbeddingStore
    from llmrec.evaluation.baselines import TextKNN

    old, grown = (Recommender.from_pretrained(folder / name) for name in ("artefact", "grown"))
    catalog = grown.catalog
    new = np.arange(len(old.catalog), len(catalog))
    sequences = [catalog.rows(sequence) for sequence in cases.values()]
    histories, targets = [sequence[:-1] for sequence in sequences], [sequence[-1] for sequence in sequences]
    result: dict[str, Any] = {"cold_items": len(new), "items": len(catalog), "cases": len(cases)}
    result |= {f"chance@{k}": min(1.0, k / len(new)) for k in KS}
    result["assignment"] = json.loads((folder / "assigned.json").read_text(encoding="utf-8"))["assignment"]

    def model(recommender: Recommender) -> Callable[[list[list[int]]], list[list[int]]]:
        return lambda histories: recommender.recommend_rows(histories, max(KS), num_beams=50)[0]

    lists = model(grown)(histories)
    result |= hits(lists, targets, "of all items")
    result["new items among the first 10"] = float(
        np.mean([np.mean(np.array(found[:10]) >= new[0]) for found in lists])
    )
    among = catalog.with_retired(np.arange(len(old.catalog)).tolist(), True)
    alone = Recommender(grown.model, grown.tokenizer, among, grown.prompt, grown.settings)
    result |= hits(model(alone)(histories), targets, "among cold items")
    vectors = EmbeddingStore.load(runs / "embeddings").rows(catalog.ids)
    items = Items.read(folder / "items.parquet")
    split = leave_one_out(Interactions.read(folder / "interactions.parquet"), items)
    near = TextKNN(vectors).fit(split.train, len(catalog))
    rows = [np.array(history) for history in histories]
    result |= hits([found.tolist() for found in near.recommend(rows, max(KS))], targets, "of all items, text kNN")
    scores = near.scores(rows)[:, new]
    order = np.argsort(-scores, axis=1, kind="stable")[:, : max(KS)]
    result |= hits((order + new[0]).tolist(), targets, "among cold items, text kNN")
    drawn = np.random.default_rng(0).permutation(len(split.targets("test")))[: options.warm_cases]
    warm = [split.histories("test")[case].tolist() for case in drawn]
    wanted = split.targets("test")[drawn].tolist()
    for recommender, when in ((old, "before"), (grown, "after")):
        measured = hits(model(recommender)(warm), wanted, when)
        result |= {f"warm {key}": value for key, value in measured.items() if "@10" in key}
    return result


def hits(lists: Sequence[Sequence[int]], targets: Sequence[int], where: str) -> dict[str, float]:
    """Shares of targets among the first k, and NDCG@10."""
    found: dict[str, float] = {}
    places = [
        list(items).index(target) if target in items else -1 for items, target in zip(lists, targets, strict=True)
    ]
    for k in KS:
        found[f"HR@{k} {where}"] = float(np.mean([0 <= place < k for place in places]))
    found[f"NDCG@10 {where}"] = float(
        np.mean([1 / np.log2(place + 2) if 0 <= place < 10 else 0.0 for place in places])
    )
    return found


if __name__ == "__main__":
    sys.exit(main())

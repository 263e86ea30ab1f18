"""How much higher HR and NDCG read when semantic IDs are counted instead of items: published tables, real rankings.

    python benchmarks/inflation.py [--data ../shared/data] [--resamples 1000] [--controls 3] [--quick] [--json FILE]

For every published table of semantic IDs (item -> codes, some shared by several items) and three rankings of the
leave-one-out test cases, full catalog, items of the history excluded:

* popularity, item-cf: the baseline's list of items, read as IDs; an ID stands where its first item stands
* item-cf, sums: every ID scored by the sum of its items' item-CF scores, as a softmax over items adds up inside an ID

the same ranking is read four ways:

* ID level:   the place of the target's ID among the distinct IDs (a hit if any item of that ID was meant)
* expected:   the place of the target among the items, those of one ID in uniformly random order
* popularity: the same, those of one ID by training count, then by row (the ratio below is against `expected`)
* own order:  the baseline's own list of items, which tells items of one ID apart (a model of IDs cannot)

`ratio` is ID level / expected, with a 95 % bootstrap interval over users. The control deals the items at random to IDs
of the same sizes: what is left there is due to sizes alone, the rest to alike items sharing an ID.

What is not measured: a generative model. It is trained on the colliding IDs themselves, may put more weight on large
IDs than an item-level baseline does, and searches with a beam. Its inflation is that of *its* ranking; only
`llmrec.evaluation.identifiers` on its own lists tells it. Nor is anything said of systems that add a code to make IDs
unique: their two levels are equal.

Without ../shared/data the script says so, measures nothing and ends well.
"""

import argparse
import gzip
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from environment import add_flags, environment, report
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrec.evaluation.identifiers import Identifiers, Rule
from llmrec.evaluation.levels import Levels
from llmrec.evaluation.metrics import Metric, values
from llmrec.evaluation.ranks import Ranks
from llmrec.exceptions import DataError

METRICS: tuple[tuple[Metric, int], ...] = (("HR", 10), ("NDCG", 10))
QUICK_USERS = 4_000
BATCH = 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    parser.add_argument("--data", type=Path, default=default, help="Folder of data sets; default: ../shared/data.")
    parser.add_argument("--resamples", type=int, default=1_000, help="Of the bootstrap.")
    parser.add_argument("--controls", type=int, default=3, help="Random tables of the same sizes of IDs.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.resamples, options.controls = 300, 1
    before = environment()
    console = Console(width=150)
    tables = sorted(options.data.glob("*/published_semantic_ids/*.json.gz"))
    found: dict[str, Any] = {}
    skipped = None
    if not tables:
        skipped = f"No published semantic IDs below {options.data.name}/: nothing was measured. Give --data."
        console.print(f"skipped: {skipped}", markup=False)
    begin = time.perf_counter()
    for dataset in sorted({path.parents[1] for path in tables}):
        own = [path for path in tables if path.parents[1] == dataset]
        found[dataset.name] = study(dataset, own, options)
        show(console, dataset.name, found[dataset.name])
    result = {
        "options": {key: value for key, value in vars(options).items() if key not in ("data", "json")},
        "seconds": round(time.perf_counter() - begin, 1),
        "skipped": skipped,
        "datasets": found,
    }
    ratios = {
        f"{dataset} {table} {ranking} {name}@{k} (ID level / item level)": round(value, 4)
        for dataset, measured in found.items()
        for table, one in measured["tables"].items()
        for ranking, read in one["rankings"].items()
        for name, k in METRICS
        if (value := read[f"{name}@{k} ratio"]) is not None
    }
    # A run that measured nothing must not take the place of the results that the documents quote.
    options.quick = options.quick or skipped is not None
    report("inflation", result, ratios, before, options)


def study(dataset: Path, tables: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """All tables of one data set, each under every ranking."""
    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out
    from llmrec.evaluation.baselines import ItemCF, Popularity

    items = Items.read(next(dataset.glob("items.*")))
    split = leave_one_out(Interactions.read(next(dataset.glob("interactions.*"))), items)
    chosen = np.arange(len(split.targets("test")))
    if options.quick and len(chosen) > QUICK_USERS:
        chosen = np.sort(np.random.default_rng(0).permutation(len(chosen))[:QUICK_USERS])
    every, users = split.histories("test"), split.case_users("test")[chosen]
    histories, targets = [every[case] for case in chosen], split.targets("test")[chosen]
    models = {
        "popularity": Popularity().fit(split.train, split.num_items),
        "item-cf": ItemCF().fit(split.train, split.num_items),
    }
    ids = {path.name.partition(".")[0]: read_table(path, split.item_ids) for path in tables}
    readings = {
        (table, name): (one, rule)
        for table, identifiers in ids.items()
        for name, one, rule in (
            ("expected", identifiers, "expected"),
            ("popularity", identifiers, "popularity"),
            *((f"control {seed}", identifiers.shuffled(seed), "expected") for seed in range(options.controls)),
        )
    }
    rankings: dict[str, dict[tuple[str, str], Levels]] = {}
    own_order = {}
    for name, model in models.items():
        lists = deep_enough(model, histories, [one for one, _ in readings.values()], split.num_items)
        rankings[name] = {
            key: one.rank_lists(lists, targets, histories, rule, split.train_counts)
            for key, (one, rule) in readings.items()
        }
        own = Ranks.from_lists(lists, targets)
        own_order[name] = {f"{metric}@{k}": float(values(own, metric, k).mean()) for metric, k in METRICS}
    rankings["item-cf, sums"] = sums(models["item-cf"], histories, targets, readings, split.train_counts)
    result: dict[str, Any] = {"split": split.content_hash, "cases": len(chosen), "items": split.num_items}
    result |= {"own_order": own_order, "tables": {}}
    for table, identifiers in ids.items():
        read = {}
        for ranking, levels in rankings.items():
            one = levels[table, "expected"].document(users, METRICS, options.resamples)
            rule = levels[table, "popularity"]
            for metric, k in METRICS:
                one[f"{metric}@{k} (popularity rule)"] = float(values(rule.items, metric, k).mean())
                one[f"{metric}@{k} control ratios"] = [
                    ratio(levels[table, f"control {seed}"], metric, k) for seed in range(options.controls)
                ]
            read[ranking] = one
        result["tables"][table] = {**identifiers.document(), "rankings": read}
    return result


def read_table(path: Path, item_ids: list[str]) -> Identifiers:
    """The IDs of a published table, in the order of the split's items."""
    codes = json.loads(gzip.decompress(path.read_bytes()))
    if missing := [item for item in item_ids if item not in codes]:
        raise DataError(
            f"{path} has no code for {len(missing)} items, such as {missing[0]!r}. Give a table of these items."
        )
    numbers: dict[str, int] = {}
    return Identifiers.from_codes([[numbers.setdefault(t, len(numbers)) for t in codes[item]] for item in item_ids])


def deep_enough(model: Any, histories: list[Any], ids: list[Identifiers], num_items: int) -> list[Any]:
    """Lists so long that every one holds the first ten IDs of every table: a shorter one would misplace a target."""
    deepest = max(k for _, k in METRICS)
    length = 4 * deepest
    while True:
        lists = model.recommend(histories, length)
        if length >= num_items or all(len(np.unique(one.groups[row])) >= deepest for one in ids for row in lists):
            return lists
        length *= 2


def sums(
    model: Any, histories: list[Any], targets: Any, readings: dict[Any, tuple[Identifiers, Rule]], counts: Any
) -> dict[Any, Levels]:
    """Every reading of the ranking by summed scores; a batch is scored once for all of them."""
    parts: dict[Any, list[Levels]] = {key: [] for key in readings}
    for start in range(0, len(histories), BATCH):
        batch = histories[start : start + BATCH]
        scores = np.asarray(model.scores(batch))
        for key, (one, rule) in readings.items():
            wanted = targets[start : start + BATCH]
            parts[key].append(one.rank_scores(lambda _, s=scores: s, batch, wanted, "sum", rule, counts, batch=BATCH))
    return {key: Levels(joined([p.items for p in part]), joined([p.ids for p in part])) for key, part in parts.items()}


def joined(parts: list[Ranks]) -> Ranks:
    return Ranks(np.concatenate([one.better for one in parts]), np.concatenate([one.ties for one in parts]))


def ratio(levels: Levels, metric: Metric, k: int) -> float | None:
    """ID level over item level, without an interval."""
    below = float(values(levels.items, metric, k).mean())
    return float(values(levels.ids, metric, k).mean()) / below if below else None


def spelt(ratio: float | None, low: float | None, high: float | None) -> str:
    """A ratio and its interval; "–" where the item level is 0."""
    middle, *bounds = ("–" if value is None else f"{value:.3f}" for value in (ratio, low, high))
    return f"{middle} [{', '.join(bounds)}]"


def show(console: Console, dataset: str, found: dict[str, Any]) -> None:
    """One table per data set."""
    for ranking, own in found["own_order"].items():
        shown = ", ".join(f"{name} {value:.4f}" for name, value in own.items())
        console.print(
            f"{dataset}, {found['cases']:,} users, {ranking} in its own order of items: {shown}", markup=False
        )
    table = Table("ids", "beyond unique", "ranking", "metric", "item level", "popularity rule", "ID level", "ratio")
    table.add_column("control ratio")
    for name, one in found["tables"].items():
        for ranking, read in one["rankings"].items():
            for metric, k in METRICS:
                label = f"{metric}@{k}"
                controls = [value for value in read[f"{label} control ratios"] if value is not None]
                cells = (
                    name,
                    f"{100 * one['beyond_unique_share']:.2f} %",
                    ranking,
                    label,
                    f"{read[label]:.4f}",
                    f"{read[f'{label} (popularity rule)']:.4f}",
                    f"{read[f'{label} (ID level)']:.4f}",
                    spelt(read[f"{label} ratio"], *read[f"{label} ratio interval95"]),
                    f"{np.mean(controls):.3f}" if controls else "–",
                )
                table.add_row(*map(Text, cells))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())

"""Scores an artefact on held-out items: full ranking of the catalog, beside popularity and item-CF on the same split.

    python train/score.py --artefact runs/artefact --interactions interactions.parquet --out runs/evaluation.json

The split is the one that the artefact was trained on: its test part, or `--part valid`. Items are ranked, not ID
strings; what would be read if IDs were counted stands beside it. The folder `evaluation/` beside `--out` gets every
system's places case by case, for `llmrec compare`.
"""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.script import parser, run

if TYPE_CHECKING:
    from rich.console import Console
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
    max_users: int = field(default=0, metadata={"help": "Score only so many cases, drawn with the seed; 0: all."})
    any_split: bool = field(
        default=False,
        metadata={
            "help": "Score interactions that the artefact was not trained on; its training may hold their items."
        },
    )
    device: str | None = field(default=None, metadata={"help": "Default: a GPU if there is one."})
    seed: int = field(default=0, metadata={"help": "Of the cases that are drawn, and of the intervals."})


def make_parser() -> "TrlParser":
    return parser((ScoreArguments, ColumnArguments, SplitArguments), __doc__)


def main(arguments: ScoreArguments, names: ColumnArguments, splits: SplitArguments) -> None:
    import numpy as np
    import torch
    import transformers
    from rich.console import Console

    from llmrec.evaluation.baselines import ItemCF, Popularity
    from llmrec.evaluation.evaluation import evaluate
    from llmrec.evaluation.identifiers import Identifiers
    from llmrec.prompt import EVENT_COLUMNS
    from llmrec.recommender import Recommender
    from llmrec.sequence.histories import LoggedHistories
    from llmrec.sequence.recommender import SequenceRecommender
    from llmrec.storage import write_json
    from llmrec.tasks.events import LoggedEvents
    from llmrec.trained_split import trained_split

    begin = time.monotonic()
    recommender = Recommender.from_pretrained(arguments.artefact, arguments.revision, arguments.device)
    settings = recommender.settings
    log = names.read_interactions(arguments.interactions)
    split = trained_split(log, recommender.catalog, settings, splits, arguments.any_split)
    version = recommender.catalog.version
    if split.num_items < len(recommender.catalog):  # what came after the training is no candidate
        kept = recommender.catalog.with_retired(range(split.num_items, len(recommender.catalog)), True)
        if isinstance(recommender, SequenceRecommender):
            recommender = SequenceRecommender(recommender.model, kept, settings)
        else:
            recommender = Recommender(recommender.model, recommender.tokenizer, kept, recommender.prompt, settings)
    cases = None
    if arguments.max_users and arguments.max_users < len(split.targets(arguments.part)):
        drawn = np.random.default_rng(arguments.seed).permutation(len(split.targets(arguments.part)))
        cases = np.sort(drawn[: arguments.max_users])
    seeds = settings.seeds | {"users": arguments.seed}
    num_beams = max(arguments.num_beams or settings.num_beams, max(arguments.ks))
    versions = {module.__name__: str(module.__version__) for module in (torch, transformers)}
    evaluations = []
    for name, model in (("popularity", Popularity()), ("item-cf", ItemCF())):
        started = time.perf_counter()
        model.fit(split.train, split.num_items)
        cost = {"fit_seconds": round(time.perf_counter() - started, 3), "parameters": model.parameters}
        facts: dict[str, Any] = {"cost": cost}
        evaluations.append(
            evaluate(name, split, arguments.part, recommend=model.recommend, ks=arguments.ks, cases=cases, facts=facts)
        )
    lists: list[list[int]] = []
    sequence = recommender if isinstance(recommender, SequenceRecommender) else None
    shows_events = sequence is None and bool(recommender.prompt.attributes & set(EVENT_COLUMNS))
    events = LoggedEvents(split).of_cases(arguments.part, cases) if shows_events else None

    def recommend(histories: Any, k: int) -> list[list[int]]:
        if sequence is not None:
            logged = LoggedHistories(split, sequence.model.events).cases(arguments.part, cases)
            lists[:], _ = sequence.recommend_histories(logged, num_beams, progress=True)
            return [found[:k] for found in lists]
        rows = [history.tolist() for history in histories]
        # As many items as the search finds anyway: reading them as IDs may need more than k.
        lists[:], _ = recommender.recommend_rows(rows, num_beams, num_beams=num_beams, progress=True, events=events)
        return [found[:k] for found in lists]

    facts = {
        "seeds": seeds,
        "cost": settings.training.get("cost", {}) | {"device": str(recommender.model.device)},
        "settings": {
            "artefact": arguments.artefact,
            "revision": arguments.revision,
            "num_beams": num_beams,
            "training": settings.recipe or {"catalog": recommender.catalog.version},
        },
        "versions": versions,
    }
    evaluations.append(
        evaluate("llmrec", split, arguments.part, recommend=recommend, ks=arguments.ks, cases=cases, facts=facts)
    )
    systems: dict[str, dict[str, Any]] = {}
    for evaluation in evaluations:
        document = evaluation.document(seed=arguments.seed)
        if evaluation.system == "llmrec":
            counted = np.flatnonzero(evaluation.counted)
            chosen = np.arange(len(evaluation.counted)) if cases is None else cases
            histories = split.histories(arguments.part)
            identifiers = Identifiers.from_codes(quantised_codes(recommender))
            levels = identifiers.rank_lists(
                [lists[place] for place in counted],
                split.targets(arguments.part)[chosen[counted]],
                [histories[case] for case in chosen[counted]],
            )
            document["id_level"] = levels.document(
                evaluation.user_places()[counted],
                [(metric, k) for k in arguments.ks for metric in ("HR", "NDCG")],
                seed=arguments.seed,
            ) | {"shared_items": round(identifiers.sharing * split.num_items)}
        evaluation.save(Path(arguments.out).parent, document)
        systems[evaluation.system.replace("-", "_")] = document
    result: dict[str, Any] = {
        "split": split.content_hash,
        "protocol": dict(split.protocol),
        "part": arguments.part,
        "users": systems["llmrec"]["users"],
        "cases": systems["llmrec"]["cases"],
        "items": split.num_items,
        "systems": systems,
        "invalid_rate": max(document["invalid_rate"] for document in systems.values()),
        "duplicate_rate": max(document["duplicate_rate"] for document in systems.values()),
        "artefact": arguments.artefact,
        "catalog_version": version,
        "num_beams": num_beams,
        "seeds": seeds,
        "versions": systems["llmrec"]["versions"],
        "seconds": round(time.monotonic() - begin, 1),
    }
    write_json(arguments.out, result)
    show(Console(width=None if sys.stdout.isatty() else 140), result, arguments)


def quantised_codes(recommender: Any) -> Any:
    """(N, L) the codes as they were quantised: without the level that was appended to tell items apart.

    Codes that were made unique by moving items have no other form: their ID level is the item level, as
    it is of a sequence model, whose items have no other ID than their row.
    """
    codes = recommender.catalog.codes
    quantised = recommender.settings.training.get("semantic_ids", {}).get("arguments", {}).get("num_levels")
    return codes if quantised is None else codes[:, :quantised]


def show(console: "Console", result: dict[str, Any], arguments: ScoreArguments) -> None:
    """Metrics, slices and levels as tables."""
    from rich.table import Table

    systems = result["systems"]
    names = [f"{metric}@{k}" for k in arguments.ks for metric in ("HR", "NDCG")]
    table = Table("system", *names, "invalid", "duplicate", "beyond list")
    for name, document in systems.items():
        rates = (f"{document[rate]:.4f}" for rate in ("invalid_rate", "duplicate_rate", "beyond_list_share"))
        table.add_row(name, *(f"{document[metric]:.4f}" for metric in names), *rates)
    console.print(table)
    k = 10 if 10 in arguments.ks else arguments.ks[0]
    slices = Table("slice", "cases", *(f"{name} NDCG@{k}" for name in systems))
    for name, values in systems["llmrec"]["slices"].items():
        if not values["cases"]:
            continue
        scores = (f"{document['slices'][name][f'NDCG@{k}']:.4f}" for document in systems.values())
        slices.add_row(name, f"{values['cases']:,}", *scores)
    console.print(slices)
    level = systems["llmrec"]["id_level"]
    counted, more = level[f"HR@{k} (ID level)"], level[f"HR@{k} inflation"]
    if level["shared_items"]:
        console.print(
            f"HR@{k} of llmrec as some papers count it, by the quantiser's IDs: {counted:.4f}, which is {more:+.4f} "
            f"against items in random order ({level['shared_items']:,} items share an ID)."
        )
    else:
        console.print(f"Every item has an ID of its own: HR@{k} counted by IDs, as some papers do, is the same.")
    console.print(
        f"{result['cases']:,} cases of {result['users']:,} users, {result['items']:,} items"
        f"{f', {kept:,} cases kept apart' if (kept := systems['llmrec']['cases_kept_apart']) else ''}, "
        f"split {result['split'][:12]}: {arguments.out}",
        markup=False,
    )


if __name__ == "__main__":
    run(main, make_parser())

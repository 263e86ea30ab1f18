"""The work of `llmrec baseline`: reads and splits, fits one baseline, evaluates it, and says what came out."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import scipy
from rich.console import Console
from rich.table import Table
from rich.text import Text

from llmrec.cli.preparation import Sources
from llmrec.data.arguments import SplitArguments
from llmrec.data.items import Items
from llmrec.data.split import Part
from llmrec.evaluation.baselines.named import BASELINES, Baseline, Name, fit_on
from llmrec.evaluation.baselines.tuning import tune
from llmrec.evaluation.evaluation import METRICS, evaluate
from llmrec.exceptions import DataError
from llmrec.storage import write_json


@dataclass(frozen=True)
class Search:
    """How a baseline is tuned; see `llmrec.evaluation.baselines.tuning.tune`."""

    budget: int
    seconds: float
    metric: str


def score_baseline(
    name: Name,
    sources: Sources,
    arguments: SplitArguments,
    *,
    part: Part,
    ks: str,
    given: Sequence[str],
    embeddings: Path | None,
    expected_ties: bool,
    json_file: Path | None,
    out: Path | None,
    seed: int,
    search: Search | None,
) -> None:
    """Prints metrics with their intervals and slices; writes JSON where it was asked to.

    Args:
        name: which baseline.
        sources: interactions and items; items that only interactions name are added with a warning.
        arguments: the split.
        part: which cases.
        ks: cut-offs, by commas or spaces.
        given: parameters as `key=value`.
        embeddings: for text-knn, a folder of semantic_ids/embed.py; None embeds the texts.
        expected_ties: whether tied items count as the mean over their orders, instead of by the baseline's tie rule.
        json_file: for the result's document.
        out: a run folder for the evaluation, case by case.
        seed: of the bootstrap and of the grid's sample.
        search: how to tune; None takes the defaults and what was given.

    Raises:
        DataError: if the data cannot be read or split, or a parameter or a cut-off is none.
        ArtefactError: if the folder of embeddings is none.
    """
    console = Console(width=None if sys.stdout.isatty() else 140)
    notes = Console(stderr=True)
    entry, cutoffs = BASELINES[name], _cutoffs(ks)
    values = entry.parsed(given)
    if embeddings is not None and name != "text-knn":
        raise DataError(f"{name} uses no embeddings. Leave --embeddings out, or name text-knn.")
    interactions = sources.read_interactions()
    items = sources.read_items(interactions)
    split = arguments.make(interactions, items)
    settings: dict[str, Any] = {"tuned": search is not None, "ties": "expected" if expected_ties else "rule"}
    base: dict[str, Any] = {}
    if name == "text-knn":
        base["embeddings"], settings["embeddings"] = _embedded(items, embeddings, notes)

    def make(**parameters: Any) -> Baseline:
        return entry.make(**base, **values, **parameters)

    facts: dict[str, Any] = {"seeds": {"bootstrap": seed}, "versions": {"scipy": scipy.__version__}}
    if search is None:
        begun = time.perf_counter()
        model = fit_on(make(**({} if values else entry.fixed)), split)
        cost: dict[str, Any] = {"fit_seconds": round(time.perf_counter() - begun, 3)}
    else:
        progress = notes.is_terminal
        found = tune(make, entry.narrowed(values), split, search.metric, search.budget, search.seconds, seed, progress)
        model, facts["tuning"] = found.model, found.document()
        facts["seeds"]["tuning"] = seed
        spent = sum(trial.seconds for trial in found.trials)
        cost = {"fit_seconds": round(found.fit_seconds, 3), "tuning_seconds": round(spent, 3)}
        notes.print(
            f"Tuned: {len(found.trials)} of {found.configurations} configurations in {spent:.0f} s; the best has "
            f"{search.metric} {found.best.value:.4f} on validation with {_spelt(found.best.parameters)}",
            markup=False,
            highlight=False,
        )
    settings |= {parameter: getattr(model, parameter) for parameter in entry.types()}
    facts |= {"settings": settings, "cost": {**cost, "parameters": model.parameters, "device": "cpu"}}
    if search is not None and part == "valid":
        notes.print("These are the cases that the parameters were chosen on: the figures are too good.", style="red")
    ranked: dict[str, Any] = {"scores": model.scores} if expected_ties else {"recommend": model.recommend}
    evaluation = evaluate(name, split, part, ks=cutoffs, facts=facts, **ranked)
    document = evaluation.document(seed=seed)
    if json_file is not None:
        write_json(json_file, document)
    written = [json_file] if json_file else []
    if out is not None:
        written.append(evaluation.save(out, document))
    _show(console, document, cutoffs)
    if written:
        console.print(f"Written: {', '.join(map(str, written))}", markup=False, highlight=False, soft_wrap=True)


def _embedded(items: Items, folder: Path | None, notes: Console) -> tuple[npt.NDArray[np.float32], dict[str, Any]]:
    """(N, D) of the items' texts, and where they come from, which it says."""
    from llmrec.embedding import EmbeddingStore, encode_texts, resolve_model, static_embeddings

    if folder is not None:
        store = EmbeddingStore.load(folder)
        origin = {"folder": str(folder), **store.origin}
        vectors = store.rows(items.ids)
    else:
        model = resolve_model()
        origin = {"model": model.name, "weights_sha256": model.weights_sha256}
        texts = items.texts()
        vectors = static_embeddings(texts) if model.is_static else encode_texts(texts, model, progress=True)
    notes.print(
        f"{len(vectors):,} items embedded with {origin.get('model', 'an unnamed model')}"
        + (f", from {folder}" if folder else ""),
        markup=False,
        highlight=False,
    )
    return vectors, origin


def _cutoffs(text: str) -> tuple[int, ...]:
    parts = text.replace(",", " ").split()
    if not parts or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise DataError(f"{text!r} holds no cut-offs. Give whole numbers from 1 on, such as 5,10,20.")
    return tuple(sorted({int(part) for part in parts}))


def _spelt(parameters: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in parameters.items()) or "nothing to choose"


def _show(console: Console, document: Mapping[str, Any], ks: Sequence[int]) -> None:
    """The metrics with their intervals, the slices, and one line on what was measured."""
    title = Text(f"{document['system']} on {document['part']}, {document['protocol']['split']}")
    metrics = Table(title=title, title_justify="left")
    metrics.add_column("k", justify="right")
    for metric in METRICS:
        metrics.add_column(f"{metric}@k [95 %]", justify="right")
    for k in ks:
        row = [str(k)]
        for metric in METRICS:
            low, high = document[f"{metric}@{k} interval95"]
            row.append(f"{document[f'{metric}@{k}']:.4f} [{low:.4f}, {high:.4f}]")
        metrics.add_row(*map(Text, row))
    console.print(metrics)
    shown = [f"{metric}@{k}" for k in ks for metric in METRICS[:2]]
    slices = Table(title=Text("Slices"), title_justify="left")
    for column in ("slice", "cases", "share", *shown):
        slices.add_column(column, justify="left" if column == "slice" else "right")
    for name, found in document["slices"].items():
        if not found["cases"]:
            continue
        cells = [name, f"{found['cases']:,}", f"{found['share']:.1%}", *(f"{found[column]:.4f}" for column in shown)]
        slices.add_row(*map(Text, cells))
    console.print(slices)
    cost, settings = document["cost"], document["settings"]
    chosen = {name: value for name, value in settings.items() if name not in ("tuned", "ties", "embeddings")}
    apart = f" and {kept:,} kept apart" if (kept := document["cases_kept_apart"]) else ""
    for k in ks:
        if bounds := document.get(f"NDCG@{k} ties"):
            console.print(f"Ties leave NDCG@{k} between {bounds[0]:.4f} and {bounds[1]:.4f}.", highlight=False)
    console.print(
        f"{'Tuned' if settings['tuned'] else 'Not tuned'}: {_spelt(chosen)}. {document['users']:,} users, "
        f"{document['cases']:,} cases{apart}, {document['items']:,} items; {cost['fit_seconds']:.1f} s to fit, "
        f"{cost['parameters']:,} numbers, {cost['ms_per_request']:.2f} ms a request; split {document['split'][:12]}.",
        markup=False,
        highlight=False,
    )

"""The one builder of training rows: a mixture of tasks as a data set, in memory, cached or streamed."""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from llmrec.data.split import Part
from llmrec.examples import Row, next_item_rows
from llmrec.exceptions import DependencyError
from llmrec.prompt import EVENT_COLUMNS
from llmrec.tasks.mixture import Mixture, Plan
from llmrec.tasks.packed_rows import PackedRows
from llmrec.tasks.task_data import TaskData

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

_SHARDS = 64  # of a stream: so many workers can share it
_PATIENCE = 2.0  # seconds before a progress bar is shown


def build_rows(
    mixture: Mixture,
    data: TaskData,
    seed: int,
    cache_folder: str | Path | None = None,
    progress: bool = True,
) -> PackedRows:
    """The rows of a mixture, in the order of its seed; built once where they are cached.

    Args:
        mixture: how much of which task.
        data: what the rows are made of.
        seed: of templates, parts of tasks and order.
        cache_folder: holds a folder per content: whatever decides a row is in its name (`cache_key`). One that is
            torn or altered is built again.
        progress: whether a long build shows a bar.

    Raises:
        PromptError: if a template uses what is not there.
        DataError: if a task has no rows.
    """
    key = cache_key(mixture, data, seed) if cache_folder is not None else ""
    folder = None if cache_folder is None else Path(cache_folder) / key[:32]
    packed = None if folder is None else PackedRows.load(folder, key)
    if packed is None:
        from tqdm.auto import tqdm

        plan = Plan(mixture, data, seed)
        bar = tqdm(plan.rows(), desc="rows", total=len(plan), unit="row", delay=_PATIENCE, disable=not progress)
        packed = PackedRows.of(bar)
        if folder is not None:
            _keep(packed, folder, key)
    else:
        logger.info("the training rows are taken from %s", folder)
    for task, counted in packed.report().items():
        logger.info("%s: %s", task, ", ".join(f"{value:,} {name}" for name, value in counted.items()))
    return packed


def training_dataset(
    mixture: Mixture,
    data: TaskData,
    seed: int,
    cache_folder: str | Path | None = None,
    stream: bool = False,
    progress: bool = True,
) -> "datasets.Dataset | datasets.IterableDataset | list[Row]":
    """The rows of a mixture as what a trainer takes: columns input_ids, labels and task.

    Args:
        mixture, data, seed, cache_folder, progress: as for `build_rows`.
        stream: make every row when it is asked for, each time anew and without a cache: the same rows in the same
            order. Up to 64 workers share them.

    Returns:
        A `datasets.Dataset`, or an `IterableDataset` of a stream; a list where `datasets` is not installed.

    Raises:
        DependencyError: if a stream is asked for and `datasets` is not installed.
        PromptError, DataError: as for `build_rows`.
    """
    if stream:
        return _streamed(Plan(mixture, data, seed))
    packed = build_rows(mixture, data, seed, cache_folder, progress)
    try:
        return packed.dataset()
    except ImportError:
        return list(packed)


def next_item_cases(data: TaskData, part: Part, cases: Sequence[int] | None = None) -> Iterator[Row]:
    """One row per case of a part, asked by the served prompt, with its events and preferences if it shows them.

    Args:
        data: what the rows are made of.
        part: valid or test.
        cases: which of its cases, in this order; default: all.

    Raises:
        PromptError: if the prompt uses what a case does not have.
    """
    split = data.split
    histories, targets = split.histories(part), split.targets(part).tolist()
    chosen = range(len(targets)) if cases is None else cases
    yield from next_item_rows(
        data.prompt,
        data.catalog,
        [histories[case] for case in chosen],
        [targets[case] for case in chosen],
        data.text,
        data.start,
        data.max_history,
        data.case_events(part, chosen) if data.prompt.attributes & set(EVENT_COLUMNS) else None,
        list(data.case_variables(part, chosen)),
    )


def cache_key(mixture: Mixture, data: TaskData, seed: int) -> str:
    """sha256 of all that decides the rows: data, texts, templates, tokenizer, mixture, seed and code."""
    return hashlib.sha256(f"{data.content_hash}\n{mixture}\n{seed}".encode()).hexdigest()


def _keep(packed: PackedRows, folder: Path, key: str) -> None:
    """Saves rows for later runs, if it can be done: these are there already."""
    try:
        packed.save(folder, key)
    except (OSError, SafetensorError) as error:  # a full disk, or another process that wrote the same at the same time
        logger.warning("the training rows could not be kept in %s (%s)", folder, error)


def _streamed(plan: Plan) -> "datasets.IterableDataset":
    try:
        import datasets
    except ImportError as error:
        raise DependencyError(
            "Streamed rows need the package datasets, which is not installed. Install it, or build them in memory."
        ) from error
    cuts = [len(plan) * shard // _SHARDS for shard in range(_SHARDS + 1)]
    spans = [(begin, end) for begin, end in itertools.pairwise(cuts) if begin < end]
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "labels": datasets.List(datasets.Value("int32")),
            "task": datasets.Value("string"),
        }
    )
    # Its own from_generator would hash the whole catalog with everything else that the generator holds.
    examples = datasets.iterable_dataset.ExamplesIterable(_Shards(plan), {"spans": spans})
    return datasets.IterableDataset(examples, info=datasets.DatasetInfo(features=features))


class _Shards:
    """The generator of a stream: rows with their places."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def __call__(self, spans: Sequence[tuple[int, int]]) -> Iterator[tuple[int, Row]]:
        for begin, end in spans:
            yield from enumerate(self._plan.rows(begin, end), start=begin)

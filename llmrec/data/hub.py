"""A data set of the Hugging Face Hub, streamed in arrow batches."""

import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import polars as pl

from llmrec.data.shards import join_parts
from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError, DependencyError

logger = logging.getLogger(__name__)

PREFIX = "hub:"
_BATCH = 50_000
_BUILDERS = {
    **{".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".parquet": "parquet"}
}
_COMPRESSED = re.compile(r"\.(gz|zst|bz2|xz)$")


@dataclass(frozen=True)
class HubId:
    """What `hub:user/name/config@revision#split` names.

    Attributes:
        repository: `user/name`, or a folder on this machine that begins with `/` or `.`.
        config: a configuration of the data set, or the path of a file inside it (`data/reviews.csv`), or None.
        revision: a branch, tag or commit, or None.
        split: such as `train`, or None where there is but one.
    """

    repository: str
    config: str | None = None
    revision: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads the text after or with `hub:`; raises DataError if it names nothing.

        >>> HubId.parse("hub:ann/shop/small@v2#train")
        HubId(repository='ann/shop', config='small', revision='v2', split='train')
        """
        rest, _, split = text.removeprefix(PREFIX).partition("#")
        rest, _, revision = rest.partition("@")
        if rest.startswith(("/", ".")):
            return cls(rest, None, revision or None, split or None)
        parts = rest.split("/")
        if len(parts) < 2 or not all(parts):
            raise DataError(f"{text!r} names no data set. Write hub:user/name, hub:user/name/config@revision#split.")
        return cls("/".join(parts[:2]), "/".join(parts[2:]) or None, revision or None, split or None)


def open_hub(text: str) -> Table:
    """A data set of the Hub, of which rows travel when they are read, and only the columns asked for are kept.

    Args:
        text: `hub:user/name`, and where needed `/config` (or the path of a CSV, JSON or parquet file), `@revision`,
            `#split`.

    Raises:
        DataError: if the Hub cannot be reached, or has no such data set, configuration or split.
        DependencyError: if the package `datasets` is not installed.
    """
    hub_id = HubId.parse(text)
    streamed = _located(text, lambda: _stream(hub_id))
    columns = _located(text, lambda: _columns(streamed))

    def load(chosen: Sequence[str] | None) -> tuple[pl.DataFrame, Source]:
        wanted = columns if chosen is None else list(chosen)
        frames = _located(text, lambda: list(_batches(streamed, wanted, text)))
        if not frames:
            return pl.DataFrame(), Source(text)
        batches = [f"a batch of {text}"] * len(frames)
        return join_parts(frames, batches, text).select(wanted), Source(text)

    return Table(text, "Hub", columns, load)


def _stream(hub_id: HubId) -> Any:
    try:
        from datasets import Features, Value, load_dataset
    except ImportError as error:
        raise DependencyError(
            "Reading a data set of the Hub needs the package datasets. Install it with `pip install datasets`."
        ) from error

    suffix = "." + _COMPRESSED.sub("", hub_id.config or "").rpartition(".")[2]

    def load(**options: Any) -> Any:
        if hub_id.config is None or suffix not in _BUILDERS:
            found = load_dataset(hub_id.repository, hub_id.config, revision=hub_id.revision, streaming=True, **options)
        else:
            # By the format's own builder, because a repository that also holds a script is refused as a data set.
            url = f"hf://datasets/{hub_id.repository}@{hub_id.revision or 'main'}/{hub_id.config}"
            options |= {"sep": "\t"} if suffix == ".tsv" else {}
            found = load_dataset(_BUILDERS[suffix], data_files=url, streaming=True, **options)
        if hub_id.split is None and len(found) > 1:
            raise DataError(
                f"{hub_id.repository} has the splits {', '.join(found)}. Name one, such as "
                f"{PREFIX}{hub_id.repository}#{next(iter(found))}."
            )
        return found[hub_id.split or next(iter(found))]

    streamed = load()
    if streamed.info.builder_name != "csv":
        return streamed
    # As text: the ids of a CSV keep their zeros, which numbers would lose, and "NA" is an id like any other.
    texts = Features({name: Value("string") for name in _columns(streamed)})
    return load(features=texts, keep_default_na=False, na_filter=False)


def _columns(streamed: Any) -> list[str]:
    if streamed.column_names is not None:
        return list(streamed.column_names)
    # Some formats say their columns only with the first rows.
    for batch in streamed.with_format("arrow").iter(batch_size=1):
        return list(batch.column_names)
    return []


def _batches(streamed: Any, columns: Sequence[str], name: str) -> Iterator[pl.DataFrame]:
    from tqdm import tqdm

    # Without a terminal there is nobody to watch.
    with tqdm(desc=name, unit=" rows", unit_scale=True, disable=None) as progress:
        for batch in streamed.with_format("arrow").iter(batch_size=_BATCH):
            present = [column for column in columns if column in batch.column_names]
            progress.update(batch.num_rows)
            yield _frame(batch.select(present))


def _frame(batch: Any) -> pl.DataFrame:
    """A polars frame of an arrow table; what arrow extends comes as it is stored, JSON of mixed types as text."""
    import pyarrow as pa  # type: ignore[import-untyped]

    json_columns = []
    for place, field in enumerate(batch.schema):
        if isinstance(field.type, pa.BaseExtensionType):
            chunks = [chunk.storage for chunk in batch.column(place).chunks]
            batch = batch.set_column(place, field.name, pa.chunked_array(chunks, type=field.type.storage_type))
            if field.type.extension_name == "arrow.json":
                json_columns.append(field.name)
    frame = pl.from_arrow(batch)
    assert isinstance(frame, pl.DataFrame)
    for name in json_columns:
        stored = pl.col(name)
        texts = pl.when(stored.str.starts_with('"')).then(stored).str.json_decode(pl.String)
        frame = frame.with_columns(pl.coalesce(texts, pl.when(stored != "null").then(stored)).alias(name))
    return frame


def _located(name: str, read: Any) -> Any:
    """What `read` returns; everything that the Hub, the network or a builder may raise becomes a DataError."""
    try:
        return read()
    except (DataError, DependencyError):
        raise
    except Exception as error:  # the packages beneath share no root of their errors
        first = next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")
        raise DataError(
            f"{name} cannot be read from the Hub: {first} ({type(error).__name__}). Check the name, configuration, "
            "split, your login (hf auth login) and the network."
        ) from error

"""A folder of files that are one table in parts."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)


def open_shards(folder: Path, open_file: Callable[[Path], Table]) -> Table:
    """The files of a folder, one after another in natural order (part-2 before part-10), as one table.

    Names that begin with a dot or an underscore (_SUCCESS) are passed over, and so are files of no bytes or of a
    header alone, which are counted in a warning. All others must be of one format, compressed or not, and have the
    same columns, in any order; only JSON lines may lack some, which are null there.

    Args:
        folder: its own files are read, none of folders inside it.
        open_file: opens one file.

    Raises:
        DataError: if there is no file, one cannot be read, or one is of another kind; with its name.
    """
    entries = sorted(
        (f for f in folder.iterdir() if not f.name.startswith((".", "_"))), key=lambda f: _natural(f.name)
    )
    if not entries:
        raise DataError(f"There is no file in the folder {folder}. Give a folder of parquet, CSV or JSON lines.")
    for entry in entries:
        if not entry.is_file():
            raise DataError(f"{folder} holds {entry.name}, which is no file. Give one folder with all parts in it.")
    empty = [entry for entry in entries if entry.stat().st_size == 0]
    tables = [open_file(entry) for entry in entries if entry not in empty]
    if not tables:
        raise DataError(
            f"All {len(entries)} file(s) of {folder} are empty, such as {entries[0].name}. Fetch them again."
        )
    first = tables[0]
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    may_lack = first.kind == "json lines"
    for table in tables:
        if table.kind != first.kind:
            raise DataError(
                f"{table.name} is {table.kind}, but {first.name} is {first.kind}. Put files of one format into "
                f"{folder}, or give one of the two files."
            )
        if set(table.columns) != set(first.columns) and not may_lack:
            odd = sorted(set(table.columns) ^ set(first.columns))
            raise DataError(
                f"{table.name} and {first.name} differ in the column(s) {', '.join(map(repr, odd))}. Give every file "
                f"of {folder} the same columns, or give one of the two files."
            )

    def load(chosen: Sequence[str] | None) -> tuple[pl.DataFrame, Source]:
        wanted = columns if chosen is None else list(chosen)
        frames, parts = [], []
        bare = [str(entry) for entry in empty]
        for table in tables:
            names = [name for name in wanted if name in table.columns]
            if not names:
                # JSON lines without any of these columns: the rows count, and hold nothing.
                frame, source = table.load(table.columns[:1])
                frame = pl.DataFrame({wanted[0]: pl.repeat(None, frame.height, dtype=pl.Null, eager=True)})
            else:
                frame, source = table.load(None if chosen is None else names)
            if frame.height == 0:
                bare.append(table.name)
                continue
            frames.append(frame)
            parts.append((source, frame.height))
        if bare:
            logger.warning("%s: %d file(s) hold no rows, such as %s", folder, len(bare), bare[0])
        if not frames:
            return pl.DataFrame(), Source(str(folder))
        try:
            joined = pl.concat(frames, how="diagonal_relaxed", rechunk=False)
        except PolarsError as error:
            raise DataError(
                f"The files of {folder} hold columns of types that do not join: {str(error).splitlines()[0]}. Write "
                "every column with one type."
            ) from error
        return joined.select(wanted), Source.joined(str(folder), parts)

    return Table(str(folder), first.kind, columns, load)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts digits by their value: part-2 comes before part-10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(piece), "") if piece.isascii() and piece.isdigit() else (0, 0, piece) for piece in pieces] + [
        (0, 0, name)
    ]

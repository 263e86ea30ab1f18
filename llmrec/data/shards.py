"""A folder of files that are one table in parts."""

import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import polars as pl
from polars.exceptions import PolarsError

from llmrec.data.source import Source, Table
from llmrec.data.values import EXACT, decimal_text, whole_floats
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

_TEXT = (pl.String, pl.Categorical, pl.Enum)


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
        joined = join_parts(frames, [str(source) for source, _ in parts], str(folder))
        return joined.select(wanted), Source.joined(str(folder), parts)

    return Table(str(folder), first.kind, columns, load)


def join_parts(frames: Sequence[pl.DataFrame], names: Sequence[str], whole: str) -> pl.DataFrame:
    """Tables one after another, of which a column may have one type here and another there; an absent one is null.

    A float where other parts have text or integers is what a tool made of an integer when it met a gap: 7.0 becomes
    7, by the value where there is text, and by the column where all its numbers are whole and there are integers.

    Args:
        frames: one table per part.
        names: the parts' names, for messages.
        whole: the name of all, for messages.

    Raises:
        DataError: if types do not join, or a float beside text is so long that its last digits are lost.
    """
    schemas = [frame.schema for frame in frames]
    for column in dict.fromkeys(name for schema in schemas for name in schema):
        kinds = {schema[column] for schema in schemas if column in schema} - {pl.Null()}
        if len(kinds) == 1:
            continue
        text = any(isinstance(kind, _TEXT) for kind in kinds)
        exact = any(kind.is_integer() or kind.is_decimal() for kind in kinds)
        if text or exact:
            alike = _as_text if text else _as_integers
            frames = [
                frame.with_columns(alike(frame[column], name)) if column in frame.columns else frame
                for frame, name in zip(frames, names, strict=True)
            ]
    try:
        return pl.concat(frames, how="diagonal_relaxed", rechunk=False)
    except PolarsError as error:
        raise DataError(
            f"The parts of {whole} hold columns of types that do not join: {str(error).splitlines()[0]}. Write every "
            "column with one type."
        ) from error


def _as_integers(values: pl.Series, _: str) -> pl.Series:
    return whole_floats(values) if values.dtype.is_float() else values


def _as_text(values: pl.Series, name: str) -> pl.Series:
    """Floats and decimals as text without a fraction that is zero, words of a list as text; else as it is."""
    if values.dtype.is_decimal():
        return decimal_text(values)
    if not values.dtype.is_float():
        return values.cast(pl.String) if isinstance(values.dtype, _TEXT) else values
    known = values.cast(pl.Float64).fill_nan(None)
    whole = ((known == known.floor()) & known.is_finite()).fill_null(False)
    if (long := whole & (known.abs() >= EXACT).fill_null(False)).any():
        row = int(long.arg_max() or 0)
        raise DataError(
            f"{Source(name).at(row, len(long))}: {values.name} is {values[row]!r}, too long for a float, and other "
            f"parts hold text ({long.sum()} such row(s)). Write every part's column as text."
        )
    integers = known.set(~whole, None).cast(pl.Int64).cast(pl.String)
    return known.cast(pl.String).set(whole, None).zip_with(~whole, integers)


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Sorts digits by their value: part-2 comes before part-10."""
    pieces = re.split(r"([0-9]+)", name)
    return [(1, int(piece), "") if piece.isascii() and piece.isdigit() else (0, 0, piece) for piece in pieces] + [
        (0, 0, name)
    ]

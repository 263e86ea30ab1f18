"""Reading a table that a user brought: parquet, CSV, TSV or JSON lines, compressed or not; every fault is located."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NoReturn

import polars as pl
from polars.exceptions import PolarsError

from llmrec.exceptions import DataError

Format = Literal["parquet", "delimited", "jsonl"]

_SEPARATORS = (",", "\t", ";", "|")
_TEXT_FORMATS: dict[str, Format] = {
    ".csv": "delimited",
    ".tsv": "delimited",
    ".tab": "delimited",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
}
_READABLE = "Give parquet, CSV, TSV or JSON lines (.gz or .zst if you like), in UTF-8 and with a header"


def read_table(path: str | Path) -> pl.DataFrame:
    """Reads a table, its format known by the file's first bytes and then by its name.

    Delimited files are read as strings throughout, so that the id 007 keeps its zeros; their separator is the comma,
    tab, semicolon or bar that the header has.

    Raises:
        DataError: if there is no such file, or it is empty, not UTF-8, torn or of another format; with the line.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path; a folder of files has to be joined into one first.")
    with open(path, "rb") as file:
        magic = file.read(4)
    if not magic:
        raise DataError(f"{path} is empty. {_READABLE}.")
    try:
        kind, separator = ("parquet", "") if magic == b"PAR1" else _text_format(path)
        if kind == "parquet":
            frame = pl.read_parquet(path, glob=False)  # a path is a name here, not a pattern
        elif kind == "jsonl":
            frame = pl.read_ndjson(path.read_bytes(), infer_schema_length=None)
        else:
            frame = pl.read_csv(path, separator=separator, infer_schema=False, glob=False)
            # What polars calls the second of two columns of one name.
            if twins := [n for n in frame.columns if n.partition("_duplicated_")[2].isdigit()]:
                name = twins[0].partition("_duplicated_")[0]
                raise DataError(f"{path} has the column {name!r} more than once. Rename or remove one of them.")
    except (PolarsError, OSError, EOFError) as error:
        _raise_located(path, error)
    if frame.width == 0 or frame.height == 0:
        raise DataError(f"{path} has no rows. {_READABLE}.")
    return frame


def read_ids(frame: pl.DataFrame, column: str, source: str) -> pl.Series:
    """The column as strings, digits as they stand; raises DataError, with the row, for an id that is null or empty."""
    values = frame[column]
    if values.dtype.is_float():
        # A column of whole numbers becomes float when a tool met a gap in it: 7.0 is the id 7.
        values = values.fill_nan(None)
        fractions = values.is_infinite() | (values != values.floor())
        if fractions.fill_null(False).any():
            row = int(fractions.fill_null(False).arg_max() or 0)
            raise DataError(
                f"{source}, row {row + 1}: {column} is {values[row]}, which is no id. Write ids as text or integers."
            )
        huge = (values.abs() >= 2**53).fill_null(False)
        if huge.any():
            row = int(huge.arg_max() or 0)
            raise DataError(
                f"{source}, row {row + 1}: {column} is {values[row]:.0f}, too long for a float. "
                "Write ids as text or integers."
            )
        values = values.cast(pl.Int64)
    elif not (values.dtype.is_integer() or values.dtype in (pl.String, pl.Categorical, pl.Enum, pl.Null)):
        raise DataError(
            f"{source}: {column} holds {values.dtype}, which is no id. Write ids as text or integers, or remap the "
            "column."
        )
    ids = values.cast(pl.String)
    absent = ids.is_null() | (ids.str.strip_chars() == "").fill_null(True)
    if absent.any():
        row = int(absent.arg_max() or 0)
        raise DataError(
            f"{source}, row {row + 1} of {len(ids)}: {column} is {ids[row]!r}, which is no id "
            f"({absent.sum()} such row(s)). Remove these rows or fill them in."
        )
    return ids


def read_numbers(frame: pl.DataFrame, column: str, source: str) -> pl.Series:
    """The column as Int64, or Float64 if it holds fractions; dates become unix seconds, an empty value or NaN null.

    Raises:
        DataError: if a value is no finite number, with the row and the value.
    """
    values = frame[column]
    if values.dtype in (pl.Date, pl.Datetime):
        numbers = values.cast(pl.Datetime("us")).dt.epoch("us") / 1e6
    elif values.dtype == pl.String:
        text = values.str.strip_chars().replace("", None)
        numbers = text.cast(pl.Int64, strict=False)
        if numbers.null_count() > text.null_count():
            numbers = text.cast(pl.Float64, strict=False)
            _refuse(numbers.is_null() & text.is_not_null(), values, column, source)
    elif values.dtype.is_numeric() or values.dtype == pl.Null:
        numbers = values if values.dtype.is_float() else values.cast(pl.Int64)
    else:
        raise DataError(
            f"{source}: {column} holds {values.dtype}, which is no number. Write unix seconds, or remap the column."
        )
    if not numbers.dtype.is_float():
        return numbers
    numbers = numbers.cast(pl.Float64).fill_nan(None)
    _refuse(numbers.is_infinite().fill_null(False), values, column, source)
    whole = (numbers == numbers.floor()).fill_null(True).all() and (numbers.abs() < 2**53).fill_null(True).all()
    return numbers.cast(pl.Int64) if whole else numbers


def _refuse(wrong: pl.Series, values: pl.Series, column: str, source: str) -> None:
    if wrong.any():
        row = int(wrong.arg_max() or 0)
        raise DataError(
            f"{source}, row {row + 1} of {len(values)}: {column} is {values[row]!r}, which is no number "
            f"({wrong.sum()} such row(s)). Write numbers, such as unix seconds, or leave the value empty."
        )


def _text_format(path: Path) -> tuple[Format, str]:
    """The format of a text file and, if it is delimited, its separator."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    # One column by a separator that no text has: polars decompresses, and hands over the first line.
    first = pl.read_csv(
        path,
        has_header=False,
        n_rows=1,
        separator="\x1f",
        quote_char=None,
        infer_schema=False,
        truncate_ragged_lines=True,
        glob=False,
    )
    line = str(first.item(0, 0) or "") if first.height else ""
    default: Format = "jsonl" if line.lstrip().startswith(("{", "[")) else "delimited"
    kind = _TEXT_FORMATS.get(suffixes[-1] if suffixes else "", default)
    preferred = ("\t", *_SEPARATORS) if suffixes[-1:] in ([".tsv"], [".tab"]) else _SEPARATORS
    return kind, next((separator for separator in preferred if separator in line), preferred[0])


def _raise_located(path: Path, error: Exception) -> NoReturn:
    """Turns a reader's error into one that names the line; reads the file once more, which only a failure pays for."""
    is_json = any(_TEXT_FORMATS.get(suffix.lower()) == "jsonl" for suffix in path.suffixes)
    try:
        for number, line in enumerate(_lines(path), start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as fault:
                shown = line[max(0, fault.start - 10) : fault.start + 10]
                raise DataError(
                    f"{path}, line {number}: {shown!r} is not UTF-8. Convert the file, for example with iconv."
                ) from error
            is_json = is_json or (number == 1 and text.lstrip().startswith("{"))
            if is_json and text.strip():
                _check_object(path, number, text, error)
    except (OSError, EOFError) as fault:
        raise DataError(f"{path} cannot be decompressed: {fault}. Fetch it again; it may be cut short.") from error
    raise DataError(f"{path} cannot be read: {str(error).splitlines()[0]}. {_READABLE}.") from error


def _check_object(path: Path, number: int, line: str, error: Exception) -> None:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as fault:
        raise DataError(
            f"{path}, line {number}: {line.strip()[:80]!r} is not JSON ({fault.msg}). Write one object a line."
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, line {number}: {line.strip()[:80]!r} is no JSON object. Write one object a line."
        ) from error


def _lines(path: Path) -> Iterator[bytes]:
    with open(path, "rb") as file:
        magic = file.read(4)
    if magic in (b"PAR1", b"\x28\xb5\x2f\xfd"):  # no lines to look at
        return
    with gzip.open(path, "rb") if magic[:2] == b"\x1f\x8b" else path.open("rb") as lines:
        yield from lines

"""Lines of text files, compressed or not: the first ones, all of them, and the one that a reader stumbled over."""

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import polars as pl
from polars.exceptions import PolarsError

from llmrec.exceptions import DataError

ZSTD = b"\x28\xb5\x2f\xfd"
GZIP = b"\x1f\x8b"
READABLE = (
    "Give parquet, CSV, TSV or JSON lines (.gz or .zst if you like), in UTF-8 and with a header, or RecBole's, "
    "MovieLens' or Amazon's own files"
)
# What reading a damaged file raises: polars, gzip, and the file system.
READING_ERRORS = (PolarsError, pl.exceptions.PanicException, OSError, EOFError, zlib.error)
# A character that no text has: polars then sees one column, and does the decompression.
_NO_SEPARATOR = "\x1f"
_HEAD = 1 << 20
_SHOWN = 80
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def magic_of(path: Path) -> bytes:
    """A file's first four bytes, by which formats are known."""
    with open(path, "rb") as file:
        return file.read(4)


def scan_lines(path: Path, latin1: bool = False) -> pl.LazyFrame:
    """A file's lines as one column, `line`; a line without text is null. In Latin-1 the file is read whole."""
    content: Path | bytes = path
    if latin1:
        content = b"".join(iterate_lines(path)).decode("latin1").encode()
    return pl.scan_csv(
        content,
        has_header=False,
        separator=_NO_SEPARATOR,
        quote_char=None,
        schema={"line": pl.String},
        glob=False,
        truncate_ragged_lines=True,
    )


def first_lines(path: Path, number: int = 1) -> list[str]:
    """The first lines that hold text, without their ends; what is not UTF-8 in them is replaced.

    Raises:
        DataError: if a NUL byte or the mark of UTF-16 says that they are no text in UTF-8.
    """
    found = []
    read = 0
    for line in iterate_lines(path):
        if b"\0" in line or (not read and line.startswith(_UTF16)):
            wide = line.startswith(_UTF16) or line.count(b"\0") * 3 > len(line)
            raise DataError(
                f"{path} is not UTF-8: its beginning holds {line[:20]!r}. "
                + ("It reads like UTF-16: convert it with iconv -f UTF-16 -t UTF-8." if wide else f"{READABLE}.")
            )
        read += len(line)
        text = line.decode("utf-8", errors="replace").lstrip("\ufeff").rstrip("\r\n")
        if text.strip():
            found.append(text)
        if len(found) == number or read > _HEAD:
            break
    return found


def iterate_lines(path: Path) -> Iterator[bytes]:
    """A file's lines, one after another, decompressed; raises OSError, EOFError or zlib.error for a damaged file."""
    magic = magic_of(path)
    if magic == ZSTD:
        import pyarrow as pa  # type: ignore[import-untyped]

        try:
            # Before Python 3.14 the standard library has no zstd.
            with pa.input_stream(str(path), compression="zstd") as stream, io.BufferedReader(stream) as lines:
                yield from lines
        except pa.ArrowException as error:
            raise OSError(str(error)) from error
        return
    with gzip.open(path, "rb") if magic[:2] == GZIP else path.open("rb") as lines:
        yield from lines


def raise_located(path: Path, error: Exception, is_json: bool = False, separator: str | None = None) -> NoReturn:
    """Turns a reader's error into one that names the line; reads the file once more, which only a failure pays for.

    Args:
        path: what was read.
        error: what the reader raised.
        is_json: whether every line should be a JSON object; found by the first line, too.
        separator: that of delimited text, of which every line should have the fields of the first.

    Raises:
        DataError: always.
    """
    magic = magic_of(path)
    try:
        for number, line in enumerate(iterate_lines(path) if magic != b"PAR1" else (), start=1):
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
    except READING_ERRORS as fault:
        raise DataError(
            f"{path} cannot be decompressed: {_first_line(fault)}. Fetch it again; it may be cut short."
        ) from error
    if separator is not None and not is_json:
        _check_fields(path, separator, error)
    raise DataError(f"{path} cannot be read: {_first_line(error)}. {READABLE}.") from error


def _check_fields(path: Path, separator: str, error: Exception) -> None:
    """Names the record that has more fields than the first, or whose quotes do not close."""
    begin, width = 1, 0
    lines = (line.decode("utf-8").removeprefix("\ufeff") for line in iterate_lines(path))
    records = csv.reader(lines, delimiter=separator, strict=True)
    try:
        for record in records:
            width = width or len(record)
            if len(record) > width:
                raise DataError(
                    f"{path}, line {begin}: {separator.join(record)[:_SHOWN]!r} has {len(record)} fields, but the "
                    f"first line has {width}. Remove what is too much, or put a field that holds {separator!r} into "
                    "double quotes."
                ) from error
            begin = records.line_num + 1
    except csv.Error as fault:
        line = next(itertools.islice(iterate_lines(path), begin - 1, None)).decode("utf-8").strip()
        raise DataError(
            f"{path}, line {begin}: {line[:_SHOWN]!r} has a quote that does not close, or not at a field's end "
            f"({fault}). Write a quote inside a quoted field twice, or remove it."
        ) from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__).rstrip(".")


def _check_object(path: Path, number: int, line: str, error: Exception) -> None:
    try:
        value = json.loads(line)
        # Python reads what JSON has not, but refuses to write it.
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as fault:
        why = fault.msg if isinstance(fault, json.JSONDecodeError) else type(fault).__name__
        if type(fault) is ValueError:
            why = "NaN, infinity, or a number that no float holds: write null"
        raise DataError(
            f"{path}, line {number}: {line.strip()[:_SHOWN]!r} is not JSON ({why}). Write one object a line."
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            f"{path}, line {number}: {line.strip()[:_SHOWN]!r} is no JSON object. Write one object a line."
        ) from error

"""JSON lines, also where a field's type changes from line to line, and lines that are Python literals."""

import ast
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import polars as pl
from polars.exceptions import PolarsError

from llmrec.data.lines import READING_ERRORS, iterate_lines, raise_located
from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError

_LITERAL_ERRORS = (ValueError, SyntaxError, RecursionError, MemoryError, TypeError)


def open_json_lines(path: Path) -> Table:
    """A file of one JSON object a line; a field that a line lacks is null there.

    Types are those that all lines agree on. A field that is a number here and text there is text; one that is text
    here and a list or an object there is text too, the latter as JSON. Objects are JSON text where the whole table is
    read, because their keys may differ in every line.

    Raises:
        DataError: if a line is no JSON object, with its number.
    """
    return _open(path, path, path)


def open_literals(path: Path) -> Table:
    """A file of one Python dict literal a line, as Amazon's metadata of 2014 is; it is converted to JSON lines first.

    The lines are parsed as literals (ast.literal_eval), and never run.

    Raises:
        DataError: if a line is no such literal, with its number.
    """
    folder = tempfile.TemporaryDirectory(prefix="llmrec-")
    converted = Path(folder.name) / "converted.jsonl"
    try:
        with open(converted, "w", encoding="utf-8") as file:
            for number, row in _literals(path):
                try:
                    file.write(json.dumps(row, allow_nan=False) + "\n")
                except (TypeError, ValueError, RecursionError) as error:
                    raise DataError(
                        f"{path}, line {number}: the literal holds what JSON cannot ({error}). Keep text, numbers, "
                        "lists and dicts alone."
                    ) from error
        # The folder goes when the table does, because the table's function holds it.
        return _open(path, converted, folder)
    except READING_ERRORS as error:
        raise_located(path, error)


def _literals(path: Path) -> Iterator[tuple[int, dict[Any, Any]]]:
    for number, line in enumerate(iterate_lines(path), start=1):
        try:
            text = line.decode("utf-8").strip()
            if not text:
                continue
            row = ast.literal_eval(text)
        except UnicodeDecodeError as error:
            raise_located(path, error)
        except _LITERAL_ERRORS as error:
            raise DataError(
                f"{path}, line {number}: {line.strip()[:80]!r} is neither JSON nor a Python literal. Write one JSON "
                "object a line."
            ) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: {text[:80]!r} is no dict. Write one object a line.")
        yield number, row


def _open(path: Path, content: Path, keep: object) -> Table:
    try:
        schema = _schema(content)
    except READING_ERRORS as error:
        raise_located(path, error, is_json=True)

    def load(columns: Sequence[str] | None, _: object = keep) -> tuple[pl.DataFrame, Source]:
        def scanned(types: dict[str, pl.DataType]) -> pl.DataFrame:
            wanted = {name: types[name] for name in schema if columns is None or name in columns}
            if columns is None:
                wanted = {name: pl.String() if _has_objects(kind) else kind for name, kind in wanted.items()}
            return _scan(content, schema=wanted).collect(engine="streaming")

        try:
            try:
                frame = scanned(schema)
            except PolarsError as error:
                # Polars may find a type for all lines that does not hold all their values.
                frame = scanned(_mixed_schema(content, error))
        except READING_ERRORS as error:
            raise_located(path, error, is_json=True)
        return frame, Source(str(path))

    return Table(str(path), "json lines", list(schema), load)


def _scan(path: Path, schema: dict[str, pl.DataType] | None = None) -> pl.LazyFrame:
    name = str(path)
    if any(character in name for character in "*?["):
        # A path is a name here, not a pattern, which polars knows of no way to say but this one.
        return pl.scan_ndjson(path.read_bytes(), schema=schema, infer_schema_length=None)
    return pl.scan_ndjson(path, schema=schema, infer_schema_length=None)


def _schema(path: Path) -> dict[str, pl.DataType]:
    """Names and types over all lines, in order of first appearance."""
    try:
        return dict(_scan(path).collect_schema())
    except PolarsError as error:
        return _mixed_schema(path, error)


def _mixed_schema(path: Path, error: Exception) -> dict[str, pl.DataType]:
    """The same where polars finds no common type: a pass over the lines that keeps nothing but the kinds of values."""
    kinds: dict[str, set[str]] = {}
    for line in iterate_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise error from None  # the caller finds the line and names it
        if not isinstance(row, dict):
            raise error
        for name, value in row.items():
            kinds.setdefault(name, set()).add(_kind(value))
    return {name: _type_of(found - {"null"}) for name, found in kinds.items()}


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "long"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list):
        inner = {_kind(part) for part in value} - {"null"}
        if inner <= {"int", "float"}:
            return "numbers" if inner else "nothing"
        return "texts" if inner == {"text"} else "mixture"
    return "text" if isinstance(value, str) else "object"


def _type_of(kinds: set[str]) -> pl.DataType:
    if not kinds:
        return pl.Null()
    if kinds <= {"int", "float"}:
        return pl.Int64() if kinds == {"int"} else pl.Float64()
    if kinds == {"bool"}:
        return pl.Boolean()
    if kinds <= {"numbers", "nothing"}:
        return pl.List(pl.Float64())
    if kinds <= {"texts", "nothing"}:
        return pl.List(pl.String())
    return pl.String()


def _has_objects(kind: pl.DataType) -> bool:
    if isinstance(kind, pl.List | pl.Array):
        return _has_objects(kind.inner)  # type: ignore[arg-type]
    return isinstance(kind, pl.Struct)

"""Opening whatever a user brought: a file of any known format, a folder of files, or a data set of the Hub."""

import ast
import json
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from llmrec.data.amazon import is_ratings_only, open_ratings_only
from llmrec.data.delimited import open_delimited, separator_of
from llmrec.data.hub import PREFIX, open_hub
from llmrec.data.json_lines import open_json_lines, open_literals
from llmrec.data.lines import GZIP, READABLE, READING_ERRORS, ZSTD, first_lines, magic_of, raise_located
from llmrec.data.movielens import layout_of, open_movielens
from llmrec.data.recbole import is_typed, open_atomic
from llmrec.data.shards import open_shards
from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError

_JSON = (".jsonl", ".ndjson", ".json")
_DELIMITED = (".csv", ".tsv", ".tab", ".inter", ".item", ".user")
_TABBED = (".tsv", ".tab", ".inter", ".item", ".user")


def open_table(path: str | Path) -> Table:
    """Opens a table without reading its rows; the format is known by the first bytes, the name and the first line.

    | source | known by |
    |---|---|
    | a data set of the Hub | `hub:user/name`, then where needed `/config`, `@revision`, `#split` |
    | a folder of files of one format | being a folder |
    | parquet | its first bytes |
    | JSON lines | `.jsonl`, `.ndjson`, `.json`, or a first character `{` |
    | Python literals, a dict a line (Amazon's metadata of 2014) | a first line that is one and no JSON |
    | RecBole's atomic files | a header of `name:token`, `:token_seq`, `:float` and `:float_seq` |
    | MovieLens 1M and 10M; 100K | `::` in the first line; the names `u.data`, `u.item`, `u.user` |
    | Amazon's ratings alone | a first line of two ids, a rating and a time |
    | CSV, TSV, also by semicolons or bars | all else; with a header |

    Text may be compressed by gzip or zstd, which its first bytes say.

    Raises:
        DataError: if there is no such file, or it is empty, not UTF-8, torn or of another format; with the line.
        DependencyError: if a Hub id is given and `datasets` is not installed.
    """
    if str(path).startswith(PREFIX):
        return open_hub(str(path))
    path = Path(path)
    if path.is_dir():
        return open_shards(path, _open_file)
    if not path.is_file():
        raise DataError(f"There is no file {path}. Check the path, or write hub:user/name for a data set of the Hub.")
    return _open_file(path)


def read_table(path: str | Path) -> pl.DataFrame:
    """All columns of a table, in file order; raises as `open_table` does, and DataError if it has no rows."""
    return open_table(path).read()[0]


def _open_file(path: Path) -> Table:
    try:
        magic = magic_of(path)
        if not magic:
            raise DataError(f"{path} is empty. {READABLE}.")
        return _open_parquet(path) if magic == b"PAR1" else _open_text(path, magic)
    except READING_ERRORS as error:
        raise_located(path, error)


def _open_parquet(path: Path) -> Table:
    def load(columns: Sequence[str] | None) -> tuple[pl.DataFrame, Source]:
        try:
            lazy = pl.scan_parquet(path, glob=False)
            lazy = lazy if columns is None else lazy.select(list(columns))
            return lazy.collect(engine="streaming"), Source(str(path))
        except READING_ERRORS as error:
            raise_located(path, error)

    return Table(str(path), "parquet", pl.scan_parquet(path, glob=False).collect_schema().names(), load)


def _open_text(path: Path, magic: bytes) -> Table:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst") and (magic[:2] == GZIP or magic == ZSTD):
        suffixes.pop()
    suffix = suffixes[-1] if suffixes else ""
    line = next(iter(first_lines(path)), "")
    if not line:
        raise DataError(f"{path} has no rows. {READABLE}.")
    if suffix in _JSON or (suffix not in _DELIMITED and line.lstrip().startswith(("{", "["))):
        return open_literals(path) if _is_literal(line) else open_json_lines(path)
    if layout := layout_of(path, line):
        return open_movielens(path, layout)
    separator = separator_of(line, prefer_tab=suffix in _TABBED)
    if is_typed(line, separator):
        return open_atomic(path, separator)
    if is_ratings_only(line, separator):
        return open_ratings_only(path, separator)
    return open_delimited(path, separator)


def _is_literal(line: str) -> bool:
    """Whether a line is a Python dict and no JSON, which differ in quotes and in True, False and None."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return line.lstrip()[1:].lstrip().startswith("'") or _parses(line)
    return False


def _parses(line: str) -> bool:
    try:
        return isinstance(ast.literal_eval(line.strip()), dict)
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
        return False

"""MovieLens' own files: `::` between fields (1M, 10M), and the nameless columns of 100K."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl

from llmrec.data.columns import ITEM, RATING, TIMESTAMP, TITLE, USER
from llmrec.data.lines import READING_ERRORS, raise_located, scan_lines
from llmrec.data.source import Source, Table
from llmrec.exceptions import DataError

logger = logging.getLogger(__name__)

_GENRES = (
    *("unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama"),
    *("Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western"),
)
_RATINGS = (USER, ITEM, RATING, TIMESTAMP)
# By the name's end and the fields of a line. A title may hold the separator, so it takes what the others leave.
_LAYOUTS: dict[str, tuple[tuple[str, ...], str]] = {
    "ratings": (_RATINGS, r"^(.*?)::(.*?)::(.*?)::(.*?)$"),
    "tags": ((USER, ITEM, "tag", TIMESTAMP), r"^(.*?)::(.*?)::(.*)::(.*?)$"),
    "movies": ((ITEM, TITLE, "genres"), r"^(.*?)::(.*)::(.*?)$"),
    "users": ((USER, "gender", "age", "occupation", "zip_code"), r"^(.*?)::(.*?)::(.*?)::(.*?)::(.*?)$"),
    "u.data": (_RATINGS, r"^([^\t]*)\t([^\t]*)\t([^\t]*)\t([^\t]*)$"),
    "u.item": (
        (ITEM, TITLE, "release_date", "video_release_date", "imdb_url", *_GENRES),
        r"^([^|]*)\|(.*)\|" + r"\|".join([r"([^|]*)"] * 22) + "$",
    ),
    "u.user": ((USER, "age", "gender", "occupation", "zip_code"), r"^" + r"\|".join([r"([^|]*)"] * 5) + "$"),
}
_OLD_NAMES = re.compile(r"^u(?:[1-5ab])?\.(data|item|user|base|test)$")


def layout_of(path: Path, line: str) -> str | None:
    """Which of MovieLens' files this is, by its name and its first line, or None for another kind of file."""
    name = re.sub(r"\.(gz|zst)$", "", path.name.lower())
    old = _OLD_NAMES.match(name)
    if old:
        layout = {"base": "u.data", "test": "u.data"}.get(old[1], f"u.{old[1]}")
        found = re.match(_LAYOUTS[layout][1], line)
        # A header is none of these files' first lines.
        return layout if found and (layout != "u.data" or found[4].strip().isdigit()) else None
    if "::" not in line or line.lstrip().startswith("{"):
        return None
    fields = line.split("::")
    if name.startswith("movies") or (len(fields) == 3 and name.endswith(".dat")):
        return "movies"
    if name.startswith("tags") and len(fields) >= 4:
        return "tags"
    if len(fields) == 4:
        return "ratings" if re.fullmatch(r"\d+(\.\d+)?", fields[2].strip()) else "tags"
    return "users" if len(fields) == 5 else None


def open_movielens(path: Path, layout: str) -> Table:
    """One of MovieLens' files, by the name that `layout_of` gave it; genres become a list.

    Titles in Latin-1, as GroupLens published them, are read as such if the file is not UTF-8, which is logged.

    Raises:
        DataError: if it cannot be read, or a line has not the layout's fields, with its row.
    """
    names, pattern = _LAYOUTS[layout]
    columns = [name for name in names if name not in _GENRES]
    if layout == "u.item":
        columns.append("genres")

    def load(chosen: Sequence[str] | None) -> tuple[pl.DataFrame, Source]:
        source = Source(str(path))
        wanted = columns if chosen is None else list(chosen)
        fields = [name for name in names if name in wanted or ("genres" in wanted and name in _GENRES)]
        try:
            try:
                frame = _fields(scan_lines(path), names, pattern, fields)
            except pl.exceptions.ComputeError as error:
                if "utf-8" not in str(error).lower():
                    raise
                logger.info("%s: not UTF-8, so it is read as Latin-1", path)
                frame = _fields(scan_lines(path, latin1=True), names, pattern, fields)
        except READING_ERRORS as error:
            raise_located(path, error)
        wrong = frame["wrong"]
        if wrong.any():
            row = int(wrong.arg_max() or 0)
            raise DataError(
                f"{source.at(row, len(wrong))}: {frame['shown'].drop_nulls()[0][:80]!r} has not the {len(names)} "
                f"fields of MovieLens' {layout} ({wrong.sum()} such row(s)). Fetch the file again, or repair the row."
            )
        if layout == "u.item" and "genres" in wanted:
            flags = [pl.when(pl.col(genre) == "1").then(pl.lit(genre)) for genre in _GENRES]
            frame = frame.with_columns(pl.concat_list(flags).list.drop_nulls().alias("genres"))
        elif layout == "movies" and "genres" in wanted:
            frame = frame.with_columns(pl.col("genres").str.split("|"))
        return frame.select(wanted), source

    return Table(str(path), "MovieLens " + layout, columns, load)


def _fields(lines: pl.LazyFrame, names: Sequence[str], pattern: str, wanted: Sequence[str]) -> pl.DataFrame:
    """The fields wanted of every line that is not empty; `wrong` where they are not all there, `shown` then."""
    line = pl.col("line").str.strip_chars_end("\r")
    wrong = ~line.str.contains(pattern)
    groups = [line.str.extract(pattern, names.index(name) + 1).alias(name) for name in wanted]
    kept = lines.filter(line.str.strip_chars() != "")
    found = kept.select(*groups, wrong.alias("wrong"), pl.when(wrong).then(line).alias("shown"))
    return found.collect(engine="streaming")

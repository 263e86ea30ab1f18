"""Amazon's ratings-only files: CSV without a header, in which users come first (2014) or items do (2018)."""

import logging
import re
from pathlib import Path

import polars as pl

from llmrec.data.columns import ITEM, RATING, TIMESTAMP, USER
from llmrec.data.delimited import open_delimited
from llmrec.data.lines import READING_ERRORS, raise_located
from llmrec.data.source import Table

logger = logging.getLogger(__name__)

_REVIEWER = r"^A[0-9A-Z]{9,20}$"
_ASIN = r"^(?:B[0-9A-Z]{9}|\d{9}[\dX])$"
_SAMPLE = 2000
_FIRST_TIME = 500_000_000


def is_ratings_only(line: str, separator: str) -> bool:
    """Whether a file's first line is no header but two ids, a rating and a unix time.

    >>> is_ratings_only("A39HTATAQ9V7YF,0205616461,5.0,1369699200", ",")
    True
    >>> is_ratings_only("user_id,parent_asin,rating,timestamp", ",")
    False
    """
    fields = [field.strip().strip('"') for field in line.split(separator)]
    if len(fields) != 4 or not fields[0] or not fields[1]:
        return False
    if not re.fullmatch(r"\d{1,2}(?:\.\d+)?", fields[2]) or not re.fullmatch(r"\d{9,19}", fields[3]):
        return False
    return float(fields[2]) <= 10 and int(fields[3]) >= _FIRST_TIME


def open_ratings_only(path: Path, separator: str) -> Table:
    """A file of two ids, a rating and a time, without a header.

    Which id is the user's shows in the values: reviewers are an A and letters or digits, products ten characters that
    begin with B or are an ISBN. What was taken is logged. Where that does not show, the first two columns are named
    column_1 and column_2 and left to be chosen.

    Raises:
        DataError: if it cannot be read.
    """
    lazy = pl.scan_csv(path, separator=separator, has_header=False, infer_schema=False, glob=False)
    try:
        sample = lazy.head(_SAMPLE).collect(engine="streaming")
    except READING_ERRORS as error:
        raise_located(path, error)
    first, second = (sample.to_series(place) for place in (0, 1))
    if _mostly(first, _REVIEWER) and _mostly(second, _ASIN):
        names = [USER, ITEM]
    elif _mostly(first, _ASIN) and _mostly(second, _REVIEWER):
        names = [ITEM, USER]
    else:
        names = ["column_1", "column_2"]
        logger.warning(
            "%s has no header, and its values (%r, %r) do not show which column holds users: say --user-column "
            "column_1 --item-column column_2, or the reverse",
            *(path, first[0], second[0]),
        )
    if USER in names:
        logger.info("%s has no header: its columns are taken as %s, %s, rating, timestamp", path, *names)
    return open_delimited(path, separator, [*names, RATING, TIMESTAMP])


def _mostly(values: pl.Series, pattern: str) -> bool:
    return 2 * int(values.str.contains(pattern).sum()) > len(values)

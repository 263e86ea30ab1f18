"""Flags of a script that say nothing sensible: numbers out of range, and flags that nothing would read."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from llmrec.exceptions import DataError


def spelt(name: str) -> str:
    """A field's name as it is given on the command line.

    >>> spelt("num_levels")
    '--num-levels'
    """
    return "--" + name.replace("_", "-")


def check_ranges(flags: Mapping[str, Any], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Checks that numbers are finite and in their ranges, both ends included; None is not checked, and of a list every
    number, of which there has to be one.

    Args:
        flags: values by the field's name.
        ranges: lowest and highest by the field's name; the highest may be infinite.

    Raises:
        DataError: naming the first flag that is not, in the ranges' order, and its value.
    """
    for name, (lowest, highest) in ranges.items():
        value = flags[name]
        numbers = value if isinstance(value, list | tuple) else [value]
        legal = all(number is None or (lowest <= number <= highest and math.isfinite(number)) for number in numbers)
        if not legal or not numbers:
            allowed = (
                f"a number from {lowest} to {highest}" if highest < math.inf else f"a number of at least {lowest}"
            )
            raise DataError(f"{spelt(name)} is {value}, which is out of range. Give {allowed}.")


def check_read(
    flags: Mapping[str, Any],
    defaults: Mapping[str, Any],
    readers: Mapping[str, tuple[str, Sequence[str]]],
    chosen: Mapping[str, str | None],
) -> None:
    """Checks that every flag which is not left at its default is read by what was chosen.

    Args:
        flags: values by the field's name.
        defaults: the same, as they are if nothing is given.
        readers: by the field's name, what chooses who reads it (such as "--quantizer"), and which choices do.
        chosen: what was chosen, by what chooses it; None for nothing.

    Raises:
        DataError: naming the first flag that nobody would read, in the order of `readers`, and its value.

    >>> check_read({"beam": 7}, {"beam": 5}, {"beam": ("--quantizer", ["rvq"])}, {"--quantizer": "opq"})
    Traceback (most recent call last):
        ...
    llmrec.exceptions.DataError: --beam 7 belongs to --quantizer rvq, which here is opq. Leave it out, or choose that.
    """
    for name, (chooser, names) in readers.items():
        if flags[name] != defaults[name] and chosen[chooser] not in names:
            raise DataError(
                f"{spelt(name)} {flags[name]} belongs to {chooser} {' or '.join(names)}, which here is "
                f"{chosen[chooser] or 'none'}. Leave it out, or choose that."
            )

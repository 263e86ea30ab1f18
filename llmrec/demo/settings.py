"""Settings: the page's inputs as a request of the HTTP API, and filters as they are typed."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from llmrec.exceptions import FilterError, RequestError
from llmrec.service.schema import Condition, RecommendRequest


@dataclass(frozen=True)
class Settings:
    """What stands in the page's inputs; an empty number is None, an empty text "".

    Attributes:
        num_beams: 0 or None for the model's.
        cap_levels, cap_most: both or none (0 or None), see `PrefixCap`.
        sample: whether `temperature` and `seed` count.
        user_id: in the place of the clicked history.
        adapter: of the first answer.
        compare: whether a second answer is wanted.
        other_adapter: of the second answer.
    """

    k: float | None = 10
    num_beams: float | None = None
    exclude_seen: bool = True
    legal: bool = False
    cap_levels: float | None = None
    cap_most: float | None = None
    sample: bool = False
    temperature: float | None = 1.0
    seed: float | None = 0
    user_id: str = ""
    ignore_unknown: bool = False
    adapter: str = ""
    compare: bool = False
    other_adapter: str = ""


NAMES = tuple(entry.name for entry in fields(Settings))


def asked(
    settings: Settings,
    history: Sequence[str],
    deny: Sequence[str] = (),
    filters: Mapping[str, Condition] | None = None,
    catalog: str = "",
    second: bool = False,
) -> RecommendRequest:
    """The request that the inputs make with what was clicked; `second` for the other answer of a comparison.

    Raises:
        RequestError: if an input holds what no request can.

    >>> asked(Settings(k=3), ["a"]).model_dump(exclude_defaults=True)
    {'history': ['a'], 'k': 3, 'explain': True}
    """
    body: dict[str, Any] = {
        "k": _whole("How many items", settings.k),
        "exclude_seen": settings.exclude_seen,
        "filters": dict(filters or {}),
        "deny": list(deny),
        "ignore_unknown": settings.ignore_unknown,
        "normalize": "legal" if settings.legal else "vocabulary",
        "explain": True,
    }
    if settings.k is None:
        del body["k"]
    if settings.user_id.strip():
        body["user_id"] = settings.user_id.strip()
    else:
        body["history"] = list(history)
    if settings.num_beams:
        body["num_beams"] = _whole("Beams", settings.num_beams)
    if bool(settings.cap_levels) != bool(settings.cap_most):
        raise RequestError("One of the two numbers that cap a branch is missing. Give both, or none.")
    if settings.cap_levels:
        body["prefix_cap"] = {
            "levels": _whole("Shared levels", settings.cap_levels),
            "most": _whole("Items per branch", settings.cap_most),
        }
    if settings.sample:
        given = {"temperature": settings.temperature, "seed": _whole("Seed", settings.seed)}
        body["sampling"] = {name: value for name, value in given.items() if value is not None}
    if adapter := (settings.other_adapter if second else settings.adapter).strip():
        body["adapter"] = adapter
    if catalog:
        body["catalog"] = catalog
    try:
        return RecommendRequest.model_validate(body)
    except ValidationError as error:
        raise RequestError(in_words(error)) from error


def condition(kind: str, values: str, negated: bool, least: str, most: str, flag: str) -> Condition:
    """The condition that the filter's inputs make for an attribute of this kind.

    Args:
        kind: text, list, number or flag.
        values: of a text or a list, with commas between them; a value with a comma stands in double quotes.
        negated: none of the values instead of one of them.
        least, most: of a number; "" for no bound.
        flag: "yes" or "no".

    Raises:
        FilterError: if what the kind needs is missing, or no number.

    >>> condition("text", 'Nivea, "Dove, Inc."', False, "", "", "").any_of
    ['Nivea', 'Dove, Inc.']
    """
    body: dict[str, Any]
    if kind == "number":
        body = {name: value for name, value in (("min", _number(least)), ("max", _number(most))) if value is not None}
        if not body:
            raise FilterError("The filter has no bound. Give the least number, the greatest, or both.")
    elif kind == "flag":
        if flag not in ("yes", "no"):
            raise FilterError("The filter says neither yes nor no. Choose one.")
        body = {"any_of": [flag == "yes"]}
    else:
        named = _values(values)
        if not named:
            raise FilterError("The filter names no value. Type one or more, with commas between them.")
        body = {"none_of" if negated else "any_of": named}
    try:
        return Condition.model_validate(body)
    except ValidationError as error:
        raise FilterError(in_words(error)) from error


def described(name: str, condition: Condition) -> str:
    """A condition in words.

    >>> described("price", Condition(max=9.5))
    'price is at most 9.5'
    >>> described("brand", Condition(none_of=["Nivea", "Dove"]))
    'brand is none of Nivea, Dove'
    """
    said = []
    if condition.any_of is not None:
        said.append("is " + " or ".join(map(_word, condition.any_of)))
    if condition.none_of is not None:
        said.append("is none of " + ", ".join(map(_word, condition.none_of)))
    if condition.min is not None and condition.max is not None:
        said.append(f"is from {condition.min:g} to {condition.max:g}")
    elif condition.min is not None:
        said.append(f"is at least {condition.min:g}")
    elif condition.max is not None:
        said.append(f"is at most {condition.max:g}")
    return f"{name} {' and '.join(said)}"


def in_words(error: ValidationError) -> str:
    """What a model refuses, for people who see the page's inputs and not the model.

    >>> try:
    ...     Condition(min=2, max=1)
    ... except ValidationError as error:
    ...     in_words(error)
    'min is 2.0 and max 1.0. Give a range that something can be in.'
    """
    said = []
    for one in error.errors(include_url=False, include_input=False):
        place = ".".join(str(part) for part in one["loc"])
        text = one["msg"].removeprefix("Value error, ")
        said.append(f"{place}: {text}. Change that input." if place else text)
    return " ".join(said)


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings from what the inputs sent, whose kinds are checked: a browser may send anything.

    Raises:
        RequestError: if a value is of another kind than its input.
    """
    for entry in fields(Settings):
        value = values[entry.name]
        if isinstance(entry.default, bool):
            fits = isinstance(value, bool)
        elif isinstance(entry.default, str):
            fits = isinstance(value, str)
        else:
            fits = value is None or (isinstance(value, int | float) and not isinstance(value, bool))
        if not fits:
            raise RequestError(f"{entry.name} is {str(value)[:80]!r}. Reload the page.")
    return Settings(**values)


def _whole(name: str, value: float | None) -> int | None:
    if value is None:
        return None
    if not math.isfinite(value) or value != int(value):
        raise RequestError(f"{name} is {value:g}. Give a whole number.")
    return int(value)


def _number(text: str) -> float | None:
    try:
        return float(text) if text.strip() else None
    except ValueError as error:
        raise FilterError(f"{text[:80]!r} is no number. Write one such as 9.5.") from error


def _values(text: str) -> list[str]:
    try:
        read = [
            value.strip() for row in csv.reader(text.splitlines(), skipinitialspace=True, strict=True) for value in row
        ]
    except csv.Error as error:
        raise FilterError(f"The values cannot be read: {error}. Close every double quote.") from error
    return list(dict.fromkeys(value for value in read if value))


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else str(value)

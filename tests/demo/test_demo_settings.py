"""Inputs of the page as requests of the HTTP API."""

import pytest

from llmrec.demo.settings import NAMES, Settings, asked, condition, described, settings_of
from llmrec.exceptions import FilterError, LLMRecError, RequestError
from llmrec.service.schema import Condition


def test_everything_that_is_set_is_asked_for():
    settings = Settings(
        k=7.0,
        num_beams=20.0,
        exclude_seen=False,
        legal=True,
        cap_levels=1.0,
        cap_most=2.0,
        sample=True,
        temperature=0.5,
        seed=3.0,
        ignore_unknown=True,
        adapter=" one ",
        other_adapter="two",
    )
    filters = {"price": Condition(max=3)}
    request = asked(settings, ["a", "b"], ["c"], filters, "shop")
    assert request.model_dump(exclude_defaults=True, exclude_none=True) == {
        "history": ["a", "b"],
        "ignore_unknown": True,
        "adapter": "one",
        "catalog": "shop",
        "k": 7,
        "num_beams": 20,
        "exclude_seen": False,
        "filters": {"price": {"max": 3.0}},
        "deny": ["c"],
        "normalize": "legal",
        "prefix_cap": {"levels": 1, "most": 2},
        "sampling": {"temperature": 0.5, "seed": 3},
        "explain": True,
    }
    assert asked(settings, [], second=True).adapter == "two"


def test_what_is_not_set_is_not_asked_for():
    request = asked(Settings(num_beams=0, cap_levels=0, cap_most=None, temperature=None, seed=None), [])
    assert request.model_dump(exclude_defaults=True) == {"history": [], "explain": True}
    assert asked(Settings(k=None), []).k == 10
    assert asked(Settings(sample=True, temperature=None, seed=None), []).sampling.model_dump() == {
        "temperature": 1.0,
        "seed": 0,
    }


def test_a_user_goes_before_the_list():
    request = asked(Settings(user_id=" u "), ["a"])
    assert (request.user_id, request.history) == ("u", None)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": 0}, "k: .*greater than or equal to 1"),
        ({"k": 2.5}, "How many items is 2.5. Give a whole number"),
        ({"k": float("inf")}, "whole number"),
        ({"num_beams": 513}, "num_beams: .*512"),
        ({"cap_levels": 2}, "Give both"),
        ({"cap_most": 2}, "Give both"),
        ({"sample": True, "temperature": 0}, "temperature"),
    ],
)
def test_what_no_request_can_hold_is_said_in_words(change, said):
    with pytest.raises(RequestError, match=said) as error:
        asked(Settings(**change), [])
    assert "pydantic" not in str(error.value)


@pytest.mark.parametrize(
    ("given", "body", "said"),
    [
        (("text", "Nivea", False, "", "", ""), {"any_of": ["Nivea"]}, "x is Nivea"),
        (("list", " a ,b,, a", False, "", "", ""), {"any_of": ["a", "b"]}, "x is a or b"),
        (("text", '"a, b"', True, "", "", ""), {"none_of": ["a, b"]}, "x is none of a, b"),
        (("number", "", False, "1.5", "", ""), {"min": 1.5}, "x is at least 1.5"),
        (("number", "", False, "", " 2 ", ""), {"max": 2.0}, "x is at most 2"),
        (("number", "", True, "1", "2", ""), {"min": 1.0, "max": 2.0}, "x is from 1 to 2"),
        (("flag", "", False, "", "", "yes"), {"any_of": [True]}, "x is yes"),
        (("flag", "", False, "", "", "no"), {"any_of": [False]}, "x is no"),
    ],
)
def test_filters_are_what_is_typed(given, body, said):
    made = condition(*given)
    assert made.model_dump(exclude_none=True) == body
    assert described("x", made) == said


@pytest.mark.parametrize(
    "given",
    [
        ("text", " , ", False, "", "", ""),
        ("text", 'a, "b', False, "", "", ""),
        ("number", "7", False, "", "", ""),
        ("number", "", False, "a lot", "", ""),
        ("number", "", False, "nan", "", ""),
        ("number", "", False, "3", "2", ""),
        ("flag", "", False, "", "", ""),
        ("text", ",".join(map(str, range(300))), False, "", "", ""),
    ],
)
def test_filters_without_sense_are_refused(given):
    with pytest.raises(FilterError, match=r"\. \S.*\.$"):
        condition(*given)


def test_a_browser_cannot_send_other_kinds():
    values = {name: getattr(Settings(), name) for name in NAMES}
    assert settings_of(values) == Settings()
    for name, other in (("k", "ten"), ("k", True), ("legal", 1), ("adapter", None), ("user_id", ["u"])):
        with pytest.raises(LLMRecError, match=name):
            settings_of(values | {name: other})

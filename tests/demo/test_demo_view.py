"""What the page shows of a session, as a browser's parser sees it."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pages import Seen

from llmrec.demo import view
from llmrec.demo.comparison import agreement
from llmrec.demo.servers import Answer
from llmrec.demo.session import Item, Session
from llmrec.service.schema import (
    CatalogItem,
    CatalogItems,
    CatalogState,
    Condition,
    RecommendedItem,
    RecommendResponse,
)

HOSTILE = [
    "<script>window.pwned=1</script>",
    '"><img src=x onerror="window.pwned=1">',
    "' onmouseover='window.pwned=1",
    "</title></svg><script>window.pwned=1</script>",
    "${window.pwned=1} {{7*7}} {% raw %}",
    "javascript:window.pwned=1",
    "half a pair \ud800 and \x00 nothing",
    "\u202egnp.exe",
    "x" * 5000,
]
TAGS = {
    *("p", "b", "span", "bdi", "br", "button", "ul", "ol", "li", "section", "h3", "div", "table", "thead", "tbody"),
    *("tr", "td", "th", "caption", "details", "summary", "svg", "g", "path", "rect", "circle", "text", "title"),
}


def answer(names: list[str], label: str = "one", titles: list[str] | None = None) -> Answer:
    items = [
        RecommendedItem(
            id=name,
            rank=place + 1,
            log_probability=-1.5 - place,
            title=(titles or names)[place],
            semantic_id=[place, 0],
            level_log_probabilities=[-1.0 - place, -0.5],
        )
        for place, name in enumerate(names)
    ]
    return Answer(label, RecommendResponse(items=items, model="m", catalog="c", catalog_version="v1"), 0.0123)


def everything(texts: list[str]) -> tuple[Session, str]:
    """A session in which these texts stand wherever a server's text can, and all that the page shows of it."""
    session = Session(problem=texts[0], lost=True, search=texts[0])
    session.catalogs = [
        CatalogState(name=texts[0], version=texts[0], items=2, live=1, levels=2, attributes={}, versions=[])
    ]
    session.found = CatalogItems(
        items=[CatalogItem(id=text, title=text, semantic_id=[0], retired=True, attributes={}) for text in texts],
        total=len(texts),
    )
    for text in texts:
        number = session.number(Item(text, text))
        session.add(number)
        session.deny(number)
        if len(session.filters) < 3:
            session.filter(text, Condition(any_of=[text[:1000].encode("utf-8", "replace").decode()]))
    session.answers = [answer(texts, texts[0]), answer(texts[::-1], texts[-1]), Answer(texts[0], None, 1.0, texts[0])]
    session.answers = session.answers[:2]
    session.chosen = texts[0]
    shown = [
        view.status(session, texts[0], texts[0]),
        view.catalog(session),
        view.history(session),
        view.chips(session),
        view.results(session),
    ]
    session.answers = [Answer(texts[0], None, 1.0, texts[0])]
    return session, "".join([*shown, view.results(session)])


def assert_harmless(shown: str) -> None:
    seen = Seen(shown)
    assert set(seen.tags) <= TAGS
    for name in re.findall(r"<[^>]*?\s([a-zA-Z-]+)=", re.sub(r'"[^"]*"', '""', shown)):
        assert not name.lower().startswith("on")
        assert name.lower() not in ("src", "href", "xlink:href", "srcdoc", "formaction")
    shown.encode("utf-8")  # no half of a surrogate pair
    assert "\x00" not in shown


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_are_texts(text):
    _, shown = everything([text, "other"])
    assert_harmless(shown)
    said = " ".join(" ".join(Seen(shown).texts).split())
    assert " ".join(text.replace("\ud800", "\ufffd").replace("\x00", "\ufffd").split())[:25] in said
    assert len(shown) < 60_000


@given(st.lists(st.text(st.characters(), min_size=1, max_size=40), min_size=1, max_size=3, unique=True))
def test_no_text_is_markup(texts):
    _, shown = everything(texts)
    assert_harmless(shown)


def buttons(shown: str, action: str) -> list[int]:
    return [int(number) for number in re.findall(rf'data-action="{action}" data-number="(-?\d+)"', shown)]


def test_the_catalog_has_numbers_for_its_items_and_ways_to_turn():
    session = Session(offset=8)
    session.found = CatalogItems(
        items=[CatalogItem(id=f"i{n}", title="", semantic_id=[n], retired=n == 1, attributes={}) for n in range(3)],
        total=1011,
    )
    shown = view.catalog(session)
    assert [session.item(number).id for number in buttons(shown, "add")] == ["i0", "i1", "i2"]
    assert "9–11 of 1,011" in shown
    assert buttons(shown, "turn") == [-1, 1]
    assert shown.count("retired") == 1
    session.offset = 1008
    assert buttons(view.catalog(session), "turn") == [-1]
    session.offset = 0
    assert buttons(view.catalog(session), "turn") == [1]


def test_the_history_is_in_order_and_the_first_cannot_go_up():
    session = Session()
    for name in ("a", "b"):
        session.add(session.number(Item(name, f"Title {name}")))
    shown = view.history(session)
    assert shown.index("Title a") < shown.index("Title b")
    assert buttons(shown, "up") == [1]
    assert buttons(shown, "remove") == [0, 1]
    assert "new user" in view.history(Session())


def test_results_show_ranks_probabilities_and_who_is_struck_out():
    session = Session(answers=[answer(["a", "b"])], chosen="b")
    session.deny(session.number(Item("a", "a")))
    session.answered = session.changes
    shown = view.results(session)
    texts = " ".join(" ".join(Seen(shown).texts).split())
    assert "22.3 %" in texts  # e^-1.5
    assert "log p −1.500" in texts
    assert "12 ms there and back" in texts
    assert "version v1" in texts
    assert 'width:100.0%"' in shown
    assert 'width:36.8%"' in shown  # e^-1 of the best
    assert [session.item(number).id for number in buttons(shown, "deny")] == ["b"]
    assert [session.item(number).id for number in buttons(shown, "allow")] == ["a"]
    assert "Path of" in texts
    assert "have changed since" not in texts
    session.changes += 1
    assert "have changed since" in view.results(session)


def test_two_answers_are_compared():
    session = Session(answers=[answer(["a", "b", "c"], "first"), answer(["b", "a", "d"], "second")])
    texts = " ".join(" ".join(Seen(view.results(session)).texts).split())
    assert "first 1: 0 of 1 in both (0 %)" in texts
    assert "first 3: 2 of 3 in both (67 %)" in texts
    assert re.search(r"Only in A: c \(was 3\)\s*\.", texts)
    for move in ("up 1", "down 1", "new"):
        assert move in texts
    assert "A: first" in texts
    assert "B: second" in texts


NAMES = st.lists(st.sampled_from("abcdefgh"), unique=True, max_size=8)


@given(NAMES, NAMES)
def test_agreement_is_what_sets_and_places_say(first, second):
    found = agreement(
        *[answer(names).response.items for names in (first, second)]  # type: ignore[union-attr]
    )
    longest = max(len(first), len(second))
    assert [depth for depth, _ in found.overlaps][-1:] == ([longest] if longest else [])
    for depth, common in found.overlaps:
        assert common == len(set(first[:depth]) & set(second[:depth]))
    assert [move.id for move in found.moves] == second + [name for name in first if name not in second]
    for move in found.moves:
        assert move.first == (first.index(move.id) + 1 if move.id in first else None)
        assert move.second == (second.index(move.id) + 1 if move.id in second else None)


def test_one_failed_answer_does_not_hide_the_other():
    session = Session(answers=[answer(["a"], "first"), Answer("second", None, 0.1, "It is away. Wait.")])
    texts = " ".join(" ".join(Seen(view.results(session)).texts).split())
    assert "It is away. Wait." in texts
    assert "log p −1.500" in texts
    assert "Agreement" not in texts


def test_long_answers_are_cut_and_say_so():
    session = Session(answers=[answer([f"i{n}" for n in range(130)])])
    shown = view.results(session)
    assert len(buttons(shown, "choose")) == view.MAX_ROWS
    assert "And 30 more" in shown
    assert "No item is left" in view.results(Session(answers=[answer([])]))

"""What clicks do to a session, whatever numbers they carry."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.demo.session import PAGE_ITEMS, Item, Session
from llmrec.exceptions import RequestError
from llmrec.service import schema
from llmrec.service.schema import CatalogItems, CatalogState, Condition


def filled(*names: str) -> Session:
    session = Session()
    for name in names:
        session.add(session.number(Item(name, name.upper())))
    return session


def ids(session: Session) -> list[str]:
    return [entry.item.id for entry in session.history]


def test_a_history_is_built_moved_and_emptied():
    session = filled("a", "b", "a")
    assert ids(session) == ["a", "b", "a"]
    keys = [entry.key for entry in session.history]
    session.move_up(keys[2])
    assert ids(session) == ["a", "a", "b"]
    session.move_up(keys[0])  # the first has nowhere to go
    assert [entry.key for entry in session.history] == [keys[0], keys[2], keys[1]]
    session.remove(keys[0])
    assert [entry.key for entry in session.history] == [keys[2], keys[1]]
    session.replace_history([])
    assert ids(session) == []


def test_numbers_stand_for_items_and_new_titles_replace_old_ones():
    session = Session()
    first, second = session.number(Item("a", "A")), session.number(Item("b", "B"))
    assert first != second
    assert session.number(Item("a", "New")) == first
    assert session.item(first) == Item("a", "New")
    assert session.item(second) == Item("b", "B")
    assert session.item(99) is None
    assert session.item(-1) is None


def test_what_is_not_wanted_can_be_taken_back():
    session = filled("a", "b")
    session.deny(1)
    session.deny(0)
    assert list(session.denied) == ["b", "a"]
    session.allow(1)
    assert list(session.denied) == ["a"]


NUMBERS = st.integers(-3, 12)
MOVES = st.lists(
    st.tuples(st.sampled_from(["add", "remove", "move_up", "deny", "allow", "unfilter", "turn"]), NUMBERS), max_size=40
)


@given(MOVES)
def test_no_number_breaks_a_session(moves):
    session = filled("a", "b", "c")
    session.filter("brand", Condition(any_of=["x"]))
    session.found = CatalogItems(items=[], total=30)
    for name, number in moves:
        getattr(session, name)(number)
        keys = [entry.key for entry in session.history]
        assert len(keys) == len(set(keys))
        assert set(ids(session)) <= {"a", "b", "c"}
        assert set(session.denied) <= {"a", "b", "c"}
        assert 0 <= session.offset < 30
        assert session.offset % PAGE_ITEMS == 0


def test_pages_turn_within_what_there_is():
    session = Session(found=CatalogItems(items=[], total=2 * PAGE_ITEMS))
    session.turn(1)
    session.turn(1)
    assert session.offset == PAGE_ITEMS
    session.turn(-1)
    session.turn(-1)
    assert session.offset == 0


@pytest.mark.parametrize("name", ["add", "deny", "filter"])
def test_no_more_is_taken_than_a_request_holds(name, monkeypatch):
    import llmrec.demo.session as module

    for limit in ("MAX_HISTORY", "MAX_ITEMS", "MAX_FILTERS"):
        assert getattr(module, limit) == getattr(schema, limit)
        monkeypatch.setattr(module, limit, 2)
    session = Session()
    numbers = [session.number(Item(str(place), "")) for place in range(3)]

    def act(place: int) -> None:
        if name == "filter":
            session.filter(str(place), Condition(max=1))
        else:
            getattr(session, name)(numbers[place])

    act(0)
    act(1)
    with pytest.raises(RequestError, match="the most that a request holds"):
        act(2)
    if name != "add":
        act(1)  # what is there already may be said again


def test_changes_make_an_answer_old_and_looking_around_does_not():
    session = filled("a", "b")
    session.found = CatalogItems(items=[], total=50)
    session.answered = session.changes
    session.turn(1)
    session.number(Item("c", "C"))
    session.allow(0)
    assert not session.stale
    for act in (
        lambda: session.add(0),
        lambda: session.remove(0),
        lambda: session.move_up(session.history[1].key),
        lambda: session.deny(0),
        lambda: session.allow(0),
        lambda: session.filter("brand", Condition(any_of=["x"])),
        lambda: session.unfilter(0),
    ):
        session.answered = session.changes
        act()
        assert session.stale


def test_another_catalog_begins_anew():
    states = [
        CatalogState(name=name, version="v", items=1, live=1, levels=1, attributes={name: "text"}, versions=["v"])
        for name in ("one", "two")
    ]
    session = filled("a")
    session.catalogs = states
    assert session.state == states[0]
    session.deny(0)
    session.filter("one", Condition(any_of=["x"]))
    session.use_catalog("two")
    assert session.attributes == {"two": "text"}
    assert (session.history, session.denied, session.filters, session.answers) == ([], {}, {}, [])

"""The drawing of semantic IDs, against the items that it is of."""

import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmrec.demo.tree import MAX_ITEMS, Node, drawing, joined, path_table, placed, shares, tree
from llmrec.service.schema import RecommendedItem


def item(place: int, codes: list[int] | None, title: str = "", levels: list[float] | None = None) -> RecommendedItem:
    levels = [-1.0 - code for code in codes or []] if levels is None else levels
    return RecommendedItem(
        id=f"i{place}",
        rank=place + 1,
        log_probability=sum(levels),
        title=title or f"T{place}",
        semantic_id=codes,
        level_log_probabilities=levels,
    )


CODES = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=5), min_size=1, max_size=12)


def paths(node: Node, before: tuple[int, ...] = (), cost: float = 0.0) -> list[tuple[int, tuple[int, ...], float]]:
    """Place, codes and sum of log-probabilities of everything that ends at or below a node."""
    before, cost = before + node.codes, cost + (node.log_probability or 0.0)
    found = [(place, before, cost) for place in node.leaves]
    return found + [path for child in node.children for path in paths(child, before, cost)]


@given(CODES)
def test_every_item_s_path_is_in_the_tree_and_nothing_else(codes):
    items = [item(place, one) for place, one in enumerate(codes)]
    for root in (tree(items), joined(tree(items))):
        found = sorted(paths(root))
        assert [(place, list(path)) for place, path, _ in found] == list(enumerate(codes))
        assert [cost for *_, cost in found] == pytest.approx([one.log_probability for one in items])
        for one in placed(root):
            below = sorted(place for place, *_ in paths(one.node))
            assert sorted(one.node.items) == below
            firsts = [child.codes[0] for child in one.node.children]
            assert len(firsts) == len(set(firsts))


@given(CODES)
def test_joining_leaves_only_what_parts_or_ends(codes):
    for one in placed(joined(tree([item(place, each) for place, each in enumerate(codes)]))):
        assert one.parent is None or one.node.leaves or len(one.node.children) > 1


@given(CODES)
def test_leaves_have_a_row_each_and_parents_stand_between(codes):
    nodes = placed(tree([item(place, one) for place, one in enumerate(codes)]))
    rows = sum(len(one.node.leaves) for one in nodes)
    assert rows == len(codes)
    ends = sorted(one.y for one in nodes if not one.node.children)
    assert all(after - before >= 1 - 1e-9 for before, after in itertools.pairwise(ends))
    for one in nodes:
        assert 0 <= one.y <= rows - 1
        below = [other.y for other in nodes if other.parent is one]
        if below and not one.node.leaves:
            assert min(below) <= one.y <= max(below)
    # No two edges of one level cross: nodes of a level are in the order of their parents.
    for depth in {one.depth for one in nodes} - {0}:
        level = sorted((one for one in nodes if one.depth == depth), key=lambda one: one.y)
        above = [one.parent.y for one in level]
        assert above == sorted(above)


def test_shares_are_softmax_and_survive_what_no_float_holds():
    items = [item(0, [0], levels=[-2000.0]), item(1, [1], levels=[-2000.0 + math.log(3)])]
    assert shares(items) == pytest.approx([0.25, 0.75])
    assert shares([]) == []


def test_the_drawing_shows_codes_costs_and_titles_and_marks_one_path():
    items = [item(0, [1, 2], "Soap", [-0.5, -0.25]), item(1, [1, 3], "<b>Balm</b>", [-0.5, -2.0])]
    svg = ElementTree.fromstring(str(drawing(items, "i1")))
    texts = [element.text for element in svg.iter("text")]
    for expected in ("1", "2", "3", "−0.500", "−0.250", "−2.000", "1. Soap", "2. <b>Balm</b>"):
        assert expected in texts
    assert not list(svg.iter("b"))
    chosen = [element for element in svg.iter("g") if "chosen" in element.get("class", "")]
    assert [next(text.text for text in element.iter("text")) for element in chosen] == ["1", "3"]
    widths = {path.get("class"): float(path.get("stroke-width")) for path in svg.iter("path")}
    share = shares(items)
    assert widths["edge chosen"] == pytest.approx(1.2 + 9 * share[1], abs=0.06)  # the last one: code 3's
    assert widths["edge"] == pytest.approx(1.2 + 9 * share[0], abs=0.06)


def test_items_that_share_a_whole_id_have_a_row_each():
    svg = ElementTree.fromstring(str(drawing([item(0, [1, 2], "One"), item(1, [1, 2], "Two")])))
    lines = {text.text: float(text.get("y")) for text in svg.iter("text") if text.get("class", "").startswith("title")}
    assert set(lines) == {"1. One", "2. Two"}
    assert lines["2. Two"] - lines["1. One"] >= 20


def test_deep_trees_are_joined_and_wide_ones_cut_off():
    deep = [item(0, list(range(30))), item(1, [*range(29), 99])]
    svg = ElementTree.fromstring(str(drawing(deep)))
    assert len(list(svg.iter("rect"))) == 3  # 29 codes as one node, and the two ends
    many = [item(place, [place]) for place in range(MAX_ITEMS + 5)]
    svg = ElementTree.fromstring(str(drawing(many)))
    assert sum(text.get("class", "").startswith("title") for text in svg.iter("text")) == MAX_ITEMS
    assert len(str(drawing([item(0, [0] * 100_000, levels=[0.0])]))) < 10_000


def test_without_ids_there_is_no_drawing():
    assert drawing([item(0, None, levels=[])]) == ""
    assert drawing([]) == ""
    assert path_table(item(0, None, levels=[])) == ""


def test_the_path_s_table_adds_up():
    table = ElementTree.fromstring(str(path_table(item(0, [4, 7, 1], "<i>", [-0.5, -0.25, 0.0]))))
    rows = [[cell.text for cell in row] for row in table.iter("tr")][1:]
    assert rows == [["1", "4", "−0.500", "−0.500"], ["2", "7", "−0.250", "−0.750"], ["3", "1", "0.000", "−0.750"]]

"""The path through the ID levels: the recommended items' semantic IDs as one tree, with what each code cost.

Items that share codes share nodes, so that the drawing shows where the beam search parted. An edge is as wide as its
items' part of the probability of all items drawn.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from llmrec.demo.text import log_probability, shortened
from llmrec.service.schema import RecommendedItem

MAX_ITEMS = 20  # more leaves than this are no drawing that anyone reads
MAX_LEVELS = 200  # titles as IDs have many; what a server sends is bounded here
WIDE = 6  # deeper trees are drawn with runs of lone children as one node
_ROW, _COLUMN, _NODE, _LEAF = 38, 100, 64, 244  # pixels: a leaf's height; a level's, a node's and a title's width
_ROOT = 12  # pixels: the width of the point from which all paths go out
_TITLE = 31  # characters of a leaf's title


@dataclass
class Node:
    """A run of codes that all items below share; one code, unless lone children were joined.

    Attributes:
        codes: of the run.
        log_probability: of the run, given what is before it; None where the server did not say.
        items: places, in the list of items, of those below.
        children: in the order of their best items.
        leaves: the places of the items that end here, best first; more than one where items share a whole ID.
    """

    codes: tuple[int, ...]
    log_probability: float | None = None
    items: list[int] = field(default_factory=list)
    children: "list[Node]" = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)


def tree(items: Sequence[RecommendedItem]) -> Node:
    """The tree of items' semantic IDs; its root has no code. Items without an ID are left out.

    Where rounding makes two items differ in a level that they share, the better one's figure stands.

    >>> first = RecommendedItem(id="a", rank=1, log_probability=-1.5, title="A", semantic_id=[3, 1],
    ...                         level_log_probabilities=[-1.0, -0.5])
    >>> second = RecommendedItem(id="b", rank=2, log_probability=-3.0, title="B", semantic_id=[3, 0],
    ...                          level_log_probabilities=[-1.0, -2.0])
    >>> root = tree([first, second])
    >>> [(node.codes, node.log_probability, node.items) for node in root.children]
    [((3,), -1.0, [0, 1])]
    >>> [(node.codes, node.log_probability, node.leaves) for node in root.children[0].children]
    [((1,), -0.5, [0]), ((0,), -2.0, [1])]
    """
    root = Node(())
    for place, item in enumerate(items):
        if not item.semantic_id:
            continue
        levels = item.level_log_probabilities or []
        root.items.append(place)
        node = root
        for level, code in enumerate(item.semantic_id[:MAX_LEVELS]):
            below = next((child for child in node.children if child.codes == (code,)), None)
            if below is None:
                below = Node((code,), levels[level] if level < len(levels) else None)
                node.children.append(below)
            below.items.append(place)
            node = below
        node.leaves.append(place)
    return root


def joined(node: Node) -> Node:
    """The tree with every lone child drawn into its parent, so that what is left parts or ends."""
    children = [joined(child) for child in node.children]
    if len(children) != 1 or not node.codes or node.leaves:
        return Node(node.codes, node.log_probability, node.items, children, node.leaves)
    child = children[0]
    known = node.log_probability is not None and child.log_probability is not None
    total = node.log_probability + child.log_probability if known else None  # type: ignore[operator]
    return Node(node.codes + child.codes, total, node.items, child.children, child.leaves)


@dataclass(frozen=True)
class Placed:
    """A node with its place in the drawing."""

    node: Node
    parent: "Placed | None"
    depth: int
    y: float


def placed(root: Node) -> list[Placed]:
    """All nodes of a tree of at least one item, parents first; leaves have a row each, parents stand in between."""
    heights: dict[int, float] = {}
    rows = 0

    def measure(node: Node) -> float:
        nonlocal rows
        inner: list[float] = list(range(rows, rows + len(node.leaves)))
        rows += len(node.leaves)
        inner += [measure(child) for child in node.children]
        heights[id(node)] = (min(inner) + max(inner)) / 2
        return heights[id(node)]

    measure(root)
    found: list[Placed] = []
    waiting: list[tuple[Node, Placed | None, int]] = [(root, None, 0)]
    while waiting:
        node, parent, depth = waiting.pop()
        found.append(here := Placed(node, parent, depth, heights[id(node)]))
        waiting.extend((child, here, depth + 1) for child in reversed(node.children))
    return found


def shares(items: Sequence[RecommendedItem]) -> list[float]:
    """Each item's part of the probability of them all, which adds up to 1; from logarithms, so that none is lost.

    >>> [round(share, 3) for share in shares([RecommendedItem(id=str(p), rank=1, log_probability=p, title="")
    ...                                       for p in (-1000.0, -1001.0)])]
    [0.731, 0.269]
    """
    if not items:
        return []
    best = max(item.log_probability for item in items)
    parts = [math.exp(item.log_probability - best) for item in items]
    return [part / sum(parts) for part in parts]


def drawing(items: Sequence[RecommendedItem], chosen: str | None = None) -> Markup:
    """The tree of the first `MAX_ITEMS` items as inline SVG, with the path to the item of id `chosen` marked.

    Empty where no item has a semantic ID. A screen reader hears how many items and levels there are; the figures of
    one path stand in `path_table`.
    """
    shown = [item for item in items[:MAX_ITEMS] if item.semantic_id]
    if not shown:
        return Markup("")
    levels = max(len(item.semantic_id or ()) for item in shown)
    root = joined(tree(shown)) if levels > WIDE else tree(shown)
    nodes = placed(root)
    depth = max(one.depth for one in nodes)
    share = shares(shown)
    marked = next((place for place, item in enumerate(shown) if item.id == chosen), None)
    width = _left(depth) + _NODE + _LEAF
    height = _ROW * len(shown) + 6
    edges, marks = [], []
    for one in sorted(nodes, key=lambda one: marked in one.node.items):  # the marked path is drawn over the others
        on_path = Markup(" chosen") if marked is not None and marked in one.node.items else Markup("")
        x, y = _left(one.depth), _ROW * one.y + _ROW / 2 + 3
        if one.parent is not None:
            from_x = _left(one.parent.depth) + (_NODE if one.parent.depth else _ROOT)
            from_y = _ROW * one.parent.y + _ROW / 2 + 3
            middle = (from_x + x) / 2
            thick = 1.2 + 9 * sum(share[place] for place in one.node.items)
            edges.append(
                Markup(
                    '<path class="edge{}" d="M{:.1f} {:.1f}C{:.1f} {:.1f} {:.1f} {:.1f} {:.1f} {:.1f}" '
                    'stroke-width="{:.1f}"/>'
                ).format(on_path, from_x, from_y, middle, from_y, middle, y, x, y, thick)
            )
        marks.append(_mark(one, x, y, on_path))
        for line, place in enumerate(one.node.leaves):
            item = shown[place]
            lower = y + 4 + _ROW * (line - (len(one.node.leaves) - 1) / 2)
            name = item.title or item.id
            marks.append(
                Markup('<text class="title{}" x="{:.1f}" y="{:.1f}">{}. {}<title>{}</title></text>').format(
                    on_path, x + _NODE + 8, lower, item.rank, shortened(name, _TITLE), shortened(name, 300)
                )
            )
    label = f"Tree of the semantic IDs of {len(shown)} items over {levels} levels."
    return Markup(
        '<div class="llmrec-tree" tabindex="0" role="group" aria-label="{}"><svg role="img" aria-label="{}" '
        'viewBox="0 0 {} {}" width="{}" height="{}">{}{}</svg></div>'
    ).format(
        "Path through the ID levels; scrolls sideways",
        label,
        width,
        height,
        width,
        height,
        Markup("").join(edges),
        Markup("").join(marks),
    )


def _left(depth: int) -> int:
    return 0 if depth == 0 else _ROOT + 28 + _COLUMN * (depth - 1)


def _mark(one: Placed, x: float, y: float, on_path: Markup) -> Markup:
    if one.parent is None:
        return Markup('<circle class="root" cx="{}" cy="{:.1f}" r="{}"/>').format(_ROOT / 2, y, _ROOT / 2)
    name = shortened("·".join(map(str, one.node.codes)), 9)
    below = "" if one.node.log_probability is None else log_probability(one.node.log_probability)
    return Markup(
        '<g class="node{}"><rect x="{:.1f}" y="{:.1f}" width="{}" height="30" rx="6"/>'
        '<text class="code" x="{:.1f}" y="{:.1f}">{}</text><text class="cost" x="{:.1f}" y="{:.1f}">{}</text></g>'
    ).format(on_path, x, y - 15, _NODE, x + _NODE / 2, y - 2 if below else y + 4, name, x + _NODE / 2, y + 11, below)


def path_table(item: RecommendedItem) -> Markup:
    """One item's codes, level by level, with the log-probability of each and of all up to it."""
    rows, total = [], 0.0
    for level, (code, value) in enumerate(
        zip(item.semantic_id or [], item.level_log_probabilities or [], strict=False), start=1
    ):
        total += value
        rows.append(
            Markup("<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>").format(
                level, code, log_probability(value), log_probability(total)
            )
        )
    if not rows:
        return Markup("")
    return Markup(
        '<table class="llmrec-path"><caption>Path of <bdi>{}</bdi></caption><thead><tr><th scope="col">level</th>'
        '<th scope="col">code</th><th scope="col">log p of the code</th><th scope="col">log p up to here</th></tr>'
        "</thead><tbody>{}</tbody></table>"
    ).format(shortened(item.title or item.id, 120), Markup("").join(rows))

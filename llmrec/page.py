"""Page: one HTML file with text, findings, tables and plots that needs nothing else, not even a network.

Everything that a page is given is text and is escaped; the plots are inline SVG. There is no script, no external font
and no link, and a policy inside the file forbids them. Colours follow the reader's choice of light or dark.
"""

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from xml.etree import ElementTree

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from llmrec.exceptions import DataError
from llmrec.storage import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Level = Literal["ok", "note", "warning"]

_LEVELS = {"ok": "Fine", "note": "Note", "warning": "Warning"}
# Characters that XML forbids, and halves of surrogate pairs, which UTF-8 cannot spell.
_UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
# No two neighbouring parts can match the same character, so that a cell of any length is looked at once.
_NUMBER = re.compile(r"^[-+−]?(?:[.,’ \u202f]*\d)+[.,’]*\s*(%|[±(\[].*)?$")
_FONT = re.compile(r"^(?P<size>.*?[\d.]+px)\s.*$")
_INK, _PAPER = "#000000", "#ffffff"  # what matplotlib draws axes and legends with
# What matplotlib's SVG consists of; anything else is dropped.
_DRAWN = frozenset(
    ("svg", "g", "defs", "path", "use", "clipPath", "rect", "text", "tspan", "image", "linearGradient", "stop", "a")
)

_TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #59636e; --line: #d1d9e0;
  --stripe: #f6f8fa; --ok: #1a7f37; --note: #0a63c9; --warning: #b42318;
  --font: system-ui, "DejaVu Sans", sans-serif; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --paper: #12161b; --soft: #9aa5b1; --line: #39424d;
  --stripe: #1a2027; --ok: #4fc06a; --note: #6cb0ff; --warning: #ff8a7a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem 1rem 3rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 var(--font); overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.25; } h2 { font-size: 1.3rem; margin-top: 2.2rem; } h3 { font-size: 1.1rem; }
p { white-space: pre-line; }
.finding { border-left: .35rem solid var(--level); background: var(--stripe); padding: .5rem .8rem; margin: .6rem 0; }
.finding b { color: var(--level); margin-right: .4rem; }
.ok { --level: var(--ok); } .note { --level: var(--note); } .warning { --level: var(--warning); }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .4rem; }
th, td { padding: .3rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { border-bottom-width: 2px; } tbody tr:nth-child(even) { background: var(--stripe); }
.number { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0; } figure svg { display: block; width: 100%; height: auto; color: var(--ink); }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { fill: currentColor; font-family: var(--font); }
figcaption { color: var(--soft); font-size: .92rem; margin-top: .3rem; }
@media print { :root { color-scheme: light; --ink: #000000; --paper: #ffffff; --soft: #333333; --line: #999999;
  --stripe: #ffffff; --ok: #0b5a24; --note: #06407f; --warning: #8c1a10; }
  body { max-width: none; padding: 0; font-size: 10.5pt; } .table { overflow: visible; }
  figure, tr, .finding { break-inside: avoid; } h2, h3 { break-after: avoid; } thead { display: table-header-group; } }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
{% for part in parts %}
{% if part.kind == "heading" %}
<h{{ part.level }}>{{ part.text }}</h{{ part.level }}>
{% elif part.kind == "paragraph" %}
<p>{{ part.text }}</p>
{% elif part.kind == "finding" %}
<p class="finding {{ part.level }}"><b>{{ part.label }}</b> {{ part.text }}</p>
{% elif part.kind == "table" %}
<div class="table"><table>
{% if part.caption %}
<caption>{{ part.caption }}</caption>
{% endif %}
<thead><tr>{% for cell, number in part.header %}<th scope="col"{{ number }}>{{ cell }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in part.rows %}
<tr>{% for cell, number in row %}<td{{ number }}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody>
</table></div>
{% else %}
<figure style="max-width: {{ part.width }}px">{{ part.svg }}<figcaption>{{ part.caption }}</figcaption></figure>
{% endif %}
{% endfor %}
</main>
</body>
</html>
"""


class Page:
    """An HTML page that is filled from top to bottom and written as one file.

    The same calls give the same bytes. Characters that no HTML file may hold are shown as U+FFFD.

    >>> page = Page("Results")
    >>> page.table(["system", "HR@10"], [["<b>ours</b>", "0.0732"]])
    >>> "&lt;b&gt;ours&lt;/b&gt;" in page.render()
    True
    """

    def __init__(self, title: str) -> None:
        """A page without content; `title` is its first heading and its name in the browser."""
        self.title = _clean(title)
        self._parts: list[dict[str, object]] = []

    def heading(self, text: str, level: int = 2) -> None:
        """A heading under the title.

        Raises:
            DataError: if `level` is none of 2, 3 and 4.
        """
        if level not in (2, 3, 4):
            raise DataError(f"A heading of level {level} has no place on a page. Give 2, 3 or 4; the title is 1.")
        self._parts.append({"kind": "heading", "level": level, "text": _clean(text)})

    def paragraph(self, text: str) -> None:
        """A paragraph; line ends in `text` stay line ends."""
        self._parts.append({"kind": "paragraph", "text": _clean(text)})

    def finding(self, level: Level, text: str) -> None:
        """A sentence or two that stand out, with the level spelt out beside them (colour alone says nothing).

        Raises:
            DataError: if `level` is none of "ok", "note" and "warning".
        """
        if level not in _LEVELS:
            raise DataError(f"{level!r} is no level of a finding. Give one of {', '.join(map(repr, _LEVELS))}.")
        self._parts.append({"kind": "finding", "level": level, "label": _LEVELS[level], "text": _clean(text)})

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
        """A table; a column whose filled cells all read like numbers is set flush right.

        Args:
            header: C names of columns.
            rows: rows of C cells.
            caption: what the table shows.

        Raises:
            DataError: if a row has another number of cells than the header.
        """
        for place, row in enumerate(rows):
            if len(row) != len(header):
                raise DataError(
                    f"Row {place + 1} of a table has {len(row)} cells and the header has {len(header)}. "
                    "Give every row one cell per column."
                )
        numeric = [
            any(row[column] for row in rows) and all(_NUMBER.match(row[column]) for row in rows if row[column])
            for column in range(len(header))
        ]
        marks = [Markup(' class="number"') if flush_right else Markup("") for flush_right in numeric]

        def cells(row: Sequence[str]) -> list[tuple[str, Markup]]:
            return [(_clean(cell), mark) for cell, mark in zip(row, marks, strict=True)]

        self._parts.append(
            {
                "kind": "table",
                "header": cells(header),
                "rows": [cells(row) for row in rows],
                "caption": _clean(caption),
            }
        )

    def figure(self, figure: "Figure", caption: str) -> None:
        """A plot with a sentence under it; it is drawn at once, so the figure may be changed or freed afterwards.

        Black becomes the page's ink and white its paper, so that both turn in the dark; other colours stay. Texts are
        no mathematical markup (a title with dollar signs is just that), and axes in powers of ten get plain numbers.

        Args:
            figure: a `matplotlib.figure.Figure`, made without pyplot. Its formatters of powers of ten are replaced.
            caption: what is seen, with the numbers that matter; also what a screen reader says in its place.
        """
        width, svg = _inline_svg(figure, f"f{len(self._parts)}-", _clean(caption))
        self._parts.append({"kind": "figure", "svg": Markup(svg), "width": width, "caption": _clean(caption)})

    def render(self) -> str:
        """The whole file's text."""
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(_TEMPLATE).render(title=self.title, parts=self._parts) + "\n"

    def write(self, path: str | Path) -> None:
        """Writes the file in UTF-8, whole or not at all."""
        with atomic_path(path) as temporary:
            temporary.write_text(self.render(), encoding="utf-8")


def plot(height: float = 3.4) -> "tuple[Figure, Axes]":
    """A figure of a page's width and `height` inches, in its manner, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_facecolor("none")
    return figure, axes


def _clean(text: str) -> str:
    # The substitution makes a plain str of a Markup, too, which would pass the template unescaped.
    return _UNWRITABLE.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n"))


def _inline_svg(figure: "Figure", prefix: str, label: str) -> tuple[int, str]:
    """The figure's width in CSS pixels, and its SVG element for use inside HTML, with ids that begin with `prefix`."""
    import matplotlib

    _plain_texts(figure)
    buffer = io.StringIO()
    settings = {"svg.hashsalt": "llmrec", "svg.fonttype": "none", "text.parse_math": False, "text.usetex": False}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # The reader's browser has the glyphs that matplotlib's own font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", facecolor="none", edgecolor="none", metadata={"Date": None})
    root = ElementTree.fromstring(_clean(buffer.getvalue()).encode())
    _keep_drawing(root, prefix)
    width = round(float(root.get("viewBox", "0 0 460 345").split()[2]) * 96 / 72)
    for name in ("width", "height", "version", "id"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", label)
    return width, ElementTree.tostring(root, encoding="unicode")


def _plain_texts(figure: "Figure") -> None:
    from matplotlib.text import Text
    from matplotlib.ticker import LogFormatterMathtext, NullFormatter, StrMethodFormatter

    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            if isinstance(axis.get_major_formatter(), LogFormatterMathtext):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            if isinstance(axis.get_minor_formatter(), LogFormatterMathtext):
                axis.set_minor_formatter(NullFormatter())
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        text.set_usetex(False)
        cleaned = _clean(text.get_text())
        # Layout fails on half a surrogate pair. Tick labels are made anew and must come clean.
        if cleaned != text.get_text():
            text.set_text(cleaned)


def _keep_drawing(root: ElementTree.Element, prefix: str) -> None:
    """Turns matplotlib's SVG file into a part of an HTML page, in place.

    Namespaces, metadata and the style element (which would hold for the whole page) go; ids become the figure's own;
    links to anything but parts of the figure and embedded pixels go; ink and paper become the page's.
    """
    for element in list(root.iter()):
        element.tag = element.tag.rpartition("}")[2]
        element.tail = None
        if element.tag not in ("text", "tspan"):
            element.text = None
        for child in list(element):
            if child.tag.rpartition("}")[2] not in _DRAWN:
                element.remove(child)
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            plain = name.rpartition("}")[2]
            if plain == "id":
                value = prefix + value
            elif plain == "href":
                if value.startswith("#"):
                    value = "#" + prefix + value[1:]
                elif value.startswith("data:image/png;base64,"):
                    value = value.replace(" ", "")
                else:
                    continue
            elif plain == "style":
                value = "; ".join(_declarations(value))
            value = value.replace("url(#", f"url(#{prefix}")
            element.set(plain, value)


def _declarations(style: str) -> Iterator[str]:
    for declaration in style.split(";"):
        name, _, value = (part.strip() for part in declaration.partition(":"))
        if name == "font-family":
            continue
        if name == "font":
            value = _FONT.sub(r"\g<size> var(--font)", value)
        if name in ("fill", "stroke", "stop-color"):
            value = {_INK: "currentColor", _PAPER: "var(--paper)"}.get(value, value)
        if name:
            yield f"{name}: {value}"

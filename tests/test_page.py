"""The page: what it is given stays text, it needs nothing from outside, and the same calls give the same bytes."""

import html
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from matplotlib.figure import Figure

from llmrec.exceptions import DataError
from llmrec.page import Page

HOSTILE = "</style></title></svg><script>alert(\"1\")</script><img src=x onerror='alert(2)'>{{ 7*7 }} & <!--"


class Seen(HTMLParser):
    """Every element and attribute of a page, the text, and that what is opened is closed."""

    VOID = frozenset(("meta", "br", "img"))

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def plot(title: str = "Lengths", label: str = "users", ticks: tuple[str, str] = ("short", "long")) -> Figure:
    figure = Figure(figsize=(20, 14), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(ticks, [3, 1], label=label)
    axes.set_title(title)
    axes.set_ylabel(label)
    axes.annotate(title, (0, 1))
    axes.legend()
    return figure


def hostile_page() -> Page:
    page = Page(HOSTILE)
    page.heading(HOSTILE)
    page.paragraph(HOSTILE)
    page.finding("warning", HOSTILE)
    page.table([HOSTILE, "n"], [[HOSTILE, "1"]], HOSTILE)
    page.figure(plot(HOSTILE, HOSTILE, (HOSTILE, "$" + HOSTILE)), HOSTILE)
    return page


def test_hostile_text_stays_text_everywhere() -> None:
    seen = Seen(hostile_page().render())
    assert not {"script", "img", "iframe", "object", "embed", "link", "foreignobject"} & set(seen.tags)
    assert not [name for name, _ in seen.attributes if name.startswith("on")]
    assert seen.tags.count("style") == 1
    assert seen.tags.count("svg") == 1
    # Title twice, heading, paragraph, finding, caption, header, cell, figcaption; in the plot: title, axis,
    # annotation, legend and the ticks.
    assert sum(HOSTILE in text for text in seen.texts) == 9 + 6
    labels = [value for name, value in seen.attributes if name == "aria-label"]
    assert labels == [HOSTILE]


def test_text_that_looks_like_safe_markup_is_escaped_too() -> None:
    page = Page(Markup("<b>t</b>"))
    page.table([Markup("<b>h</b>")], [[Markup("<b>c</b>")]], Markup("<b>k</b>"))
    page.figure(plot(), Markup("<b>f</b>"))
    text = page.render()
    assert "<b>" not in text
    assert all(f"&lt;b&gt;{letter}&lt;/b&gt;" in text for letter in "thckf")


def test_nothing_is_fetched_and_nothing_runs() -> None:
    figure = plot()
    figure.axes[0].text(0, 2, "elsewhere", url="https://elsewhere.example/x")
    figure.axes[0].imshow([[0, 1], [1, 0]])
    page = hostile_page()
    page.figure(figure, "pixels")
    seen = Seen(page.render())
    links = [value or "" for name, value in seen.attributes if name in ("href", "src", "xlink:href")]
    assert links
    assert all(link.startswith(("#f", "data:image/png;base64,")) and " " not in link for link in links)
    assert any(link.startswith("data:") for link in links)
    assert "://" not in page.render()
    assert "@import" not in page.render()
    assert any(value is not None and value.startswith("default-src 'none'") for _, value in seen.attributes)


def test_the_same_calls_give_the_same_bytes() -> None:
    first, second = hostile_page().render(), hostile_page().render()
    assert first == second
    assert not re.search(r"20\d\d-\d\d-\d\d|matplotlib v", first.lower())


def test_ids_of_two_figures_do_not_meet_and_their_references_hold() -> None:
    page = Page("two")
    page.figure(plot("one"), "one")
    page.figure(plot("two"), "two")
    text = page.render()
    ids = [value for name, value in Seen(text).attributes if name == "id"]
    assert len(ids) == len(set(ids)) > 20
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
    assert used
    assert {one or other for one, other in used} <= set(ids)


def test_black_and_white_become_ink_and_paper_and_colours_stay() -> None:
    figure = plot()
    figure.axes[0].plot([0, 1], [0, 1], color="#ba5511")
    page = Page("colours")
    page.figure(figure, "a line")
    svg = re.search(r"<svg.*</svg>", page.render(), re.DOTALL)
    assert svg is not None
    assert "#000000" not in svg[0]
    assert "#ffffff" not in svg[0]
    assert "stroke: #ba5511" in svg[0]
    assert "currentColor" in svg[0]
    assert "<style" not in svg[0]
    assert "prefers-color-scheme: dark" in page.render()
    assert "@media print" in page.render()


def test_dollars_are_no_mathematics_and_powers_of_ten_are_numbers() -> None:
    figure = Figure()
    axes = figure.add_subplot()
    axes.loglog([1, 10, 1000], [1, 10, 100000], label="$\\frac{$")
    axes.legend()
    page = Page("log")
    page.figure(figure, "log")
    texts = Seen(page.render()).texts
    assert "$\\frac{$" in texts
    assert "1000" in texts
    assert not any("mathdefault" in text for text in texts)


def test_characters_that_no_file_may_hold_are_replaced(tmp_path: Path) -> None:
    page = Page("a\x00b\ud800c")
    page.table(["x\x1f"], [["line\r\nend\x7f"]])
    page.figure(plot("t\ud800\x00", "l\x0b", ("k\x00", "m")), "c\udfff")
    page.write(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_bytes().decode("utf-8")
    assert "a\ufffdb\ufffdc" in text
    assert "line\nend\ufffd" in text
    for piece in ("t\ufffd\ufffd<", "l\ufffd<", "k\ufffd<", "c\ufffd<"):
        assert piece in text
    assert text == page.render()


def test_levels_are_spelt_out() -> None:
    page = Page("findings")
    page.finding("ok", "all good")
    page.finding("note", "look here")
    page.finding("warning", "leak")
    text = page.render()
    for level, label, sentence in (
        ("ok", "Fine", "all good"),
        ("note", "Note", "look"),
        ("warning", "Warning", "leak"),
    ):
        assert f'<p class="finding {level}"><b>{label}</b> {sentence}' in text


def test_columns_of_numbers_are_flush_right() -> None:
    page = Page("table")
    page.table(
        ["system", "HR@10", "share", "note", "gap"],
        [
            ["item-cf", "0.0732 ± 0.002", "12.5 %", "3 of 4", ""],
            ["easé", "−1,024", "7", "none", ""],
            ["x", ".05 [.04, .06]", "1 200", "", ""],
        ],
        "two systems",
    )
    text = page.render()
    assert re.findall(r'<th scope="col"( class="number")?>([^<]*)', text) == [
        ("", "system"),
        (' class="number"', "HR@10"),
        (' class="number"', "share"),
        ("", "note"),
        ("", "gap"),
    ]
    assert '<td class="number">−1,024</td>' in text
    assert "<caption>two systems</caption>" in text
    assert "<td>easé</td>" in html.unescape(text)


@settings(max_examples=100, deadline=None)
@given(st.text("12.,’ \u202f-+%±([x\n", max_size=9))
def test_numbers_are_those_of_the_plain_pattern(cell: str) -> None:
    plain = re.compile(r"^[-+−]?[\d.,’ \u202f]*\d[\d.,’]*\s*(%|[±(\[].*)?$")
    page = Page("cells")
    page.table(["name"], [[cell]])
    assert ('<td class="number"' in page.render()) == bool(cell and plain.match(cell))


@pytest.mark.parametrize(
    "cell", ["1" * 200_000 + "x", "1." * 100_000 + "x", " " * 200_000 + "x", "1 " * 100_000 + "x"]
)
def test_long_cells_take_no_long_time(cell: str) -> None:
    page = Page("cells")
    start = time.process_time()
    page.table(["name"], [[cell]])
    assert time.process_time() - start < 1


def test_a_table_without_caption_or_rows() -> None:
    page = Page("empty")
    page.table(["a"], [])
    assert "<caption>" not in page.render()
    assert '<th scope="col">a</th>' in page.render()


def test_faults_are_named() -> None:
    page = Page("faults")
    with pytest.raises(DataError, match=r"Row 2 of a table has 1 cells and the header has 2\. Give"):
        page.table(["a", "b"], [["1", "2"], ["3"]])
    with pytest.raises(DataError, match=r"level 1 has no place"):
        page.heading("again", level=1)
    with pytest.raises(DataError, match=r"'danger' is no level"):
        page.finding("danger", "x")  # type: ignore[arg-type]
    assert "<h3>deep</h3>" not in page.render()
    page.heading("deep", level=3)
    assert "<h3>deep</h3>" in page.render()

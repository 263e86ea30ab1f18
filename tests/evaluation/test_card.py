import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmrec.evaluation.card import BETTER, WORSE, forest, markdown, page, summary, tables, write_card
from llmrec.evaluation.comparison import compare
from llmrec.evaluation.evaluation import Evaluation
from llmrec.evaluation.ranks import Ranks

HOSTILE = "<img src=x onerror=alert(1)>|`*[a](javascript:b)"


def save_run(folder: Path, system: str, quality: float, draw: int = 0, cases: int = 200, **facts: Any) -> None:
    rng = np.random.default_rng(draw)
    better = np.minimum(rng.geometric(1 / quality, size=cases) - 1, 20)
    ranks = Ranks(np.where(better == 20, -1, better).astype(np.int64), np.zeros(cases, dtype=np.int64))
    shared = {
        "split": "0123456789abcdef" * 4,
        "protocol": {"split": "leave-one-out", "min_history": 3},
        "part": "test",
        "items": 1200,
        "exclude_seen": True,
        "invalid_rate": 0.125,
        "duplicate_rate": 0.0625,
        "coverage@5": 0.1111,
        "coverage@10": 0.2222,
        "gini@10": 0.3333,
        "novelty@10": 4.4444,
        "seeds": {"training": draw},
        "settings": {"window": 5},
        "cost": {"fit_seconds": 12.5, "parameters": 1234567, "ms_per_request": 0.00025, "device": "cpu"},
        "versions": {"llmrec": "0.1.0"},
        "commit": "feedface12345678",
    }
    slices = {"tail": np.arange(cases) % 2 == 0, "cold": np.arange(cases) < 10}
    evaluation = Evaluation(
        system,
        [f"u{user}" for user in range(cases)],
        [f"i{item % 30}" for item in range(cases)],
        ranks,
        np.ones(cases, dtype=bool),
        slices,
        (5, 10, 20),
        shared | facts,
    )
    evaluation.save(folder, evaluation.document(resamples=20))


@pytest.fixture
def card(tmp_path: Path) -> dict[str, Any]:
    save_run(tmp_path / "runs", "item-cf", 12.0, 1)
    save_run(tmp_path / "runs", "popularity", 90.0, 2)
    for seed in (3, 4):
        save_run(tmp_path / f"ours{seed}", "ours", 4.0, seed)
    folders = [tmp_path / "runs", tmp_path / "ours3", tmp_path / "ours4"]
    return compare(folders, resamples=1000)


class Text(HTMLParser):
    """What a reader sees, and which elements there are."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.tags: set[str] = set()
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def table(card: dict[str, Any], title: str) -> tuple[list[str], dict[str, list[str]]]:
    found = next(one for one in tables(card) if one.title.startswith(title))
    return found.header, {row[0]: row[1:] for row in found.rows}


def test_the_main_table_has_means_intervals_deviations_and_marks(card: dict[str, Any]) -> None:
    header, rows = table(card, "Systems")
    assert header == ["system", "seeds", "HR@5", "NDCG@5", "HR@10", "NDCG@10"]
    assert list(rows) == ["ours", "item-cf (reference)", "popularity"]
    assert [row[0] for row in rows.values()] == ["2 seeds", "one seed", "one seed"]
    for row, system, mark in zip(rows.values(), card["systems"], (BETTER, "", WORSE), strict=True):
        found = system["metrics"]["NDCG@10"]
        deviation = f" ± {found['sd_over_seeds']:.4f}" if system["name"] == "ours" else ""
        low, high = found["interval95"]
        assert row[-1] == f"{found['mean']:.4f}{deviation} [{low:.4f}, {high:.4f}] {mark}".rstrip()


def test_differences_leave_the_reference_out_and_show_corrected_p_values(card: dict[str, Any]) -> None:
    _, rows = table(card, "Difference from item-cf")
    assert list(rows) == ["ours", "popularity"]
    found = card["systems"][0]["metrics"]["HR@5"]
    low, high = found["difference interval95"]
    assert rows["ours"][0] == f"{found['difference']:+.4f} [{low:+.4f}, {high:+.4f}] p={found['p_holm']:.2g}"
    assert found["p_holm"] > found["p_value"]
    assert rows["popularity"][0].startswith("-0.")


def test_slices_rates_costs_and_origins_are_shown(card: dict[str, Any]) -> None:
    header, rows = table(card, "Slices")
    assert header == ["slice", "cases", "share", "ours", "item-cf", "popularity"]
    assert rows["tail"][:2] == ["100", "50.0 %"]
    assert rows["cold"][2].startswith(f"{card['systems'][0]['slices']['cold']['NDCG@10']:.4f} [")
    header, rows = table(card, "Beyond accuracy")
    assert "coverage@10" in header
    assert "coverage@5" not in header
    values = dict(zip(header[1:], rows["item-cf"], strict=True))
    assert (values["coverage@10"], values["gini@10"], values["novelty@10"]) == ("0.2222", "0.3333", "4.4444")
    assert (values["invalid rate"], values["duplicate rate"]) == ("0.1250", "0.0625")
    beyond = card["systems"][1]["beyond"]["beyond_list_share"]
    assert 0 < beyond < 1
    assert values["beyond list share"] == f"{beyond:.4f}"
    _, rows = table(card, "Cost")
    assert rows["ours"] == ["12.5", "1,234,567", "0.00025", "cpu"]
    _, rows = table(card, "Where")
    assert rows["ours"][0] == "training 3; training 4"
    assert rows["ours"][1:4] == ["window 5", "llmrec 0.1.0", "feedface1234"]
    _, rows = table(card, "What was compared")
    assert rows["split"] == [card["split"]]
    assert "leave-one-out" in rows["protocol"][0]


def test_all_three_forms_hold_the_same_numbers(card: dict[str, Any], tmp_path: Path) -> None:
    paths = write_card(card, tmp_path / "card")
    assert [path.name for path in paths] == ["card.json", "card.md", "card.html"]
    assert json.loads(paths[0].read_text()) == card
    text, shown = paths[1].read_text(), Text(paths[2].read_text())
    page_words = " ".join(shown.words)
    for one in tables(card):
        for row in one.rows:
            for cell in row:
                assert cell in page_words
        for row in one.rows:
            for number in re.findall(r"\d\.\d{4}", " ".join(row)):
                assert number in text
    for note in card["notes"]:
        assert note in page_words
    assert "svg" in shown.tags
    assert card["split"] in text


def test_markdown_tables_have_as_many_cells_in_every_row(card: dict[str, Any]) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", markdown(card), flags=re.MULTILINE)
    assert len(blocks) == len(tables(card))
    for block in blocks:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "item-cf", 9.0, 1)
    save_run(tmp_path / "b", "plain", 4.0, 2)
    folder = tmp_path / "b" / "evaluation"
    document = json.loads((folder / "plain.json").read_text()) | {
        "system": HOSTILE,
        "settings": {"<script>": HOSTILE + "\n| x |"},
        "commit": "<b>",
        "versions": {"<i>": "</table>"},
    }
    (folder / "plain.json").write_text(json.dumps(document))
    card = compare([tmp_path / "a", tmp_path / "b"], resamples=50)
    shown = Text(page(card).render())
    assert not {"img", "script", "b ", "i"} & shown.tags
    assert HOSTILE in " ".join(shown.words)
    text = markdown(card)
    assert "<" not in text
    assert not re.search(r"(?<!\\)[`*]", text)
    assert not re.search(r"(?<!\\)\]\(", text)
    for block in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in block.splitlines()}) == 1


def test_the_forest_plot_shows_every_interval_and_fills_significant_points(card: dict[str, Any]) -> None:
    axes = forest(card).axes[0]
    lines = axes.get_lines()
    bars = [line for line in lines if line.get_linewidth() == 2 and len(line.get_xdata()) == 2]
    points = [line for line in lines if line.get_marker() == "o"]
    for system, bar, point in zip(card["systems"], bars, points, strict=True):
        found = system["metrics"]["NDCG@10"]
        assert list(bar.get_xdata()) == found["interval95"]
        assert list(point.get_xdata()) == [found["mean"]]
        assert (point.get_markerfacecolor() != "#ffffff") == found.get("significant", False)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "item-cf", "popularity"]
    (reference,) = [line for line in lines if line.get_linestyle() == ":"]
    assert reference.get_xdata()[0] == card["systems"][1]["metrics"]["NDCG@10"]["mean"]


def test_the_id_level_is_shown_only_where_it_was_measured(card: dict[str, Any], tmp_path: Path) -> None:
    assert not any(one.title.startswith("ID level") for one in tables(card))
    measured = {
        "NDCG@10": 0.3087,
        "NDCG@10 interval95": [0.3, 0.32],
        "NDCG@10 (ID level)": 0.4321,
        "NDCG@10 inflation": 0.1234,
        "NDCG@10 inflation interval95": [0.1111, 0.1357],
        "NDCG@10 ratio": 1.4,
    }
    save_run(tmp_path / "ids", "generative", 5.0, 7, id_level=measured)
    again = compare([tmp_path / "runs", tmp_path / "ids"], resamples=30)
    header, rows = table(again, "ID level beside item level")
    assert header == ["system", "metric", "item level", "ID level", "difference", "ratio"]
    assert rows == {"generative": ["NDCG@10", "0.3087", "0.4321", "0.1234 [0.1111, 0.1357]", "1.4000"]}
    save_run(tmp_path / "more", "generative", 5.0, 8, id_level=measured | {"NDCG@10 (ID level)": 0.4021})
    both = compare([tmp_path / "ids", tmp_path / "more"], resamples=30)
    found = both["systems"][0]["id_level"]["NDCG@10"]
    assert found["id_level"] == pytest.approx(0.4171)
    assert found["inflation interval95"] is None
    assert "0.4171" in markdown(both)


def test_one_system_alone_has_no_tests_and_no_marks(tmp_path: Path) -> None:
    save_run(tmp_path / "a", "item-cf", 9.0, cost={"fit_seconds": None}, commit=None, seeds={}, settings={})
    card = compare([tmp_path / "a"], ["HR@20"], resamples=30)
    assert not any(one.title.startswith("Difference") for one in tables(card))
    text = markdown(card)
    assert BETTER not in text
    assert WORSE not in text
    assert "(reference)" not in text
    assert summary(card).startswith("1 system on the test part of the split 0123456789ab (leave-one-out): 200 users")
    assert table(card, "Cost")[1]["item-cf"] == ["–", "–", "–", "–"]

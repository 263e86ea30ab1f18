"""`llmrec data entropy` on an app of the test's own: its options, its files, and what it prints."""

import dataclasses
import json
import sys
import typing
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from llmrec.cli.entropy import entropy
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.columns import ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError
from llmrec.scaling.entropy import MAX_TOKENS
from llmrec.scaling.quality import data_quality

app = typer.Typer(rich_markup_mode="markdown")
app.command()(entropy)


@app.callback()
def other() -> None:
    """So that the command keeps its name."""


def lines(people: int = 12, events: int = 8) -> str:
    rows = (
        f"u{user},i{(user * step) % 7},{1_400_000_000 + 86_400 * (10 * user + step)}\n"
        for user in range(people)
        for step in range(events)
    )
    return "who,what,when\n" + "".join(rows)


COLUMNS = ["--user-column", "who", "--item-column", "what", "--timestamp-column", "when"]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.csv"
    path.write_text(lines())
    return path


def call(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["entropy", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def made(log: Path, **changed: typing.Any) -> typing.Any:

    interactions = Interactions.read(
        log, dataclasses.replace(ColumnNames(), user="who", item="what", timestamp="when")
    )
    return SplitArguments(**changed).make(interactions, Items.from_interactions(interactions))


def test_json_has_the_figures_of_the_library_and_the_table_shows_them(log: Path) -> None:
    file = log.parent / "runs" / "entropy.json"
    output = call("--interactions", log, *COLUMNS, "--json", file)
    found = json.loads(file.read_text())
    assert found == data_quality(made(log))
    assert [part["share"] for part in found["shares"]] == [0.25, 0.5, 1.0]
    cells = {line.split("  ")[0]: line.split() for line in output.splitlines()}
    for name, key, form in (
        ("real entropy S (Lempel-Ziv)", "real", ".4f"),
        ("quality S' = 1 / S", "quality", ".4f"),
        ("effective data D' = tokens * S'", "effective_data", ",.0f"),
        ("S', dictionary variant", "dictionary_quality", ".4f"),
        ("Shannon entropy of items", "shannon", ".4f"),
        ("tokens", "tokens", ",d"),
        ("repeat rate", "repeat_rate", ".2%"),
    ):
        assert cells[name][-3:] == [format(part[key], form) for part in found["shares"]]
    assert str(file) in output
    for note in found["notes"]:
        assert note in output


def test_this_log_stands_among_the_published_ones_by_its_effective_data(log: Path) -> None:
    output = call("--interactions", log, *COLUMNS)
    begin = output.index("Beside published logs")
    names = [line.split("  ")[0] for line in output[begin:].splitlines()[2:15]]
    small = ["0.25 of its users", "0.5 of its users", "this log"]
    assert names == [*small, *("ML-1M", "KR-Pure"), "ML-1M", "KR-Pure", "ML-1M", "KR-Pure", *["AMZ-Books"] * 2,
                     *["Industrial"] * 2]  # fmt: skip


def test_options_reach_the_library(log: Path) -> None:
    file = log.parent / "entropy.json"
    call("--interactions", log, *COLUMNS, "--json", file, "--share", 0.1, "--share", 0.7, "--seed", 5,
         "--max-length", 4, "--max-tokens", 20, "--split", "global-temporal", "--test-share", 0.2)  # fmt: skip
    found = json.loads(file.read_text())
    expected = data_quality(made(log, split="global-temporal", test_share=0.2), (0.1, 0.7), 5, 4, 20)
    assert found == expected
    assert (found["seed"], found["longest"], found["looked_at"]["tokens"] <= 20) == (5, 4, True)


def test_an_item_table_is_part_of_the_split(log: Path) -> None:
    table = log.parent / "items.jsonl"
    table.write_text("".join(json.dumps({"what": f"i{item}", "title": f"Item {item}"}) + "\n" for item in range(30)))
    file = log.parent / "entropy.json"
    call("--interactions", log, "--items", table, *COLUMNS, "--json", file)
    found = json.loads(file.read_text())
    assert found["content_hash"] != made(log).content_hash
    assert found["real"] == pytest.approx(data_quality(made(log))["real"])


def test_a_share_that_is_none_is_refused(log: Path) -> None:
    with pytest.raises(DataError, match=r"1\.2"):
        call("--interactions", log, *COLUMNS, "--share", 1.2)
    assert CliRunner().invoke(app, ["entropy", "--interactions", str(log), "--max-length", "1"]).exit_code == 2


def test_options_mirror_those_of_the_other_commands() -> None:
    command = typing.cast(typing.Any, typer.main.get_command(app)).commands["entropy"]
    found = {option: parameter for parameter in command.params for option in parameter.opts}
    for field in dataclasses.fields(SplitArguments):
        assert found[f"--{field.name.replace('_', '-')}"].default == field.default, field.name
    for field in dataclasses.fields(ColumnArguments):
        assert field.name == "text_columns" or f"--{field.name.replace('_', '-')}" in found
    assert found["--max-tokens"].default == MAX_TOKENS
    help_text = CliRunner().invoke(app, ["entropy", "--help"]).output
    assert "Example: llmrec data entropy" in help_text


def test_every_split_option_reaches_the_split(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[SplitArguments] = []
    make = SplitArguments.make

    def made(arguments: SplitArguments, interactions: Interactions, items: Items) -> typing.Any:
        asked.append(arguments)
        return make(SplitArguments(), interactions, items)

    monkeypatch.setattr(SplitArguments, "make", made)
    chosen = SplitArguments("global-temporal", 0.2, 0.3, "5", "6", "first", 4, 7, "shuffle", 8)
    flags = [
        part
        for field in dataclasses.fields(chosen)
        for part in (f"--{field.name.replace('_', '-')}", getattr(chosen, field.name))
    ]
    call("--interactions", log, *COLUMNS, *flags)
    call("--interactions", log, *COLUMNS)
    assert asked == [chosen, SplitArguments()]


def test_every_column_option_reaches_the_reader(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmrec.cli import preparation

    seen: list[typing.Any] = []

    class Stopped(Exception):  # noqa: N818
        pass

    def read(sources: typing.Any) -> None:
        seen.append(sources)
        raise Stopped

    monkeypatch.setattr(preparation.Sources, "read_interactions", read)
    names = ("user", "item", "timestamp", "position", "rating", "action", "domain", "weight", "title")
    flags = [part for name in names for part in (f"--{name}-column", f"{name}_x")]
    with pytest.raises(Stopped):
        call("--interactions", log, *flags, "--timestamp-unit", "ms", "--invalid-rows", "drop")
    assert [getattr(seen[0].names, name) for name in names] == [f"{name}_x" for name in names]
    assert (seen[0].timestamp_unit, seen[0].invalid_rows) == ("ms", "drop")


def test_help_imports_nothing_heavy(run_python: typing.Any) -> None:
    done = run_python(
        """
import sys
from typer.testing import CliRunner
import typer
from llmrec.cli.entropy import entropy
app = typer.Typer()
app.command()(entropy)
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
print(sorted({"numpy", "polars", "numba", "pyarrow", "torch"} & sys.modules.keys()))
"""
    )
    assert done.stdout.strip() == "[]", done.stderr + sys.version

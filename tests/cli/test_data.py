import dataclasses
import gzip
import json
import sys
import types
import typing

import polars as pl
import pytest
import typer

from llmrec.cli import data as commands
from llmrec.cli import options
from llmrec.cli.main import app, main
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.columns import ColumnNames
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import DataError

DAY = 86_400
START = 1_400_000_000

LOG = "who,what,when,stars\n" + "".join(
    f"u{user},i{(user + step) % 7},{START + (10 * user + step) * DAY},{1 + (user + step) % 5}\n"
    for user in range(12)
    for step in range(6)
)
ITEMS = "".join(
    json.dumps({"what": f"i{item}", "label": "" if item == 5 else f"Item &amp; {item}", "brand": "Acme"}) + "\n"
    for item in range(6)
)
COLUMNS = ["--user-column", "who", "--item-column", "what", "--timestamp-column", "when", "--rating-column", "stars"]
TITLES = ["--title-column", "label"]


@pytest.fixture
def call(monkeypatch, capsys):
    """Runs `llmrec data ARGS` through the console script's function; returns exit code, output and errors."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["llmrec", "data", *map(str, args)])
        with pytest.raises(SystemExit) as caught:
            main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return run


@pytest.fixture
def files(tmp_path):
    (tmp_path / "log.csv").write_text(LOG)
    (tmp_path / "items.jsonl.gz").write_bytes(gzip.compress(ITEMS.encode()))
    return tmp_path, [
        "--interactions",
        tmp_path / "log.csv",
        "--items",
        tmp_path / "items.jsonl.gz",
        *COLUMNS,
        *TITLES,
    ]


def rows_of(text):
    return [[cell for cell in line.split("  ") if cell.strip()] for line in text.splitlines()]


def test_clean_writes_three_files_and_accounts_for_every_row(call, files):
    folder, sources = files
    out = folder / "clean"
    code, text, errors = call(
        *("clean", *sources, "--out", out, "--min-rating", 2, "--k-core", 3, "--max-length", 4),
        *("--unused-items", "drop", "--empty-titles", "drop", "--json", folder / "account.json"),
    )
    assert code == 0, errors
    log, items = Interactions.read(out / "interactions.parquet"), Items.read(out / "items.parquet")
    account = json.loads((out / "cleaning.json").read_text())
    assert account == json.loads((folder / "account.json").read_text())
    assert {file.name for file in out.iterdir()} == {"interactions.parquet", "items.parquet", "cleaning.json"}
    assert account["before"] == {"interactions": 72, "users": 12, "items": 7, "table": 6}
    frame = log.frame
    assert account["after"] == {
        "interactions": len(frame),
        "users": frame["user_id"].n_unique(),
        "items": frame["item_id"].n_unique(),
        "table": len(items),
    }
    for part, before in account["before"].items():
        assert before - sum(step["removed"][part] for step in account["steps"]) == account["after"][part]
    assert frame["rating"].min() >= 2
    assert "i5" not in frame["item_id"]
    assert "i6" in frame["item_id"]  # unknown, and kept with its id
    assert items.titles[items.ids.index("i6")] == "i6"
    assert items.titles[items.ids.index("i0")] == "Item & 0"
    assert set(items.ids) == set(frame["item_id"])
    for column, most in (("user_id", 4), ("item_id", None)):
        lengths = frame[column].value_counts()["count"]
        assert lengths.min() >= 3
        assert most is None or lengths.max() <= most
    # The table that is printed has the same numbers.
    printed = rows_of(text)
    assert [cell.strip() for cell in printed[1]] == ["as it came", "72", "12", "7", "6"]
    left = next(row for row in printed if row[0].strip() == "left")
    assert [int(cell) for cell in left[1:]] == list(account["after"].values())
    assert "HTML entities: 5 texts with entities" in text
    assert "empty titles: 1 items without title" in text
    assert "warning: 1 item(s) of the interactions are not in the item table, such as 'i6'" in errors


def test_cores_of_users_and_items_can_differ(call, files, monkeypatch):
    from llmrec.cli import preparation

    folder, sources = files
    asked = {}
    monkeypatch.setattr(preparation, "clean", lambda sources, out, json_file, **settings: asked.update(settings))
    for flags, expected in [
        ([], (0, 0)),
        (["--k-core", 5], (5, 5)),
        (["--user-core", 2, "--item-core", 3], (2, 3)),
        (["--k-core", 5, "--user-core", 0], (0, 5)),
        (["--k-core", 5, "--item-core", 0], (5, 0)),
    ]:
        assert call("clean", *sources, "--out", folder, *flags)[0] == 0
        assert (asked["user_core"], asked["item_core"]) == expected
    assert asked == {
        "empty_titles": "keep",
        "unknown_items": "keep",
        "min_rating": None,
        "unrated": "drop",
        "duplicates": "exact",
        "user_core": 5,
        "item_core": 0,
        "min_length": 0,
        "max_length": None,
        "unused_items": "keep",
    }
    flags = {
        **{"empty-titles": "error", "unknown-items": "drop", "min-rating": "3.5", "unrated": "keep"},
        **{"duplicates": "last", "min-length": "2", "max-length": "9", "unused-items": "drop"},
    }
    assert (
        call("clean", *sources, "--out", folder, *(part for k, v in flags.items() for part in (f"--{k}", v)))[0] == 0
    )
    assert {key.replace("_", "-"): str(value) for key, value in asked.items()} == flags | {
        "user-core": "0",
        "item-core": "0",
    }


def test_clean_without_items_keeps_a_table_of_the_items_that_are_left(call, files):
    folder, _ = files
    arguments = ["clean", "--interactions", folder / "log.csv", *COLUMNS, "--min-rating", 5, "--out", folder / "c"]
    assert call(*arguments)[0] == 0
    log, items = Interactions.read(folder / "c/interactions.parquet"), Items.read(folder / "c/items.parquet")
    assert set(items.ids) == set(items.titles) == set(log.frame["item_id"])


def test_rows_that_reading_leaves_out_are_in_the_account(call, tmp_path):
    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp\nu,a,1400000000\nu,,1400000001\nv,b,never\nv,a,1400000002\n"
    )
    (tmp_path / "items.csv").write_text("item_id,title\na,A\n,B\na,C\n")
    sources = ["--interactions", tmp_path / "log.csv", "--items", tmp_path / "items.csv", "--out", tmp_path / "out"]
    code, _, errors = call("clean", *sources)
    assert code == 2
    assert "log.csv, row 2 of 4: item_id is None" in errors
    code, text, _ = call("clean", *sources, "--invalid-rows", "drop")
    assert code == 0
    account = json.loads((tmp_path / "out/cleaning.json").read_text())
    assert sum(account["left_out_on_reading"]["interactions"].values()) == 2
    assert sum(account["left_out_on_reading"]["items"].values()) == 2
    assert account["before"]["interactions"] == 2
    assert "reading left out 1 row(s) of interactions: item_id" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k-core", 99], r"The step 'k-core'"),
        (["--unknown-items", "error"], "not in the item table, such as 'i6'"),
        (["--empty-titles", "error"], "1 item(s) have no title, such as 'i5'"),
        (["--user-column", "nobody"], "has no column 'nobody'"),
    ],
)
def test_refusals_are_two_sentences_and_exit_code_2_and_leave_no_files(call, files, flags, message):
    folder, sources = files
    code, out, errors = call("clean", *sources, *flags, "--out", folder / "clean")
    assert (code, out) == (2, "")
    assert message in errors
    assert "Traceback" not in errors
    assert errors.strip().splitlines()[-1].count(". ") >= 1
    assert not (folder / "clean").exists()


def test_an_account_of_an_earlier_run_does_not_outlive_its_files(call, files, monkeypatch):
    folder, sources = files
    assert call("clean", *sources, "--out", folder / "clean")[0] == 0
    monkeypatch.setattr(Items, "write", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        call("clean", *sources, "--out", folder / "clean")
    assert not (folder / "clean/cleaning.json").exists()


def test_convert_says_what_it_found(call, files):
    folder, _ = files
    code, text, errors = call("convert", folder / "log.csv", "--out", folder / "log.parquet", *COLUMNS)
    assert code == 0, errors
    frame = pl.read_parquet(folder / "log.parquet")
    assert frame.columns == ["user_id", "item_id", "timestamp", "rating"]
    assert Interactions.read(folder / "log.parquet").frame.equals(frame)
    assert "has the columns who, what, when, stars" in text
    assert "72 interactions of 12 users with 7 items, from 2014-05-13 to 2014-09-05 (times in s)" in text
    assert ["timestamp", "Int64", "72", "1400000000"] in [[cell.strip() for cell in row] for row in rows_of(text)]
    assert "column 'when' is taken as seconds" in errors


def test_convert_detects_units_and_reads_shards_and_foreign_formats(call, tmp_path):
    (tmp_path / "shards").mkdir()
    for part in range(2):
        frame = pl.DataFrame({"user_id": [part], "item_id": [7], "timestamp": [(START + part) * 1000]})
        frame.write_parquet(tmp_path / "shards" / f"part-{part}.parquet")
    code, text, errors = call("convert", tmp_path / "shards", "--out", tmp_path / "a.parquet")
    assert code == 0, errors
    assert pl.read_parquet(tmp_path / "a.parquet")["timestamp"].to_list() == [START, START + 1]
    assert "(times in ms)" in text
    (tmp_path / "ratings.dat").write_text("1::31::4::1400000000\n2::31::3::1400000005\n")
    assert call("convert", tmp_path / "ratings.dat", "--out", tmp_path / "b.parquet")[0] == 0
    assert pl.read_parquet(tmp_path / "b.parquet").to_dicts()[1] == {
        "user_id": "2",
        "item_id": "31",
        "timestamp": 1400000005,
        "rating": 3,
    }
    code, text, _ = call(
        "convert", tmp_path / "a.parquet", "--timestamp-unit", "order", "--out", tmp_path / "c.parquet"
    )
    assert code == 0
    assert "ordered by the numbers 1,400,000,000 to 1,400,000,001" in text
    pl.DataFrame({"user_id": ["u"], "item_id": ["[red]"]}).write_parquet(tmp_path / "d.parquet")
    code, text, _ = call("convert", tmp_path / "d.parquet", "--out", tmp_path / "e.parquet")
    assert "[red]" in text
    assert "without times" in text


def test_convert_items(call, files):
    folder, _ = files
    source = folder / "items.jsonl.gz"
    code, text, _ = call(
        *("convert", source, "--kind", "items", "--out", folder / "items.parquet", "--item-column", "what", *TITLES)
    )
    assert code == 0
    assert Items.read(folder / "items.parquet").titles == [*(f"Item & {item}" for item in range(5)), "Acme"]
    assert "6 items, 1 of them without a title" in text


def test_split_writes_the_parts_and_their_account(call, files):
    folder, sources = files
    code, text, errors = call(
        "split", *sources, "--out", folder / "s", "--min-history", 4, "--json", folder / "s.json"
    )
    assert code == 0, errors
    document = json.loads((folder / "s/split.json").read_text())
    assert document == json.loads((folder / "s.json").read_text())
    assert document["protocol"] == {"split": "leave-one-out", "min_history": 4, "ties": "stable"}
    assert document["counts"]["training_interactions"] == 48
    assert document["content_hash"] in text
    test = pl.read_parquet(folder / "s/test.parquet")
    assert test.row(0, named=True) == {
        "user_id": "u0",
        "history": ["i0", "i1", "i2", "i3", "i4"],
        "target": "i5",
        "timestamp": START + 5 * DAY,
        "counted": True,
    }
    assert pl.read_parquet(folder / "s/valid.parquet")["history"].list.len().to_list() == [4] * 12
    code, text, _ = call(
        *("split", *sources, "--split", "global-temporal", "--valid-time", "2014-07-01", "--test-time", "2014-08-01"),
        *("--targets", "first", "--out", folder / "t"),
    )
    assert code == 0
    assert json.loads((folder / "t/split.json").read_text())["protocol"]["targets"] == "first"
    assert "2014-07-01T00:00:00+00:00" in text
    code, _, errors = call("split", *sources, "--split", "by-sample", "--valid-share", 0.9, "--out", folder / "v")
    assert (code, (folder / "v").exists()) == (2, False)
    assert "The shares are 0.9 for validation and 0.1 for test" in errors


def test_every_split_flag_reaches_the_split(call, files, monkeypatch):
    from llmrec.cli import preparation

    asked = []
    monkeypatch.setattr(preparation, "split", lambda sources, arguments, out, json_file: asked.append(arguments))
    monkeypatch.setattr(preparation, "report", lambda sources, arguments, *others: asked.append(arguments))
    folder, sources = files
    chosen = SplitArguments("by-sample", 0.2, 0.3, "2014", "2015", "first", 7, 8, "shuffle", 9)
    flags = [
        part
        for field in dataclasses.fields(SplitArguments)
        for part in (f"--{field.name.replace('_', '-')}", getattr(chosen, field.name))
    ]
    for command in ("split", "report"):
        assert call(command, *sources, "--out", folder)[0] == 0
        assert asked[-1] == SplitArguments()
        assert call(command, *sources, "--out", folder, *flags)[0] == 0
        assert asked[-1] == chosen


def parameters(name):
    command = typer.main.get_command(app).commands["data"].commands[name]
    return {option: parameter for parameter in command.params for option in parameter.opts}


def test_split_options_mirror_the_scripts_arguments():
    hints = typing.get_type_hints(SplitArguments)
    for command in ("split", "report"):
        found = parameters(command)
        for field in dataclasses.fields(SplitArguments):
            parameter = found[f"--{field.name.replace('_', '-')}"]
            assert parameter.default == field.default, field.name
            assert parameter.help.startswith(field.metadata["help"]), field.name
            assert typing.get_type_hints(getattr(commands, command))[field.name] == hints[field.name]


def test_column_options_are_those_of_the_scripts_and_all_reach_the_reader(call, files, monkeypatch):
    from llmrec.cli import preparation

    names = {field.name: field.name + "_x" for field in dataclasses.fields(ColumnNames) if field.name != "text"}
    flags = [part for name, value in names.items() for part in (f"--{name}-column", value)]
    seen = []
    for name in ("clean", "split", "report"):
        monkeypatch.setattr(preparation, name, lambda sources, *_, **__: seen.append(sources.names))
    monkeypatch.setattr(preparation, "convert", lambda source, out, kind, names, *_: seen.append(names))
    for command in ("clean", "split", "report", "convert"):
        for field in dataclasses.fields(ColumnArguments):
            assert field.name == "text_columns" or f"--{field.name.replace('_', '-')}" in parameters(command)
        sources = ["source"] if command == "convert" else ["--interactions", "log"]
        assert call(command, *sources, "--out", "o", *flags)[0] == 0
        assert call(command, *sources, "--out", "o")[0] == 0
        assert seen[-2:] == [ColumnNames(**names), ColumnNames()]
        for name in ("timestamp_unit", "invalid_rows"):
            hints = typing.get_type_hints(getattr(commands, command))
            assert hints[name] == typing.get_type_hints(ColumnArguments)[name]
    assert options.columns(user="who") == ColumnNames(user="who")


def test_every_command_s_help_has_an_example(call):
    names = list(typer.main.get_command(app).commands["data"].commands)
    assert names == ["clean", "convert", "split", "report", "merge", "entropy"]
    assert [command.callback.__name__ for command in commands.app.registered_commands] == names
    for name in names:
        code, text, _ = call(name, "--help")
        assert code == 0
        assert f"Example: llmrec data {name}" in text


@pytest.mark.parametrize("args", [["data", "--help"], ["data", "clean", "--help"], ["data", "report", "--help"]])
def test_help_imports_nothing_heavy(run_python, args):
    done = run_python(f"""
import sys
sys.argv = ["llmrec", *{args!r}]
from llmrec.cli.main import main
try:
    main()
finally:
    print("HEAVY", sorted({{"torch", "datasets", "matplotlib", "numpy", "polars", "scipy"}} & sys.modules.keys()))
""")
    assert done.stdout.strip().endswith("HEAVY []"), done.stdout + done.stderr


@pytest.fixture
def findings(monkeypatch):
    """A stand-in for the report, which says what it was asked and has one finding of each level."""
    asked = []
    made = types.ModuleType("llmrec.data.report")
    made.report = lambda *args, **options: (
        asked.append((args, options))
        or {
            "counts": {"users": 12, "density": 0.25, "of": {"x": 1}},
            "findings": [{"level": level, "sentence": f"{level} [b]it[/b]."} for level in ("ok", "note", "warning")],
        }
    )
    page = types.ModuleType("llmrec.data.report_page")
    page.page = lambda found: types.SimpleNamespace(write=lambda path: path.write_text(repr(found)))
    monkeypatch.setitem(sys.modules, "llmrec.data.report", made)
    monkeypatch.setitem(sys.modules, "llmrec.data.report_page", page)
    return asked


def test_report_prints_findings_and_writes_what_was_asked_for(call, files, findings, monkeypatch):
    folder, sources = files
    monkeypatch.chdir(folder)
    code, text, errors = call("report", *sources, "--seed", 3, "--json", folder / "r.json")
    assert code == 0, errors
    assert [line.strip() for line in text.splitlines() if "it[/b]" in line] == [
        "ok       ok [b]it[/b].",
        "note     note [b]it[/b].",
        "warning  warning [b]it[/b].",
    ]
    assert "density  0.25" in text
    assert json.loads((folder / "r.json").read_text())["counts"]["users"] == 12
    assert not list(folder.rglob("*.html"))
    (log, items, split), chosen = findings[-1]
    assert (len(log), items.ids[-1], len(split.rows)) == (72, "i6", 72)
    assert chosen == {"seed": 3, "seen": None}
    assert call("report", *sources)[0] == 0
    assert {file.name for file in (folder / "runs/report").iterdir()} == {"report.json", "report.html"}
    assert call("report", *sources, "--out", folder / "x", "--html", folder / "page.html")[0] == 0
    assert {file.name for file in (folder / "x").iterdir()} == {"report.json"}
    assert (folder / "page.html").is_file()


def test_the_real_report_finds_what_a_model_saw_and_items_without_a_row(call, files):
    folder, sources = files
    (folder / "seen.csv").write_text(LOG)
    code, text, errors = call("report", *sources, "--seen", folder / "seen.csv", "--out", folder / "r")
    assert code == 0, errors
    report = json.loads((folder / "r/report.json").read_text())
    assert report["counts"]["interactions"] == 72
    assert report["text"]["appended"] == 1
    assert report["split"]["protocol"]["split"] == "leave-one-out"
    for finding in report["findings"]:
        assert " ".join(finding["sentence"].split()) in " ".join(text.split())
    levels = [line.split()[0] for line in text.splitlines() if line.split()[:1] in (["warning"], ["note"], ["ok"])]
    assert levels == [finding["level"] for finding in report["findings"]]
    assert any(finding["level"] == "warning" and "saw" in finding["check"] for finding in report["findings"])
    assert "<svg" in (folder / "r/report.html").read_text()
    assert call("report", *sources, "--out", folder / "again")[0] == 0
    assert json.loads((folder / "again/report.json").read_text())["seen"] is None


@pytest.mark.parametrize("command", ["split", "report"])
@pytest.mark.parametrize("flag", ["--split-seed", "--tie-seed"])
def test_a_negative_seed_is_refused(call, files, command, flag):
    folder, sources = files
    code, _, errors = call(
        command, *sources, "--ties", "shuffle", "--split", "cold-users", flag, -1, "--out", folder / "o"
    )
    assert code == 2
    assert flag in errors
    assert "Traceback" not in errors
    log = Interactions.read(folder / "log.csv", ColumnNames(user="who", item="what", timestamp="when"))
    arguments = SplitArguments(split="cold-users", **{flag[2:].replace("-", "_"): -1})
    with pytest.raises(DataError, match=f"{flag} is -1, .*Give 0 or more"):
        arguments.make(log, Items.from_interactions(log))


def test_an_out_that_cannot_be_written_is_named(call, files):
    folder, sources = files
    (folder / "taken").write_text("precious")
    (folder / "folder").mkdir()
    for command in ("clean", "split", "report"):
        for out in (folder / "taken", folder / "taken/below"):
            code, _, errors = call(command, *sources, "--out", out)
            assert code == 2, errors
            assert "taken" in errors
            assert "cannot be written: " in " ".join(errors.split())
    for arguments in (
        ["convert", folder / "log.csv", *COLUMNS, "--out", folder / "folder"],
        ["split", *sources, "--out", folder / "s", "--json", folder / "folder"],
        ["report", *sources, "--json", folder / "folder"],
    ):
        code, _, errors = call(*arguments)
        assert code == 2, errors
        assert "folder cannot be written: Is a directory. Name another" in " ".join(errors.split())
    assert (folder / "taken").read_text() == "precious"


def test_what_a_model_saw_may_have_its_own_names(call, files):
    folder, sources = files
    assert call("split", *sources, "--out", folder / "s")[0] == 0
    log = pl.read_parquet(folder / "s/train.parquet")
    log.rename({"user_id": "who"}).write_csv(folder / "half.csv")
    log.with_columns(timestamp=pl.lit("never")).write_csv(folder / "times.csv")
    overlaps = []
    for seen in ("s/train.parquet", "half.csv", "times.csv"):
        code, _, errors = call("report", *sources, "--seen", folder / seen, "--json", folder / "r.json")
        assert code == 0, errors
        overlaps.append(json.loads((folder / "r.json").read_text())["seen"])
    assert overlaps[0] == overlaps[1] == overlaps[2]
    assert overlaps[0]["test"]["interactions"] == len(log)
    log.rename({"user_id": "person"}).write_csv(folder / "none.csv")
    code, _, errors = call("report", *sources, "--seen", folder / "none.csv", "--json", folder / "r.json")
    assert code == 2
    assert "none.csv has no column 'user_id'" in errors


def test_numbers_of_an_order_are_not_printed_as_dates(call, tmp_path):
    for scale, flags in ((1, []), (10**12, ["--timestamp-unit", "order"]), (10**6, ["--timestamp-unit", "order"])):
        rows = [
            f"u{user},i{(user + step) % 7},{(1 + step * 100 + user) * scale}"
            for user in range(10)
            for step in range(9)
        ]
        (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n" + "\n".join(rows) + "\n")
        arguments = ["split", "--interactions", tmp_path / "log.csv", "--split", "global-temporal", *flags]
        code, text, errors = call(*arguments, "--out", tmp_path / "s")
        assert code == 0, errors
        moment = json.loads((tmp_path / "s/split.json").read_text())["protocol"]["test_time"]
        line = next(line for line in text.splitlines() if line.strip().startswith("test time"))
        assert line.split()[-1] == f"{moment:,.6g}"


def test_eight_digits_are_a_day(call, tmp_path):
    def made(moment):
        log = Interactions.from_frame(
            pl.DataFrame(
                {
                    "user_id": ["u"] * 9,
                    "item_id": list("abcdefghi"),
                    "timestamp": [1_404_000_000 + 86_400 * day for day in range(9)],
                }
            )
        )
        arguments = SplitArguments(split="global-temporal", valid_time="2014-07-01", test_time=moment)
        return arguments.make(log, Items.from_interactions(log)).protocol["test_time"]

    assert (
        made("20140703") == made("2014-07-03") == made(" 2014-07-03T00:00:00Z") == made("1404345600") == 1_404_345_600
    )
    for moment in ("20140703.0", "20141303", "19790101", "21010101"):
        with pytest.raises(DataError, match=f"test at {moment.removesuffix('.0')}"):
            made(moment)
    for moment in ("nan", "inf", "monday"):
        with pytest.raises(DataError, match=f"'{moment}' is neither unix seconds nor"):
            made(moment)
    again = SplitArguments.from_protocol({"split": "global-temporal", "valid_time": 5, "test_time": 20140703})
    assert again.test_time == "20140703.0"

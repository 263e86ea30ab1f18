"""`llmrec scale`: its commands, and the report."""

import json

import numpy as np
import polars as pl
import pytest
import typer
from typer.testing import CliRunner

from llmrec.cli.main import app
from llmrec.exceptions import DataError

runner = CliRunner()


def test_every_command_s_help_has_an_example() -> None:
    names = list(typer.main.get_command(app).commands["scale"].commands)  # type: ignore[attr-defined]
    assert names == ["cost", "plan", "run", "fit", "predict", "report"]
    for name in names:
        result = runner.invoke(app, ["scale", name, "--help"])
        assert result.exit_code == 0
        assert f"Example: llmrec scale {name}" in " ".join(result.output.split())


def test_help_imports_nothing_heavy(run_python) -> None:  # type: ignore[no-untyped-def]
    done = run_python("""
import sys
sys.argv = ["llmrec", "scale", "report", "--help"]
from llmrec.cli.main import main
try:
    main()
except SystemExit:
    pass
heavy = {"torch", "transformers", "numpy", "polars", "scipy", "numba", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
""")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def points(tmp_path):  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(0)
    rows = [
        {
            "depth": depth,
            "width": width,
            "tokens": tokens,
            "quality": 0.19,
            "metric": 0.3 - 0.1 / depth - 1 / width + 0.01 * np.log(tokens / 1e6) + 0.001 * rng.normal(),
            "seed": 0,
            "encoder": encoder,
            "held_out": depth == 8,
            "seconds": depth * width,
            "loss": 5.0 + 0.1 * rng.normal(),
        }
        for encoder in ("hstu", "sasrec")
        for depth in (1, 2, 4, 8)
        for width in (16, 32, 64)
        for tokens in (5e5, 1e6)
    ]
    path = tmp_path / "points.csv"
    pl.DataFrame(rows).write_csv(path)
    return path


def test_the_report_is_one_file_of_all_encoders(points, tmp_path) -> None:  # type: ignore[no-untyped-def]
    page, document = tmp_path / "report.html", tmp_path / "report.json"
    given = ["scale", "report", "--points", str(points), "--out", str(page), "--json", str(document)]
    result = runner.invoke(app, [*given, "--resamples", "20", "--metric", "HR@10", "--title", "Ours"])
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "<title>Ours</title>" in text
    assert all(f"<h2>{name}</h2>" in text for name in ("hstu", "sasrec"))
    found = json.loads(document.read_text())
    assert found["metric"] == "HR@10"
    assert [entry["encoder"] for entry in found["encoders"]] == ["hstu", "sasrec"]
    for entry in found["encoders"]:
        assert entry["fit"]["n"] == 18
        assert len(entry["held_out"]) == 6
        assert entry["fit"]["verdict"].split(". ")[0] in " ".join(result.output.split())
    again = runner.invoke(app, [*given, "--resamples", "20", "--metric", "HR@10", "--title", "Ours"])
    assert again.exit_code == 0
    assert page.read_text(encoding="utf-8") == text


def test_a_table_that_is_none_is_refused(tmp_path) -> None:  # type: ignore[no-untyped-def]
    result = runner.invoke(app, ["scale", "report", "--points", str(tmp_path / "no.csv")])
    assert isinstance(result.exception, DataError)
    assert "There is no file" in str(result.exception)

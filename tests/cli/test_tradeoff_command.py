"""`llmrec tradeoff` as a user calls it."""

import json

import pytest
import typer
from sequence_models import random_sequence_recommender
from typer.testing import CliRunner

from llmrec.cli.tradeoff import tradeoff
from llmrec.exceptions import DataError
from llmrec.storage import write_json


@pytest.fixture(scope="module")
def app():
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(tradeoff)
    return made


def save_run(folder, system, seed, ndcg):
    random_sequence_recommender(seed=seed).save_pretrained(folder / "artefact")
    document = {"system": system, "split": "ab", "part": "test", "NDCG@10": ndcg, "NDCG@10 interval95": [0.0, 1.0]}
    write_json(folder / "evaluation" / f"{system}.json", document)
    write_json(folder / "metrics.json", {"system": system})


def test_runs_are_printed_and_written(app, tmp_path):
    save_run(tmp_path / "one", "[red]one", 0, 0.2)
    save_run(tmp_path / "two", "two", 1, 0.3)
    out, written = tmp_path / "page.html", tmp_path / "all.json"
    options = ["--out", str(out), "--json", str(written), "--repetitions", "1", "--batch", "2", "--batch", "1"]
    result = CliRunner().invoke(app, [str(tmp_path / "one"), str(tmp_path / "two"), *options])
    assert result.exit_code == 0, result.output
    assert "[red]one" in result.output  # a name is no markup
    found = json.loads(written.read_text())
    assert [point["name"] for point in found["points"]] == ["[red]one", "two"]
    assert list(found["points"][0]["latency"]) == ["1", "2"]
    assert found["machine"]["versions"]["llmrec"]
    assert out.read_text().count("<svg") == 1
    assert str(tmp_path) not in written.read_text()


def test_a_folder_without_a_run_is_refused(app, tmp_path):
    result = CliRunner().invoke(app, [str(tmp_path)])
    assert isinstance(result.exception, DataError)

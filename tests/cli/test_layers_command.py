"""`llmrec layers` as a user calls it."""

import json

import numpy as np
import polars as pl
import pytest
import typer
from factories import random_recommender
from sequence_models import random_sequence_recommender
from typer.testing import CliRunner

from llmrec.cli.layers import layers
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.data.protocols import leave_one_out
from llmrec.exceptions import DataError


@pytest.fixture(scope="module")
def app():
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(layers)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A log, and the artefact of a language model that says it was trained on it."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    rows = [(f"u{user}", f"item-{rng.integers(40)}", 1_500_000_000 + step) for user in range(25) for step in range(5)]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.rename({"user_id": "who"}).write_csv(folder / "log.csv")
    split = leave_one_out(
        Interactions.from_frame(frame), Items.from_frame(pl.DataFrame({"item_id": [f"item-{n}" for n in range(40)]}))
    )
    recommender = random_recommender()
    recommender.settings.split = split.content_hash
    recommender.settings.protocol = dict(split.protocol)
    recommender.save_pretrained(folder / "artefact")
    return folder


def test_curves_are_printed_and_written(app, data, tmp_path):
    options = [
        "--cases",
        "10",
        "--greedy",
        "--json",
        str(tmp_path / "layers.json"),
        "--html",
        str(tmp_path / "page.html"),
    ]
    given = [str(data / "artefact"), "--interactions", str(data / "log.csv"), "--user-column", "who"]
    result = CliRunner().invoke(app, [*given, *options])
    assert result.exit_code == 0, result.output
    found = json.loads((tmp_path / "layers.json").read_text())
    assert (found["layers"], found["cases"], found["artefact"]) == (2, 10, "artefact")
    assert [one["kept"] for one in found["keep_first"]] == [[0]]
    assert found["advice"] in result.output
    assert "Without one layer" in result.output
    assert "Greedily" in result.output
    assert (tmp_path / "page.html").read_text().count("<svg") == 3
    assert str(tmp_path) not in (tmp_path / "layers.json").read_text()
    again = CliRunner().invoke(app, [*given, *options])
    assert again.exit_code == 0
    assert json.loads((tmp_path / "layers.json").read_text()) == found


def test_another_log_is_refused(app, data, tmp_path):
    lines = (data / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(lines[:-1]) + "\n")
    given = [str(data / "artefact"), "--interactions", str(tmp_path / "log.csv"), "--user-column", "who"]
    result = CliRunner().invoke(app, given)
    assert isinstance(result.exception, DataError)
    assert "Give the file and the split that it was trained on." in str(result.exception)


def test_a_sequence_model_is_asked_too(app, data, tmp_path):
    recommender = random_sequence_recommender(encoder="sasrec")
    trained = json.loads((data / "artefact" / "llmrec.json").read_text())
    recommender.settings.split, recommender.settings.protocol = trained["split"], trained["protocol"]
    recommender.save_pretrained(tmp_path / "artefact")
    given = [str(tmp_path / "artefact"), "--interactions", str(data / "log.csv"), "--user-column", "who"]
    result = CliRunner().invoke(app, given)
    assert "one layer and none to spare" in str(result.exception)

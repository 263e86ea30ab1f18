"""`llmrec reasoning` on an app of the test's own: what it prints and writes, and what it refuses."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch
import typer
from typer.testing import CliRunner

from llmrec.artefact_parts import Settings
from llmrec.backbones.reasoning import ReasoningConfig
from llmrec.backbones.sasrec import SASRecConfig
from llmrec.catalog import Catalog
from llmrec.cli.reasoning import reasoning
from llmrec.data.arguments import SplitArguments
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.evaluation.evaluation import Evaluation, evaluate
from llmrec.exceptions import ArtefactError, BackboneError, DataError
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.model import SequenceModel, sequence_config
from llmrec.sequence.recommender import SequenceRecommender
from llmrec.sequence.scores import CaseScores

app = typer.Typer(rich_markup_mode="markdown")
app.command()(reasoning)


@app.callback()
def other() -> None:
    """So that the command keeps its name."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A log, and artefacts of an encoder that thinks and of one that does not."""
    folder = tmp_path_factory.mktemp("run")
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{rng.integers(30)}", 1_400_000_000 + 86_400 * step)
        for user in range(90)
        for step in range(int(rng.integers(4, 12)))
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")
    frame.write_csv(folder / "log.csv")
    log = Interactions.from_frame(frame)
    split = SplitArguments().make(log, Items.from_interactions(log))
    torch.manual_seed(0)
    inner = SASRecConfig(hidden_size=16, max_position_embeddings=12)
    for name, config in (("thinks", ReasoningConfig.around(inner, 2, "prl")), ("plain", inner)):
        model = SequenceModel(sequence_config(config, split.num_items, 10)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        training = {"system": "mine", "trainer": {"seed": 7}}
        settings = Settings(
            max_history=10, num_beams=1, split=split.content_hash, protocol=dict(split.protocol), training=training
        )
        catalog = Catalog.of_rows([{"item_id": item, "title": item} for item in split.item_ids])
        SequenceRecommender(model, catalog, settings).save_pretrained(folder / name)
    return folder


def call(run: Path, *words: Any, name: str = "thinks") -> str:
    given = ["reasoning", str(run / name), "--interactions", str(run / "log.csv"), "--device", "cpu", *map(str, words)]
    result = CliRunner().invoke(app, given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_every_step_is_measured_shown_and_written(run: Path, tmp_path: Path) -> None:
    files = ["--json", tmp_path / "r.json", "--html", tmp_path / "r.html", "--out", tmp_path / "steps"]
    shown = call(run, *files, "--rounds", 2)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["system"], report["kind"], report["encoder"], report["steps"]) == ("mine", "prl", "sasrec", 2)
    assert (report["part"], report["seeds"], report["cases"]) == ("test", {"training": 7, "cases": 0}, 90)
    log = Interactions.read(run / "log.csv")
    split = SplitArguments().make(log, Items.from_interactions(log))
    assert report["split"] == split.content_hash
    model = SequenceModel.from_pretrained(run / "thinks").eval()
    for steps in range(3):
        with model.encoder.thinking(steps):
            cases = CaseScores(model, LoggedHistories(split, model.events).cases("test"))
            expected = evaluate("m", split, scores=cases, ks=(10,)).document()
        row = report["by_step"][steps]
        assert row["NDCG@10"] == pytest.approx(expected["NDCG@10"])
        assert row["HR@10 interval95"] == pytest.approx(expected["HR@10 interval95"])
        assert f"{row['NDCG@10']:.4f}" in shown
        evaluation, document = Evaluation.load(tmp_path / "steps" / "evaluation" / f"mine-steps={steps}.json")
        assert document["NDCG@10"] == pytest.approx(row["NDCG@10"])
        assert evaluation.system == f"mine-steps={steps}"
    assert [row["histories"] for row in report["latency"]["batches"]] == [1, 64]
    assert all(len(row["milliseconds"]) == 3 for row in report["latency"]["batches"])
    assert "oracle" in shown
    assert "A ceiling" in shown
    assert "long users" in shown
    assert "<svg" in (tmp_path / "r.html").read_text()


def test_cases_can_be_drawn_and_the_timing_left_out(run: Path, tmp_path: Path) -> None:
    words = ["--part", "valid", "--max-cases", 40, "--seed", 3, "--rounds", 0, "--json", tmp_path / "r.json"]
    shown = call(run, *words)
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["part"], report["cases"], report["latency"]) == ("valid", 40, None)
    assert "ms, 1 at once" not in shown
    again = tmp_path / "again.json"
    call(run, *words[:-1], again)
    assert json.loads(again.read_text()) == report
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "r.json"]


def test_what_has_no_steps_or_another_split_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="answers without a step of thought"):
        call(run, name="plain")
    shutil.copytree(run / "thinks", tmp_path / "thinks")
    (tmp_path / "log.csv").write_text("\n".join((run / "log.csv").read_text().splitlines()[:-1]) + "\n")
    with pytest.raises(DataError, match="its training may hold what is held out here"):
        call(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(ArtefactError):
        call(tmp_path, name="none")

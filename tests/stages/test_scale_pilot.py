"""`llmrec scale plan` and `run` as a user gives them, with real trainings of seconds."""

import importlib.util
import json
import os
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import typer
from ring import write_ring
from typer.testing import CliRunner

from llmrec.cli import scale_pilot
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.items import Items
from llmrec.data.subset import learnt_split
from llmrec.exceptions import DataError, RecipeError
from llmrec.scaling.entropy import real_entropy
from llmrec.scaling.grid import GridRequest
from llmrec.scaling.pilot import Pilot, PilotEncoder
from llmrec.scaling.pilot_planner import Estimate, plan_pilot
from llmrec.scaling.pilot_runner import POINTS, PilotRunner
from llmrec.scaling.points import ScalingPoints
from llmrec.stages import stage_path

RECIPES = stage_path("train/recipes/sasrec.yaml").parent


@pytest.fixture(scope="module")
def app():
    found = typer.Typer()
    found.command("plan")(scale_pilot.plan)
    found.command("run")(scale_pilot.run)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("data"), users=120)


def split_of(path):
    interactions = ColumnArguments().read_interactions(path)
    return SplitArguments().make(interactions, Items.from_interactions(interactions))


@pytest.fixture
def alone(monkeypatch):
    """Trainings take one core each, and do not spin."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")


@pytest.mark.slow
def test_from_a_log_to_points(app, data, tmp_path, alone):
    out = tmp_path / "pilot"
    options = ["--recipe", "debug_seqrec.yaml", "--override", "max_steps=4", "--override", "eval_steps=2"]
    options += ["--depths", "1,2", "--widths", "8,16", "--shares", "1,0.5", "--seeds", "3", "--hold-out", "3x24"]
    given = ["plan", "--interactions", str(data / "log.csv"), *options, "--out", str(out)]
    done = CliRunner().invoke(app, [*given, "--budget-minutes", "1000"])
    assert done.exit_code == 0, done.output
    assert "9 trainings, about" in done.output
    assert "hstu: Two depths tell a slope, and no peak." in done.output
    assert "(held out)" in done.output
    assert "left out" not in done.output
    pilot = Pilot.load(out)
    assert pilot.data == {"interactions": str(data / "log.csv")}
    probes = pilot.basis["hstu"]["probes"]
    assert [(probe["depth"], probe["width"]) for probe in probes] == [(1, 8), (3, 24)]
    assert all(probe["seconds_per_step"] > 0 for probe in probes)
    # A further plan measures nothing again, and a budget that is too small says what would do.
    before = {path.name: path.stat().st_mtime_ns for path in (out / "probes").glob("*.json")}
    refused = CliRunner().invoke(app, [*given, "--budget-minutes", "0.01"])
    assert isinstance(refused.exception, DataError)
    assert "is below the smallest model, 1 layers of width 8 on 50% of the users" in str(refused.exception)
    assert before == {path.name: path.stat().st_mtime_ns for path in (out / "probes").glob("*.json")}
    assert len(before) == 2
    # The first training alone, then the next.
    for count in (1, 2):
        trained = CliRunner().invoke(app, ["run", str(out), "--max-minutes", "0.01"])
        assert trained.exit_code == 0, trained.output
        frame = pl.read_csv(out / POINTS)
        assert len(frame) == count
        assert f"{count} points" in trained.output
    learnt = learnt_split(split_of(data / "log.csv"), 0.5)
    kept = [one for one in learnt.train if len(one) > 1]
    for row in frame.iter_rows(named=True):
        assert (row["encoder"], row["seed"], row["held_out"]) == ("hstu", 3, False)
        assert 0 <= row["metric"] <= 1
        assert row["loss"] > 0
        assert row["seconds"] > 0
        assert row["flops"] > 0
        assert row["parameters"] > 60 * row["width"]
    half = frame.filter(pl.col("share") == 0.5).row(0, named=True)
    assert half["tokens"] == sum(map(len, kept))
    assert half["quality"] == pytest.approx(1 / real_entropy(np.concatenate(kept)))
    assert len(ScalingPoints.read(out / POINTS)) == 2
    folder = next(out.glob("runs/hstu-1x8-share0.5-seed=3-*"))
    # Its windows are those of the share: what is reported is what is learnt from.
    assert (
        f" {len(kept)} windows of {sum(len(one) - 1 for one in kept)} items, 50 valid"
        in (folder / "log.txt").read_text()
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    evaluation = json.loads(next((folder / "evaluation").glob("*.json")).read_text())
    for document in (metrics["training"], evaluation["settings"]):
        assert document["data"]["train_tokens"] == half["tokens"]
        assert document["data"]["train_users"] == len(kept)
        assert document["data"]["train_share"] == 0.5
    # The test, its cases and what they are ranked among are the whole split's.
    assert metrics["split"] == evaluation["split"] == split_of(data / "log.csv").content_hash
    assert metrics["test"]["cases"] == 120


@pytest.mark.slow
def test_a_language_model_s_training_is_a_point(data, tmp_path, alone):
    split = split_of(data / "log.csv")
    small = {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "num_beams": 10, "test_users": 30}
    entry = PilotEncoder.read("lm:debug", RECIPES, None, {**small, "semantic_ids": str(data / "ids")})
    request = GridRequest([1, 2], [16, 32], [0.5], [0])
    interactions = {"interactions": str(data / "log.csv")}
    plan_pilot(
        [entry], request, split, interactions, 9, lambda _: Estimate(lambda depth, width, tokens: depth * width)
    ).save(tmp_path)
    runner = PilotRunner(tmp_path)
    assert runner.run(max_minutes=0.001) == 0
    (row,) = runner.points()
    kept = [one for one in learnt_split(split, 0.5).train if len(one) > 1]
    assert (row["encoder"], row["depth"], row["width"], row["share"]) == ("lm:debug", 1, 16, 0.5)
    assert row["tokens"] == sum(map(len, kept))
    assert row["negatives"] is None
    assert row["flops"] is None
    assert 0 <= row["metric"] <= 1
    assert row["loss"] > 0
    place = runner.places[0][3]
    metrics = json.loads((place.folder / "metrics.json").read_text())
    assert metrics["test"]["cases"] == 30
    assert metrics["test"]["split"] == metrics["split"]
    assert metrics["training"]["data"]["tasks"] == ["sequence"]
    artefact = json.loads((place.artefact / "llmrec.json").read_text())
    assert artefact["training"]["data"]["train_users"] == len(kept)
    # Scored by hand, on the whole split, it is the same recommender.
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false"}
    argv = [sys.executable, str(stage_path("train/score.py")), "--artefact", str(place.artefact), "--out"]
    argv += [str(tmp_path / "score.json"), "--interactions", str(data / "log.csv"), "--max_users", "30"]
    done = subprocess.run([*argv, "--num_beams", "20"], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    scored = json.loads((tmp_path / "score.json").read_text())
    assert scored["split"] == metrics["split"]
    # Drawn alike: the same cases by the same seed, the same beams.
    assert scored["systems"]["llmrec"]["NDCG@10"] == pytest.approx(row["metric"], abs=1e-9)


def test_a_share_is_learnt_from_and_the_whole_is_kept(data):
    """What train/sft.py builds its rows of, and what it is tested on."""
    from llmrec.backbones.causal_lm import BackboneArguments
    from llmrec.tasks.arguments import DataArguments
    from llmrec.tasks.mixture import Mixture, Plan

    arguments = DataArguments(
        str(data / "log.csv"), "x", semantic_ids=str(data / "ids"), train_share=0.25, train_share_seed=1
    )
    held, whole, _ = arguments.read(ColumnArguments(), SplitArguments(), BackboneArguments())
    items = Items.from_frame(pl.DataFrame({"item_id": held.split.item_ids}))
    expected = SplitArguments().make(ColumnArguments().read_interactions(data / "log.csv"), items)
    assert whole.content_hash == expected.content_hash
    assert held.split.content_hash == learnt_split(expected, 0.25, 1).content_hash != whole.content_hash
    trained = sum(len(one) for one in held.split.train)
    assert 0 < trained < 0.4 * sum(len(one) for one in whole.train)
    learnt = sum(
        sum(label != -100 for label in row["labels"]) for row in Plan(Mixture.parse(["sequence"]), held, 0).rows()
    )
    assert learnt == 3 * trained


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--depths", "1,two"], "--depths is '1,two'. Give whole numbers"),
        (["--widths", "1.5 2"], "--widths is '1.5 2'. Give whole numbers"),
        (["--shares", "half"], "--shares is 'half'. Give numbers"),
        (["--hold-out", "8"], "--hold-out is '8'. Write DEPTHxWIDTH"),
        (["--hold-out", "8xx"], "--hold-out is '8xx'. Write DEPTHxWIDTH"),
        (["--depths", "4"], "One depth, 4, does not tell"),
        (["--override", "hidden_size=3"], "--override sets 'hidden_size'"),
        (["--override", "what"], "--override has 'what'"),
        (["--recipe", "none.yaml"], "none.yaml"),
        (["--encoder", "lm:none"], "none.yaml"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_refused_before_anything_is_measured(app, data, tmp_path, options, said):
    given = ["plan", "--interactions", str(data / "log.csv"), "--budget-minutes", "9", "--out", str(tmp_path / "out")]
    refused = CliRunner().invoke(app, [*given, *options])
    assert isinstance(refused.exception, DataError | RecipeError)
    assert said in str(refused.exception)
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_pilot_is_refused(app, tmp_path):
    refused = CliRunner().invoke(app, ["run", str(tmp_path)])
    assert isinstance(refused.exception, DataError)
    assert "pilot.json is no pilot that can be read" in str(refused.exception)
    assert not list(tmp_path.iterdir())


def test_heavy_packages_are_not_imported_for_help(run_python):
    code = (
        "import sys, llmrec.cli.scale_pilot; print(sorted({'torch', 'polars', 'scipy', 'numpy'} & set(sys.modules)))"
    )
    assert run_python(code).stdout.strip() == "[]"
    assert importlib.util.find_spec("torch") is not None

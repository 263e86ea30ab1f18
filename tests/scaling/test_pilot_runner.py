"""A pilot's trainings and the table of its points, with a script that stands for a training."""

import json
import sys

import polars as pl
import pytest

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.items import Items
from llmrec.data.sample import make_sample
from llmrec.exceptions import DataError, StageError
from llmrec.scaling import pilot_planner
from llmrec.scaling.grid import GridRequest
from llmrec.scaling.pilot import PilotEncoder
from llmrec.scaling.pilot_planner import Estimate, plan_pilot
from llmrec.scaling.pilot_runner import POINTS, PilotRunner, validation_loss
from llmrec.scaling.points import ScalingPoints
from llmrec.stages import stage_path
from llmrec.study import runner as study_runner

# Writes what a training writes; the metric tells the size, the share and the seed.
SCRIPT = """
import json, sys
from pathlib import Path
import yaml
flags = yaml.safe_load(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
folder = Path(sys.argv[sys.argv.index("--artefact") + 1]).parent
with open(folder.parent / "order.txt", "a") as order:
    order.write(flags["system"] + " " + str(flags["seed"]) + "\\n")
depth, width = flags["num_hidden_layers"], flags["hidden_size"]
if flags.get("breaks") == depth:
    sys.exit(3)
value = 0.01 * depth + 0.001 * width + 0.05 * flags["train_share"] + 0.0001 * flags["seed"]
data = {"train_tokens": 1000 + depth, "train_share": flags["train_share"]}
metrics = {
    "split": "s" * 64, "validation": [{"epoch": 1.0, "step": 2.0, "eval_loss": 2.5, "eval_NDCG@10": 0.1}],
    "test": {"NDCG@10": value, "HR@10": 0.2, "cases": 4, "slices": {}},
    "training": {"system": "x", "data": data, "trainer": {"seed": flags["seed"]}},
    "cost": {"parameters": 10 * width, "device": "cpu"}, "versions": {},
}
(folder / "metrics.json").write_text(json.dumps(metrics))
"""
RECIPES = stage_path("train/recipes/sasrec.yaml").parent
WHOLE = GridRequest([1, 2], [8, 16], [0.5, 1.0], [0, 1], [(3, 24)])
SMALL = GridRequest([1, 2], [8, 16], [1.0], [0], [(3, 24)])


@pytest.fixture
def commands(tmp_path, monkeypatch):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    found = []

    def command(name, arguments, launcher, options=()):
        found.append((name, launcher, options[options.index("--num_processes") + 1]))
        return [sys.executable, str(path), *arguments]

    monkeypatch.setattr(study_runner, "stage_command", command)
    monkeypatch.setattr(study_runner, "_LOOK", 0.01)
    monkeypatch.setattr(pilot_planner, "check_flags", lambda pilot, encoder: None)
    return found


@pytest.fixture
def planned(tmp_path):
    log = tmp_path / "log.parquet"
    make_sample(0, 100, 40)[0].write_parquet(log)
    interactions = ColumnArguments().read_interactions(log)
    split = SplitArguments().make(interactions, Items.from_interactions(interactions))

    def make(*names, request=SMALL, **overrides):
        recipe = "hstu_ml1m.yaml"
        encoders = [PilotEncoder.read(name, RECIPES, recipe, overrides) for name in names or ["hstu"]]

        def estimate(entry):
            return Estimate(
                lambda depth, width, tokens: depth * width * tokens / 1e4, lambda depth, width, tokens: depth * 1e9
            )

        pilot = plan_pilot(encoders, request, split, {"interactions": str(log)}, 1000, estimate)
        pilot.save(tmp_path / "pilot")
        return pilot

    return make


def order(tmp_path):
    return (tmp_path / "pilot/runs/order.txt").read_text().splitlines()


def test_every_training_is_a_row_and_what_is_done_is_not_repeated(tmp_path, commands, planned):
    pilot = planned("sasrec", request=WHOLE)
    runner = PilotRunner(tmp_path / "pilot")
    assert runner.left == len(runner.places) == 2 * 2 * 2 * 2 + 2
    assert runner.run() == 0
    assert runner.left == 0
    assert set(commands) == {("train/seqrec.py", "accelerate", "1")}
    # The first seed of all comes before any second one, and the shortest first.
    done = order(tmp_path)
    tokens = {share: facts.tokens for share, facts in pilot.shares["sasrec"].items()}
    sizes = [(d, w, share) for d in (1, 2) for w in (8, 16) for share in (0.5, 1.0)]
    ordered = sorted([*sizes, (3, 24, 1.0)], key=lambda size: size[0] * size[1] * tokens[size[2]])
    assert done[:9] == [f"sasrec-{depth}x{width}-share{share} 0" for depth, width, share in ordered]
    assert [line.split()[1] for line in done] == ["0"] * 9 + ["1"] * 9
    frame = pl.read_csv(tmp_path / "pilot" / POINTS)
    assert frame.columns == [
        *("depth", "width", "tokens", "quality", "metric", "seed", "encoder", "negatives", "share", "parameters"),
        *("flops", "seconds", "loss", "held_out"),
    ]
    assert len(frame) == 18
    for row in frame.iter_rows(named=True):
        expected = 0.01 * row["depth"] + 0.001 * row["width"] + 0.05 * row["share"] + 0.0001 * row["seed"]
        assert row["metric"] == pytest.approx(expected, rel=1e-12)
        assert row["tokens"] == 1000 + row["depth"]
        assert row["quality"] == pilot.shares[row["encoder"]][row["share"]].quality
        assert (row["negatives"], row["parameters"], row["loss"]) == (128, 10 * row["width"], 2.5)
        assert row["flops"] == row["depth"] * 1e9
        assert row["held_out"] == ((row["depth"], row["width"]) == (3, 24))
        assert row["seconds"] >= 0
    assert PilotRunner(tmp_path / "pilot").run() == 0
    assert order(tmp_path) == done
    # As a law reads it: held-out sizes apart, and one encoder at a time.
    points = ScalingPoints.read(tmp_path / "pilot" / POINTS)
    assert len(points) == 16
    assert 3 not in points.depth
    assert len(ScalingPoints.read(tmp_path / "pilot" / POINTS, held_out=True)) == 2


def test_a_failed_training_leaves_no_row_and_the_others_go_on(tmp_path, commands, planned):
    planned(breaks=2)
    runner = PilotRunner(tmp_path / "pilot")
    assert runner.run() == 1
    assert len(order(tmp_path)) == 5
    frame = pl.read_csv(tmp_path / "pilot" / POINTS)
    assert set(frame["depth"].to_list()) == {1, 3}
    assert runner.left == 2
    assert [state for *_, place in runner.places if (state := place.state()) != "done"] == ["failed"] * 2


def test_the_table_grows_with_each_training(tmp_path, commands, planned, monkeypatch):
    planned()
    heights, write = [], PilotRunner.write

    def counted(self):
        write(self)
        heights.append(len(pl.read_csv(tmp_path / "pilot" / POINTS)))

    monkeypatch.setattr(PilotRunner, "write", counted)
    PilotRunner(tmp_path / "pilot").run()
    assert heights == [0, 1, 2, 3, 4, 5]  # before, and after each


def test_no_training_begins_after_the_time_or_on_other_data(tmp_path, commands, planned):
    planned()
    runner = PilotRunner(tmp_path / "pilot")
    assert runner.run(max_minutes=1e-9) == 0
    assert runner.left == 5
    assert pl.read_csv(tmp_path / "pilot" / POINTS).height == 0
    for minutes in (-1.0, float("nan")):
        with pytest.raises(StageError, match="--max-minutes is"):
            runner.run(minutes)
    with pytest.raises(StageError, match="--processes is 0"):
        PilotRunner(tmp_path / "pilot", processes=0)
    PilotRunner(tmp_path / "pilot", processes=2).run(max_minutes=1e-3)
    assert {command[2] for command in commands} == {"2"}
    (tmp_path / "log.parquet").write_bytes(b"other")
    with pytest.raises(DataError, match="is another than when the pilot was planned"):
        PilotRunner(tmp_path / "pilot").run()


def test_language_models_are_trained_by_their_own_script(tmp_path, commands, planned):
    planned("hstu", "sasrec", "lm:debug", semantic_ids="codes")
    runner = PilotRunner(tmp_path / "pilot")
    assert runner.run() == 0
    assert [name for name, *_ in commands] == ["train/seqrec.py"] * 10 + ["train/sft.py"] * 5
    # Encoders of one script take turns, so that what a budget leaves undone is of all of them.
    trained = [line.split("-")[0] for line in order(tmp_path)]
    assert (trained[:2], trained[8:]) == (["hstu", "sasrec"], ["hstu", "sasrec", *["lm.debug"] * 5])
    frame = pl.read_csv(tmp_path / "pilot" / POINTS)
    assert frame.filter(pl.col("encoder") == "lm:debug")["negatives"].null_count() == 5
    recipe = (tmp_path / "pilot/runs").glob("lm.debug-1x8-share1.0-seed=0-*/recipe.yaml")
    text = next(recipe).read_text()
    assert "test_users: -1" in text
    assert "encoder" not in text
    with pytest.raises(DataError, match="points are of 3 encoders, hstu, lm:debug, sasrec"):
        ScalingPoints.read(tmp_path / "pilot" / POINTS)


@pytest.mark.parametrize(
    ("trainer", "rows", "expected"),
    [
        ({}, [(3.0, 0.1), (2.0, 0.3), (2.5, 0.2)], 2.5),
        ({"load_best_model_at_end": True}, [(3.0, 0.1), (2.0, 0.1), (2.5, 0.2)], 2.0),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "eval_NDCG@10"},
            [(3.0, 0.3), (2.0, 0.3), (2.5, 0.2)],
            3.0,
        ),
        ({"load_best_model_at_end": True, "metric_for_best_model": "NDCG@10"}, [(2.0, 0.1), (2.5, 0.2)], 2.5),
        ({}, [], None),
    ],
    ids=["last", "loss", "first of equals", "short name", "none"],
)
def test_the_loss_is_that_of_the_weights_that_were_tested(trainer, rows, expected):
    validation = [{"eval_loss": loss, "eval_NDCG@10": metric} for loss, metric in rows]
    metrics = json.loads(json.dumps({"validation": validation, "training": {"trainer": trainer}}))
    assert validation_loss(metrics) == expected

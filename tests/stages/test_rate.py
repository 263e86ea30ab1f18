"""The rating script as a user runs it, on users whose taste shows in what they liked before."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from factories import random_recommender
from sklearn.metrics import roc_auc_score

from llmrec import Recommender
from llmrec.data.arguments import SplitArguments
from llmrec.data.interactions import Interactions
from llmrec.data.items import Items
from llmrec.exceptions import LLMRecError
from llmrec.rating import Question, Rater, load_calibration
from llmrec.tasks.templates import shipped_templates

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def artefact(tmp_path_factory):
    """A log of ratings, and an artefact of its split that knows nothing."""
    folder = tmp_path_factory.mktemp("rate")
    rng = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"item-{item}", step, int(rng.integers(1, 6)) if rng.random() > 0.1 else None)
        for user in range(30)
        for step, item in enumerate(rng.permutation(40)[:7].tolist())
    ]
    frame = pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp", "verdict"], orient="row")
    frame.write_parquet(folder / "log.parquet")
    recommender = random_recommender(2, hidden_size=32, max_positions=400)
    interactions = Interactions.from_frame(frame.rename({"verdict": "rating"}))
    items = Items.from_frame(pl.DataFrame({"item_id": recommender.catalog.ids}))
    arguments = SplitArguments(split="global-temporal", valid_share=0.2, test_share=0.2)
    split = arguments.make(interactions, items)
    recommender.settings.split, recommender.settings.protocol = split.content_hash, dict(split.protocol)
    recommender.settings.training = {"data": {"like_threshold": 3.0}}
    recommender.templates = shipped_templates(["yes_no"])
    recommender.save_pretrained(folder / "artefact")
    return folder, split


def flags_of(folder, out, *flags):
    command = ["--artefact", str(folder / "artefact"), "--out", str(out), "--device", "cpu"]
    return [*command, "--interactions", str(folder / "log.parquet"), *flags]


def rate(folder, out, *flags):
    """What the script writes, run in this process: loading the libraries costs more than the run."""
    spec = importlib.util.spec_from_file_location("rate", "train/rate.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["rate"] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    argv = flags_of(folder, out, "--rating_column", "verdict", *flags)
    script.main(*script.make_parser().parse_args_and_config(argv, fail_with_unknown_args=True))
    return json.loads(out.read_text())


def test_raw_then_calibrated_then_from_the_artefact(artefact, tmp_path):
    folder, split = artefact
    raw = rate(folder, tmp_path / "raw.json", "--template", "semantic_ids")
    # The questions and labels, from the log by hand.
    rater = Rater.of(Recommender.from_pretrained(folder / "artefact", device="cpu"), "semantic_ids")
    questions, labels = [], []
    for place in split.positions["test"].tolist():
        if split.train_counts[split.rows[place]] == 0 or np.isnan(split.ratings[place]):
            continue  # an item that training does not hold is kept apart
        before = range(int(split.offsets[split.owner[place]]), place)
        known = [other for other in before if not np.isnan(split.ratings[other])][-6:]
        liked = [int(split.rows[other]) for other in known if split.ratings[other] >= 3]
        disliked = [int(split.rows[other]) for other in known if split.ratings[other] < 3]
        questions.append(Question(liked, disliked, int(split.rows[place])))
        labels.append(int(split.ratings[place] >= 3))
    assert raw["cases"] == len(labels)
    assert raw["liked_share"] == pytest.approx(np.mean(labels))
    assert raw["systems"]["raw"]["AUC"] == pytest.approx(roc_auc_score(labels, rater.logits(questions)))
    assert set(raw["systems"]) == {"raw", "share_of_likes", "item_share_of_likes"}
    training = split.ratings[split.in_training]
    share = np.mean(training[~np.isnan(training)] >= 3)
    assert raw["systems"]["share_of_likes"]["mean_probability"] == pytest.approx(share)
    low, high = raw["systems"]["raw"]["Brier interval95"]
    assert low < raw["systems"]["raw"]["Brier"] < high

    fitted = rate(folder, tmp_path / "fit.json", "--template", "semantic_ids", "--calibrate")
    assert fitted["calibration"]["fitted_on"]["part"] == "valid"
    assert fitted["systems"]["raw"] == raw["systems"]["raw"]
    # A model that knows nothing is sure of itself; what it says is worth no more than the share of likes.
    assert fitted["systems"]["calibrated"]["log_loss"] < raw["systems"]["raw"]["log_loss"]
    calibrator, template, _ = load_calibration(folder / "artefact")
    assert template == "semantic_ids"
    again = rate(folder, tmp_path / "again.json")
    assert again["systems"]["calibrated"] == fitted["systems"]["calibrated"]
    assert again["calibration"] == fitted["calibration"]
    assert again["calibration"]["slope"] == calibrator.slope
    # Another threshold asks another question, of which this calibration knows nothing.
    stricter = rate(folder, tmp_path / "stricter.json", "--like_threshold", "5")
    assert (set(stricter["systems"]) & {"raw", "calibrated"}, stricter["calibration"]) == ({"raw"}, None)
    other = rate(folder, tmp_path / "other.json", "--template", "titles", "--max_cases", "10")
    assert "calibrated" not in other["systems"]
    assert other["cases"] == 10


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--like_threshold", "9", "--calibrate"], r"are No\. Calibrate on both kinds"),
        (["--split", "leave-one-out", "--min_history", "4"], "say --any_split"),
        (["--template", "absent"], "There is no template 'absent'"),
        (["--artefact", "me/rec", "--calibrate"], "is no folder, and a calibration is saved in the artefact"),
    ],
)
def test_what_cannot_be_rated_is_refused(artefact, tmp_path, flags, message):
    with pytest.raises(LLMRecError, match=message):
        rate(artefact[0], tmp_path / "none.json", *flags)
    assert not (tmp_path / "none.json").exists()


def test_an_error_is_one_line_on_the_command_line(artefact, tmp_path):
    command = [sys.executable, "train/rate.py", *flags_of(artefact[0], tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "error: The interactions have no ratings" in done.stderr
    assert "Traceback" not in done.stderr

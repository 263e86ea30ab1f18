"""train/seqrec.py as a user runs it, on a ring of items."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
import torch
from ring import NUM_ITEMS, write_ring
from safetensors.torch import load_file

from llmrec import Recommender
from llmrec.evaluation.evaluation import Evaluation
from llmrec.exceptions import LLMRecError
from llmrec.script import parse
from llmrec.stages import stage_command, stage_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def script():
    """train/seqrec.py as a module."""
    spec = importlib.util.spec_from_file_location("seqrec", stage_path("train/seqrec.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("data"), users=240)


def command(data, artefact, *flags, config="single"):
    launcher = ["--config_file", f"train/accelerate/{config}.yaml"]
    small = ["--hidden_size", "32", "--max_history", "10", "--dropout", "0.1", "--learning_rate", "0.005"]
    small += ["--eval_strategy", "epoch", "--save_strategy", "epoch", "--per_device_train_batch_size", "32"]
    given = ["--interactions", str(data / "log.csv"), "--artefact", str(artefact), "--disable_tqdm", "true"]
    return stage_command("train/seqrec.py", [*given, *small, *flags], launcher_args=launcher)


def run(data, artefact, *flags, config="single", check=True):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        command(data, artefact, *flags, config=config), capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.mark.parametrize("encoder", ["hstu", "sasrec"])
def test_from_a_log_to_an_artefact_and_its_metrics(data, tmp_path, encoder):
    artefact = tmp_path / "run" / "artefact"
    best = ["--load_best_model_at_end", "true", "--metric_for_best_model", "eval_NDCG@10"]
    run(
        data,
        artefact,
        "--encoder",
        encoder,
        "--num_train_epochs",
        "12",
        "--items",
        str(data / "ids/items.jsonl"),
        *best,
    )
    metrics = json.loads((artefact.parent / "metrics.json").read_text())
    assert metrics["system"] == encoder
    assert [round(row["epoch"]) for row in metrics["validation"]] == list(range(1, 13))
    assert all({"eval_loss", "eval_HR@10", "eval_NDCG@10"} <= set(row) for row in metrics["validation"])
    assert metrics["test"]["HR@10"] > 0.9
    assert {"HR@5", "NDCG@20", "MRR@50", "slices"} <= set(metrics["test"])
    assert metrics["training"]["encoder"]["encoder"] == encoder
    assert metrics["training"]["trainer"]["seed"] == metrics["test"]["seeds"]["training"] == 42
    assert metrics["cost"]["parameters"] > 0
    assert (artefact.parent / "training.html").is_file()
    _, document = Evaluation.load(artefact.parent / "evaluation" / f"{encoder}.json")
    assert document["HR@10"] == metrics["test"]["HR@10"]
    assert document["split"] == metrics["split"]
    assert str(tmp_path) not in (artefact / "llmrec.json").read_text()
    # The artefact recommends as the test ranked.
    recommender = Recommender.from_pretrained(artefact)
    found = recommender.recommend([f"item-{row}" for row in (20, 21, 22)], k=10)
    assert "item-23" in [one.item_id for one in found]
    assert found[0].title.startswith("Item number")
    log = pl.read_csv(data / "log.csv")
    histories = log.group_by("user_id", maintain_order=True).agg(pl.col("item_id"))
    rows = {item: row for row, item in enumerate(recommender.catalog.ids)}
    lists = recommender.recommend_rows(
        [[rows[item] for item in one[:-1]] for one in histories["item_id"].to_list()], 10
    )[0]
    hits = [rows[one[-1]] in found for one, found in zip(histories["item_id"].to_list(), lists, strict=True)]
    assert np.mean(hits) == pytest.approx(metrics["test"]["HR@10"], abs=1e-9)
    assert len(recommender.catalog) == NUM_ITEMS
    scored = tmp_path / "scored.json"
    argv = [sys.executable, "train/score.py", "--artefact", str(artefact), "--out", str(scored)]
    subprocess.run([*argv, "--interactions", str(data / "log.csv")], check=True, capture_output=True)
    again = json.loads(scored.read_text())
    assert again["split"] == metrics["split"]
    assert again["systems"]["llmrec"]["HR@10"] == pytest.approx(metrics["test"]["HR@10"], abs=1e-9)
    assert again["invalid_rate"] == again["duplicate_rate"] == 0


@pytest.mark.parametrize("config", ["ddp", "fsdp"])
def test_two_processes_train_as_one(data, tmp_path, config):
    found = []
    flags = ["--max_steps", "10", "--logging_steps", "1", "--dropout", "0", "--use_cpu", "true"]
    flags += ["--save_strategy", "no", "--eval_strategy", "steps", "--eval_steps", "10"]
    for name, size, setting in (("one", "16", "single"), ("two", "8", config)):
        artefact = tmp_path / name / "artefact"
        run(data, artefact, *flags, "--per_device_train_batch_size", size, config=setting)
        lines = (tmp_path / name / "artefact.checkpoints" / "log.jsonl").read_text().splitlines()
        metrics = json.loads((tmp_path / name / "metrics.json").read_text())
        found.append(([json.loads(line) for line in lines], load_file(artefact / "model.safetensors"), metrics))
    (one, weights, whole), (two, others, shared) = found
    for name in ("loss", "eval_loss", "eval_HR@10", "eval_NDCG@50"):
        values = [[line[name] for line in lines if name in line] for lines in (one, two)]
        assert values[0]
        np.testing.assert_allclose(values[1], values[0], rtol=0, atol=1e-5)
    assert set(weights) == set(others)
    for name, weight in weights.items():
        torch.testing.assert_close(others[name], weight, rtol=0, atol=1e-4)
    assert shared["test"]["HR@10"] == pytest.approx(whole["test"]["HR@10"], abs=1e-9)


def test_a_run_that_is_stopped_goes_on(data, tmp_path):
    artefact = tmp_path / "artefact"
    flags = ["--num_train_epochs", "40", "--logging_steps", "1", "--eval_strategy", "no", "--save_strategy", "no"]
    # Without a launcher, which passes no signal on.
    argv = [sys.executable, *command(data, artefact, *flags)[5:]]
    log = tmp_path / "artefact.checkpoints" / "log.jsonl"
    with subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not log.is_file() or log.read_text().count('"loss"') < 20:
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "the same command continues" in said
    assert not artefact.exists()
    done = run(data, artefact, *flags)
    assert "continuing from" in done.stderr
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()][:-1] == list(range(1, 8 * 40 + 1))
    assert json.loads((tmp_path / "metrics.json").read_text())["test"]["HR@10"] > 0.9


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--encoder", "gru4rec", "--relative_bias", "time"], "gru4rec has no relative_bias"),
        (["--representation", "text"], "--item_embeddings"),
        (["--action_tokens", "before"], "no column of actions"),
        (["--metric_for_best_model", "eval_HR@7"], "metric_for_best_model"),
        (["--stochastic_length", "3"], "--stochastic_length is 3"),
        (["--table_size", "100"], "--table_size"),
        (["--max_history", "0"], "--max_history is 0"),
        (["--encoder", "hstu", "--body", "gpt2"], "--body"),
        (["--system", "a/b"], "cannot name a file"),
    ],
    ids=["bias", "text", "action", "metric", "alpha", "table", "history", "body", "system"],
)  # fmt: skip
def test_what_cannot_be_is_said_at_once(data, tmp_path, script, flags, said):
    given = ["--interactions", str(data / "log.csv"), "--artefact", str(tmp_path / "artefact"), *flags]
    with pytest.raises(LLMRecError, match=said) as caught:
        script.main(*parse(script.make_parser(), given))
    assert str(caught.value).count(". ") >= 1  # what is wrong, and what to do
    assert not list(tmp_path.iterdir())

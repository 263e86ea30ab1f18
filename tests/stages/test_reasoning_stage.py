"""train/seqrec.py with --reasoning as a user runs it, and the artefact that comes of it."""

import importlib.util
import json
import os
import subprocess

import numpy as np
import polars as pl
import pytest
import torch
from ring import write_ring
from safetensors.torch import load_file

from llmrec import Recommender
from llmrec.exceptions import LLMRecError
from llmrec.script import parse
from llmrec.stages import stage_command, stage_path

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("data"), users=160)


def run(data, artefact, *flags, log="log.csv"):
    recipe = ["--config", "train/recipes/reasoning_debug.yaml", "--interactions", str(data / log)]
    argv = [*stage_command("train/seqrec.py"), *recipe, "--artefact", str(artefact), "--use_cpu", "true", *flags]
    launched = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(argv, check=True, capture_output=True, text=True, env=launched)


def test_it_thinks_is_saved_tested_and_recommends(data, tmp_path):
    artefact = tmp_path / "run" / "artefact"
    more = ["--max_steps", "120", "--eval_steps", "60", "--save_steps", "60", "--hidden_size", "32"]
    run(data, artefact, "--reasoning", "erl", "--reasoning_steps", "3", "--learning_rate", "0.005", *more)
    metrics = json.loads((artefact.parent / "metrics.json").read_text())
    assert metrics["test"]["HR@10"] > 0.8
    said = metrics["training"]["reasoning"]
    assert (said["reasoning"], said["reasoning_steps"]) == ("erl", 3)
    assert (artefact.parent / "evaluation" / "sasrec.json").is_file()
    config = json.loads((artefact / "config.json").read_text())["encoder"]
    assert (config["model_type"], config["steps"], config["kind"]) == ("reasoning", 3, "erl")
    assert load_file(artefact / "model.safetensors")["encoder.step_vectors"].shape == (3, 32)
    recommender = Recommender.from_pretrained(artefact, device="cpu")
    assert "item-23" in [one.item_id for one in recommender.recommend([f"item-{row}" for row in (20, 21, 22)], k=10)]
    log = pl.read_csv(data / "log.csv").group_by("user_id", maintain_order=True).agg(pl.col("item_id"))
    rows = {item: row for row, item in enumerate(recommender.catalog.ids)}
    histories = [[rows[item] for item in one] for one in log["item_id"].to_list()]
    lists = recommender.recommend_rows([one[:-1] for one in histories], 10)[0]
    hits = np.mean([one[-1] in found for one, found in zip(histories, lists, strict=True)])
    assert hits == pytest.approx(metrics["test"]["HR@10"], abs=1e-9)


def test_without_a_step_the_weights_are_the_plain_encoder_s(data, tmp_path):
    found = []
    for name, flags in (("none", ["--reasoning", "none"]), ("zero", ["--reasoning", "prl", "--reasoning_steps", "0"])):
        recipe = tmp_path / f"{name}.yaml"
        lines = (stage_path("train/recipes/reasoning_debug.yaml")).read_text().splitlines()
        recipe.write_text("\n".join(line for line in lines if not line.startswith("reasoning")) + "\n")
        artefact = tmp_path / name / "artefact"
        argv = [*stage_command("train/seqrec.py"), "--config", str(recipe), "--interactions", str(data / "log.csv")]
        argv += ["--artefact", str(artefact), "--use_cpu", "true", *flags]
        subprocess.run(argv, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found.append(load_file(artefact / "model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_steps_have_tasks_of_their_own(data, tmp_path):
    rng = np.random.default_rng(0)
    log = pl.read_csv(data / "log.csv")
    done = ["buy" if bought else "view" for bought in rng.random(len(log)) < 0.4]
    log.with_columns(pl.Series("action", done)).write_csv(tmp_path / "acts.csv")
    artefact = tmp_path / "run" / "artefact"
    flags = ["--reasoning", "block", "--reasoning_block", "2", "--reasoning_tasks", "any=1", "buy=2"]
    run(tmp_path, artefact, *flags, log="acts.csv")
    config = json.loads((artefact / "config.json").read_text())
    assert config["encoder"]["block_size"] == 2
    assert config["events"]["actions"] == ["buy", "view"]
    assert config["events"]["action_tokens"] == "none"
    metrics = json.loads((artefact.parent / "metrics.json").read_text())
    assert metrics["training"]["reasoning"]["reasoning_tasks"] == ["any=1", "buy=2"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--reasoning_steps", "2"], "--reasoning_steps is given"),
        (["--reasoning", "prl", "--encoder", "bert4rec"], "both sides"),
        (["--reasoning", "erl", "--loss", "bce"], "judges each item for itself"),
        (["--reasoning", "block", "--reasoning_tasks", "any=1", "buy=1"], "no column of actions"),
    ],
    ids=["none", "bert4rec", "bce", "tasks"],
)
def test_what_cannot_be_is_said_at_once(data, tmp_path, flags, said):
    spec = importlib.util.spec_from_file_location("seqrec_for_reasoning", stage_path("train/seqrec.py"))
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    given = ["--interactions", str(data / "log.csv"), "--artefact", str(tmp_path / "artefact"), *flags]
    with pytest.raises(LLMRecError, match=said) as caught:
        script.main(*parse(script.make_parser(), [*given, "--use_cpu", "true"]))
    assert str(caught.value).count(". ") >= 1
    assert not list(tmp_path.iterdir())

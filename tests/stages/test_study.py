"""The recipes of sequence models and studies, and a study as a user runs it."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoModel

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.data.sample import make_sample
from llmrec.exceptions import RecipeError, StageError
from llmrec.losses.arguments import LossArguments
from llmrec.reasoning.arguments import ReasoningArguments
from llmrec.script import parse, parser
from llmrec.sequence.arguments import EncoderArguments, EventArguments, ItemArguments, SequenceArguments
from llmrec.study.place import RunPlace
from llmrec.training.arguments import StageArguments

ARGUMENTS = (
    *(SequenceArguments, ColumnArguments, SplitArguments, EncoderArguments, ItemArguments, EventArguments),
    *(LossArguments, ReasoningArguments, StageArguments),
)
MODELS = (
    *("bert4rec", "cross_domain", "debug_seqrec", "esasrec", "gpt2_items", "gru4rec", "hstu_large_ml1m", "hstu_ml1m"),
    *("llama_items", "reasoning_block", "reasoning_debug", "reasoning_erl", "reasoning_prl", "reasoning_prl_gpu"),
    *("sasrec", "sasrec_ml1m"),
)


@pytest.fixture(scope="module")
def script(checkout):
    spec = importlib.util.spec_from_file_location("study", checkout / "train/study.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["study"] = module
    spec.loader.exec_module(module)
    return module


def plan_of(script, recipe, *flags):
    config = ["--config", str(recipe), "--interactions", "log.csv", "--runs", "runs", *flags]
    (arguments,) = parse(script.make_parser(), config)
    arguments.check()
    return arguments, arguments.plan(script.RECIPES)


@pytest.mark.parametrize("name", MODELS)
def test_the_recipe_s_flags_make_a_model(checkout, tmp_path, name):
    recipe = checkout / f"train/recipes/{name}.yaml"
    config = ["--config", str(recipe), "--interactions", "log.csv", "--artefact", str(tmp_path / "artefact")]
    data, _, _, encoder, item, event, losses, reasoning, training = parse(parser(ARGUMENTS, None), config)
    for flags in (data, item, losses, reasoning):
        flags.check()
    with torch.device("meta"):
        AutoModel.from_config(reasoning.config(encoder, 2 * data.max_history + 1))
    values = yaml.safe_load(recipe.read_text())
    said = vars(data) | vars(encoder) | vars(item) | vars(event) | vars(losses) | vars(reasoning)
    assert {key: said[key] for key in values if key in said} == {key: values[key] for key in values if key in said}
    assert training.seed == 0
    first = recipe.read_text().splitlines()
    assert any(f"train/seqrec.py --config train/recipes/{name}.yaml" in line for line in first[:2])


def test_hstu_is_as_published(checkout):
    """The published configurations of MovieLens-1M (arXiv 2402.17152 and its public code)."""
    common = {
        **{"hidden_size": 50, "dropout": 0.2, "max_history": 200, "windows": "last", "num_negatives": 128},
        **{"temperature": 0.05, "similarity": "cosine", "learning_rate": 0.001, "weight_decay": 0.0},
        **{"per_device_train_batch_size": 128, "num_train_epochs": 101, "loss": "sampled_softmax", "log_q": False},
    }
    hstu = {"relative_bias": "position+time", "request_time": True, "encoder": "hstu"}
    for name, own in (
        ("hstu_ml1m", hstu | {"num_hidden_layers": 2, "num_attention_heads": 1, "qk_dim": 50, "v_dim": 50}),
        ("hstu_large_ml1m", hstu | {"num_hidden_layers": 8, "num_attention_heads": 2, "qk_dim": 25, "v_dim": 25}),
        ("sasrec_ml1m", {"encoder": "sasrec", "num_hidden_layers": 2, "num_attention_heads": 1, "norm": "authors"}),
    ):
        values = yaml.safe_load((checkout / f"train/recipes/{name}.yaml").read_text())
        assert values.items() >= (common | own).items()


@pytest.mark.parametrize(
    ("name", "count", "curve"),
    [
        *(("rq1", 48, "num_hidden_layers"), ("rq2", 39, None), ("debug", 4, "num_hidden_layers")),
        *(("ml1m", 12, None), ("beauty", 9, None), ("reasoning", 30, None)),
    ],
)
def test_the_study_s_recipe_is_a_plan_of_models(script, name, count, curve):
    _, plan = plan_of(script, script.RECIPES / f"study_{name}.yaml")
    assert len(plan.runs) == count
    assert plan.curve == curve
    script.check(plan)
    # Nothing but what is studied differs.
    widths = {run.flags["hidden_size"] for run in plan.runs}
    assert len(widths) == 1
    told = {run.variant: bool(run.flags.get("request_time")) for run in plan.runs}
    # HSTU's own bias has a part for time; who is told the time of a request reads it.
    biases = {run.variant: str(run.flags.get("relative_bias", "position+time")) for run in plan.runs}
    assert all("time" in biases[variant] for variant in told if told[variant])


def test_what_a_run_s_script_would_refuse_is_refused_before_the_first(script, tmp_path):
    recipe = tmp_path / "study.yaml"
    for variants, message in (
        ({"a": {}, "b": {"encoder": "gru4rec", "gate": True}}, "b: gru4rec has no gate"),
        ({"a": {"hiden_size": 3}}, "unknown key 'hiden_size'. Did you mean hidden_size"),
        ({"a": {"score": "tanh"}}, "a: .*tanh"),
        ({"a": {"loss": "bce", "negatives": "in_batch"}}, "a: The loss bce"),
    ):
        recipe.write_text(yaml.safe_dump({"base": "debug_seqrec.yaml", "variants": variants, "seeds": [0]}))
        _, plan = plan_of(script, recipe)
        with pytest.raises(RecipeError, match=message):
            script.check(plan)


def test_the_listing_runs_nothing(script, tmp_path, caplog):
    caplog.set_level("INFO", "llmrec")
    recipe = script.RECIPES / "study_debug.yaml"
    arguments, _ = plan_of(script, recipe, "--list", "--runs", str(tmp_path / "none"))
    script.main(arguments)
    lines = [record.getMessage() for record in caplog.records]
    assert lines[0] == "new     hstu-num_hidden_layers=1, seed 0"
    assert lines[-1] == "4 runs: 4 new; no estimate yet"
    assert not (tmp_path / "none").exists()
    for flags, message in (
        (["--processes", "0"], "--processes is 0"),
        (["--max_minutes", "-1"], "--max_minutes is -1"),
    ):
        with pytest.raises(RecipeError, match=message):
            plan_of(script, recipe, *flags)


def test_runs_that_are_left_out_now_are_of_as_many_processes(script, tmp_path):
    """Their results stand in the same table."""
    recipe = script.RECIPES / "study_debug.yaml"
    arguments, plan = plan_of(script, recipe, "--only", "hstu-num_hidden_layers=1", "--runs", str(tmp_path / "runs"))
    left_out = next(run for run in plan.runs if run.cell != "hstu-num_hidden_layers=1")
    place = RunPlace(tmp_path / "runs", left_out)
    place.folder.mkdir(parents=True)
    place.note(1.0)
    trained = {"test": {"NDCG@10": 0.1}, "training": {"trainer": {"world_size": 2}}}
    (place.folder / "metrics.json").write_text(json.dumps(trained))
    with pytest.raises(StageError, match=r"was trained by 2 process\(es\), and --processes is 1"):
        script.main(arguments)


@pytest.mark.slow
def test_a_study_as_a_user_runs_it(checkout, tmp_path):
    interactions, items = make_sample(0, 100, 120)
    interactions.write_parquet(tmp_path / "log.parquet")
    items.write_parquet(tmp_path / "items.parquet")
    command = [sys.executable, "train/study.py", "--config", "train/recipes/study_debug.yaml"]
    command += ["--interactions", str(tmp_path / "log.parquet"), "--runs", str(tmp_path / "runs")]
    command += ["--only", "hstu-num_hidden_layers=1", "--override", "max_steps=4", "eval_steps=2", "save_steps=2"]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}

    def run():
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stderr

    assert "hstu-num_hidden_layers=1, seed 0: done" in run()
    results = json.loads((tmp_path / "runs/results.json").read_text())
    assert [each["state"] for each in results["runs"]] == ["done", "new", "new", "new"]
    first = results["runs"][0]
    assert first["flags"]["max_steps"] == 4
    assert [row["step"] for row in first["validation"]] == [2, 4]
    assert set(results["metrics"]) <= set(first["test"])
    assert "1 of 4 runs are done" in (tmp_path / "runs/table.md").read_text()
    assert "<svg" in (tmp_path / "runs/study.html").read_text()
    written = (tmp_path / "runs" / first["folder"] / "metrics.json").stat().st_mtime_ns
    assert "0 of 1 runs are left" in run()
    assert (tmp_path / "runs" / first["folder"] / "metrics.json").stat().st_mtime_ns == written

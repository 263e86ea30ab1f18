"""The training and scoring scripts as a user runs them, on a tiny catalog."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from ring import NUM_ITEMS, write_ring
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llmrec import Recommender
from llmrec.backbones.causal_lm import BackboneArguments, from_scratch
from llmrec.catalog_versions import CatalogVersions
from llmrec.exceptions import ArtefactError, LLMRecError
from llmrec.export import base_hash, export
from llmrec.script import parse
from llmrec.stages import stage_command, stage_path
from llmrec.storage import sha256_of
from llmrec.vocabulary import train_tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_ring(tmp_path_factory.mktemp("data"), users=240)


def command(name, data, *flags):
    launcher = ["--config_file", "train/accelerate/single.yaml"] if name == "train/sft.py" else []
    return stage_command(name, ["--interactions", str(data / "log.csv"), *flags], launcher_args=launcher)


def run(name, data, *flags, check=True):
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command(name, data, *flags), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0 or not check, done.stderr[-3000:] + done.stdout[-2000:]
    return done


def sft(data, artefact, recipe, *flags, check=True):
    required = ["--config", f"train/recipes/{recipe}.yaml", "--semantic_ids", str(data / "ids")]
    return run("train/sft.py", data, *required, "--artefact", str(artefact), *flags, check=check)


# A GPT-2 learns this later than a Llama: its positions are learnt, not given.
@pytest.mark.parametrize(("model_type", "steps"), [("llama", 150), ("gpt2", 500)])
def test_from_scratch_to_score(data, tmp_path, model_type, steps):
    artefact = tmp_path / "artefact"
    flags = ["--model_type", model_type, "--max_steps", str(steps), "--eval_steps", str(steps // 2)]
    sft(data, artefact, "debug", *flags)
    settings = json.loads((artefact / "llmrec.json").read_text())
    curve = settings["training"]["evaluations"]
    assert [row["step"] for row in curve] == [steps // 2, steps]
    assert all({"eval_loss", "eval_HR@10", "eval_NDCG@10"} <= set(row) for row in curve)
    run("train/score.py", data, "--artefact", str(artefact), "--out", str(tmp_path / "result.json"))
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["split"] == settings["split"]
    assert result["invalid_rate"] == result["duplicate_rate"] == 0.0
    # Ten of sixty items by chance are 0.17; walking along the ring is learnt well beyond that.
    assert result["systems"]["llmrec"]["HR@10"] > 0.5
    assert set(result["systems"]) == {"popularity", "item_cf", "llmrec"}
    # Another log is another split: its test items may have been trained on.
    lines = (data / "log.csv").read_text().splitlines()
    (tmp_path / "log.csv").write_text("\n".join(lines[:-1]) + "\n")
    refused = run(
        "train/score.py", tmp_path, "--artefact", str(artefact), "--out", str(tmp_path / "other.json"), check=False
    )
    assert refused.returncode != 0
    assert "--any_split" in refused.stderr
    assert not (tmp_path / "other.json").exists()
    if model_type != "llama":
        return
    # Items that came later change nothing of what it is on the log that it was trained on.
    versions = CatalogVersions(artefact / "catalog")
    free = sorted(
        {(a, b, c) for a in range(4) for b in range(4) for c in range(4)} - set(map(tuple, versions.base.codes))
    )
    name = versions.add([{"item_id": f"new-{n}", "title": "New"} for n in range(4)], np.array(free))
    run("train/score.py", data, "--artefact", str(artefact), "--out", str(tmp_path / "grown.json"))
    grown = json.loads((tmp_path / "grown.json").read_text())
    assert (grown["split"], grown["items"], grown["catalog_version"]) == (result["split"], NUM_ITEMS, name)
    assert grown["systems"]["llmrec"]["NDCG@10"] == result["systems"]["llmrec"]["NDCG@10"]
    # A training that would write over these versions is refused before it begins.
    refused = sft(data, artefact, "debug", *flags, check=False)
    assert "1 version(s) beside its base, which would be lost" in refused.stderr
    assert refused.returncode != 0


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny GPT-2 with a tokenizer that knows letters and little else."""
    folder = tmp_path_factory.mktemp("checkpoint") / "base"
    tokenizer = train_tokenizer(["A customer bought an item"], 300)
    torch.manual_seed(0)
    arguments = BackboneArguments(model_type="gpt2", hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    from_scratch(arguments, tokenizer, 512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stage():
    """train/sft.py as a module."""
    spec = importlib.util.spec_from_file_location("sft_stage", stage_path("train/sft.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BRIEFLY = ["--max_steps", "30", "--eval_steps", "15", "--save_steps", "15", "--eval_users", "20"]


def test_lora_on_a_checkpoint_in_two_phases(data, checkpoint, tmp_path):
    artefact = tmp_path / "artefact"
    flags = ["--backbone", str(checkpoint), "--new_tokens_epochs", "1", "--new_token_init", "text", *BRIEFLY]
    said = sft(data, artefact, "gpt2", *flags).stderr
    assert "by new_tokens" in said
    assert "by lora" in said
    assert "log-probabilities differ by" in said
    training = json.loads((artefact / "llmrec.json").read_text())["training"]
    assert [row["step"] for row in training["evaluations"]] == [15, 30]
    assert training["backbone"]["backbone"] == "base"  # no path of this machine
    assert "item_to_id=0.5" in training["data"]["tasks"]
    recommender = Recommender.from_pretrained(artefact)
    # Merged: an ordinary GPT-2, with nothing of PEFT left in it.
    assert not any("lora" in name for name, _ in recommender.model.named_parameters())
    assert recommender.prompt.source.startswith("{%- if history")
    assert set(recommender.templates) == {
        *("next_item", "item_to_id", "id_to_item", "history_to_title", "titles_to_id"),
    }
    assert len(recommender.recommend(["item-1", "item-2"], k=10)) == 10
    # What was saved beside it makes the same artefact again, and no other base will do.
    base = tmp_path / "artefact.base"
    again = export(tmp_path / "artefact.adapter", base, tmp_path / "again")
    assert again.difference < 1e-4
    assert sha256_of(tmp_path / "again" / "model.safetensors") == sha256_of(artefact / "model.safetensors")
    other = tmp_path / "artefact.checkpoints" / "new_tokens" / "base"
    with pytest.raises(ArtefactError, match=base_hash(other)[:12]):
        export(tmp_path / "artefact.adapter", other, tmp_path / "wrong")
    # The first phase moved nothing but the new tokens' rows.
    before, after = (load_file(folder / "model.safetensors") for folder in (other, base))
    old = len(AutoTokenizer.from_pretrained(checkpoint))
    for name, weight in before.items():
        kept = slice(None, old) if "wte" in name else slice(None)
        assert torch.equal(weight[kept], after[name][kept]), name
    assert not torch.equal(before["transformer.wte.weight"], after["transformer.wte.weight"])


def test_items_as_titles(data, checkpoint, tmp_path):
    artefact = tmp_path / "artefact"
    flags = ["--config", "train/recipes/gpt2_titles.yaml", "--items", str(data / "ids" / "items.jsonl")]
    flags += ["--backbone", str(checkpoint), "--method", "full", "--lora_rank", "0", "--artefact", str(artefact)]
    run("train/sft.py", data, *flags, *BRIEFLY)
    recommender = Recommender.from_pretrained(artefact)
    assert recommender.catalog.is_text
    assert len(recommender.tokenizer) == len(AutoTokenizer.from_pretrained(checkpoint))  # no token is new
    assert len({item.item_id for item in recommender.recommend(["item-1", "item-2"], k=58)}) == 58
    run(
        "train/score.py",
        data,
        "--artefact",
        str(artefact),
        "--out",
        str(tmp_path / "result.json"),
        "--num_beams",
        "20",
    )
    assert json.loads((tmp_path / "result.json").read_text())["invalid_rate"] == 0.0


def test_killed_training_continues_to_the_same_weights(data, tmp_path):
    flags = ["--max_steps", "400", "--eval_strategy", "no", "--save_steps", "40", "--logging_steps", "400"]
    sft(data, tmp_path / "whole", "debug", *flags)
    artefact = tmp_path / "killed"
    required = [
        "--config",
        "train/recipes/debug.yaml",
        "--semantic_ids",
        str(data / "ids"),
        "--artefact",
        str(artefact),
    ]
    argv = [sys.executable, "train/sft.py", "--interactions", str(data / "log.csv"), *required, *flags]
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (tmp_path / "killed.checkpoints" / "checkpoint-80").exists() and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not artefact.exists()
    done = sft(data, artefact, "debug", *flags)
    assert "continuing from" in done.stderr + done.stdout
    one, two = (Recommender.from_pretrained(tmp_path / name).model.state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_two_processes_over_the_checkpoints_of_another_run(data, tmp_path):
    required = ["--config", "train/recipes/debug.yaml", "--semantic_ids", str(data / "ids")]
    required += ["--interactions", str(data / "log.csv"), "--artefact", str(tmp_path / "artefact")]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "train/sft.py"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    for rate in ("0.001", "0.002"):  # the second finds checkpoints that are not its own, and both ranks must agree
        flags = ["--use_cpu", "true", "--ddp_backend", "gloo", "--learning_rate", rate]
        done = subprocess.run(
            [*launch, *required, *flags], capture_output=True, text=True, env=environment, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert "is of another run and is removed" in done.stderr
    recommender = Recommender.from_pretrained(tmp_path / "artefact")
    assert recommender.settings.training["trainer"]["learning_rate"] == 0.002
    assert len(recommender.recommend(["item-1"], k=5)) == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--prompt", "next_item"], "semantic IDs alone"),
        (["--tasks", "next_itm"], "There is no task 'next_itm'"),
        (["--tasks", "search=-1"], "passes and caps are above 0"),
        (["--tasks", "preference"], "there is no table of preferences"),
        (["--tasks", "yes_no"], "The task 'yes_no' has no rows"),
        (["--tasks", "id_to_item", "--loss_vocabulary", "semantic_ids"], "answers with text"),
        (["--prompt", "{folder}/unknown.jinja", "--tasks", "next_item"], "preferense"),
        (["--items", "items.jsonl"], "Give one of --semantic_ids and --items"),
        (["--max_histroy", "3"], "Did you mean --max_history?"),
        (
            ["--stream", "true", "--backbone", "{folder}/short", "--tasks", "item_to_id"],
            "are longer than the 40 tokens",
        ),
        (["--early_stopping", "2"], "Set load_best_model_at_end: true"),
        (["--stream", "true", "--max_steps", "-1"], "Say --max_steps"),
        (["--backbone", "{folder}/short", "--prompt", "next_item", "--tasks", "next_item"], "tokens"),
        (["--min_history", "100"], "no one can be evaluated"),
        (["--prompt", "nowhere"], "prompts/nowhere.jinja"),
        (["--method", "lora"], "from scratch"),
        (["--semantic_ids", "nowhere"], "semantic_ids/build.py"),
        (["--user_column", "nobody"], "nobody"),
        (["--backbone", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_mistakes_are_named_before_a_model_is_loaded(data, checkpoint, tmp_path, stage, monkeypatch, flags, said):
    (tmp_path / "unknown.jinja").write_text("{{ preferense }}\n")
    shutil.copytree(checkpoint, tmp_path / "short")
    config = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps(config | {"n_positions": 40}))
    monkeypatch.setattr(stage, "first_model", lambda *_: pytest.fail("a model is loaded"))
    required = ["--config", "train/recipes/debug.yaml", "--interactions", str(data / "log.csv")]
    required += ["--semantic_ids", str(data / "ids"), "--artefact", str(tmp_path / "artefact")]
    given = [flag.format(folder=tmp_path) for flag in flags]
    with pytest.raises(LLMRecError) as caught:
        stage.main(*parse(stage.make_parser(), [*required, *given]))
    assert said in str(caught.value)
    assert not (tmp_path / "artefact").exists()


def test_a_mistake_ends_the_script_with_one_line(data, tmp_path):
    done = sft(data, tmp_path / "artefact", "debug", "--semantic_ids", "nowhere", check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "semantic_ids/build.py" in line

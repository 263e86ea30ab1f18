from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from llmrec.backbones.causal_lm import BackboneArguments, from_scratch
from llmrec.exceptions import ArtefactError, BackboneError, RecipeError
from llmrec.training.arguments import FineTuningArguments
from llmrec.training.phases import model_of, plan_phases
from llmrec.vocabulary import train_tokenizer


def flags(folder, **options):
    usual = {"use_cpu": True, "report_to": "none", "new_tokens_epochs": 2.0, "max_steps": 7}
    return FineTuningArguments(output_dir=str(folder / "checkpoints"), **(usual | options))


@pytest.fixture
def backbone(tmp_path):
    tokenizer = train_tokenizer(["an item"], 280)
    sizes = BackboneArguments(model_type="gpt2", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    from_scratch(sizes, tokenizer, 64).save_pretrained(tmp_path / "given")
    return BackboneArguments(backbone=str(tmp_path / "given"), method="lora", lora_rank=2), tokenizer


def test_max_steps_are_the_last_phase_s(tmp_path, backbone):
    first, last = plan_phases(backbone[0], flags(tmp_path), tmp_path / "artefact")
    assert (first.arguments.max_steps, first.arguments.num_train_epochs) == (-1, 2.0)
    assert last.arguments.max_steps == 7
    with pytest.raises(BackboneError, match="a stream's epochs cannot be counted"):
        plan_phases(backbone[0], flags(tmp_path), tmp_path / "artefact", stream=True)


@pytest.mark.parametrize("name", ["artefact", "artefact.base", "artefact.adapter"])
def test_a_folder_of_something_else_is_not_replaced(tmp_path, backbone, name):
    folder: Path = tmp_path / name
    folder.mkdir()
    plan_phases(backbone[0], flags(tmp_path), tmp_path / "artefact")  # an empty one may be
    (folder / "thesis.tex").write_text("precious")
    with pytest.raises(ArtefactError, match="something else"):
        plan_phases(backbone[0], flags(tmp_path), tmp_path / "artefact")
    (folder / ("base.json" if name.endswith("base") else "sha256.json")).write_text("{}")
    plan_phases(backbone[0], flags(tmp_path), tmp_path / "artefact")


def test_an_adapter_starts_the_same_whatever_was_drawn_before(tmp_path, backbone):
    arguments, tokenizer = backbone
    (phase,) = plan_phases(arguments, flags(tmp_path, new_tokens_epochs=0.0), tmp_path / "artefact")
    drawn = []
    for before in (0, 5):
        torch.manual_seed(before)
        plain = AutoModelForCausalLM.from_pretrained(arguments.backbone)
        model, _ = model_of(phase, plain, [3], tokenizer, None)
        drawn.append(torch.cat([w.reshape(-1) for name, w in model.named_parameters() if "lora_A" in name]))
    assert torch.equal(*drawn)
    assert drawn[0].std() > 0


def test_metrics_that_no_evaluation_has_are_refused(tmp_path):
    found = flags(tmp_path, metric_for_best_model="eval_HR@10")
    found.check_metric(["sequence"], ranked=True)
    for tasks, ranked, metric in (
        (["sequence"], False, "HR@10"),
        (["sequence"], True, "eval_HR@5"),
        (["next_item"], True, "loss/next_item"),
    ):
        with pytest.raises(RecipeError, match="metric_for_best_model"):
            flags(tmp_path, metric_for_best_model=metric).check_metric(tasks, ranked)
    found = flags(tmp_path, metric_for_best_model="eval_loss/next_item")
    found.check_metric(["sequence"], ranked=False)
    assert found.greater_is_better is False


def test_kernels_that_are_not_installed_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match="liger-kernel is not installed"):
        flags(tmp_path, use_liger_kernel=True)


def test_a_report_to_what_is_not_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "transformers.integrations.integration_utils.get_available_reporting_integrations", lambda: ["wandb"]
    )
    with pytest.raises(RecipeError, match="tensorboard, which is not installed"):
        flags(tmp_path, report_to=["wandb", "tensorboard"])

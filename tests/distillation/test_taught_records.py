"""What a student's record says of its teacher."""

from types import SimpleNamespace

import torch

from llmrec.artefact_parts import Settings
from llmrec.distillation.run import _described


def record_of(of_sft, width=64, **further):
    """Of a teacher that was fine-tuned, and perhaps trained further by reinforcement learning."""
    training = {
        "backbone": {"hidden_size": width},
        "trainer": {"seed": of_sft},
        "cost": {"fit_seconds": float(of_sft)},
    }
    if further:
        training["further"] = [{"method": "grpo", "settings": {"trainer": further}, "outcome": {"NDCG@10": of_sft}}]
    recommender = SimpleNamespace(settings=Settings(training=training), model=torch.nn.Linear(2, 2))
    return _described(SimpleNamespace(recommender=recommender, identity=f"{of_sft}{further}" * 16))


def test_teachers_that_differ_by_seeds_alone_have_equal_settings():
    records = [record_of(0), record_of(1)]
    assert records[0]["settings"] == records[1]["settings"]
    assert [record["seed"] for record in records] == [0, 1]
    assert records[0]["settings"] != record_of(0, width=128)["settings"]


def test_what_was_trained_further_is_another_teacher_and_its_seeds_are_named():
    records = [record_of(0, seed=3, beta=0.1), record_of(0, seed=4, beta=0.1), record_of(0, seed=3, beta=0.2)]
    assert records[0]["settings"] == records[1]["settings"]
    assert records[0]["settings"] not in (records[2]["settings"], record_of(0)["settings"])
    assert records[0]["seed"] != records[1]["seed"]

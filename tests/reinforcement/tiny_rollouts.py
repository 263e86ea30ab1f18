"""Small policies, cases and trainings for the tests of rollouts."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from factories import random_recommender
from trl import GRPOConfig

from llmrec.recommender import Recommender
from llmrec.reinforcement.cases import RolloutCases
from llmrec.title_spelling import title_catalog
from llmrec.vocabulary import train_tokenizer


@dataclass(frozen=True)
class Reward:
    """What a trainer asks of a reward."""

    name: str
    weight: float
    function: Any


def exact(items, cases, chosen):
    return (items == cases.targets[chosen][:, None]).astype(np.float64)


def nothing(items, cases, chosen):
    return np.zeros(items.shape)


def mixed(items, cases, chosen):
    """Some number for each item, different ones for each case."""
    return np.sin(items * 1.7 + chosen[:, None])


def policy(softmax: str = "vocabulary", **options: Any) -> Recommender:
    """A recommender in float32, whose probabilities are over `softmax`."""
    made = random_recommender(**{"dtype": torch.float32, "num_beams": 4} | options)
    settings = replace(made.settings, softmax=softmax)
    return Recommender(made.model, made.tokenizer, made.catalog, made.prompt, settings)


def title_policy() -> Recommender:
    """Items are spelt as titles of one to seven tokens."""
    whole = random_recommender(5, dtype=torch.float32, num_beams=4)
    tokenizer = train_tokenizer(["red lamp blue shade"], vocab_size=270)
    rng = np.random.default_rng(3)
    titles = ["".join(rng.choice(list("abc "), rng.integers(1, 8))) for _ in range(30)]
    items = [{"item_id": f"item-{row}", "title": title} for row, title in enumerate(titles)]
    catalog = title_catalog(items, tokenizer, max_title_tokens=9)
    whole.model.resize_token_embeddings(len(tokenizer))
    return Recommender(whole.model, tokenizer, catalog, whole.prompt, whole.settings)


def cases_of(recommender: Recommender, count: int = 8, longest: int = 5, seed: int = 0) -> RolloutCases:
    """Random histories of one item or more, their prompts, and targets that they do not hold."""
    rng = np.random.default_rng(seed)
    histories = [rng.integers(0, len(recommender.catalog), rng.integers(1, longest + 1)) for _ in range(count)]
    rows = np.arange(len(recommender.catalog))
    targets = np.array([rng.choice(np.setdiff1d(rows, history)) for history in histories])
    return RolloutCases(
        [recommender.encoder.encode(history.tolist()) for history in histories],
        histories,
        targets,
        [np.array([target]) for target in targets],
        np.arange(count),
    )


def arguments(folder: Any, **options: Any) -> GRPOConfig:
    """Of a training on the processor in float32: two cases of four items a step."""
    given = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "loss_type": "grpo",
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    return GRPOConfig(**given | options)


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of weights are alike to the bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)

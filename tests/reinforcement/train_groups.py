"""One process of a training on groups of items; `accelerate launch` runs several. The first writes the weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from safetensors.torch import save_file
from tiny_rollouts import Reward, arguments, cases_of, exact, mixed, policy, weights

from llmrec.reinforcement.grpo import ConstrainedGRPOTrainer
from llmrec.reinforcement.rollouts import TransformersRollouts


def train(folder: Path, batch: int, weighted: bool) -> ConstrainedGRPOTrainer:
    """Eight cases of four items a step, `batch` items of them in this process."""
    recommender = policy("semantic_ids")
    args = arguments(
        folder,
        per_device_train_batch_size=batch,
        max_steps=3,
        beta=0.1,
        save_steps=2,
        save_strategy="steps",
        optim="sgd",  # which shows gradients as they are
        learning_rate=0.1,
    )
    cases = cases_of(recommender, 24)
    how = {"softmax": "semantic_ids", "temperature": 1.5, "weighted": weighted}
    rollouts = TransformersRollouts(recommender.model, recommender.catalog, cases, 4, **how)
    rewards = [Reward("mixed", 1.0, mixed), Reward("exact", 0.5, exact)]
    trainer = ConstrainedGRPOTrainer(recommender.model, args, rollouts, rewards, tokenizer=recommender.tokenizer)
    trainer.train()
    return trainer


if __name__ == "__main__":
    trained = train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "weighted")
    if trained.accelerator.is_main_process:
        model = trained.accelerator.unwrap_model(trained.model)
        save_file({name: one.clone() for name, one in weights(model).items()}, Path(sys.argv[1]) / "end.safetensors")

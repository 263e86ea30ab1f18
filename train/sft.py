"""Fine-tunes a causal language model to continue a history with the next item's semantic ID, and saves the artefact.

From scratch, a small Llama on semantic IDs alone:

    accelerate launch train/sft.py --config train/recipes/llama_scratch.yaml \
        --semantic_ids runs/ids --interactions interactions.parquet --artefact runs/artefact

A checkpoint from the Hub with LoRA:

    accelerate launch train/sft.py --config train/recipes/gpt2_lora.yaml --backbone gpt2 \
        --semantic_ids runs/ids --interactions interactions.parquet --artefact runs/artefact

Flags override the recipe. An interrupted run continues from its newest whole checkpoint; `--fresh` begins anew.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.backbones.causal_lm import BackboneArguments
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import BackboneError, DataError
from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import SFTConfig, TrlParser

logger = logging.getLogger("llmrec.train.sft")

# What of the Trainer's arguments is kept in the artefact: what decides the weights. No path of this machine is kept,
# because artefacts are published.
_RECORDED = (
    "seed",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
    "train_sampling_strategy",
    "optim",
    "metric_for_best_model",
    "load_best_model_at_end",
    "eval_steps",
    "save_steps",
    "bf16",
    "fp16",
)


@dataclass
class DataArguments:
    """What to train on, and where the artefact goes."""

    semantic_ids: str = field(metadata={"help": "Folder that semantic_ids/build.py wrote."})
    interactions: str = field(metadata={"help": "Interactions: parquet, csv, tsv or jsonl, gzipped or not."})
    artefact: str = field(metadata={"help": "Folder for the artefact."})
    prompt: str = field(
        default="semantic_ids", metadata={"help": "Template in prompts/ by its name, or a .jinja file."}
    )
    supervision: str = field(
        default="sequence",
        metadata={
            "help": "'sequence': one row a user, every item a target (bare prompts); 'next_item': one row a target.",
            "choices": ["sequence", "next_item"],
        },
    )
    max_history: int = field(default=20, metadata={"help": "Most recent items in a prompt."})
    num_beams: int = field(default=50, metadata={"help": "Beams of a search, saved with the artefact."})
    eval_users: int = field(
        default=500, metadata={"help": "Validation cases ranked at every evaluation, drawn with the seed; 0 for none."}
    )
    any_split: bool = field(
        default=False, metadata={"help": "Take codes that were built on another split; they may know held-out items."}
    )
    fresh: bool = field(default=False, metadata={"help": "Ignore the checkpoints of an earlier run."})


def make_parser() -> "TrlParser":
    from trl import SFTConfig

    return parser((DataArguments, ColumnArguments, SplitArguments, BackboneArguments, SFTConfig), __doc__)


def main(
    data: DataArguments,
    names: ColumnArguments,
    splits: SplitArguments,
    backbone: BackboneArguments,
    training: "SFTConfig",
) -> None:
    import datasets
    import numpy as np
    import polars
    import torch
    import transformers
    from trl import SFTTrainer

    import llmrec
    from llmrec.catalog import CATALOG_FOLDER
    from llmrec.catalog_versions import CatalogVersions, refuse_to_replace
    from llmrec.data.items import Items
    from llmrec.examples import next_item_rows, training_rows
    from llmrec.prompt import Prompt
    from llmrec.recommender import Recommender, Settings
    from llmrec.stages import stage_path
    from llmrec.training import RankingCallback, checkpoint_to_resume, log_curve
    from llmrec.vocabulary import PlainText, start_token

    transformers.set_seed(training.seed)

    for name, least in (("max_history", 1), ("num_beams", 1), ("eval_users", 0)):
        if getattr(data, name) < least:
            raise DataError(f"--{name} is {getattr(data, name)}. It counts from {least}.")
    if training.max_steps <= 0 and not training.num_train_epochs > 0:
        raise DataError(f"--num_train_epochs is {training.num_train_epochs}. Train for more than none.")
    refuse_to_replace(Path(data.artefact) / CATALOG_FOLDER)  # now, not after the training
    catalog = CatalogVersions(data.semantic_ids).load()
    try:
        items = Items.from_frame(polars.from_dicts(catalog.items, infer_schema_length=None, strict=False))
    except polars.exceptions.PolarsError as error:
        raise DataError(
            f"The items of {data.semantic_ids} are no table: a column of added items is of another kind ({error}). "
            "Roll back, and add them with columns like the others'."
        ) from error
    split = splits.make(names.read_interactions(data.interactions), items)
    built = json.loads((Path(data.semantic_ids) / "semantic_ids.json").read_text(encoding="utf-8"))
    if not data.any_split:
        _check_codes(data.semantic_ids, built.get("split"), split.content_hash)
    prompt = Prompt.read(data.prompt if data.prompt.endswith(".jinja") else stage_path(f"prompts/{data.prompt}.jinja"))

    tokenizer, catalog = _tokenizer(backbone, catalog, items.texts())
    text, start = PlainText(tokenizer), start_token(tokenizer)
    rows = list(training_rows(prompt, catalog, split.train, text, start, data.max_history, data.supervision))
    valid = list(
        next_item_rows(
            prompt, catalog, split.histories("valid"), split.targets("valid").tolist(), text, start, data.max_history
        )
    )
    if not rows or not valid:
        raise DataError(
            f"{len(rows)} training rows and {len(valid)} validation rows are too few. "
            "Leave-one-out needs a user of three interactions: one to train on, one to validate, one to test."
        )
    longest = max(len(row["input_ids"]) for row in [*rows, *valid])
    settings = Settings(data.max_history, data.num_beams, split.content_hash, dict(split.protocol))
    model = _model(backbone, tokenizer, catalog, longest, training.seed)
    logger.info(
        "%s: %.2f M parameters, %d training rows, %d validation rows, longest row %d tokens",
        type(model).__name__,
        model.num_parameters() / 1e6,
        len(rows),
        len(valid),
        longest,
    )

    if training.output_dir == "trainer_output":  # the Trainer's word for none
        training.output_dir = f"{data.artefact.rstrip('/')}.checkpoints"
    training.dataloader_pin_memory = torch.cuda.is_available()
    training.max_length = None  # rows are cut by items, in max_history; never inside one
    training.dataset_kwargs = {"skip_prepare_dataset": True}
    callbacks = []
    if data.eval_users:
        chosen = np.sort(np.random.default_rng(training.seed).permutation(len(valid))[: data.eval_users])
        histories, targets = split.histories("valid"), split.targets("valid")

        def recommend(model: Any) -> Any:
            recommender = Recommender(model, tokenizer, catalog, prompt, settings)
            return lambda histories, k: recommender.recommend_rows(histories, k, num_beams=20)[0]

        callbacks = [RankingCallback(recommend, [histories[user] for user in chosen], targets[chosen])]
    trainer = SFTTrainer(
        model=model,
        args=training,
        train_dataset=datasets.Dataset.from_list(rows),
        eval_dataset=datasets.Dataset.from_list(valid),
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    # Checkpoints of another run (other data, prompt, vocabulary, sizes or hyperparameters) are not continued.
    recorded = {name: str(getattr(training, name)) for name in _RECORDED}
    described = [asdict(data) | {"fresh": None, "artefact": None}, asdict(backbone), recorded, split.content_hash]
    described += [catalog.version, prompt.source, tokenizer.get_vocab()]
    with training.main_process_first(desc="looking for a checkpoint"):
        resume = checkpoint_to_resume(training.output_dir, described, fresh=data.fresh)
    if resume is not None:
        logger.info("continuing from %s", resume)
    trained = trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    trainer.accelerator.wait_for_everyone()
    if not trainer.is_world_process_zero():
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    if backbone.lora_rank:
        model = model.merge_and_unload()
    source = backbone.backbone
    if source is not None and Path(source).exists():
        source = Path(source).name
    settings.training = {
        "data": {name: getattr(data, name) for name in ("prompt", "supervision", "max_history", "num_beams")},
        "semantic_ids": _described_codes(built),
        "backbone": asdict(backbone) | {"backbone": source},
        "trainer": {name: getattr(training, name) for name in _RECORDED},
        "evaluations": log_curve(trainer.state.log_history),
        "cost": {
            "fit_seconds": round(trained.metrics["train_runtime"], 1),  # since the last start, if it was resumed
            "parameters": model.num_parameters(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {package.__name__: package.__version__ for package in (llmrec, transformers, datasets)},
    }
    recommender = Recommender(model.eval(), tokenizer, catalog, prompt, settings, Path(data.semantic_ids))
    recommender.save_pretrained(data.artefact)
    logger.info("artefact saved to %s", data.artefact)


def _check_codes(folder: str, built: str | None, split: str) -> None:
    """Refuses codes that were built on another split: their co-occurrence may hold this one's held-out items."""
    if built is not None and built != split:
        raise DataError(
            f"The semantic IDs in {folder} were built on the split {built[:12]}, and this is {split[:12]}: they may "
            "know its held-out items. Build them again from the same interactions, items and split flags; or say "
            "--any_split, as when items and interactions came since."
        )


def _described_codes(built: dict[str, Any]) -> dict[str, Any]:
    """What semantic_ids/build.py recorded of its codes, without paths of this machine."""
    from llmrec.item_tokenizer import without_places

    arguments = without_places(built.get("arguments", {}))
    policy = built.get("collisions", {}).get("policy")
    return {"quantizer": built.get("quantizer"), "collisions": policy, "arguments": arguments}


def _tokenizer(backbone: BackboneArguments, catalog: Any, texts: list[str]) -> tuple[Any, Any]:
    """A tokenizer of the checkpoint, or one trained on the items' texts, extended by the catalog's tokens."""
    from transformers import AutoTokenizer

    from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

    if backbone.backbone is None:
        tokenizer = train_tokenizer(texts, backbone.text_vocab_size)
    else:
        try:
            tokenizer = AutoTokenizer.from_pretrained(backbone.backbone, revision=backbone.backbone_revision)
        except (OSError, ValueError) as error:
            raise BackboneError(
                f"{backbone.backbone!r} has no tokenizer that loads: {error}. "
                "Give a local folder or a Hub id, and check the network or HF_HUB_OFFLINE."
            ) from error
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, add_catalog_tokens(tokenizer, catalog)


def _model(backbone: BackboneArguments, tokenizer: Any, catalog: Any, longest: int, seed: int) -> Any:
    """The model to train, with LoRA adapters if they were asked for."""
    from llmrec.backbones.causal_lm import from_checkpoint, from_scratch, with_lora

    new_ids = [int(id) for level in catalog.require_tokens() for id in level]
    if backbone.backbone is None:
        if backbone.lora_rank:
            raise BackboneError(
                f"lora_rank is {backbone.lora_rank} for a model from scratch, whose frozen weights would stay random. "
                "Name a checkpoint with --backbone, or leave LoRA out."
            )
        # Room for a few more items than the longest row has, so that a longer max_history can be tried when serving.
        return from_scratch(backbone, tokenizer, max_positions=-(-2 * longest // 64) * 64)
    model, new_rows = from_checkpoint(backbone, tokenizer, new_ids, seed)
    return with_lora(backbone, model, new_rows) if backbone.lora_rank else model


if __name__ == "__main__":
    run(main, make_parser())

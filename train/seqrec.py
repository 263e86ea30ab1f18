"""Trains a sequence model (HSTU, SASRec, BERT4Rec, GRU4Rec, Llama or GPT-2 over items), tests it, saves the artefact.

HSTU as published for MovieLens-1M:

    accelerate launch train/seqrec.py --config train/recipes/hstu_ml1m.yaml \
        --interactions interactions.parquet --artefact runs/hstu/artefact

A tuned SASRec on a sparser log, with item texts beside ids:

    accelerate launch train/seqrec.py --config train/recipes/sasrec.yaml --representation ids+text \
        --item_embeddings runs/embeddings --interactions interactions.parquet --artefact runs/sasrec/artefact

A SASRec that thinks twice before it answers (ReaRec's progressive reasoning):

    accelerate launch train/seqrec.py --config train/recipes/reasoning_prl.yaml \
        --interactions interactions.parquet --artefact runs/prl/artefact

Beside the artefact it writes metrics.json (every epoch's validation and the final test), training.html, and
`evaluation/` for `llmrec compare`. Flags override the recipe. An interrupted run continues from its newest whole
checkpoint; `--fresh` begins anew.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import RecipeError
from llmrec.losses.arguments import LossArguments
from llmrec.reasoning.arguments import ReasoningArguments
from llmrec.script import parser, run
from llmrec.sequence.arguments import EncoderArguments, EventArguments, ItemArguments, SequenceArguments

if TYPE_CHECKING:
    from trl import TrlParser

    from llmrec.backbones.causal_body import CausalBodyModel
    from llmrec.data.items import Items
    from llmrec.data.split import Split
    from llmrec.sequence.model import SequenceModel
    from llmrec.sequence.trainer import SequenceTrainer
    from llmrec.training.arguments import StageArguments

logger = logging.getLogger("llmrec.train.seqrec")

# What of the flags is kept in the artefact: what decides the weights. No path of this machine is kept, because
# artefacts are published.
_DATA = (
    *("max_history", "windows", "stride", "stochastic_length", "thinned", "hidden_share", "tokens_per_batch"),
    *("train_share", "train_share_seed"),
)
_TRAINING = ("seed", "metric_for_best_model", "load_best_model_at_end", "early_stopping")
_PLACES = ("item_embeddings", "semantic_ids", "body")


def make_parser() -> "TrlParser":
    from llmrec.training.arguments import StageArguments

    return parser(
        (
            *(SequenceArguments, ColumnArguments, SplitArguments, EncoderArguments, ItemArguments, EventArguments),
            *(LossArguments, ReasoningArguments, StageArguments),
        ),
        __doc__,
    )


def main(
    data: SequenceArguments,
    names: ColumnArguments,
    splits: SplitArguments,
    encoder: EncoderArguments,
    item: ItemArguments,
    event: EventArguments,
    losses: LossArguments,
    reasoning: ReasoningArguments,
    training: "StageArguments",
) -> None:
    import numpy as np
    import transformers

    from llmrec.catalog import CATALOG_FOLDER
    from llmrec.catalog_versions import refuse_to_replace
    from llmrec.data.items import Items
    from llmrec.data.subset import learnt_events, learnt_split
    from llmrec.evaluation.evaluation import check_name
    from llmrec.sequence.histories import LoggedHistories
    from llmrec.sequence.model import SequenceModel, sequence_config
    from llmrec.sequence.trainer import SequenceTrainer, check_metric
    from llmrec.sequence.windows import TrainingWindows
    from llmrec.storage import digest_of_arrays
    from llmrec.training.arguments import UNNAMED, recorded
    from llmrec.training.checkpoints import checkpoint_to_resume
    from llmrec.training.shutdown import ShutdownCallback

    # Whatever can be wrong is found out before a weight is made.
    transformers.set_seed(training.seed)
    for flags in (data, item, losses, reasoning):
        flags.check()
    check_metric(training)
    system = data.system or encoder.encoder
    check_name(system)
    if item.sparse_gradients and losses.loss == "softmax":
        raise RecipeError(
            "sparse_gradients is true, and the softmax over all items uses every row in every step. Take a sampled "
            "loss, or leave it out."
        )
    if item.sparse_gradients and training.world_size > 1 and training.device.type == "cuda":
        raise RecipeError(
            f"sparse_gradients is true, and {training.world_size} GPUs cannot add sparse gradients up. Take one "
            "process, or leave it out."
        )
    refuse_to_replace(Path(data.artefact) / CATALOG_FOLDER)
    if training.output_dir == UNNAMED:
        training.output_dir = f"{data.artefact.rstrip('/')}.checkpoints"
    interactions = names.read_interactions(data.interactions)
    items = Items.from_interactions(interactions)
    if data.items is not None:
        items = names.read_items(data.items).with_missing(interactions)
    split = splits.make(interactions, items)
    # What is learnt from, or fitted to it, is this share's; what is asked and ranked is the whole split's.
    learnt = learnt_split(split, data.train_share, data.train_share_seed)
    seen = learnt_events(learnt, data.max_history + 1 if data.windows == "last" else None)
    events = event.config(learnt, tasks=bool(reasoning.actions))
    features = item.features(learnt)
    positions = events.positions(data.max_history) + (1 if encoder.encoder == "bert4rec" else 0)
    config = sequence_config(
        reasoning.config(encoder, positions),
        split.num_items,
        data.max_history,
        item.described(features),
        events,
        item.similarity,
        item.temperature,
    )
    model = SequenceModel(config)
    event.check(model.causal, getattr(model.encoder.config, "relative_bias", ""))
    model.representation.set_items(features)
    if encoder.body is not None:
        cast("CausalBodyModel", getattr(model.encoder, "encoder", model.encoder)).load_body(encoder.body)
    histories = LoggedHistories(learnt, events)
    windows = TrainingWindows(
        histories,
        data.max_history,
        data.windows,
        data.stride,
        data.stochastic_length,
        data.thinned,
        0.0 if model.causal else data.hidden_share,
        event.weights(events.actions),
        training.seed,
    )
    valid = split.targets("valid")
    drawn = np.random.default_rng(training.seed).permutation(len(valid))
    chosen = np.sort(drawn[: data.eval_users or len(valid)])
    record = {
        "system": system,
        "data": {name: getattr(data, name) for name in _DATA}
        | {"train_users": len(np.unique(learnt.owner[seen])), "train_tokens": int(seen.sum())},
        "encoder": asdict(encoder) | {name: None for name in _PLACES if hasattr(encoder, name)},
        "items": asdict(item) | {name: None for name in _PLACES if hasattr(item, name)},
        "events": asdict(event),
        "loss": asdict(losses),
        "reasoning": asdict(reasoning),
        "trainer": recorded(training, _TRAINING),
    }
    logger.info(
        "%s: %.2f M parameters, %.2f M of them in the encoder; %d windows of %d items, %d validation cases",
        *(system, model.num_parameters() / 1e6, model.encoder.num_parameters() / 1e6),
        *(len(windows), int(windows.lengths.sum()), len(chosen)),
    )
    shutdown = ShutdownCallback()
    trainer = SequenceTrainer(
        model,
        training,
        windows,
        reasoning.loss(losses.build(windows.target_counts()), events),
        histories.cases("valid", chosen),
        valid[chosen],
        budget=data.tokens_per_batch,
        callbacks=[*stopping(training), shutdown],
    )
    # What no flag and no hash of the split says: times, actions and domains, texts' vectors and codes.
    read = digest_of_arrays([*histories.columns.values(), features.vectors, features.codes])
    described = [record, learnt.content_hash, config.to_dict(), data.eval_users, read]
    resume = checkpoint_to_resume(training.output_dir, described, data.fresh)
    if resume is not None:
        logger.info("continuing from %s", resume)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    shutdown.exit_if_stopped()
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        finish(data, split, items, histories, trainer, system, record)
    trainer.accelerator.wait_for_everyone()


def stopping(training: "StageArguments") -> list[Any]:
    """Early stopping, where it is asked for."""
    from transformers import EarlyStoppingCallback

    return [EarlyStoppingCallback(training.early_stopping)] if training.early_stopping else []


def finish(
    data: SequenceArguments,
    split: "Split",
    items: "Items",
    histories: Any,
    trainer: "SequenceTrainer",
    system: str,
    record: dict[str, Any],
) -> None:
    """Tests the model, and writes the artefact, the evaluation, metrics.json and the training's page."""
    import torch
    import transformers

    import llmrec
    from llmrec.artefact_parts import Settings
    from llmrec.catalog import Catalog
    from llmrec.sequence.recommender import SequenceRecommender
    from llmrec.storage import write_json
    from llmrec.training.curve import log_curve, training_page

    model: SequenceModel = trainer.accelerator.unwrap_model(trainer.model).eval()
    evaluations = log_curve(trainer.state.log_history)
    versions = {package.__name__: str(package.__version__) for package in (llmrec, torch, transformers)}
    cost = {
        "fit_seconds": round(trainer.fit_seconds, 1),
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    test = tested(data, split, histories, model, system, record, cost, versions)
    settings = Settings(
        max_history=data.max_history,
        num_beams=1,  # there are no beams: every item is looked at
        split=split.content_hash,
        protocol=dict(split.protocol),
        training=record | {"evaluations": evaluations, "cost": cost, "versions": versions},
    )
    catalog = Catalog.of_rows([json.loads(line) for line in items.frame.write_ndjson().splitlines()])
    SequenceRecommender(model, catalog, settings).save_pretrained(data.artefact)
    write_json(
        data.folder / "metrics.json",
        {
            "system": system,
            "split": split.content_hash,
            "protocol": dict(split.protocol),
            "validation": evaluations,
            "test": test,
            "training": record,
            "cost": cost,
            "versions": versions,
        },
    )
    page = training_page(trainer.args.output_dir)
    page.write(data.folder / "training.html")
    logger.info("artefact saved to %s; beside it metrics.json, training.html and evaluation/", data.artefact)


def tested(
    data: SequenceArguments,
    split: "Split",
    histories: Any,
    model: "SequenceModel",
    system: str,
    record: dict[str, Any],
    cost: dict[str, Any],
    versions: dict[str, str],
) -> dict[str, Any]:
    """Ranks every test case over all items, saves the evaluation for `llmrec compare`, and returns its document."""
    from llmrec.evaluation.evaluation import evaluate
    from llmrec.sequence.scores import CaseScores

    # A model that hides items is asked by a place of which all is known but the item.
    asked = ("before",) if model.causal else ("before", "added")
    told = {
        "time": model.events.request_time,
        "action": model.events.action_tokens in asked,
        "domain": model.events.domain_tokens in asked,
    }
    evaluation = evaluate(
        system,
        split,
        "test",
        scores=CaseScores(model, histories.cases("test"), progress="testing"),
        ks=sorted(data.ks),
        facts={
            "seeds": {"training": record["trainer"]["seed"]},
            # What the model knows of the interaction to be predicted beside what came before it.
            "settings": record | {"told_of_the_target": [name for name, said in told.items() if said]},
            "cost": cost,
            "versions": versions,
        },
    )
    document = evaluation.document()
    evaluation.save(data.folder, document)
    shown = ", ".join(f"{name} {document[name]:.4f}" for k in sorted(data.ks) for name in (f"HR@{k}", f"NDCG@{k}"))
    logger.info("%s on %d test cases: %s", system, document["cases"], shown)
    return document


if __name__ == "__main__":
    run(main, make_parser())

"""Trains a ranking (CTR) model on labelled rows and reports AUC, UAUC and log-loss beside simple baselines.

    accelerate launch train/rank.py --config train/recipes/ctr_ml1m.yaml \
        --train_rows train.jsonl.gz --test_rows valid.jsonl.gz --artefact runs/ctr/model

A row is who was shown what, when, and what came of it (`--label_columns`, one or several). The candidate is read
behind the user's history by any encoder (`--encoder`). Beside the artefact stand metrics.json and rank.html. Flags
override the recipe. An interrupted run continues from its newest whole checkpoint; `--fresh` begins anew.
"""

import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.ctr.arguments import CTRDataArguments, CTRModelArguments
from llmrec.exceptions import RecipeError
from llmrec.script import parser, run
from llmrec.sequence.arguments import EncoderArguments, ItemArguments

if TYPE_CHECKING:
    from trl import TrlParser

    from llmrec.ctr.task import CTRTask
    from llmrec.training.arguments import StageArguments

logger = logging.getLogger("llmrec.train.rank")

_PATHS = ("train_rows", "test_rows", "artefact", "beside", "fresh")
_TRAINING = ("train_sampling_strategy", "metric_for_best_model", "load_best_model_at_end", "early_stopping")


def make_parser() -> "TrlParser":
    from llmrec.training.arguments import StageArguments

    return parser((CTRDataArguments, CTRModelArguments, EncoderArguments, ItemArguments, StageArguments), __doc__)


def main(
    data: CTRDataArguments,
    settings: CTRModelArguments,
    encoder: EncoderArguments,
    items: ItemArguments,
    training: "StageArguments",
) -> None:
    import torch
    import transformers
    from rich.console import Console
    from transformers import EarlyStoppingCallback

    from llmrec.ctr.card import check_alike, page, read_card, summarised
    from llmrec.ctr.model import CTRModel, ctr_config, positions_of
    from llmrec.ctr.ranker import Ranker
    from llmrec.ctr.task import CTRTask
    from llmrec.ctr.trainer import CTRTrainer
    from llmrec.storage import digest_of_arrays, write_json
    from llmrec.training.arguments import UNNAMED, recorded
    from llmrec.training.checkpoints import checkpoint_to_resume
    from llmrec.training.curve import training_page
    from llmrec.training.shutdown import ShutdownCallback

    transformers.set_seed(training.seed)
    data.check(settings.layout)
    settings.check()
    items.check()
    if items.similarity != "dot" or items.temperature != 1.0:
        raise RecipeError("A ranking model has a scorer and no similarity. Leave similarity and temperature out.")
    if not data.dev_share and (str(training.eval_strategy) not in ("no", "IntervalStrategy.NO")):
        raise RecipeError(
            f"eval_strategy is {training.eval_strategy}, and there are no rows to choose by. Give --dev_share 0.1, or "
            "--eval_strategy no."
        )
    beside = [read_card(path) for path in data.beside]
    if training.seed in (seeds := [card["seed"] for card in beside]):
        raise RecipeError(f"This run has the seed {training.seed}, and those beside it {seeds}. Give each seed once.")
    if training.output_dir == UNNAMED:
        training.output_dir = f"{data.artefact.rstrip('/')}.checkpoints"
    training.dataloader_pin_memory = training.device.type == "cuda"
    task = CTRTask.make(data, items, training.seed)
    config = ctr_config(
        encoder.config(positions_of(data.max_history, settings.layout)),
        num_items=len(task.items),
        max_history=data.max_history,
        labels=list(task.rows.label_names),
        layout=settings.layout,
        scorer=settings.scorer,
        dropout=settings.scorer_dropout,
        unknown_rate=settings.unknown_rate if items.representation in ("ids", "hashed") else 0.0,
        representation=items.described(task.features),
    )
    model = CTRModel(config)
    model.representation.set_items(task.features)
    flags = {
        "data": {name: value for name, value in asdict(data).items() if name not in _PATHS},
        "model": asdict(settings),
        "encoder": asdict(encoder),
        "items": {
            name: value for name, value in asdict(items).items() if name not in ("item_embeddings", "semantic_ids")
        },
        "trainer": recorded(training, _TRAINING),
    }
    if data.passes == "windows":
        train: Any = task.windows(data.max_history)
    else:
        train = task.cases(task.train, data.max_history, weighted=True)
    dev = task.cases(task.dev, data.max_history) if len(task.dev) else None
    shutdown = ShutdownCallback()
    stopping = [EarlyStoppingCallback(training.early_stopping)] if training.early_stopping else []
    trainer = CTRTrainer(
        model, training, train, dev, label_weights=settings.label_weights, callbacks=[*stopping, shutdown]
    )
    known = digest_of_arrays([task.features.vectors, task.features.codes])
    described = [flags, training.seed, task.rows.sources, config.to_dict(), known]
    check_alike([*beside, {"task": described_task(task), "flags": flags}])
    resume = checkpoint_to_resume(training.output_dir, described, fresh=data.fresh)
    if resume is not None:
        logger.info("continuing from %s", resume)
    logger.info(
        "%s, %.2f M parameters, %s sequences an epoch",
        encoder.encoder,
        model.num_parameters() / 1e6,
        f"{len(train):,}",
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    shutdown.exit_if_stopped()
    trained: CTRModel = trainer.accelerator.unwrap_model(trainer.model)
    logits = trainer.logits(task.cases(task.test, data.max_history))
    if not training.should_save:
        return
    card = {
        "seed": training.seed,
        "task": described_task(task),
        "flags": flags,
        "encoder": encoder.encoder,
        "layout": settings.layout,
        "scorer": settings.scorer,
        "labels": measured(task, logits, data.simultaneous),
        "evaluations": [line for line in trainer.state.log_history if "eval_loss" in line],
        "cost": {
            "fit_seconds": round(trainer.fit_seconds, 1),
            "parameters": trained.num_parameters(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": versions(),
    }
    if beside:
        card["over_seeds"] = summarised([*beside, card])
    Ranker(trained, task.items, {"history": data.history, "seed": training.seed, "flags": flags}).save_pretrained(
        data.artefact
    )
    folder = Path(data.artefact).resolve().parent
    write_json(folder / "metrics.json", card)
    page(card).write(folder / "rank.html")
    if any("loss" in line or "eval_loss" in line for line in trainer.state.log_history):
        training_page(training.output_dir).write(Path(training.output_dir) / "training.html")
    show(Console(width=None if sys.stdout.isatty() else 120), card, str(folder / "metrics.json"))


def described_task(task: "CTRTask") -> dict[str, Any]:
    """Which rows were trained on and asked, JSON-ready."""
    import numpy as np

    return {
        "sources": [{"name": name, "sha256": digest} for name, digest in task.rows.sources],
        "train_rows": len(task.train),
        "dev_rows": len(task.dev),
        "test_rows": len(task.test),
        "train_users": len(np.unique(task.rows.users[task.train])),
        "test_users": len(np.unique(task.rows.users[task.test])),
        "items": len(task.items),
    }


def measured(task: "CTRTask", logits: Any, simultaneous: str) -> dict[str, Any]:
    """Each label's measures of the model and of the baselines, its slices and its reliability."""
    import numpy as np

    from llmrec.ctr.baselines import baselines
    from llmrec.ctr.card import MODEL
    from llmrec.ctr.measures import length_slices, measure, reliability, sliced

    rows, test = task.rows, task.test
    probabilities = np.exp(-np.logaddexp(0, -logits))
    slices = length_slices(task.histories.lengths()[test])
    for name, flag in rows.flags.items():
        slices |= {name: flag[test], f"not {name}": ~flag[test]}
    slices |= {"unknown item": task.catalogue[rows.items[test]] == 0}
    found = {}
    for column, label in enumerate(rows.label_names):
        labels, users = rows.labels[test, column], rows.users[test]
        if not (labels >= 0).any():
            continue
        systems = {MODEL: probabilities[:, column]}
        systems |= baselines(rows, task.train, test, column, simultaneous)
        found[label] = {
            "systems": {name: measure(labels, given, users) for name, given in systems.items()},
            "slices": sliced(labels, probabilities[:, column], users, slices),
            "reliability": reliability(labels, probabilities[:, column]),
        }
    return found


def versions() -> dict[str, str]:
    """Of what computes."""
    import torch
    import transformers

    import llmrec

    return {package.__name__: str(package.__version__) for package in (llmrec, torch, transformers)}


def show(console: Any, card: dict[str, Any], out: str) -> None:
    """The measures as tables."""
    from rich.table import Table

    from llmrec.ctr.card import METRICS

    for label, found in card["labels"].items():
        table = Table(label, *METRICS)
        for name, one in found["systems"].items():
            table.add_row(name, *("–" if one[metric] is None else f"{one[metric]:.4f}" for metric in METRICS))
        console.print(table)
    console.print(f"{card['task']['test_rows']:,} cases of {card['task']['test_users']:,} users: {out}", markup=False)


if __name__ == "__main__":
    run(main, make_parser())

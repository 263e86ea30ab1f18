"""Fine-tunes a causal language model to continue a history with the next item, and saves the artefact.

From scratch, a small Llama on semantic IDs alone:

    accelerate launch train/sft.py --config train/recipes/llama_scratch.yaml \
        --semantic_ids runs/ids --interactions interactions.parquet --artefact runs/artefact

A checkpoint from the Hub with LoRA, on a mixture of tasks:

    accelerate launch train/sft.py --config train/recipes/gpt2.yaml \
        --semantic_ids runs/ids --interactions interactions.parquet --artefact runs/artefact

Items as their titles, without semantic IDs:

    accelerate launch train/sft.py --config train/recipes/gpt2_titles.yaml \
        --items items.parquet --interactions interactions.parquet --artefact runs/artefact

Flags override the recipe. An interrupted run continues from its newest whole checkpoint; `--fresh` begins anew.
"""

import copy
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.backbones.causal_lm import BackboneArguments
from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.exceptions import BackboneError, DataError
from llmrec.script import parser, run
from llmrec.tasks.arguments import DataArguments

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel
    from trl import TrlParser

    from llmrec.artefact_parts import Settings
    from llmrec.data.split import Split
    from llmrec.tasks.task_data import TaskData
    from llmrec.training.arguments import FineTuningArguments
    from llmrec.training.phases import Phase

logger = logging.getLogger("llmrec.train.sft")

# What of the flags is kept in the artefact: what decides the weights. No path of this machine is kept, because
# artefacts are published.
_DATA = (
    *("prompt", "max_title_tokens", "like_threshold", "max_text_tokens", "max_history", "num_beams", "eval_users"),
    *("eval_rows", "stream", "train_share", "train_share_seed"),
)
_TRAINING = (
    *("seed", "train_sampling_strategy", "metric_for_best_model", "load_best_model_at_end", "eval_steps"),
    *("save_steps", "gradient_checkpointing", "new_tokens_epochs", "new_tokens_learning_rate", "loss_vocabulary"),
    *("batching", "early_stopping"),
)


def make_parser() -> "TrlParser":
    from llmrec.training.arguments import FineTuningArguments

    return parser((DataArguments, ColumnArguments, SplitArguments, BackboneArguments, FineTuningArguments), __doc__)


def main(
    data: DataArguments,
    names: ColumnArguments,
    splits: SplitArguments,
    backbone: BackboneArguments,
    training: "FineTuningArguments",
) -> None:
    import numpy as np
    import torch
    import transformers

    from llmrec.artefact_parts import Settings
    from llmrec.backbones.adapters import merge
    from llmrec.catalog import CATALOG_FOLDER
    from llmrec.catalog_versions import refuse_to_replace
    from llmrec.data.subset import learnt_events
    from llmrec.evaluation.evaluation import check_name
    from llmrec.examples import check_lengths
    from llmrec.tasks.case_lists import VALIDATION_BEAMS, CaseLists
    from llmrec.tasks.dataset import next_item_cases, training_dataset
    from llmrec.tasks.mixture import Mixture
    from llmrec.training.arguments import UNNAMED, recorded
    from llmrec.training.fit import fit
    from llmrec.training.phases import NEW_TOKENS, load_result, model_of, plan_phases, whole_model
    from llmrec.training.ranking import RankingCallback

    # Whatever can be wrong is found out before a weight is loaded.
    transformers.set_seed(training.seed)
    data.check(training.max_steps)
    check_name(data.system)
    backbone.check()
    mixture = Mixture.parse(data.tasks)
    tasks = sorted({entry.task for entry in mixture.entries})
    training.check_tasks(tasks, titles=data.semantic_ids is None)
    training.check_metric(tasks, ranked=data.eval_users > 0)
    refuse_to_replace(Path(data.artefact) / CATALOG_FOLDER)
    if training.output_dir == UNNAMED:
        training.output_dir = f"{data.artefact.rstrip('/')}.checkpoints"
    phases = plan_phases(backbone, training, Path(data.artefact), data.stream)
    if data.semantic_ids is None and any(phase.method == NEW_TOKENS for phase in phases):
        raise BackboneError("Titles are spelt with old tokens, so no new ones can be trained. Leave new_tokens out.")
    held, split, built = data.read(names, splits, backbone)
    drawn = np.random.default_rng(training.seed).permutation(len(held.split.targets("valid")))
    valid = list(next_item_cases(held, "valid", np.sort(drawn[: data.eval_rows]).tolist()))
    if not valid:
        raise DataError(
            "There is no validation case. Leave-one-out needs a user of three interactions: one to train on, one to "
            "validate, one to test."
        )
    with training.main_process_first(desc="building the rows"):
        shown = training.process_index == 0
        rows = training_dataset(mixture, held, training.seed, data.row_cache, data.stream, progress=shown)
    limit = positions(backbone)
    # A validation prompt is searched after, so it has to leave room for the longest item.
    if data.stream:
        logger.info("the stream is read once, to know its longest row")
    longest = max(check_lengths(valid, limit, held.catalog.num_levels), check_lengths(rows, limit))
    seen = learnt_events(held.split)
    settings = Settings(
        max_history=data.max_history,
        num_beams=data.num_beams,
        max_text_tokens=data.max_text_tokens,
        softmax="semantic_ids" if training.loss_vocabulary == "semantic_ids" else "vocabulary",
        split=split.content_hash,
        protocol=dict(split.protocol),
        training={
            "data": {name: getattr(data, name) for name in _DATA}
            | {"prompt": Path(data.prompt).name, "tasks": str(mixture)}
            | {"train_users": len(np.unique(held.split.owner[seen])), "train_tokens": int(seen.sum())},
            "semantic_ids": described_codes(built),
            "backbone": asdict(backbone) | {"backbone": without_path(backbone.backbone)},
            "trainer": recorded(training, _TRAINING),
        },
    )
    # Checkpoints of another run (other data, prompts, vocabulary, sizes or hyperparameters) are not continued.
    described = [copy.deepcopy(settings.training), held.content_hash, backbone.backbone]
    compute_dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    ranked = np.sort(drawn[: data.eval_users]).tolist()
    ranking = None
    if len(ranked):
        lists = CaseLists(held, settings, "valid", ranked, VALIDATION_BEAMS)
        ranking = RankingCallback(lists, held.split.targets("valid")[ranked])
    result, new_rows = None, []
    for phase in phases:
        done = None if data.fresh else phase.done_rows(str(described))
        if done is not None:
            logger.info("the phase %s is done already", phase.method)
            result, new_rows = phase.result, done
            continue
        if result is None:
            model, new_rows = first_model(data, held, backbone, longest, compute_dtype, training.seed)
        else:
            model = load_result(phase, result, compute_dtype)
        model, base = model_of(phase, model, new_rows, held.tokenizer, compute_dtype)
        logger.info(
            "%s by %s: %.2f M parameters, %.2f M of them trained; %s rows, %d to validate, at most %d tokens each",
            *(type(model).__name__, phase.method, model.num_parameters() / 1e6),
            sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) / 1e6,
            *("streamed" if data.stream else f"{len(rows):,}", len(valid), longest),
        )
        trainer = fit(
            *(phase, model, rows, valid),
            tokenizer=held.tokenizer,
            ranking=ranking,
            semantic_ids=np.unique(held.catalog.tokens_of_rows(range(len(held.catalog)))).tolist(),
            tasks=sorted({*tasks, "next_item"}),  # which is what is validated
            described=described,
            fresh=data.fresh,
        )
        trained = whole_model(trainer, phase, new_rows)
        if trained is not None and phase.result is not None:
            phase.finish(merge(trained), held.tokenizer, new_rows, str(described))
        elif trained is not None:
            settings.training |= record_of(trainer)
            save(data, held, settings, tasks, phase, trained.eval(), base, compute_dtype)
            if data.test_users:
                test(data, split, held, settings)
        trainer.accelerator.wait_for_everyone()
        result = phase.result


def positions(backbone: BackboneArguments) -> int:
    """The most tokens that a row may have; a model from scratch gets as many positions as the rows need."""
    from llmrec.backbones.causal_lm import context_limit, load_config

    limit = None if backbone.backbone is None else context_limit(load_config(backbone))
    return limit or 2**31


def first_model(
    data: DataArguments,
    held: "TaskData",
    backbone: BackboneArguments,
    longest: int,
    compute_dtype: "torch.dtype | None",
    seed: int,
) -> tuple["PreTrainedModel", list[int]]:
    """The model that training begins with, and which rows of its embeddings are new."""
    from llmrec.backbones.causal_lm import from_checkpoint, from_scratch
    from llmrec.backbones.new_rows import starts
    from llmrec.item_tokenizer import CODEBOOKS_FOLDER, read_quantizer

    if backbone.backbone is None:
        # Room for a few more items than the longest row has, so that a longer max_history can be tried when serving.
        return from_scratch(backbone, held.tokenizer, -(-2 * longest // 64) * 64, compute_dtype), []
    if held.catalog.spelling is not None:  # items are spelt with tokens that the checkpoint knows
        return from_checkpoint(backbone, held.tokenizer, [], seed, None, compute_dtype)
    texts, quantizer = None, None
    if backbone.new_token_init == "text":
        text, titles = held.item_text, held.catalog.title
        texts = [f"{titles(row)} {text.description(row)} {text.attributes(row)}" for row in range(len(held.catalog))]
    elif backbone.new_token_init == "codebook":
        quantizer = read_quantizer(Path(str(data.semantic_ids)) / CODEBOOKS_FOLDER)
    start = starts(backbone.new_token_init, held.catalog, texts, held.text, quantizer)
    new_ids = [int(id) for level in held.catalog.require_tokens() for id in level]
    return from_checkpoint(backbone, held.tokenizer, new_ids, seed, start, compute_dtype)


def record_of(trainer: Any) -> dict[str, Any]:
    """What an artefact keeps of its training's course and cost."""
    import torch
    import transformers

    import llmrec
    from llmrec.training.curve import log_curve

    return {
        "evaluations": log_curve(trainer.state.log_history),
        "cost": {
            "fit_seconds": round(trainer.fit_seconds, 1),
            "parameters": trainer.accelerator.unwrap_model(trainer.model).num_parameters(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        },
        "versions": {package.__name__: package.__version__ for package in (llmrec, torch, transformers)},
    }


def save(
    data: DataArguments,
    held: "TaskData",
    settings: "Settings",
    tasks: list[str],
    phase: "Phase",
    model: Any,
    base: str,
    compute_dtype: "torch.dtype | None",
) -> None:
    """Writes the artefact: the model itself, or its adapter beside it, and the two of them merged."""
    import torch

    from llmrec.export import export, save_adapter
    from llmrec.recommender import Recommender
    from llmrec.training.curve import training_page

    tokenizer = None if data.semantic_ids is None else Path(data.semantic_ids)
    templates = {task: held.templates[task] for task in tasks if task in held.templates}
    recommender = Recommender(model, held.tokenizer, held.catalog, held.prompt, settings, tokenizer, templates)
    if phase.base is None:
        recommender.save_pretrained(data.artefact)
    else:
        adapter = f"{data.artefact.rstrip('/')}.adapter"
        save_adapter(recommender, adapter, base, phase.method, compute_dtype or torch.float32)
        merged = export(adapter, phase.base, data.artefact)
        logger.info(
            "adapter saved to %s; merged into its base, log-probabilities differ by %.1e at most",
            *(adapter, merged.difference),
        )
    training_page(phase.arguments.output_dir).write(Path(phase.arguments.output_dir) / "training.html")
    logger.info("artefact saved to %s; its training's course is in %s", data.artefact, phase.arguments.output_dir)


def test(data: DataArguments, split: "Split", held: "TaskData", settings: "Settings") -> None:
    """Ranks test cases with the artefact as it is served; writes metrics.json and the evaluation beside it."""

    from llmrec.data.subset import drawn_cases
    from llmrec.evaluation.evaluation import evaluate
    from llmrec.recommender import Recommender
    from llmrec.storage import write_json
    from llmrec.tasks.case_lists import CaseLists

    cases = drawn_cases(split, data.test_users)
    recommender = Recommender.from_pretrained(data.artefact)
    lists = CaseLists(held, settings, "test", cases.tolist(), data.num_beams)
    trained = {
        name: value for name, value in settings.training.items() if name not in ("evaluations", "cost", "versions")
    }
    evaluation = evaluate(
        data.system,
        split,
        "test",
        recommend=lambda histories, k: lists.of(recommender, range(len(histories)), k, progress=True),
        ks=(5, 10, 20),
        cases=cases,
        facts={
            "seeds": {"training": trained["trainer"]["seed"], "users": 0},
            "settings": {"num_beams": data.num_beams, "training": trained},
            **{name: settings.training[name] for name in ("cost", "versions")},
        },
    )
    document = evaluation.document()
    folder = Path(data.artefact).resolve().parent
    evaluation.save(folder, document)
    write_json(
        folder / "metrics.json",
        {
            "system": evaluation.system,
            "split": split.content_hash,
            "protocol": dict(split.protocol),
            "validation": settings.training["evaluations"],
            "test": document,
            # With the flags as they were asked for: a recipe, or a study, holds them against its own.
            "training": trained | {"data": trained["data"] | {"prompt": data.prompt, "tasks": data.tasks}},
            "cost": settings.training["cost"],
            "versions": settings.training["versions"],
        },
    )
    shown = ", ".join(f"{name} {document[name]:.4f}" for name in ("HR@10", "NDCG@10"))
    logger.info("%d test cases: %s; %s", document["cases"], shown, folder / "metrics.json")


def described_codes(built: dict[str, Any]) -> dict[str, Any]:
    """What semantic_ids/build.py recorded of its codes, without paths of this machine."""
    from llmrec.item_tokenizer import without_places

    arguments = without_places(built.get("arguments", {}))
    policy = built.get("collisions", {}).get("policy")
    return {"quantizer": built.get("quantizer"), "collisions": policy, "arguments": arguments}


def without_path(source: str | None) -> str | None:
    """A backbone's Hub id, or the last part of its path."""
    return Path(source).name if source is not None and Path(source).exists() else source


if __name__ == "__main__":
    run(main, make_parser())

"""Distils a trained recommender into a smaller one, beside the same student by cross-entropy alone, and tests all.

A language model into one of half its layers, by hidden states (SLMRec), with the control:

    accelerate launch train/distill.py --config train/recipes/distill_slmrec.yaml \
        --teacher runs/sft/artefact --interactions interactions.parquet --artefact runs/distilled/artefact

Into a smaller language model of another width, by its softmax over the semantic IDs:

    accelerate launch train/distill.py --config train/recipes/distill_logits.yaml \
        --teacher runs/sft/artefact --interactions interactions.parquet --artefact runs/small/artefact

Into a SASRec, by its distribution over items:

    accelerate launch train/distill.py --config train/recipes/distill_sasrec.yaml \
        --teacher runs/sft/artefact --interactions interactions.parquet --artefact runs/sasrec/artefact

Beside the artefact it writes metrics.json (teacher, student and control, their sizes and times, what changed with
paired intervals), `evaluation/` for `llmrec compare`, and model_card.md. Flags override the recipe. An interrupted run
continues from its newest whole checkpoint; `--fresh` begins anew.
"""

import logging
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.distillation.arguments import DistillArguments, StudentArguments
from llmrec.exceptions import RecipeError
from llmrec.losses.arguments import LossArguments
from llmrec.script import parser, run
from llmrec.sequence.arguments import EventArguments, ItemArguments

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trl import TrlParser

    from llmrec.training.arguments import FineTuningArguments

logger = logging.getLogger("llmrec.train.distill")

# From a language model into a sequence model.
_SOFT = ("soft_items", "soft_cases", "soft_rest", "soft_cache")
# What students of one kind alone have; those that are sequence models also have flags of items, events and losses.
_OF_LANGUAGE = (
    *("tasks", "softmax_range", "eval_rows", "backbone_revision", "attn_implementation", "dtype"),
    *("loss_vocabulary", "batching"),
)
_OF_SEQUENCES = (
    *("windows", "tokens_per_batch", "relative_bias", "position_embeddings", "residual", "norm", "feed_forward"),
    *("gate", *_SOFT),
)


def make_parser() -> "TrlParser":
    from llmrec.training.arguments import FineTuningArguments

    return parser(
        (
            *(DistillArguments, ColumnArguments, SplitArguments, StudentArguments, ItemArguments, EventArguments),
            *(LossArguments, FineTuningArguments),
        ),
        __doc__,
    )


def main(
    data: DistillArguments,
    names: ColumnArguments,
    splits: SplitArguments,
    student: StudentArguments,
    items: ItemArguments,
    events: EventArguments,
    losses: LossArguments,
    training: "FineTuningArguments",
) -> None:
    import torch
    import transformers

    from llmrec.catalog import CATALOG_FOLDER
    from llmrec.catalog_versions import refuse_to_replace
    from llmrec.distillation.into_items import IntoItems
    from llmrec.distillation.into_language import IntoLanguage
    from llmrec.distillation.run import finish, train_student
    from llmrec.distillation.teacher import Teacher
    from llmrec.evaluation.evaluation import check_name
    from llmrec.training.arguments import UNNAMED

    # Whatever can be wrong is found out before a weight is made.
    transformers.set_seed(training.seed)
    data.check()
    check_name(data.system)
    folders = {data.method: data.artefact} | ({"cross_entropy": data.control_artefact} if data.control else {})
    for folder in folders.values():
        refuse_to_replace(Path(folder) / CATALOG_FOLDER)
    if training.output_dir == UNNAMED:
        training.output_dir = f"{data.artefact.rstrip('/')}.checkpoints"
    teacher = Teacher.read(data.teacher, data.interactions, names, splits, str(training.device))
    student.check(teacher.is_sequence, data.method)
    refuse_unused((data, student, training), (items, events, losses), teacher.is_sequence, student.is_sequence)
    if teacher.is_sequence or student.is_sequence:
        kind: Any = IntoItems(teacher, data, student, items, events, losses, training)
    else:
        compute_dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
        kind = IntoLanguage(teacher, data, student, training, compute_dtype)
    for method, folder in folders.items():
        output = training.output_dir if method == data.method else f"{training.output_dir.rstrip('/')}.control"
        train_student(kind, teacher, data, student, training, method, folder, output)
    if training.process_index == 0:
        finish(teacher, data)


def refuse_unused(
    flags: "Sequence[Any]", of_sequences: "Sequence[Any]", sequence_teacher: bool, sequence_student: bool
) -> None:
    """Raises RecipeError for flags that nothing reads of this teacher and this student.

    Args:
        flags: of any student.
        of_sequences: of students alone that are sequence models.
        sequence_teacher: whether the teacher is a sequence model, as then the student is.
        sequence_student: whether `--student` names one.
    """
    sequence = sequence_teacher or sequence_student
    refused = dict.fromkeys(
        _OF_LANGUAGE if sequence else _OF_SEQUENCES,
        f"is for {'language' if sequence else 'sequence'} models, and the student is a "
        f"{'sequence' if sequence else 'language'} model. Leave it out, or name another --student",
    )
    if sequence_teacher:
        refused |= dict.fromkeys(_SOFT, "is for teachers that are language models, and this is none. Leave it out")
    if not sequence:
        every = [one.name for group in of_sequences for one in fields(group)]
        refused |= dict.fromkeys(every, refused[_OF_SEQUENCES[0]])
    said = "is of a first stage for new tokens, which train/sft.py has. Leave it out"
    refused |= dict.fromkeys(("new_tokens_epochs", "new_tokens_learning_rate"), said)
    for group in (*flags, *of_sequences):
        for one in fields(group):
            if one.name in refused and getattr(group, one.name) != one.default:
                raise RecipeError(f"--{one.name} {refused[one.name]}.")


if __name__ == "__main__":
    run(main, make_parser())

"""One distillation from its students' trainings to the document that says what came of it."""

import copy
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from llmrec.distillation.arguments import DistillArguments, StudentArguments
from llmrec.distillation.measurement import latencies, size_of, this_machine
from llmrec.distillation.teacher import Teacher, evaluated
from llmrec.exceptions import BackboneError
from llmrec.recommender import Recommender, Settings

if TYPE_CHECKING:
    from llmrec.evaluation.evaluation import Evaluation
    from llmrec.training.arguments import FineTuningArguments

logger = logging.getLogger(__name__)

# What of the flags decides the weights; no path of this machine, because artefacts are published.
_LESSON = (
    *("alpha", "kl_temperature", "direction", "softmax_range", "supervision_points", "cosine_weight", "norm_weight"),
    *("multi_signal_weight", "soft_items", "soft_cases", "soft_rest"),
)
_TRAINING = (
    *("seed", "train_sampling_strategy", "metric_for_best_model", "load_best_model_at_end", "eval_steps"),
    *("save_steps", "loss_vocabulary", "batching", "early_stopping"),
)


class Kind(Protocol):
    """What is distilled into: `IntoLanguage` or `IntoItems`."""

    def make(self) -> Any: ...

    def trainer(self, method: str, model: Any, arguments: "FineTuningArguments", callbacks: list[Any]) -> Any: ...

    def settings(self, record: dict[str, Any]) -> Settings: ...

    def save(self, model: Any, settings: Settings, folder: str) -> None: ...

    def described(self) -> dict[str, Any]: ...

    @property
    def content_hash(self) -> str: ...


def train_student(
    kind: Kind,
    teacher: Teacher,
    data: DistillArguments,
    student: StudentArguments,
    training: "FineTuningArguments",
    method: str,
    artefact: str,
    output_dir: str,
) -> None:
    """Trains one student by one method and saves its artefact; called by every process.

    Students of one seed begin with the same weights and see the same batches, whatever the method.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C, once a checkpoint is saved.
        BackboneError: if the parameters are shared out over processes.
    """
    import torch
    import transformers
    from transformers import EarlyStoppingCallback

    import llmrec
    from llmrec.training.arguments import recorded
    from llmrec.training.checkpoints import checkpoint_to_resume
    from llmrec.training.curve import log_curve, training_page
    from llmrec.training.ranking import is_sharded
    from llmrec.training.shutdown import ShutdownCallback

    transformers.set_seed(training.seed)
    arguments = copy.copy(training)
    arguments.output_dir = output_dir
    model = kind.make()
    shutdown = ShutdownCallback()
    callbacks: list[Any] = [EarlyStoppingCallback(training.early_stopping)] if training.early_stopping else []
    trainer = kind.trainer(method, model, arguments, [*callbacks, shutdown])
    described = kind.described()
    record = described | {
        "data": described["data"] | teacher.share,
        "distillation": {"method": method, "teacher": _described(teacher)}
        | {name: getattr(data, name) for name in _LESSON if method != "cross_entropy"}
        | {"student": student.student, "keep_layers": student.keep_layers if student.student == "same" else None},
        "sizes": {name: getattr(student, name) for name in ("num_hidden_layers", "hidden_size")},
        "trainer": recorded(training, _TRAINING),
    }
    identity = [record, asdict(student), kind.content_hash, teacher.identity, teacher.learnt.content_hash]
    resume = checkpoint_to_resume(output_dir, identity, fresh=data.fresh)
    logger.info(
        "%s: %.2f M parameters, the teacher's %.2f M%s",
        *(method, size_of(model)["parameters"] / 1e6, size_of(teacher.recommender.model)["parameters"] / 1e6),
        "" if resume is None else f"; continuing from {resume}",
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    shutdown.exit_if_stopped()
    trainer.accelerator.wait_for_everyone()
    if is_sharded(trainer.model):
        raise BackboneError(
            "The processes hold parts of the student's parameters, which is not supported here. Train with "
            "train/accelerate/ddp.yaml or in one process."
        )
    if trainer.is_world_process_zero():
        trained = trainer.accelerator.unwrap_model(trainer.model).eval()
        made = record | {
            "evaluations": log_curve(trainer.state.log_history),
            "cost": {
                "fit_seconds": round(trainer.fit_seconds, 1),
                **size_of(trained),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            },
            "versions": {one.__name__: str(one.__version__) for one in (llmrec, torch, transformers)},
        }
        kind.save(trained, kind.settings(made), artefact)
        training_page(output_dir).write(f"{output_dir}/training.html")
        logger.info("%s: artefact saved to %s; its training's course is in %s", method, artefact, output_dir)
    trainer.accelerator.wait_for_everyone()


def finish(teacher: Teacher, data: DistillArguments) -> dict[str, Any]:
    """Tests the teacher and the saved students on the same cases, and writes what came of it beside the artefact.

    Written are metrics.json, evaluation/ (for `llmrec compare`), evaluation.json (for `llmrec push`) and
    model_card.md.

    Returns:
        The document of metrics.json: `before` (the teacher's evaluation), `after` (the student's), `outcome` (from the
        one to the other), `control` (None, or the control's `evaluation`, its `outcome` against the teacher, and the
        `student outcome`: from the control to the student), `sizes` and `latency` of each in milliseconds, `machine`,
        `artefacts`, `training`, `cost`, `versions`, `validation`.
    """
    from llmrec.data.subset import drawn_cases
    from llmrec.evaluation.outcome import outcome, outcome_table
    from llmrec.model_card import FURTHER, card_of
    from llmrec.storage import atomic_path, write_json

    split, cases = teacher.split, drawn_cases(teacher.split, data.test_users)
    recommenders: dict[str, Recommender] = {f"{data.system}-teacher": teacher.recommender}
    device = teacher.recommender.model.device
    recommenders[data.system] = Recommender.from_pretrained(data.artefact, device=device)
    if data.control:
        recommenders[f"{data.system}-control"] = Recommender.from_pretrained(data.control_artefact, device=device)
    found: dict[str, tuple[Evaluation, dict[str, Any]]] = {}
    for name, recommender in recommenders.items():
        evaluation = evaluated(name, recommender, split, cases, data.ks, _facts(recommender.settings))
        document = evaluation.document()
        evaluation.save(data.folder, document)
        found[name] = (evaluation, document)
    before, after = found[f"{data.system}-teacher"], found[data.system]
    changed = outcome(before[0], after[0], data.ks)
    logger.info("%s", outcome_table(changed))
    control: dict[str, Any] | None = None
    if data.control:
        alone = found[f"{data.system}-control"]
        control = {
            "evaluation": alone[1],
            "outcome": outcome(before[0], alone[0], data.ks),
            "student outcome": outcome(alone[0], after[0], data.ks),
        }
        logger.info("%s", outcome_table(control["student outcome"]))
    histories = [history.tolist() for history in split.histories("test")]
    taken: dict[str, Any] = {}
    if data.latency_repetitions:
        taken = latencies(recommenders, histories, repetitions=data.latency_repetitions)
    record = recommenders[data.system].settings.training
    names = {"before": f"{data.system}-teacher", "after": data.system, "control": f"{data.system}-control"}
    metrics = {
        "system": data.system,
        "split": split.content_hash,
        "protocol": dict(split.protocol),
        "before": before[1],
        "after": after[1],
        "outcome": changed,
        "control": control,
        "sizes": {side: size_of(recommenders[name].model) for side, name in names.items() if name in recommenders},
        "latency": {side: taken[name] for side, name in names.items() if name in taken},
        "machine": this_machine(),
        "artefacts": {"after": _last(data.artefact)}
        | ({"control": _last(data.control_artefact)} if data.control else {}),
        "validation": record.get("evaluations"),
        "training": {name: value for name, value in record.items() if name not in _OUTSIDE},
        "cost": record.get("cost"),
        "versions": record.get("versions"),
    }
    write_json(data.folder / "metrics.json", metrics)
    students = {data.artefact: (data.system, changed, [] if control is None else [control["student outcome"]])}
    if control is not None:
        students[data.control_artefact] = (f"{data.system}-control", control["outcome"], [])
    for folder, (name, found_change, others) in students.items():
        said = [f"Against the same student by cross-entropy alone: {other['sentence']}" for other in others]
        recommenders[name].settings.training[FURTHER] = [_further(recommenders[name], found_change, said)]
        recommenders[name].save_pretrained(folder)
    shown = {key: after[1][key] for key in ("split", "part", "items", "cases", "users")}
    systems = {name: _metrics_of(document) for name, (_, document) in found.items()}
    write_json(data.folder / "evaluation.json", shown | {"systems": systems})
    card = card_of(data.artefact, evaluations=[data.folder / "evaluation.json"])
    with atomic_path(data.folder / "model_card.md") as temporary:
        temporary.write_text(card, encoding="utf-8")
    logger.info("metrics.json, evaluation/ and model_card.md are in %s", data.folder)
    return metrics


_OUTSIDE = ("evaluations", "cost", "versions", "further")


def _further(student: Recommender, change: Mapping[str, Any], said: list[str]) -> dict[str, Any]:
    """What the student's card says of its distillation, whatever was found."""
    lesson: Mapping[str, Any] = student.settings.training["distillation"]
    taught = lesson["teacher"]
    kept = {"none": "random weights", "even": "layers of the teacher, evenly spaced", "first": "its first layers"}
    begun = lesson["keep_layers"]
    return {
        "method": "distillation" if lesson["method"] != "cross_entropy" else "a distillation's control",
        "began_with": "weights of its own" if begun is None else kept.get(begun, f"the teacher's layers {begun}"),
        "said": [
            f"Learnt by {lesson['method']} beside a teacher of {taught['parameters']:,} parameters "
            f"({taught['class']}); it has {size_of(student.model)['parameters']:,}. Before is the teacher, after this "
            "student.",
            *said,
        ],
        "outcome": dict(change),
        "settings": dict(lesson),
    }


def _described(teacher: Teacher) -> dict[str, Any]:
    """What a student's record says of its teacher: no path, and nothing of its training's course."""
    from llmrec.evaluation.runs import settings_key

    its = teacher.recommender.settings
    return {
        "weights": teacher.identity[:16],
        # Alike for teachers that differ by seeds alone.
        "settings": hashlib.sha256(settings_key(its.recipe).encode()).hexdigest()[:16],
        "class": type(teacher.recommender.model).__name__,
        **size_of(teacher.recommender.model),
        "seed": its.seeds["training"] if its.seeds.keys() == {"training"} else its.seeds,
    }


def _facts(settings: Settings) -> dict[str, Any]:
    record: Mapping[str, Any] = settings.training
    taught = record.get("distillation", {}).get("teacher", {})
    return {
        "seeds": {"training": record.get("trainer", {}).get("seed"), "teacher": taught.get("seed"), "users": 0},
        "settings": {
            "num_beams": settings.num_beams,
            "training": {name: value for name, value in record.items() if name not in _OUTSIDE},
        },
        **{name: record[name] for name in ("cost", "versions") if name in record},
    }


def _metrics_of(document: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of an evaluation and their intervals."""
    return {name: value for name, value in document.items() if name.partition("@")[0] in ("HR", "NDCG", "MRR")}


def _last(path: str) -> str:
    return path.rstrip("/").rpartition("/")[2]

"""From a language model or a sequence model into a sequence model: the student's windows and weights, its training."""

import copy
import logging
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llmrec.distillation.arguments import SEQUENCE_STUDENTS, DistillArguments, StudentArguments
from llmrec.distillation.asked_windows import AskedWindows
from llmrec.distillation.item_distributions import ItemDistributions, training_places
from llmrec.distillation.item_lessons import HiddenItemLesson, ItemLesson, TableLesson, TeacherLesson
from llmrec.distillation.kept_layers import kept_layers, supervision_points
from llmrec.distillation.layer_stack import LayerStack, with_layers
from llmrec.distillation.sequence_trainer import SequenceDistillationTrainer
from llmrec.distillation.teacher import Teacher
from llmrec.distillation.teacher_lists import TeacherLists
from llmrec.exceptions import DataError, RecipeError
from llmrec.losses.arguments import LossArguments
from llmrec.recommender import Settings
from llmrec.sequence.arguments import EncoderArguments, EventArguments, ItemArguments
from llmrec.storage import digest_of_arrays

if TYPE_CHECKING:
    from llmrec.representations.item_features import ItemFeatures
    from llmrec.sequence.model import SequenceModel
    from llmrec.training.arguments import FineTuningArguments

logger = logging.getLogger(__name__)

_SHARED = (
    *("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "dropout", "relative_bias"),
    *("position_embeddings", "residual", "norm", "feed_forward", "gate"),
)


@dataclass
class IntoItems:
    """Distils a language model, or a sequence model, into a sequence model.

    Attributes:
        teacher: who teaches.
        data, student, items, events, losses, training: flags.
    """

    teacher: Teacher
    data: DistillArguments
    student: StudentArguments
    items: ItemArguments
    events: EventArguments
    losses: LossArguments
    training: "FineTuningArguments"

    def __post_init__(self) -> None:
        """Cuts the windows; raises what cannot be done before any weight is made."""
        from llmrec.sequence.histories import LoggedHistories
        from llmrec.sequence.trainer import check_metric
        from llmrec.sequence.windows import TrainingWindows

        split = self.teacher.learnt
        self.items.check()
        self.losses.check()
        if self.items.sparse_gradients:
            raise RecipeError(
                "--sparse_gradients is true, and soft targets use every item in every step. Leave it out."
            )
        self.same = self.student.student == "same"
        if self.same and (asdict(self.items) != asdict(ItemArguments())):
            raise RecipeError(
                "--student is same, whose items are the teacher's, and flags of items are given. Leave them out, or "
                f"say one of {', '.join(SEQUENCE_STUDENTS)}."
            )
        if self.teacher.is_sequence:
            model = self.teacher.sequence_model
            self.told = model.events
            if asdict(self.events) != asdict(EventArguments()) and self.events.config(split) != self.told:
                raise RecipeError(
                    "The flags of events are not those of the teacher, which reads the student's own windows. Leave "
                    "them out."
                )
            self.max_history = self.data.max_history or int(model.config.max_history)
            if self.max_history > int(model.config.max_history):
                raise RecipeError(
                    f"--max_history is {self.max_history}, and the teacher reads {model.config.max_history} items. "
                    "Give no more."
                )
        else:
            self.told = self.events.config(split)
            self.max_history = self.data.max_history or self.teacher.recommender.settings.max_history
        self.histories = LoggedHistories(split, self.told)
        kind = TrainingWindows if self.teacher.is_sequence else AskedWindows
        self.windows = kind(
            self.histories,
            self.max_history,
            self.data.windows,
            action_weights=self.events.weights(self.told.actions),
            seed=self.training.seed,
        )
        valid = split.targets("valid")
        drawn = np.random.default_rng(self.training.seed).permutation(len(valid))
        self.chosen = np.sort(drawn[: self.data.eval_users or len(valid)])
        if not len(self.chosen):
            raise DataError("There is no validation case. Give users of three interactions or more.")
        check_metric(self.training)

    def settings(self, record: dict[str, Any]) -> Settings:
        """How the student is used."""
        return Settings(
            max_history=self.max_history,
            num_beams=1,  # there are no beams: every item is looked at
            split=self.teacher.split.content_hash,
            protocol=dict(self.teacher.split.protocol),
            training=record,
        )

    def make(self) -> "SequenceModel":
        """The student before its training; the caller sets torch's seed."""
        from llmrec.sequence.model import SequenceModel, sequence_config

        if self.same:
            return self._fewer_layers(self.teacher.sequence_model)
        model = SequenceModel(
            sequence_config(
                self.encoder().config(self.told.positions(self.max_history)),
                self.teacher.split.num_items,
                self.max_history,
                self.items.described(self.features),
                self.told,
                self.items.similarity,
                self.items.temperature,
            )
        )
        self.events.check(model.causal, getattr(model.encoder.config, "relative_bias", ""))
        model.representation.set_items(self.features)
        return model

    def encoder(self) -> EncoderArguments:
        """The student's encoder as train/seqrec.py would be told of it."""
        given = {name: getattr(self.student, name) for name in _SHARED if getattr(self.student, name) is not None}
        kind: Any = SEQUENCE_STUDENTS[self.student.student]
        return EncoderArguments(encoder=kind, **given)

    def lesson(self, method: str, model: "SequenceModel") -> ItemLesson | None:
        """What the teacher adds to the labels; None for cross-entropy alone."""
        data = self.data
        if method == "cross_entropy":
            return None
        if method == "slmrec":
            taught = self.teacher.sequence_model
            depths = len(LayerStack(taught)), len(LayerStack(model))
            points = supervision_points(*depths, data.supervision_points or min(4, *depths))
            return HiddenItemLesson(
                taught, model, points, data.cosine_weight, data.norm_weight, data.multi_signal_weight
            )
        if self.teacher.is_sequence:
            return TeacherLesson(self.teacher.sequence_model, data.alpha, data.kl_temperature, data.direction)
        if data.direction == "reverse":
            raise RecipeError(
                "--direction is reverse, and the teacher's distributions are known of its most probable items alone. "
                "Leave it out."
            )
        return TableLesson(self.table, data.alpha, data.kl_temperature)

    @cached_property
    def lists(self) -> TeacherLists:
        """A language model's answers, as they are kept on disk."""
        split = self.teacher.learnt
        places = training_places(split, self.data.soft_cases, self.training.seed)
        folder = self.data.soft_cache or f"{self.data.artefact.rstrip('/')}.soft_targets"
        recommender, width, identity = self.teacher.recommender, self.data.soft_items, self.teacher.identity
        return TeacherLists(recommender, split, places, width, folder, identity)

    @cached_property
    def table(self) -> ItemDistributions:
        """The language model's soft targets, computed once and kept on disk."""
        self.lists.kept.share_out(self.training)
        found = self.lists.distributions(self.data.soft_rest)
        logger.info("soft targets of %d training interactions, %d items each", len(found), self.data.soft_items)
        return found

    def trainer(self, method: str, model: "SequenceModel", arguments: Any, callbacks: list[Any]) -> Any:
        """The trainer of one student."""
        from llmrec.sequence.windows import TrainingWindows

        windows: TrainingWindows = self.windows
        return SequenceDistillationTrainer(
            model,
            arguments,
            windows,
            self.losses.build(windows.target_counts()),
            self.histories.cases("valid", self.chosen),
            self.teacher.split.targets("valid")[self.chosen],
            lesson=self.lesson(method, model),
            budget=self.data.tokens_per_batch,
            callbacks=callbacks,
        )

    def save(self, model: "SequenceModel", settings: Settings, folder: str) -> None:
        """Writes the student's artefact."""
        from llmrec.catalog import Catalog
        from llmrec.sequence.recommender import SequenceRecommender

        taught = self.teacher.recommender.catalog
        catalog = Catalog.of_rows([dict(item) for item in taught.items], taught.retired)
        SequenceRecommender(model, catalog, settings).save_pretrained(folder)

    def described(self) -> dict[str, Any]:
        """What of it decides the weights, for the record and for who may continue a checkpoint."""
        places = ("item_embeddings", "semantic_ids")
        encoder: Any = "the teacher's, fewer layers" if self.same else asdict(self.encoder())
        return {
            "data": {name: getattr(self.data, name) for name in ("windows", "tokens_per_batch", "soft_items")}
            | {name: getattr(self.data, name) for name in ("soft_cases", "soft_rest", "eval_users")}
            | {"max_history": self.max_history},
            "encoder": encoder,
            "items": asdict(self.items)
            | {name: Path(value).name for name in places if (value := getattr(self.items, name)) is not None},
            "events": asdict(self.told) | {"action_weights": self.events.action_weights},
            "loss": asdict(self.losses),
        }

    @cached_property
    def features(self) -> "ItemFeatures":
        """What a student of its own kind knows of the items."""
        return self.items.features(self.teacher.learnt)

    @property
    def content_hash(self) -> str:
        """Of what no flag and no hash of the split says.

        Times, actions and domains, texts' vectors and codes; of a language model its prompt and which of its items are
        retired, as the name of its kept answers has them.
        """
        own = digest_of_arrays([*self.histories.columns.values(), self.features.vectors, self.features.codes])
        answered = self.data.method == "logits" and not self.teacher.is_sequence
        return f"{own} {self.lists.kept.folder.name}" if answered else own

    def _fewer_layers(self, taught: "SequenceModel") -> "SequenceModel":
        from llmrec.sequence.model import SequenceModel

        depth = len(LayerStack(taught))
        kept = kept_layers(self.student.keep_layers, depth, self.student.num_hidden_layers)
        if kept is not None:
            logger.info("the student begins with layers %s of the teacher's %d", ", ".join(map(str, kept)), depth)
            made: SequenceModel = with_layers(taught, kept).float().requires_grad_(True)
            return made
        copied = with_layers(taught, list(range(self.student.num_hidden_layers or depth)))
        model = SequenceModel(copy.deepcopy(copied.config))
        own = dict(copied.representation.named_buffers())  # what items are made of is no weight, and is kept
        for name, buffer in model.representation.named_buffers():
            buffer.copy_(own[name])
        return model

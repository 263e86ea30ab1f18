"""From a language model into a smaller one: the student's tokens, rows and weights, and its training."""

import copy
import logging
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from llmrec.backbones.causal_lm import (
    BackboneArguments,
    attention_for,
    context_limit,
    from_checkpoint,
    from_scratch,
    load_config,
    load_tokenizer,
)
from llmrec.distillation.arguments import DistillArguments, StudentArguments
from llmrec.distillation.catalog_tokens import shared_tokens
from llmrec.distillation.head_states import HeadStates
from llmrec.distillation.kept_layers import kept_layers, supervision_points
from llmrec.distillation.language_trainer import DistillationTrainer, PairedRows
from llmrec.distillation.layer_stack import LayerStack, with_layers
from llmrec.distillation.lessons import HiddenLesson, Lesson, LogitsLesson
from llmrec.distillation.teacher import Teacher
from llmrec.exceptions import BackboneError, DataError, RecipeError
from llmrec.recommender import Recommender, Settings

if TYPE_CHECKING:
    import torch

    from llmrec.tasks.task_data import TaskData
    from llmrec.training.arguments import FineTuningArguments

logger = logging.getLogger(__name__)

_LARGEST = 2**31  # positions of a model without a limit


@dataclass
class IntoLanguage:
    """Distils a language model into a language model.

    Attributes:
        teacher: who teaches.
        data, student, training: flags.
        compute_dtype: of autocast, if there is one.
    """

    teacher: Teacher
    data: DistillArguments
    student: StudentArguments
    training: "FineTuningArguments"
    compute_dtype: "torch.dtype | None" = None
    longest: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        """Builds the rows; raises what cannot be done before any weight is made."""
        from llmrec.tasks.dataset import next_item_cases, training_dataset
        from llmrec.tasks.mixture import Mixture

        asked = self.teacher.recommender
        if needed := sorted(asked.prompt.variables - {"history"}):
            raise DataError(
                f"The teacher's prompt shows {', '.join(needed)} beside the history, which is not given here. Distil "
                "from a model whose prompt shows the history alone."
            )
        told = asked.settings.training.get("data", {}).get("tasks")
        tasks = self.data.tasks or (told.split(", ") if isinstance(told, str) else ["sequence"])
        self.mixture = Mixture.parse(tasks)
        self.tasks = sorted({entry.task for entry in self.mixture.entries})
        self.training.check_tasks(self.tasks, titles=asked.catalog.is_text)
        self.training.check_metric(self.tasks, ranked=self.data.eval_users > 0)
        self.backbone = self._backbone()
        self.theirs = self._held(asked.tokenizer, asked.catalog)
        self.held, self.paired = self._student_data()
        if self.data.method == "logits" and self.data.softmax_range == "vocabulary" and self.paired:
            raise RecipeError(
                "--softmax_range is vocabulary, and the student's tokenizer has other tokens than the teacher's. Say "
                "--softmax_range semantic_ids, which both spell."
            )
        self.ids = None
        if self.data.method == "logits" and self.data.softmax_range == "semantic_ids":
            self.ids = shared_tokens(asked.catalog, self.held.catalog)
        split = self.held.split
        drawn = np.random.default_rng(self.training.seed).permutation(len(split.targets("valid")))
        self.valid = list(next_item_cases(self.held, "valid", np.sort(drawn[: self.data.eval_rows]).tolist()))
        if not self.valid:
            raise DataError("There is no validation case. Give users of three interactions or more.")
        self.ranked: npt.NDArray[np.int64] = np.sort(drawn[: self.data.eval_users])
        with self.training.main_process_first(desc="building the rows"):
            shown = self.training.process_index == 0
            seed = self.training.seed
            self.rows: Any = training_dataset(self.mixture, self.held, seed, progress=shown)
            if self.paired:
                self.rows = PairedRows(self.rows, training_dataset(self.mixture, self.theirs, seed, progress=shown))

    def settings(self, record: dict[str, Any]) -> Settings:
        """How the student is used: as the teacher, but for the history's length and the softmax."""
        taught = self.teacher.recommender.settings
        over_ids = self.training.loss_vocabulary == "semantic_ids"
        return Settings(
            max_history=self.held.max_history,
            num_beams=taught.num_beams,
            max_text_tokens=taught.max_text_tokens,
            softmax="semantic_ids" if over_ids else "vocabulary",
            split=self.teacher.split.content_hash,
            protocol=dict(self.teacher.split.protocol),
            training=record,
        )

    def make(self) -> Any:
        """The student before its training; the caller sets torch's seed."""
        from llmrec.examples import check_lengths

        levels = self.held.catalog.num_levels
        taught = self.teacher.recommender.model
        if self.student.student == "same" and self.student.backbone is None:
            limit = context_limit(taught.config) or _LARGEST
            self.longest = max(check_lengths(self.valid, limit, levels), check_lengths(self.rows, limit))
            return self._fewer_layers(taught)
        limit = _LARGEST
        if self.student.backbone is not None:
            limit = context_limit(load_config(self.backbone)) or _LARGEST
        self.longest = max(check_lengths(self.valid, limit, levels), check_lengths(self.rows, limit))
        if self.student.backbone is None:
            return from_scratch(
                self.backbone, self.held.tokenizer, -(-2 * self.longest // 64) * 64, self.compute_dtype
            )
        new_ids = [int(one) for level in self.held.catalog.require_tokens() for one in level]
        return from_checkpoint(
            self.backbone, self.held.tokenizer, new_ids, self.training.seed, None, self.compute_dtype
        )[0]

    def lesson(self, method: str, model: Any) -> Lesson | None:
        """What the teacher adds to the labels; None for cross-entropy alone."""
        data, taught = self.data, self.teacher.recommender.model
        if method == "cross_entropy":
            return None
        if method == "slmrec":
            depths = len(LayerStack(taught)), len(LayerStack(model))
            points = supervision_points(*depths, data.supervision_points or min(4, *depths))
            if self.training.gradient_checkpointing:
                raise RecipeError(
                    "gradient_checkpointing is true, and slmrec reads hidden states that it would throw away. Leave "
                    "it out."
                )
            return HiddenLesson(taught, model, points, data.cosine_weight, data.norm_weight, data.multi_signal_weight)
        mine, its = (None, None) if self.ids is None else (self.ids[1], self.ids[0])
        if mine is None and self.teacher.recommender.settings.softmax == "semantic_ids":
            raise RecipeError(
                "--softmax_range is vocabulary, and the teacher learnt a softmax over the catalog's tokens alone: its "
                "other logits mean nothing. Say --softmax_range semantic_ids."
            )
        return LogitsLesson(HeadStates(taught), its, mine, data.alpha, data.kl_temperature, data.direction)

    def trainer(self, method: str, model: Any, arguments: "FineTuningArguments", callbacks: list[Any]) -> Any:
        """The trainer of one student."""
        from llmrec.tasks.case_lists import VALIDATION_BEAMS, CaseLists
        from llmrec.training.ranking import RankingCallback

        arguments.dataloader_pin_memory = arguments.device.type == "cuda"
        ranking = []
        if len(self.ranked):
            lists = CaseLists(self.held, self.settings({}), "valid", self.ranked.tolist(), VALIDATION_BEAMS)
            ranking = [RankingCallback(lists, self.held.split.targets("valid")[self.ranked])]
        ids = np.unique(self.held.catalog.tokens_of_rows(range(len(self.held.catalog)))).tolist()
        return DistillationTrainer(
            model,
            arguments,
            self.rows,
            self.valid,
            lesson=self.lesson(method, model),
            paired=self.paired,
            layout=arguments.batching,
            loss_vocabulary=arguments.loss_vocabulary,
            semantic_ids=ids,
            tasks=sorted({*self.tasks, "next_item"}),
            processing_class=self.held.tokenizer,
            callbacks=[*ranking, *callbacks],
        )

    def save(self, model: Any, settings: Settings, folder: str) -> None:
        """Writes the student's artefact."""
        templates = {task: self.held.templates[task] for task in self.tasks if task in self.held.templates}
        asked = self.teacher.recommender
        Recommender(
            model, self.held.tokenizer, self.held.catalog, self.held.prompt, settings, asked.item_tokenizer, templates
        ).save_pretrained(folder)

    def described(self) -> dict[str, Any]:
        """What of it decides the weights, for the record and for who may continue a checkpoint."""
        backbone = asdict(self.backbone)
        if self.backbone.backbone is not None and Path(self.backbone.backbone).exists():
            backbone["backbone"] = Path(self.backbone.backbone).name
        return {
            "data": {"tasks": str(self.mixture), "max_history": self.held.max_history}
            | {name: getattr(self.data, name) for name in ("eval_users", "eval_rows")},
            "backbone": backbone,
        }

    @property
    def content_hash(self) -> str:
        """Of what the rows are made of."""
        return self.held.content_hash

    def _backbone(self) -> BackboneArguments:
        """The flags of a language model, where it is another one than the teacher's with fewer layers."""
        asked = self.student
        given: dict[str, Any] = {
            name: getattr(asked, name)
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size", "dropout")
            if getattr(asked, name) is not None
        }
        kind = "llama" if asked.student == "same" else asked.student
        made = BackboneArguments(
            backbone=asked.backbone,
            backbone_revision=asked.backbone_revision,
            attn_implementation=asked.attn_implementation,
            dtype=asked.dtype,
            model_type=kind,
            **given,
        )
        made.check()
        if asked.backbone is not None and given:
            raise RecipeError(
                f"--{next(iter(given))} is given beside --backbone, whose sizes are the checkpoint's. Leave it out."
            )
        return made

    def _held(self, tokenizer: Any, catalog: Any) -> "TaskData":
        from llmrec.tasks.task_data import TaskData
        from llmrec.tasks.templates import shipped_templates

        asked = self.teacher.recommender
        recorded = asked.settings.training.get("data", {})
        return TaskData(
            self.teacher.learnt,
            catalog,
            tokenizer,
            asked.prompt,
            {**shipped_templates(), **asked.templates},
            max_history=self.data.max_history or asked.settings.max_history,
            max_text_tokens=asked.settings.max_text_tokens,
            like_threshold=recorded.get("like_threshold", 4.0),
        )

    def _student_data(self) -> tuple["TaskData", bool]:
        """What the student's rows are made of, and whether the teacher needs rows of its own."""
        from llmrec.vocabulary import add_catalog_tokens

        if self.student.backbone is None:
            return self.theirs, False
        asked = self.teacher.recommender
        if asked.catalog.is_text:
            raise BackboneError(
                "The teacher spells items by titles, and a student of another tokenizer would spell them otherwise. "
                "Leave --backbone out, or distil from a model of semantic IDs."
            )
        tokenizer = load_tokenizer(self.backbone)
        catalog = add_catalog_tokens(tokenizer, asked.catalog)
        held = self._held(tokenizer, catalog)
        return held, tokenizer.get_vocab() != asked.tokenizer.get_vocab()

    def _fewer_layers(self, taught: Any) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        depth, asked = len(LayerStack(taught)), self.student
        kept = kept_layers(asked.keep_layers, depth, asked.num_hidden_layers)
        dtype = getattr(torch, asked.dtype)
        attention = attention_for(self.backbone, taught.config, self.compute_dtype)
        if kept is None:
            config = copy.deepcopy(with_layers(taught, list(range(asked.num_hidden_layers or depth))).config)
            return AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
        made = with_layers(taught, kept).to(dtype).requires_grad_(True)
        # The teacher keeps its own: it is read and tested in its own type, which flash attention may not compute in.
        made.set_attn_implementation(attention)
        logger.info("the student begins with layers %s of the teacher's %d", ", ".join(map(str, kept)), depth)
        return made

"""What a distillation is made of, as flags: the teacher and its data, the lesson, the student."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from llmrec.exceptions import RecipeError

Method = Literal["slmrec", "logits", "cross_entropy"]

# Encoders over items that a student can be, by the flag's word and by `EncoderArguments`' own.
SEQUENCE_STUDENTS = {
    "sasrec": "sasrec",
    "hstu": "hstu",
    "gru4rec": "gru4rec",
    "llama_items": "llama",
    "gpt2_items": "gpt2",
}


# What belongs to one lesson, and would be silent in the others.
_OF_METHOD = {
    "slmrec": ("supervision_points", "cosine_weight", "norm_weight", "multi_signal_weight"),
    "logits": (
        *("alpha", "kl_temperature", "direction", "softmax_range"),
        *("soft_items", "soft_cases", "soft_rest", "soft_cache"),
    ),
}


@dataclass
class DistillArguments:
    """Which teacher, on what, by which lesson, and where the student goes."""

    teacher: str = field(metadata={"help": "The teacher's artefact: a folder, or a Hub id."})
    interactions: str = field(metadata={"help": "The interactions that the teacher was trained on."})
    artefact: str = field(metadata={"help": "Folder for the student; metrics.json stands beside it."})
    method: Method = field(
        default="logits",
        metadata={
            "help": "slmrec: the teacher's hidden states at several points, cosine and norm, and cross-entropy there; "
            "logits: KL to the teacher's softmax; cross_entropy: the labels alone."
        },
    )
    control: bool = field(
        default=False,
        metadata={"help": "Train the same student by cross-entropy alone too: same data, steps and seed."},
    )
    alpha: float = field(default=0.5, metadata={"help": "logits: (1 - alpha) cross-entropy + alpha T² KL."})
    kl_temperature: float = field(default=1.0, metadata={"help": "logits: T of both softmaxes."})
    direction: Literal["forward", "reverse"] = field(
        default="forward", metadata={"help": "logits: KL(teacher, student), or reverse, KL(student, teacher)."}
    )
    softmax_range: Literal["semantic_ids", "vocabulary"] = field(
        default="semantic_ids",
        metadata={"help": "logits, into a language model: over the catalog's tokens, or over all tokens."},
    )
    supervision_points: int = field(
        default=0, metadata={"help": "slmrec: B points; 0: 4, or as many as the student has layers."}
    )
    cosine_weight: float = field(default=1.0, metadata={"help": "slmrec: of the states' cosine distance."})
    norm_weight: float = field(default=0.1, metadata={"help": "slmrec: of the states' squared distance, by width."})
    multi_signal_weight: float = field(
        default=0.1, metadata={"help": "slmrec: of the cross-entropy at all points but the last."}
    )
    soft_items: int = field(
        default=20,
        metadata={"help": "From a language model into a sequence model: the items of each history's soft targets."},
    )
    soft_cases: int = field(
        default=0,
        metadata={"help": "Likewise: so many training interactions have soft targets, drawn with the seed; 0: all."},
    )
    soft_rest: Literal["uniform", "none"] = field(
        default="uniform",
        metadata={"help": "Likewise: probability beyond these items goes to all others alike, or is dropped."},
    )
    soft_cache: str | None = field(
        default=None, metadata={"help": "Likewise: folder that keeps the soft targets; default: beside the artefact."}
    )
    tasks: list[str] | None = field(
        default=None,
        metadata={"help": "Into a language model: the mixture, as of sft.py; default: the teacher's own."},
    )
    max_history: int | None = field(
        default=None, metadata={"help": "Most recent items that the student reads; default: the teacher's."}
    )
    windows: Literal["all", "last"] = field(
        default="all", metadata={"help": "Into a sequence model: as of seqrec.py."}
    )
    tokens_per_batch: int = field(default=0, metadata={"help": "Into a sequence model: as of seqrec.py."})
    eval_users: int = field(
        default=500,
        metadata={
            "help": "Validation cases ranked at every evaluation, drawn with the seed; 0: none, and into a sequence "
            "model all, as of seqrec.py."
        },
    )
    eval_rows: int = field(
        default=5000, metadata={"help": "Into a language model: validation cases whose loss is measured."}
    )
    test_users: int = field(
        default=-1, metadata={"help": "Test cases that teacher and students are ranked on, drawn; -1: all."}
    )
    ks: list[int] = field(default_factory=lambda: [1, 5, 10, 20, 50], metadata={"help": "Cut-offs of the test."})
    latency_repetitions: int = field(
        default=10, metadata={"help": "Timed requests of each batch size and model, after two more; 0: none."}
    )
    system: str = field(default="student", metadata={"help": "The student's name in a comparison."})
    fresh: bool = field(default=False, metadata={"help": "Ignore the checkpoints of an earlier run."})

    def check(self) -> None:
        """Raises RecipeError for values that make no sense or do not go together."""
        defaults = {one.name: one.default for one in fields(self)}
        for method, names in _OF_METHOD.items():
            for name in names:
                if method != self.method and getattr(self, name) != defaults[name]:
                    raise RecipeError(
                        f"--{name} belongs to --method {method}, and the method is {self.method}. Leave it out, or "
                        f"say --method {method}."
                    )
        counted = (
            *(("supervision_points", 0), ("soft_items", 1), ("soft_cases", 0), ("eval_users", 0), ("eval_rows", 1)),
            *(("test_users", -1), ("tokens_per_batch", 0), ("latency_repetitions", 0)),
        )
        for name, least in counted:
            if getattr(self, name) < least:
                raise RecipeError(f"--{name} is {getattr(self, name)}. It counts from {least}.")
        if self.test_users == 0:
            raise RecipeError("--test_users is 0, and a distillation is told by its test. Give -1 for all users.")
        if self.max_history is not None and self.max_history < 1:
            raise RecipeError(f"--max_history is {self.max_history}. It counts from 1.")
        if not 0 < self.alpha <= 1:
            raise RecipeError(f"--alpha is {self.alpha}. Give a share above 0, or say --method cross_entropy.")
        if not 0 < self.kl_temperature < float("inf"):
            raise RecipeError(f"--kl_temperature is {self.kl_temperature}. Give a number above 0.")
        weights = (self.cosine_weight, self.norm_weight, self.multi_signal_weight)
        if min(weights) < 0 or (self.method == "slmrec" and not any(weights)):
            raise RecipeError(f"The weights of slmrec are {weights}. Give numbers from 0 on, and not three zeros.")
        if self.control and self.method == "cross_entropy":
            raise RecipeError(
                "--method is cross_entropy, which is the control itself. Leave --control out, or name another method."
            )
        if not self.ks or min(self.ks) < 1 or max(self.ks) < 10:
            raise RecipeError(f"--ks is {self.ks}. Give cut-offs from 1 on, 10 or a larger one among them.")

    @property
    def control_artefact(self) -> str:
        """The control's folder, beside the student's."""
        return f"{self.artefact.rstrip('/')}.control"

    @property
    def folder(self) -> Path:
        """Where metrics.json and the evaluations go: beside the artefact."""
        return Path(self.artefact).resolve().parent


@dataclass
class StudentArguments:
    """What the student is: the teacher with fewer layers, another language model, or a sequence model."""

    student: str = field(
        default="same",
        metadata={
            "help": "same: the teacher's kind and width with fewer layers; a transformers model type such as llama, "
            "gpt2 or qwen3; or sasrec, hstu, gru4rec, llama_items, gpt2_items: a sequence model."
        },
    )
    keep_layers: str = field(
        default="even",
        metadata={
            "help": "same: the teacher's layers that the student begins with: even, first, a list such as 0,2,5; or "
            "none: random weights."
        },
    )
    num_hidden_layers: int | None = field(default=None, metadata={"help": "Layers."})
    hidden_size: int | None = field(default=None, metadata={"help": "Not of same: width D; default: 64 or 128."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "Not of same: heads H."})
    intermediate_size: int | None = field(default=None, metadata={"help": "Not of same: width of the MLPs."})
    dropout: float | None = field(default=None, metadata={"help": "Not of same: dropout."})
    backbone: str | None = field(
        default=None,
        metadata={"help": "A language model's checkpoint, Hub id or folder, that the student begins with."},
    )
    backbone_revision: str | None = field(default=None, metadata={"help": "Its branch, tag or commit."})
    attn_implementation: str = field(default="auto", metadata={"help": "Of language models, as of sft.py."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Of the student's weights; full training wants float32."}
    )
    relative_bias: str | None = field(default=None, metadata={"help": "hstu, sasrec: as of seqrec.py."})
    position_embeddings: bool | None = field(default=None, metadata={"help": "hstu, sasrec: likewise."})
    residual: str | None = field(default=None, metadata={"help": "hstu, sasrec: likewise."})
    norm: str | None = field(default=None, metadata={"help": "sasrec: likewise."})
    feed_forward: str | None = field(default=None, metadata={"help": "sasrec: likewise."})
    gate: bool | None = field(default=None, metadata={"help": "hstu, sasrec: likewise."})

    def check(self, sequence_teacher: bool, method: Method) -> None:
        """Raises RecipeError for a student that this teacher or this method cannot have.

        Args:
            sequence_teacher: whether the teacher is a sequence model.
            method: of the distillation.
        """
        if sequence_teacher and not (self.student == "same" or self.is_sequence):
            raise RecipeError(
                f"--student is {self.student!r}, and the teacher is a sequence model, which knows no tokens. Say "
                f"same, or one of {', '.join(SEQUENCE_STUDENTS)}."
            )
        if method == "slmrec" and (self.student != "same" or self.backbone is not None):
            raise RecipeError(
                "--method slmrec compares hidden states of one kind and width. Say --student same, without "
                "--backbone, or --method logits."
            )
        if self.student == "same":
            own: tuple[str, ...] = (
                "hidden_size",
                "num_attention_heads",
                "intermediate_size",
                "dropout",
                "relative_bias",
            )
            own += ("position_embeddings", "residual", "norm", "feed_forward", "gate", "backbone")
            if given := [name for name in own if getattr(self, name) is not None]:
                raise RecipeError(
                    f"--{given[0]} is given, and a student of the teacher's own kind has the teacher's. Leave it out, "
                    "or name a kind with --student."
                )
        elif self.keep_layers not in ("even", "none"):
            raise RecipeError(
                f"--keep_layers is {self.keep_layers!r}, and a {self.student} keeps no layer of the teacher. Leave it "
                "out, or say --student same."
            )
        if self.backbone is not None and self.is_sequence:
            raise RecipeError(f"--backbone is {self.backbone!r}, and a {self.student} reads none. Leave it out.")

    @property
    def is_sequence(self) -> bool:
        """Whether the flag names a sequence model; "same" is what the teacher is."""
        return self.student in SEQUENCE_STUDENTS

"""The flags of a training after SFT beside TRL's: what it begins with and learns from, and when it is stopped."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from llmrec.exceptions import DataError, RecipeError
from llmrec.flags import check_ranges, check_read
from llmrec.reinforcement.rewards import parse_weights
from llmrec.reinforcement.trade_off import GuardLimits

if TYPE_CHECKING:
    from llmrec.backbones.causal_lm import BackboneArguments

Method = Literal["grpo", "dr_grpo", "gspo", "dpo", "sdpo"]

METHODS = {
    "grpo": "GRPO",
    "dr_grpo": "Dr. GRPO",
    "gspo": "GSPO",
    "dpo": "DPO",
    "sdpo": "S-DPO",
}
PREFERENCES = ("dpo", "sdpo")
# Negatives of a preference, where nobody says how many: DPO has no other number.
NEGATIVES = {"dpo": 1, "sdpo": 3}


@dataclass
class RLArguments:
    """What to begin with, what to learn from, and where the result goes."""

    start: str = field(metadata={"help": "The artefact to begin with, a folder or a Hub id, as train/sft.py made it."})
    interactions: str = field(metadata={"help": "The interactions that it was trained on; the split has to be its."})
    artefact: str = field(metadata={"help": "Folder for the result, an artefact of the same layout."})
    rewards: list[str] = field(
        default_factory=lambda: ["exact", "rank"],
        metadata={
            "help": "GRPO and its kin: NAME or NAME=WEIGHT each, of exact, rank, prefix, semantic, collaborative, "
            "diversity, later. One of weight 0 is only logged."
        },
    )
    embeddings: str | None = field(
        default=None, metadata={"help": "For the reward semantic: folder that semantic_ids/embed.py wrote."}
    )
    collaborative: str | None = field(
        default=None,
        metadata={"help": "For the reward collaborative: a sequence model's artefact (train/seqrec.py), or item-cf."},
    )
    rollouts: Literal["beams", "sampled"] = field(
        default="beams",
        metadata={"help": "A group's items: the best of beam search, or drawn without replacement."},
    )
    rollout_temperature: float = field(default=1.0, metadata={"help": "Of --rollouts sampled."})
    group_weights: Literal["alike", "policy"] = field(
        default="alike",
        metadata={
            "help": "What a group's items count. policy: each by its probability, over that of having been drawn; by "
            "dr_grpo that is the gradient of the expected reward."
        },
    )
    backend: Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "What makes rollouts; the same items. vllm: one process."}
    )
    negatives: int | None = field(
        default=None, metadata={"help": "S-DPO: items that the taken one is preferred to (3); DPO has 1."}
    )
    negative_source: Literal["hard", "uniform"] = field(
        default="hard",
        metadata={"help": "DPO, S-DPO: what --start proposes and was not taken, or any items."},
    )
    later_items: int = field(default=3, metadata={"help": "How far the reward later looks, the target included."})
    cases_per_user: int = field(
        default=0, metadata={"help": "The most training interactions of a user to ask for; 0: all."}
    )
    max_cases: int = field(default=0, metadata={"help": "The most of all users, drawn with the seed; 0: all."})
    min_case_history: int = field(default=1, metadata={"help": "The least history of such a case."})
    preferences: str | None = field(
        default=None, metadata={"help": "For a prompt that shows one: user_id, preference and maybe timestamp."}
    )
    eval_users: int = field(
        default=1000, metadata={"help": "Validation cases that the guard ranks, the latest ones; 0: all."}
    )
    test_users: int = field(
        default=-1,
        metadata={"help": "Test cases ranked before and after, the same in every training; -1: all, 0: none."},
    )
    num_beams: int | None = field(
        default=None, metadata={"help": "Beams of these, at least 50; default: the artefact's."}
    )
    system: str = field(default="rl", metadata={"help": "The result's name in a comparison."})
    start_system: str = field(default="sft", metadata={"help": "The name there of what it began with."})
    adapter: Literal["none", "lora", "dora", "rslora"] = field(
        default="none", metadata={"help": "What is trained: every weight, or an adapter, merged at the end."}
    )
    lora_rank: int = field(default=16, metadata={"help": "Rank of an adapter."})
    lora_alpha: int = field(default=32, metadata={"help": "Its scale: updates are multiplied by alpha / rank."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Format of the weights; a frozen base below an adapter may be bfloat16."}
    )
    attn_implementation: str = field(default="auto", metadata={"help": "See train/sft.py."})
    fresh: bool = field(default=False, metadata={"help": "Ignore the checkpoints of an earlier run."})

    def check(self, method: Method) -> None:
        """Raises RecipeError or DataError for flags that ask for nothing, or do not go together."""
        flags = {name: getattr(self, name) for name in type(self).__dataclass_fields__}
        check_ranges(
            flags,
            {
                "negatives": (1, math.inf),
                "later_items": (1, math.inf),
                "cases_per_user": (0, math.inf),
                "max_cases": (0, math.inf),
                "min_case_history": (0, math.inf),
                "eval_users": (0, math.inf),
                "test_users": (-1, math.inf),
                "num_beams": (1, math.inf),
                "lora_rank": (1, math.inf),
                "lora_alpha": (1, math.inf),
            },
        )
        if not 0 < self.rollout_temperature < math.inf:
            raise RecipeError(
                f"rollout_temperature is {self.rollout_temperature}. Give a finite number above 0; 1.0 is the model's."
            )
        if self.rollouts == "beams" and self.rollout_temperature != 1.0:
            raise RecipeError(
                f"rollout_temperature is {self.rollout_temperature}, and beams have none. Say --rollouts sampled."
            )
        if self.adapter == "none" and self.dtype != "float32":
            raise RecipeError(
                f"dtype is {self.dtype}, in which an update of {1e-5:g} of a weight is rounded away. Train float32 "
                "(--bf16 true computes in bfloat16 all the same), or an adapter by --adapter lora."
            )
        if self.system == self.start_system:
            raise RecipeError(
                f"Before and after are both named {self.system!r}, and one evaluation would replace the other. Give "
                "--system another name."
            )
        if Path(self.artefact).resolve() == Path(self.start).resolve():
            raise RecipeError(
                f"The result would replace what training begins with, {self.start}. Give another --artefact."
            )
        self._check_read(flags, method)
        if self.group_weights == "policy" and self.rollouts == "sampled" and self.backend == "vllm":
            raise RecipeError(
                "group_weights is 'policy', and vLLM's engine does not say how likely its draws were. Say --rollouts "
                "beams or --backend transformers."
            )
        if method in PREFERENCES:
            if self.group_weights != "alike":
                raise RecipeError(
                    f"group_weights is {self.group_weights!r}, and {METHODS[method]} has preferences, not groups. "
                    "Leave it out."
                )
            if self.backend == "vllm":
                raise RecipeError(
                    f"{METHODS[method]} makes no rollouts while it trains, so vLLM has nothing to do. Leave "
                    "--backend out."
                )
            if method == "dpo" and self.negatives not in (1, None):
                raise RecipeError(f"DPO has one negative, and {self.negatives} are asked for. Say --method sdpo.")
            return
        weights = parse_weights(self.rewards)
        of_groups = [name for name in ("rank", "diversity") if weights.get(name)]
        if of_groups and self.group_weights == "policy" and self.rollouts == "sampled":
            raise RecipeError(
                f"group_weights is 'policy', and the reward {of_groups[0]!r} of a drawn item depends on what else was "
                "drawn, so it has no expectation that weights could stand for. Leave it out of --rewards, or say "
                "--rollouts beams."
            )
        if "later" not in weights and self.later_items != type(self).later_items:
            raise RecipeError(
                f"later_items is {self.later_items}, and no reward 'later' reads it. Add later to --rewards, or leave "
                "it out."
            )
        for name, source in (("semantic", self.embeddings), ("collaborative", self.collaborative)):
            flag = "embeddings" if name == "semantic" else name
            if name in weights and source is None:
                raise RecipeError(f"The reward {name!r} needs --{flag}, which is not given. Name it, or leave it out.")
            if name not in weights and source is not None:
                raise RecipeError(
                    f"--{flag} {source} is given, and no reward {name!r} reads it. Add {name} to --rewards, or leave "
                    "it out."
                )
            known = source is None or (name == "collaborative" and source == "item-cf")
            if not known and not Path(str(source)).is_dir():
                raise DataError(f"--{flag} {source} is no folder. Give one that was written before.")

    def _check_read(self, flags: Mapping[str, Any], method: Method) -> None:
        """Raises DataError for a flag that nothing would read; a recipe's rewards may stay with --method sdpo."""
        defaults = {name: one.default for name, one in type(self).__dataclass_fields__.items()}
        groups = [one for one in METHODS if one not in PREFERENCES]
        readers: dict[str, tuple[str, Sequence[str]]] = {
            **dict.fromkeys(("embeddings", "collaborative", "later_items"), ("--method", groups)),
            **dict.fromkeys(("negatives", "negative_source"), ("--method", PREFERENCES)),
            **dict.fromkeys(("lora_rank", "lora_alpha"), ("--adapter", ("lora", "dora", "rslora"))),
        }
        if method in PREFERENCES:
            readers |= dict.fromkeys(("rollouts", "rollout_temperature"), ("--negative_source", ("hard",)))
        chosen = {"--method": method, "--adapter": self.adapter, "--negative_source": self.negative_source}
        check_read(flags, defaults, readers, chosen)

    @property
    def temperature(self) -> float | None:
        """Of rollouts that are drawn; None for beams."""
        return self.rollout_temperature if self.rollouts == "sampled" else None

    def backbone(self, folder: str | Path) -> "BackboneArguments":
        """The same as `train/sft.py` has it, of the model in `folder`."""
        from llmrec.backbones.causal_lm import BackboneArguments

        adapted = self.adapter != "none"
        return BackboneArguments(
            backbone=str(folder),
            attn_implementation=self.attn_implementation,
            dtype=self.dtype,
            method=self.adapter if adapted else "full",
            lora_rank=self.lora_rank if adapted else None,
            lora_alpha=self.lora_alpha,
            lora_dropout=0.0,  # of which a rollout would know nothing
        )


@dataclass
class GuardArguments:
    """When the training is stopped, and what is kept; see `GuardLimits`."""

    recall_tolerance: float = field(
        default=GuardLimits.recall_tolerance, metadata={"help": "By so much of its own HR@50 may fall, as a share."}
    )
    max_kl: float = field(
        default=GuardLimits.max_kl, metadata={"help": "Nats from the start, as logged; .inf: no limit."}
    )
    min_entropy_share: float = field(
        default=GuardLimits.min_entropy_share, metadata={"help": "Of the entropy at the beginning; 0: no limit."}
    )
    max_signal_free: float = field(
        default=GuardLimits.max_signal_free, metadata={"help": "Share of groups without signal; 1: no limit."}
    )
    guard_patience: int = field(
        default=GuardLimits.patience, metadata={"help": "Evaluations in a row without a better NDCG@10; 0: no end."}
    )
    guard_steps: float = field(
        default=0.1, metadata={"help": "Steps between two evaluations of the guard; below 1 a share of all steps."}
    )

    def limits(self) -> GuardLimits:
        """As the guard takes them; raises RecipeError for numbers that are no limits."""
        return GuardLimits(
            self.recall_tolerance, self.max_kl, self.min_entropy_share, self.max_signal_free, self.guard_patience
        )

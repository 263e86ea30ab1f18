"""RLTrainingArguments: how a training after SFT goes, in transformers' and TRL's words, and its method's."""

import math
from dataclasses import dataclass, field

from llmrec.exceptions import RecipeError
from llmrec.reinforcement.arguments import PREFERENCES, Method
from llmrec.reinforcement.versions import without_trl_notices
from llmrec.training.arguments import StageArguments

with without_trl_notices():
    from trl import GRPOConfig

# What TRL reads where it generates by itself, or weighs rewards by a list. Nothing reads it here, so nobody shall
# think that it did something.
_UNREAD = {
    "reward_weights": "Say --rewards exact=1 rank=0.5",
    "max_completion_length": "An item is as long as the catalog has it",
    "top_p": "Groups are found by --rollouts",
    "top_k": "Groups are found by --rollouts",
    "min_p": "Groups are found by --rollouts",
    "repetition_penalty": "Groups are found by --rollouts",
    "generation_kwargs": "Groups are found by --rollouts",
    "cache_implementation": "Groups are found by --rollouts",
    "use_transformers_continuous_batching": "Groups are found by --rollouts",
    "use_transformers_paged": "Groups are found by --rollouts",
    "chat_template_kwargs": "Prompts are the artefact's",
    "model_init_kwargs": "Say --dtype and --attn_implementation",
    "num_generations_eval": "The guard evaluates",
    "max_tool_calling_iterations": "Items are no tools",
    "entropy_target": "The entropy's weight is entropy_coef, and stays it",
    "use_vllm": "It is TRL's way to rollouts, which knows no catalog. Say --backend vllm",
    "temperature": "Draws have a temperature of their own, --rollout_temperature",
    "mask_truncated_completions": "Items have no end token",
    "sync_ref_model": "The reference is what training begins with, and stays it",
    "use_adaptive_entropy": "Its weight is in no checkpoint; give entropy_coef",
}
# Likewise, by how their names begin.
_UNREAD_KINDS = {
    "vllm_": "Say --backend vllm",
    "sapo_": "It belongs to a loss that is not here",
    "vespo_": "It belongs to a loss that is not here",
    "ref_model_": "The reference is what training begins with, and stays it",
    "entropy_coef_": "The entropy's weight is entropy_coef, and stays it",
}
# What a loss of groups reads, and none of preferences.
_OF_GROUPS = (
    *("num_iterations", "epsilon", "epsilon_high", "delta", "loss_type", "importance_sampling_level", "scale_rewards"),
    *("multi_objective_aggregation", "top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef"),
    "use_bias_correction_kl",
)
# MiniOneRec's weight of the KL; DPO's usual beta, and that of S-DPO's paper.
_BETA = {"grpo": 0.001, "dr_grpo": 0.001, "gspo": 0.001, "dpo": 0.1, "sdpo": 1.0}


@dataclass
class RLTrainingArguments(StageArguments, GRPOConfig):
    """How it is trained: transformers' flags, TRL's for GRPO, and the method, which sets some of these."""

    method: Method = field(
        default="grpo",
        metadata={
            "help": "grpo; dr_grpo: advantages not divided by their deviation; gspo: ratios of whole items; dpo, "
            "sdpo: preferences between the taken item and one or several others."
        },
    )
    num_generations: int | None = field(default=16, metadata={"help": "G, items of a group."})
    beta: float | None = field(
        default=None,
        metadata={"help": "Weight of the KL from the start (0.001), or DPO's beta (0.1) or S-DPO's (1.0)."},
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "The initial learning rate of AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Passes over the cases."})
    per_device_train_batch_size: int = field(
        default=64, metadata={"help": "Items of a batch (groups times G); of dpo and sdpo: cases."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between two lines of log.jsonl."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between two checkpoints, or a share of all."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints that are kept, and the best one."})

    def __post_init__(self) -> None:
        self.beta = _BETA[self.method] if self.beta is None else self.beta
        if not (math.isfinite(self.beta) and self.beta >= 0):
            raise RecipeError(f"beta is {self.beta}. Give a finite number of 0 or more.")
        if self.beta == 0 and self.method in PREFERENCES:
            raise RecipeError(f"beta is 0, with which the loss of --method {self.method} is constant. Give more.")
        if self.eval_strategy != "no":
            raise RecipeError(
                f"eval_strategy is {self.eval_strategy}, and the guard evaluates. Leave it out; --guard_steps says "
                "how often."
            )
        if self.save_strategy == "best":
            raise RecipeError(
                "save_strategy is best, and which checkpoint is the best, and kept, is the guard's business. Leave it "
                "out; --save_steps says how often others are saved."
            )
        if self.use_liger_kernel:
            raise RecipeError(
                "use_liger_kernel is true, and was not tried with items' log-probabilities; TRL is about to drop it. "
                "Leave it out."
            )
        self._check_read()
        if self.load_best_model_at_end or self.restore_callback_states_from_checkpoint or self.early_stopping:
            raise RecipeError(
                "load_best_model_at_end, restore_callback_states_from_checkpoint and early_stopping are the guard's "
                "business. Leave them out."
            )
        if self.method in PREFERENCES:
            # GRPO's groups mean nothing here, and must not be refused.
            names = ("num_generations", "steps_per_generation", "generation_batch_size")
            given = {name: getattr(self, name) for name in names}
            self.__dict__ |= {"num_generations": 2, "steps_per_generation": 2, "generation_batch_size": None}
            super().__post_init__()
            self.__dict__ |= given
            return
        self._apply_method()
        super().__post_init__()

    def _check_read(self) -> None:
        """Raises RecipeError for a flag of TRL's that nothing would read."""
        fields = GRPOConfig.__dataclass_fields__
        unread = dict(_UNREAD)
        for begin, advice in _UNREAD_KINDS.items():
            unread |= {name: advice for name in fields if name.startswith(begin)}
        if self.method in PREFERENCES:
            unread |= dict.fromkeys(_OF_GROUPS, "It belongs to --method grpo, dr_grpo or gspo")
        for name, advice in unread.items():
            if getattr(self, name) != fields[name].default:
                raise RecipeError(f"--{name} is {getattr(self, name)!r}, and nothing here reads it. {advice}.")

    def _apply_method(self) -> None:
        """Sets what the method is in TRL's words."""
        means = {
            "loss_type": "dr_grpo" if self.method == "dr_grpo" else "grpo",
            "importance_sampling_level": "sequence" if self.method == "gspo" else "token",
            "scale_rewards": "none" if self.method == "dr_grpo" else "group",
        }
        for name, value in means.items():
            given, default = getattr(self, name), GRPOConfig.__dataclass_fields__[name].default
            if given not in (value, default):
                raise RecipeError(
                    f"--{name} {given} came with --method {self.method}, which is {value}. Leave it out, or choose "
                    "another method."
                )
            setattr(self, name, value)

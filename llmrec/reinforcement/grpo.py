"""ConstrainedGRPOTrainer: TRL's GRPO on groups of catalog items."""

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import TrainerCallback

from llmrec.exceptions import RecipeError
from llmrec.reinforcement.group_weights import weighted_advantages
from llmrec.reinforcement.item_logprobs import ItemLogProbs
from llmrec.reinforcement.policy import shared_logprobs, token_logprobs
from llmrec.reinforcement.rollouts import Rollouts, evaluating
from llmrec.reinforcement.versions import check_trl, without_trl_notices
from llmrec.training.checkpoints import WholeCheckpoints
from llmrec.training.curve import LOG_FILE, LogLines

with without_trl_notices():
    from trl import GRPOConfig, GRPOTrainer
    from trl.models import prepare_deepspeed
    from trl.trainer.utils import RepeatSampler

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmrec.reinforcement.rewards import NamedReward

logger = logging.getLogger(__name__)

# What of TRL's log says nothing of items, which end where they end, and not with a token for it.
_OF_TEXT = (
    "completions/clipped_ratio",
    "completions/mean_terminated_length",
    "completions/min_terminated_length",
    "completions/max_terminated_length",
)


class ConstrainedGRPOTrainer(WholeCheckpoints, GRPOTrainer):
    """Trains a policy by what its proposals earn, each against the others of its group.

    A step takes cases, lets `rollouts` propose G items for each, and asks every reward what each item earns. An item's
    advantage is its weighted reward less its group's mean, over the group's standard deviation (of G - 1, plus 1e-4)
    with `scale_rewards` "group" (GRPO, arXiv 2402.03300), or as it is with "none" (Dr. GRPO, arXiv 2503.20783). The
    loss is TRL's: clipped ratios to the policy that proposed, by token or, with `importance_sampling_level`
    "sequence" (GSPO, arXiv 2507.18071), by item; plus `beta` times the k3 estimate of the divergence from the
    reference, each token's times its ratio unless `use_bias_correction_kl` is off. Where the rollouts weigh their
    groups, means and deviations of rewards are weighted, and each item's advantage counts by its weight
    (`llmrec.reinforcement.group_weights`); the divergence counts all alike. `loss_type` "grpo" means over an
    item's tokens, "dr_grpo" divides by the tokens of the longest item that the catalog can have. See `rollouts` for
    what it means that proposals are no plain samples.

    What is another than in TRL's GRPOTrainer:

    * A case's prompt are its token ids, as served. What TRL knows as a prompt is the case's place, as a string.
    * A prompt is run once for all items of a batch that were proposed behind it, where the attention allows it.
    * Log-probabilities and entropies are over the policy's own softmax (`Settings.softmax`), at the positions that
      decoding uses.
    * Nothing cuts or drops an item: it has no end-of-text token, and no limit of length but the catalog's.
    * The reference is the model that is given, or a frozen copy of the policy as it is when the trainer is made, or,
      for a PEFT model, the model below its adapter.
    * There is no evaluation by rollouts: it would say how much a policy likes its rewards. Callbacks measure what
      recommendations are worth.
    * A resumed training goes on as if it had not stopped: in the order of its epoch, with the groups that were
      proposed before.
    * Beside TRL's numbers, `groups_without_signal` is logged: the share of groups whose items all earned the same, and
      so taught nothing. `rewards/NAME/mean` is each reward's, without its weight. Everything logged is a line of
      `log.jsonl` in the output folder.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        args: GRPOConfig,
        rollouts: Rollouts,
        rewards: "Sequence[NamedReward]",
        *,
        tokenizer: "PreTrainedTokenizerBase",
        reference: "PreTrainedModel | None" = None,
        callbacks: Sequence[TrainerCallback] = (),
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        """
        Args:
            model: the policy, a causal LM, maybe in PEFT's wrapper, with the weights that training begins with, also
                where it is resumed.
            args: TRL's. A process's batch of a generation (`per_device_train_batch_size` times
                `steps_per_generation`) holds whole groups; `num_generations` is the rollouts' group size.
            rollouts: of the same model; they know the cases.
            rewards: each with a name of its own.
            tokenizer: goes into checkpoints.
            reference: what `beta` keeps the policy near to.
            callbacks: further callbacks.
            optimizers: in the place of those that `args` describe.

        Raises:
            RecipeError: if the arguments do not go together.
            DependencyError: if TRL is of another version than this was made for.
        """
        from datasets import Dataset

        check_trl()
        check_arguments(args, rollouts.group_size, len(rollouts.cases), rollouts.weighted)
        names = [reward.name for reward in rewards]
        if not names or len(set(names)) < len(names):
            raise RecipeError(f"The rewards are {', '.join(names) or 'none'}. Give one or more, each once.")
        if rollouts.model is not model:
            raise RecipeError("The rollouts are of another model than is trained. Give them the policy itself.")
        below_adapter = hasattr(model, "disable_adapter")
        beta, args = args.beta, copy.copy(args)
        if beta and reference is None and not below_adapter:
            reference = copy.deepcopy(model)
        # TRL would load a reference anew from where the policy came from, which may be nowhere.
        args.beta = 0.0
        args.max_completion_length = rollouts.catalog.num_levels
        args.reward_weights = [reward.weight for reward in rewards]
        self._rollouts = rollouts
        self._group_weights: npt.NDArray[np.float64] | None = None  # of the newest groups
        patched = model.get_base_model() if below_adapter else model
        forward = patched.__dict__.get("forward")
        with without_trl_notices():
            super().__init__(
                model=model,
                reward_funcs=[_reward_of(reward, rollouts) for reward in rewards],
                args=args,
                train_dataset=Dataset.from_dict({"prompt": [str(case) for case in range(len(rollouts.cases))]}),
                processing_class=tokenizer,
                callbacks=[LogLines(Path(args.output_dir) / LOG_FILE), *callbacks],
                optimizers=optimizers,
                rollout_func=self._roll_out,
            )
        # TRL's own way to log-probabilities, which is not taken here, would stay in the model wherever it is copied.
        if forward is None:
            patched.__dict__.pop("forward", None)
        else:
            patched.forward = forward
        self._items = ItemLogProbs(model, rollouts.catalog, rollouts.softmax)
        logger.info("proposals are scored by %s: %s", self._items.layout, self._items.reason)
        vocabulary = rollouts.catalog.softmax_tokens(rollouts.softmax)
        self._vocabulary = None if vocabulary is None else torch.from_numpy(vocabulary).to(self.args.device)
        if self.is_fsdp_enabled or self._dist.is_zero3:
            raise RecipeError(
                "The policy is cut into parts (FSDP or DeepSpeed ZeRO-3), of which none could propose items alone. "
                "Train it whole on each device (DDP), with LoRA if it is large."
            )
        self.beta = self.args.beta = beta
        if beta and reference is not None:
            self.ref_model = self._frozen(reference)
        elif beta:
            self._check_below_adapter()

    def _frozen(self, reference: Any) -> Any:
        reference.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    @torch.no_grad()
    def _check_below_adapter(self) -> None:
        """Raises RecipeError if the model below a PEFT adapter is not the policy that training begins with."""
        model: Any = self.accelerator.unwrap_model(self.model)
        prompt = torch.tensor([self._rollouts.cases.prompts[0]], device=self.args.device)
        with evaluating(model), self.accelerator.autocast():
            whole = model(input_ids=prompt, logits_to_keep=1, use_cache=False).logits
            with model.disable_adapter():
                below = model(input_ids=prompt, logits_to_keep=1, use_cache=False).logits
        if not torch.allclose(whole, below, rtol=1e-3, atol=1e-4):
            raise RecipeError(
                "The adapter has been trained, so the model below it is not the policy that training begins with, "
                f"and beta ({self.args.beta or 'above 0'}) would pull towards it. Merge the adapter and put a new one "
                "on, or give a reference."
            )

    def _roll_out(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        """TRL's `rollout_func`: each case's place G times in a row; the groups' tokens, and rows for the rewards."""
        size = self._rollouts.group_size
        places = [int(prompt) for prompt in prompts]
        if len(places) % size or any(place != places[at - at % size] for at, place in enumerate(places)):
            raise RecipeError(
                f"This process was given {len(places)} places that are no whole groups of {size}. Let accelerate "
                "deal out batches as they are: no dispatch_batches, no split_batches."
            )
        chosen = places[::size]
        with self.accelerator.autocast():
            groups = self._rollouts.generate(chosen, self._step)
        self._group_weights = groups.weights
        return {
            "prompt_ids": [self._rollouts.cases.prompts[place] for place in places],
            "completion_ids": groups.tokens,
            "logprobs": groups.logprobs,
            "item": groups.items.reshape(-1).tolist(),
        }

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """TRL's, over the policy's own softmax; what follows the arguments is of images, of which there are none."""
        size = batch_size or len(input_ids)
        more: dict[str, Any] = {"output_router_logits": True} if compute_aux_loss else {}
        found = []
        for begin in range(0, len(input_ids), size):
            tokens, mask = input_ids[begin : begin + size], attention_mask[begin : begin + size]
            how = (logits_to_keep, self._vocabulary, self._entropy_bonus_enabled)
            with self.accelerator.autocast():
                if self._items.layout == "branches" and not compute_aux_loss:
                    found.append((*shared_logprobs(self._items, model, tokens, mask, *how), None))
                    continue
                logprobs, entropies, output = token_logprobs(model, tokens, mask, *how, **more)
            found.append((logprobs, entropies, output.aux_loss if compute_aux_loss else None))
        all_logprobs, all_entropies, losses = zip(*found, strict=True)
        return (
            torch.cat(all_logprobs),
            torch.cat(all_entropies) if compute_entropy else None,
            torch.stack(losses).mean() if compute_aux_loss else None,
        )

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's (B * G, rewards) of all processes, and the share of groups without signal."""
        found: Tensor = super()._calculate_rewards(*args, **kwargs)
        earned = (found * self.reward_weights.to(found.device)).sum(1).view(-1, self.num_generations)
        self._earned = earned
        alike = earned.amax(1) - earned.amin(1) <= 1e-6
        self._metrics["train"]["groups_without_signal"].append(alike.float().mean().item())
        return found

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        """TRL's, with the advantages of weighted groups in the place of its own."""
        found = super()._generate_and_score_completions(inputs)
        if self._group_weights is None:
            return found
        weights = torch.from_numpy(self._group_weights).to(self._earned.device)
        begin = self.accelerator.process_index * len(weights)
        earned = self._earned[begin : begin + len(weights)]
        found["advantages"] = weighted_advantages(earned, weights, self.scale_rewards == "group").flatten()
        return found

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, without what it says of texts that did not end."""
        for name in _OF_TEXT:
            self._metrics["train"].pop(name, None)
        super().log(logs, start_time)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's order of cases, of which each epoch has its own wherever training was resumed."""
        return _EpochOrder(
            lambda: int(self.state.epoch or 0),
            self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.num_iterations * self.args.steps_per_generation,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
        )

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: the artefact has a card of llmrec's, which says what was trained."""

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        # Between two generations, what was proposed is still to be learnt from.
        between = self._step % (self.args.steps_per_generation * self.num_iterations)
        state = {"processes": self.args.world_size, "inputs": self._buffered_inputs if between else None}
        torch.save(state | {"step": self._step}, self._proposed(output_dir))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        path = None if checkpoint is None else self._proposed(checkpoint)
        if path is None or not path.is_file():
            return
        state = torch.load(path, map_location=self.args.device, weights_only=True)
        self._step = state["step"]
        if state["processes"] == self.args.world_size:
            self._buffered_inputs = state["inputs"]

    def _proposed(self, folder: str) -> Path:
        return Path(folder) / f"proposed_{self.args.process_index}.pt"


class _EpochOrder(RepeatSampler):
    """TRL's RepeatSampler, which draws its epochs one after the other, for a training that begins in any of them."""

    def __init__(self, epoch: Callable[[], int], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        if self.shuffle:
            self.generator.manual_seed(self.seed + self._epoch())
        return super().__iter__()  # type: ignore[no-any-return]


def check_arguments(args: GRPOConfig, group_size: int, num_cases: int, weighted: bool = False) -> None:
    """Raises RecipeError for arguments of TRL's that constrained groups, maybe weighted ones, do not go with."""
    refused = {
        "loss_type": (args.loss_type not in ("grpo", "dr_grpo"), "Choose grpo or dr_grpo"),
        "use_vllm": (args.use_vllm, "Rollouts are given to the trainer: give it those of vLLM"),
        "temperature": (args.temperature != 1.0, "Draws have a temperature of their own, and the softmax has none"),
        "mask_truncated_completions": (
            args.mask_truncated_completions,
            "Items have no end token: all would be left out",
        ),
        "cast_lm_head_to_fp32": (args.cast_lm_head_to_fp32, "Log-probabilities are in float32 as it is"),
        "sync_ref_model": (args.sync_ref_model, "The reference is what training begins with, and stays it"),
        "use_adaptive_entropy": (
            args.use_adaptive_entropy,
            "Its weight is in no checkpoint, so a resumed training would be another; give entropy_coef",
        ),
        "eval_strategy": (args.eval_strategy != "no", "Rollouts do not evaluate: measure with a callback"),
        "num_generations": (args.num_generations != group_size, f"The rollouts propose {group_size} items"),
    }
    for name, (wrong, advice) in refused.items():
        if wrong:
            raise RecipeError(f"{name} is {getattr(args, name)!r}, which does not go with groups of items. {advice}.")
    dealt = args.accelerator_config
    if dealt.dispatch_batches or dealt.split_batches:
        raise RecipeError(
            "accelerator_config says dispatch_batches or split_batches, by which processes would be dealt parts of "
            "groups. Leave both out."
        )
    if args.importance_sampling_level == "sequence" and args.loss_type != "grpo":
        raise RecipeError(
            f"importance_sampling_level 'sequence' (GSPO) came with the loss_type {args.loss_type!r}, which counts an "
            "item's tokens. Say grpo there."
        )
    apart = (args.scale_rewards, args.multi_objective_aggregation)
    if weighted and (apart[0] not in ("group", "none") or apart[1] != "sum_then_normalize"):
        raise RecipeError(
            f"Weighted groups are compared each by itself and by the sum of their rewards, and scale_rewards is "
            f"{apart[0]!r}, multi_objective_aggregation {apart[1]!r}. Say group or none, and sum_then_normalize, or "
            "let items count alike."
        )
    size = args.per_device_train_batch_size * args.steps_per_generation
    if size % group_size:
        raise RecipeError(
            f"A process is given {size} places at once, per_device_train_batch_size "
            f"{args.per_device_train_batch_size} times steps_per_generation {args.steps_per_generation}, which are no "
            f"whole groups of {group_size}. Choose a multiple."
        )
    if num_cases < (needed := size * args.world_size // group_size):
        raise RecipeError(f"A step asks {needed} cases, and there are {num_cases}. Draw more, or take smaller steps.")


def _reward_of(reward: "NamedReward", rollouts: Rollouts) -> Callable[..., list[float]]:
    """A reward as TRL calls it: with the places of the cases as prompts, and the rows that `_roll_out` gave."""

    def earned(prompts: list[str], item: list[int], **_: Any) -> list[float]:
        size = rollouts.group_size
        items = np.array(item, dtype=np.int64).reshape(-1, size)
        chosen = np.array([int(prompt) for prompt in prompts[::size]], dtype=np.int64)
        found = np.asarray(reward.function(items, rollouts.cases, chosen), dtype=np.float64)
        if found.shape != items.shape or not np.isfinite(found).all():
            raise RecipeError(
                f"The reward {reward.name} gave {found.shape} numbers, {int((~np.isfinite(found)).sum())} of them not "
                f"finite, for {items.shape} items. A reward gives one finite number for each."
            )
        return found.reshape(-1).tolist()

    earned.__name__ = reward.name
    return earned

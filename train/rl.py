"""Trains an artefact further by what its own proposals earn (GRPO), or by preferences between items (S-DPO).

    accelerate launch train/rl.py --config train/recipes/rl_llama.yaml \
        --start runs/sft/artefact --interactions interactions.parquet --artefact runs/rl/artefact

S-DPO on the same cases, with the items that the model proposes and nobody took as negatives:

    accelerate launch train/rl.py --config train/recipes/sdpo_llama.yaml \
        --start runs/sft/artefact --interactions interactions.parquet --artefact runs/sdpo/artefact

Groups are items of the catalog, found by constrained search: none invalid, none twice. A guard ranks the latest
validation cases on the way; it stops a training that does harm, and where no checkpoint is better than the start, the
artefact gets the start's weights back. The closing table says whether it helped, on the test part, before and after.
Beside the artefact are written metrics.json, rl.html, and evaluation/ for `llmrec compare`.

Flags override the recipe. An interrupted run continues from its newest whole checkpoint; `--fresh` begins anew.
"""

import hashlib
import logging
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.data.arguments import ColumnArguments, SplitArguments
from llmrec.script import parser, run

if TYPE_CHECKING:
    from trl import TrlParser

    from llmrec.reinforcement.arguments import GuardArguments, RLArguments
    from llmrec.reinforcement.cases import RolloutCases
    from llmrec.reinforcement.guard import RLGuard
    from llmrec.reinforcement.start import Start
    from llmrec.reinforcement.training_arguments import RLTrainingArguments

logger = logging.getLogger("llmrec.train.rl")

# What of the flags decides the weights, and is kept; no path of this machine is, because artefacts are published.
_DATA = (
    *("cases_per_user", "max_cases", "min_case_history", "eval_users", "rollouts", "rollout_temperature"),
    *("group_weights", "adapter"),
    *("lora_rank", "lora_alpha", "dtype"),
)
_TRAINING = ("method", "seed", "beta", "gradient_checkpointing")
_OF_GROUPS = (
    ("rewards", "later_items", "backend"),
    (
        *(
            "num_generations",
            "num_iterations",
            "steps_per_generation",
            "epsilon",
            "epsilon_high",
            "delta",
            "loss_type",
        ),
        *("importance_sampling_level", "scale_rewards", "multi_objective_aggregation", "use_bias_correction_kl"),
        *("top_entropy_quantile", "off_policy_mask_threshold", "entropy_coef", "shuffle_dataset"),
    ),
)
_OF_PREFERENCES = (("negatives", "negative_source"), ("train_sampling_strategy",))


def make_parser() -> "TrlParser":
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # as `llmrec.script` does, before TRL imports it
    from llmrec.reinforcement.arguments import GuardArguments, RLArguments
    from llmrec.reinforcement.training_arguments import RLTrainingArguments

    return parser((RLArguments, GuardArguments, ColumnArguments, SplitArguments, RLTrainingArguments), __doc__)


def main(
    data: "RLArguments",
    guarding: "GuardArguments",
    names: ColumnArguments,
    splits: SplitArguments,
    training: "RLTrainingArguments",
) -> None:
    import torch
    import transformers
    import trl

    import llmrec
    from llmrec.evaluation.evaluation import check_name
    from llmrec.reinforcement.arguments import METHODS, NEGATIVES, PREFERENCES
    from llmrec.reinforcement.cases import RolloutCases
    from llmrec.reinforcement.guard import RLGuard
    from llmrec.reinforcement.result import write_result
    from llmrec.reinforcement.slice import DEPTH, SliceRanking, temporal_slice
    from llmrec.reinforcement.start import Start, check_place
    from llmrec.storage import digest_of
    from llmrec.tasks.case_lists import CaseLists
    from llmrec.training.arguments import UNNAMED, recorded
    from llmrec.training.curve import LOG_FILE, read_log

    # Whatever can be wrong is found out before a weight is loaded.
    transformers.set_seed(training.seed)
    data.check(training.method)
    data.negatives = data.negatives or NEGATIVES.get(training.method)
    limits = guarding.limits()
    for system in (data.system, data.start_system):
        check_name(system)
    check_place(data.artefact, data.system)
    if training.output_dir == UNNAMED:
        training.output_dir = f"{data.artefact.rstrip('/')}.checkpoints"
    start = Start.read(data.start_system, data.start, data.interactions, names, splits, data.preferences)
    cases = RolloutCases.of(
        start.held,
        data.cases_per_user,
        data.max_cases,
        training.seed,
        data.later_items,
        min_history=data.min_case_history,
        repeats=False,  # a search that leaves out what was seen never proposes them
    )
    split, num_beams = start.split, max(data.num_beams or start.settings.num_beams, DEPTH)
    watched = temporal_slice(split, data.eval_users, training.seed)
    lists = CaseLists(start.held, start.settings, "valid", watched.tolist(), num_beams)
    guard = RLGuard(
        SliceRanking(lists, split.targets("valid")[watched], DEPTH),
        split.case_users("valid")[watched],
        limits,
        guarding.guard_steps,
        seed=training.seed,
    )
    more_data, more_training = _OF_PREFERENCES if training.method in PREFERENCES else _OF_GROUPS
    described = {
        "data": {name: getattr(data, name) for name in (*_DATA, *more_data)} | {"num_beams": num_beams},
        "trainer": recorded(training, (*_TRAINING, *more_training)),
        "guard": guard.document()["limits"] | {"steps": guarding.guard_steps},
    }
    # Checkpoints of another run (another start, other data, rewards or hyperparameters) are not continued; what a
    # reward is made of counts by its content.
    sources = [source and digest_of(source) for source in (data.embeddings, data.collaborative)]
    identity = [described, start.weights_hash, start.held.content_hash, *sources]
    with ExitStack() as stack:
        fit = preferring if training.method in PREFERENCES else proposing
        trainer, seconds = fit(data, training, start, cases, guard, identity, stack)
    model = whole(trainer, training, data, start, guard)
    if trainer.is_world_process_zero():
        cuda = torch.cuda.is_available() and trainer.args.device.type == "cuda"
        write_result(
            data.artefact,
            data.system,
            METHODS[training.method],
            start,
            model,
            guard.document(),
            described,
            lines=read_log(Path(training.output_dir) / LOG_FILE),
            test_users=data.test_users,
            num_beams=num_beams,
            seed=training.seed,
            cost={
                "fit_seconds": round(seconds, 1),
                "steps": trainer.state.global_step,
                "device": torch.cuda.get_device_name() if cuda else "cpu",
            },
            versions={one.__name__: str(one.__version__) for one in (llmrec, torch, transformers, trl)},
        )
    trainer.accelerator.wait_for_everyone()


def proposing(
    data: "RLArguments",
    training: "RLTrainingArguments",
    start: "Start",
    cases: "RolloutCases",
    guard: "RLGuard",
    identity: Any,
    stack: ExitStack,
) -> tuple[Any, float]:
    """GRPO and its kin: the trainer, with the best model loaded if there is one, and the seconds that it took."""
    from llmrec.reinforcement.grpo import ConstrainedGRPOTrainer, check_arguments
    from llmrec.reinforcement.rewards import build_rewards, parse_weights
    from llmrec.reinforcement.rollouts import Rollouts, TransformersRollouts, check_group_size
    from llmrec.reinforcement.versions import check_vllm
    from llmrec.trie_tensors import TrieTensors

    held, softmax = start.held, start.settings.softmax
    size = training.num_generations or 0
    check_group_size(size, data.temperature, cases, TrieTensors.of(held.catalog, softmax), True)
    weighted = data.group_weights == "policy"
    check_arguments(training, size, len(cases), weighted)
    if data.backend == "vllm":
        check_vllm()
    weights = parse_weights(data.rewards)
    rewards = build_rewards(weights, held, data.embeddings, data.collaborative, start.split.content_hash)
    model = policy(data, training, start)
    options: dict[str, Any] = {"softmax": softmax, "temperature": data.temperature, "seed": training.seed}
    options["weighted"] = weighted
    rollouts: Rollouts
    if data.backend == "vllm":
        from llmrec.reinforcement.vllm_rollouts import VLLMRollouts

        rollouts = stack.enter_context(VLLMRollouts(model, start.folder, held.catalog, cases, size, **options))
    else:
        rollouts = TransformersRollouts(model, held.catalog, cases, size, **options)
    logger.info(
        "%s on %s cases: groups of %d, %s by %s; rewards %s",
        *(training.method, f"{len(cases):,}", size, data.rollouts, data.backend, ", ".join(data.rewards)),
    )

    def make(callbacks: Any) -> Any:
        return ConstrainedGRPOTrainer(
            model, training, rollouts, rewards, tokenizer=held.tokenizer, callbacks=callbacks
        )

    return trained(make, training, guard, identity, data.fresh)


def preferring(
    data: "RLArguments",
    training: "RLTrainingArguments",
    start: "Start",
    cases: "RolloutCases",
    guard: "RLGuard",
    identity: Any,
    stack: ExitStack,
) -> tuple[Any, float]:
    """DPO and S-DPO, likewise."""
    from llmrec.reinforcement.guard import agreed
    from llmrec.reinforcement.preference_trainer import PreferenceTrainer
    from llmrec.reinforcement.preferences import PreferenceCases, hard_negatives, uniform_negatives
    from llmrec.reinforcement.rollouts import TransformersRollouts, check_group_size
    from llmrec.training.kept_shards import KeptShards
    from llmrec.trie_tensors import TrieTensors

    catalog, softmax = start.held.catalog, start.settings.softmax
    count = int(data.negatives or 0)
    check_group_size(count + 1, data.temperature, cases, TrieTensors.of(catalog, softmax), True)
    model = policy(data, training, start)
    if data.negative_source == "uniform":
        negatives = uniform_negatives(cases, ~catalog.retired, count, training.seed)
    else:
        options: dict[str, Any] = {"softmax": softmax, "temperature": data.temperature, "seed": training.seed}
        rollouts = TransformersRollouts(model.to(training.device), catalog, cases, count + 1, **options)
        # Learning rates and the like may change: the same model proposes the same.
        told = [cases.content_hash, start.weights_hash, catalog.content_hash, count, data.dtype, options]
        key = hashlib.sha256(repr(told).encode()).hexdigest()[:32]
        kept = KeptShards(
            Path(f"{data.artefact.rstrip('/')}.negatives") / key,
            len(cases),
            lambda begin, end: {"items": hard_negatives(cases, rollouts, count, begin=begin, end=end)},
            {"items": count},
            "negatives",
        )
        kept.share_out(training)
        # The first process's: on disks of their own, near ties may fall otherwise on another device.
        negatives = agreed(kept.load()["items"])
    logger.info("%s on %s cases, %d %s negative(s)", training.method, f"{len(cases):,}", count, data.negative_source)

    def make(callbacks: Any) -> Any:
        return PreferenceTrainer(
            model,
            training,
            PreferenceCases(cases, negatives),
            catalog=catalog,
            softmax=softmax,
            beta=float(training.beta or 0.0),
            processing_class=start.held.tokenizer,
            callbacks=callbacks,
        )

    return trained(make, training, guard, identity, data.fresh)


def policy(data: "RLArguments", training: "RLTrainingArguments", start: "Start") -> Any:
    """The start's model, with an adapter if one is trained, and without dropout, of which rollouts know nothing."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from llmrec.backbones.adapters import adapt
    from llmrec.backbones.causal_lm import attention_for
    from llmrec.reinforcement.preference_trainer import drop_nothing

    backbone = data.backbone(start.folder)
    compute_dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    attention = attention_for(backbone, AutoConfig.from_pretrained(start.folder), compute_dtype)
    dtype = getattr(torch, data.dtype)
    model = AutoModelForCausalLM.from_pretrained(start.folder, dtype=dtype, attn_implementation=attention)
    drop_nothing(model)
    return model if data.adapter == "none" else adapt(backbone, model, [])


def trained(
    make: Any, training: "RLTrainingArguments", guard: "RLGuard", identity: Any, fresh: bool
) -> tuple[Any, float]:
    """Trains from the newest whole checkpoint on, and loads the best; the trainer, and the seconds that it took."""
    from transformers import TrainerState

    from llmrec.training.checkpoints import checkpoint_to_resume, seconds_of
    from llmrec.training.shutdown import ShutdownCallback

    training.dataloader_pin_memory = training.device.type == "cuda"
    shutdown = ShutdownCallback()
    trainer = make([guard, shutdown])
    resume = checkpoint_to_resume(training.output_dir, identity, fresh=fresh)
    state = None if resume is None else TrainerState.load_from_json(str(resume / "trainer_state.json"))
    seconds = 0.0 if resume is None else seconds_of(resume)
    if state is not None and guard.had_ended(state):
        logger.info("the training had ended with %s", resume)
        trainer.state = state
    else:
        if resume is not None:
            logger.info("continuing from %s", resume)
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
        shutdown.exit_if_stopped()
        seconds = trainer.fit_seconds
    if guard.best_step is not None:
        trainer.state.best_model_checkpoint = str(Path(training.output_dir) / f"checkpoint-{guard.best_step}")
        # It warns that a checkpoint lacks the head of a model whose head is its embeddings.
        warner = logging.getLogger("transformers.trainer")
        level = warner.level
        warner.setLevel(logging.ERROR)
        try:
            trainer._load_best_model()
        finally:
            warner.setLevel(level)
    trainer.accelerator.wait_for_everyone()
    return trainer, seconds


def whole(trainer: Any, training: "RLTrainingArguments", data: "RLArguments", start: "Start", guard: "RLGuard") -> Any:
    """The best model with all its parameters, an adapter merged, on the first process; None if the start is kept."""
    from llmrec.backbones.adapters import merge
    from llmrec.training.phases import Phase, whole_model

    if guard.is_returned:
        return None
    arguments: Any = training
    base = None if data.adapter == "none" else start.folder
    model = whole_model(trainer, Phase(data.backbone(start.folder), arguments, base, None), [])
    return None if model is None else merge(model).eval()


if __name__ == "__main__":
    run(main, make_parser())

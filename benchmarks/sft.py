"""How fast fine-tuning is beside TRL's SFTTrainer, and what its loss saves.

    python benchmarks/sft.py [--steps N] [--repeats N] [--quick] [--json FILE]

Trainings, in float32, without evaluations and checkpoints, on the same model, rows, order and hyperparameters:

* ids:          a Llama of 1.2 M parameters from scratch on histories of semantic IDs, every token a label
* prompts-32k:  a Llama of two layers, D = 256, with 32,000 words; prompts with text, four labels each
* prompts-128k: the same with 128,000 words; not with --quick

Each is run by llmrec's GenerativeTrainer and by TRL's SFTTrainer in turn (ABAB), every run in a process of its own.
Tokens that are no filling count, from the third step on. The script checks that both end with the same loss. The
trainer is run once more with its loss over the semantic IDs only, which is another loss and not compared (not with
--quick).

Then the loss alone, forward and backward, of 2,048 tokens and D = 256: cross-entropy over all logits, by pieces
(token_loss), and over 1,024 semantic IDs (id_range_loss). Peak memory is the process's, above what it held at the
start.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

VOCABULARIES = {"ids": 1_344, "prompts-32k": 32_000, "prompts-128k": 128_000}
LEVELS, CODES = 4, 256
LOSSES = ("cross_entropy", "token_loss", "id_range_loss")
WARM_UP = 2  # steps


def rows_of(setting: str, count: int) -> list[dict[str, list[int]]]:
    """Random rows: a history's semantic IDs, and in prompts some words of text before each."""
    import numpy as np

    rng = np.random.default_rng(0)
    words = VOCABULARIES[setting] - LEVELS * CODES
    rows = []
    for _ in range(count):
        items = words + rng.integers(0, CODES, (rng.integers(3, 21), LEVELS)) + CODES * np.arange(LEVELS)
        if setting == "ids":
            tokens = [1, *items.reshape(-1).tolist()]
            rows.append({"input_ids": tokens, "labels": [-100, *tokens[1:]]})
            continue
        tokens = [1]
        for item in items[:-1]:
            tokens += [*rng.integers(2, words, rng.integers(2, 9)).tolist(), *item.tolist()]
        rows.append({"input_ids": tokens + items[-1].tolist(), "labels": [-100] * len(tokens) + items[-1].tolist()})
    return rows


def model_of(setting: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    small = setting == "ids"
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARIES[setting],
            hidden_size=128 if small else 256,
            intermediate_size=512 if small else 1024,
            num_hidden_layers=4 if small else 2,
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )
    )


def train(trainer: str, setting: str, steps: int, batch: int) -> dict[str, Any]:
    """One training in this process; `trainer` is "llmrec", "llmrec-semantic_ids" or "trl"."""
    import datasets
    import torch
    from transformers import TrainerCallback, TrainingArguments

    from llmrec.vocabulary import train_tokenizer

    rows = rows_of(setting, steps * batch)
    model = model_of(setting)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            times.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "max_steps": steps,
            "per_device_train_batch_size": batch,
            "learning_rate": 1e-3,
            "logging_steps": steps,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "train_sampling_strategy": "sequential",
            "dataloader_pin_memory": torch.cuda.is_available(),
            "seed": 0,
        }
        data = datasets.Dataset.from_list(rows)
        tokenizer = train_tokenizer(["a title and a brand"], vocab_size=300)
        before = peak_memory()
        if trainer == "trl":
            from trl import SFTConfig, SFTTrainer

            arguments = SFTConfig(
                **common,
                bf16=False,
                gradient_checkpointing=False,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
            )
            made = SFTTrainer(
                model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
            )
        else:
            from llmrec.training.trainer import GenerativeTrainer

            ids = range(VOCABULARIES[setting] - LEVELS * CODES, VOCABULARIES[setting])
            made = GenerativeTrainer(
                model,
                TrainingArguments(**common),
                data,
                processing_class=tokenizer,
                callbacks=[Clock()],
                loss_vocabulary="semantic_ids" if trainer.endswith("semantic_ids") else "all",
                semantic_ids=list(ids),
            )
        loss = made.train().training_loss
    tokens = sum(len(row["input_ids"]) for row in rows[batch * WARM_UP :])
    return {
        "tokens_per_second": tokens / (times[-1] - times[WARM_UP - 1]),
        "loss": loss,
        "peak_bytes": peak_memory() - before,
        "parameters": model.num_parameters(),
    }


def measure_loss(name: str, vocabulary: int, repeats: int) -> dict[str, Any]:
    """Forward and backward of one loss in this process."""
    import torch

    from llmrec.training.loss import id_range_loss, token_loss

    torch.manual_seed(0)
    hidden = torch.randn(2048, 256, requires_grad=True)
    weight = torch.randn(vocabulary, 256).mul_(0.05).requires_grad_()
    weight.grad = torch.zeros_like(weight)  # as in all steps but the first
    ids = torch.arange(vocabulary - LEVELS * CODES, vocabulary)
    targets = ids[torch.randint(0, len(ids), (2048,))]
    before, times, value = peak_memory(), [], 0.0
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        if name == "cross_entropy":
            total = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
        elif name == "token_loss":
            total = token_loss(hidden, weight, targets)[0]
        else:
            total = id_range_loss(hidden, weight, targets, ids)[0]
        total.backward()
        times.append(time.perf_counter() - begin)
        value = float(total.detach()) / 2048
    return {"seconds": statistics.median(times[1:]), "loss": value, "peak_bytes": peak_memory() - before}


def peak_memory() -> int:
    """The most memory that this process has held so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def in_process(**arguments: Any) -> dict[str, Any]:
    """`train` or `measure_loss` in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", json.dumps(arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{arguments} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def compare(setting: str, steps: int, batch: int, repeats: int, quick: bool) -> dict[str, Any]:
    runs: dict[str, list[dict[str, Any]]] = {"llmrec": [], "trl": []}
    for _ in range(repeats):
        for trainer, found in runs.items():
            found.append(in_process(what="train", trainer=trainer, setting=setting, steps=steps, batch=batch))
    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*runs.values(), strict=True)]
    losses = {trainer: found[0]["loss"] for trainer, found in runs.items()}
    if abs(losses["llmrec"] - losses["trl"]) > 1e-4 * losses["trl"]:
        raise RuntimeError(f"{setting}: the losses differ: {losses}.")
    every = dict(runs)
    if not quick:
        narrow = {"what": "train", "trainer": "llmrec-semantic_ids", "setting": setting}
        every["llmrec-semantic_ids"] = [in_process(**narrow, steps=steps, batch=batch)]
    result: dict[str, Any] = {
        trainer: {
            "tokens_per_second": round(statistics.median(run["tokens_per_second"] for run in found)),
            "peak_megabytes": round(statistics.median(run["peak_bytes"] for run in found) / 2**20),
            "loss": found[0]["loss"],
        }
        for trainer, found in every.items()
    }
    return result | {
        "parameters": runs["llmrec"][0]["parameters"],
        "steps": steps,
        "batch": batch,
        "times_faster": round(statistics.median(ratios), 2),
        "every_ratio": [round(ratio, 2) for ratio in ratios],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, help="Of `ids`; a fifth with prompts. Default 40, 9 with --quick.")
    parser.add_argument("--repeats", type=int, help="Of each pair of runs. Default 3, 1 with --quick.")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    if options.child is not None:
        call = {"train": train, "loss": measure_loss}[options.child.pop("what")]
        print(json.dumps(call(**options.child)))
        return
    import torch

    before = environment()
    quick = options.quick
    steps = options.steps or (9 if quick else 40)
    repeats = options.repeats or (1 if quick else 3)
    trainings = {"ids": compare("ids", steps, 32, repeats, quick)}
    # TRL computes all positions' logits here, so that a step takes seconds.
    for setting, batch in (("prompts-32k", 4), ("prompts-128k", 2))[: 1 if quick else 2]:
        trainings[setting] = compare(setting, max(WARM_UP + 2, steps // 5), batch, repeats, quick)
    losses: dict[str, Any] = {}
    for vocabulary in (32_000,) if quick else (32_000, 128_000):
        found = {
            name: in_process(what="loss", name=name, vocabulary=vocabulary, repeats=1 if quick else 3)
            for name in LOSSES
        }
        if abs(found["token_loss"]["loss"] - found["cross_entropy"]["loss"]) > 1e-4:
            raise RuntimeError(f"The losses differ: {found}.")
        losses[str(vocabulary)] = {
            name: {"seconds": round(run["seconds"], 3), "peak_megabytes": round(run["peak_bytes"] / 2**20)}
            for name, run in found.items()
        }
    result = {"threads": torch.get_num_threads(), "trainings": trainings, "losses": losses}
    ratios = {f"tokens/s over TRL, {setting}": found["times_faster"] for setting, found in trainings.items()}
    for vocabulary, found in losses.items():
        for name in LOSSES[1:]:
            ratios[f"{name} over cross_entropy, V = {vocabulary}"] = round(
                found["cross_entropy"]["seconds"] / max(1e-3, found[name]["seconds"]), 1
            )
    for path in report("sft", result, ratios, before, options):
        print(path)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio} x")


if __name__ == "__main__":
    main()

"""Whether what was trained is what is served: every family and method, in memory, merged, and in vLLM.

    python benchmarks/export_parity.py [--families llama,gpt2,…] [--methods lora,full,…] [--quick] [--json FILE]

A tiny random checkpoint of every family (with a tokenizer of its kind, tied or untied) is extended by a catalog's
tokens and trained for a few steps by every method. Three models then recommend for the same histories:

* trained:       the model as training left it, in memory, with its adapters and in 4 or 8 bits if so trained
* transformers:  the artefact that `llmrec export` wrote, loaded again (Recommender.from_pretrained)
* vllm:          the same artefact in the engine behind `llmrec serve`

`max_score_difference` is the largest difference of a log-probability of an item from the trained model's, and
`same_items` whether all lists are the same, in order. An 8-bit layer rounds its inputs too, which no plain weights
can, so int8 differs and is summed up apart; where its lists differ, the scores of the items that both have are
compared. vLLM gets the methods of --vllm-methods alone; --quick takes two families, and from each one artefact to
vLLM: one of an adapter, one of full training.
"""

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
APART = "int8"
K = 10
ARCHITECTURES = (
    *("LlamaForCausalLM", "GPT2LMHeadModel", "Qwen3ForCausalLM", "GemmaForCausalLM", "MistralForCausalLM"),
    "PhiForCausalLM",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help="By default all; llama and gpt2 with --quick.")
    parser.add_argument("--methods", help="By default all; lora and full with --quick.")
    parser.add_argument("--vllm-methods", default="full,lora", help="Methods whose artefacts vLLM serves too.")
    parser.add_argument("--histories", type=int, default=16)
    parser.add_argument("--steps", type=int, default=6, help="Of training.")
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    os.environ |= {
        "VLLM_PLUGINS": "llmrec",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "LLMREC_ARCHITECTURES": ",".join(ARCHITECTURES),
    }
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    from factories import random_histories
    from tiny_backbones import FAMILIES, train, write_checkpoint
    from transformers.utils.logging import disable_progress_bar

    from llmrec.backbones.causal_lm import METHODS
    from llmrec.export import export
    from llmrec.recommender import Recommender

    disable_progress_bar()
    before = environment()
    families = options.families.split(",") if options.families else ["llama", "gpt2"] if options.quick else [*FAMILIES]
    methods = options.methods.split(",") if options.methods else ["lora", "full"] if options.quick else [*METHODS]
    served = options.vllm_methods.split(",") if options.vllm_methods else []
    found: dict[str, Any] = {}
    asked = []  # of vLLM, when all else is done: it changes classes of transformers in its process
    with tempfile.TemporaryDirectory() as temporary:
        for number, family in enumerate(families):
            model_type, _, tied = FAMILIES[family]
            checkpoint = write_checkpoint(family, Path(temporary) / family / "checkpoint")
            found[family] = {"model_type": model_type, "tied": tied, "methods": {}}
            for method in methods:
                folder = Path(temporary) / family / method
                run = train(checkpoint, method, folder, steps=options.steps)
                trained = run.recommender
                histories = random_histories(0, len(trained.catalog), options.histories, 6)
                wanted = trained.recommend_rows(histories, K)
                row: dict[str, Any] = {}
                if method == "full":
                    trained.save_pretrained(folder / "artefact")
                else:
                    row["next_token_difference"] = export(run.adapter, run.base, folder / "artefact").difference
                merged = Recommender.from_pretrained(folder / "artefact").recommend_rows(histories, K)
                found[family]["methods"][method] = row | {"transformers": compared(wanted, merged)}
                if method in served and (not options.quick or method == methods[number % len(methods)]):
                    prompts = [trained.encoder.encode(history) for history in histories]
                    asked.append((family, method, folder / "artefact", prompts, histories, wanted))
        for family, method, artefact, prompts, histories, wanted in asked:
            found[family]["methods"][method]["vllm"] = compared(wanted, ask_vllm(artefact, prompts, histories))

    rows = [
        (method, runtime, row[runtime])
        for family in found.values()
        for method, row in family["methods"].items()
        for runtime in ("transformers", "vllm")
        if runtime in row
    ]
    lossless = [row for method, _, row in rows if method != APART]
    rounded = [row for method, _, row in rows if method == APART]
    result: dict[str, Any] = {
        "options": {name: value for name, value in vars(options).items() if name not in ("quick", "json")},
        "compared": {runtime: sum(one == runtime for _, one, _ in rows) for runtime in ("transformers", "vllm")},
        "max_score_difference": max((row["max_score_difference"] for row in lossless), default=None),
        "same_items": all(row["same_items"] for row in lossless),
        "int8": {
            "max_score_difference": max((row["max_score_difference"] for row in rounded), default=None),
            "same_items": all(row["same_items"] for row in rounded) if rounded else None,
        },
        "families": found,
    }
    ratios = {
        f"same lists, {runtime}": sum(
            row["same_items"] for method, one, row in rows if one == runtime and method != APART
        )
        / max(1, sum(one == runtime and method != APART for method, one, _ in rows))
        for runtime in ("transformers", "vllm")
    }
    for family, held in found.items():
        for method, row in held["methods"].items():
            told = [f"{one} {row[one]['max_score_difference']:.1e}" for one in ("transformers", "vllm") if one in row]
            print(f"{family} {method}: {', '.join(told)}")
    for path in report("export_parity", result, ratios, before, options):
        print(path)


def compared(wanted: tuple[Any, Any], found: tuple[Any, Any]) -> dict[str, Any]:
    """Whether two searches give the same lists, and how far the scores of one item in both are apart at most."""
    apart = 0.0
    for items, scores, others, their in zip(*wanted, *found, strict=True):
        of = dict(zip(others, their, strict=True))
        apart = max(apart, *(abs(score - of[item]) for item, score in zip(items, scores, strict=True) if item in of))
    return {"max_score_difference": apart, "same_items": wanted[0] == found[0]}


def ask_vllm(artefact: Path, prompts: list[list[int]], seen: list[list[int]]) -> tuple[list[Any], list[Any]]:
    """The engine's lists, in this process: vLLM is imported once for all artefacts, which is most of its start."""
    from vllm import LLM, PoolingParams, TokensPrompt
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from llmrec.engine.request import SearchParameters

    architecture = json.loads((artefact / "config.json").read_text(encoding="utf-8"))["architectures"][0]
    engine = LLM(
        str(artefact),
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=16,
        runner="pooling",
        hf_overrides={"architectures": [f"LlmRec{architecture}"]},
        pooler_config={"task": "embed", "seq_pooling_type": "LAST"},
        distributed_executor_backend="uni",
    )
    found = engine.encode(
        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts],
        [PoolingParams(task="embed", extra_kwargs=SearchParameters(K, K, sorted(set(rows))).pack()) for rows in seen],
        pooling_task="embed",
        use_tqdm=False,
    )
    tables = [output.outputs.data.double() for output in found]  # (K, 2): catalog rows, -1 for none, and scores
    engine.llm_engine.engine_core.shutdown()
    del engine
    cleanup_dist_env_and_memory()
    items = [[int(row) for row in table[:, 0] if row >= 0] for table in tables]
    return items, [table[: len(rows), 1].tolist() for table, rows in zip(tables, items, strict=True)]


if __name__ == "__main__":
    main()

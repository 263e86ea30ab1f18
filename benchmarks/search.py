"""How fast a catalog-constrained beam search is: in the engine, in transformers, and by the means that both ship with.

    python benchmarks/search.py [--prompts 32] [--beams 20] [--items 2000] [--quick] [--json FILE]

Four ways to the same question, on one random Llama of 1.0 M parameters, in one run, on the same prompts:

* engine:      the search inside one vLLM engine step (llmrec.engine), through LLM.encode
* decode:      llmrec.decoding with transformers
* generate:    transformers' generate(num_beams, prefix_allowed_tokens_fn), the usual way to constrain it
* beam_search: vLLM's own LLM.beam_search, which knows no catalog (so it does less)

The first three find the same items; the script checks that they do. Each is run once to warm up and then --repeats
times; the median counts. beam_search gets fewer prompts, because it is slow; all figures are per prompt.

--quick takes 8 prompts, 2 for generate, and one repeat. It leaves beam_search out, which would need a second start of
vLLM, about half a minute on two cores; the result's `left_out` says so.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
LEVELS = 4


def seconds(run: Callable[[], Any], repeats: int) -> float:
    run()
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, help="Default 32; 8 with --quick.")
    parser.add_argument(
        "--slow-prompts", type=int, help="Prompts for generate and beam_search; default 4, 2 with --quick."
    )
    parser.add_argument("--beams", type=int, default=20)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--history", type=int, default=16, help="Items in every history.")
    parser.add_argument("--repeats", type=int, help="Default 3; 1 with --quick.")
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    usual = {"prompts": (32, 8), "slow_prompts": (4, 2), "repeats": (3, 1)}
    for name, (full, quick) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)

    os.environ |= {
        "VLLM_PLUGINS": "llmrec",
        "LLMREC_ARCHITECTURES": "LlamaForCausalLM",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import numpy as np
    import torch
    from factories import random_recommender

    from llmrec.beam import TrieTensors
    from llmrec.decoding import decode

    before = environment()
    recommender = random_recommender(
        0,
        "llama",
        options.items,
        (256,) * LEVELS,
        dtype=torch.float32,
        max_history=64,
        max_positions=512,
        hidden_size=256,
    )
    model, catalog = recommender.model, recommender.catalog
    rng = np.random.default_rng(0)
    prompts = [
        recommender.encoder.encode(rng.integers(0, options.items, options.history).tolist())
        for _ in range(options.prompts)
    ]
    trie = TrieTensors(catalog.trie, catalog.require_tokens())
    slow = prompts[: options.slow_prompts]
    found = decode(model, prompts, trie, options.beams)

    allowed: dict[tuple[int, ...], list[int]] = {}
    for row in catalog.item_tokens.tolist():
        for level in range(LEVELS):
            allowed.setdefault(tuple(row[:level]), []).append(row[level])
    allowed = {prefix: sorted(set(tokens)) for prefix, tokens in allowed.items()}

    def generate() -> torch.Tensor:
        ids = torch.tensor(slow)  # every history has the same length
        start = ids.shape[1]
        return model.generate(  # type: ignore[no-any-return]
            ids,
            attention_mask=torch.ones_like(ids),
            num_beams=options.beams,
            num_return_sequences=options.beams,
            max_new_tokens=LEVELS,
            min_new_tokens=LEVELS,
            do_sample=False,
            length_penalty=0.0,
            eos_token_id=None,
            prefix_allowed_tokens_fn=lambda _, sequence: allowed[tuple(sequence[start:].tolist())],
        )[:, start:]

    row_of = {tuple(row): place for place, row in enumerate(catalog.item_tokens.tolist())}
    generated = [row_of[tuple(tokens)] for tokens in generate().tolist()]
    same = found.items[: len(slow)].flatten().tolist()
    agree = {"generate": float(np.mean([a == b for a, b in zip(generated, same, strict=True)]))}
    per_prompt = {
        "decode": seconds(lambda: decode(model, prompts, trie, options.beams), options.repeats) / len(prompts),
        "generate": seconds(generate, options.repeats) / len(slow),
    }

    from vllm import LLM, PoolingParams, TokensPrompt
    from vllm.sampling_params import BeamSearchParams

    from llmrec.engine.request import SearchParameters

    with tempfile.TemporaryDirectory() as folder:
        recommender.save_pretrained(Path(folder) / "artefact")
        common: dict[str, Any] = {
            "model": str(Path(folder) / "artefact"),
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_num_seqs": options.prompts,
            "enable_prefix_caching": False,
        }
        engine = LLM(
            **common, runner="pooling", hf_overrides={"architectures": ["LlmRecLlamaForCausalLM"]},
            pooler_config={"task": "embed", "seq_pooling_type": "LAST"},
        )  # fmt: skip
        parameters = PoolingParams(task="embed", extra_kwargs=SearchParameters(options.beams, options.beams).pack())
        tokens = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]

        def encode() -> list[Any]:
            return engine.encode(tokens, parameters, pooling_task="embed", use_tqdm=False)  # type: ignore[no-any-return]

        served = [output.outputs.data[:, 0].long().tolist() for output in encode()]
        agree["engine"] = float(np.mean(np.array(served) == found.items.numpy()))
        per_prompt["engine"] = seconds(encode, options.repeats) / len(prompts)
        engine.llm_engine.engine_core.shutdown()

        if not options.quick:
            stock = LLM(**common, max_logprobs=2 * options.beams)
            beams = BeamSearchParams(beam_width=options.beams, max_tokens=LEVELS, ignore_eos=True)
            per_prompt["beam_search"] = seconds(
                lambda: stock.beam_search([TokensPrompt(prompt_token_ids=prompt) for prompt in slow], beams),
                options.repeats,
            ) / len(slow)

    asked = {name: value for name, value in vars(options).items() if name not in ("quick", "json")}
    result: dict[str, Any] = {
        "options": asked | {"levels": LEVELS, "parameters": model.num_parameters()},
        "milliseconds_per_prompt": {name: round(1000 * value, 2) for name, value in per_prompt.items()},
        "times_faster_than": {
            rival: {name: round(per_prompt[rival] / per_prompt[name], 1) for name in ("engine", "decode")}
            for rival in ("generate", "beam_search")
            if rival in per_prompt
        },
        "beams_equal_to_decode": agree,
    }
    if options.quick:
        result["left_out"] = {"beam_search": "--quick: it needs a second start of vLLM"}
    ratios = {
        f"{name} over {rival}": times
        for rival, faster in result["times_faster_than"].items()
        for name, times in faster.items()
    }
    for path in report("search", result, ratios, before, options):
        print(path)
    for rival, faster in result["times_faster_than"].items():
        print(f"{rival}: engine {faster['engine']} x, decode {faster['decode']} x faster")


if __name__ == "__main__":
    main()

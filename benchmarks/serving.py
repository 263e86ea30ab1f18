"""How fast constrained beam search is served: inside one vLLM engine step, and by the means that others ship with.

    python benchmarks/serving.py [--widths 10 20 50 128 512] [--concurrency 1 8 32] [--catalogs 10000 … 10000000]
    python benchmarks/serving.py --quick --json OUT

Four ways to the same question, on one random Llama, the same prompts and machine, in one run:

* engine:      the search inside one engine step (llmrec.engine), through vLLM's asynchronous engine
* decode:      llmrec.decoding with transformers
* generate:    transformers' generate(num_beams, prefix_allowed_tokens_fn), the usual way to constrain it
* beam_search: vLLM's own LLM.beam_search, which knows no catalog (so it does less)

At a concurrency of c the engine answers c clients that each send their next request when they have an answer, and a
latency is a request's own. The other three are given c prompts at once, and every prompt's latency is the batch's.
All are run once to warm up. The slow ones are measured up to --slow-widths and --slow-concurrency, because they take
minutes beyond; ratios are those of throughputs at the same width and concurrency. Prompts come again, and vLLM's
prefix cache is on for both of its ways, as it is by default.

Answers are checked as they come: `invalid_rate` is the share of answered rows that are no item of the catalog or were
excluded, `duplicate_rate` that of rows given twice, `agree` that of places with decode's item. Catalogs of other sizes
have the same tokens and levels and are mapped by the one engine, as a living catalog's versions are; their search is
compared with that of the smallest. `one_request` says where the time of a request goes that is alone: outside the
search (the prompt's prefill, the engine's way there and back), and in each of its levels, of which the choice among
the catalog's continuations is a part.
"""

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
if TYPE_CHECKING:
    from llmrec.engine.request import Found
    from llmrec.engine.vllm_engine import VLLMEngine

LEVELS, CODEBOOK, SEEN = 4, 256, 16


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", help="Default 10 20 50 128 512; 20 50 with --quick.")
    parser.add_argument("--concurrency", type=int, nargs="+", help="Default 1 8 32; 1 8 with --quick.")
    parser.add_argument("--catalogs", type=int, nargs="+", help="Default 10^4 to 10^7; 10^4 and 10^5 with --quick.")
    parser.add_argument("--requests", type=int, help="Of every client; default 6, 3 with --quick.")
    parser.add_argument("--slow-widths", type=int, nargs="+", help="Default 10 20 50 128; 50 with --quick.")
    parser.add_argument("--slow-concurrency", type=int, nargs="+", help="Default 1 8 32; 8 with --quick.")
    parser.add_argument(
        "--stock-widths", type=int, nargs="+", help="For beam_search; default 10 20 50; 50 if --quick."
    )
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--history", type=int, default=SEEN, help="Items in every history, of four tokens each.")
    from environment import add_flags

    add_flags(parser)
    options = parser.parse_args()
    usual: dict[str, tuple[Any, Any]] = {
        "widths": ([10, 20, 50, 128, 512], [20, 50]),
        "concurrency": ([1, 8, 32], [1, 8]),
        "catalogs": ([10**4, 10**5, 10**6, 10**7], [10**4, 10**5]),
        "requests": (6, 3),
        "slow_widths": ([10, 20, 50, 128], [50]),
        "slow_concurrency": ([1, 8, 32], [8]),
        "stock_widths": ([10, 20, 50], [50]),
    }
    for name, (full, quick) in usual.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    return options


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds; the p99 of few is their greatest."""
    ordered = sorted(seconds)
    last = ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]
    return {"p50_ms": round(1e3 * statistics.median(ordered), 2), "p99_ms": round(1e3 * last, 2)}


def batches(run: Callable[[int], Any], concurrency: int, repeats: int) -> dict[str, float]:
    """Throughput and latencies of a way that answers so many prompts at once."""
    run(concurrency)
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        run(concurrency)
        times.append(time.perf_counter() - begin)
    return {"per_second": round(concurrency / statistics.median(times), 3), **percentiles(times)}


class Answers:
    """Counts what is wrong with answered rows."""

    def __init__(self) -> None:
        self.rows = self.invalid = self.twice = 0

    def add(self, rows: Sequence[int], items: int, excluded: Iterable[int]) -> None:
        self.rows += len(rows)
        gone = set(excluded)
        self.invalid += sum(1 for row in rows if not 0 <= row < items or row in gone)
        self.twice += len(rows) - len(set(rows))


async def clients(
    engine: "VLLMEngine", prompts: Sequence[list[int]], excluded: Sequence[list[int]], answers: Answers, items: int,
    width: int, concurrency: int, requests: int, index: str,
) -> tuple[dict[str, Any], dict[int, "Found"]]:  # fmt: skip
    """So many closed-loop clients; returns figures, and what was found for each prompt."""
    from llmrec.engine.request import SearchParameters

    found: dict[int, Found] = {}
    times: list[float] = []
    searching: list[float] = []

    async def client(first: int, rounds: int, timed: bool) -> None:
        for turn in range(rounds):
            place = (first + turn * concurrency) % len(prompts)
            asked = SearchParameters(k=width, num_beams=width, index=index, excluded=excluded[place])
            begin = time.perf_counter()
            result = await engine.search(prompts[place], asked)
            if timed:
                times.append(time.perf_counter() - begin)
                searching.append(result.seconds)
                answers.add(result.rows, items, excluded[place])
                found[place] = result

    await asyncio.gather(*(client(first, 1, False) for first in range(concurrency)))
    begin = time.perf_counter()
    await asyncio.gather(*(client(first, requests, True) for first in range(concurrency)))
    elapsed = time.perf_counter() - begin
    figures = {"per_second": round(len(times) / elapsed, 3), **percentiles(times)}
    return figures | {"search_ms": round(1e3 * statistics.median(searching), 2)}, found


def select_seconds(path: Path, width: int, vocabulary: int) -> float:
    """One level's choice among the catalog's continuations, on random scores: a search whose model costs nothing."""
    import torch

    from llmrec.beam import beam_search
    from llmrec.trie_tensors import TrieTensors

    trie = TrieTensors.map(path)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn((1, width, vocabulary), generator=generator)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        beam_search(logits[:, 0], lambda tokens, _: logits[:, : tokens.shape[1]], trie, width)
        times.append(time.perf_counter() - begin)
    return statistics.median(times) / LEVELS


def write_index(path: Path, size: int, token_ids: Sequence[Any]) -> None:
    """The mapped trie of `size` items with random codes."""
    import numpy as np

    from llmrec.trie import CatalogTrie
    from llmrec.trie_tensors import TrieTensors

    rng = np.random.default_rng(size)
    flat = np.unique(rng.integers(0, CODEBOOK**LEVELS, size=size + size // 8 + 1000))
    flat = rng.permutation(flat)[:size]
    codes = np.stack([flat // CODEBOOK**level % CODEBOOK for level in range(LEVELS)], axis=1).astype(np.uint8)
    TrieTensors(CatalogTrie(codes), token_ids).save(path)


def main() -> None:
    options = arguments()
    os.environ |= {
        "VLLM_PLUGINS": "llmrec",
        "LLMREC_ARCHITECTURES": "LlamaForCausalLM",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
    }
    import numpy as np
    import torch
    from environment import environment, report
    from factories import random_recommender

    from llmrec.decoding import decode
    from llmrec.trie_tensors import TrieTensors

    before = environment()
    items = min(options.catalogs)
    recommender = random_recommender(
        0, "llama", items, (CODEBOOK,) * LEVELS,
        dtype=torch.float32, max_history=64, max_positions=512, hidden_size=options.hidden_size,
    )  # fmt: skip
    model, catalog = recommender.model, recommender.catalog
    rng = np.random.default_rng(0)
    histories = rng.integers(0, items, (64, options.history)).tolist()
    prompts = [recommender.encoder.encode(rows) for rows in histories]
    excluded = [sorted(set(rows)) for rows in histories]
    trie = TrieTensors.of(catalog)
    measured: dict[str, dict[str, dict[str, Any]]] = {}
    answers = Answers()

    def put(way: str, width: int, concurrency: int, figures: dict[str, Any]) -> None:
        measured.setdefault(way, {})[f"W={width} c={concurrency}"] = figures
        print(f"{way:12} W={width:<4} c={concurrency:<3} {figures}", file=sys.stderr, flush=True)

    gone = [np.array(rows) for rows in excluded]
    reference = {width: decode(model, prompts[:8], trie, width, gone[:8]).items.tolist() for width in options.widths}
    for width in options.widths:
        for concurrency in options.concurrency:
            put("decode", width, concurrency, batches(
                lambda n, w=width: decode(model, prompts[:n], trie, w, gone[:n]), concurrency, 2
            ))  # fmt: skip
    allowed: dict[tuple[int, ...], list[int]] = {}
    for row in catalog.item_tokens.tolist():
        for level in range(LEVELS):
            allowed.setdefault(tuple(row[:level]), []).append(row[level])
    allowed = {prefix: sorted(set(tokens)) for prefix, tokens in allowed.items()}

    def generate(number: int, width: int) -> Any:
        ids = torch.tensor(prompts[:number])  # every history has the same length
        start = ids.shape[1]
        return model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width,
            max_new_tokens=LEVELS, min_new_tokens=LEVELS, do_sample=False, length_penalty=0.0, eos_token_id=None,
            prefix_allowed_tokens_fn=lambda _, sequence: allowed[tuple(sequence[start:].tolist())],
        )  # fmt: skip

    slow = [(w, c) for w in options.slow_widths for c in options.slow_concurrency]
    for width, concurrency in slow:
        put("generate", width, concurrency, batches(lambda n, w=width: generate(n, w), concurrency, 1))

    with tempfile.TemporaryDirectory() as folder:
        recommender.save_pretrained(Path(folder) / "artefact")
        indexes = Path(folder) / "indexes"
        indexes.mkdir()
        trie.save(indexes / f"{items}.trie")
        for size in options.catalogs:
            if size != items:
                write_index(indexes / f"{size}.trie", size, catalog.require_tokens())
        os.environ["LLMREC_INDEX_FOLDER"] = str(indexes)
        common: dict[str, Any] = {
            "model": str(Path(folder) / "artefact"),
            "dtype": "float32",
            "enforce_eager": True,
            "block_size": 32,
            "max_num_seqs": 64,
            "enable_prefix_caching": True,
        }
        agree, sizes = asyncio.run(_engine(common, options, prompts, excluded, answers, reference, items, put))
        words = len(recommender.tokenizer)
        select = {
            str(size): {
                str(width): round(1e3 * select_seconds(indexes / f"{size}.trie", width, words), 3)
                for width in options.widths
            }
            for size in options.catalogs
        }
        from vllm import LLM, TokensPrompt
        from vllm.sampling_params import BeamSearchParams

        stock = LLM(**common, max_logprobs=2 * max(options.stock_widths))
        for width in options.stock_widths:
            beams = BeamSearchParams(beam_width=width, max_tokens=LEVELS, ignore_eos=True)
            for concurrency in options.slow_concurrency:
                put("beam_search", width, concurrency, batches(
                    lambda n, b=beams: stock.beam_search(
                        [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts[:n]], b
                    ),
                    concurrency, 1,
                ))  # fmt: skip

    def ratio(rival: str) -> dict[str, float]:
        return {
            key: round(measured["engine"][key]["per_second"] / figures["per_second"], 1)
            for key, figures in measured.get(rival, {}).items()
            if key in measured["engine"]
        }

    by_cell = {
        "vs_vllm_beam_search": ratio("beam_search"),
        "vs_transformers_generate": ratio("generate"),
        "vs_decode": ratio("decode"),
    }
    # Under load at the width that the goals name, or the nearest that was measured.
    goal = f"W=50 c={max(options.slow_concurrency)}"
    ratios = {name: cells.get(goal, next(iter(cells.values()))) for name, cells in by_cell.items() if cells}
    largest, smallest = str(max(options.catalogs)), str(items)
    if largest != smallest:
        ratios["largest_catalog_vs_smallest"] = round(sizes[largest]["p50_ms"] / sizes[smallest]["p50_ms"], 2)
    asked = {name: value for name, value in vars(options).items() if name not in ("quick", "json")}
    result: dict[str, Any] = {
        "options": asked | {"levels": LEVELS, "codebook": CODEBOOK, "parameters": model.num_parameters()},
        "ratios": ratios,
        "ratios_at": goal,
        "ratios_by_cell": by_cell,
        "invalid_rate": answers.invalid / max(1, answers.rows),
        "duplicate_rate": answers.twice / max(1, answers.rows),
        "rows_checked": answers.rows,
        "agree": agree,
        "measured": measured,
        "catalogs": sizes,
        "select_ms_per_level": select,
        "one_request": {
            str(width): _where_time_goes(measured["engine"][f"W={width} c={min(options.concurrency)}"], select, width)
            for width in options.widths
        },
    }
    for path in report("serving", result, ratios, before, options):
        print(path)
    for name, value in ratios.items():
        print(f"{name}: {value} x")
    print(f"invalid {result['invalid_rate']:.4f}, duplicate {result['duplicate_rate']:.4f} of {answers.rows} rows")


def _where_time_goes(figures: dict[str, Any], select: dict[str, dict[str, float]], width: int) -> dict[str, float]:
    """Milliseconds of one request: outside the search (HTTP is not in it), and per level of the search."""
    return {
        "latency_ms": figures["p50_ms"],
        "prefill_and_engine_ms": round(figures["p50_ms"] - figures["search_ms"], 2),
        "search_ms_per_level": round(figures["search_ms"] / LEVELS, 3),
        "of_it_select_ms": next(iter(select.values()))[str(width)],
    }


async def _engine(
    common: dict[str, Any], options: argparse.Namespace, prompts: Sequence[list[int]],
    excluded: Sequence[list[int]], answers: Answers, reference: dict[int, list[list[int]]], items: int,
    put: Callable[[str, int, int, dict[str, Any]], None],
) -> tuple[float, dict[str, Any]]:  # fmt: skip
    """All of the engine's figures: by width and concurrency, and by the size of the catalog."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    from llmrec.engine.vllm_engine import VLLMEngine

    client = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            **common,
            runner="pooling",
            hf_overrides={"architectures": ["LlmRecLlamaForCausalLM"]},
            pooler_config={"task": "embed", "seq_pooling_type": "LAST"},
        )
    )
    try:
        engine = VLLMEngine(client, {})
        same = places = 0
        for width in options.widths:
            for concurrency in options.concurrency:
                figures, found = await clients(
                    engine, prompts, excluded, answers, items, width, concurrency, options.requests, f"{items}.trie"
                )
                put("engine", width, concurrency, figures)
                for place, wanted in enumerate(reference[width]):
                    if place in found:
                        same += sum(a == b for a, b in zip(found[place].rows, wanted, strict=False))
                        places += len(wanted)
        sizes: dict[str, Any] = {}
        concurrency = max(options.slow_concurrency)
        for size in options.catalogs:
            figures, _ = await clients(
                engine, prompts, excluded, answers, size, 50, concurrency, options.requests, f"{size}.trie"
            )
            sizes[str(size)] = figures
            print(f"catalog {size}: {figures}", file=sys.stderr, flush=True)
        return same / max(1, places), sizes
    finally:
        client.shutdown()


if __name__ == "__main__":
    main()

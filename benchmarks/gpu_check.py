"""Everything of llmrec's that runs on a GPU without vLLM: checked against its definition, and timed. In minutes.

    python benchmarks/gpu_check.py [--quick] [--json FILE]

Needs torch, triton, transformers, numpy, safetensors and pytest, and the checkout; the package need not be installed.
It prints one JSON object: per check whether it held and its figures, and ends with 1 if one did not hold, with 2
without a GPU.

* kernels:    tests/kernels/in_triton.py: selection to the bit, normalisers, attention in two parts; and
              in_triton_hstu.py: HSTU's attention and its gradients, which benchmarks/hstu.py times
* selection:  benchmarks/selection.py on 10^5 and, without --quick, 2*10^7 items, beside STATIC's way and the goal
* tiles:      the selection's milliseconds by the kernels' tile and merge sizes: what the constants should be
* normalizer: log sum exp over the vocabulary, beside torch's, and the bytes it reads a second
* attention:  the beams' own part joined to the prompt's in one launch, beside torch's operations
* graphs:     a whole search recorded once and replayed on other logits, beside running it, to the bit
* waits:      the same search with torch told to raise an error where the host would wait for the device
"""

import argparse
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TIMED = 20


def kernels(quick: bool) -> dict[str, Any]:
    paths = [str(ROOT / "tests" / "kernels" / name) for name in ("in_triton.py", "in_triton_hstu.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-c", "/dev/null", "-p", "no:cacheprovider", "-W", "ignore"]
    chosen = ["-k", "not compile"]  # they are, to be run
    done = subprocess.run([*command, *chosen, *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    tail = done.stdout.strip().splitlines()[-1:]
    return {"held": done.returncode == 0, "summary": tail, "output": (done.stdout + done.stderr)[-3000:]}


def selection(quick: bool) -> dict[str, Any]:
    from selection import CATALOGS, GOAL_MS, measure

    names = [*CATALOGS][:1] if quick else [*CATALOGS][:: len(CATALOGS) - 1]
    found = {name: measure(name, "cuda", 7, ways=("static",)) for name in names}
    goal = found[names[-1]]["milliseconds_per_level"]["padded"]
    return {
        "held": all(all(one["agree"].values()) for one in found.values()),
        "goal_milliseconds": GOAL_MS,
        "goal_reached": goal <= GOAL_MS,
        "catalogs": found,
    }


def tiles(quick: bool) -> dict[str, Any]:
    from selection import CATALOGS, REQUESTS, WIDTH, RandomTrie, milliseconds, padded_search, recorded

    from llmrec.kernels import select_kernels
    from llmrec.kernels.static_search import StaticSearch

    items, levels, size = next(iter(CATALOGS.values())) if quick else (1_000_000, 3, 2048)
    trie: Any = RandomTrie(items, levels, size, 0, "cuda")
    search = StaticSearch(trie, WIDTH)
    before = [1, *search.widths[:-1]]
    logits = [torch.randn(REQUESTS, number, trie.num_tokens, device="cuda") for number in before]
    usual, times = (select_kernels.TILE, select_kernels.MERGE), {}
    expected = padded_search(search, logits)().clone()
    same = True
    try:
        for pair in ((512, 1024), (512, 2048), (1024, 2048), (1024, 4096), (2048, 2048), (2048, 4096)):
            select_kernels.TILE, select_kernels.MERGE = pair
            run = recorded(padded_search(search, logits))
            same &= torch.equal(run(), expected)
            times[str(pair)] = milliseconds(run, TIMED // 2, "cuda") / levels
    finally:
        select_kernels.TILE, select_kernels.MERGE = usual
    return {"held": same, "usual": usual, "milliseconds_per_level": times}


def normalizer(quick: bool) -> dict[str, Any]:
    from selection import milliseconds, recorded

    from llmrec.kernels import select_kernels

    found: dict[str, Any] = {"held": True}
    for shape in ((2, 70, 32_768), (2, 70, 151_936), (8, 256, 151_936))[: 2 if quick else 3]:
        logits = (torch.randn(shape, device="cuda") * 4).bfloat16()
        exact = logits.double().logsumexp(-1)
        ours, theirs = select_kernels.normalizer(logits), logits.float().logsumexp(-1)
        error, error_of_torch = ((value.double() - exact).abs().max().item() for value in (ours, theirs))
        by_kernel = milliseconds(recorded(lambda x=logits: select_kernels.normalizer(x)), TIMED, "cuda")
        by_torch = milliseconds(recorded(lambda x=logits: x.float().logsumexp(-1)), TIMED, "cuda")
        found["held"] &= error < 1e-4
        found[str(shape)] = {
            "milliseconds": by_kernel,
            "milliseconds_of_torch": by_torch,
            "gigabytes_per_second": logits.nbytes / by_kernel / 1e6,
            "error": error,
            "error_of_torch": error_of_torch,
        }
    return found


def attention(quick: bool) -> dict[str, Any]:
    from selection import milliseconds, recorded

    from llmrec.kernels import attention_kernels, beam_attention

    found: dict[str, Any] = {"held": True}
    for requests, beams in ((2, 70), (8, 256))[: 1 if quick else 2]:
        kv_heads, group, width, steps = 8, 4, 128, 3
        query = torch.randn(requests, beams, kv_heads * group, width, device="cuda", dtype=torch.bfloat16)
        own = torch.randn(2, steps, requests, beams, kv_heads, width, device="cuda", dtype=torch.bfloat16)
        ancestors = torch.randint(0, beams, (steps, requests, beams), device="cuda")
        output = torch.randn(requests, kv_heads, beams * group, width, device="cuda", dtype=torch.bfloat16)
        prompt = output, torch.randn(requests, kv_heads, beams * group, device="cuda") * 3
        given = (query, own[0], own[1], ancestors, prompt, width**-0.5)
        exact = beam_attention.attend(
            *(part.double() for part in given[:3]), ancestors, (output.double(), prompt[1].double()), given[5]
        )
        ours = attention_kernels.attend(*given)
        error = (ours.double() - exact).abs().max().item()
        found["held"] &= error < 0.02  # the output is rounded to bfloat16
        found[str((requests, beams))] = {
            "milliseconds": milliseconds(recorded(lambda g=given: attention_kernels.attend(*g)), TIMED, "cuda"),
            "milliseconds_of_torch": milliseconds(recorded(lambda g=given: by_torch(*g)), TIMED, "cuda"),
            "error": error,
        }
    return found


def by_torch(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    ancestors: torch.Tensor,
    prompt: tuple[torch.Tensor, torch.Tensor],
    scale: float,
) -> torch.Tensor:
    """What `attend` does where there is no kernel."""
    from llmrec.kernels.beam_attention import merge, suffix_attention

    own = suffix_attention(query, keys, values, ancestors, scale)
    before = (part.unflatten(2, (query.shape[1], -1)).transpose(1, 2).flatten(2, 3) for part in prompt)
    return merge(*before, *own)[0].to(query.dtype)


def a_search(quick: bool) -> tuple[Any, Callable[[Any], tuple[torch.Tensor, ...]], list[torch.Tensor]]:
    """A static search whose model is a table of logits by the newest token, as work on tensors, and some tables."""
    from selection import RandomTrie

    from llmrec.kernels.static_search import StaticSearch

    trie: Any = RandomTrie(20_000 if quick else 200_000, 3, 256, 0, "cuda")
    trie.vocabulary = None
    search = StaticSearch(trie, 70)
    tables = [torch.randn(3, 2, trie.num_tokens, trie.num_tokens, device="cuda") for _ in range(3)]

    def work(given: Any) -> tuple[torch.Tensor, ...]:
        level = 0

        def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
            nonlocal level
            level += 1
            return given["tables"][level].gather(1, tokens.unsqueeze(-1).expand(-1, -1, trie.num_tokens))

        return tuple(search.run(given["tables"][0, :, 0], step))

    return trie, work, tables


def graphs(quick: bool) -> dict[str, Any]:
    from selection import milliseconds

    from llmrec.beam import beam_search
    from llmrec.engine.beam_graphs import BeamGraphs

    trie, work, tables = a_search(quick)
    kept, same, exact = BeamGraphs(), True, True
    for table in tables:
        given = {"tables": table}
        found, expected = kept.run("search", work, given), work(given)
        same &= all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        following = iter(table[1:])

        def step(tokens: torch.Tensor, parents: torch.Tensor, following: Any = following) -> torch.Tensor:
            return next(following).gather(1, tokens.unsqueeze(-1).expand(-1, -1, trie.num_tokens))

        ragged = beam_search(table[0, :, 0], step, trie, 70)
        # Normalisers differ in their last bits, so near-ties may swap places; the scores may not differ.
        exact &= bool(torch.allclose(ragged.scores, expected[1], atol=1e-4))
    return {
        "held": same and exact,
        "milliseconds_recorded": milliseconds(lambda: kept.run("search", work, {"tables": tables[0]}), TIMED, "cuda"),
        "milliseconds_run": milliseconds(lambda: work({"tables": tables[0]}), TIMED, "cuda"),
    }


def waits(quick: bool) -> dict[str, Any]:
    _, work, tables = a_search(quick)
    work({"tables": tables[0]})
    torch.cuda.set_sync_debug_mode("error")
    try:
        work({"tables": tables[1]})
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return {"held": True}


CHECKS = (kernels, selection, tiles, normalizer, attention, graphs, waits)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Small catalogs: a minute.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="Write the result here too.")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no GPU. Run this on a machine that has one.", file=sys.stderr)
        return 2
    import triton

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "checks": {},
    }
    for check in CHECKS:
        begin = time.perf_counter()
        try:
            found = check(options.quick)
        except Exception:
            found = {"held": False, "error": traceback.format_exc()[-3000:]}
        result["checks"][check.__name__] = {"seconds": round(time.perf_counter() - begin, 1), **found}
        print(f"{check.__name__}: {'held' if found['held'] else 'FAILED'}", file=sys.stderr, flush=True)
    result["held"] = all(found["held"] for found in result["checks"].values())
    text = json.dumps(result, indent=2, default=str)
    print(text)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(text + "\n", encoding="utf-8")
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())

"""What constraints cost a search, from 10^4 to 10^7 items: seen items, lists, filters; and what post-filtering loses.

    python benchmarks/constraints.py [--sizes 10000 ... 10000000] [--quick] [--json FILE]

Catalogs are random: four levels of 256 codes, every code equally likely, no two items alike. A batch is 8 requests of
50 beams, and the "model" answers each step with logits drawn beforehand, so that what is timed is the search itself:
selection on four levels, and whatever a request has to prepare. Filters keep items at random, which is their worst
case: an attribute that goes with the codes leaves fewer nodes.

* none:             no constraint
* seen 100:         100 items of each request's own are excluded
* deny 1000:        1000 items of each request's own are excluded
* allow 1000:       only 1000 items of each request's own; the part of the trie is built within the time
* keep S, built:    a filter keeps the share S of the items, for the whole batch; its part is built within the time
* keep S, mapped:   the same part, saved once and mapped by an engine: only the search is timed
* keep S, after:    the rival: a search of ten times as many beams without the filter, whose results are filtered. A
                    real model would run ten times the beams too, which is not timed here. It returns too few where
                    the filter keeps little, and what it returns need not be the best.

All ways but the last are exact: they return min(50, items left) items that the constraint lets pass, which is checked.
Times are processor seconds of one thread, medians of --repeats, and given as ratios to "none" of the same catalog.
`found` is how many of the 50 items a request gets on average.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from environment import add_flags, environment, report
from trie import LEVELS, SIZE, synthesise

BATCH, BEAMS, OVER_FETCH = 8, 50, 10
SHARES = {"50%": 0.5, "1%": 0.01, "0.01%": 0.0001}


def timed(run: Callable[[], Any], repeats: int) -> float:
    """The median processor milliseconds of run()."""
    run()
    times = []
    for _ in range(repeats):
        begin = time.process_time()
        run()
        times.append(1000 * (time.process_time() - begin))
    return statistics.median(times)


def measure(size: int, folder: Path, repeats: int) -> dict[str, dict[str, Any]]:
    """Milliseconds per batch and level of every way, how many items they find, and what preparing takes."""
    import torch

    from llmrec.beam import TrieTensors, beam_search
    from llmrec.trie import CatalogTrie

    torch.set_num_threads(1)
    synthesise(size, folder)
    codes = np.load(folder / "codes.npy", mmap_mode="r")
    built = TrieTensors(CatalogTrie(codes), [np.arange(SIZE) + SIZE * level for level in range(LEVELS)])
    built.save(folder / "index.safetensors")
    milliseconds: dict[str, Any] = {"map": timed(lambda: TrieTensors.map(folder / "index.safetensors"), repeats)}
    trie = TrieTensors.map(folder / "index.safetensors")
    rng = np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    first = torch.randn((BATCH, LEVELS * SIZE), generator=generator)
    later = torch.randn((LEVELS, BATCH, OVER_FETCH * BEAMS, LEVELS * SIZE), generator=generator)

    def search(tries: Any, beams: int = BEAMS, excluded: Any = None) -> Any:
        steps = iter(later)
        return beam_search(first, lambda tokens, _: next(steps)[:, : tokens.shape[1]], tries, beams, excluded)

    def built_and_searched(rows: Any) -> Any:
        return search(trie.subset(rows))

    def way(name: str, run: Callable[[], Any], passes: list[Any], exact: bool = True) -> None:
        """Times a way and counts what it finds; `passes` are the rows that each request may get."""
        found = [[row for row in rows if row >= 0] for rows in run().items.tolist()]
        good = [
            len(rows) if allowed is None else int(np.isin(rows, allowed).sum())
            for rows, allowed in zip(found, passes, strict=True)
        ]
        if exact:
            assert good == [len(rows) for rows in found], f"{name} returns what the constraint forbids"
            left = [size if allowed is None else len(allowed) for allowed in passes]
            assert good == [min(BEAMS, count) for count in left], f"{name} returns too few of {size} items"
        result[name] = {"milliseconds": timed(run, repeats) / LEVELS, "found": float(np.minimum(good, BEAMS).mean())}

    result: dict[str, dict[str, float]] = {}
    way("none", lambda: search(trie), [None] * BATCH)
    for name, count in {"seen 100": 100, "deny 1000": 1000}.items():
        lists = [rng.integers(0, size, count) for _ in range(BATCH)]
        left = [np.setdiff1d(np.arange(size), rows) if size <= 10**5 else None for rows in lists]
        way(name, partial(search, trie, excluded=lists), left)
    lists = [rng.choice(size, 1000, replace=False) for _ in range(BATCH)]
    way("allow 1000", lambda: search([trie.subset(rows) for rows in lists]), lists)
    for name, share in SHARES.items():
        rows = np.sort(rng.choice(size, max(1, round(share * size)), replace=False))
        trie.subset(rows).save(folder / "part.safetensors")
        part = TrieTensors.map(folder / "part.safetensors")
        milliseconds[f"build, keep {name}"] = timed(partial(trie.subset, rows), repeats)
        milliseconds[f"map, keep {name}"] = timed(lambda: TrieTensors.map(folder / "part.safetensors"), repeats)
        kept = [rows] * BATCH
        way(f"keep {name}, built", partial(built_and_searched, rows), kept)
        way(f"keep {name}, mapped", partial(search, part), kept)
        way(f"keep {name}, after", partial(search, trie, OVER_FETCH * BEAMS), kept, exact=False)
    return {"ways": result, "prepare": milliseconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="Numbers of items; default 10^4 to 10^7.")
    parser.add_argument("--repeats", type=int, help="Default 7; 3 with --quick.")
    add_flags(parser)
    options = parser.parse_args()
    sizes = sorted(options.sizes or [10**power for power in range(4, 6 if options.quick else 8)])
    repeats = options.repeats or (3 if options.quick else 7)
    before = environment()
    measured: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            found = measured[str(size)] = measure(size, Path(folder), repeats)
        ways, none = found["ways"], found["ways"]["none"]["milliseconds"]
        print(f"{size:>10,} items: {none:.2f} ms per level and batch of {BATCH} without a constraint")
        for name, one in ways.items():
            ratio = one["milliseconds"] / none
            print(f"{'':10} {name:20} {ratio:8.2f} times that, {one['found']:5.1f} of {BEAMS} items")
            ratios[f"{name} over none at {size}"] = ratio
        for name, value in found["prepare"].items():
            print(f"{'':10} {name:20} {value:8.2f} ms")
        ratios[f"found after 1% filter at {size}"] = ways["keep 1%, after"]["found"] / BEAMS
    first, last = (measured[str(size)]["ways"]["none"]["milliseconds"] for size in (sizes[0], sizes[-1]))
    ratios[f"none at {sizes[-1]} over none at {sizes[0]}"] = last / first
    settings = {"levels": LEVELS, "codebook": SIZE, "batch": BATCH, "beams": BEAMS, "over_fetch": OVER_FETCH}
    result = {"sizes": sizes, "repeats": repeats, **settings, "measured": measured}
    for path in report("constraints", result, ratios, before, options):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()

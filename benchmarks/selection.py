"""How long it takes to find out which tokens may follow and to keep the best beams, by five ways, from 10^5 items on.

    python benchmarks/selection.py [--catalogs NAME ...] [--quick] [--json FILE]

Everything but the model: a search's levels one after the other, on logits that are drawn beforehand, and each way's
time for all of them, divided by their number. No way computes the logarithm of the softmax's sum, which is the same
for all: it is taken to be the logit of token 0.

* ragged:       llmrec.beam.beam_search, which asks for the number of children that its beams really have
* padded:       llmrec.kernels.static_search, over static shapes; on a GPU by the Triton kernels, recorded as a graph
* static:       dense tables for the first two levels, then CSR of (token, next state), padded to the level's widest
                node: the idea of STATIC (arXiv 2602.22647), in torch; on a GPU recorded as a graph
* dense:        a mask over the whole vocabulary for every beam, made from the trie, and the best of what it leaves
* searchsorted: every beam's every code looked up among the sorted prefixes of the catalog

All must find the same scores. Codes are random, every one equally likely; a level's tokens are its codes behind those
of the levels before. On a GPU the time is that of a recorded graph's replay, by events, where the way can be recorded;
without one it is the process's processor time on one thread, which other work on the machine disturbs least.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from environment import add_flags, environment, report

from llmrec.kernels import select_kernels
from llmrec.kernels.static_search import StaticSearch

# name: items, levels, codes per level
CATALOGS = {
    "100k of 256^4": (100_000, 4, 256),
    "1M of 256^4": (1_000_000, 4, 256),
    "3M of 8192^3": (3_000_000, 3, 8192),
    "20M of 2048^8": (20_000_000, 8, 2048),
}
REQUESTS, WIDTH = 2, 70
GOAL_MS = 0.033  # STATIC's figure, on another accelerator


class RandomTrie:
    """What a search needs of a TrieTensors, for a catalog drawn in seconds; and the sorted prefixes, for searchsorted.

    Items differ in their first levels as far as 60 bits of codes go; from there on every node has one child.
    """

    def __init__(self, items: int, levels: int, size: int, seed: int, device: str) -> None:
        rng = np.random.default_rng(seed)
        bits = (size - 1).bit_length()
        drawn = min(levels, 60 // bits)
        keys = np.unique(rng.integers(0, 1 << (bits * drawn), size=items + items // 50, dtype=np.int64))
        keys = np.sort(rng.choice(keys, size=items, replace=False)) if len(keys) > items else keys
        self.size, self.device, self.num_leaves = size, torch.device(device), len(keys)
        self.num_levels = self.token_levels = levels
        self.ragged = self.shared = self.several = False
        self.vocabulary: torch.Tensor | None = torch.zeros(1, dtype=torch.long, device=device)
        self.start: list[torch.Tensor] = []
        self.token: list[torch.Tensor] = []
        self.code: list[torch.Tensor] = []
        self.fan_out: list[int] = []
        above = np.zeros(len(keys), dtype=bool)
        above[0] = True
        for level in range(levels):
            if level < drawn:
                prefix = keys >> (bits * (drawn - 1 - level))
                new = np.append(True, prefix[1:] != prefix[:-1])
                code = (prefix[new] & ((1 << bits) - 1)).astype(np.int32)
            else:
                new, code = above, rng.integers(0, size, size=int(above.sum()), dtype=np.int32)
            start = np.append(np.flatnonzero(above[new]), len(code)).astype(np.int32)
            self.fan_out.append(int(np.diff(start).max()))
            self.start.append(torch.from_numpy(start).to(device))
            self.code.append(torch.from_numpy(code).to(device))
            self.token.append(self.code[-1] + (1 + level * size))
            above = new
        self.item_of_leaf = torch.arange(self.num_leaves, dtype=torch.int32, device=device)
        self.num_tokens = 1 + levels * size

    def prefix_keys(self, level: int) -> torch.Tensor:
        """(n_l,) int64 ascending: node of the level above times the size, and the code."""
        counts = self.start[level].diff().long()
        parent = torch.arange(len(counts), device=self.device).repeat_interleave(counts)
        return parent * self.size + self.code[level]


class Static:
    """Dense for the first two levels, then padded CSR rows of (token, next state)."""

    def __init__(self, trie: RandomTrie) -> None:
        self.trie, size = trie, trie.size
        self.dense = 2 if size <= 2048 else 1
        self.state = []
        for level in range(self.dense):
            above = len(trie.token[level - 1]) if level else 1
            table = torch.full((above * size,), -1, dtype=torch.int32, device=trie.device)
            table[trie.prefix_keys(level)] = torch.arange(
                len(trie.token[level]), dtype=torch.int32, device=trie.device
            )
            self.state.append(table.view(-1, size))
        self.edges: dict[int, torch.Tensor] = {}
        for level in range(self.dense, trie.num_levels):
            following = torch.arange(len(trie.token[level]), dtype=torch.int32, device=trie.device)
            edges = torch.stack([trie.token[level], following], dim=1)
            self.edges[level] = torch.nn.functional.pad(edges, (0, 0, 0, trie.fan_out[level]))

    @property
    def nbytes(self) -> int:
        csr = sum(edges.nbytes + self.trie.start[level].nbytes for level, edges in self.edges.items())
        return csr + sum(table.nbytes + table.numel() for table in self.state)

    def advance(self, level: int, logits: torch.Tensor, score: torch.Tensor, node: torch.Tensor, width: int) -> Any:
        trie = self.trie
        if level < self.dense:
            child = self.state[level][node]  # (R, W', K)
            first = 1 + level * trie.size
            logit = logits[..., first : first + trie.size]
            legal = child >= 0
        else:
            begin = trie.start[level][node].long()
            offset = torch.arange(trie.fan_out[level], device=node.device)
            rows = self.edges[level][begin.unsqueeze(-1) + offset]  # (R, W', C, 2)
            legal = offset < (trie.start[level][node + 1] - begin).unsqueeze(-1)
            child = rows[..., 1]
            logit = logits.gather(-1, rows[..., 0].long().where(legal, 0))
        value = score.unsqueeze(-1) + (logit - logits[..., :1])
        best, place = value.masked_fill(~legal, -torch.inf).flatten(1).topk(width, dim=1)
        return best, child.flatten(1).gather(1, place).long().clamp(min=0)


class Dense:
    """A mask over the vocabulary for every beam."""

    def __init__(self, trie: RandomTrie) -> None:
        self.trie = trie
        self.nbytes = sum(part.nbytes for level in zip(trie.start, trie.token, strict=True) for part in level)

    def advance(self, level: int, logits: torch.Tensor, score: torch.Tensor, node: torch.Tensor, width: int) -> Any:
        trie = self.trie
        begin = trie.start[level][node].long()
        offset = torch.arange(trie.fan_out[level], device=node.device)
        legal = offset < (trie.start[level][node + 1] - begin).unsqueeze(-1)
        child = begin.unsqueeze(-1) + offset.where(legal, 0)
        token = trie.token[level][child].long().where(legal, 0)  # token 0 is no item's
        following = torch.full(logits.shape, -1, dtype=torch.int32, device=node.device)
        following.scatter_(-1, token, child.int())
        following[..., 0] = -1
        value = (score.unsqueeze(-1) + (logits - logits[..., :1])).masked_fill(following < 0, -torch.inf)
        best, place = value.flatten(1).topk(width, dim=1)
        return best, following.flatten(1).gather(1, place).long().clamp(min=0)


class SearchSorted:
    """Every code of every beam looked up among all prefixes."""

    def __init__(self, trie: RandomTrie) -> None:
        self.trie = trie
        self.keys = [trie.prefix_keys(level) for level in range(trie.num_levels)]
        self.nbytes = sum(keys.nbytes for keys in self.keys)

    def advance(self, level: int, logits: torch.Tensor, score: torch.Tensor, node: torch.Tensor, width: int) -> Any:
        trie, keys = self.trie, self.keys[level]
        wanted = node.unsqueeze(-1) * trie.size + torch.arange(trie.size, device=node.device)
        place = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        legal = keys[place] == wanted
        first = 1 + level * trie.size
        value = score.unsqueeze(-1) + (logits[..., first : first + trie.size] - logits[..., :1])
        best, at = value.masked_fill(~legal, -torch.inf).flatten(1).topk(width, dim=1)
        return best, place.flatten(1).gather(1, at)


def search_of(way: Any, trie: RandomTrie, widths: list[int], logits: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A whole search by a rival, from prepared logits to (R, W) scores, best first."""

    def run() -> torch.Tensor:
        requests = logits[0].shape[0]
        score = torch.zeros((requests, 1), device=trie.device)
        node = torch.zeros((requests, 1), dtype=torch.long, device=trie.device)
        for level, width in enumerate(widths):
            score, node = way.advance(level, logits[level], score, node, width)
        return score

    return run


def padded_search(search: StaticSearch, logits: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same by `StaticSearch`; the normaliser of one token is its logit."""

    def run() -> torch.Tensor:
        state = search.begin(logits[0][:, 0])
        for level in range(len(search.levels)):
            state = search.advance(level, logits[level], state)
        return search.finish(state).scores

    return run


def ragged_search(trie: RandomTrie, width: int, logits: list[torch.Tensor]) -> Callable[[], torch.Tensor]:
    """The same by `beam_search`, which keeps dead beams where a level has fewer nodes than W."""
    from llmrec.beam import beam_search

    logits = [level[:, :1].repeat(1, width, 1) for level in logits]

    def run() -> torch.Tensor:
        following = iter(logits[1:])
        found: Any = trie
        return beam_search(logits[0][:, 0], lambda *_: next(following), found, width).scores

    return run


def recorded(run: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A CUDA graph of what `run` does; its result is written over by the next call."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> torch.Tensor:
        graph.replay()
        return out

    return replay


def milliseconds(run: Callable[[], Any], repeats: int, device: str) -> float:
    """Median over `repeats` calls, after two: of processor time; on a GPU over twenty times as many, by events."""
    run(), run()
    times = []
    for _ in range(repeats * (20 if device == "cuda" else 1)):
        if device == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end))
        else:
            first = time.process_time()
            run()
            times.append(1e3 * (time.process_time() - first))
    return statistics.median(times)


def measure(
    name: str, device: str, repeats: int, seed: int = 0, ways: tuple[str, ...] | None = None
) -> dict[str, Any]:
    """Milliseconds per level of each way on one catalog, the bytes of what it keeps, and whether scores agree."""
    items, levels, size = CATALOGS[name]
    begin = time.perf_counter()
    trie = RandomTrie(items, levels, size, seed, device)
    drawn = time.perf_counter() - begin
    found: Any = trie
    search = StaticSearch(found, WIDTH)
    generator = torch.Generator(device).manual_seed(seed)
    # Beams stand in the order of their nodes or of their scores, by the way: those of a request have equal logits.
    logits = [
        (torch.randn(REQUESTS, 1, trie.num_tokens, generator=generator, device=device) * 3).repeat(1, before, 1)
        for before in [1, *search.widths[:-1]]
    ]
    rivals = {"static": Static, "dense": Dense, "searchsorted": SearchSorted}
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "ragged": ragged_search(trie, WIDTH, logits),
        "padded": padded_search(search, logits),
    }
    nbytes = {"padded": sum(a.nbytes + b.nbytes for a, b in zip(trie.start, trie.token, strict=True))}
    nbytes["ragged"] = nbytes["padded"]
    for rival, kind in rivals.items():
        if ways is None or rival in ways:
            way = kind(trie)
            nbytes[rival] = way.nbytes
            runs[rival] = search_of(way, trie, search.widths, logits)
    expected = runs["padded"]().sort(dim=1, descending=True).values.clone()
    per_level, agree = {}, {}
    for way_name, run in runs.items():
        scores = run().sort(dim=1, descending=True).values
        agree[way_name] = bool(torch.allclose(scores[:, : expected.shape[1]], expected, atol=1e-4))
        timed = recorded(run) if device == "cuda" and way_name != "ragged" else run
        per_level[way_name] = milliseconds(timed, repeats, device) / levels
    return {
        "items": trie.num_leaves,
        "levels": levels,
        "codes": size,
        "fan_out": trie.fan_out,
        "seconds_to_draw": drawn,
        "milliseconds_per_level": per_level,
        "bytes": nbytes,
        "agree": agree,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--catalogs", nargs="+", choices=list(CATALOGS), help="Default all; the least with --quick.")
    parser.add_argument("--repeats", type=int, help="Default 7; 3 with --quick.")
    add_flags(parser)
    options = parser.parse_args()
    names = options.catalogs or (list(CATALOGS)[:1] if options.quick else list(CATALOGS))
    repeats = options.repeats or (3 if options.quick else 7)
    before = environment()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    catalogs: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    print(f"{REQUESTS} requests, {WIDTH} beams, on {device}; milliseconds per level", flush=True)
    for name in names:
        catalogs[name] = measure(name, device, repeats)
        times = catalogs[name]["milliseconds_per_level"]
        print(f"{name:>15}: " + ", ".join(f"{way} {value:.3f}" for way, value in times.items()))
        ours = min(times["ragged"], times["padded"])
        for rival in ("static", "dense", "searchsorted"):
            ratios[f"{rival} over ours, {name}"] = times[rival] / ours
    if len(names) > 1:
        first, last = (
            min(catalogs[n]["milliseconds_per_level"][w] for w in ("ragged", "padded")) for n in (names[0], names[-1])
        )
        ratios["largest catalog over smallest"] = last / first
    for name, value in ratios.items():
        print(f"{name}: {value:.2f}")
    result = {
        "requests": REQUESTS,
        "beams": WIDTH,
        "device": device,
        "threads": 1,
        "triton": select_kernels.available(),
        "goal_milliseconds": GOAL_MS,
        "catalogs": catalogs,
    }
    report("selection", result, ratios, before, options)


if __name__ == "__main__":
    main()

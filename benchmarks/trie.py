"""The catalog's trie from 10^4 to 2*10^7 items, against three other ways to know which codes may follow a prefix.

    python benchmarks/trie.py [--sizes 10000 ... 20000000] [--quick] [--json FILE]

Catalogs are random: four levels of 256 codes, every code equally likely, no two items alike. A batch is 512 prefixes
of one length, three of four from the catalog and one of random codes; the numbers are medians over batches, all of
other prefixes.

* trie:     llmrec.trie.CatalogTrie, and TrieTensors in torch on the processor, and on the GPU if there is one
* dict:     a Python dict from prefix (a tuple) to the list of codes after it, as MiniOneRec and LC-Rec have
* compare:  every prefix against the codes of all items
* static:   dense tables for the first two levels, then CSR of (code, next node), padded to the level's widest node:
            the idea of STATIC (arXiv 2602.22647), in numpy

"nodes" is finding the place of a prefix, "allowed" that and the codes after it, "mask" that and a (512, 256) table of
booleans, which is what logits are masked with; "mask" is what all four are compared in, and they must agree, bit by
bit, on every batch that they run. The number of children grows with the catalog, so "allowed" and "mask" have more to
write in a greater one; a batch's number of children is given with them.

Every way is built in a process of its own, whose greatest resident memory above that with the codes is its peak. The
codes' bytes are those of int32 (items, 4). A way that would take minutes is skipped, with a note.
"""

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environment import add_flags, environment, report

LEVELS, SIZE = 4, 256
BATCH, BATCHES = 512, 8
FEW = 4  # prefixes of a batch for the way that looks at all items
DICT_AT_MOST = 1_000_000
Array = npt.NDArray[Any]


class Trie:
    """A way is made from the codes (N, 4), and its mask of prefixes (B, l) is (B, 256) bool, for l below 4."""

    def __init__(self, codes: Array) -> None:
        from llmrec.trie import CatalogTrie

        self.trie = CatalogTrie(codes)
        self.nbytes: int | None = self.trie.nbytes

    def mask(self, prefixes: Array) -> Array:
        offsets, codes = self.trie.allowed(prefixes)
        found = np.zeros((len(prefixes), SIZE), dtype=bool)
        found.reshape(-1)[np.repeat(SIZE * np.arange(len(prefixes)), np.diff(offsets)) + codes] = True
        return found


class Dict:
    def __init__(self, codes: Array) -> None:
        self.nbytes: int | None = None  # of its objects; the peak tells
        children: dict[tuple[int, ...], dict[int, None]] = {}
        for row in map(tuple, codes.tolist()):
            for level in range(LEVELS):
                children.setdefault(row[:level], {})[row[level]] = None
        self.children = {prefix: list(codes) for prefix, codes in children.items()}

    def mask(self, prefixes: Array) -> Array:
        found = np.zeros((len(prefixes), SIZE), dtype=bool)
        for row, prefix in enumerate(map(tuple, prefixes.tolist())):
            if (codes := self.children.get(prefix)) is not None:
                found[row, codes] = True
        return found


class Compare:
    def __init__(self, codes: Array) -> None:
        self.columns = [np.ascontiguousarray(column.astype(np.uint8)) for column in codes.T]
        self.nbytes: int | None = sum(column.nbytes for column in self.columns)

    def mask(self, prefixes: Array) -> Array:
        found = np.zeros((len(prefixes), SIZE), dtype=bool)
        for row, prefix in enumerate(prefixes):
            alike = np.ones(len(self.columns[0]), dtype=bool)
            for column, code in zip(self.columns, prefix, strict=False):
                alike &= column == code
            found[row, self.columns[prefixes.shape[1]][alike]] = True
        return found


class Static:
    """States of a level count from 1, 0 is "no item begins so"; dense[c0, c1] is a state of the second level."""

    def __init__(self, codes: Array) -> None:
        packed = np.zeros(len(codes), dtype=np.uint32)
        for column in codes.T:
            packed = packed * np.uint32(SIZE) + column.astype(np.uint32)
        packed.sort()
        self.first = np.zeros(SIZE, dtype=bool)
        self.dense = np.zeros((SIZE, SIZE), dtype=np.int32)
        self.begin: list[Array] = []
        self.edges: list[Array] = []
        self.width: list[int] = []
        above = np.empty(0, dtype=np.int64)
        for level in range(LEVELS):
            keys = packed >> np.uint32(8 * (LEVELS - 1 - level))
            new = np.append(True, keys[1:] != keys[:-1])
            state, code = np.cumsum(new), keys[new] & np.uint32(SIZE - 1)
            if level == 0:
                self.first[code] = True
            elif level == 1:
                self.dense.reshape(-1)[keys[new]] = state[new]
            else:
                count = np.bincount(above[new], minlength=above[-1] + 1)  # state 0 has none
                self.begin.append(np.append(0, np.cumsum(count)).astype(np.int32))
                self.width.append(int(count.max()))
                # Padded at the end, so that a slice of `width` places is always there.
                edges = np.zeros((len(code) + self.width[-1], 2), dtype=np.int32)
                edges[: len(code), 0], edges[: len(code), 1] = code, state[new]
                self.edges.append(edges)
            above = state
        held = [self.first, self.dense, *self.begin, *self.edges]
        self.nbytes: int | None = sum(array.nbytes for array in held)

    def slots(self, level: int, state: Array) -> tuple[Array, Array]:
        """(B, width, 2) code and next state of every child, and (B, width) which of them are there."""
        begin = self.begin[level - 2][state]
        there = np.arange(self.width[level - 2]) < (self.begin[level - 2][state + 1] - begin)[:, None]
        return self.edges[level - 2][begin[:, None] + np.arange(self.width[level - 2])], there

    def mask(self, prefixes: Array) -> Array:
        batch, depth = prefixes.shape
        if depth == 0:
            return np.repeat(self.first[None], batch, axis=0)
        if depth == 1:
            return self.dense[prefixes[:, 0]] > 0
        state = self.dense[prefixes[:, 0], prefixes[:, 1]]
        for level in range(2, depth):
            slots, there = self.slots(level, state)
            hit = there & (slots[..., 0] == prefixes[:, level, None])
            state = np.where(hit, slots[..., 1], 0).max(axis=1)
        slots, there = self.slots(depth, state)
        found = np.zeros((batch, SIZE), dtype=bool)
        found.reshape(-1)[(SIZE * np.arange(batch)[:, None] + slots[..., 0])[there]] = True
        return found


WAYS: dict[str, Callable[[Array], Any]] = {"trie": Trie, "dict": Dict, "compare": Compare, "static": Static}


def synthesise(size: int, folder: Path) -> None:
    """Writes codes.npy (size, 4) int32, no two rows alike, in random order."""
    rng = np.random.default_rng(size)
    packed = np.unique(rng.integers(0, SIZE**LEVELS, int(1.01 * size) + 10, dtype=np.uint32))
    packed = rng.permutation(packed)[:size]
    assert len(packed) == size
    codes = [(packed >> np.uint32(8 * (LEVELS - 1 - level))) & np.uint32(SIZE - 1) for level in range(LEVELS)]
    np.save(folder / "codes.npy", np.stack(codes, axis=1).astype(np.int32))


def batches(codes: Array, depth: int) -> list[Array]:
    """The same for every way: BATCHES times (BATCH, depth)."""
    rng = np.random.default_rng(depth)
    found = []
    for _ in range(BATCHES):
        there = codes[rng.integers(0, len(codes), BATCH), :depth]
        random = rng.integers(0, SIZE, (BATCH, depth), dtype=np.int32)
        found.append(np.where(np.arange(BATCH)[:, None] % 4 < 3, there, random))
    return found


def measure(name: str, path: Path) -> dict[str, Any]:
    """Builds one way and asks it for all batches; in its own process."""
    codes = np.load(path)
    WAYS[name](codes[:1000])  # what is imported and compiled the first time
    base = peak()
    begin, spent = time.perf_counter(), time.process_time()
    way = WAYS[name](codes)
    built = {"seconds": time.perf_counter() - begin, "processor_seconds": time.process_time() - spent}
    result: dict[str, Any] = {"build": built, "bytes": way.nbytes, "peak": peak() - base, "codes_bytes": codes.nbytes}
    few, whole = hashlib.sha256(), hashlib.sha256()
    milliseconds: dict[str, list[float]] = {"mask": []}
    children: list[float] = []
    for depth in range(LEVELS):
        asked = batches(codes, depth)
        if name == "compare":
            asked = [prefixes[:FEW] for prefixes in asked[:2]]
        for place, prefixes in enumerate(asked):
            found = way.mask(prefixes)
            whole.update(np.packbits(found).tobytes())
            if place < 2:
                few.update(np.packbits(found[:FEW]).tobytes())
            if place == 0:
                children.append(float(found.sum()))
        milliseconds["mask"].append(BATCH / len(asked[0]) * median(way.mask, asked, 1 if name == "compare" else 5))
    result |= {"agree_few": few.hexdigest(), "agree": None if name == "compare" else whole.hexdigest()}
    if isinstance(way, Trie):
        result |= {"children": children, **stored(way, path.parent), **devices(way, codes, milliseconds)}
    return result | {"milliseconds": milliseconds}


def stored(way: Trie, folder: Path) -> dict[str, Any]:
    """Seconds of saving, and of mapping what was saved."""
    from llmrec.trie import CatalogTrie

    times = [time.perf_counter()]
    way.trie.save(folder / "trie.safetensors")
    times.append(time.perf_counter())
    mapped = CatalogTrie.load(folder / "trie.safetensors")
    times.append(time.perf_counter())
    assert np.array_equal(mapped.leaf_of_item, way.trie.leaf_of_item)
    (folder / "trie.safetensors").unlink()
    return {"save_seconds": times[1] - times[0], "load_seconds": times[2] - times[1]}


def devices(way: Trie, codes: Array, milliseconds: dict[str, list[float]]) -> dict[str, Any]:
    """Adds the times of the parts, in numpy and in torch, and checks torch against numpy."""
    import torch

    from llmrec.beam import TrieTensors

    trie = way.trie
    names = ["numpy", "torch", *(["torch on the GPU"] if torch.cuda.is_available() else [])]
    for name in names:
        milliseconds |= {f"nodes, {name}": [], f"allowed, {name}": []}
    for depth in range(LEVELS):
        asked = batches(codes, depth)
        milliseconds["nodes, numpy"].append(median(trie.nodes, asked))
        milliseconds["allowed, numpy"].append(median(trie.allowed, asked))
    for name in names[1:]:
        device = "cuda" if "GPU" in name else "cpu"
        tensors = TrieTensors(trie, [np.arange(size) for size in trie.sizes], device)
        wait = torch.cuda.synchronize if device == "cuda" else None
        for depth in range(LEVELS):
            plain = batches(codes, depth)
            asked = [torch.from_numpy(prefixes).to(device) for prefixes in plain]
            for prefixes, there in zip(plain, asked, strict=True):
                padded, legal = tensors.allowed(there)
                offsets, found = trie.allowed(prefixes)
                assert np.array_equal(padded[legal].cpu().numpy(), found), f"{name} finds other codes"
                assert np.array_equal(legal.sum(1).cpu().numpy(), np.diff(offsets)), f"{name} finds other numbers"
            milliseconds[f"nodes, {name}"].append(median(tensors.nodes, asked, wait=wait))
            milliseconds[f"allowed, {name}"].append(median(tensors.allowed, asked, wait=wait))
    return {"fan_out": trie.fan_out, "probes": trie.probes, "nodes": [len(code) for code in trie.code]}


def median(
    run: Callable[[Any], Any], asked: list[Any], rounds: int = 5, wait: Callable[[], None] | None = None
) -> float:
    """The median milliseconds of run(batch), over all batches `rounds` times."""
    times = []
    for _ in range(rounds):
        for prefixes in asked:
            begin = time.perf_counter()
            run(prefixes)
            if wait is not None:
                wait()
            times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="Numbers of items; default 10^4, 10^5, 10^6, 2*10^7.")
    parser.add_argument("--synthesise", nargs=2, metavar=("SIZE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    add_flags(parser)
    options = parser.parse_args()
    if options.synthesise:
        return synthesise(int(options.synthesise[0]), Path(options.synthesise[1]))
    if options.measure:
        return print(json.dumps(measure(options.measure[0], Path(options.measure[1]))))
    sizes = sorted(options.sizes or ([10**4, 10**5, 10**6] if options.quick else [10**4, 10**5, 10**6, 2 * 10**7]))
    before = environment()
    measured: dict[str, dict[str, Any]] = {}
    dict_at_most = DICT_AT_MOST // 10 if options.quick else DICT_AT_MOST
    for size in sizes:
        found = measured[str(size)] = {}
        with tempfile.TemporaryDirectory() as folder:
            child("--synthesise", str(size), folder)
            for name in WAYS:
                if name == "dict" and size > dict_at_most:
                    found[name] = {"skipped": f"above {dict_at_most:,} items: seconds and gigabytes of Python objects"}
                    print(f"{size:>10,} {name:8} skipped, {found[name]['skipped']}")
                    continue
                found[name] = json.loads(child("--measure", name, str(Path(folder) / "codes.npy")))
                print(line(size, name, found[name]))
        ran = {name: one for name, one in found.items() if "skipped" not in one}
        assert len({one["agree_few"] for one in ran.values()}) == 1, f"they differ at {size} items"
        assert len({one["agree"] for one in ran.values() if one["agree"]}) == 1, f"they differ at {size} items"
    ratios = compare(measured, sizes)
    for key, value in ratios.items():
        print(f"{key}: {value}")
    settings = {"levels": LEVELS, "codebook": SIZE, "batch": BATCH, "batches": BATCHES}
    for path in report("trie", {"sizes": sizes, **settings, "measured": measured}, ratios, before, options):
        print(path)


def line(size: int, name: str, found: dict[str, Any]) -> str:
    """One row of the printed table."""
    held = "" if found["bytes"] is None else f"{found['bytes'] / found['codes_bytes']:.2f} x codes, "
    masks = " ".join(f"{value:.3f}" for value in found["milliseconds"]["mask"])
    built = found["build"]["processor_seconds"]
    return (
        f"{size:>10,} {name:8} built in {built:7.3f} s of the processor ({size / built / 1e6:6.2f} M items/s), {held}"
        f"peak {found['peak'] / 2**20:,.0f} MiB, masks after 0 to 3 codes: {masks} ms"
    )


def compare(measured: dict[str, dict[str, Any]], sizes: list[int]) -> dict[str, float]:
    """What does not depend on the machine's speed: rivals over the trie at each size, and growth with the size.

    Sums are over prefixes of 1, 2 and 3 codes: without any, all have the same answer, which is known before.
    """
    ratios = {}
    for size in sizes:
        found = measured[str(size)]
        trie = found["trie"]
        ratios[f"trie bytes over codes at {size}"] = trie["bytes"] / trie["codes_bytes"]
        for name in ("dict", "compare", "static"):
            if "skipped" not in found[name]:
                rival, ours = (sum(one["milliseconds"]["mask"][1:]) for one in (found[name], trie))
                ratios[f"{name} over trie at {size}, mask"] = rival / ours
                rival, ours = (one["build"]["processor_seconds"] for one in (found[name], trie))
                ratios[f"{name} over trie at {size}, build"] = rival / ours
    if len(sizes) > 1:
        ends = [measured[str(size)]["trie"] for size in (sizes[0], sizes[-1])]
        small, large = ({**one["milliseconds"], "children": one["children"]} for one in ends)
        for part in large:
            ratios[f"{part}: {sizes[-1]} over {sizes[0]} items"] = sum(large[part][1:]) / sum(small[part][1:])
    return {key: round(value, 3) for key, value in ratios.items()}


if __name__ == "__main__":
    main()

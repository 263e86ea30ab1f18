"""Real entropy of long logs: seconds and peak memory, how they grow, and the definition taken at its word beside it.

    python benchmarks/entropy.py [--tokens 10000000] [--short 200000] [--quick] [--json FILE]

Sequences of five kinds, each in a process of its own, because a process's peak memory never falls:

    log         items of very unequal popularity, up to a million of them, in no order
    distinct    no item twice
    one item    the same one always
    coin        two items at random: the most edges and states
    twice       a permutation, and the same again

`real` is `llmrec.scaling.entropy.real_entropy`, `dictionary` the variant of the Performance Law's published code, and
`all` every figure that `llmrec data entropy` shows of one share, in users of a hundred tokens; both of the log alone.
Time is that of the processor, because other jobs on the machine do not change it. What numba compiles once is not
counted, but told. Memory is the process's whole, with the interpreter, the packages and the sequence in it.

The rival reads the definition out: from every place on, Python's `str.find` looks for one token more among what comes
before until it is not there; a token is a character. At --short tokens of the log, where both find the same figure.

Growth is the exponent b of time = a * tokens^b, between a hundredth of the tokens and all: 1 is linear.
"""

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from environment import add_flags, environment, report

KINDS = ("log", "distinct", "one item", "coin", "twice")
LIMIT = 60.0  # seconds that the issue of `llmrec scale` asks for, at 10^7 tokens


def sequence(kind: str, tokens: int) -> npt.NDArray[np.int64]:
    rng = np.random.default_rng(0)
    if kind == "log":
        return (rng.random(tokens) ** 3 * min(tokens, 1_000_000)).astype(np.int64)
    if kind == "distinct":
        return rng.permutation(tokens)
    if kind == "one item":
        return np.zeros(tokens, dtype=np.int64)
    if kind == "coin":
        return rng.integers(0, 2, tokens)
    return np.tile(rng.permutation(tokens // 2), 2)


def measure(kind: str, tokens: int) -> dict[str, Any]:
    """Seconds and peak memory of every figure; in its own process."""
    from llmrec.scaling.entropy import dictionary_entropy, entropies, real_entropy

    begin = time.process_time()
    short = np.array([1, 2, 1])
    real_entropy(short), dictionary_entropy(short)
    ready = time.process_time() - begin
    values = sequence(kind, tokens)
    starts = np.arange(0, len(values), 100)
    figures: dict[str, Callable[[], Any]] = {
        "real": lambda: real_entropy(values),
        "dictionary": lambda: dictionary_entropy(values),
        "all": lambda: entropies(values, starts, np.minimum(starts + 100, len(values))),
    }
    found: dict[str, Any] = {"kind": kind, "tokens": len(values), "ready": ready, "seconds": {}, "peak": {}}
    for name in figures if kind == "log" else ("real",):
        begin = time.process_time()
        figures[name]()
        found["seconds"][name], found["peak"][name] = time.process_time() - begin, peak()
    return found


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def by_definition(values: npt.NDArray[np.int64]) -> float:
    """The real entropy, by looking for every run in all that comes before it."""
    text = "".join(map(chr, np.unique(values, return_inverse=True)[1].tolist()))
    total, n = 0, len(text)
    for place in range(n):
        length = 1
        while place + length <= n and text.find(text[place : place + length], 0, place) >= 0:
            length += 1
        total += length
    return n * math.log(n) / total


def in_a_process(kind: str, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--measure", kind, str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return dict(json.loads(done.stdout))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="How long the sequences are.")
    parser.add_argument("--short", type=int, default=200_000, help="How long the one is that the definition gets.")
    parser.add_argument("--measure", nargs=2, metavar=("KIND", "TOKENS"), help=argparse.SUPPRESS)
    add_flags(parser)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure[0], int(options.measure[1]))))
        return
    if options.quick:
        options.tokens, options.short = 1_000_000, 20_000
    before = environment()
    measured = []
    for kind in KINDS:
        found = in_a_process(kind, options.tokens)
        measured.append(found)
        figures = (
            f"{name} {found['seconds'][name]:6.1f} s {found['peak'][name] / 2**20:6,.0f} MiB" for name in found["peak"]
        )
        print(f"{kind:9} {found['tokens']:>11,} tokens: {', '.join(figures)}")
    hundredth = in_a_process("log", options.tokens // 100)
    growth = {
        name: math.log(measured[0]["seconds"][name] / hundredth["seconds"][name]) / math.log(100)
        for name in ("real", "dictionary", "all")
    }

    from llmrec.scaling.entropy import real_entropy

    values = sequence("log", options.short)
    real_entropy(values)
    begin = time.process_time()
    ours = real_entropy(values)
    seconds = time.process_time() - begin
    begin = time.process_time()
    theirs = by_definition(values)
    slow = time.process_time() - begin
    if not math.isclose(ours, theirs, rel_tol=1e-12):
        raise SystemExit(f"By definition the entropy is {theirs}, not {ours}. This is a bug of llmrec.")
    slowest = max(found["seconds"]["real"] for found in measured)
    print(f"{options.short:,} tokens by definition: {slow:.2f} s, by the automaton {seconds:.4f} s, both {ours:.6f}")
    print(f"the slowest kind: {slowest:.1f} s for {options.tokens:,} tokens (asked for: {LIMIT:.0f} s for 10,000,000)")
    ratios = {
        f"definition over automaton, seconds at {options.short:,} tokens": round(slow / seconds, 1),
        **{f"growth exponent, {name}": round(value, 3) for name, value in growth.items()},
    }
    result = {
        "options": {"tokens": options.tokens, "short": options.short},
        "measured": measured,
        "hundredth": hundredth,
        "definition": {"tokens": options.short, "seconds": slow, "automaton_seconds": seconds, "entropy": ours},
        "ratios": ratios,
    }
    for name, value in ratios.items():
        print(f"{name}: {value}")
    for path in report("entropy", result, ratios, before, options):
        print(path)


if __name__ == "__main__":
    main()

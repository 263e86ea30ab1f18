"""How reading, cleaning and splitting interactions grow with their number: rows per second, and peak memory.

    python benchmarks/data.py [--sizes 100000 1000000 10000000] [--quick] [--json FILE]

Synthetic logs, in random order of users and with ids too long to be stored in place, are written as parquet and as
CSV into a temporary folder. Every measurement is a process of its own, because a process's peak memory never falls.
It reads the log and sorts it (Interactions.read), cleans it (duplicates, cores of 5) and splits it (leave_one_out).

Peak memory is the largest resident set up to the end of a step, less that of the interpreter with its imports. It is
the kernel's VmHWM rather than ru_maxrss, which a child inherits from the process that started it.

Growth is the exponent b of time = a * size^b (and of memory), a least squares fit to the logarithms: 1 is linear.
Time is that of the processor there, because other jobs on the machine do not change it.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMATS = ("parquet", "csv")


def synthesise(size: int, folder: Path) -> None:
    """Writes log.parquet and log.csv of `size` interactions: ten per user, a hundred per item, in mean."""
    import numpy as np
    import polars as pl

    rng = np.random.default_rng(0)
    # Squares of uniform numbers: some users and items are much more frequent than others.
    users = (rng.random(size) ** 2 * (size // 10)).astype(np.int64)
    items = (rng.random(size) ** 2 * max(size // 100, 100)).astype(np.int64)
    frame = pl.DataFrame(
        {
            "user_id": pl.Series(users).cast(pl.String).str.zfill(12) + "U",
            "item_id": pl.Series(items).cast(pl.String).str.zfill(12) + "I",
            "timestamp": rng.integers(1_300_000_000, 1_600_000_000, size),
            "rating": rng.integers(1, 6, size),
        }
    )
    frame.write_parquet(folder / "log.parquet")
    frame.write_csv(folder / "log.csv")


def measure(path: Path) -> dict[str, Any]:
    """Every step's seconds, by the clock and of the processor, and the peak memory after it; in its own process."""
    from llmrec.data.cleaning import clean
    from llmrec.data.interactions import Interactions
    from llmrec.data.items import Items
    from llmrec.data.protocols import leave_one_out

    seconds: dict[str, float] = {}
    processor: dict[str, float] = {}
    peaks: dict[str, int] = {}
    base = peak()

    def timed(step: str, run: Callable[[], Any]) -> Any:
        begin, spent = time.perf_counter(), time.process_time()
        result = run()
        seconds[step], processor[step] = time.perf_counter() - begin, time.process_time() - spent
        peaks[step] = peak() - base
        return result

    interactions = timed("read", lambda: Interactions.read(path))
    rows = len(interactions)
    items = Items.from_interactions(interactions)
    interactions, items, _ = timed("clean", lambda: clean(interactions, items, user_core=5, item_core=5))
    split = timed("split", lambda: leave_one_out(interactions, items))
    return {
        **{"rows": rows, "rows_cleaned": len(interactions), "test_cases": len(split.positions["test"])},
        **{"seconds": seconds, "processor_seconds": processor, "peak": peaks, "base": base},
    }


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def exponent(sizes: list[int], values: list[float]) -> float:
    """The slope of a least squares line through the logarithms."""
    xs, ys = [math.log(size) for size in sizes], [math.log(value) for value in values]
    mean = sum(xs) / len(xs)
    return sum((x - mean) * y for x, y in zip(xs, ys, strict=True)) / sum((x - mean) ** 2 for x in xs)


def child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, __file__, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="Numbers of interactions; default 10^5, 10^6, 10^7.")
    parser.add_argument("--synthesise", nargs=2, metavar=("SIZE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    if options.synthesise:
        return synthesise(int(options.synthesise[0]), Path(options.synthesise[1]))
    if options.measure:
        return print(json.dumps(measure(options.measure)))
    sizes = sorted(options.sizes or ([100_000, 300_000, 1_000_000] if options.quick else [10**5, 10**6, 10**7]))
    before = environment()
    measured: dict[str, list[dict[str, Any]]] = {name: [] for name in FORMATS}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            child("--synthesise", str(size), folder)
            for name in FORMATS:
                found = json.loads(child("--measure", str(Path(folder) / f"log.{name}")))
                assert found["rows"] == size
                measured[name].append(found)
                for step, seconds in found["seconds"].items():
                    print(
                        f"{size:>11,} {name:8} {step:6} {seconds:8.2f} s {size / seconds:>12,.0f} rows/s, peak so far "
                        f"{found['peak'][step] / 2**20:8,.0f} MiB above {found['base'] / 2**20:,.0f}"
                    )
    growth: dict[str, float] = {}
    if len(sizes) > 1:
        for name, found in measured.items():
            for step in found[0]["seconds"]:
                times = [max(1e-9, one["processor_seconds"][step]) for one in found]
                growth[f"{name} {step} time exponent"] = exponent(sizes, times)
                peaks = [float(max(1, one["peak"][step])) for one in found]
                growth[f"{name} {step} memory exponent"] = exponent(sizes, peaks)
    growth = {key: round(value, 3) for key, value in growth.items()}
    for key, value in growth.items():
        print(f"{key}: {value}")
    result = {"sizes": sizes, "measured": measured, "growth": growth}
    for path in report("data", result, growth, before, options):
        print(path)


if __name__ == "__main__":
    main()

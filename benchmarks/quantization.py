"""Residual k-means against faiss's ResidualQuantizer: seconds, distortion, memory; and what collision policies cost.

    python benchmarks/quantization.py [--sizes 100000 1000000] [--dimension 384] [--levels 3] [--codes 256]
        [--quick] [--json FILE]

Vectors are a mixture of 2,000 clusters in 64 directions of falling weight, with noise in all, of norm 1, in float32.
Every engine fits and encodes the same file in a process of its own, because a process's peak memory never falls:

    llmrec         ResidualKMeans with its defaults
    faiss          ResidualQuantizer with a beam of 1 and its own default training (progressive dimensions, 10
                   iterations in each of 10 steps)
    faiss-kmeans   the same with plain k-means of 25 iterations per level, as llmrec has

All use as many threads as OMP_NUM_THREADS allows. Distortion is the mean squared distance of a vector to what its code
decodes to, computed alike for all. Ratios below 1 are in favour of llmrec.

The policies are those of `compare_policies` on the codes of the first 100,000 vectors.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ENGINES = ("llmrec", "faiss", "faiss-kmeans")
BLOCK = 50_000
POLICY_ITEMS = 100_000


def synthesise(size: int, dimension: int, path: Path) -> None:
    """Writes (size, dimension) float32 as .npy, block by block."""
    rng = np.random.default_rng(0)
    weights = 1 / np.sqrt(1 + np.arange(64))
    basis = (weights[:, None] * rng.normal(size=(64, dimension))).astype(np.float32)
    centres = rng.normal(size=(2000, 64)).astype(np.float32)
    written = np.lib.format.open_memmap(path, "w+", np.float32, (size, dimension))
    for begin in range(0, size, BLOCK):
        rows = min(BLOCK, size - begin)
        inner = centres[rng.integers(0, len(centres), rows)] + 0.5 * rng.standard_normal((rows, 64), dtype=np.float32)
        block = inner @ basis + 0.1 * rng.standard_normal((rows, dimension), dtype=np.float32)
        written[begin : begin + rows] = block / np.linalg.norm(block, axis=1, keepdims=True)
    written.flush()


def measure(engine: str, path: Path, levels: int, codes: int) -> dict[str, Any]:
    """Seconds by the clock and the processor, distortion, and peak memory beyond the vectors; in its own process."""
    import faiss

    from llmrec.quantization.collisions import compare_policies
    from llmrec.quantization.residual_kmeans import ResidualKMeans

    vectors = np.load(path)
    base = peak()
    if engine == "llmrec":
        quantizer: Any = ResidualKMeans(levels, codes)
        fit, encode = quantizer.fit, quantizer.encode
    else:
        quantizer = faiss.ResidualQuantizer(vectors.shape[1], levels, (codes - 1).bit_length())
        quantizer.max_beam_size = 1
        if engine == "faiss-kmeans":
            quantizer.train_type, quantizer.cp.niter = 0, 25
        fit, encode = quantizer.train, quantizer.compute_codes
    begin, spent = time.perf_counter(), time.process_time()
    fit(vectors)
    middle = time.perf_counter()
    found = encode(vectors)
    end = time.perf_counter()
    result = {
        **{"fit_seconds": middle - begin, "encode_seconds": end - middle, "seconds": end - begin},
        **{"processor_seconds": time.process_time() - spent, "peak": peak() - base},
        "distortion": distortion(vectors, quantizer, found),
    }
    if engine == "llmrec":
        result["used"] = [len(np.unique(level)) for level in found.T]
        result["policies"] = compare_policies(found[:POLICY_ITEMS], vectors[:POLICY_ITEMS], quantizer)
    return result


def distortion(vectors: npt.NDArray[np.float32], quantizer: Any, codes: npt.NDArray[Any]) -> float:
    """The mean squared distance of vectors to what their codes decode to."""
    total = 0.0
    for begin in range(0, len(vectors), BLOCK):
        rows = slice(begin, begin + BLOCK)
        differences = vectors[rows] - quantizer.decode(codes[rows])
        total += float(np.einsum("nd,nd->", differences, differences, dtype=np.float64))
    return total / len(vectors)


def peak() -> int:
    """The largest resident set of this process so far, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def compare(size: int, options: argparse.Namespace) -> tuple[dict[str, Any], dict[str, float]]:
    """All engines on `size` vectors, one after another, and their ratios."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "vectors.npy"
        synthesise(size, options.dimension, path)
        for engine in ENGINES:
            command = [sys.executable, __file__, "--measure", engine, str(path)]
            command += ["--levels", str(options.levels), "--codes", str(options.codes)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found[engine] = one = json.loads(done.stdout)
            print(
                f"{size:>9,} {engine:13} fit {one['fit_seconds']:7.2f} s, encode {one['encode_seconds']:7.2f} s, "
                f"distortion {one['distortion']:.5f}, peak {one['peak'] / 2**20:7,.0f} MiB beyond the vectors"
            )
    ratios = {}
    for other in ENGINES[1:]:
        for name, key in (("time", "seconds"), ("processor time", "processor_seconds"), ("distortion", "distortion")):
            ratios[f"{name} over {other}, {size}"] = round(found["llmrec"][key] / found[other][key], 4)
    for row in found["llmrec"]["policies"]:
        if row["possible"]:
            print(
                f"{size:>9,} {row['policy']:13} collisions {row['collision_rate_before']:.2%} -> "
                f"{row['collision_rate_after']:.2%}, {row['moved_items']:,} moved, error + {row['added_share']:.2%}, "
                f"{row['tokens_per_item']} tokens, {row['seconds']:.2f} s"
            )
    return found, ratios


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", help="Numbers of vectors; default 10^5 and 10^6.")
    parser.add_argument("--dimension", type=int, default=384, help="Their width.")
    parser.add_argument("--levels", type=int, default=3, help="Codes per vector.")
    parser.add_argument("--codes", type=int, default=256, help="Codes per level, a power of two (faiss counts bits).")
    parser.add_argument("--measure", nargs=2, metavar=("ENGINE", "FILE"), help=argparse.SUPPRESS)
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    if options.codes & (options.codes - 1):
        parser.error(f"--codes is {options.codes}, which is no power of two: faiss counts bits.")
    if options.measure:
        engine, path = options.measure
        return print(json.dumps(measure(engine, Path(path), options.levels, options.codes)))
    sizes = sorted(options.sizes or ([10_000] if options.quick else [100_000, 1_000_000]))
    before = environment()
    measured: dict[str, Any] = {}
    ratios: dict[str, float] = {}
    for size in sizes:
        measured[str(size)], found = compare(size, options)
        ratios |= found
    for name, value in ratios.items():
        print(f"{name}: {value}")
    settings = {name: getattr(options, name) for name in ("dimension", "levels", "codes")}
    for written in report("quantization", {"settings": settings, "measured": measured}, ratios, before, options):
        print(written)


if __name__ == "__main__":
    main()

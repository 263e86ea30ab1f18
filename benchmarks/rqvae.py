"""RQ-VAE on many vectors: seconds to fit and encode, use of the codes, and its error, against residual k-means.

    python benchmarks/rqvae.py [--items 100000] [--dimension 384] [--quick] [--json FILE]

The vectors are `benchmarks/quantization.py`'s mixture of clusters; both engines have 3 x 256 codes, their defaults and
the same vectors. The error is the mean squared distance of a vector to what its code decodes to, on the vectors that
were fitted. An RQ-VAE is not expected to win on time: the question is whether it takes minutes or hours.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

# Threads that wait by spinning stop those that work where there are fewer free cores than threads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
from environment import add_flags, environment, report
from quantization import synthesise

from llmrec.quantization import ResidualKMeans
from llmrec.quantization.rqvae import RQVAE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=100_000, help="Vectors.")
    parser.add_argument("--dimension", type=int, default=384, help="Their width.")
    add_flags(parser)
    options = parser.parse_args()
    if options.quick:
        options.items, options.dimension = 5_000, 64
    before = environment()
    with tempfile.TemporaryDirectory() as folder:
        synthesise(options.items, options.dimension, Path(folder) / "vectors.npy")
        vectors = np.load(Path(folder) / "vectors.npy")
    engines = {"rkmeans": ResidualKMeans(3, 256), "rqvae": RQVAE(3, 256, epochs=4 if options.quick else None)}
    found = {name: measure(engine, vectors) for name, engine in engines.items()}
    for name, row in found.items():
        used = ", ".join(f"{share:.1%}" for share in row["used_share"])
        seconds = f"fit {row['fit_seconds']:7.1f} s, encode {row['encode_seconds']:5.1f} s"
        print(f"{name:8} {seconds}, used {used}; error {row['error']:.4f}")
    ours, rival = found["rqvae"], found["rkmeans"]
    ratios = {
        "rqvae over rkmeans, seconds of the fit": round(ours["fit_seconds"] / rival["fit_seconds"], 2),
        "rqvae over rkmeans, mean squared error": round(ours["error"] / rival["error"], 4),
    }
    told = {"items": options.items, "dimension": options.dimension, "codes": "3 x 256"}
    report("rqvae", {"options": told, "engines": found, "ratios": ratios}, ratios, before, options)


def measure(engine: Any, vectors: np.ndarray) -> dict[str, Any]:
    begin = time.perf_counter()
    engine.fit(vectors)
    fitted = time.perf_counter()
    codes = engine.encode(vectors)
    encoded = time.perf_counter()
    sizes = engine.codebook_sizes
    return {
        "fit_seconds": round(fitted - begin, 2),
        "encode_seconds": round(encoded - fitted, 2),
        "used_share": [len(np.unique(level)) / size for level, size in zip(codes.T, sizes, strict=True)],
        "unique_codes": len(np.unique(codes, axis=0)),
        "error": float(((vectors - engine.decode(codes)) ** 2).sum(axis=1, dtype=np.float64).mean()),
    }


if __name__ == "__main__":
    main()

"""Hashes that are the same on every machine and in every process, unlike Python's own."""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt


def hash_ids(item_ids: Sequence[str], num_hashes: int, seed: int = 0) -> npt.NDArray[np.uint64]:
    """Item ids (N,) -> (N, num_hashes), independent 64-bit hashes of the id alone.

    Args:
        item_ids: any strings, also ones that are no valid Unicode.
        num_hashes: 1..8, which BLAKE2b's digest has room for.
        seed: 64 bits; another seed gives other hashes.
    """
    key = seed.to_bytes(8, "little", signed=True)
    digests = b"".join(
        hashlib.blake2b(str(item).encode("utf-8", "surrogatepass"), digest_size=8 * num_hashes, key=key).digest()
        for item in item_ids
    )
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64).reshape(len(item_ids), num_hashes)


def hash_codes(codes: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
    """Rows of integers (N, L) -> (N,), a 64-bit hash of each row in its order."""
    hashes = np.zeros(len(codes), dtype=np.uint64)
    for column in codes.T:
        hashes = _mixed(hashes + column.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return hashes


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64's finalizer (Steele, Lea, Flood 2014): a bijection that spreads every bit over all."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        words = (words ^ (words >> np.uint64(shift))) * np.uint64(factor)
    return np.asarray(words ^ (words >> np.uint64(31)), dtype=np.uint64)

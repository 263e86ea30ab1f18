"""The control: codes without meaning, the same for the same item and otherwise uniform over the code space."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import check_codes, check_positive, fitting_size, load_quantizer, save_quantizer
from llmrec.quantization.nearest import check_matrix, chunks


class HashedCodes:
    """Codes that are a seeded hash of an item's id or of its embedding's bits: what a tokenizer has to beat.

    `encode_ids` is the control to compare with: items of equal embeddings get different codes there. `encode` keeps
    the Quantizer protocol, without ids, by hashing the numbers of a row; equal rows share a code, and rows that differ
    in one bit have codes as different as any.

    A hash knows nothing of what it has not seen, so the best point for every code is the catalog's mean embedding,
    and `decode` gives it: the distortion is the catalog's variance, moving an item from one code to another costs
    nothing, and `encode(decode(codes))` is not `codes`.

    Attributes:
        ordered: False, no level refines another.
        num_levels: L.
        codebook_size: K, the codes asked for per level; min(K, N) are used.
        seed: another seed deals other codes.
        mean: (D,) float64, of the embeddings `fit` saw.
    """

    ordered: ClassVar[bool] = False

    def __init__(self, num_levels: int = 3, codebook_size: int = 256, seed: int = 0) -> None:
        check_positive(num_levels=num_levels, codebook_size=codebook_size)
        if not -(2**63) <= seed < 2**63:
            raise TokenizerError(f"The seed {seed} does not fit into 64 bits. Use a smaller one.")
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.seed = seed
        self.mean: npt.NDArray[np.float64] = np.empty(0)
        self._size = 0

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K of every level; raises TokenizerError before `fit`."""
        return (self._fitted(),) * self.num_levels

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Takes the number of items and their mean; raises TokenizerError for an empty matrix, NaN or infinity."""
        matrix = check_matrix(embeddings)
        self._size = fitting_size(self.codebook_size, len(matrix))
        self.mean = matrix.mean(axis=0, dtype=np.float64)
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L), a hash of every row's numbers; float32 and float64 of equal value hash alike.

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        self._fitted()
        matrix = check_matrix(embeddings, len(self.mean))
        generator = np.random.default_rng(self.seed % 2**64)
        keys = generator.integers(0, 2**64, size=matrix.shape[1], dtype=np.uint64)
        hashes = np.empty(len(matrix), dtype=np.uint64)
        for rows in chunks(len(matrix)):
            # Adding 0 turns -0 into 0, which is equal to it.
            words = np.ascontiguousarray(matrix[rows].astype(np.float64) + 0.0).view(np.uint64)
            hashes[rows] = _mixed(words + keys).sum(axis=1, dtype=np.uint64)
        return self._codes(hashes)

    def encode_ids(self, item_ids: Sequence[str]) -> npt.NDArray[np.int32]:
        """Item ids (N,) -> (N, L), a hash of the id alone, the same on every machine and in every catalog.

        Raises:
            TokenizerError: before `fit`.
        """
        self._fitted()
        key = self.seed.to_bytes(8, "little", signed=True)
        digests = b"".join(
            hashlib.blake2b(str(item).encode("utf-8", "surrogatepass"), digest_size=8, key=key).digest()
            for item in item_ids
        )
        return self._codes(np.frombuffer(digests, dtype="<u8").astype(np.uint64))

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), for every code the mean of the catalog; raises TokenizerError for foreign codes."""
        codes = check_codes(codes, self.codebook_sizes)
        return np.tile(self.mean.astype(np.float32), (len(codes), 1))

    def level_points(self, level: int) -> npt.NDArray[np.float64]:
        """(K_l, D): `decode` is the sum of these over the levels; raises TokenizerError before `fit`."""
        return np.tile(self.mean * (level == 0), (self._fitted(), 1))

    def save(self, folder: str | Path) -> None:
        """Writes codebooks.safetensors and quantizer.json into `folder`; raises TokenizerError before `fit`."""
        manifest = {
            "quantizer": "hashed",
            "num_levels": self.num_levels,
            "codebook_size": self.codebook_size,
            "seed": self.seed,
            "size": self._fitted(),
        }
        save_quantizer(folder, manifest, {"mean": self.mean})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, unreadable or of another quantizer."""
        settings, tensors = load_quantizer(folder, "hashed")
        try:
            size = settings.pop("size")
            quantizer = cls(**settings)
            if not 1 <= size <= quantizer.codebook_size or tensors["mean"].ndim != 1:
                raise ValueError(f"{size} codes of {quantizer.codebook_size}, mean {tensors['mean'].shape}")
            quantizer._size, quantizer.mean = size, tensors["mean"]
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no whole hashed quantizer ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _fitted(self) -> int:
        if not self._size:
            raise TokenizerError("The quantizer has no codebooks yet. Call fit, or load one with from_pretrained.")
        return self._size

    def _codes(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
        """(N,) hashes -> (N, L): one more round of mixing per level, of which the upper half is scaled to 0..K - 1."""
        codes = np.empty((len(hashes), self.num_levels), dtype=np.int32)
        for level in range(self.num_levels):
            # The steps of splitmix64, whose increment is odd and so visits every state.
            mixed = _mixed(hashes + np.uint64((level + 1) * 0x9E3779B97F4A7C15 % 2**64))
            codes[:, level] = (mixed >> np.uint64(32)) * np.uint64(self._size) >> np.uint64(32)
        return codes


def _mixed(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finalizer of splitmix64 (Steele, Lea, Flood 2014, "Fast Splittable Pseudorandom Number Generators"): a
    bijection in which every bit of the input turns about half of the output's."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(words ^ (words >> np.uint64(31)), dtype=np.uint64)

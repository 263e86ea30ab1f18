"""Product quantisation: the embedding is cut into sub-vectors, each with a codebook of its own; optionally rotated."""

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import (
    ITEMS_PER_CENTROID,
    check_codes,
    check_positive,
    fitting_size,
    load_quantizer,
    means_of,
    require_fitted,
    sampled_rows,
    save_quantizer,
)
from llmrec.quantization.nearest import check_matrix, chunks, nearest

# Lloyd iterations after each new rotation, which begin at the centroids before it.
ITERATIONS_PER_ROTATION = 2


class ProductQuantizer:
    """Product quantisation (PQ), by default in an optimised rotation (OPQ).

    The centred embedding is rotated and cut into L consecutive sub-vectors; code l is the nearest of K_l centroids of
    sub-vector l. The squared errors of the sub-vectors add up, so the code is the nearest of all K_1 ⋯ K_L points.

    The rotation is that of non-parametric OPQ: given the points, the orthogonal matrix that brings the items nearest
    to them (Procrustes), then centroids again, in turns. It begins at the better of no rotation and the parametric
    solution (principal components, dealt out so that the products of their variances are alike), and the best of all
    rounds is kept: on the items that it learns from, the error is never above that of plain PQ of the same seed.

    `encode(decode(codes))` gives back codes that `encode` gave, as long as a sub-space's centroids lie further apart
    than the float32 in which points come back resolves.

    No code refines another, and there is no first one: a model may predict all L at once, or in any order, as RPG and
    REG4Rec do. `ordered` says so; `as_tokens` spells a code as a set of tokens, `from_tokens` reads such a set in
    whatever order, and `unordered_scores` ranks the items of a catalog by L independent predictions. A trie needs some
    fixed order: that of the columns is as good as another.

    Attributes:
        ordered: False, the levels are exchangeable.
        num_levels: L.
        codebook_size: K, the codes asked for per sub-space.
        rotate: OPQ rather than PQ.
        niter: Lloyd iterations per sub-space, at the beginning and at the end.
        rounds: rotations that are tried.
        seed: of the items learnt from and the first centroids; sub-space l uses seed + l.
        mean: (D,) float64, subtracted first.
        rotation: (D, D) float64, orthogonal; the identity without `rotate`.
        codebooks: L arrays (K_l, D_l) float32, empty before `fit`; K_l is min(K, N), the D_l differ by at most 1.

    A sub-space learns from at most 256 K items. The same embeddings, settings and machine give the same codebooks.

    Sources: Jégou, Douze, Schmid, "Product Quantization for Nearest Neighbor Search" (IEEE TPAMI 2011); Ge, He, Ke,
    Sun, "Optimized Product Quantization" (IEEE TPAMI 2014), sections 3.2 and 3.3; as unordered semantic IDs: RPG, Hou
    et al., "Generating Long Semantic IDs in Parallel for Recommendation" (KDD 2025), arXiv 2506.05781.
    """

    ordered: ClassVar[bool] = False

    def __init__(
        self,
        num_levels: int = 4,
        codebook_size: int = 256,
        rotate: bool = True,
        niter: int = 25,
        rounds: int = 10,
        seed: int = 0,
    ) -> None:
        check_positive(num_levels=num_levels, codebook_size=codebook_size, niter=niter, rounds=rounds)
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.rotate = rotate
        self.niter = niter
        self.rounds = rounds
        self.seed = seed
        self.mean: npt.NDArray[np.float64] = np.empty(0)
        self.rotation: npt.NDArray[np.float64] = np.empty((0, 0))
        self.codebooks: tuple[npt.NDArray[np.float32], ...] = ()

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l of every sub-space; raises TokenizerError before `fit`."""
        return tuple(len(codebook) for codebook in self._fitted())

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Fits rotation and codebooks on (N, D).

        Raises:
            TokenizerError: if the embeddings are empty, hold NaN or infinity, or are narrower than L.
        """
        matrix = check_matrix(embeddings)
        if matrix.shape[1] < self.num_levels:
            raise TokenizerError(
                f"Embeddings {matrix.shape[1]} wide cannot be cut into {self.num_levels} sub-vectors. "
                "Ask for fewer levels."
            )
        size = fitting_size(self.codebook_size, len(matrix))
        self.mean = matrix.mean(axis=0, dtype=np.float64)
        rows = sampled_rows(len(matrix), ITEMS_PER_CENTROID * size, self.seed)
        sample = (matrix[rows] - self.mean).astype(np.float32)
        best = self._trained(sample, np.eye(matrix.shape[1]), size, self.niter)
        if self.rotate:
            best = min(
                best,
                self._trained(sample, self._balanced(sample), size, self.niter),
                key=lambda attempt: attempt.error,
            )
            attempt = best
            for _ in range(self.rounds):
                # X R' ≈ Y: with X'Y = U S V', R' is U V'.
                left, _, right = np.linalg.svd(sample.astype(np.float64).T @ attempt.points)
                rotation = (left @ right).T
                attempt = self._trained(sample, rotation, size, ITERATIONS_PER_ROTATION, attempt.codebooks)
                best = min(best, attempt, key=lambda candidate: candidate.error)
            polished = self._trained(sample, best.rotation, size, self.niter, best.codebooks)
            best = min(best, polished, key=lambda candidate: candidate.error)
        self.rotation, self.codebooks = best.rotation, best.codebooks
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L): in each sub-space the nearest centroid, of equally near ones the lowest code.

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        codebooks = self._fitted()
        matrix = check_matrix(embeddings, len(self.mean))
        codes = np.empty((len(matrix), len(codebooks)), dtype=np.int32)
        for rows in chunks(len(matrix)):
            rotated = (matrix[rows] - self.mean) @ self.rotation.T
            for level, (codebook, columns) in enumerate(zip(codebooks, self._columns(len(self.mean)), strict=True)):
                codes[rows, level] = nearest(rotated[:, columns], codebook)
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), the centroids beside each other, rotated back; raises TokenizerError for foreign codes."""
        codebooks = self._fitted()
        codes = check_codes(codes, self.codebook_sizes)
        points = np.empty((len(codes), len(self.mean)), dtype=np.float32)
        for rows in chunks(len(codes)):
            parts = [codebook[codes[rows, level]] for level, codebook in enumerate(codebooks)]
            points[rows] = np.concatenate(parts, axis=1).astype(np.float64) @ self.rotation + self.mean
        return points

    def level_points(self, level: int) -> npt.NDArray[np.float64]:
        """(K_l, D): `decode` is the sum of these over the levels; raises TokenizerError before `fit`."""
        codebook = self._fitted()[level].astype(np.float64)
        points = codebook @ self.rotation[self._columns(len(self.mean))[level]]
        return np.asarray(points + self.mean if level == 0 else points)

    def as_tokens(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
        """(N, L) codes -> (N, L) tokens of one vocabulary of K_1 + … + K_L, in which a token tells its sub-space.

        >>> quantizer = ProductQuantizer(2, 3, rotate=False).fit(np.eye(3))
        >>> quantizer.as_tokens(np.array([[2, 0], [1, 2]])).tolist()
        [[2, 3], [1, 5]]
        """
        return check_codes(codes, self.codebook_sizes).astype(np.int64) + self._offsets()

    def from_tokens(self, tokens: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
        """(N, L) tokens, each row in any order -> (N, L) codes.

        Raises:
            TokenizerError: if a row does not hold exactly one token of every sub-space.
        """
        # Sub-spaces follow one another in the vocabulary, so the sorted tokens of a whole set are in their order.
        ascending = np.sort(np.atleast_2d(tokens), axis=1)
        try:
            return check_codes(ascending - self._offsets(), self.codebook_sizes)
        except ValueError as error:
            raise TokenizerError(
                f"Not every row of tokens holds one of each of {len(self.codebooks)} sub-spaces. "
                "Give the tokens that as_tokens gives, in any order."
            ) from error

    def save(self, folder: str | Path) -> None:
        """Writes codebooks.safetensors and quantizer.json into `folder`; raises TokenizerError before `fit`."""
        tensors = {f"level_{level}": codebook for level, codebook in enumerate(self._fitted())}
        settings = ("num_levels", "codebook_size", "rotate", "niter", "rounds", "seed")
        save_quantizer(
            folder,
            {"quantizer": "product", **{name: getattr(self, name) for name in settings}},
            {**tensors, "mean": self.mean, "rotation": self.rotation},
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, unreadable or of another quantizer."""
        settings, tensors = load_quantizer(folder, "product")
        try:
            quantizer = cls(**settings)
            quantizer.mean, quantizer.rotation = tensors["mean"], tensors["rotation"]
            quantizer.codebooks = tuple(tensors[f"level_{level}"] for level in range(quantizer.num_levels))
            columns = quantizer._columns(len(quantizer.mean))
            shapes = [codebook.shape[1:] for codebook in quantizer.codebooks]
            if quantizer.rotation.shape != (len(quantizer.mean),) * 2 or shapes != [(len(c),) for c in columns]:
                raise ValueError(f"codebooks of widths {shapes} for embeddings {len(quantizer.mean)} wide")
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no whole product quantizer ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _fitted(self) -> tuple[npt.NDArray[np.float32], ...]:
        return require_fitted(self.codebooks)

    def _offsets(self) -> npt.NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(self.codebook_sizes)[:-1]]).astype(np.int64)

    def _columns(self, width: int) -> list[npt.NDArray[np.int64]]:
        return [np.asarray(columns) for columns in np.array_split(np.arange(width), self.num_levels)]

    def _balanced(self, sample: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
        """The parametric solution: each principal direction goes to the sub-space, among those with room, whose
        product of variances is least, the first of equals."""
        wide = sample.astype(np.float64)
        variances, directions = np.linalg.eigh(np.asarray(wide.T @ wide / len(wide), dtype=np.float64))
        # Floored and divided by the floor, no factor makes a product smaller.
        floor = max(float(variances[-1]) * 1e-9, float(np.finfo(np.float64).tiny))
        gains = np.log(np.maximum(variances, floor) / floor)
        room = np.array([len(columns) for columns in self._columns(sample.shape[1])])
        products = np.zeros(self.num_levels)
        chosen: list[list[int]] = [[] for _ in room]
        for direction in range(len(gains) - 1, -1, -1):
            level = int(np.where(room > 0, products, np.inf).argmin())
            chosen[level].append(direction)
            products[level] += gains[direction]
            room[level] -= 1
        return np.ascontiguousarray(directions[:, np.concatenate(chosen).astype(np.int64)].T)

    def _trained(
        self,
        sample: npt.NDArray[np.float32],
        rotation: npt.NDArray[np.float64],
        size: int,
        niter: int,
        initial: Sequence[npt.NDArray[np.float32]] | None = None,
    ) -> "Attempt":
        """K-means in every sub-space of the rotated sample, from the centroids `initial` if given."""
        import faiss

        rotated = (sample @ rotation.T).astype(np.float32)
        points = np.empty(rotated.shape, dtype=np.float64)
        codebooks = []
        for level, columns in enumerate(self._columns(sample.shape[1])):
            part = np.ascontiguousarray(rotated[:, columns])
            kmeans = faiss.Kmeans(
                len(columns),
                size,
                niter=niter,
                seed=self.seed + level,
                min_points_per_centroid=1,
                max_points_per_centroid=len(part),
            )
            kmeans.train(part, init_centroids=None if initial is None else initial[level])
            codebook = np.array(kmeans.centroids, dtype=np.float32).reshape(size, len(columns))
            chosen = kmeans.assign(part)[1]
            # Faiss splits large clusters to fill empty ones and leaves both halves a little off their means.
            codebook = means_of(part, chosen, codebook).astype(np.float32)
            points[:, columns] = codebook[chosen]
            codebooks.append(codebook)
        return Attempt(float(((rotated - points) ** 2).sum()), rotation, tuple(codebooks), points)


class Attempt(NamedTuple):
    """A rotation with the codebooks learnt in it: the sample's squared error and its points (n, D), still rotated."""

    error: float
    rotation: npt.NDArray[np.float64]
    codebooks: tuple[npt.NDArray[np.float32], ...]
    points: npt.NDArray[np.float64]


def unordered_scores(
    log_probabilities: Sequence[npt.NDArray[np.floating]], codes: npt.NDArray[np.integer]
) -> npt.NDArray[np.float64]:
    """The items' log-probabilities when all sub-spaces are predicted at once and independently of each other.

    Exact, where RPG searches a graph. Call it for as many requests at a time as a (B, N) matrix has room.

    Args:
        log_probabilities: per sub-space (B, K_l), whatever the model gives.
        codes: (N, L) of the catalog.

    Returns:
        (B, N): for each item the sum over l of the log-probability of its code l, as RPG scores an item.

    Raises:
        TokenizerError: if codes do not fit the predictions.

    >>> unordered_scores([np.array([[-1.0, -2.0]]), np.array([[-4.0, -8.0]])], np.array([[0, 1], [1, 0]])).tolist()
    [[-9.0, -6.0]]
    """
    codes = check_codes(codes, [level.shape[1] for level in log_probabilities])
    scores = np.zeros((len(log_probabilities[0]), len(codes)))
    for level, predicted in enumerate(log_probabilities):
        scores += predicted[:, codes[:, level]]
    return scores

"""Finite scalar quantisation: principal components, each rounded to a few levels; a code is their combination."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Literal, Self, get_args

import numpy as np
import numpy.typing as npt

from llmrec.embedding.reduction import fix_signs
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import (
    check_codes,
    check_positive,
    load_quantizer,
    require_fitted,
    save_quantizer,
)
from llmrec.quantization.nearest import check_matrix, chunks

logger = logging.getLogger(__name__)

Layout = Literal["slices", "components"]
Bound = Literal["quantiles", "tanh"]

# Components whose variance is below this share of the largest are rounding noise.
NOISE, TINY = 1e-10, float(np.finfo(np.float64).tiny)


class ScalarQuantizer:
    """Finite scalar quantisation (FSQ) without gradient training, in RecGPT's product layout.

    The embedding becomes `num_levels` groups of len(levels) numbers. Number d is rounded to one of levels[d] steps;
    the steps of a group, read as digits of which the first counts least, are one code below the product of the levels.
    RecGPT's layout are 4 groups of 8 · 8 · 8 · 6 · 5 = 15,360 codes; `ScalarQuantizer(L, (K,))` rounds L numbers to K
    steps each.

    What learnt linear layers do in FSQ is done in closed form here:

    - projection in: centring, principal components, division by their standard deviations. "slices" cuts the embedding
      into consecutive sub-vectors of equal width, each with its own first components, as RecGPT does; with `shared`,
      all sub-vectors have one mean, one projection and one set of steps, so that one vocabulary serves all groups and
      a code means the same in each, as in RecGPT, too. "components" takes the first components of the whole embedding
      and deals them out, so that groups differ little in variance: better where the embedding's columns have an order,
      as after PCA.
    - bound and steps: "quantiles" bounds by the data's distribution function, so that every step of every number is
      taken by equally many items, up to ties; "tanh" bounds by tanh and cuts (-1, 1) into equal steps.
    - projection out: the pseudo-inverse, applied to the mean of the data inside each step. An empty step stands for
      its middle under "tanh"; under "quantiles" it is never taken and stands for its lower edge.

    `encode(decode(codes))` gives back codes that `encode` gave, as long as float32 resolves the steps' widths.

    With fewer items than codes in a group, the largest of the levels, of equals the last, is lowered by one until the
    product is at most N, with a warning.

    Attributes:
        ordered: False, no group refines another.
        num_levels: L, the groups.
        levels: as asked for.
        layout, bound, shared: see above.
        steps: the levels after lowering, empty before `fit`.
        mean: (D,) float64.
        projection: (D, L · len(levels)) float64, with the division by the standard deviations in it.
        inverse: (L · len(levels), D) float64, its pseudo-inverse.
        edges: (L · len(levels), max steps - 1) float64, ascending; a number takes the step that counts the edges at or
            below it. Unused places hold the largest float64.
        points: (L · len(levels), max steps) float64, what each step stands for.

    Nothing is drawn: the same embeddings give the same codes, without a seed.

    Sources: Mentzer, Minnen, Agustsson, Tschannen, "Finite Scalar Quantization: VQ-VAE Made Simple" (ICLR 2024), arXiv
    2309.15505, section 3; the layout: RecGPT (EMNLP 2025), arXiv 2506.06270. FSQ rounds a bounded number, which leaves
    half steps at both ends and, for even levels, shifts the tanh; without a trained encoder that leaves end steps
    empty, so all steps have equal width here.
    """

    ordered: ClassVar[bool] = False

    def __init__(
        self,
        num_levels: int = 4,
        levels: Sequence[int] = (8, 8, 8, 6, 5),
        layout: Layout = "slices",
        bound: Bound = "quantiles",
        shared: bool = False,
    ) -> None:
        self.levels = tuple(int(level) for level in levels)
        check_positive(num_levels=num_levels, **{f"levels[{d}]": level for d, level in enumerate(self.levels)})
        if not self.levels or _product(self.levels) >= 2**31:
            raise TokenizerError(f"Levels {self.levels} do not give 1 to 2^31 - 1 codes. Use some of about 3 to 8.")
        for name, value, allowed in (("layout", layout, get_args(Layout)), ("bound", bound, get_args(Bound))):
            if value not in allowed:
                raise TokenizerError(f"There is no {name} {value!r}. Use one of {', '.join(allowed)}.")
        if shared and layout != "slices":
            raise TokenizerError(f"Groups of the layout {layout!r} cannot share a vocabulary. Use 'slices'.")
        self.num_levels = num_levels
        self.layout: Layout = layout
        self.bound: Bound = bound
        self.shared = shared
        self.steps: tuple[int, ...] = ()
        self.mean: npt.NDArray[np.float64] = np.empty(0)
        self.projection: npt.NDArray[np.float64] = np.empty((0, 0))
        self.inverse: npt.NDArray[np.float64] = np.empty((0, 0))
        self.edges: npt.NDArray[np.float64] = np.empty((0, 0))
        self.points: npt.NDArray[np.float64] = np.empty((0, 0))

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """The product of the steps, for every group; raises TokenizerError before `fit`."""
        return (_product(self._fitted()),) * self.num_levels

    def fit(self, embeddings: npt.NDArray[np.floating]) -> Self:
        """Fits projection and steps on (N, D).

        Raises:
            TokenizerError: if the embeddings are empty, hold NaN or infinity, are too narrow for the levels, or are to
                be cut into shared slices and L does not divide D.
        """
        matrix = check_matrix(embeddings)
        self._check_width(matrix.shape[1])
        steps = _lowered(self.levels, len(matrix))
        if steps != self.levels:
            logger.warning(
                "%d items: the levels are %s with %d codes, not %s with %d.",
                len(matrix),
                steps,
                _product(steps),
                self.levels,
                _product(self.levels),
            )
        self._project(matrix)
        numbers = np.concatenate([self._numbers(matrix[rows]) for rows in chunks(len(matrix))])
        width = len(self.levels)
        edges: npt.NDArray[np.float64] = np.full(
            (self.num_levels * width, max(max(steps) - 1, 1)), np.finfo(np.float64).max
        )
        points: npt.NDArray[np.float64] = np.zeros((self.num_levels * width, max(steps)))
        for place in range(width if self.shared else self.num_levels * width):
            values = numbers[:, place::width].reshape(-1) if self.shared else numbers[:, place]
            count = steps[place % width]
            places = slice(place, None, width) if self.shared else slice(place, place + 1)
            cuts = _quantile_edges(values, count) if self.bound == "quantiles" else _tanh_edges(count)
            edges[places, : count - 1] = cuts
            points[places, :count] = _means(values, cuts, self.bound)
        self.edges, self.points, self.steps = edges, points, steps
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L).

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        basis = self._basis()
        matrix = check_matrix(embeddings, len(self.mean))
        codes = np.zeros((len(matrix), self.num_levels), dtype=np.int32)
        for rows in chunks(len(matrix)):
            numbers = self._numbers(matrix[rows])
            for place, cuts in enumerate(self.edges):
                group, digit = divmod(place, len(basis))
                taken = np.searchsorted(cuts[: self.steps[digit] - 1], numbers[:, place], side="right")
                codes[rows, group] += (basis[digit] * taken).astype(np.int32)
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), the steps' means projected back; raises TokenizerError for codes out of range."""
        basis = self._basis()
        codes = check_codes(codes, self.codebook_sizes)
        result = np.empty((len(codes), len(self.mean)), dtype=np.float32)
        for rows in chunks(len(codes)):
            digits = codes[rows, :, None] // basis % np.array(self.steps)  # (n, L, numbers)
            digits = digits.reshape(len(digits), -1)
            numbers = self.points[np.arange(digits.shape[1]), digits]
            result[rows] = numbers @ self.inverse + self.mean
        return result

    def level_points(self, level: int) -> npt.NDArray[np.float64]:
        """(K_l, D): `decode` is the sum of these over the levels; raises TokenizerError before `fit`."""
        basis = self._basis()
        digits = np.arange(self.codebook_sizes[level])[:, None] // basis % np.array(self.steps)
        places = np.arange(level * len(basis), (level + 1) * len(basis))
        points = self.points[places, digits] @ self.inverse[places]
        return np.asarray(points + self.mean if level == 0 else points)

    def save(self, folder: str | Path) -> None:
        """Writes codebooks.safetensors and quantizer.json into `folder`; raises TokenizerError before `fit`."""
        manifest = {
            "quantizer": "scalar",
            "num_levels": self.num_levels,
            "levels": list(self.levels),
            "layout": self.layout,
            "bound": self.bound,
            "shared": self.shared,
            "steps": list(self._fitted()),
        }
        names = ("mean", "projection", "inverse", "edges", "points")
        save_quantizer(folder, manifest, {name: getattr(self, name) for name in names})

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, unreadable or of another quantizer."""
        settings, tensors = load_quantizer(folder, "scalar")
        try:
            steps = tuple(settings.pop("steps"))
            quantizer = cls(**settings)
            width, numbers = len(tensors["mean"]), quantizer.num_levels * len(quantizer.levels)
            shapes = {
                "mean": (width,),
                "projection": (width, numbers),
                "inverse": (numbers, width),
                "edges": (numbers, max(max(steps) - 1, 1)),
                "points": (numbers, max(steps)),
            }
            found = {name: tensors[name].shape for name in shapes}
            if found != shapes or len(steps) != len(quantizer.levels) or min(steps) < 1:
                raise ValueError(f"steps {steps} with tensors of {found}")
            quantizer.steps = steps
            for name in shapes:
                setattr(quantizer, name, tensors[name])
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no whole scalar quantizer ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _fitted(self) -> tuple[int, ...]:
        require_fitted((self.mean,) if self.steps else ())
        return self.steps

    def _basis(self) -> npt.NDArray[np.int64]:
        """The value of each digit of a code."""
        return np.concatenate([[1], np.cumprod(self._fitted()[:-1])]).astype(np.int64)

    def _check_width(self, width: int) -> None:
        numbers = len(self.levels)
        if self.layout == "components":
            if width < self.num_levels * numbers:
                raise TokenizerError(
                    f"Embeddings {width} wide do not have {self.num_levels} x {numbers} components. "
                    "Ask for fewer levels or groups."
                )
        elif width // self.num_levels < numbers:
            raise TokenizerError(
                f"Embeddings {width} wide in {self.num_levels} slices do not have {numbers} components each. "
                "Ask for fewer levels or groups."
            )
        elif self.shared and width % self.num_levels:
            raise TokenizerError(
                f"Embeddings {width} wide cannot be cut into {self.num_levels} slices of one width. "
                "Ask for a number of groups that divides it, or do not share the vocabulary."
            )

    def _project(self, matrix: npt.NDArray[np.floating]) -> None:
        """Sets mean, projection and inverse."""
        width, numbers = matrix.shape[1], len(self.levels)
        total = self.num_levels * numbers
        mean = matrix.mean(axis=0, dtype=np.float64)
        if self.shared:
            mean = np.tile(mean.reshape(self.num_levels, -1).mean(axis=0), self.num_levels)
        covariance: npt.NDArray[np.float64] = np.zeros((width, width))
        for rows in chunks(len(matrix)):
            centred = matrix[rows] - mean
            covariance += centred.T @ centred
        covariance /= len(matrix)
        # Which columns of the embedding a group reads, and which of their components it takes, the largest first.
        if self.layout == "components":
            dealt = [np.arange(group, total, self.num_levels) for group in range(self.num_levels)]
            groups = [(np.arange(width), taken) for taken in dealt]
        else:
            slices = np.array_split(np.arange(width), self.num_levels)
            groups = [(np.asarray(columns), np.arange(numbers)) for columns in slices]
        if self.shared:
            # The sub-vectors of all groups stacked have the mean of the groups' covariances.
            common = sum(covariance[np.ix_(columns, columns)] for columns, _ in groups) / self.num_levels
            for columns, _ in groups:
                covariance[np.ix_(columns, columns)] = common
        projection, inverse = np.zeros((width, total)), np.zeros((total, width))
        # One decomposition serves groups that read the same columns, or share theirs.
        solved: tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]] | None = None
        for group, (columns, taken) in enumerate(groups):
            if solved is None or not (self.shared or self.layout == "components"):
                solved = _components(covariance[np.ix_(columns, columns)])
            deviations, directions = solved
            places = np.arange(group * numbers, (group + 1) * numbers)
            kept, scale = directions[:, taken], deviations[taken]
            projection[np.ix_(columns, places)] = kept * np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0)
            inverse[np.ix_(places, columns)] = (kept * scale).T
        self.mean, self.projection, self.inverse = mean, projection, inverse

    def _numbers(self, block: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
        """(n, D) -> (n, L · len(levels)), of variance 1 each on the data of `fit`."""
        return np.asarray((block - self.mean) @ self.projection, dtype=np.float64)


def _components(covariance: npt.NDArray[np.float64]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Standard deviations, descending, 0 where they are noise, and directions in columns with fixed signs."""
    variances, directions = np.linalg.eigh(covariance)
    variances, directions = variances[::-1], directions[:, ::-1]
    variances = np.where(variances > NOISE * max(float(variances[0]), TINY), variances, 0)
    return np.sqrt(variances), np.asarray(fix_signs(directions), dtype=np.float64)


def _product(levels: Sequence[int]) -> int:
    result = 1
    for level in levels:
        result *= level
    return result


def _lowered(levels: Sequence[int], items: int) -> tuple[int, ...]:
    """The levels, of which the largest, the last of equals, loses one until their product is at most `items`.

    >>> _lowered((8, 8, 8, 6, 5), 12000), _lowered((3, 2), 1)
    ((8, 7, 7, 6, 5), (1, 1))
    """
    steps = list(levels)
    while _product(steps) > items:
        last = len(steps) - 1 - steps[::-1].index(max(steps))
        steps[last] -= 1
    return tuple(steps)


def _quantile_edges(values: npt.NDArray[np.float64], steps: int) -> npt.NDArray[np.float64]:
    """The steps - 1 edges that leave as many values in every step, between values rather than on one.

    Equal values stay together, in the lower step; an edge above all values is the largest float64.

    >>> _quantile_edges(np.array([4.0, 1.0, 2.0, 3.0]), 2).tolist()
    [2.5]
    """
    ascending = np.sort(values)
    below = ascending[np.maximum(np.arange(1, steps) * len(values) // steps, 1) - 1]
    after = np.searchsorted(ascending, below, side="right")
    above = np.append(ascending, np.finfo(np.float64).max)[after]
    return np.where(after < len(ascending), below / 2 + above / 2, above)


def _tanh_edges(steps: int) -> npt.NDArray[np.float64]:
    """The numbers whose tanh cuts (-1, 1) into equal steps."""
    return np.arctanh(2 * np.arange(1, steps) / steps - 1)


def _means(values: npt.NDArray[np.float64], edges: npt.NDArray[np.float64], bound: Bound) -> npt.NDArray[np.float64]:
    """What each step stands for: the mean of its values, and if it has none what the class says."""
    steps = len(edges) + 1
    taken = np.searchsorted(edges, values, side="right")
    counts = np.bincount(taken, minlength=steps)
    sums = np.bincount(taken, weights=values, minlength=steps)
    if bound == "tanh":
        empty = np.arctanh((2 * np.arange(steps) + 1) / steps - 1)
    else:
        empty = np.clip(np.concatenate([values.min(keepdims=True), edges]), values.min(), values.max())
    return np.where(counts > 0, sums / np.maximum(counts, 1), empty)

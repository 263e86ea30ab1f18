"""One level of an RQ-VAE: its codes, who is nearest, how they learn, and the two ways a gradient passes the choice."""

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Update = Literal["ema", "gradient"]
Estimator = Literal["rotation", "straight-through"]

# Below this norm a direction is rounding noise, and below this count an average is.
TINY = 1e-12


class Codebook(nn.Module):
    """K codes of width d.

    "ema" keeps moving averages of how many residuals a batch gives each code and of their sum; a code is their ratio
    (van den Oord et al. 2017, "Neural Discrete Representation Learning", appendix A.1). "gradient" leaves the codes to
    the optimiser, by the loss that `ResidualQuantizer` returns.

    Attributes:
        codes: (K, d) float32, a parameter under "gradient" and a buffer under "ema".
        counts, sums: (K,) and (K, d), the moving averages; under "gradient" they stand still.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(self, size: int, width: int, update: Update = "ema", decay: float = 0.99) -> None:
        super().__init__()
        self.decay = decay
        self.learns_by_average = update == "ema"
        if self.learns_by_average:
            self.register_buffer("codes", torch.zeros(size, width))
        else:
            self.codes = nn.Parameter(torch.zeros(size, width))
        self.register_buffer("counts", torch.zeros(size))
        self.register_buffer("sums", torch.zeros(size, width))

    def forward(self, residuals: Tensor) -> tuple[Tensor, Tensor]:
        """(B, d) -> the nearest codes' indices (B,) and points (B, d)."""
        chosen = nearest_codes(residuals, self.codes)
        return chosen, self.codes[chosen]

    @torch.no_grad()
    def place(self, residuals: Tensor, rows_per_batch: int, seed: int) -> None:
        """Puts the codes on the k-means centroids of (n, d), n >= K, and begins the averages there."""
        import faiss

        points: npt.NDArray[np.float32] = np.ascontiguousarray(residuals.cpu().numpy(), dtype=np.float32)
        size, width = self.codes.shape
        kmeans = faiss.Kmeans(
            width, size, niter=25, seed=seed, min_points_per_centroid=1, max_points_per_centroid=len(points)
        )
        kmeans.train(points)
        centroids: npt.NDArray[np.float32] = np.array(kmeans.centroids, dtype=np.float32)
        self.codes.copy_(torch.from_numpy(centroids.reshape(size, width)))
        shares = torch.bincount(nearest_codes(residuals, self.codes), minlength=size) / len(points)
        self.counts.copy_(shares * rows_per_batch)
        self.sums.copy_(self.codes * self.counts[:, None])

    @torch.no_grad()
    def average(self, residuals: Tensor, chosen: Tensor, add: Callable[[Tensor], Tensor] | None = None) -> None:
        """One step of the moving averages with a batch's residuals (B, d) and their codes (B,).

        A product with the one-hot matrix sums in a fixed order on a GPU too, where scattered additions do not. Where
        the batch is spread over processes, `add` gives a tensor's sum over them.
        """
        if not self.learns_by_average:
            return
        one_hot = nn.functional.one_hot(chosen, len(self.codes)).to(residuals.dtype)  # (B, K)
        counts, sums = one_hot.sum(dim=0), one_hot.T @ residuals
        if add is not None:
            counts, sums = add(torch.column_stack([counts, sums])).split([1, sums.shape[1]], dim=1)
            counts = counts[:, 0]
        self.counts.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.sums.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        alive = self.counts > TINY
        self.codes[alive] = self.sums[alive] / self.counts[alive, None]

    @torch.no_grad()
    def revive(self, dead: Tensor, residuals: Tensor) -> None:
        """Moves the codes of indices `dead` (m,) onto residuals (m, d) and begins their averages anew, as if a batch
        held one such residual."""
        self.codes[dead] = residuals
        self.counts[dead] = 1.0
        self.sums[dead] = residuals


def nearest_codes(vectors: Tensor, codes: Tensor) -> Tensor:
    """For each of (B, d) the nearest of (K, d) in the inputs' precision, of equally near ones the lowest index.

    >>> nearest_codes(torch.tensor([[1.0], [3.0]]), torch.tensor([[0.0], [2.0], [4.0]])).tolist()
    [0, 1]
    """
    with torch.no_grad():
        return torch.argmin(codes.square().sum(dim=1) - 2 * vectors @ codes.T, dim=1)


def straight_through(vectors: Tensor, points: Tensor) -> Tensor:
    """The points (B, d), whose gradient goes to `vectors` unchanged (Bengio, Léonard and Courville 2013)."""
    return points.detach() + (vectors - vectors.detach())


def rotation_trick(vectors: Tensor, points: Tensor) -> Tensor:
    """The points (B, d) as a rotated and stretched copy of `vectors`, the rotation being held constant.

    With unit vectors e of a vector and q of its point, r = (e + q) / |e + q| and λ = |point| / |vector|, the point is
    λ R vector, R = I - 2 r rᵀ + 2 q eᵀ, so that the vector's gradient is λ Rᵀ times the point's: the angle between
    gradient and point becomes that between gradient and vector.

    Where the rotation is not defined (either is 0, or they point in opposite directions) the gradient passes straight
    through.

    Source: Fifty et al., "Restructuring Vector Quantization with the Rotation Trick" (2024), arXiv 2410.06424,
    section 4.2, without forming R.
    """
    with torch.no_grad():
        length, reach = vectors.norm(dim=1, keepdim=True), points.norm(dim=1, keepdim=True)
        tiny = torch.finfo(vectors.dtype).eps
        e, q = vectors / length.clamp_min(TINY), points / reach.clamp_min(TINY)
        middle = e + q
        span = middle.norm(dim=1, keepdim=True)
        defined = (length > TINY) & (reach > TINY) & (span > tiny**0.5)
        r = middle / span.clamp_min(TINY)
        stretch = reach / length.clamp_min(TINY)
    reflected = vectors - 2 * (vectors * r).sum(dim=1, keepdim=True) * r
    rotated = stretch * (reflected + 2 * (vectors * e).sum(dim=1, keepdim=True) * q)
    # The value is the point to the last bit; the rotation is there for the gradient.
    exact = points.detach() + (rotated - rotated.detach())
    return torch.where(defined, exact, straight_through(vectors, points))


ESTIMATORS = {"rotation": rotation_trick, "straight-through": straight_through}

"""LETTER's two further losses: items that users take together come nearer, and codes of one cluster are used alike."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmrec.exceptions import TokenizerError
from llmrec.quantization.balanced import balanced_assignment
from llmrec.quantization.kmeans import balanced_kmeans
from llmrec.quantization.nearest import check_matrix, squared_distances

# Lloyd iterations of a codebook's clusters.
ITERATIONS = 10
# What a batch's draws are for: the second number of their seed. Those of `training` are smaller.
POSITIVES = 3


@dataclass(frozen=True)
class Signals:
    """The items' collaborative embeddings in the width of the latents.

    Attributes:
        rows: (N, d) float32; 0 where there is no signal.
        present: (N,) whether the item has one.
    """

    rows: npt.NDArray[np.float32]
    present: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Alignment:
    """The two losses, with their weights, as training asks for them.

    Attributes:
        signals: of all items; None if `alignment` is 0.
        alignment: weight α of `alignment_loss`.
        diversity: weight β of `diversity_loss`, summed over the levels.
        clusters: G, of the codes of a level.
        seed: of the draws, and of the clusters.
    """

    signals: Signals | None
    alignment: float
    diversity: float
    clusters: int
    seed: int

    @property
    def terms(self) -> dict[str, float]:
        """The losses that have a weight, and the weight."""
        weights = {"alignment": self.alignment, "diversity": self.diversity}
        return {name: weight for name, weight in weights.items() if weight > 0}

    def clusters_of(self, codebooks: Sequence[Tensor], epoch: int) -> list[npt.NDArray[np.int64]]:
        """The cluster of every code, (K,) for each level's codes (K, d); nothing without a diversity loss."""
        if not self.diversity:
            return []
        return [
            code_clusters(codes.detach().cpu().numpy(), self.clusters, self.seed + epoch + level)
            for level, codes in enumerate(codebooks)
        ]

    def losses(
        self,
        points: Tensor,
        codes: Tensor,
        codebooks: Sequence[Tensor],
        labels: Sequence[npt.NDArray[np.int64]],
        batch: npt.NDArray[np.int64],
        places: npt.NDArray[np.int64],
        draw: tuple[int, int],
    ) -> list[Tensor]:
        """What some rows of a batch contribute to its losses, without their weights, in the order of `terms`.

        The contributions of rows that make up the batch add up to the losses of all of it.

        Args:
            points: (b, d) the quantised embeddings of the rows.
            codes: (b, L) their codes.
            codebooks: L tensors (K, d).
            labels: of `clusters_of`.
            batch: (B,) the row numbers of the whole batch, all different.
            places: (b,) where in it the rows stand.
            draw: epoch and step, from which the positives of the whole batch are drawn.
        """
        found = []
        if self.alignment:
            assert self.signals is not None
            taking = self.signals.present[batch]
            own = np.flatnonzero(taking[places])
            columns = np.cumsum(taking)[places[own]] - 1
            others = torch.from_numpy(self.signals.rows[batch[taking]]).to(points.device)
            mine = points[torch.from_numpy(own).to(points.device)]
            loss = alignment_loss(mine, others, torch.from_numpy(columns).to(points.device))
            found.append(loss / max(1, len(others)))
        if self.diversity:
            draws = np.random.default_rng([self.seed, POSITIVES, *draw]).random((len(batch), len(codebooks)))[places]
            loss = points.new_zeros(())
            for level, codebook in enumerate(codebooks):
                positives = draw_positives(codes[:, level].cpu().numpy(), labels[level], draws[:, level])
                loss = loss + diversity_loss(codebook, codes[:, level], torch.from_numpy(positives).to(points.device))
            found.append(loss / len(batch))
        return found


def collaborative_signals(collaborative: npt.NDArray[np.floating], num_rows: int, width: int) -> Signals:
    """The collaborative embeddings as the alignment loss takes them.

    Rows with a signal are centred, which does not change the loss, and divided by one number, the root of their mean
    variance, so that a weight means the same whatever the model they come from. Narrower than the latents they get
    columns of zeros, wider ones are reduced to their first `width` principal components, which changes their inner
    products least.

    Args:
        collaborative: (N, C); a row of zeros says that the item has no collaborative signal.
        num_rows: N of the embeddings.
        width: d.

    Raises:
        TokenizerError: if the shapes do not fit, a number is NaN or infinite, or fewer than two items have a signal.
    """
    matrix = check_matrix(collaborative)
    if len(matrix) != num_rows:
        raise TokenizerError(
            f"Collaborative embeddings of shape {matrix.shape} do not belong to {num_rows} items. "
            "Give one row per item, zeros where there is no signal."
        )
    present = np.asarray(matrix.any(axis=1))
    if present.sum() < 2:
        raise TokenizerError(
            f"{int(present.sum())} item(s) have a collaborative signal, which leaves nothing to compare. "
            "Give the collaborative embeddings of a longer log, or no alignment."
        )
    taking: npt.NDArray[np.float64] = matrix[present].astype(np.float64)
    taking -= taking.mean(axis=0)
    taking /= float(np.sqrt((taking**2).mean())) or 1.0
    if taking.shape[1] > width:
        directions = np.linalg.eigh(taking.T @ taking)[1][:, ::-1][:, :width]
        taking = taking @ directions
    rows = np.zeros((num_rows, width), dtype=np.float32)
    rows[present, : taking.shape[1]] = taking
    return Signals(rows, present)


def alignment_loss(points: Tensor, signals: Tensor, places: Tensor) -> Tensor:
    """The sum over rows i of -log (exp <z_i, h_p(i)> / Σ_j exp <z_i, h_j>), a contrastive loss (InfoNCE).

    Args:
        points: (b, d) the quantised embeddings z, the sums of the items' codes.
        signals: (C, d) the collaborative embeddings h of all items that take part.
        places: (b,) p, which of them is the item's own.

    Source: Wang et al., "Learnable Item Tokenization for Generative Recommendation" (LETTER, CIKM 2024), arXiv
    2405.07314, the collaborative regularisation L_CF. The gradient reaches the encoder through the estimator.
    """
    return nn.functional.cross_entropy(points @ signals.T, places, reduction="sum")


def diversity_loss(codes: Tensor, chosen: Tensor, positives: Tensor) -> Tensor:
    """The sum over rows i of -log (exp <e_c(i), e_p(i)> / Σ_{j ≠ c(i)} exp <e_c(i), e_j>) of one level.

    Codes of one cluster come nearer to each other and further from the others, so that an item's second choices lie
    close by and none of them draws in all items. The gradient goes to the codes.

    Args:
        codes: (K, d).
        chosen: (b,) c, the row's code.
        positives: (b,) p ≠ c, a random other code of its cluster; a row with -1, whose code has none, adds 0.

    Source: LETTER, arXiv 2405.07314, the diversity regularisation L_Div.
    """
    chosen, positives = chosen[positives >= 0], positives[positives >= 0]
    similar = codes[chosen] @ codes.T  # (b, K)
    itself = nn.functional.one_hot(chosen, len(codes)).bool()
    return nn.functional.cross_entropy(similar.masked_fill(itself, -torch.inf), positives, reduction="sum")


def code_clusters(codes: npt.NDArray[np.floating], clusters: int, seed: int) -> npt.NDArray[np.int64]:
    """The cluster of each of (K, d) codes by constrained k-means: all clusters have floor(K / G) or ceil(K / G) codes.

    G is `clusters`, but at most K / 2, so that every code has another one beside it; one code alone is one cluster.

    Source: the constraint of LETTER's clusters bounds their sizes from both sides, here as narrowly as can be.
    """
    number = max(1, min(clusters, len(codes) // 2))
    wide: npt.NDArray[np.float64] = codes.astype(np.float64)
    centroids = balanced_kmeans(wide, number, ITERATIONS, seed)[0]
    return balanced_assignment(squared_distances(wide[:, None], centroids[None])).labels


def draw_positives(
    chosen: npt.NDArray[np.integer], labels: npt.NDArray[np.integer], draws: npt.NDArray[np.float64]
) -> npt.NDArray[np.int64]:
    """For each row's code (b,) another code of its cluster, evenly by its number (b,) in 0..1; -1 if there is none.

    >>> draw_positives(np.array([0, 0, 2, 1]), np.array([0, 1, 0, 0]), np.array([0.0, 0.9, 0.4, 0.5])).tolist()
    [2, 3, 0, -1]
    """
    order = np.argsort(labels, kind="stable")
    sizes = np.bincount(labels)
    begins = np.cumsum(sizes) - sizes
    ranks = np.empty(len(labels), dtype=np.int64)
    ranks[order] = np.arange(len(labels)) - begins[labels[order]]
    cluster = labels[chosen]
    places = np.floor(draws * (sizes[cluster] - 1)).astype(np.int64)
    places += places >= ranks[chosen]  # the code itself is left out
    alone = sizes[cluster] == 1
    return np.where(alone, -1, order[begins[cluster] + np.where(alone, 0, places)])

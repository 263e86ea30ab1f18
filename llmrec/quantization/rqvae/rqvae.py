"""RQ-VAE: an autoencoder with a residual quantiser in its middle, as a quantizer of embeddings."""

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self, get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from llmrec import __version__
from llmrec.exceptions import ArtefactError, TokenizerError
from llmrec.quantization.codebooks import check_codes, check_positive, fitting_size
from llmrec.quantization.nearest import check_matrix, chunks, nearest
from llmrec.storage import atomic_path, sha256_of, write_json

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE, MANIFEST_FILE, LOG_FILE = "rqvae.safetensors", "quantizer.json", "training.json"
# Rows that are worked on at once: 8,192 rows of 512 float64 are 32 MB a layer.
CHUNK = 8192
# What a fit takes if its epochs are left open, and the fewest epochs that still see every item often enough.
STEPS, LEAST_EPOCHS = 8000, 20

Estimator = Literal["rotation", "straight-through"]
Update = Literal["ema", "gradient"]
Precision = Literal["no", "bf16", "fp16"]
# Settings that folders of earlier versions do not name; they were off.
LATER = ("alignment", "diversity", "diversity_clusters")
Weights = dict[str, npt.NDArray[Any]]


class RQVAE:
    """Residually quantised variational autoencoder.

    Embeddings are centred and divided by one number, the root of their mean variance, so that distances keep their
    proportions. The loss is the mean squared error of the reconstruction plus `commitment` times the distance of the
    latents' residuals to their codes; with update="gradient" that distance also moves the codes.

    Attributes:
        num_levels: L.
        codebook_size: K, the codes asked for per level; a catalog of N items has at most N.
        latent_dim: d, the width of the codes.
        hidden: widths between D and d in the encoder; the decoder has them in reverse.
        estimator: how the reconstruction's gradient passes the choice of codes, see `rqvae.codebook`. On 4,344 product
            titles the rotation's error was a fifth higher than straight-through's after as many batches.
        update: "ema" moves codes by moving averages, "gradient" by the optimiser.
        commitment: β.
        decay: of the moving averages, per batch.
        epochs: passes over the items, a tenth of them without quantisation; None: about 8,000 batches, at least 20.
        batch_size: B.
        learning_rate: Adam's at its height.
        alignment: weight α of LETTER's contrastive loss between an item's quantised embedding and its collaborative
            one, 0 for none. Encoding takes the text embedding alone, new items' too.
        diversity: weight β of LETTER's loss that brings codes of one cluster together, 0 for none. It moves codes by
            their gradient and takes update="gradient".
        diversity_clusters: G, the clusters of a level's codes.
        revive_below: codes that get less than this share of an even use in an epoch are moved; 0 never.
        mixed_precision: "bf16" or "fp16" runs encoder and decoder in it while fitting, by accelerate.
        seed: of weights, batches, k-means and revivals.
        log: one entry per epoch, see `rqvae.training.train`.

    On a CPU the same embeddings and settings give the same codes on one machine and number of threads. Encoding is
    done in float64 by numpy wherever the fit ran. A code's point, encoded again, need not get that code: the encoder
    does not invert the decoder.

    Sources: Rajput et al., "Recommender Systems with Generative Retrieval" (TIGER, 2023), arXiv 2305.05065; Zeghidour
    et al., "SoundStream" (2021), arXiv 2107.03312, for k-means initialisation and the revival of dead codes; see
    `rqvae.codebook` and `rqvae.alignment` for the rest.
    """

    def __init__(
        self,
        num_levels: int = 3,
        codebook_size: int = 256,
        latent_dim: int = 32,
        hidden: Sequence[int] = (256, 128),
        estimator: Estimator = "straight-through",
        update: Update = "ema",
        commitment: float = 0.25,
        decay: float = 0.99,
        epochs: int | None = None,
        batch_size: int = 256,
        learning_rate: float = 2e-3,
        revive_below: float = 0.05,
        mixed_precision: Precision = "no",
        seed: int = 0,
        alignment: float = 0.0,
        diversity: float = 0.0,
        diversity_clusters: int = 10,
    ) -> None:
        check_positive(num_levels=num_levels, codebook_size=codebook_size, latent_dim=latent_dim)
        check_positive(batch_size=batch_size, epochs=1 if epochs is None else epochs, hidden=min(hidden, default=1))
        check_positive(diversity_clusters=diversity_clusters)
        for name, number, legal in (
            ("commitment", commitment, 0 <= commitment < math.inf),
            ("decay", decay, 0 <= decay < 1),
            ("learning_rate", learning_rate, 0 < learning_rate < math.inf),
            ("revive_below", revive_below, 0 <= revive_below < 1),
            ("alignment", alignment, 0 <= alignment < math.inf),
            ("diversity", diversity, 0 <= diversity < math.inf),
        ):
            if not legal:
                raise TokenizerError(f"{name} is {number}. Use a positive number, below 1 for shares and decays.")
        for name, word, words in (
            ("estimator", estimator, get_args(Estimator)),
            ("update", update, get_args(Update)),
            ("mixed_precision", mixed_precision, get_args(Precision)),
        ):
            if word not in words:
                raise TokenizerError(f"{name} is {word!r}. Use one of {', '.join(words)}.")
        if diversity and update != "gradient":
            raise TokenizerError(
                f"A diversity of {diversity} moves codes by gradients, but update is {update!r}. "
                "Use update='gradient', or no diversity."
            )
        self.num_levels = num_levels
        self.codebook_size = codebook_size
        self.latent_dim = latent_dim
        self.hidden = tuple(hidden)
        self.estimator = estimator
        self.update = update
        self.commitment = commitment
        self.decay = decay
        self.epochs = epochs
        self.batch_size = batch_size
        self.learning_rate = learning_rate
        self.revive_below = revive_below
        self.mixed_precision = mixed_precision
        self.seed = seed
        self.alignment = alignment
        self.diversity = diversity
        self.diversity_clusters = diversity_clusters
        self.log: list[dict[str, Any]] = []
        self._weights: Weights = {}

    @property
    def settings(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-ready."""
        names = (
            *("num_levels", "codebook_size", "latent_dim", "hidden", "estimator", "update", "commitment", "decay"),
            *("epochs", "batch_size", "learning_rate", "revive_below", "mixed_precision", "seed", *LATER),
        )
        return {name: list(value) if isinstance(value := getattr(self, name), tuple) else value for name in names}

    @property
    def codebook_sizes(self) -> tuple[int, ...]:
        """K_l of every level; raises TokenizerError before `fit`."""
        return tuple(len(codebook) for codebook in self.codebooks)

    @property
    def codebooks(self) -> tuple[npt.NDArray[np.float32], ...]:
        """L arrays (K_l, d) of latent points; raises TokenizerError before `fit`."""
        weights = self._fitted()
        return tuple(weights[f"quantizer.levels.{level}.codes"] for level in range(self.num_levels))

    def fit(
        self,
        embeddings: npt.NDArray[np.floating],
        collaborative: npt.NDArray[np.floating] | None = None,
        checkpoints: str | Path | None = None,
        checkpoint_epochs: int = 10,
        progress: bool = False,
    ) -> Self:
        """Trains on (N, D) and returns itself.

        Under `torch.distributed.run` or `accelerate launch` all processes call it with the same arguments. Each works
        on its part of every batch, and all end with the same weights: those of one process, but for rounding.

        Args:
            embeddings: N rows of width D; a memory map is read batch by batch.
            collaborative: (N, C) embeddings of the same items by how users take them, for `alignment` above 0, such
                as a sequential model's item table. Rows of zeros, items without a signal, take no part in that loss.
                See `rqvae.alignment.collaborative_signals` for other widths and scales.
            checkpoints: a folder for the fit's state. The same fit, started again there, goes on where it was killed
                and ends with the same weights; other settings or embeddings begin anew. Process 0 writes it, and all
                must see it.
            checkpoint_epochs: how many epochs lie between two checkpoints.
            progress: shows a bar.

        Raises:
            TokenizerError: if the embeddings are empty or hold NaN or infinity, the loss is no finite number,
                accelerate cannot run as asked, or the collaborative embeddings do not fit.
        """
        import torch

        from llmrec.quantization.rqvae.alignment import Alignment, collaborative_signals
        from llmrec.quantization.rqvae.checkpoint import Checkpoint
        from llmrec.quantization.rqvae.model import Network
        from llmrec.quantization.rqvae.processes import is_first_process
        from llmrec.quantization.rqvae.training import train

        check_positive(checkpoint_epochs=checkpoint_epochs)
        embeddings = check_matrix(embeddings)
        if (collaborative is None) == (self.alignment > 0):
            raise TokenizerError(
                f"The alignment is {self.alignment:g}, and collaborative embeddings are "
                f"{'not given' if collaborative is None else 'given'}. "
                "Give both an alignment above 0 and the embeddings, or neither."
            )
        num_rows, width = embeddings.shape
        signals = None if collaborative is None else collaborative_signals(collaborative, num_rows, self.latent_dim)
        # The first process says if codebooks are smaller than asked for.
        size = min(self.codebook_size, num_rows)
        if is_first_process():
            fitting_size(self.codebook_size, num_rows)
        mean, scale = _spread(embeddings)

        def read(rows: npt.NDArray[np.int64]) -> "Tensor":
            return torch.from_numpy(((embeddings[rows] - mean) / scale).astype(np.float32))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            network = Network(
                width, self.hidden, self.latent_dim, self.num_levels, size, self.estimator, self.update, self.decay
            )
        checkpoint = None if checkpoints is None else Checkpoint(checkpoints, self._run(embeddings, collaborative))
        epochs = self.epochs or max(LEAST_EPOCHS, round(STEPS / math.ceil(num_rows / self.batch_size)))
        self.log = train(
            network,
            read,
            num_rows,
            epochs=epochs,
            warmup_epochs=epochs // 10,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            commitment=self.commitment,
            placing_rows=max(64 * size, self.batch_size),
            revive_below=self.revive_below,
            seed=self.seed,
            mixed_precision=self.mixed_precision,
            alignment=Alignment(signals, self.alignment, self.diversity, self.diversity_clusters, self.seed),
            checkpoint=checkpoint,
            checkpoint_epochs=checkpoint_epochs,
            progress=progress,
        )
        learnt = {name: tensor.detach().cpu().numpy() for name, tensor in network.state_dict().items()}
        kept = {name: tensor for name, tensor in learnt.items() if not name.endswith((".counts", ".sums"))}
        self._weights = {"mean": mean, "scale": np.array([scale]), **kept}
        return self

    def encode(self, embeddings: npt.NDArray[np.floating]) -> npt.NDArray[np.int32]:
        """(N, D) -> (N, L): at each level the nearest code to the latent's residual, of equally near ones the lowest.

        Raises:
            TokenizerError: before `fit`, or if the embeddings have another width, NaN or infinity.
        """
        weights, codebooks = self._fitted(), self.codebooks
        embeddings = check_matrix(embeddings, len(weights["mean"]))
        codes = np.empty((len(embeddings), len(codebooks)), dtype=np.int32)
        for chunk in chunks(len(embeddings), CHUNK):
            residuals = self._apply("encoder", (embeddings[chunk] - weights["mean"]) / weights["scale"])
            for level, codebook in enumerate(codebooks):
                codes[chunk, level] = nearest(residuals, codebook)
                residuals = residuals - codebook[codes[chunk, level]]
        return codes

    def decode(self, codes: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """(N, L) -> (N, D), what the decoder makes of the sum of the codes; raises TokenizerError for codes outside
        the codebooks."""
        weights, codebooks = self._fitted(), self.codebooks
        codes = check_codes(codes, self.codebook_sizes)
        points = np.empty((len(codes), len(weights["mean"])), dtype=np.float32)
        for chunk in chunks(len(codes), CHUNK):
            latents = np.zeros((len(codes[chunk]), codebooks[0].shape[1]))
            for level, codebook in enumerate(codebooks):
                latents += codebook[codes[chunk, level]]
            points[chunk] = self._apply("decoder", latents) * weights["scale"] + weights["mean"]
        return points

    def save(self, folder: str | Path) -> None:
        """Writes rqvae.safetensors, training.json and quantizer.json into `folder`; raises TokenizerError before
        `fit`."""
        folder = Path(folder)
        weights = self._fitted()
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(folder / WEIGHTS_FILE) as temporary:
            save_file(weights, temporary)
        write_json(folder / LOG_FILE, self.log)
        write_json(
            folder / MANIFEST_FILE,
            {
                "quantizer": "rqvae",
                **self.settings,
                "sha256": {name: sha256_of(folder / name) for name in (WEIGHTS_FILE, LOG_FILE)},
                "llmrec_version": __version__,
            },
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Reads what `save` wrote; raises ArtefactError if a file is missing, altered or unreadable."""
        folder = Path(folder)
        try:
            manifest = json.loads((folder / MANIFEST_FILE).read_text(encoding="utf-8"))
            if manifest["quantizer"] != "rqvae":
                raise ValueError(f"it holds a {manifest['quantizer']}")
            for name in (WEIGHTS_FILE, LOG_FILE):
                if sha256_of(folder / name) != manifest["sha256"][name]:
                    raise ValueError(f"{name} is not the file that {MANIFEST_FILE} describes")
            names = [name for name in cls().settings if name in manifest or name not in LATER]
            quantizer = cls(**{name: manifest[name] for name in names})
            quantizer._weights = load_file(folder / WEIGHTS_FILE)
            quantizer.log = json.loads((folder / LOG_FILE).read_text(encoding="utf-8"))
            quantizer.decode(quantizer.encode(np.zeros((1, len(quantizer._weights["mean"])))))
        except Exception as error:
            raise ArtefactError(
                f"{folder} holds no RQ-VAE ({error!r}). Point to the codebooks folder of a build."
            ) from error
        return quantizer

    def _apply(self, name: str, vectors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The encoder or decoder of `rqvae.model` in float64."""
        weights, last = self._fitted(), 2 * len(self.hidden)
        for layer in range(0, last + 1, 2):
            vectors = (
                vectors @ weights[f"{name}.{layer}.weight"].T.astype(np.float64) + weights[f"{name}.{layer}.bias"]
            )
            if layer < last:
                vectors = np.maximum(vectors, 0)
        return vectors

    def _run(self, embeddings: npt.NDArray[np.floating], collaborative: npt.NDArray[np.floating] | None = None) -> str:
        """A hash of all that decides what a fit learns; how many processes share it does not."""
        matrices = [embeddings] if collaborative is None else [embeddings, np.asarray(collaborative)]
        shapes = [matrix.shape for matrix in matrices]
        digest = hashlib.sha256(json.dumps([self.settings, shapes, __version__]).encode())
        for matrix in matrices:
            for chunk in chunks(len(matrix), CHUNK):
                digest.update(np.ascontiguousarray(matrix[chunk], dtype=np.float64).tobytes())
        return digest.hexdigest()

    def _fitted(self) -> Weights:
        if not self._weights:
            raise TokenizerError("The RQ-VAE has no codebooks yet. Call fit, or load one with from_pretrained.")
        return self._weights


def _spread(embeddings: npt.NDArray[np.floating]) -> tuple[npt.NDArray[np.float64], float]:
    """The mean (D,) and the root of the mean variance of all columns, 1 if all rows are equal."""
    mean = np.zeros(embeddings.shape[1])
    for chunk in chunks(len(embeddings), CHUNK):
        mean += embeddings[chunk].astype(np.float64).sum(axis=0) / len(embeddings)
    squares, largest = 0.0, 0.0
    for chunk in chunks(len(embeddings), CHUNK):
        centred = embeddings[chunk] - mean
        squares += float((centred**2).sum())
        largest = max(largest, float(np.abs(centred).max()))
    # Rows that are equal leave rounding noise behind their mean, which must not be blown up.
    if largest <= 1e-12 * max(1e-300, float(np.abs(mean).max())):
        return mean, 1.0
    return mean, math.sqrt(squares / embeddings.size)

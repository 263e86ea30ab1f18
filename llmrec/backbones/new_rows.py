"""New rows of a language model's embeddings: how many, where, and what they start from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llmrec.catalog import Catalog
from llmrec.exceptions import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmrec.vocabulary import PlainText

INITIALISATIONS = ("mean", "text", "codebook")
MULTIPLE = 64
# Of the old rows' standard deviation: enough that no two rows start equal; where a row already says something of its
# own, so little that it is not drowned.
_NOISE, _TRACE = 0.1, 0.01


class Start(Protocol):
    """What the new rows of one table start from."""

    def __call__(self, table: Tensor, known: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        """Values (M, D) float32 for the rows `new` (M,) of `table` (V, D); `known` (V,) marks the old ones."""
        ...


def padded(vocab_size: int, multiple: int = MULTIPLE) -> int:
    """Rounded up, because tensor cores want embedding tables of round sizes.

    >>> padded(50257 + 1024)
    51328
    """
    return -(-vocab_size // multiple) * multiple


@torch.no_grad()
def extend_embeddings(
    model: "PreTrainedModel", vocab_size: int, new_ids: Sequence[int], seed: int, start: Start | None = None
) -> list[int]:
    """Resizes input and output embeddings to at least `vocab_size` rows and initialises the new rows in place.

    New are `new_ids` and every row that the resizing added, padding included: padding rows are in the softmax too.
    An untied head's new rows start from its own old rows, and a head's bias from its old biases' mean. Never shrinks:
    some checkpoints have more rows than their tokenizer has tokens.

    Args:
        model: a causal LM, not yet adapted or quantised.
        vocab_size: the tokenizer's size.
        new_ids: the catalog's token ids, wherever they stand in the vocabulary.
        seed: of the noise, and of a projection.
        start: what `new_ids` start from; default: `MeanStart`. Padding starts from the mean in any case.

    Returns:
        The new rows, ascending.

    Raises:
        BackboneError: if `new_ids` leave no old row to start from, or lie outside the vocabulary.
    """
    old_size = model.get_input_embeddings().weight.shape[0]
    if new_ids and not 0 <= min(new_ids) <= max(new_ids) < max(vocab_size, old_size):
        raise BackboneError(
            f"The catalog's token ids reach from {min(new_ids)} to {max(new_ids)}, and the vocabulary has "
            f"{vocab_size} tokens. Add the catalog's tokens to this tokenizer first."
        )
    if vocab_size > old_size:
        model.resize_token_embeddings(padded(vocab_size), mean_resizing=False)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    named = torch.tensor(sorted(set(new_ids)), dtype=torch.long)
    padding = torch.tensor(
        sorted(set(range(old_size, inputs.weight.shape[0])) - set(named.tolist())), dtype=torch.long
    )
    known = torch.zeros(inputs.weight.shape[0], dtype=torch.bool)
    known[:old_size] = True
    known[named] = False
    if not known.any():
        raise BackboneError(
            f"All {old_size} rows of the embeddings are new, so there is none to start from. "
            "Take a checkpoint with a vocabulary of its own, or train from scratch."
        )
    generator = torch.Generator().manual_seed(seed)
    mean = MeanStart()
    for weight in [inputs.weight, *([head.weight] if head is not None and head.weight is not inputs.weight else [])]:
        table = weight.detach().float().cpu()
        for rows, values in ((named, start or mean), (padding, mean)):
            if len(rows):
                weight[rows] = values(table, known, rows, generator).to(weight)
    if (bias := getattr(head, "bias", None)) is not None:
        bias[~known] = bias[known].mean()
    return sorted([*named.tolist(), *padding.tolist()])


@dataclass(frozen=True)
class MeanStart:
    """The mean of the old rows plus Gaussian noise of a tenth of their standard deviation per dimension.

    A row starts where the model knows what to do with it, and no two tokens start equal.
    """

    noise: float = _NOISE

    def __call__(self, table: Tensor, known: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        """See `Start`."""
        old = table[known]
        drawn = torch.randn((len(new), table.shape[1]), generator=generator)
        return old.mean(0) + self.noise * old.std(0, correction=0) * drawn


@dataclass(frozen=True)
class TextStart:
    """The mean row of the tokens of the texts of the items that have the code.

    A token counts as often as it occurs.

    A code without items, or whose items have no text, starts from the mean of the old rows, as in `MeanStart`.

    Attributes:
        counts: for a token id of the catalog, old token ids (n,) and how often each occurs (n,).
        noise: Gaussian noise, in standard deviations of the old rows per dimension.
    """

    counts: Mapping[int, tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    noise: float = _TRACE

    def __call__(self, table: Tensor, known: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        """See `Start`."""
        rows = MeanStart()(table, known, new, generator)
        spread = table[known].std(0, correction=0)
        drawn = torch.randn((len(new), table.shape[1]), generator=generator)
        for place, id in enumerate(new.tolist()):
            tokens, counts = self.counts.get(id, ((), ()))
            if len(tokens):
                weights = torch.as_tensor(counts, dtype=torch.float32)
                mean = weights @ table[torch.as_tensor(tokens)] / weights.sum()
                rows[place] = mean + self.noise * spread * drawn[place]
        return rows

    @classmethod
    def of(cls, catalog: Catalog, texts: Sequence[str], text: "PlainText") -> "TextStart":
        """Counts the tokens of the items' texts, one text a catalog row, for every code of every level.

        Raises:
            BackboneError: if there are not as many texts as items.
        """
        from scipy.sparse import csr_matrix

        if len(texts) != len(catalog):
            raise BackboneError(f"{len(texts)} texts for {len(catalog)} items. Give one text for every catalog row.")
        encoded = [np.asarray(text.encode(words), dtype=np.int64) for words in texts]
        tokens = np.concatenate([np.zeros(0, dtype=np.int64), *encoded])
        rows = np.repeat(np.arange(len(catalog)), [len(ids) for ids in encoded])
        width = int(tokens.max(initial=0)) + 1
        bags = csr_matrix((np.ones(len(tokens), dtype=np.int64), (rows, tokens)), shape=(len(catalog), width))
        counts = {}
        for level, ids in enumerate(catalog.require_tokens()):
            ones = np.ones(len(catalog), dtype=np.int64)
            has_code = csr_matrix(
                (ones, (catalog.codes[:, level], np.arange(len(catalog)))), shape=(len(ids), len(catalog))
            )
            summed = (has_code @ bags).tocsr()
            summed.sort_indices()
            for code, id in enumerate(ids.tolist()):
                span = slice(summed.indptr[code], summed.indptr[code + 1])
                counts[id] = (summed.indices[span].astype(np.int64), summed.data[span])
        return cls(counts)


@dataclass(frozen=True)
class CodebookStart:
    """The codebook's vectors, turned into the embedding space so that their angles and relative distances stay.

    A level's vectors (K, C) are centred, brought to D dimensions (by a random orthonormal map if C ≤ D, which keeps
    every inner product; by their first D principal components and a random rotation if C > D, which keeps as much as D
    dimensions can), and scaled by one number a level: their root mean square distance from the old rows' mean is then
    that of the old rows. A token without a vector (a level that only keeps items apart) starts as in `MeanStart`.

    Attributes:
        vectors: by level: token ids (K,) and vectors (K, C).
        noise: Gaussian noise, in standard deviations of the old rows per dimension: equal centroids start apart.
    """

    vectors: Sequence[tuple[npt.NDArray[np.int64], npt.NDArray[np.floating]]]
    noise: float = _TRACE

    def __call__(self, table: Tensor, known: Tensor, new: Tensor, generator: torch.Generator) -> Tensor:
        """See `Start`."""
        rows = MeanStart()(table, known, new, generator)
        old = table[known]
        mean, deviation = old.mean(0), old.std(0, correction=0)
        radius = float(deviation.double().square().sum().sqrt())
        place_of = {id: place for place, id in enumerate(new.tolist())}
        for ids, vectors in self.vectors:
            turned = _into(torch.as_tensor(vectors, dtype=torch.float64), table.shape[1], generator)
            length = float(turned.square().sum(1).mean().sqrt())
            scaled = turned * (radius / length if length > 0 else 0.0)
            drawn = torch.randn(scaled.shape, generator=generator)
            for code, id in enumerate(ids.tolist()):
                if id in place_of:
                    rows[place_of[id]] = mean + scaled[code].float() + self.noise * deviation * drawn[code]
        return rows

    @classmethod
    def of(cls, catalog: Catalog, codebooks: Sequence[npt.NDArray[np.floating]]) -> "CodebookStart":
        """Pairs a quantizer's `codebooks` (level by level, (K, C) each) with the catalog's tokens.

        The catalog may have levels behind those of the quantizer (a last one that separates items with equal codes).

        Raises:
            BackboneError: if there is no codebook, or one has more vectors than its level has tokens.
        """
        levels = catalog.require_tokens()
        if not 0 < len(codebooks) <= len(levels):
            raise BackboneError(
                f"{len(codebooks)} codebooks for a catalog of {len(levels)} levels cannot start its tokens. "
                "Take new_token_init 'mean' or 'text' for codes of this kind."
            )
        for level, (ids, vectors) in enumerate(zip(levels, codebooks, strict=False)):
            if len(vectors) > len(ids):
                raise BackboneError(
                    f"Level {level} has {len(vectors)} codebook vectors and {len(ids)} tokens. "
                    "Give the codebooks that these semantic IDs were built with."
                )
        return cls(
            [(ids[: len(vectors)], np.asarray(vectors)) for ids, vectors in zip(levels, codebooks, strict=False)]
        )


def starts(
    name: str,
    catalog: Catalog,
    texts: Sequence[str] | None = None,
    text: "PlainText | None" = None,
    quantizer: Any = None,
) -> Start:
    """The start that `--new_token_init` names.

    Args:
        name: of `INITIALISATIONS`.
        catalog: with its token ids.
        texts: of the items, one a catalog row; for "text".
        text: the tokenizer's `PlainText`; for "text".
        quantizer: what the codes came from, if it is known; for "codebook".

    Raises:
        BackboneError: if the name is unknown, or what it needs is not there.
    """
    if name == "mean":
        return MeanStart()
    if name == "text":
        if texts is None or text is None:
            raise BackboneError("new_token_init 'text' needs the items' texts. Give them, or take 'mean'.")
        return TextStart.of(catalog, texts, text)
    if name == "codebook":
        codebooks = getattr(quantizer, "codebooks", None)
        if not codebooks:
            raise BackboneError(
                f"new_token_init 'codebook' needs codebooks, and {type(quantizer).__name__} keeps none. "
                "Take 'mean' or 'text', or build the semantic IDs with k-means, OPQ, residual VQ or an RQ-VAE."
            )
        return CodebookStart.of(catalog, [np.asarray(codebook) for codebook in codebooks])
    raise BackboneError(f"new_token_init is {name!r}. Choose one of {', '.join(INITIALISATIONS)}.")


def _into(vectors: Tensor, width: int, generator: torch.Generator) -> Tensor:
    """Centred vectors (K, C) -> (K, width), by an orthonormal map; float64."""
    vectors = vectors - vectors.mean(0)
    if vectors.shape[1] > width:
        _, _, components = torch.linalg.svd(vectors, full_matrices=False)
        vectors = vectors @ components[:width].T  # (K, min(K, width))
    drawn = torch.randn((width, vectors.shape[1]), generator=generator, dtype=torch.float64)
    basis, upper = torch.linalg.qr(drawn)
    # Columns' signs are LAPACK's choice; with R's diagonal positive the map is the drawn matrix's alone.
    turned: Tensor = vectors @ (basis * upper.diagonal().sign()).T
    return turned

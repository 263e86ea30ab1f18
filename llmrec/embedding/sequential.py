"""Sequential embedding: the item table of a SASRec that learnt the training histories."""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from llmrec.exceptions import DataError

if TYPE_CHECKING:
    import torch

    from llmrec.backbones.encoder import SequenceEncoder
    from llmrec.representations.representation import ItemRepresentation

logger = logging.getLogger(__name__)

Places = npt.NDArray[np.int64]


class Windows(NamedTuple):
    """Pieces of histories that are predicted item by item.

    Attributes:
        items: (M,) item rows of all histories that teach something, one after another.
        starts: (P,) where a window begins in `items`.
        lengths: (P,) its predictions: the items `start … start + length - 1` are inputs, each followed by its target.
    """

    items: Places
    starts: Places
    lengths: Places


def windows_of(train: Sequence[npt.NDArray[np.integer]], num_items: int, max_length: int) -> Windows:
    """Cuts histories into windows of at most `max_length` predictions, so that every item but a history's first is
    predicted exactly once.

    A window ends with the item that the next one begins with. Histories of fewer than two different items are left
    out: they say nothing of how items relate.

    Raises:
        DataError: if a history holds a row outside 0..N-1.

    >>> windows_of([np.array([7, 8, 9, 7]), np.array([5]), np.array([6, 6])], 10, max_length=2)[1:]
    (array([0, 2]), array([2, 1]))
    """
    items = np.concatenate([np.asarray(history, dtype=np.int64) for history in train] or [np.zeros(0, np.int64)])
    if len(items) and (items.min() < 0 or items.max() >= num_items):
        raise DataError(
            f"Histories name item rows {items.min()}..{items.max()}, the catalog has {num_items} items. "
            "Split the interactions with the same items."
        )
    useful = [np.asarray(history, np.int64) for history in train if len(history) and (history != history[0]).any()]
    starts, lengths, offset = [], [], 0
    for history in useful:
        cuts = [*range(0, len(history) - 1, max_length), len(history) - 1]
        starts += [offset + cut for cut in cuts[:-1]]
        lengths += [end - begin for begin, end in pairwise(cuts)]
        offset += len(history)
    return Windows(
        np.concatenate(useful or [np.zeros(0, np.int64)]),
        np.array(starts, dtype=np.int64),
        np.array(lengths, dtype=np.int64),
    )


def batches_of(windows: Windows, batch_size: int, seed: Sequence[int]) -> Iterator[tuple[Places, Places, Places]]:
    """One epoch in random order: inputs (B, S), targets (B, S) and lengths (B,), padded on the right.

    A batch holds windows of like length, at least one and otherwise no more than `batch_size` predictions, so that
    little is padded and every prediction of the epoch weighs about the same. Padded places hold valid rows.
    """
    generator = np.random.default_rng(seed)
    order = generator.permutation(len(windows.starts))
    order = order[np.argsort(windows.lengths[order], kind="stable")]
    batches, filled = [[order[0]]], int(windows.lengths[order[0]])
    for window in order[1:]:
        filled += int(windows.lengths[window])
        if filled > batch_size:
            batches.append([])
            filled = int(windows.lengths[window])
        batches[-1].append(window)
    for number in generator.permutation(len(batches)):
        starts, lengths = windows.starts[batches[number]], windows.lengths[batches[number]]
        places = starts[:, None] + np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)
        yield windows.items[places], windows.items[places + 1], lengths


def fit(
    items: "ItemRepresentation",
    encoder: "SequenceEncoder",
    windows: Windows,
    epochs: int,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
) -> list[float]:
    """Trains an item table and an encoder in place, where they lie, to predict every item of the windows from those
    before it.

    Adam at a constant learning rate, the softmax over all N items. Dropout draws from torch's random state.

    Args:
        items: N vectors of width D, both input and output embedding.
        encoder: a causal one of width D.
        windows: at least one.
        seed: of the batches.
        progress: shows a bar.

    Returns:
        The mean loss of every epoch, in nats per prediction.

    Raises:
        DataError: if a loss is not finite.
    """
    import torch
    from tqdm import tqdm

    from llmrec.losses.full_softmax import full_softmax_loss

    device = encoder.device
    optimizer = torch.optim.Adam([*items.parameters(), *encoder.parameters()], lr=learning_rate)
    predictions = int(windows.lengths.sum())
    losses: list[float] = []
    items.train()
    encoder.train()
    for epoch in tqdm(range(epochs), desc="SASRec", disable=not progress):
        total = torch.zeros((), device=device)
        for inputs, targets, lengths in batches_of(windows, batch_size, [seed, epoch]):
            mask = torch.from_numpy(np.arange(inputs.shape[1]) < lengths[:, None]).to(device)
            hidden = encoder(items(torch.from_numpy(inputs).to(device)), mask)[mask]
            wanted = torch.from_numpy(targets).to(device)[mask]
            loss = full_softmax_loss(hidden, wanted, items.table())
            optimizer.zero_grad()
            (loss / len(wanted)).backward()
            optimizer.step()
            total += loss.detach() / predictions
        losses.append(float(total))
        if not math.isfinite(losses[-1]):
            raise DataError(
                f"SASRec's loss is {losses[-1]} in epoch {epoch + 1}. Train with a smaller learning rate than "
                f"{learning_rate:g}."
            )
        logger.info("SASRec: epoch %d of %d, loss %.4f", epoch + 1, epochs, losses[-1])
    items.eval()
    encoder.eval()
    return losses


def sasrec_embeddings(
    train: Sequence[npt.NDArray[np.integer]],
    num_items: int,
    dim: int = 64,
    num_layers: int = 2,
    num_heads: int = 1,
    max_length: int = 50,
    epochs: int = 30,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    dropout: float = 0.5,
    seed: int = 0,
    device: "str | torch.device | None" = None,
    progress: bool = False,
) -> npt.NDArray[np.float32]:
    """The item table of a SASRec (`llmrec.backbones.sasrec`), which is both its input and its output embedding.

    Only training histories belong here: with validation or test items in them the codes would know the answers. On a
    CPU the same arguments give the same rows, on one machine and number of threads; torch's own random state is left
    as it was.

    Args:
        train: the users' training histories, item rows in order of time. Longer ones than `max_length` are cut into
            windows, so that every item but a history's first is predicted once an epoch.
        num_items: N, the catalog's size.
        dim: D.
        num_layers: blocks.
        num_heads: heads of a block, which share D.
        max_length: the most items that a prediction looks back on.
        epochs: passes over the histories.
        batch_size: predictions of a step, made from histories of like length.
        learning_rate: Adam's.
        dropout: on the embedded history and on what every block adds.
        seed: of weights, order and dropout.
        device: where it is trained; by default a GPU if there is one.
        progress: shows a bar.

    Returns:
        (N, D) float32. The rows of items that stand in no history of at least two different items are 0; if no history
        is like that, all are.

    Raises:
        DataError: if a history holds a row outside the catalog, a number makes no sense, or the loss is not finite.
    """
    for name, number, legal in (
        ("num_items", num_items, num_items >= 1),
        ("dim", dim, dim >= 1),
        ("num_layers", num_layers, num_layers >= 0),
        ("num_heads", num_heads, num_heads >= 1 and dim % max(1, num_heads) == 0),
        ("max_length", max_length, max_length >= 1),
        ("epochs", epochs, epochs >= 1),
        ("batch_size", batch_size, batch_size >= 1),
        ("learning_rate", learning_rate, 0 < learning_rate < math.inf),
        ("dropout", dropout, 0 <= dropout < 1),
    ):
        if not legal:
            raise DataError(f"{name} is {number}. Use a positive number; heads divide the width, dropout is below 1.")
    windows = windows_of(train, num_items, max_length)
    vectors = np.zeros((num_items, dim), dtype=np.float32)
    if not len(windows.starts):
        return vectors

    import torch

    from llmrec.backbones.sasrec import SASRecConfig, SASRecModel
    from llmrec.representations.id_table import IdTable

    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    device = torch.device(device or "cpu")
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        config = SASRecConfig(
            hidden_size=dim,
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            max_position_embeddings=max_length,
            dropout=dropout,
        )
        items, encoder = IdTable(num_items, dim), SASRecModel(config)
        fit(items.to(device), encoder.to(device), windows, epochs, batch_size, learning_rate, seed, progress)
    learnt = np.unique(windows.items)
    vectors[learnt] = items.table().detach().cpu().numpy()[learnt]
    return vectors

"""Training an RQ-VAE's network: epochs, batches, the dead codes' revival, the log. Knows no files and no items."""

import logging
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from llmrec.exceptions import TokenizerError
from llmrec.quantization.rqvae.checkpoint import Checkpoint
from llmrec.quantization.rqvae.model import Network

logger = logging.getLogger(__name__)

Precision = Literal["no", "bf16", "fp16"]
Read = Callable[[npt.NDArray[np.int64]], Tensor]

# What the draws are for: the second number of their seeds.
ORDER, PLACING, REVIVAL = range(3)


def train(
    network: Network,
    read: Read,
    num_rows: int,
    *,
    epochs: int,
    warmup_epochs: int,
    batch_size: int,
    learning_rate: float,
    commitment: float,
    placing_rows: int,
    revive_below: float,
    seed: int,
    mixed_precision: Precision = "no",
    checkpoint: Checkpoint | None = None,
    checkpoint_epochs: int = 10,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Trains `network` in place and returns the log, one entry per epoch.

    The first `warmup_epochs` train a plain autoencoder. Then k-means places the codes on the latents of
    `placing_rows` random rows, level by level, and the rest of the epochs train all of it. The learning rate rises
    over the first hundredth of the steps and falls to 0 by a cosine. After every epoch but the last, codes that got
    fewer rows than `revive_below` times an even share move to residuals of random rows.

    On a CPU the same arguments give the same weights, resumed or not.

    Args:
        network: on any device; returned to where accelerate runs.
        read: row numbers (B,) -> their vectors (B, D) float32.
        num_rows: N.
        commitment: weight β of the commitment loss.
        mixed_precision: autocast for encoder and decoder.
        checkpoint: written every `checkpoint_epochs` and at the end, and resumed from.

    Returns:
        Per epoch "epoch" (from 1), "loss", "reconstruction", "commitment" (means over the batches, in the units of
        `read`), and for each level "used_share" of its codes, "perplexity" and how many were "revived"; the lists are
        empty while the autoencoder is plain.

    Raises:
        TokenizerError: if the loss is no finite number, or accelerate cannot run as asked.
    """
    accelerator = _accelerator(mixed_precision)
    optimizer = torch.optim.Adam(network.parameters(), lr=learning_rate)
    model, optimizer = accelerator.prepare(network, optimizer)
    network.train()

    def fetch(rows: npt.NDArray[np.int64]) -> Tensor:
        return read(rows).to(accelerator.device)

    log: list[dict[str, Any]] = []
    if checkpoint is not None and (resumed := checkpoint.load(network, optimizer)) is not None:
        log = resumed["log"]
        if accelerator.scaler is not None and resumed["scaler"]:
            accelerator.scaler.load_state_dict(resumed["scaler"])
    steps = math.ceil(num_rows / batch_size)
    for epoch in tqdm(range(len(log), epochs), initial=len(log), total=epochs, desc="RQ-VAE", disable=not progress):
        quantise = epoch >= warmup_epochs
        if epoch == warmup_epochs:
            _place(network, fetch, num_rows, placing_rows, batch_size, seed)
        order = np.random.default_rng([seed, ORDER, epoch]).permutation(num_rows)
        totals = torch.zeros(3, device=accelerator.device)
        uses = [torch.zeros(len(level.codes), device=accelerator.device) for level in network.quantizer.codebooks]
        for step, rows in enumerate(np.array_split(order, steps)):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(epoch * steps + step, epochs * steps)
            reconstruction, quantised = model(fetch(rows), quantise)
            loss, committed = reconstruction, torch.zeros_like(reconstruction)
            if quantised is not None:
                committed = quantised.commitment
                loss = reconstruction + commitment * committed + quantised.codebook
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            totals += torch.stack([loss, reconstruction, committed]).detach() * (len(rows) / num_rows)
            if quantised is not None:
                for level, codebook in enumerate(network.quantizer.codebooks):
                    chosen = quantised.codes[:, level]
                    codebook.average(quantised.residuals[level], chosen)
                    uses[level] += torch.bincount(chosen, minlength=len(uses[level]))
        means = totals.tolist()
        if not math.isfinite(means[0]):
            raise TokenizerError(
                f"The RQ-VAE's loss is {means[0]} in epoch {epoch + 1}. Fit with a smaller learning rate than "
                f"{learning_rate:g}" + (" or without mixed precision." if mixed_precision != "no" else ".")
            )
        entry = dict(zip(("loss", "reconstruction", "commitment"), means, strict=True))
        revived = [0] * len(uses)
        if quantise and epoch < epochs - 1:
            revived = _revive(network, fetch, num_rows, uses, revive_below, seed, epoch)
        log.append({"epoch": epoch + 1, **entry, **_usage(uses if quantise else [], revived)})
        if checkpoint is not None and ((epoch + 1) % checkpoint_epochs == 0 or epoch == epochs - 1):
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else None
            checkpoint.save(network, optimizer, {"log": log, "scaler": scaler})
    accelerator.free_memory()
    return log


def schedule(step: int, steps: int) -> float:
    """The share of the learning rate at `step` of `steps`: a rise over the first hundredth, then half a cosine.

    >>> [round(schedule(step, 1000), 3) for step in (0, 9, 10, 505, 999)]
    [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    rise = max(1, steps // 100)
    if step < rise:
        return (step + 1) / rise
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))


def _accelerator(mixed_precision: Precision) -> Any:
    from accelerate import Accelerator

    try:
        accelerator = Accelerator(mixed_precision=mixed_precision)
    except ValueError as error:
        raise TokenizerError(
            f"accelerate cannot run with mixed_precision {mixed_precision!r} here ({error}). Use 'no', or 'bf16' in a "
            "process that has not used accelerate before."
        ) from error
    if accelerator.num_processes > 1:
        raise TokenizerError(
            f"{accelerator.num_processes} processes would each fit the same RQ-VAE. Start one, without accelerate "
            "launch; it uses one GPU."
        )
    return accelerator


@torch.no_grad()
def _place(
    network: Network, fetch: Callable[..., Tensor], num_rows: int, placing_rows: int, batch_size: int, seed: int
) -> None:
    rows = _draw(num_rows, placing_rows, [seed, PLACING])
    chunks = np.array_split(rows, math.ceil(len(rows) / batch_size))
    residuals = torch.cat([network.encoder(fetch(chunk)) for chunk in chunks])
    for level, codebook in enumerate(network.quantizer.codebooks):
        codebook.place(residuals, min(batch_size, num_rows), seed + level)
        residuals = residuals - codebook(residuals)[1]


@torch.no_grad()
def _revive(
    network: Network,
    fetch: Callable[..., Tensor],
    num_rows: int,
    uses: list[Tensor],
    revive_below: float,
    seed: int,
    epoch: int,
) -> list[int]:
    dead = [torch.nonzero(use < revive_below * num_rows / len(use)).flatten() for use in uses]
    numbers = [len(codes) for codes in dead]
    if not any(numbers):
        return numbers
    # Rows of their own for every level: a row whose residual became a code leaves nothing over for the next level.
    rows = _draw(num_rows, min(sum(numbers), num_rows), [seed, REVIVAL, epoch])
    residuals = network.quantizer(network.encoder(fetch(rows))).residuals  # (L, m, d)
    places = torch.arange(sum(numbers), device=residuals.device) % len(rows)
    for level, (codes, mine) in enumerate(zip(dead, places.split(numbers), strict=True)):
        if len(codes):
            network.quantizer.codebooks[level].revive(codes, residuals[level, mine])
    return numbers


def _draw(num_rows: int, size: int, seed: list[int]) -> npt.NDArray[np.int64]:
    """Different random rows, all of them if `size` is no less than their number."""
    if size >= num_rows:
        return np.arange(num_rows)
    return np.random.default_rng(seed).choice(num_rows, size, replace=False)


def _usage(uses: list[Tensor], revived: list[int]) -> dict[str, list[float]]:
    shares = [(use / use.sum()).double().cpu() for use in uses]
    entropies = [float(-(share * share.clamp_min(1e-300).log()).sum()) for share in shares]
    return {
        "used_share": [float((share > 0).double().mean()) for share in shares],
        "perplexity": [math.exp(entropy) for entropy in entropies],
        "revived": list(revived) if uses else [],
    }

"""Training an RQ-VAE's network: epochs, batches, the dead codes' revival, the log. Knows no files and no items."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from llmrec.exceptions import TokenizerError
from llmrec.quantization.rqvae.alignment import Alignment
from llmrec.quantization.rqvae.checkpoint import Checkpoint
from llmrec.quantization.rqvae.model import Network
from llmrec.quantization.rqvae.processes import Precision, Processes

Read = Callable[[npt.NDArray[np.int64]], Tensor]

# What the draws are for: the second number of their seeds. Those of `alignment` follow.
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
    alignment: Alignment | None = None,
    checkpoint: Checkpoint | None = None,
    checkpoint_epochs: int = 10,
    progress: bool = False,
) -> list[dict[str, Any]]:
    """Trains `network` in place and returns the log, one entry per epoch.

    The first `warmup_epochs` train a plain autoencoder. Then k-means places the codes on the latents of
    `placing_rows` random rows, level by level, and the rest of the epochs train all of it. The learning rate rises
    over the first hundredth of the steps and falls to 0 by a cosine. After every epoch but the last, codes that got
    fewer rows than `revive_below` times an even share move to residuals of random rows.

    On a CPU the same arguments give the same weights, resumed or not. Several processes share each batch, process 0
    places and moves the codes and writes the checkpoints, and all of them end with the same weights, those of one
    process but for rounding.

    Args:
        network: on any device; returned to where accelerate runs.
        read: row numbers (B,) -> their vectors (B, D) float32.
        num_rows: N.
        commitment: weight of the commitment loss.
        mixed_precision: autocast for encoder and decoder.
        alignment: LETTER's losses, which begin after the plain epochs.
        checkpoint: written every `checkpoint_epochs` and at the end, and resumed from.

    Returns:
        Per epoch "epoch" (from 1), "loss", "reconstruction", "commitment" (means over the batches, in the units of
        `read`), "alignment" and "diversity" where they have a weight, and for each level "used_share" of its codes,
        "perplexity" and how many were "revived"; the lists are empty while the autoencoder is plain.

    Raises:
        TokenizerError: if the loss is no finite number, accelerate cannot run as asked, or not all processes see the
            same checkpoint.
    """
    levels = network.quantizer.codebooks
    processes = Processes(mixed_precision)
    accelerator, device = processes.accelerator, processes.device
    model, optimizer = processes.prepare(network, torch.optim.Adam(network.parameters(), lr=learning_rate))
    network.train()

    def fetch(rows: npt.NDArray[np.int64]) -> Tensor:
        return read(rows).to(device)

    log: list[dict[str, Any]] = []
    resumed = checkpoint.load(network, optimizer, quiet=not processes.first) if checkpoint is not None else None
    if resumed is not None:
        log = resumed["log"]
        if accelerator.scaler is not None and resumed["scaler"]:
            accelerator.scaler.load_state_dict(resumed["scaler"])
    if not processes.agree(len(log)):
        raise TokenizerError(
            f"Process {processes.index} found a checkpoint of {len(log)} epochs, process 0 another one. Keep the "
            "checkpoints in a folder that all processes read, or remove them."
        )
    terms = {} if alignment is None else alignment.terms
    steps = math.ceil(num_rows / batch_size)
    hidden = not (progress and processes.first)
    for epoch in tqdm(range(len(log), epochs), initial=len(log), total=epochs, desc="RQ-VAE", disable=hidden):
        quantise = epoch >= warmup_epochs
        if epoch == warmup_epochs:
            if processes.first:
                _place(network, fetch, num_rows, placing_rows, batch_size, seed)
            _copy_codes(processes, network)
        codebooks = [level.codes for level in levels]
        labels = alignment.clusters_of(codebooks, epoch) if quantise and alignment is not None else []
        order = np.random.default_rng([seed, ORDER, epoch]).permutation(num_rows)
        totals = torch.zeros(3 + len(terms), device=device)
        uses = [torch.zeros(len(level.codes), device=device) for level in levels]
        for step, batch in enumerate(np.array_split(order, steps)):
            places = processes.part(np.arange(len(batch)))
            count, share = len(places), len(places) / len(batch)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * schedule(epoch * steps + step, epochs * steps)
            # A process without a row of its own still takes part in the steps, with one that has no weight.
            reconstruction, quantised = model(fetch(batch[places] if count else batch[:1]), quantise)
            loss, committed = reconstruction, torch.zeros_like(reconstruction)
            further = [torch.zeros_like(reconstruction)] * len(terms)
            if quantised is not None:
                committed = quantised.commitment
                loss = reconstruction + commitment * committed + quantised.codebook
                if alignment is not None:
                    points, codes = quantised.points[:count], quantised.codes[:count]
                    further = alignment.losses(points, codes, codebooks, labels, batch, places, (epoch, step))
            loss = loss * share  # this process's part of the batch's mean
            for weight, term in zip(terms.values(), further, strict=True):
                loss = loss + weight * term
            optimizer.zero_grad()
            accelerator.backward(loss)
            processes.add_gradients(network)
            optimizer.step()
            parts = [loss, reconstruction * share, committed * share, *further]
            totals += torch.stack(parts).detach() * (len(batch) / num_rows)
            if quantised is not None:
                add = processes.sum if processes.number > 1 else None
                for level, codebook in enumerate(levels):
                    chosen = quantised.codes[:count, level]
                    codebook.average(quantised.residuals[level, :count], chosen, add)
                    uses[level] += torch.bincount(chosen, minlength=len(uses[level]))
        means = processes.sum(totals).tolist()
        uses = [processes.sum(use) for use in uses]
        if not math.isfinite(means[0]):
            raise TokenizerError(
                f"The RQ-VAE's loss is {means[0]} in epoch {epoch + 1}. Fit with a smaller learning rate than "
                f"{learning_rate:g}" + (" or without mixed precision." if mixed_precision != "no" else ".")
            )
        names = ("loss", "reconstruction", "commitment", *terms)
        entry = dict(zip(names, means, strict=True))
        revived = [0] * len(uses)
        if quantise and epoch < epochs - 1:
            revived = _revive(network, fetch, num_rows, uses, revive_below, seed, epoch)
            _copy_codes(processes, network)
        log.append({"epoch": epoch + 1, **entry, **_usage(uses if quantise else [], revived)})
        if (
            checkpoint is not None
            and processes.first
            and ((epoch + 1) % checkpoint_epochs == 0 or epoch == epochs - 1)
        ):
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


@torch.no_grad()
def _copy_codes(processes: Processes, network: Network) -> None:
    for codebook in network.quantizer.codebooks:
        processes.copy_first([codebook.codes, codebook.counts, codebook.sums])


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

"""What each step of thought costs: the time to an answer after 0…K steps, measured side by side."""

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrec.exceptions import DataError
from llmrec.reasoning.steps import thinker
from llmrec.sequence.histories import History, collate, moved

if TYPE_CHECKING:
    from llmrec.sequence.model import SequenceModel

_FOUND = 10


def step_latency(
    model: "SequenceModel", histories: Sequence[History], batches: Sequence[int] = (1, 64), rounds: int = 30
) -> dict[str, Any]:
    """Medians over rounds; in each, every number of steps answers the same histories, in turns.

    An answer is what a request costs in the process: histories to tensors, the history read, the steps thought behind
    its cached keys and values, the scores of all items, the 10 best. The items' table is made before.

    Args:
        model: of an encoder that thinks, in evaluation mode; computes where it lies.
        histories: that requests are drawn from, in their order, over and over.
        batches: how many are answered at once.
        rounds: measured, after two that are not.

    Returns:
        `device`, `threads` (of the CPU), `rounds`, and `batches`: for each `histories`, `milliseconds` by step, and
        `ratio` by step: the median over rounds of the time divided by that of step 0 in the same round.

    Raises:
        DataError: if there is no history, or no round.
        BackboneError: if the encoder does not think.
    """
    encoder = thinker(model)
    if not histories or rounds < 1 or min(batches) < 1:
        raise DataError(
            f"{rounds} rounds of {min(batches)} out of {len(histories)} histories have no time. Give 1 or more each."
        )
    device = model.device
    with torch.inference_mode():
        table = model.table()

        def answer(some: Sequence[History], steps: int) -> float:
            begin = time.perf_counter()
            with encoder.thinking(steps):
                queries = model.last(**moved(collate(some, model.config.max_history), device))
            scores = queries @ table.T
            scores.topk(min(_FOUND, scores.shape[1]), dim=1).indices.cpu()  # waits for the device
            return 1000 * (time.perf_counter() - begin)

        found = []
        for size in batches:
            taken = np.zeros((rounds, encoder.config.steps + 1))
            for number in range(-2, rounds):
                some = [histories[(max(0, number) * size + place) % len(histories)] for place in range(size)]
                # The order turns, so that no step always comes after the same one.
                for turn in range(taken.shape[1]):
                    steps = (turn + number) % taken.shape[1]
                    spent = answer(some, steps)
                    if number >= 0:
                        taken[number, steps] = spent
            found.append(
                {
                    "histories": size,
                    "milliseconds": np.median(taken, axis=0).tolist(),
                    "ratio": np.median(taken / taken[:, :1], axis=0).tolist(),
                }
            )
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {"device": name, "threads": torch.get_num_threads(), "rounds": rounds, "batches": found}

"""NegativeSampler: draws items in proportion to integer counts, exactly, by torch's own random state."""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from llmrec.exceptions import BackboneError


class NegativeSampler(nn.Module):
    """Items drawn with replacement, item j in proportion to max(1, count of j).

    No item is out of reach, so that what is estimated from draws is right for all of them. All counts 1: uniform.
    Drawing costs O(log N), for catalogues of any size.

    Args:
        counts: (N,) integers, such as the items' training interactions.

    Raises:
        BackboneError: if there are fewer than two items, so that a target has no negatives.
    """

    ends: Tensor

    def __init__(self, counts: npt.NDArray[np.integer]) -> None:
        super().__init__()
        if len(counts) < 2:
            raise BackboneError(f"{len(counts)} item(s) leave nothing to draw negatives from. Use the loss softmax.")
        # Of item j belong the whole numbers from ends[j - 1] to ends[j] - 1. Follows the module to its device, and is
        # no part of what is saved.
        ends = np.cumsum(np.maximum(np.asarray(counts, dtype=np.int64), 1))
        self.register_buffer("ends", torch.from_numpy(ends), persistent=False)
        self.num_items, self.total = len(ends), int(ends[-1])

    def draw(self, number: int) -> Tensor:
        """(number,) int64 rows, of all items."""
        drawn = torch.randint(self.total, (number,), device=self.ends.device)
        return torch.searchsorted(self.ends, drawn, right=True)

    def draw_others(self, targets: Tensor, number: int) -> Tensor:
        """For each of (T,) target rows `number` items that are not it: (T, number) int64.

        In proportion to the counts of the others. Exact: a number is drawn from as many as the others have, and those
        from the target's on are moved behind the target's.
        """
        weights = self._weights(targets)[:, None]
        # The remainder of 62 random bits, which are far more than counts have. No float64: not every device has it.
        high, low = torch.randint(1 << 31, (2, len(targets), number), device=targets.device)
        drawn = ((high << 31) + low) % (self.total - weights)
        begins = self.ends[targets][:, None] - weights
        return torch.searchsorted(self.ends, drawn + weights * (drawn >= begins), right=True)

    def log_shares(self, rows: Tensor) -> Tensor:
        """log of the probability that a `draw` gives these rows (…); in the device's finest type."""
        return (self._weights(rows).to(finest_type(rows.device)) / self.total).log()

    def log_shares_of_others(self, rows: Tensor, targets: Tensor) -> Tensor:
        """(T, C) rows and (T,) targets -> (T, C), log of the probability that a `draw_others` gives them; likewise."""
        exact = finest_type(rows.device)
        return (self._weights(rows).to(exact) / (self.total - self._weights(targets))[:, None]).log()

    def _weights(self, rows: Tensor) -> Tensor:
        begins = torch.where(rows > 0, self.ends[(rows - 1).clamp_min(0)], 0)
        return self.ends[rows] - begins


def finest_type(device: torch.device) -> torch.dtype:
    """float64, or float32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64

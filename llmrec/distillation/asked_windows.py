"""AskedWindows: training windows that say of each label which interaction it is, for targets computed beforehand."""

from typing import Any

import numpy as np

from llmrec.exceptions import DataError
from llmrec.sequence.histories import Numbers
from llmrec.sequence.windows import TrainingWindows


class AskedWindows(TrainingWindows):
    """`TrainingWindows` whose batches have `asked` (B, S) besides: the place in `Split.rows` of each label, 0 at
    padding."""

    def __init__(self, *args: Any, **options: Any) -> None:
        """As `TrainingWindows`; raises DataError for windows that are thinned, or whose items are hidden."""
        super().__init__(*args, **options)
        if self.alpha < 2 or self.hidden_share > 0:
            raise DataError(
                f"Windows with stochastic length {self.alpha} and {self.hidden_share} of their items hidden do not "
                "say what follows a whole history. Leave both out where a language model teaches."
            )

    def _window(self, epoch: int, number: int) -> dict[str, Numbers]:
        found = super()._window(epoch, number)
        window = self.windows[number if number >= 0 else -1 - number]
        return found | {"asked": window.begin + 1 + np.arange(len(found["items"]), dtype=np.int64)}

"""OwnRandomState: each process of a distributed training draws its own dropout masks and negatives."""

from typing import Any

import torch
from transformers import Trainer


class OwnRandomState(Trainer):
    """A mixin over `transformers.Trainer`, which gives all processes one seed.

        class MyTrainer(OwnRandomState, WholeCheckpoints, transformers.Trainer): ...

    They would drop the same places of their batches, and draw the same negatives for them: a batch of many processes
    would be less random than one of the same size in one. Here the state of process p is that of `seed + p`, from the
    end of `__init__` on: weights are made before it, alike everywhere. Process 0, and so a training of one process, is
    as it was. Checkpoints keep the state of each.

    What all processes have to draw alike, the order of the rows, accelerate takes from the state too, if it is given
    no seed; it is given `data_seed`, or `seed`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        order = self.accelerator.dataloader_config
        if order.data_seed is None:
            order.data_seed = self.args.seed
        if self.args.process_index:
            torch.manual_seed(self.args.seed + self.args.process_index)

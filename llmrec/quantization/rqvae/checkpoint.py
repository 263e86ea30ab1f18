"""Checkpoint: the whole state of a fit in one safetensors file, which is there in full or not at all."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from llmrec.storage import atomic_path

logger = logging.getLogger(__name__)

FILE = "rqvae.checkpoint.safetensors"


class Checkpoint:
    """Writes and reads the network's weights, the optimiser's moments and what is passed as `progress`.

    Nothing else has a state: batches and draws follow from the seed and the epoch's number.
    """

    def __init__(self, folder: str | Path, run: str) -> None:
        """`run` identifies settings and data; a file with another identity is not resumed from."""
        self.path = Path(folder) / FILE
        self.run = run

    def save(self, network: nn.Module, optimizer: Any, progress: Mapping[str, Any]) -> None:
        """Replaces the file; a kill in the middle leaves the one before."""
        tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
        for index, moments in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": tensor for name, tensor in moments.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with atomic_path(self.path) as temporary:
            save_file(tensors, temporary, metadata={"run": self.run, "progress": json.dumps(progress)})

    def load(self, network: nn.Module, optimizer: Any, quiet: bool = False) -> dict[str, Any] | None:
        """Fills network and optimiser and returns the progress, or None if there is nothing to resume.

        A file of another run or one that cannot be read is passed over, unless `quiet` with a warning, and overwritten
        later.
        """
        if not self.path.is_file():
            return None
        try:
            with safe_open(self.path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("run") != self.run:
                    if not quiet:
                        logger.warning("%s is of other settings or embeddings; the fit begins anew.", self.path)
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            progress: dict[str, Any] = json.loads(metadata["progress"])
            weights = {name[8:]: tensor for name, tensor in tensors.items() if name.startswith("network.")}
            moments: dict[int, dict[str, torch.Tensor]] = {}
            for name, tensor in tensors.items():
                if name.startswith("optimizer."):
                    _, index, key = name.split(".")
                    moments.setdefault(int(index), {})[key] = tensor
            network.load_state_dict(weights)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            if not quiet:
                logger.warning("%s cannot be resumed from (%r); the fit begins anew.", self.path, error)
            return None
        return progress

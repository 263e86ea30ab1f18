"""BeamGraphs: device work of static shapes, recorded once per shape and replayed.

A beam step is a few dozen small kernels per layer, and on a GPU starting them takes longer than running them. What is
recorded is a function of tensors whose shapes the key tells: a search's L levels with the steps between them, for so
many requests and beams (`llmrec.kernels.static_search`, over prompts read in place or gathered). Inputs are copied to
where the recording read them, outputs are copied out of where it writes them.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from llmrec.exceptions import EngineError

Tensors = Mapping[str, torch.Tensor]
Work = Callable[[Tensors], tuple[torch.Tensor, ...]]


class Graph(Protocol):
    """Recorded work."""

    def replay(self) -> None:
        """Does it again, on what its inputs hold now."""
        ...


# Runs work in a way that it can be repeated: (work without arguments) -> (the graph, its outputs).
Record = Callable[[Callable[[], tuple[torch.Tensor, ...]]], tuple[Graph, tuple[torch.Tensor, ...]]]


def cuda_graph(work: Callable[[], tuple[torch.Tensor, ...]]) -> tuple[Graph, tuple[torch.Tensor, ...]]:
    """Records work as a CUDA graph with a memory pool of its own, after it has run twice to warm up.

    The warm-up is on a side stream, as torch asks: kernels are compiled and libraries set up there, which a recording
    must not do.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = work()
    return graph, found


@dataclass(frozen=True)
class _Recording:
    graph: Graph
    inputs: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]


class BeamGraphs:
    """Recordings by key, the least recently used let go: each keeps the memory of all that it computes."""

    def __init__(self, most: int = 16, record: Record = cuda_graph) -> None:
        """
        Args:
            most: recordings that are kept.
            record: how work is recorded.
        """
        self._most, self._record = max(1, most), record
        self._known: OrderedDict[Hashable, _Recording] = OrderedDict()

    def run(self, key: Hashable, work: Work, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        """The outputs of `work(inputs)`, by replaying what was recorded for this key if there is something.

        Args:
            key: tells everything that the work depends on but the values of `inputs`: the catalog's version, numbers
                of requests and beams, the prompts' greatest length, adapters.
            work: of static shapes; does not wait for the device, and reads nothing that `inputs` and what lives as
                long as the recording do not hold.
            inputs: tensors by name.

        Raises:
            EngineError: if inputs are not of the names, shapes and types that were recorded for this key.
        """
        if key not in self._known:
            kept = {name: value.clone() for name, value in inputs.items()}
            graph, outputs = self._record(lambda: work(kept))
            self._known[key] = _Recording(graph, kept, outputs)
            while len(self._known) > self._most:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        recording = self._known[key]
        _copy(inputs, recording.inputs)
        recording.graph.replay()
        return tuple(value.clone() for value in recording.outputs)

    def forget(self) -> None:
        """Lets all recordings go, with their memory: when weights or the cache move."""
        self._known.clear()


def bucket(requests: int) -> int:
    """Requests that a recording is made for, so that few are: the next power of two.

    >>> [bucket(requests) for requests in (1, 3, 8)]
    [1, 4, 8]
    """
    return 1 << (requests - 1).bit_length()


def _copy(given: Tensors, kept: dict[str, torch.Tensor]) -> None:
    described = {name: (tuple(value.shape), value.dtype) for name, value in given.items()}
    recorded = {name: (tuple(value.shape), value.dtype) for name, value in kept.items()}
    if described != recorded:
        raise EngineError(f"Inputs are {described}, and {recorded} were recorded. Tell them apart by their key.")
    for name, value in given.items():
        kept[name].copy_(value)

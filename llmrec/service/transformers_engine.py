"""TransformersEngine: searches with a transformers model in this process; a whole server in seconds, without vLLM.

Requests of as many beams and of one adapter are put into one search (`llmrec.decoding.decode`), each with its own
trie. What vLLM adds is a paged cache, prefixes shared between requests and a GPU's speed; the parameters, the index
files and the answers are the same.
"""

import time
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from llmrec.beam import normalizer
from llmrec.decoding import decode, pad_left
from llmrec.engine.request import Found, SearchParameters
from llmrec.exceptions import EngineError, LLMRecError, RequestError
from llmrec.selection import Draw, PrefixCap
from llmrec.service.batched_engine import Asked, BatchedEngine
from llmrec.service.index_files import IndexFiles
from llmrec.trie_tensors import TrieTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# So many tokens, of prompts and beams, are held by one search's cache: bounds its memory.
CACHED_TOKENS = 32_000
_MAX_BATCH = 64
_MAX_TRIES = 128


class TransformersEngine(BatchedEngine):
    """A `SearchEngine` on a transformers model.

    Attributes:
        max_tokens: the model's positions.
        dtype: of its weights.
        adapters: names of the LoRA adapters that a PEFT model holds; a plain model has none.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        index_folder: str | Path,
        index: str = "",
        max_batch: int = _MAX_BATCH,
        cached_tokens: int = CACHED_TOKENS,
    ) -> None:
        """Starts its thread.

        Args:
            model: a causal LM in eval mode, or a PEFT model around one. It is this engine's alone until `close`.
            index_folder: see `IndexFiles`.
            index: the file that requests without one mean.
            max_batch: requests that are searched together.
            cached_tokens: that one search holds; a single request may need more.
        """
        self.max_tokens = int(getattr(model.config, "max_position_embeddings", None) or 2**31 - 1)
        self.dtype = str(model.dtype).removeprefix("torch.")
        self.adapters = sorted(getattr(model, "peft_config", {}))
        self._model: Any = model
        self._files = IndexFiles(index_folder)
        self._index = index
        self._tries: OrderedDict[str, TrieTensors] = OrderedDict()
        super().__init__(max_batch, cached_tokens)

    def _prepare(self, asked: Asked) -> None:
        asked.items = self._trie_of(asked.parameters)

    def _group(self, asked: Asked) -> Hashable:
        return asked.adapter or "", asked.parameters.num_beams, asked.items.num_levels

    def _cost(self, asked: Asked) -> int:
        """Tokens in the cache, of the prompt and of the beams; a batch is padded to its longest."""
        trie: TrieTensors = asked.items
        return len(asked.prompt) + min(asked.parameters.num_beams, trie.num_leaves) * trie.num_levels

    def _find(self, batch: Sequence[Asked]) -> list[Found]:
        with self._adapted(batch[0].adapter):
            return self._search(batch) if batch[0].parameters.num_beams else self._next_tokens(batch)

    def _search(self, batch: Sequence[Asked]) -> list[Found]:
        asked = [one.parameters for one in batch]
        ran: list[float] = []
        hook = self._model.register_forward_hook(lambda *_: ran.append(time.perf_counter()))
        try:
            beams = decode(
                self._model,
                [one.prompt for one in batch],
                [one.items for one in batch],
                asked[0].num_beams,
                excluded=[np.array(one.excluded, dtype=np.int64) for one in asked],
                renormalize=[one.renormalize for one in asked],
                caps=[PrefixCap(one.cap_levels, one.cap) if one.cap else None for one in asked],
                draws=[Draw(one.temperature, one.seed) if one.temperature else None for one in asked],
            )
        finally:
            hook.remove()
        seconds = time.perf_counter() - ran[0] if ran else 0.0
        found = []
        for row, one in enumerate(asked):
            rows = beams.items[row, : one.k].tolist()
            count = sum(item >= 0 for item in rows)  # legal items come first
            scores, levels = beams.scores[row, :count].tolist(), beams.levels[row, :count].tolist()
            found.append(Found(rows[:count], scores, levels, seconds))
        return found

    @torch.inference_mode()
    def _next_tokens(self, batch: Sequence[Asked]) -> list[Found]:
        """The log-probability of one token after each prompt, from an ordinary prefill."""
        if longest := [one for one in batch if not 0 < len(one.prompt) <= self.max_tokens]:
            raise RequestError(
                f"A prompt of {len(longest[0].prompt)} tokens does not fit the model's {self.max_tokens} positions. "
                "Shorten the history."
            )
        device = self._model.device
        tokens, mask, positions = pad_left([one.prompt for one in batch], device)
        output = self._model(input_ids=tokens, attention_mask=mask, position_ids=positions, logits_to_keep=1)
        found = []
        for one, logits in zip(batch, output.logits[:, -1], strict=True):
            logits = logits if logits.dtype == torch.float64 else logits.float()
            trie: TrieTensors = one.items
            value = float(logits[one.parameters.token] - normalizer(logits, trie.vocabulary)[0])
            found.append(Found([0], [value], [[value] + [0.0] * (trie.num_levels - 1)], 0.0))
        return found

    def _trie_of(self, asked: SearchParameters) -> TrieTensors:
        """The trie that a request searches; raises EngineError if there is no such file."""
        trie = self._mapped(asked.subset or asked.index or self._index)
        return trie if asked.allowed is None else trie.subset(np.array(asked.allowed, dtype=np.int64))

    def _mapped(self, name: str) -> TrieTensors:
        if name not in self._tries:
            # No request names a file that was removed, and what is mapped of it would go on taking its place on disk.
            for gone in [known for known in self._tries if not self._files.size(known)]:
                del self._tries[gone]
            try:
                path = self._files.path(name)
                self._tries[name] = TrieTensors.map(path, device=self._model.device)
            except LLMRecError as error:
                raise EngineError(f"A search's index cannot be read: {error}") from error
            while len(self._tries) > _MAX_TRIES:
                self._tries.popitem(last=False)
        self._tries.move_to_end(name)
        return self._tries[name]

    @contextmanager
    def _adapted(self, adapter: str | None) -> Iterator[None]:
        """Runs the model with one adapter, or with none."""
        if adapter is not None:
            self._model.set_adapter(adapter)
            yield
        elif self.adapters:
            with self._model.disable_adapter():
                yield
        else:
            yield

"""BeamPooler: runs the beam search when a prompt's prefill is done, in the same engine step."""

import logging
from collections.abc import Callable, Sequence, Set
from typing import Any

import numpy as np
import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.pooler.abstract import Pooler

from llmrec.beam import TrieTensors, beam_search, normalizer
from llmrec.engine.attention import BeamAttention, PagedLayout
from llmrec.engine.request import FAILED, SearchParameters

logger = logging.getLogger(__name__)
# Beams of one pass through the layers, over all requests of it: bounds the search's memory.
_BEAMS_AT_ONCE = 4096


class BeamPooler(Pooler):
    """vLLM calls it after each step's forward pass, with the hidden states of all scheduled tokens.

    A finished request gets its search's result, a (k, 2) float64 tensor of catalog rows and log-probabilities, best
    first (float64 keeps rows exact); a request whose prompt is only partly run gets a placeholder that vLLM drops.
    """

    def __init__(self, vllm_config: Any, run: Callable[..., torch.Tensor], logits: Callable[..., Any]) -> None:
        """
        Args:
            vllm_config: of the worker.
            run: (input_ids, positions) -> hidden states, the model's own forward pass.
            logits: hidden states -> (n, V).
        """
        super().__init__()
        self._vllm_config = vllm_config
        self._run = run
        self._logits = logits
        self._layers: dict[str, Any] = {}
        self._layout: PagedLayout | None = None
        self._trie: TrieTensors | None = None
        self._metadata: dict[str, Any] | None = None

    def prepare(self, trie: TrieTensors, layers: dict[str, Any]) -> None:
        """Gives it the catalog and the attention layers by name, once the weights are loaded."""
        self._trie, self._layers = trie, layers

    def remember(self, metadata: Any) -> None:
        """Keeps the attention metadata of the forward pass that has just begun; None for a dummy run.

        The pooler is called outside vLLM's forward context, and needs the block table of that pass.
        """
        self._metadata = metadata if isinstance(metadata, dict) else None

    def get_supported_tasks(self) -> Set[Any]:
        return {"embed"}

    @torch.inference_mode()
    def forward(self, hidden_states: torch.Tensor, pooling_metadata: Any) -> list[torch.Tensor | None]:
        metadata, self._metadata = self._metadata, None  # never used for a later step
        parameters = pooling_metadata.pooling_params
        cursor = pooling_metadata.get_pooling_cursor()
        results: list[torch.Tensor | None] = [None] * len(parameters)
        if metadata is None:  # vLLM's dummy run: no cache, nothing to search
            nothing = torch.zeros((1, 2), dtype=torch.float64, device=hidden_states.device)
            return [nothing if asked.extra_kwargs is None else _failed() for asked in parameters]
        finished = [row for row, done in enumerate(cursor.get_finished_mask()) if done]
        groups: dict[int, list[int]] = {}
        for row in finished:
            try:
                groups.setdefault(SearchParameters.unpack(parameters[row].extra_kwargs).num_beams, []).append(row)
            except (TypeError, ValueError):
                logger.exception("a request reached the engine with parameters that are not a search's")
                results[row] = _failed()
        for beams, rows in groups.items():
            at_once = max(1, _BEAMS_AT_ONCE // max(1, beams))
            for begin in range(0, len(rows), at_once):
                some = rows[begin : begin + at_once]
                searches = [SearchParameters.unpack(parameters[row].extra_kwargs) for row in some]
                # An exception here would end the engine for everybody: it ends only these requests.
                try:
                    found = self._search(hidden_states, cursor, metadata, some, searches)
                except Exception:
                    logger.exception("a beam search failed")
                    found = [_failed() for _ in some]
                for row, result in zip(some, found, strict=True):
                    results[row] = result
        return results

    def _search(
        self,
        hidden_states: torch.Tensor,
        cursor: Any,
        metadata: dict[str, Any],
        rows: Sequence[int],
        searches: Sequence[SearchParameters],
    ) -> list[torch.Tensor]:
        """The results of requests `rows` of the batch, which all have the same number of beams."""
        assert self._trie is not None
        device = hidden_states.device
        places = torch.tensor(rows, device=device)
        lengths = torch.tensor([int(cursor.prompt_lens_cpu[row]) for row in rows], device=device)
        logits = self._logits(hidden_states[cursor.last_token_indices_gpu[places]])  # (R, V)
        beams = searches[0].num_beams
        if beams == 0:
            return [_next_token(logits[row], search, self._trie.vocabulary) for row, search in enumerate(searches)]
        attention = {
            name: self._prefix(layer, metadata[name].block_table[places], lengths)
            for name, layer in self._layers.items()
        }
        position = lengths.unsqueeze(1)  # (R, 1) of the next token

        def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
            nonlocal position
            for layer in attention.values():
                layer.descend(parents)
            # Contiguous: the kernels read raw pointers, and an expanded view of one request has stride 0.
            positions = position.repeat(1, tokens.shape[1]).flatten().contiguous()
            with set_forward_context(
                attention, self._vllm_config, num_tokens=tokens.numel(), slot_mapping={}, skip_compiled=True
            ):
                hidden = self._run(tokens.flatten().contiguous(), positions)
            position = position + 1
            return self._logits(hidden).view(*tokens.shape, -1)  # type: ignore[no-any-return]

        excluded = [np.array(search.excluded, dtype=np.int64) for search in searches]
        found = beam_search(logits, step, self._trie, beams, excluded)
        results = []
        for row, search in enumerate(searches):
            legal = int((found.items[row] >= 0).sum())
            take = min(search.k, legal)
            results.append(torch.stack([found.items[row, :take].double(), found.scores[row, :take].double()], dim=1))
        return results

    def _prefix(self, layer: Any, block_table: torch.Tensor, lengths: torch.Tensor) -> BeamAttention:
        """The prompts' keys and values of one layer, out of the paged cache."""
        if self._layout is None:
            self._layout = PagedLayout(layer, self._vllm_config.cache_config.block_size)
        blocks = -(-int(lengths.max()) // self._layout.block)
        # Entries past a short prompt's blocks may be anything; the mask hides what they point to.
        table = block_table[:, :blocks].clamp(0, layer.kv_cache.shape[0] - 1)
        key, value = self._layout.read(layer.kv_cache, table)
        return BeamAttention(key, value, lengths)


def _next_token(logits: torch.Tensor, search: SearchParameters, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """The log-probability of one token after the prompt, from the prefill alone: what the self-check compares with."""
    logits = logits.float()
    value = logits[search.token] - normalizer(logits, vocabulary)[0]
    return torch.stack([torch.zeros_like(value), value]).double().unsqueeze(0)


def _failed() -> torch.Tensor:
    return torch.tensor([[FAILED, 0.0]], dtype=torch.float64)

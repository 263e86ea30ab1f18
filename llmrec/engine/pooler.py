"""BeamPooler: runs the beam search when a prompt's prefill is done, in the same engine step."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.pooler.abstract import Pooler

from llmrec.beam import beam_search, normalizer
from llmrec.engine.attention import BeamAttention, GatheredPrompts, NoPrompts, Progress, Prompts, Sight, Unkept
from llmrec.engine.flash import FlashBeamAttention, FlashReader, PromptLengths
from llmrec.engine.indexes import Indexes
from llmrec.engine.layout import Layouts
from llmrec.engine.lora import LoraRows, lora_rows
from llmrec.engine.memory import Portion, SearchMemory
from llmrec.engine.request import FAILED, REFUSED, Found, SearchParameters
from llmrec.exceptions import LLMRecError, RequestError
from llmrec.selection import Draw, PrefixCap
from llmrec.trie_tensors import TrieTensors

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Asked:
    """A request whose prompt has been run, checked and with its trie.

    Attributes:
        row: of the batch.
        last: place of its prompt's last token in the batch.
        length: tokens of its prompt.
        parameters: as they came.
        trie: that is searched.
        excluded: catalog rows.
    """

    row: int
    last: int
    length: int
    parameters: SearchParameters
    trie: TrieTensors
    excluded: npt.NDArray[np.int64]

    @property
    def cap(self) -> PrefixCap | None:
        """What the search takes."""
        return PrefixCap(self.parameters.cap_levels, self.parameters.cap) if self.parameters.cap else None

    @property
    def draw(self) -> Draw | None:
        """What the search takes."""
        temperature = self.parameters.temperature
        return Draw(temperature, self.parameters.seed) if temperature else None


@dataclass(frozen=True)
class Batch:
    """What an engine step left for its searches.

    Attributes:
        hidden: (tokens, width) hidden states of all prompt tokens of the step.
        tables: per layer the block table, (requests, blocks) int32; None where there is no cache yet (dummy run).
        lora: the rows' adapters.
    """

    hidden: torch.Tensor
    tables: dict[str, torch.Tensor] | None
    lora: LoraRows | None


class BeamPooler(Pooler):
    """vLLM calls it after each step's forward pass, with the hidden states of all scheduled tokens.

    A finished request gets its search's result, `Found.pack`, or one row with the status FAILED or REFUSED; a request
    whose prompt is only partly run gets None, which vLLM drops. No exception leaves it: one would end the engine for
    everybody.
    """

    def __init__(self, vllm_config: Any, run: Callable[..., torch.Tensor], logits: Callable[..., Any]) -> None:
        """
        Args:
            vllm_config: of the worker.
            run: (input_ids, positions) -> hidden states, the model's own forward pass.
            logits: hidden states -> (n, V).
        """
        super().__init__()
        self._vllm_config, self._run, self._logits = vllm_config, run, logits
        self._positions = int(vllm_config.model_config.max_model_len)
        self._layers: dict[str, Any] = {}
        self._layouts = Layouts()
        self._metadata: dict[str, Any] | None = None

    def prepare(
        self,
        indexes: Indexes,
        layers: dict[str, Any],
        memory: SearchMemory,
        most_beams: int,
        punica: Callable[[], Any] = lambda: None,
        readers: Mapping[str, FlashReader | None] | None = None,
        agree: Callable[[list[bool]], list[bool]] = lambda held: held,
    ) -> None:
        """Gives it what is known once the weights are loaded.

        Args:
            indexes: the tries.
            layers: the attention layers by name.
            memory: the bound on what is searched at once.
            most_beams: the widest search.
            punica: finds the wrapper of the LoRA layers, which are there only later; None without.
            readers: on a GPU, by layer what reads its prompts in place, None for a layer whose prompts are gathered;
                None elsewhere.
            agree: of what holds on this rank, what holds on all that share the layers.
        """
        self._indexes, self._layers, self._memory = indexes, layers, memory
        self._most_beams, self._punica, self._readers, self._agree = most_beams, punica, readers, agree

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
        given = [parameters.extra_kwargs for parameters in pooling_metadata.pooling_params]
        results: list[torch.Tensor | None] = [None] * len(given)
        if metadata is None and all(values is None for values in given):
            with lora_rows(self._punica()) as lora:
                self.run_widest(hidden_states, len(given), lora)
            return [_status(FAILED) for _ in given]
        finished = [row for row, done in enumerate(pooling_metadata.get_pooling_cursor().get_finished_mask()) if done]
        if metadata is None:
            logger.error("no block tables came with this step, so that nothing can be searched: use vllm 0.32")
            return [_status(FAILED) if row in finished else None for row in range(len(given))]
        cursor = pooling_metadata.get_pooling_cursor()
        lasts = cursor.last_token_indices_gpu.tolist() if finished else []
        checked: list[Asked] = []
        for row in finished:
            try:
                asked = self._check(row, lasts[row], int(cursor.prompt_lens_cpu[row]), given[row])
            except (TypeError, ValueError, LLMRecError) as error:
                logger.warning("a search is refused: %s", error)
                results[row] = _status(REFUSED)
            except Exception:
                logger.exception("a search could not be prepared")
                results[row] = _status(FAILED)
            else:
                checked.append(asked)
        # A file may have gone before the second rank came to it, and who searches alone waits for the others for ever.
        fits = self._agree([results[row] is None for row in finished])
        groups: dict[tuple[int, int, int], list[Asked]] = {}
        for asked in checked:
            if fits[finished.index(asked.row)]:
                alike = (asked.parameters.num_beams, asked.trie.num_levels, asked.trie.token_levels)
                groups.setdefault(alike, []).append(asked)
            else:
                results[asked.row] = _status(REFUSED)
        with lora_rows(self._punica()) as lora:
            tables = {name: metadata[name].block_table for name in self._layers}
            batch = Batch(hidden_states, tables, lora)
            for (beams, *_), group in groups.items():
                memory = self._memory if lora is None else self._memory.rows(lora.most_rows)
                fan_out = max(max(asked.trie.fan_out, default=0) for asked in group)
                for portion in memory.plan([asked.length for asked in group], beams, fan_out):
                    for asked, result in self._answers(batch, [group[place] for place in portion.places], portion):
                        results[asked.row] = result
        return results

    def _check(self, row: int, last: int, length: int, values: dict[str, Any] | None) -> Asked:
        """A request with its trie; raises RequestError, TypeError or ValueError if it fits no search."""
        parameters = SearchParameters.unpack(values)
        whole = self._indexes.of(parameters.index)
        trie = self._indexes.of(parameters.subset) if parameters.subset else whole
        excluded = _rows("excluded", parameters.excluded, whole.num_rows)
        if parameters.allowed is not None:
            trie = trie.subset(_rows("allowed", parameters.allowed, whole.num_rows))
        if parameters.num_beams > self._most_beams:
            raise RequestError(
                f"A search has {parameters.num_beams} beams, and the engine {self._most_beams} at most. Ask for fewer."
            )
        if parameters.cap_levels > trie.num_levels:
            raise RequestError(
                f"A cap on {parameters.cap_levels} levels has {trie.num_levels} to work on. Ask for fewer."
            )
        if parameters.num_beams and length + trie.token_levels - 1 > self._positions:
            raise RequestError(
                f"A prompt of {length} tokens and {trie.token_levels} of an item exceed {self._positions} positions "
                "of the engine. Shorten the history."
            )
        return Asked(row, last, length, parameters, trie, excluded)

    def _answers(self, batch: Batch, group: list[Asked], portion: Portion) -> list[tuple[Asked, torch.Tensor]]:
        """A result for each request of a portion; where the search fails, each is tried alone, and fails alone."""
        try:
            return list(zip(group, self._search(batch, group, portion), strict=True))
        except RequestError as error:
            if len(group) == 1:
                logger.warning("a search is refused: %s", error)
                return [(group[0], _status(REFUSED))]
        except Exception:
            logger.exception("a beam search failed")
            if len(group) == 1:
                return [(group[0], _status(FAILED))]
        return [answer for asked in group for answer in self._answers(batch, [asked], portion)]

    def _search(self, batch: Batch, group: Sequence[Asked], portion: Portion) -> list[torch.Tensor]:
        """The results of requests that all have the same number of beams, and of levels."""
        begin = time.perf_counter()
        device = batch.hidden.device
        lasts = torch.tensor([asked.last for asked in group], device=device)
        if batch.lora:
            batch.lora.use(lasts, 1)
        logits = self._logits(batch.hidden[lasts])  # (R, V)
        beams = group[0].parameters.num_beams
        if beams == 0:
            return [_next_token(logits[place], asked) for place, asked in enumerate(group)]
        steps = max(asked.trie.token_levels for asked in group) - 1
        progress = Progress()
        attention = self._attention(batch, group, portion, progress, steps)
        lengths = torch.tensor([asked.length for asked in group], device=device)

        def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
            for layer in attention.values():
                layer.descend(parents)
            width = tokens.shape[1]
            found = []
            for first in range(0, width, portion.width):
                progress.begin, progress.end = first, min(width, first + portion.width)
                number = progress.end - first
                if batch.lora:
                    batch.lora.use(lasts, number)
                # Contiguous: the kernels read raw pointers, and an expanded view of one request has stride 0.
                positions = (lengths + progress.step).repeat_interleave(number)
                some = tokens[:, first : progress.end].flatten().contiguous()
                with set_forward_context(
                    attention, self._vllm_config, num_tokens=len(some), slot_mapping={}, skip_compiled=True
                ):
                    hidden = self._run(some, positions)
                found.append(self._logits(hidden).unflatten(0, (len(group), number)))
            progress.step += 1
            return found[0] if len(found) == 1 else torch.cat(found, dim=1)

        found = beam_search(
            logits,
            step,
            [asked.trie for asked in group],
            beams,
            [asked.excluded for asked in group],
            [asked.parameters.renormalize for asked in group],
            [asked.cap for asked in group],
            [asked.draw for asked in group],
        )
        items, scores, levels = found.items.tolist(), found.scores.tolist(), found.levels.tolist()
        seconds = time.perf_counter() - begin
        results = []
        for place, asked in enumerate(group):
            take = min(asked.parameters.k, sum(item >= 0 for item in items[place]))
            answer = Found(items[place][:take], scores[place][:take], levels[place][:take], seconds)
            results.append(answer.pack(found.levels.shape[2]))
        return results

    def _attention(
        self, batch: Batch, group: Sequence[Asked], portion: Portion, progress: Progress, steps: int
    ) -> dict[str, BeamAttention]:
        """What stands in the place of each layer's attention metadata."""
        lengths = [asked.length for asked in group]
        rows = torch.tensor([asked.row for asked in group], device=batch.hidden.device)
        sights: dict[tuple[int, int | None], Sight] = {}
        kind = BeamAttention if self._readers is None else FlashBeamAttention
        on_device = PromptLengths(lengths, batch.hidden.device)
        found = {}
        for name, layer in self._layers.items():
            window = layer.sliding_window

            def read(name: str = name, layer: Any = layer, window: int | None = window) -> Prompts:
                layout = None if batch.tables is None else self._layouts.of(layer)
                block = 1 if layout is None else layout.block
                if (block, window) not in sights:
                    sights[block, window] = Sight(lengths, block, window, batch.hidden.device)
                sight = sights[block, window]
                if layout is None or batch.tables is None:
                    shape = (len(lengths), layer.num_kv_heads, sight.columns.shape[1], layer.head_size)
                    return GatheredPrompts(batch.hidden.new_zeros(shape), batch.hidden.new_zeros(shape), sight)
                table = batch.tables[name][rows]
                # Entries past a short prompt's blocks may be anything; the mask hides what they point to.
                table = table.gather(1, sight.columns.clamp(max=table.shape[1] - 1))
                blocks = table.clamp(0, layer.kv_cache.shape[0] - 1)
                return GatheredPrompts(*layout.read(layer.kv_cache, blocks), sight)

            reader = None if self._readers is None else self._readers[name]
            prompts: Prompts
            if reader is None:
                prompts = read() if portion.keep else Unkept(read)
            elif batch.tables is None:
                prompts = NoPrompts()
            else:
                prompts = reader.prompts(batch.tables[name][rows], on_device)
            found[name] = kind(prompts, progress, steps, window)
        return found

    def run_widest(self, hidden: torch.Tensor, requests: int, lora: LoraRows | None = None) -> None:
        """Runs the searches that need the most memory, on prompts of nothing: for vLLM's profile run.

        vLLM gives to its cache what its profile run leaves, so what is run here cannot lack memory later. Exceptions
        are raised.

        Args:
            hidden: (tokens, width) any hidden states.
            requests: of a batch, at most.
            lora: the rows' adapters.
        """
        trie = self._indexes.of("")
        longest = max(1, self._positions - trie.token_levels + 1)
        memory = self._memory if lora is None else self._memory.rows(lora.most_rows)
        parameters = SearchParameters(k=self._most_beams, num_beams=self._most_beams)
        for length in {1, longest}:
            first, *_ = memory.plan([length] * requests, self._most_beams, max(trie.fan_out, default=0))
            asked = Asked(0, 0, length, parameters, trie, np.empty(0, dtype=np.int64))
            self._search(Batch(hidden, None, lora), [asked] * len(first.places), first)
        memory.reserve(hidden.device)  # of which a larger catalog, swapped in later, may need more than this one


def _rows(name: str, rows: list[int], number: int) -> npt.NDArray[np.int64]:
    """Catalog rows as an array; raises RequestError if one is no row of a catalog of `number`."""
    if not all(isinstance(row, int) and 0 <= row < number for row in rows):
        raise RequestError(f"The {name} rows are not all numbers from 0 to {number - 1}. Name rows of the catalog.")
    return np.array(rows, dtype=np.int64)


def _next_token(logits: torch.Tensor, asked: Asked) -> torch.Tensor:
    """The log-probability of one token after the prompt, from the prefill alone: what the self-check compares with."""
    logits, token = logits.float(), asked.parameters.token
    if not 0 <= token < len(logits):
        raise RequestError(f"Token {token} is none of the model's {len(logits)}. Ask for one of them.")
    value = float(logits[token] - normalizer(logits, asked.trie.vocabulary)[0])
    return Found([0], [value], [[value]], 0.0).pack(1)


def _status(status: float) -> torch.Tensor:
    return torch.tensor([[status, 0.0]], dtype=torch.float64)

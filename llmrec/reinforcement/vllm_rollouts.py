"""VLLMRollouts: groups from a vLLM engine in the process that trains, with the policy's weights of the moment."""

import copy
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch

from llmrec.backbones.adapters import merge
from llmrec.backbones.bits import is_quantised
from llmrec.catalog import Catalog, Softmax
from llmrec.engine.plugin import ARCHITECTURES, INDEX, INDEX_FOLDER, MAX_BEAMS, register
from llmrec.engine.request import OK, Found, SearchParameters
from llmrec.environment import DEFAULT_KV_CACHE_GIB
from llmrec.exceptions import EngineError, RecipeError
from llmrec.reinforcement.group_weights import group_weights
from llmrec.reinforcement.rollouts import Groups, check_group_size, draws_of, excluded_rows
from llmrec.reinforcement.versions import check_vllm
from llmrec.selection import Draw
from llmrec.trie_tensors import TrieTensors

if TYPE_CHECKING:
    from llmrec.reinforcement.cases import RolloutCases

_INDEX_FILE = "catalog.trie.safetensors"


class VLLMRollouts:
    """Rollouts by the search that serves (`llmrec.engine`): the same items and log-probabilities as transformers'.

    Before each generation the policy's weights go into the engine, an adapter's merged into a copy of its base, and
    what the engine remembers of prompts under older weights is forgotten. The engine lives in this process and holds
    weights of its own, so the policy's memory is needed twice; and it serves one process: trainings of several make
    their rollouts with transformers.

    A context manager; at its end the engine ends.

    Attributes:
        model, catalog, cases, group_size, softmax: see `Rollouts`.
    """

    def __init__(
        self,
        model: Any,
        artefact: str | Path,
        catalog: Catalog,
        cases: "RolloutCases",
        group_size: int,
        *,
        softmax: Softmax = "vocabulary",
        temperature: float | None = None,
        exclude_seen: bool = True,
        seed: int = 0,
        weighted: bool = False,
        dtype: str = "float32",
        max_num_seqs: int = 64,
        kv_cache_gib: int = DEFAULT_KV_CACHE_GIB,
        gpu_memory_utilization: float = 0.3,
    ) -> None:
        """
        Args:
            model: the policy, a causal LM in whole or half precision, maybe in PEFT's wrapper.
            artefact: the folder that training starts from, for the model's shape; its weights are replaced.
            catalog, cases, group_size, softmax, temperature, exclude_seen, seed, weighted: see `TransformersRollouts`;
                draws are not weighted.
            dtype: that the engine computes in.
            max_num_seqs: prompts that are searched together, at most.
            kv_cache_gib: memory for keys and values on a CPU.
            gpu_memory_utilization: the share of a GPU's memory that the engine may take; the rest is for training.

        Raises:
            DependencyError: if vLLM is missing or of another series than the engine was made for.
            RecipeError: if a case has fewer than G items that may be proposed, the policy is quantised, a prompt
                leaves no room for an item, training has several processes, or draws are to be weighted.
            EngineError: if the engine does not start.
        """
        check_vllm()
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes > 1:
            raise RecipeError(
                f"Training has {processes} processes, and vLLM's engine makes rollouts for one. Start it with one, "
                "or make rollouts with transformers."
            )
        if weighted and temperature is not None:
            raise RecipeError(
                "vLLM's engine does not say how likely its draws were, so they cannot be weighted. Take beams, or "
                "make rollouts with transformers."
            )
        if is_quantised(model):
            raise RecipeError(
                "The policy is quantised, and its weights cannot go into vLLM's engine at each step. Make rollouts "
                "with transformers, or train it in half precision."
            )
        trie = TrieTensors.of(catalog, softmax)
        check_group_size(group_size, temperature, cases, trie, exclude_seen)
        needed = max(map(len, cases.prompts)) + trie.token_levels
        limit = getattr(model.config, "max_position_embeddings", None)
        if limit is not None and needed > limit + 1:
            raise RecipeError(
                f"The longest prompt and an item have {needed} tokens, and the model {limit} positions. Shorten the "
                "histories."
            )
        self.model, self.catalog, self.cases, self.group_size, self.softmax = (
            model,
            catalog,
            cases,
            group_size,
            softmax,
        )
        self.temperature, self.exclude_seen, self.seed = temperature, exclude_seen, seed
        self.weighted = weighted
        config = json.loads((Path(artefact) / "config.json").read_text(encoding="utf-8"))
        (architecture,) = config["architectures"]
        self._folder = tempfile.TemporaryDirectory(prefix="llmrec-rollouts-")
        trie.save(Path(self._folder.name) / _INDEX_FILE)
        self._environment = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine's loop runs where its weights come from
            "VLLM_PLUGINS": "llmrec",
            "VLLM_NO_USAGE_STATS": "1",
            "DO_NOT_TRACK": "1",
            "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
            "VLLM_CPU_KVCACHE_SPACE": str(kv_cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else training's threads would be moved as well
            ARCHITECTURES: architecture,
            INDEX_FOLDER: self._folder.name,
            INDEX: _INDEX_FILE,
            MAX_BEAMS: str(group_size),
        }
        self._engine: Any = None
        with _environment(self._environment):
            from vllm import LLM

            # vLLM calls plugins once in a process, which something may have made it do without these variables.
            register()
            try:
                self._engine = LLM(
                    model=str(artefact),
                    runner="pooling",
                    hf_overrides={"architectures": [f"LlmRec{architecture}"]},
                    pooler_config={"task": "embed", "seq_pooling_type": "LAST"},
                    dtype=dtype,
                    max_num_seqs=max_num_seqs,
                    max_model_len=needed if limit is None else min(needed, limit),
                    block_size=32,
                    enforce_eager=True,
                    distributed_executor_backend="uni",
                    gpu_memory_utilization=gpu_memory_utilization,
                    use_tqdm_on_load=False,
                    seed=seed % 2**31,
                )
            except (RuntimeError, ValueError) as error:
                self.close()
                raise EngineError(
                    f"vLLM's engine did not start: {' '.join(str(error).split())[:500]} Give it "
                    "memory, or make rollouts with transformers (--backend transformers)."
                ) from error

    def generate(self, chosen: Sequence[int], step: int = 0) -> Groups:
        """See `Rollouts`.

        Raises:
            EngineError: if the engine fails.
            BackboneError: if the model's scores are not numbers.
        """
        from vllm import PoolingParams, TokensPrompt

        draws: Sequence[Draw | None] = draws_of(self.temperature, self.seed, step, chosen) or [None] * len(chosen)
        excluded = excluded_rows(self.cases, chosen, self.exclude_seen)
        asked = [
            SearchParameters(
                k=self.group_size,
                num_beams=self.group_size,
                excluded=np.unique(rows).tolist(),
                temperature=0.0 if draw is None else draw.temperature,
                seed=0 if draw is None else draw.seed,
            )
            for rows, draw in zip(excluded, draws, strict=True)
        ]
        with _environment(self._environment):
            self._synchronise()
            outputs = self._engine.encode(
                [TokensPrompt(prompt_token_ids=self.cases.prompts[case]) for case in chosen],
                pooling_params=[PoolingParams(task="embed", extra_kwargs=one.pack()) for one in asked],
                pooling_task="embed",
                use_tqdm=False,
            )
        items = np.full((len(chosen), self.group_size), -1, dtype=np.int64)
        levels = np.zeros((*items.shape, self.catalog.num_levels))
        for place, output in enumerate(outputs):
            packed = output.outputs.data.double()
            if packed[0, 0] != OK:
                raise EngineError("vLLM's engine could not answer a search for rollouts. Its log has the reason.")
            found = Found.unpack(packed)
            items[place, : len(found.rows)] = found.rows
            levels[place, : len(found.rows)] = found.levels
        groups = Groups.of(items, levels, self.catalog)
        return replace(groups, weights=group_weights(levels.sum(axis=2))) if self.weighted else groups

    def _synchronise(self) -> None:
        """Puts the policy's weights into the engine."""
        self._engine.collective_rpc("reload_weights", kwargs={"weights_iterator": weights_of(self.model)})
        self._engine.apply_model(_repack_head)
        self._engine.reset_prefix_cache()

    def close(self) -> None:
        """Ends the engine and frees its memory; called twice, it does nothing."""
        if self._engine is not None:
            from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

            self._engine.llm_engine.engine_core.shutdown()
            self._engine = None
            cleanup_dist_env_and_memory()
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


@torch.no_grad()
def weights_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The names and weights of a policy as its checkpoint would have them, an adapter's merged; it stays as it is."""
    plain = merge(copy.deepcopy(model)) if hasattr(model, "merge_and_unload") else model
    tied = set(getattr(plain, "all_tied_weights_keys", None) or {})
    for name, tensor in plain.state_dict().items():
        if name not in tied:
            yield name, tensor.detach()


def _repack_head(model: Any) -> None:
    """Packs an output head anew, on a CPU.

    A head that shares the embeddings' weights has none of its own to load, so vLLM 0.32 keeps it as it is: on a GPU it
    reads the embeddings, but on a CPU a packed copy of what they were.
    """
    head = getattr(model, "lm_head", None)
    if head is not None and hasattr(head, "cpu_linear"):
        head.quant_method.process_weights_after_loading(head)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Environment variables for a time: vLLM and the engine's plugin read theirs when they please."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

"""VLLMEngine: searches through a running vLLM engine, each as one pooling request."""

import uuid
from collections.abc import Mapping
from typing import Any

from llmrec.engine.lora import lora_slots
from llmrec.engine.request import OK, REFUSED, Found, SearchParameters
from llmrec.exceptions import EngineError, RequestError


class VLLMEngine:
    """The `SearchEngine` of a server that runs inside vLLM's."""

    def __init__(self, engine_client: Any, adapters: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            engine_client: vLLM's EngineClient, of a model that `llmrec.engine.model` made.
            adapters: name -> vLLM's LoRARequest.

        Raises:
            EngineError: if vLLM has too few LoRA slots for the adapters.
        """
        self._client, self._adapters = engine_client, dict(adapters or {})
        self.adapters = list(self._adapters)
        self.max_tokens = int(engine_client.model_config.max_model_len)
        self.dtype = str(engine_client.model_config.dtype).removeprefix("torch.")
        lora = getattr(getattr(engine_client, "vllm_config", None), "lora_config", None)
        if self._adapters and (lora is None or lora.max_loras < lora_slots(len(self._adapters))):
            raise EngineError(
                f"vLLM has {0 if lora is None else lora.max_loras} LoRA slots for {len(self._adapters)} adapters, and "
                f"one slot has to stay empty. Start it with --max-loras {lora_slots(len(self._adapters))}."
            )

    @property
    def errored(self) -> bool:
        """Whether the engine has ended for good."""
        return bool(self._client.errored)

    async def search(self, prompt: list[int], parameters: SearchParameters, adapter: str | None = None) -> Found:
        """One search. Cancelling it aborts vLLM's request, so that one that waits never runs.

        Raises:
            EngineError: if the engine failed, for this search or for good.
            RequestError: if there is no such adapter, or the parameters fit no search.
        """
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt
        from vllm.pooling_params import PoolingParams
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        if adapter is not None and adapter not in self._adapters:
            known = ", ".join(self.adapters) or "none"
            raise RequestError(f"There is no adapter {adapter[:80]!r}. This server has: {known}.")
        if not prompt or len(prompt) > self.max_tokens:
            raise RequestError(
                f"The prompt has {len(prompt)} tokens, and the engine takes 1 to {self.max_tokens}. Change it."
            )
        outputs = self._client.encode(
            TokensPrompt(prompt_token_ids=prompt),
            PoolingParams(task="embed", extra_kwargs=parameters.pack()),
            f"llmrec-{uuid.uuid4().hex}",
            lora_request=None if adapter is None else self._adapters[adapter],
        )
        result = None
        try:
            async for output in outputs:
                result = output
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineError(f"The engine ended this search ({error}). Its log has the reason.") from error
        except (ValueError, VLLMClientError) as error:  # vLLM's own refusal of a request
            raise RequestError(f"vLLM refuses this request: {error} Change it, or start the server for it.") from error
        if result is None:
            raise EngineError("The engine ended without an answer. See its log, and restart the server.")
        found = result.outputs.data.double()
        if found[0, 0] == REFUSED:
            raise RequestError("The engine refused this search: its index, rows or sizes fit no search. See its log.")
        if found[0, 0] != OK:
            raise EngineError("The engine could not answer this request. Its log has the reason.")
        return Found.unpack(found)

"""The engine in vLLM under all that vLLM does to requests, and `VLLMEngine` on its asynchronous client."""

import asyncio
import json
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from engine_models import (
    CONFIGS,
    INDEX_FILE,
    Offline,
    assert_found,
    engine_environment,
    engine_settings,
    make_model,
    make_prompts,
    make_trie,
    offline,
    reference,
)

from llmrec.engine.lora import lora_slots
from llmrec.engine.request import FAILED, OK, REFUSED, Found, SearchParameters
from llmrec.engine.vllm_engine import VLLMEngine
from llmrec.exceptions import EngineError, RequestError

slow = [pytest.mark.slow, pytest.mark.timeout(500)]


def assert_all(engine: Offline, model, trie, prompts, asked, adapters=None, tolerance=1e-4):
    """Every answer is transformers' own; `model` may be one per request."""
    models = model if isinstance(model, list) else [model] * len(prompts)
    found = engine.search(prompts, asked, adapters)
    for one, prompt, parameters, own in zip(found, prompts, asked, models, strict=True):
        assert_found(one, reference(own, prompt, trie, parameters), parameters.k, tolerance)
    return found


def make_adapter(folder, base_folder, seed):
    """A LoRA adapter over every linear layer, saved as peft saves it; the model with it merged."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(base_folder, attn_implementation="eager")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    torch.manual_seed(seed)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.15)
    model.save_pretrained(folder)
    return model.merge_and_unload().eval()


def every_option(rng, count, num_items=400):
    """Requests of all kinds, as many as asked for."""
    asked = []
    for place in range(count):
        rows = rng.permutation(num_items)
        options = [
            {},
            {"renormalize": True},
            {"excluded": rows[:150].tolist()},
            {"allowed": rows[:60].tolist(), "renormalize": True},
            {"allowed": rows[:30].tolist(), "num_beams": 30, "k": 30},
            {"cap_levels": 1, "cap": 2},
            {"temperature": 0.8, "seed": place},
            {"temperature": 1.5, "seed": place, "cap_levels": 2, "cap": 1, "excluded": rows[:50].tolist()},
        ][place % 8]
        asked.append(SearchParameters(**({"k": 10, "num_beams": int(rng.choice([10, 17]))} | options)))
    return asked


class TestOneEngine:
    """Chunks of 48 tokens, a KV cache of few blocks, prefix caching and adapters, all in one engine."""

    pytestmark = slow

    @pytest.fixture(scope="class")
    def made(self, tmp_path_factory):
        pytest.importorskip("vllm", reason="this environment has no vLLM")
        from vllm.lora.request import LoRARequest

        folder = tmp_path_factory.mktemp("engine")
        models = [make_model("llama", folder, num_key_value_heads=2)]
        models += [make_adapter(folder / f"adapter{seed}", folder, seed) for seed in (1, 2)]
        requests = [None] + [LoRARequest(f"a{seed}", seed, str(folder / f"adapter{seed}")) for seed in (1, 2)]
        trie = make_trie()
        options = {
            "max_num_batched_tokens": 48,
            "max_num_seqs": 8,
            "long_prefill_token_threshold": 16,  # so that several prompts are prefilled side by side
            "scheduler_reserve_full_isl": False,  # and may run out of blocks in the middle
            "num_gpu_blocks_override": 14,
            "enable_lora": True,
            "max_loras": lora_slots(2),
            "max_lora_rank": 8,
            "disable_log_stats": False,
            "environment": {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"},
        }
        with offline(folder, trie, **options) as engine:
            yield SimpleNamespace(engine=engine, models=models, adapters=requests, trie=trie, folder=folder)

    def test_every_option_in_one_batch(self, made):
        asked = every_option(np.random.default_rng(0), 16)
        assert_all(made.engine, made.models[0], made.trie, make_prompts(2, 16), asked)

    def test_preemption(self, made):
        def preemptions():
            found = [one for one in made.engine.llm.get_metrics() if one.name == "vllm:num_preemptions"]
            return sum(one.value for one in found)

        before = preemptions()
        prompts = make_prompts(3, 12, 230, 150)
        assert_all(made.engine, made.models[0], made.trie, prompts, every_option(np.random.default_rng(1), 12))
        assert preemptions() > before

    def test_prefixes_of_one_another(self, made):
        (longest,) = make_prompts(4, 1, 200, 200)
        prompts = [longest[:length] for length in (200, 64, 65, 32, 33, 128, 1)]
        asked = [SearchParameters(k=10, num_beams=10)] * len(prompts)
        for _ in range(2):
            assert_all(made.engine, made.models[0], made.trie, prompts, asked)

    def test_adapters_and_the_base_in_one_batch_twice(self, made):
        prompts = make_prompts(5, 9)
        asked = [SearchParameters(k=10, num_beams=10)] * 9
        models = [made.models[place % 3] for place in range(9)]
        adapters = [made.adapters[place % 3] for place in range(9)]
        for _ in range(2):
            found = assert_all(made.engine, models, made.trie, prompts, asked, adapters)
        alike = assert_all(made.engine, made.models[0], made.trie, prompts, asked)
        assert found[0].rows == alike[0].rows
        assert found[1].rows != alike[1].rows
        # One prompt under all adapters: what is cached for one is not another's.
        prompts = make_prompts(6, 1, 100, 100) * 3
        assert_all(made.engine, made.models, made.trie, prompts, asked[:3], made.adapters)

    def test_more_beams_than_a_step_has_tokens(self, made):
        """The adapters' buffers hold 48 rows: 400 beams pass through the layers in slices."""
        prompts = make_prompts(7, 3)
        asked = [SearchParameters(k=400, num_beams=400), SearchParameters(k=10, num_beams=300)]
        asked += [SearchParameters(k=5, num_beams=5)]
        found = assert_all(made.engine, made.models, made.trie, prompts, asked, made.adapters)
        assert sorted(found[0].rows) == list(range(400))

    def test_what_is_refused_leaves_the_engine_and_its_neighbours_alone(self, made):
        fine = SearchParameters(k=10, num_beams=10)
        strange = [{"index": "../x"}, {"index": "gone"}, {"allowed": [400]}, {"k": 0}, {"num_beams": 5_000}, {"no": 1}]
        given = [fine.pack(), *(fine.pack() | one for one in strange), fine.pack()]
        prompts = make_prompts(8, len(given))
        results = made.engine.raw(prompts, given)
        assert [float(one[0, 0]) for one in results] == [OK, *[REFUSED] * len(strange), OK]
        for place in (0, -1):
            assert_found(Found.unpack(results[place]), reference(made.models[0], prompts[place], made.trie, fine), 10)

    def test_a_new_catalog_is_a_new_name(self, made):
        other = make_trie(9, 100)
        other.save(made.folder / "indexes" / "new")
        prompts = make_prompts(9, 6)
        asked = [SearchParameters(k=10, num_beams=10, index=index) for index in ("", "new", INDEX_FILE) * 2]
        found = made.engine.search(prompts, asked)
        for one, prompt, parameters in zip(found, prompts, asked, strict=True):
            trie = other if parameters.index == "new" else made.trie
            assert_found(one, reference(made.models[0], prompt, trie, parameters), 10)

    def test_tokens_add_up_to_items(self, made):
        """The start-up check's two ways: a search, and prefills alone."""
        (prompt,) = make_prompts(10, 1)
        (best,) = made.engine.search([prompt], [SearchParameters(k=1, num_beams=4)])
        tokens = made.trie.tokens_of_leaves()[made.trie.leaf_of_item[best.rows[0]]].tolist()
        prompts = [prompt + tokens[:level] for level in range(3)]
        asked = [SearchParameters(num_beams=0, token=token) for token in tokens]
        found = made.engine.search(prompts, asked)
        assert [one.scores[0] for one in found] == pytest.approx(best.levels[0], abs=1e-5)

    def test_the_dummy_run_of_vllm_itself(self, made):
        """What vLLM's profile run calls on a GPU; on a CPU, with its cache's size given, it is left out."""

        def profile(worker):
            runner = worker.model_runner
            hidden, _ = runner._dummy_run(48, is_profile=True)
            return [float(one[0, 0]) for one in runner._dummy_pooler_run(hidden)]

        assert made.engine.llm.collective_rpc(profile) == [[FAILED] * 8]
        fine = SearchParameters(k=10, num_beams=10)
        assert_all(made.engine, made.models[0], made.trie, make_prompts(11, 2), [fine] * 2)


class TestOtherEngines:
    pytestmark = slow

    def test_two_ranks_say_what_one_says(self, tmp_path):
        pytest.importorskip("vllm", reason="this environment has no vLLM")
        model, trie = make_model("qwen3", tmp_path), make_trie()
        prompts = make_prompts(1, 16, 120)
        with offline(tmp_path, trie, tensor_parallel_size=2) as engine:
            assert_all(engine, model, trie, prompts, every_option(np.random.default_rng(2), 16))

    def test_bfloat16(self, tmp_path):
        """Scores within 0.15 of the same weights in float32: bfloat16 has eight bits, and rounds at every layer."""
        pytest.importorskip("vllm", reason="this environment has no vLLM")
        model, trie = make_model("mistral", tmp_path, dtype=torch.bfloat16).float(), make_trie()
        prompts = make_prompts(1, 8, 120)
        everything = SearchParameters(k=400, num_beams=400)
        asked = [SearchParameters(k=10, num_beams=10)] * 8
        with offline(tmp_path, trie, dtype="bfloat16", environment={"LLMREC_SEARCH_MEMORY_MIB": "1"}) as engine:
            found = engine.search(prompts, asked)
            whole = engine.search(prompts, [everything] * 8)
        for prompt, few, all_found in zip(prompts, found, whole, strict=True):
            exact = reference(model, prompt, trie, everything)
            scores = dict(zip(exact.items[0].tolist(), exact.scores[0].tolist(), strict=True))
            np.testing.assert_allclose(all_found.scores, [scores[row] for row in all_found.rows], atol=0.15)
            np.testing.assert_allclose(few.scores, [scores[row] for row in few.rows], atol=0.15)


class TestClient:
    pytestmark = slow

    def test_search_cancel_and_refusals(self, tmp_path):
        pytest.importorskip("vllm", reason="this environment has no vLLM")
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        model, trie = make_model("llama", tmp_path), make_trie()
        prompts = make_prompts(1, 8, 120)
        fine = SearchParameters(k=10, num_beams=10)

        async def main(client):
            engine = VLLMEngine(client)
            assert (engine.max_tokens, engine.dtype, engine.adapters) == (256, "float32", [])
            assert engine.errored is False
            found = await asyncio.gather(*(engine.search(prompt, fine) for prompt in prompts))
            for one, prompt in zip(found, prompts, strict=True):
                assert_found(one, reference(model, prompt, trie, fine), 10)
            for prompt, parameters, adapter, said in (
                (prompts[0], fine, "nobody", "no adapter 'nobody'"),
                ([], fine, None, "0 tokens"),
                ([5] * 257, fine, None, "257 tokens"),
                ([5] * 255, fine, None, "fit no search"),
                (prompts[0], SearchParameters(index="gone"), None, "fit no search"),
            ):
                with pytest.raises(RequestError, match=said):
                    await engine.search(prompt, parameters, adapter)

            # So much work is queued that it takes seconds; cancelled, it holds up nobody.
            wide = SearchParameters(k=10, num_beams=400)
            begin = time.perf_counter()
            await engine.search(make_prompts(2, 1, 200, 200)[0], wide)
            alone = time.perf_counter() - begin
            waiting = [asyncio.create_task(engine.search(prompt, wide)) for prompt in make_prompts(3, 200, 250, 200)]
            await asyncio.sleep(0.2)
            assert not any(task.done() for task in waiting[100:])
            begin = time.perf_counter()
            for task in waiting:
                task.cancel()
            ended = await asyncio.gather(*waiting, return_exceptions=True)
            assert sum(isinstance(one, asyncio.CancelledError) for one in ended) > 100
            cancelled = time.perf_counter() - begin
            await engine.search(prompts[0], fine)
            idle = time.perf_counter() - begin
            # The engine finishes the step that it is in, and no other: 16 of 200 searches at most.
            assert cancelled < 0.2 + 16 * alone
            assert idle < 0.4 + 20 * alone
            return alone, cancelled, idle

        with engine_environment(tmp_path, trie):
            client = AsyncLLM.from_engine_args(AsyncEngineArgs(**engine_settings(tmp_path)))
            try:
                print("one, cancelled, idle:", asyncio.run(main(client)))  # noqa: T201
            finally:
                client.shutdown()


def client_of(outcome, **changes):
    """A client whose encode does as it is told."""

    async def encode(prompt, params, request_id, lora_request=None):
        if isinstance(outcome, BaseException):
            raise outcome
        if outcome is not None:
            yield SimpleNamespace(outputs=SimpleNamespace(data=outcome))

    lora = SimpleNamespace(max_loras=3)
    made = {
        "encode": encode,
        "errored": False,
        "model_config": SimpleNamespace(max_model_len=100, dtype=torch.bfloat16),
        "vllm_config": SimpleNamespace(lora_config=lora),
    }
    return SimpleNamespace(**(made | changes))


def test_what_an_engine_says_becomes_errors_of_ours():
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

    fine = SearchParameters()

    def ask(outcome):
        return asyncio.run(VLLMEngine(client_of(outcome)).search([1], fine))

    answer = Found([7], [-1.0], [[-1.0]], 0.5)
    assert ask(answer.pack(1).bfloat16().double()) == answer
    status = torch.zeros((1, 2), dtype=torch.float64)
    for outcome, error, said in (
        (status + FAILED, EngineError, "could not answer"),
        (status + REFUSED, RequestError, "refused"),
        (None, EngineError, "without an answer"),
        (EngineDeadError(), EngineError, "ended this search"),
        (EngineGenerateError("x"), EngineError, "ended this search"),
        (ValueError("too long."), RequestError, "too long. Change it"),
        (VLLMValidationError("too long."), RequestError, "too long. Change it"),
    ):
        with pytest.raises(error, match=said):
            ask(outcome)
    assert VLLMEngine(client_of(None)).dtype == "bfloat16"
    assert VLLMEngine(client_of(None, errored=True)).errored


def test_adapters_need_a_slot_more_than_there_are():
    two = {"a": 1, "b": 2}
    assert VLLMEngine(client_of(None), two).adapters == ["a", "b"]
    for client in (
        client_of(None, vllm_config=SimpleNamespace(lora_config=SimpleNamespace(max_loras=2))),
        client_of(None, vllm_config=SimpleNamespace(lora_config=None)),
    ):
        with pytest.raises(EngineError, match="--max-loras 3"):
            VLLMEngine(client, two)


def configuration(**changes):
    """vLLM's, of a plain model; names with a dot are changed."""
    parts = {
        "parallel_config": {
            "pipeline_parallel_size": 1,
            "decode_context_parallel_size": 1,
            "prefill_context_parallel_size": 1,
            "data_parallel_size": 1,
            "is_moe_model": False,
            "use_ubatching": False,
        },
        "model_config": {
            "use_mla": False,
            "is_hybrid": False,
            "has_inner_state": False,
            "is_attention_free": False,
            "is_encoder_decoder": False,
            "uses_mrope": False,
        },
        "cache_config": {"cache_dtype": "auto"},
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if field:
            parts[part] |= {field: value}
    made = {name: SimpleNamespace(**fields) for name, fields in parts.items()}
    return SimpleNamespace(**made, kv_transfer_config=changes.get("kv_transfer_config"))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"parallel_config__pipeline_parallel_size": 2}, "pipeline parallelism"),
        ({"parallel_config__decode_context_parallel_size": 2}, "decode context parallelism"),
        ({"parallel_config__prefill_context_parallel_size": 2}, "prefill context parallelism"),
        ({"parallel_config__data_parallel_size": 2, "parallel_config__is_moe_model": True}, "experts under data"),
        ({"parallel_config__data_parallel_size": 2, "parallel_config__is_moe_model": None}, "experts under data"),
        ({"parallel_config__use_ubatching": True}, "dual batch overlap"),
        ({"kv_transfer_config": object()}, "a KV connector"),
        ({"cache_config__cache_dtype": "fp8_e5m2"}, "a KV cache of fp8_e5m2"),
        ({"model_config__use_mla": True}, "multi-head latent attention"),
        ({"model_config__is_hybrid": True}, "linear attention or a state-space layer"),
        ({"model_config__has_inner_state": True}, "linear attention or a state-space layer"),
        ({"model_config__is_attention_free": True}, "no attention"),
        ({"model_config__is_encoder_decoder": True}, "an encoder"),
        ({"model_config__uses_mrope": True}, "M-RoPE"),
    ],
)
def test_what_beams_cannot_be_run_in_is_refused_at_start(changes, said, monkeypatch):
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    from llmrec.engine.model import refuse_settings

    monkeypatch.delenv("VLLM_USE_BREAKABLE_CUDAGRAPH", raising=False)
    refuse_settings(configuration())
    refuse_settings(configuration(parallel_config__data_parallel_size=2))  # dense replicas know nothing of each other
    with pytest.raises(EngineError, match=said) as raised:
        refuse_settings(configuration(**changes))
    assert str(raised.value).count(". ") == 1  # two sentences
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(EngineError, match="breakable CUDA graphs"):
        refuse_settings(configuration())


def test_layers_that_are_no_attention_are_refused():
    pytest.importorskip("vllm", reason="this environment has no vLLM")
    from llmrec.engine.model import attention_layers, beam_model

    with pytest.raises(EngineError, match=r"Layer mamba\.0 keeps a state"):
        attention_layers({"mamba.0": SimpleNamespace(kv_cache=[])})
    with pytest.raises(EngineError, match="no attention layer"):
        attention_layers({"experts": SimpleNamespace()})
    with pytest.raises(EngineError, match="'NoSuchForCausalLM'"):
        beam_model("NoSuchForCausalLM")


def test_the_configs_are_of_their_architectures(tmp_path):
    for model_type, (architecture, _) in CONFIGS.items():
        make_model(model_type, tmp_path / model_type)
        config = json.loads((tmp_path / model_type / "config.json").read_text(encoding="utf-8"))
        assert config["architectures"] == [architecture]

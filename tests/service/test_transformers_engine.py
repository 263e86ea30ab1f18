"""The engine of transformers: parity with the definition, batches, failures of one, cancelling, closing."""

import asyncio
import math
import threading

import numpy as np
import pytest
import torch
from factories import random_codes, random_histories, random_recommender

from llmrec import Recommender
from llmrec.catalog import Catalog
from llmrec.decoding import score_catalog
from llmrec.engine.request import SearchParameters
from llmrec.exceptions import EngineError, RequestError
from llmrec.service import live_version, transformers_engine
from llmrec.service.catalogs import LiveCatalogs
from llmrec.service.index_files import IndexFiles
from llmrec.service.transformers_engine import TransformersEngine
from llmrec.trie_tensors import TrieTensors

PRICES = np.random.default_rng(0).integers(0, 20, 40)


@pytest.fixture(scope="module")
def made():
    """A recommender whose items have a price."""
    made = random_recommender(1)
    items = [{**item, "price": int(price)} for item, price in zip(made.catalog.items, PRICES, strict=True)]
    catalog = Catalog(items, made.catalog.codes, made.catalog.codebook_sizes, made.catalog.token_ids)
    catalog = catalog.with_retired([5, 17], True)
    return Recommender(made.model, made.tokenizer, catalog, made.prompt, made.settings)


@pytest.fixture
def engine(made, tmp_path):
    index = IndexFiles(tmp_path).index_of(made.catalog)
    engine = TransformersEngine(made.model, tmp_path, index)
    yield engine
    engine.close()


def ran(awaitable):
    return asyncio.run(asyncio.wait_for(awaitable, 60))


def test_it_says_what_it_is(engine, made):
    assert (engine.max_tokens, engine.dtype, engine.adapters) == (128, "float64", [])
    assert not engine.errored


def test_a_wide_search_is_brute_force(engine, made):
    prompt = made.encoder.encode([3, 9])
    scores = score_catalog(made.model, prompt, TrieTensors.of(made.catalog)).numpy()
    found = ran(engine.search(prompt, SearchParameters(k=40, num_beams=40)))
    order = sorted(np.flatnonzero(np.isfinite(scores)).tolist(), key=lambda row: -scores[row])
    assert found.rows == order
    assert found.scores == pytest.approx(scores[order].tolist(), abs=1e-9)
    assert [sum(levels) for levels in found.levels] == pytest.approx(found.scores, abs=1e-9)
    assert 0 < found.seconds < 60
    few = ran(engine.search(prompt, SearchParameters(k=3, num_beams=40)))
    assert (few.rows, few.scores) == (found.rows[:3], pytest.approx(found.scores[:3]))


def requests(count):
    """Random requests with every option, as the words of `Recommender.recommend`."""
    rng = np.random.default_rng(7)
    histories = random_histories(3, 40, count, 6)
    for number, history in enumerate(histories):
        options = {"k": int(rng.integers(1, 12)), "num_beams": int(rng.choice([5, 12, 40]))}
        options["exclude_seen"] = bool(rng.integers(2))
        if number % 2:
            options["filters"] = {"price": {"max": int(rng.integers(3, 18))}}
        if number % 3 == 0:
            options["allow"] = [f"item-{row}" for row in rng.integers(0, 50, 15)]
        if number % 4 == 0:
            options["deny"] = [f"item-{row}" for row in rng.integers(0, 50, 5)]
        if number % 5 == 0:
            options["normalize"] = "legal"
        if number % 6 == 1:
            options["prefix_cap"] = {"levels": int(rng.integers(1, 3)), "most": int(rng.integers(1, 3))}
        if number % 7 == 2:
            options["sampling"] = {"temperature": 1.5, "seed": int(rng.integers(100))}
        yield [f"item-{row}" for row in history], options


@pytest.mark.parametrize("inline", [2, 1000])
def test_all_options_together_give_what_the_recommender_gives(made, engine, tmp_path, inline, monkeypatch):
    monkeypatch.setattr(live_version, "INLINE_ROWS", inline)
    made.catalog.save(tmp_path / "catalog")
    parts = (made.tokenizer, made.prompt, made.settings, {})
    catalogs = LiveCatalogs({"main": tmp_path / "catalog"}, parts, tmp_path)
    asked = list(requests(42))

    async def answer(history, options):
        with catalogs.using() as served:
            rows, _ = served.encoder.known(history)
            seen = rows if options["exclude_seen"] else []
            given = options.get("filters"), options.get("allow"), options.get("deny", ())
            constraint = await catalogs.constrain(served, *given, seen)
            cap, draw = options.get("prefix_cap", {}), options.get("sampling", {})
            parameters = SearchParameters(
                k=options["k"],
                num_beams=max(options["k"], options["num_beams"]),
                index=served.index,
                subset=constraint.subset,
                allowed=constraint.allowed,
                excluded=constraint.excluded,
                renormalize=options.get("normalize") == "legal",
                cap_levels=cap.get("levels", 0),
                cap=cap.get("most", 0),
                temperature=draw.get("temperature", 0.0),
                seed=draw.get("seed", 0),
            )
            found = await engine.search(served.encoder.encode(rows), parameters)
            if not cap:
                assert len(found.rows) == min(options["k"], constraint.candidates)
            return found

    async def together():
        return await asyncio.gather(*(answer(history, options) for history, options in asked))

    found = ran(together())
    assert sum(not one.rows for one in found) < 10
    for (history, options), one in zip(asked, found, strict=True):
        wanted = made.recommend(history, **options)
        assert [f"item-{row}" for row in one.rows] == [item.item_id for item in wanted], options
        assert one.scores == pytest.approx([item.log_probability for item in wanted], abs=1e-9)
        for levels, item in zip(one.levels, wanted, strict=True):
            assert levels == pytest.approx(list(item.level_log_probabilities), abs=1e-9)


@pytest.mark.parametrize("softmax", ["vocabulary", "semantic_ids"])
def test_a_token_s_log_probability_comes_from_an_ordinary_prefill(made, engine, softmax):
    prompts = [made.encoder.encode(rows) for rows in ([1], [2, 3, 4], [])]
    index = engine._files.index_of(made.catalog, softmax)
    tokens = [int(made.catalog.token_ids[level][1]) for level in range(3)]

    async def together():
        asked = (SearchParameters(num_beams=0, token=token, index=index) for token in tokens)
        return await asyncio.gather(*(engine.search(prompt, one) for prompt, one in zip(prompts, asked, strict=True)))

    own = np.unique(np.concatenate(made.catalog.token_ids)).tolist()
    for prompt, token, found in zip(prompts, tokens, ran(together()), strict=True):
        with torch.inference_mode():
            logits = made.model(torch.tensor([prompt])).logits[0, -1]
        total = (logits if softmax == "vocabulary" else logits[own]).logsumexp(0)
        assert found.rows == [0]
        assert found.scores == pytest.approx([float(logits[token] - total)], abs=1e-9)
        assert sum(found.levels[0]) == found.scores[0]


class Held:
    """Holds an engine's thread inside a search until it is let go, and notes what each later search is given."""

    def __init__(self, monkeypatch):
        self.begun, self.go_on, self.batches = threading.Event(), threading.Event(), []
        whole = transformers_engine.decode

        def decode(model, prompts, trie, num_beams, **options):
            self.batches.append((num_beams, sorted(map(len, prompts))))
            if not self.begun.is_set():
                self.begun.set()
                assert self.go_on.wait(30)
            return whole(model, prompts, trie, num_beams, **options)

        monkeypatch.setattr(transformers_engine, "decode", decode)

    async def begin(self, engine, prompt):
        """A request that the engine's thread is now at."""
        first = asyncio.create_task(engine.search(prompt, SearchParameters(num_beams=2)))
        await asyncio.to_thread(self.begun.wait, 30)
        return first


def test_what_waits_is_searched_together_by_width(made, engine, monkeypatch):
    held = Held(monkeypatch)

    async def run():
        first = await held.begin(engine, [1])
        widths = [4, 8, 4, 8, 4]
        asked = [
            asyncio.create_task(engine.search([1] * (n + 1), SearchParameters(num_beams=width)))
            for n, width in enumerate(widths)
        ]
        await asyncio.sleep(0.05)
        held.go_on.set()
        found = await asyncio.gather(first, *asked)
        assert sorted(held.batches[1:]) == [(4, [1, 3, 5]), (8, [2, 4])]
        for n, (width, one) in enumerate(zip(widths, found[1:], strict=True)):
            alone = await engine.search([1] * (n + 1), SearchParameters(num_beams=width))
            assert alone.rows == one.rows
            assert alone.scores == pytest.approx(one.scores, abs=1e-9)

    ran(run())


@pytest.mark.parametrize(("bounds", "sizes"), [({"max_batch": 3}, [3, 2]), ({"cached_tokens": 45}, [2, 2, 1])])
def test_batches_are_bounded(made, tmp_path, monkeypatch, bounds, sizes):
    # A request holds 8 beams of 3 levels and its prompt of 4 tokens: 28.
    if "cached_tokens" in bounds:
        bounds = {"cached_tokens": 2 * 28}
    held = Held(monkeypatch)
    index = IndexFiles(tmp_path).index_of(made.catalog)
    engine = TransformersEngine(made.model, tmp_path, index, **bounds)

    async def run():
        first = await held.begin(engine, [1])
        asked = [asyncio.create_task(engine.search([1] * 4, SearchParameters(num_beams=8))) for _ in range(5)]
        await asyncio.sleep(0.05)
        held.go_on.set()
        await asyncio.gather(first, *asked)
        assert [len(lengths) for _, lengths in held.batches[1:]] == sizes

    ran(run())
    engine.close()


def test_a_cancelled_request_is_never_run(engine, monkeypatch):
    held = Held(monkeypatch)

    async def run():
        first = await held.begin(engine, [1])
        gone = asyncio.create_task(engine.search([1] * 7, SearchParameters(num_beams=4)))
        stays = asyncio.create_task(engine.search([1] * 5, SearchParameters(num_beams=4)))
        await asyncio.sleep(0.05)
        gone.cancel()
        first.cancel()  # it is being run: its place is given up, the engine goes on
        with pytest.raises(asyncio.CancelledError):
            await gone
        with pytest.raises(asyncio.CancelledError):
            await first
        held.go_on.set()
        assert (await stays).rows
        assert held.batches[1:] == [(4, [5])]

    ran(run())


def test_one_failing_request_fails_alone(made, engine, caplog):
    good = [made.encoder.encode([row]) for row in range(4)]
    bad = [
        ([1] * 127, SearchParameters(num_beams=4), RequestError, "128 positions"),
        ([], SearchParameters(num_beams=4), RequestError, "no tokens"),
        ([1], SearchParameters(num_beams=4, index="lost.trie.safetensors"), EngineError, "index cannot be read"),
        ([1], SearchParameters(num_beams=4, index="../../etc/passwd"), EngineError, "is no name of an index file"),
        ([1], SearchParameters(num_beams=4, cap_levels=9, cap=1), RequestError, "9"),
        ([10**9], SearchParameters(num_beams=4), EngineError, "The search failed"),
        ([1] * 129, SearchParameters(num_beams=0, token=1), RequestError, "does not fit the model's 128 positions"),
        ([1], SearchParameters(num_beams=0, token=10**9), EngineError, "The search failed"),
    ]

    async def run():
        asked = [engine.search(prompt, SearchParameters(num_beams=4)) for prompt in good]
        asked += [engine.search(prompt, parameters) for prompt, parameters, _, _ in bad]
        asked += [engine.search(good[0], SearchParameters(num_beams=0, token=1))]
        return await asyncio.gather(*asked, return_exceptions=True)

    found = ran(run())
    for prompt, one in zip(good, found[:4], strict=True):
        assert one.rows == ran(engine.search(prompt, SearchParameters(num_beams=4))).rows
    for (_, _, kind, message), error in zip(bad, found[4:-1], strict=True):
        assert type(error) is kind
        assert message in str(error)
    assert math.isfinite(found[-1].scores[0])
    assert not engine.errored


def test_rows_that_the_catalog_lacks_change_nothing(made, engine):
    prompt = made.encoder.encode([3])
    plain = ran(engine.search(prompt, SearchParameters(k=5, num_beams=40, excluded=[1, 2])))
    more = ran(engine.search(prompt, SearchParameters(k=5, num_beams=40, excluded=[1, 2, 5, 99, 2])))
    assert plain.rows == more.rows
    assert ran(engine.search(prompt, SearchParameters(k=5, num_beams=40, allowed=[]))).rows == []
    assert ran(engine.search(prompt, SearchParameters(k=5, num_beams=40, allowed=[5, 17, 99]))).rows == []


def test_catalogs_of_other_lengths_share_a_batch(made, engine, monkeypatch):
    short = Catalog(
        [{"item_id": f"s{row}", "title": ""} for row in range(8)],
        random_codes(4, 8, (5, 4)),
        (5, 4),
        made.catalog.token_ids[:2],
    )
    index = engine._files.index_of(short)
    held = Held(monkeypatch)
    prompt = made.encoder.encode([3])

    async def run():
        first = await held.begin(engine, [1])
        asked = [SearchParameters(k=8, num_beams=40), SearchParameters(k=8, num_beams=40, index=index)]
        tasks = [asyncio.create_task(engine.search(prompt, one)) for one in asked]
        await asyncio.sleep(0.05)
        held.go_on.set()
        await first
        return await asyncio.gather(*tasks)

    long, other = ran(run())
    scores = score_catalog(made.model, prompt, TrieTensors.of(short)).numpy()
    assert other.rows == sorted(range(8), key=lambda row: -scores[row])
    assert other.scores == pytest.approx(scores[other.rows].tolist(), abs=1e-9)
    scores = score_catalog(made.model, prompt, TrieTensors.of(made.catalog)).numpy()
    assert long.scores == pytest.approx(sorted(scores.tolist())[::-1][:8], abs=1e-9)


def test_a_closed_engine_refuses_and_lets_nobody_wait(made, tmp_path, monkeypatch):
    held = Held(monkeypatch)
    engine = TransformersEngine(made.model, tmp_path, IndexFiles(tmp_path).index_of(made.catalog))

    async def run():
        first = await held.begin(engine, [1])
        waits = asyncio.create_task(engine.search([1], SearchParameters(num_beams=4)))
        await asyncio.sleep(0.05)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        await asyncio.sleep(0.05)
        held.go_on.set()
        assert (await first).rows
        with pytest.raises(EngineError, match="it was closed"):
            await waits
        await closing
        with pytest.raises(EngineError, match="it was closed"):
            await engine.search([1], SearchParameters(num_beams=4))

    ran(run())
    assert engine.errored
    engine.close()


def test_an_engine_whose_thread_ends_says_so(made, tmp_path, monkeypatch):
    def decode(*_, **__):
        raise SystemExit("no more")

    monkeypatch.setattr(transformers_engine, "decode", decode)
    engine = TransformersEngine(made.model, tmp_path, IndexFiles(tmp_path).index_of(made.catalog))
    with pytest.raises(EngineError, match="has ended"):
        ran(engine.search([1], SearchParameters(num_beams=4)))
    with pytest.raises(EngineError, match="SystemExit"):
        ran(engine.search([1], SearchParameters(num_beams=4)))
    assert engine.errored
    engine.close()


@pytest.fixture
def adapted(tmp_path):
    """A recommender with two LoRA adapters on its model, and the plain model."""
    from peft import LoraConfig, get_peft_model

    made, plain = random_recommender(1), random_recommender(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(made.model, config, adapter_name="one").double()
    model.add_adapter("two", config)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = torch.randn_like(parameter, dtype=torch.float64) * 0.3
    engine = TransformersEngine(model.eval(), tmp_path, IndexFiles(tmp_path).index_of(made.catalog))
    yield engine, model, plain
    engine.close()


def test_adapters_are_each_request_s_own(adapted):
    engine, model, plain = adapted
    assert engine.adapters == ["one", "two"]
    prompt = plain.encoder.encode([3, 4])
    trie = TrieTensors.of(plain.catalog)

    async def together():
        names = [None, "one", "two", None, "two", "one"]
        found = [engine.search(prompt, SearchParameters(k=40, num_beams=40), adapter) for adapter in names]
        found += [engine.search(prompt, SearchParameters(num_beams=0, token=9), adapter) for adapter in names[:3]]
        return await asyncio.gather(*found)

    found = ran(together())
    scores = {None: score_catalog(plain.model, prompt, trie)}
    tokens = []
    for name in ("one", "two"):
        model.set_adapter(name)
        scores[name] = score_catalog(model, prompt, trie)
        with torch.inference_mode():
            tokens.append(float(model(torch.tensor([prompt])).logits[0, -1].log_softmax(0)[9]))
    for name, one in zip([None, "one", "two", None, "two", "one"], found, strict=False):
        assert one.scores == pytest.approx(scores[name][one.rows].tolist(), abs=1e-9)
        assert len(one.rows) == 40
    assert abs(scores["one"] - scores["two"]).max() > 0.1
    assert abs(scores["one"] - scores[None]).max() > 0.1
    assert [one.scores[0] for one in found[7:]] == pytest.approx(tokens, abs=1e-9)
    with pytest.raises(RequestError, match=r"no adapter 'three'\. The server has: one, two"):
        ran(engine.search(prompt, SearchParameters(), "three"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes_are_near(made, tmp_path, dtype):
    narrow = random_recommender(1, dtype=dtype)
    engine = TransformersEngine(narrow.model, tmp_path, IndexFiles(tmp_path).index_of(made.catalog))
    prompt = made.encoder.encode([3])
    found = ran(engine.search(prompt, SearchParameters(k=38, num_beams=40)))
    scores = score_catalog(made.model, prompt, TrieTensors.of(made.catalog))
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    assert found.scores == pytest.approx(scores[found.rows].tolist(), abs=tolerance)
    assert engine.dtype == str(dtype).removeprefix("torch.")
    engine.close()


def test_scores_that_are_no_numbers_find_nothing(tmp_path):
    broken = random_recommender(1)
    with torch.no_grad():
        broken.model.get_input_embeddings().weight.fill_(torch.nan)
    engine = TransformersEngine(broken.model, tmp_path, IndexFiles(tmp_path).index_of(broken.catalog))
    assert ran(engine.search([1], SearchParameters(k=5, num_beams=8))).rows == []
    engine.close()


def test_a_file_that_was_removed_is_not_kept_mapped(made, engine):
    rng = np.random.default_rng(0)
    for _ in range(4):  # as after so many swaps
        part = engine._files.subset_of(engine._index, rng.permutation(40)[:20])
        assert len(ran(engine.search([1], SearchParameters(k=40, num_beams=40, index=part))).rows) in range(18, 21)
        engine._files.release(part)
        assert len(engine._tries) <= 2
    ran(engine.search([1], SearchParameters(k=1, index=engine._index)))
    assert list(engine._tries) == [engine._index]

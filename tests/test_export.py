"""Adapters, their bases and the artefacts that come of them: nothing is lost, and nothing wrong is accepted."""

import importlib.util
import json
import shutil

import pytest
import torch
from factories import random_histories
from safetensors.torch import load_file
from tiny_backbones import FAMILIES, train, write_checkpoint
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from llmrec import artefact
from llmrec.backbones.adapters import attach
from llmrec.backbones.causal_lm import METHODS, QUANTISED
from llmrec.exceptions import ArtefactError, BackboneError
from llmrec.export import base_hash, export, export_unmerged, save_adapter, save_extended_base
from llmrec.recommender import Recommender

HISTORIES = random_histories(0, 40, 8, 6)
needs_bits = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="no bitsandbytes")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="no vLLM")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Family -> a checkpoint's folder, written once."""
    folders = {}

    def of(family):
        if family not in folders:
            folders[family] = write_checkpoint(family, tmp_path_factory.mktemp(family))
        return folders[family]

    return of


@pytest.fixture(scope="module")
def lora(checkpoint, tmp_path_factory):
    """A LoRA run of Llama: its recommender, base and adapter."""
    return train(checkpoint("llama"), "lora", tmp_path_factory.mktemp("lora"))


def answers(recommender):
    return recommender.recommend_rows(HISTORIES, 10)


def largest(one, two):
    return max(abs(a - b) for x, y in zip(one, two, strict=True) for a, b in zip(x, y, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_artefact_recommends_as_the_trained_model(family, method, checkpoint, tmp_path):
    if method in QUANTISED and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("no bitsandbytes")
    run = train(checkpoint(family), method, tmp_path)
    items, scores = answers(run.recommender)
    if method == "full":
        run.recommender.save_pretrained(tmp_path / "artefact")
    else:
        result = export(run.adapter, run.base, tmp_path / "artefact")
        assert result.method == method
        assert result.prompts == 8
        # What is printed is what there is: an 8-bit layer rounds its inputs too, and no plain weights can.
        assert 1e-5 < result.difference < 0.5 if method == "int8" else result.difference < 5e-5
    artefact.verify_manifest(tmp_path / "artefact")
    found = Recommender.from_pretrained(tmp_path / "artefact")
    assert found.model.dtype == torch.float32
    same, again = answers(found)
    if method == "int8":
        assert largest(scores, again) < 0.5
        return
    assert same == items
    assert largest(scores, again) < 1e-4


@needs_bits
@pytest.mark.parametrize("method", ["lora", "rslora", "qlora"])
def test_unmerged_base_and_adapter_are_the_merged_model(method, checkpoint, tmp_path):
    run = train(checkpoint("llama"), method, tmp_path)
    items, scores = answers(run.recommender)
    result = export_unmerged(run.adapter, run.base, tmp_path / "apart")
    assert result.difference < 5e-5
    base, adapter = tmp_path / "apart" / "base", tmp_path / "apart" / "adapter"
    assert base_hash(base) == json.loads((adapter / "adapter.json").read_text())["base"] != base_hash(run.base)
    # As vLLM takes it: no embeddings, no rows, nothing but LoRA's matrices.
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert tensors
    assert all("lora_A" in name or "lora_B" in name for name in tensors)
    assert json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"] is None
    assert AutoTokenizer.from_pretrained(base).get_vocab() == run.recommender.tokenizer.get_vocab()

    model = attach(AutoModelForCausalLM.from_pretrained(base), adapter)
    parts = run.recommender
    by_hand = Recommender(model, parts.tokenizer, parts.catalog, parts.prompt, parts.settings)
    assert answers(by_hand)[0] == items
    assert largest(answers(by_hand)[1], scores) < 1e-4
    export(adapter, base, tmp_path / "merged")
    merged = Recommender.from_pretrained(tmp_path / "merged")
    assert answers(merged)[0] == items
    assert largest(answers(merged)[1], scores) < 1e-4


@needs_bits
def test_what_cannot_be_served_unmerged(checkpoint, tmp_path):
    for method in ("dora", "new_tokens"):
        run = train(checkpoint("llama"), method, tmp_path / method, steps=1)
        with pytest.raises(ArtefactError, match=f"'{method}' cannot be served unmerged"):
            export_unmerged(run.adapter, run.base, tmp_path / "apart")


def test_an_adapter_holds_an_artefacts_parts_and_no_paths(lora, checkpoint):
    names = {file.name for file in lora.adapter.iterdir()}
    assert {"adapter.json", "adapter_config.json", "adapter_model.safetensors", "catalog", "llmrec.json"} <= names
    assert {"prompt.jinja", "tokenizer.json", "sha256.json"} <= names
    assert "model.safetensors" not in names
    assert (lora.adapter / "adapter_model.safetensors").stat().st_size < 100_000  # no whole tables
    text = "".join(
        file.read_text() for file in lora.adapter.iterdir() if file.suffix == ".json" and "tokenizer" not in file.name
    )
    assert str(checkpoint("llama").parent) not in text
    assert str(lora.base) not in text


def test_saving_twice_gives_the_same_bytes(lora, checkpoint, tmp_path):
    again = train(checkpoint("llama"), "lora", tmp_path)
    assert base_hash(again.base) == base_hash(lora.base)
    names = ("adapter_config.json", "adapter_model.safetensors", "adapter.json")
    for name in names:
        assert (again.adapter / name).read_bytes() == (lora.adapter / name).read_bytes()


def test_an_export_brings_the_adapters_parts(lora, tmp_path):
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    (adapter / "README.md").write_text("# A card")
    (adapter / "notes.txt").write_text("mine")  # not listed, not the artefact's
    living = adapter / "catalog" / "versions" / "0001"
    living.mkdir(parents=True)
    (living / "added.jsonl").write_text("{}")
    export(adapter, lora.base, tmp_path / "artefact")
    found = {file.relative_to(tmp_path / "artefact").as_posix() for file in (tmp_path / "artefact").rglob("*.*")}
    assert {"README.md", "prompt.jinja", "llmrec.json", "catalog/versions/0001/added.jsonl"} <= found
    assert not found & {"notes.txt", "adapter.json", "adapter_config.json", "adapter_model.safetensors"}


def test_a_rounded_export_says_how_far_it_is(lora, tmp_path):
    result = export(lora.adapter, lora.base, tmp_path / "artefact", dtype="bfloat16")
    assert 1e-4 < result.difference < 0.5
    assert Recommender.from_pretrained(tmp_path / "artefact").model.dtype == torch.bfloat16
    with pytest.raises(BackboneError, match="dtype is 'int4'"):
        export(lora.adapter, lora.base, tmp_path / "other", dtype="int4")


def test_the_difference_is_measured_on_the_given_prompts(lora, tmp_path):
    prompts = [[1, 5, 9], [1, 2, 3, 4]]
    trained = lora.recommender.model
    result = export(lora.adapter, lora.base, tmp_path / "artefact", dtype="bfloat16", prompts=prompts)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "artefact", dtype=torch.bfloat16)
    with torch.no_grad():
        apart = [
            (model(input_ids=torch.tensor([prompt])).logits.float().log_softmax(-1))
            for prompt in prompts
            for model in (trained, merged)
        ]
    expected = max((apart[0] - apart[1]).abs().max(), (apart[2] - apart[3]).abs().max())
    assert result.prompts == 2
    assert result.difference == pytest.approx(float(expected), rel=1e-3)


def test_a_prompt_of_more_than_a_history(lora, tmp_path):
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    (adapter / "prompt.jinja").write_text(
        "{{ preference }}{% for item in history %}{{ item.semantic_id }}{% endfor %}"
    )
    artefact.write_manifest(adapter)
    result = export(adapter, lora.base, tmp_path / "artefact")
    assert result.prompts == 8
    assert result.difference < 5e-5


def test_a_wrong_base_is_named_with_both_hashes(lora, checkpoint, tmp_path):
    other = train(write_checkpoint("llama", tmp_path / "other", seed=5), "lora", tmp_path / "run", steps=1)
    wanted, found = base_hash(lora.base)[:12], base_hash(other.base)[:12]
    for way in (export, export_unmerged):
        with pytest.raises(ArtefactError, match=f"trained on the base {wanted}, and .* is {found}") as raised:
            way(lora.adapter, other.base, tmp_path / "artefact")
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "artefact").exists()


def test_an_adapter_without_its_base(lora, checkpoint, tmp_path):
    with pytest.raises(ArtefactError, match=f"no folder .* with the base {base_hash(lora.base)[:12]}"):
        export(lora.adapter, tmp_path / "nowhere", tmp_path / "artefact")
    with pytest.raises(ArtefactError, match=r"holds no base\.json, so it is no extended base"):
        export(lora.adapter, checkpoint("llama"), tmp_path / "artefact")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("model.safetensors", lambda data: data[:-7], r"model\.safetensors is torn or was altered"),
        ("model.safetensors", lambda data: data[:-1] + bytes([data[-1] ^ 1]), "is torn or was altered"),
        ("tokenizer.json", None, r"tokenizer\.json is missing, though base\.json lists it"),
        ("config.json", lambda data: data.replace(b'"llama"', b'"qwen2"'), r"config\.json is torn or was altered"),
        ("base.json", lambda data: data[:50], r"base\.json is torn"),
        ("base.json", lambda data: data.replace(b'"version": 1', b'"version": 2'), "has version 2"),
        ("base.json", lambda data: data.replace(b'"sha256": "', b'"sha256": "0'), r"base\.json was altered"),
    ],
)
def test_torn_bases(name, change, message, lora, tmp_path):
    base = shutil.copytree(lora.base, tmp_path / "base")
    if change is None:
        (base / name).unlink()
    else:
        content = (base / name).read_bytes()
        assert change(content) != content
        (base / name).write_bytes(change(content))
    with pytest.raises(ArtefactError, match=message):
        export(lora.adapter, base, tmp_path / "artefact")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("adapter_model.safetensors", lambda data: data[:-3], r"adapter_model\.safetensors is truncated"),
        ("adapter.json", lambda data: data.replace(b"lora", b"dora"), r"adapter\.json was altered"),
        ("adapter.json", None, r"adapter\.json is missing"),
        ("sha256.json", None, r"sha256\.json is missing"),
    ],
)
def test_torn_adapters(name, change, message, lora, tmp_path):
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    if change is None:
        (adapter / name).unlink()
    else:
        (adapter / name).write_bytes(change((adapter / name).read_bytes()))
    with pytest.raises(ArtefactError, match=message):
        export(adapter, lora.base, tmp_path / "artefact")


def test_records_that_no_llmrec_wrote(lora, tmp_path):
    adapter = shutil.copytree(lora.adapter, tmp_path / "adapter")
    for record, message in (
        ({"version": 1, "base": "x", "method": "prefix", "compute_dtype": "float32"}, "the method 'prefix'"),
        ({"version": 1, "base": "x"}, r"adapter\.json is torn"),
    ):
        (adapter / "adapter.json").write_text(json.dumps(record))
        artefact.write_manifest(adapter)
        with pytest.raises(ArtefactError, match=message):
            export(adapter, lora.base, tmp_path / "artefact")


def test_an_artefact_is_no_adapter_and_a_plain_model_has_none(lora, tmp_path):
    export(lora.adapter, lora.base, tmp_path / "artefact")
    with pytest.raises(ArtefactError, match=r"no adapter of llmrec: it holds no adapter\.json"):
        export(tmp_path / "artefact", lora.base, tmp_path / "again")
    with pytest.raises(BackboneError, match="A LlamaForCausalLM has no adapter to save"):
        save_adapter(Recommender.from_pretrained(tmp_path / "artefact"), tmp_path / "adapter", "", "lora")


def test_what_stood_there_survives_a_failure(lora, tmp_path, monkeypatch):
    out = tmp_path / "artefact"
    export(lora.adapter, lora.base, out)
    before = (out / "sha256.json").read_bytes()
    monkeypatch.setattr(artefact, "write_manifest", lambda folder: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(lora.adapter, lora.base, out, dtype="bfloat16")
    assert (out / "sha256.json").read_bytes() == before
    artefact.verify_manifest(out)
    assert [file.name for file in tmp_path.iterdir()] == ["artefact"]
    with pytest.raises(AttributeError):
        save_extended_base(lora.recommender.model, None, tmp_path / "base")
    assert [file.name for file in tmp_path.iterdir()] == ["artefact"]


def test_the_command(lora, tmp_path):
    import typer

    from llmrec.cli.export import export as command

    app = typer.Typer()
    app.command()(command)
    asked = [str(lora.adapter), "--base", str(lora.base), "--out"]
    merged = CliRunner().invoke(app, [*asked, str(tmp_path / "artefact")])
    assert merged.exit_code == 0, merged.output
    assert "the trained model (lora) and the exported one: " in merged.output
    assert "on 8 prompts" in merged.output
    assert answers(Recommender.from_pretrained(tmp_path / "artefact"))[0] == answers(lora.recommender)[0]
    apart = CliRunner().invoke(app, [*asked, str(tmp_path / "apart"), "--unmerged"])
    assert apart.exit_code == 0, apart.output
    assert f"base: {tmp_path / 'apart' / 'base'}" in apart.output
    base_hash(tmp_path / "apart" / "base")


@needs_vllm
@pytest.mark.slow
def test_vllm_serves_the_adapter_unmerged(lora, tmp_path, run_python):
    export_unmerged(lora.adapter, lora.base, tmp_path / "apart")
    encode = lora.recommender.encoder.encode
    prompts = [encode(rows) for rows in HISTORIES[:4]]
    with torch.no_grad():
        expected = [
            lora.recommender.model(input_ids=torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
            for prompt in prompts
        ]
    code = f"""
import json
from vllm import LLM, SamplingParams, TokensPrompt
from vllm.lora.request import LoRARequest
if __name__ == "__main__":
    # In this one process, which spares two starts of Python. One slot more than adapters: without it
    # vLLM's CPU code gives requests without an adapter the last one.
    model = LLM({str(tmp_path / "apart" / "base")!r}, dtype="float32", enforce_eager=True, enable_lora=True,
                max_lora_rank=8, max_loras=2, max_logprobs=-1, max_num_seqs=8, block_size=32,
                distributed_executor_backend="uni")
    found = model.generate([TokensPrompt(prompt_token_ids=prompt) for prompt in {prompts!r}],
                           SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1), use_tqdm=False,
                           lora_request=LoRARequest("adapter", 1, {str(tmp_path / "apart" / "adapter")!r}))
    rows = [{{int(id): row.logprob for id, row in answer.outputs[0].logprobs[0].items()}} for answer in found]
    print("ROWS", json.dumps(rows))
"""
    variables = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
    done = run_python(code, VLLM_ENABLE_V1_MULTIPROCESSING="0", **variables)
    line = next((line for line in done.stdout.splitlines() if line.startswith("ROWS ")), None)
    assert line is not None, done.stderr[-3000:]
    for row, wanted in zip(json.loads(line.removeprefix("ROWS ")), expected, strict=True):
        assert len(row) == len(wanted)
        assert max(abs(value - float(wanted[int(id)])) for id, value in row.items()) < 1e-4

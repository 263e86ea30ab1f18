"""Models from configs and checkpoints, and the errors that come before any weight is loaded."""

import json
import shutil

import pytest
import torch
from factories import random_catalog
from tiny_backbones import FAMILIES, arguments_for, new_ids, write_checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.backbones.causal_lm import (
    BackboneArguments,
    attention_for,
    build_config,
    context_limit,
    from_checkpoint,
    from_scratch,
    load_config,
    load_tokenizer,
)
from llmrec.backbones.new_rows import CodebookStart
from llmrec.exceptions import BackboneError
from llmrec.vocabulary import PlainText, add_catalog_tokens, train_tokenizer

TYPES = ["llama", "gpt2", "qwen2", "qwen3", "mistral", "gemma", "phi"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture
def broken(checkpoint, tmp_path):
    """A copy of the checkpoint to spoil."""
    return shutil.copytree(checkpoint, tmp_path / "broken")


@pytest.mark.parametrize("model_type", TYPES)
def test_sizes_reach_every_family(model_type):
    arguments = BackboneArguments(
        model_type=model_type, hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=96
    )
    config = build_config(arguments, vocab_size=320, max_positions=77, bos_token_id=1)
    model = AutoModelForCausalLM.from_config(config)
    assert model.get_input_embeddings().weight.shape == (320, 64)
    assert config.num_hidden_layers == 3
    assert context_limit(config) == 77
    assert any(96 in parameter.shape for parameter in model.parameters())
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 320)


def test_sizes_that_no_model_has():
    with pytest.raises(BackboneError, match="not a multiple"):
        build_config(BackboneArguments(hidden_size=100, num_attention_heads=3), 300, 64)
    with pytest.raises(BackboneError, match="'lama'"):
        build_config(BackboneArguments(model_type="lama"), 300, 64)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_from_scratch_is_seeded_and_padded(dtype):
    tokenizer = train_tokenizer(["some text to learn from"], 300)
    arguments = BackboneArguments(
        hidden_size=64, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=False, dtype=dtype
    )
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(from_scratch(arguments, tokenizer, 50))
    first, second, other = (model.get_input_embeddings().weight for model in models)
    assert first.shape == (320, 64)
    assert first.dtype == getattr(torch, dtype)
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert models[0].config._attn_implementation == "sdpa"
    assert models[0].get_output_embeddings().weight is not first
    assert models[0].config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_is_extended_by_ids(family, tmp_path):
    folder = write_checkpoint(family, tmp_path)
    original = AutoModelForCausalLM.from_pretrained(folder)
    arguments = arguments_for(folder, "full")
    tokenizer = load_tokenizer(arguments)
    before = len(tokenizer)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    new = new_ids(catalog)
    model, rows = from_checkpoint(arguments, tokenizer, new, seed=0)
    size = model.get_input_embeddings().weight.shape[0]
    assert size % 64 == 0
    assert size >= len(tokenizer)
    assert rows[0] >= before - 1  # nothing old is drawn again
    assert set(new) <= set(rows)
    old = [row for row in range(len(original.get_input_embeddings().weight)) if row not in rows]
    for name in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, name)().weight[old], getattr(original, name)().weight[old])
    text = PlainText(tokenizer).encode("a customer bought 123")
    assert text
    assert not set(text) & set(rows)
    tokens = torch.tensor([text])
    with torch.no_grad():
        # What the model says of old tokens is what it said.
        assert torch.allclose(
            model.eval()(input_ids=tokens).logits[..., old],
            original.eval()(input_ids=tokens).logits[..., old],
            atol=1e-5,
        )


def test_a_start_reaches_the_new_rows(checkpoint):
    arguments = arguments_for(checkpoint, "full")
    tokenizer = load_tokenizer(arguments)
    catalog = add_catalog_tokens(tokenizer, random_catalog())
    near, _ = from_checkpoint(arguments, tokenizer, new_ids(catalog), 0)
    books = [torch.randn(size, 9).numpy() for size in (5, 4, 6)]
    wide, _ = from_checkpoint(arguments, tokenizer, new_ids(catalog), 0, CodebookStart.of(catalog, books))
    spreads = [model.get_input_embeddings().weight[new_ids(catalog)].std().item() for model in (near, wide)]
    assert spreads[1] > 3 * spreads[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"method": "lorra"}, "method is 'lorra'"),
        ({"new_token_init": "zero"}, "new_token_init is 'zero'"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"method": "lora"}, "'lora' for a model from scratch"),
        ({"backbone": "x", "lora_rank": 8}, "lora_rank is 8, and the method 'full' has no adapters"),
        ({"backbone": "x", "method": "new_tokens", "lora_rank": 8}, "'new_tokens' has no adapters"),
        ({"backbone": "x", "method": "qlora", "lora_rank": 0}, "Ranks count from 1"),
        ({"backbone": "x", "method": "lora", "lora_dropout": 1.0}, "dropout is in"),
        ({"backbone": "x", "method": "dora", "lora_alpha": 0}, "alpha is above 0"),
    ],
)
def test_arguments_that_contradict_one_another(values, message):
    with pytest.raises(BackboneError, match=message):
        BackboneArguments(**values).check()


def test_arguments_of_adapters():
    assert BackboneArguments(backbone="x", method="lora").rank == 16
    assert BackboneArguments(backbone="x", method="rslora", lora_rank=4).rank == 4
    assert BackboneArguments(backbone="x", lora_rank=0).check() is None
    assert [BackboneArguments(method=name).quantised for name in ("lora", "qlora", "int8")] == [False, True, True]


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (AutoConfig.for_model("gpt2", n_positions=77), 77),
        (AutoConfig.for_model("llama", max_position_embeddings=4096), 4096),
        (AutoConfig.for_model("mpt", max_seq_len=99), 99),
        (AutoConfig.for_model("bloom"), None),
    ],
)
def test_context_limits(config, limit):
    assert context_limit(config) == limit


def test_attention_is_checked_before_weights_are_loaded(checkpoint, broken, caplog):
    (broken / "model.safetensors").unlink()
    arguments = arguments_for(broken, "full", attn_implementation="flash_attention_2")
    with pytest.raises(BackboneError, match="cannot be used: it needs a GPU"):
        from_checkpoint(arguments, load_tokenizer(arguments), [], 0)
    with caplog.at_level("INFO", logger="llmrec"):
        assert (
            attention_for(arguments_for(checkpoint, "full"), load_config(arguments_for(checkpoint, "full"))) == "sdpa"
        )
    assert "not flash_attention_2: it needs a GPU" in caplog.text


def test_folders_that_hold_no_checkpoint(tmp_path, broken):
    with pytest.raises(BackboneError, match=r"holds no config\.json"):
        load_config(BackboneArguments(backbone=str(tmp_path)))
    (broken / "model.safetensors").unlink()
    arguments = BackboneArguments(backbone=str(broken))
    with pytest.raises(BackboneError, match="has a config, but its weights cannot be loaded"):
        from_checkpoint(arguments, load_tokenizer(arguments), [], 0)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"model_type": "lama3000"}))
    with pytest.raises(BackboneError, match="no model type that this transformers knows"):
        load_config(BackboneArguments(backbone=str(broken)))
    with pytest.raises(BackboneError, match="No backbone is named"):
        load_config(BackboneArguments())


@pytest.mark.parametrize(
    ("model_type", "architecture", "what"),
    [
        ("t5", "T5ForConditionalGeneration", "T5ForConditionalGeneration"),
        ("bert", "BertForMaskedLM", "BertForMaskedLM"),
        ("bert", "BertModel", "BertModel"),
        ("vit", "ViTForImageClassification", "ViTForImageClassification"),
        ("llama", "LlamaForSequenceClassification", "LlamaForSequenceClassification"),
        ("clip", None, "clip"),
    ],
)
def test_what_is_no_causal_language_model(model_type, architecture, what, tmp_path):
    config = AutoConfig.for_model(model_type)
    config.architectures = None if architecture is None else [architecture]
    config.save_pretrained(tmp_path)
    with pytest.raises(BackboneError, match=f"holds a {what}, which is no causal language model"):
        load_config(BackboneArguments(backbone=str(tmp_path)))


def test_headless_checkpoints_with_a_tied_head_are_taken(tmp_path):
    config = AutoConfig.for_model("gpt2")
    config.architectures = ["GPT2Model"]
    config.save_pretrained(tmp_path)
    assert load_config(BackboneArguments(backbone=str(tmp_path))).model_type == "gpt2"


def test_tokenizers_that_lack_something(broken):
    def rewrite(**roles):
        path = broken / "tokenizer_config.json"
        config = json.loads(path.read_text())
        for name, value in roles.items():
            config.pop(name, None)
            if value is not None:
                config[name] = value
        path.write_text(json.dumps(config))

    arguments = BackboneArguments(backbone=str(broken))
    tokenizer = load_tokenizer(arguments)
    assert tokenizer.pad_token == tokenizer.eos_token == "<|eot_id|>"
    rewrite(pad_token="<|begin_of_text|>")
    assert load_tokenizer(arguments).pad_token == "<|begin_of_text|>"
    rewrite(pad_token=None, eos_token=None)
    with pytest.raises(BackboneError, match="neither a padding nor an end-of-sequence token"):
        load_tokenizer(arguments)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(BackboneError, match="has no tokenizer that loads"):
        load_tokenizer(arguments)
    (broken / "tokenizer.json").unlink()
    (broken / "tokenizer_config.json").unlink()
    with pytest.raises(BackboneError, match="has no tokenizer that loads"):
        load_tokenizer(arguments)


HUB = """
import huggingface_hub
from llmrec.backbones.causal_lm import BackboneArguments, load_config, load_tokenizer
from llmrec.exceptions import BackboneError
for name, revision in {asked!r}:
    if name == "offline":
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        continue
    for load in (load_config, load_tokenizer):
        try:
            print(name, type(load(BackboneArguments(backbone=name, backbone_revision=revision))).__name__)
        except BackboneError as error:
            print(name, error)
"""


def test_the_hub_says_no_in_its_ways(fake_hub, run_python, checkpoint, tmp_path, monkeypatch):
    find = fake_hub.find
    monkeypatch.setattr(fake_hub, "find", lambda name, at: "GatedRepo" if name == "meta/gated" else find(name, at))
    fake_hub.put("user/model", checkpoint)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text("no model")
    fake_hub.put("user/data", tmp_path / "data")
    asked = [
        ("user/model", None), ("user/model", "v9"), ("meta/gated", None), ("user/absent", None), ("user/data", None),
        ("no such/name!", None), ("offline", None), ("user/model", None), ("user/absent", None),
    ]  # fmt: skip
    done = run_python(HUB.format(asked=asked), **fake_hub.variables(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    expected = [
        "user/model LlamaConfig",
        "user/model TokenizersBackend",
        *["has no revision 'v9'"] * 2,
        *["is gated: its owners ask for your consent"] * 2,
        *["the Hub has no such repository for you"] * 2,
        *["holds no config.json: it is no checkpoint of transformers"] * 2,
        *["cannot be a Hub repository's id either"] * 2,
        "user/model LlamaConfig",  # from the cache
        "user/model TokenizersBackend",
        *["cache does not hold it while the Hub is offline"] * 2,
    ]
    assert len(lines) == len(expected)
    for line, words in zip(lines, expected, strict=True):
        assert words in line

"""A model without some of its layers is the model that would be built without them."""

import copy

import pytest
import torch
from small_teachers import FAMILIES, language_model, language_recommender, sequence_model
from transformers import AutoModelForCausalLM

from llmrec.distillation.layer_stack import LayerStack, with_layers
from llmrec.exceptions import BackboneError
from llmrec.sequence.model import SequenceModel

KEPT = [[0, 2, 3], [1, 3], [0], [3], [0, 1, 2, 3]]
IDS = ["drop-1", "odd", "first", "last", "all"]


def renumbered(state, kept, name):
    """The weights of some layers, numbered as those of a smaller model."""
    found = {}
    for key, value in state.items():
        before, mark, after = key.partition(f".{name}.")
        if mark and after.split(".")[0].isdigit():
            number, _, rest = after.partition(".")
            if int(number) not in kept:
                continue
            key = f"{before}.{name}.{kept.index(int(number))}.{rest}"
        found[key] = value
    return found


def built_without(model, kept, name, **changes):
    """A new model of a smaller configuration, written by hand, with the weights of the layers kept."""
    config = copy.deepcopy(model.config)
    for key, value in changes.items():
        setattr(config, key, value)
    made = type(model)(config).to(model.dtype).eval()
    made.load_state_dict(renumbered(model.state_dict(), kept, name))
    return made


@pytest.mark.parametrize("kept", KEPT, ids=IDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_language_model_without_layers_is_the_one_built_without_them(family, kept):
    model = language_model(family)
    name = "h" if family == "gpt2" else "layers"
    types = {"layer_types": ["full_attention"] * len(kept)} if family == "qwen3" else {}
    built = built_without(model, kept, name, num_hidden_layers=len(kept), **types)
    tokens = torch.randint(0, 61, (3, 9))
    whole = model(tokens).logits
    with torch.no_grad(), LayerStack(model).only(kept):
        skipped = model(tokens).logits
    expected = built(tokens).logits
    assert torch.equal(skipped, expected)
    assert (len(kept) == 4) == torch.equal(whole, expected)
    copied = with_layers(model, kept)
    assert torch.equal(copied(tokens).logits, expected)
    # All is as it was.
    assert torch.equal(model(tokens).logits, whole)
    assert len(LayerStack(model)) == model.config.num_hidden_layers == 4


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_is_saved_and_loaded_as_what_it_is(family, tmp_path):
    made = with_layers(language_model(family, dtype=torch.float32), [0, 3])
    made.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.num_hidden_layers == 2
    tokens = torch.randint(0, 61, (2, 7))
    torch.testing.assert_close(loaded(tokens).logits, made(tokens).logits, rtol=0, atol=1e-6)


def test_the_cache_of_a_search_holds_the_layers_that_are_left():
    recommender = language_recommender()
    histories = [[3, 8, 1], [5], []]
    small = copy.copy(recommender)
    small.model = with_layers(recommender.model, [1, 3])
    expected = small.recommend_rows(histories, 10)
    with LayerStack(recommender.model).only([1, 3]):
        assert recommender.recommend_rows(histories, 10) == expected
    assert recommender.recommend_rows(histories, 10) != expected


def test_kinds_of_attention_go_with_their_layers():
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    model = language_model("qwen3", layer_types=types, sliding_window=3, use_sliding_window=True)
    built = built_without(model, [1, 2], "layers", num_hidden_layers=2, layer_types=[types[1], types[2]])
    tokens = torch.randint(0, 61, (2, 12))
    with LayerStack(model).only([1, 2]):
        skipped = model(tokens).logits
        assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert torch.equal(skipped, built(tokens).logits)
    assert model.config.layer_types == types


@pytest.mark.parametrize("kept", [[0, 2, 3], [2], [1, 3]], ids=["drop-1", "third", "odd"])
@pytest.mark.parametrize("encoder", ["sasrec", "hstu", "llama", "gpt2", "bert4rec"])
def test_a_sequence_model_without_layers_is_the_one_built_without_them(encoder, kept, tmp_path):
    flags = {"relative_bias": "position"} if encoder in ("sasrec", "hstu") else {}
    model = sequence_model(encoder, **flags)
    name = {"llama": "layers", "gpt2": "h", "hstu": "layers"}.get(encoder, "blocks")
    config = copy.deepcopy(model.config)
    config.encoder = {**config.encoder, "num_hidden_layers": len(kept)}
    built = SequenceModel(config).double().eval()
    built.load_state_dict(renumbered(model.state_dict(), kept, name))
    items, mask = torch.randint(0, 25, (3, 8)), torch.arange(8) < torch.tensor([[8], [5], [2]])
    asked = {"hidden": torch.zeros_like(mask)} if encoder == "bert4rec" else {}
    whole = model(items, mask, **asked)
    with LayerStack(model).only(kept):
        skipped = model(items, mask, **asked)
    assert torch.equal(skipped, built(items, mask, **asked))
    assert not torch.allclose(skipped, whole)
    assert torch.equal(model(items, mask, **asked), whole)
    made = with_layers(model, kept).float()
    made.save_pretrained(tmp_path)
    loaded = SequenceModel.from_pretrained(tmp_path)
    assert len(LayerStack(loaded)) == len(kept)
    torch.testing.assert_close(loaded(items, mask, **asked), made(items, mask, **asked), rtol=0, atol=1e-6)


def test_a_default_depth_is_cut_too():
    # A configuration may leave out what is a default, such as two layers.
    model = sequence_model("sasrec", layers=2)
    model.config.encoder = {name: one for name, one in model.config.encoder.items() if name != "num_hidden_layers"}
    made = with_layers(model, [1])
    assert made.config.encoder["num_hidden_layers"] == 1
    assert len(SequenceModel(made.config).encoder.blocks) == 1


def test_what_has_no_list_of_layers_is_refused():
    with pytest.raises(BackboneError, match="keeps no list of layers"):
        LayerStack(sequence_model("gru4rec"))
    with pytest.raises(BackboneError, match="scale_attn_by_inverse_layer_idx"):
        LayerStack(language_model("gpt2", scale_attn_by_inverse_layer_idx=True))


@pytest.mark.parametrize("kept", [[], [4], [1, 0], [2, 2], [-1]], ids=["none", "beyond", "order", "twice", "negative"])
def test_what_cannot_be_kept_is_refused(kept):
    model = language_model()
    with pytest.raises(BackboneError, match="0 to 3"), LayerStack(model).only(kept):
        pass
    assert len(LayerStack(model)) == 4


def test_all_is_restored_after_an_error():
    model = language_model()
    with pytest.raises(RuntimeError, match="within"), LayerStack(model).only([2]):
        raise RuntimeError("within")
    assert len(LayerStack(model)) == model.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]

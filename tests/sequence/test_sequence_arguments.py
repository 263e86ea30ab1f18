"""The flags of a sequence model: what they make, and what they refuse."""

import numpy as np
import polars as pl
import pytest
from safetensors.numpy import save_file
from sequence_logs import ACTIONS, ENCODERS, random_split
from transformers import GPT2Config, GPT2LMHeadModel

from llmrec.embedding.store import EmbeddingStore
from llmrec.exceptions import BackboneError, DataError, RecipeError
from llmrec.sequence.arguments import EncoderArguments, EventArguments, ItemArguments, SequenceArguments
from llmrec.sequence.histories import LoggedHistories


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_encoder_gets_the_sizes_that_are_given(encoder):
    heads = {} if encoder == "gru4rec" else {"num_attention_heads": 4}
    config = EncoderArguments(encoder=encoder, hidden_size=32, num_hidden_layers=3, dropout=0.25, **heads).config(17)
    assert (config.hidden_size, config.num_hidden_layers, config.dropout) == (32, 3, 0.25)
    assert config.max_position_embeddings == 17
    assert config.model_type == ("causal_body" if encoder in ("llama", "gpt2") else encoder)
    if encoder == "hstu":
        assert (config.qk_dim, config.v_dim) == (8, 8)
        assert EncoderArguments(encoder="hstu", qk_dim=5, v_dim=6).config(9).qk_dim == 5


def test_false_is_a_value_and_what_is_left_out_is_the_encoders_own():
    config = EncoderArguments(encoder="hstu", gate=False, position_embeddings=False).config(9)
    assert not config.gate
    assert not config.position_embeddings
    assert config.relative_bias == "position+time"
    assert config.score == "silu"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"encoder": "gru4rec", "relative_bias": "time"}, "gru4rec has no relative_bias"),
        ({"encoder": "sasrec", "qk_dim": 8}, "sasrec has no qk_dim"),
        ({"encoder": "bert4rec", "gate": False}, "bert4rec has no gate"),
        ({"encoder": "llama", "norm": "pre"}, "llama has no norm"),
        ({"encoder": "hstu", "body": "gpt2"}, "hstu reads no checkpoint"),
        (
            {"encoder": "gpt2", "body": "gpt2", "num_attention_heads": 2},
            "--num_attention_heads is given beside --body",
        ),
    ],
    ids=["bias", "qk", "gate", "norm", "body", "sizes"],
)
def test_a_flag_that_an_encoder_does_not_have_is_refused(flags, message):
    with pytest.raises(RecipeError, match=message):
        EncoderArguments(**flags).config(9)


def test_a_checkpoints_body_keeps_its_sizes(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=3, n_head=2, n_positions=20, vocab_size=30)).save_pretrained(
        tmp_path
    )
    config = EncoderArguments(encoder="gpt2", body=str(tmp_path), hidden_size=24, dropout=0.0).config(15)
    assert (config.hidden_size, config.body_hidden_size, config.num_hidden_layers) == (24, 16, 3)
    with pytest.raises(RecipeError, match="20 positions, and 21 are needed"):
        EncoderArguments(encoder="gpt2", body=str(tmp_path)).config(21)
    with pytest.raises(RecipeError, match="Say --encoder gpt2"):
        EncoderArguments(encoder="llama", body=str(tmp_path)).config(9)
    with pytest.raises(BackboneError, match="nowhere"):
        EncoderArguments(encoder="gpt2", body=str(tmp_path / "nowhere")).config(9)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"representation": "text"}, "without texts' embeddings"),
        ({"representation": "semantic_ids"}, "without codes"),
        ({"representation": "hashed"}, "--table_size"),
        ({"table_size": 7}, "--table_size is given"),
        ({"adapter": "mlp"}, "--adapter is given"),
        ({"representation": "hashed", "table_size": 9, "sparse_gradients": True}, "--sparse_gradients"),
    ],
    ids=["text", "codes", "size", "table", "adapter", "sparse"],
)
def test_items_that_cannot_be_are_refused(flags, message):
    with pytest.raises(RecipeError, match=message):
        ItemArguments(**flags).check()


def test_features_are_of_the_splits_items_in_their_order(tmp_path):
    split = random_split()
    vectors = np.random.default_rng(0).normal(size=(split.num_items, 6)).astype(np.float32)
    EmbeddingStore(split.item_ids[::-1], vectors[::-1]).save(tmp_path / "texts")
    arguments = ItemArguments(representation="ids+text", item_embeddings=str(tmp_path / "texts"), adapter="mlp")
    arguments.check()
    features = arguments.features(split)
    np.testing.assert_array_equal(features.vectors, vectors)
    np.testing.assert_array_equal(features.trained, split.train_counts > 0)
    assert arguments.described(features) == {"kind": "ids+text", "width": 6, "tuned": False, "adapter": "mlp"}
    ids = tmp_path / "ids"
    ids.mkdir()
    codes = np.stack(np.unravel_index(np.arange(split.num_items), (5, 5)), axis=1).astype(np.int32)
    save_file({"codes": codes[::-1].copy()}, ids / "codes.safetensors")
    (ids / "semantic_ids.json").write_text('{"codebook_sizes": [5, 9]}')
    pl.DataFrame({"item_id": split.item_ids[::-1], "title": split.item_ids[::-1]}).write_ndjson(ids / "items.jsonl")
    coded = ItemArguments(representation="semantic_ids", semantic_ids=str(ids), code_pieces="prefix", table_size=50)
    coded.check()
    found = coded.features(split)
    np.testing.assert_array_equal(found.codes, codes)
    expected = {"kind": "semantic_ids", "codebook_sizes": [5, 9], "pieces": "prefix", "table_size": 50}
    assert coded.described(found) == expected


def test_actions_weigh_what_is_said():
    split = random_split()
    arguments = EventArguments(action_weights=["view=0.2", "buy=2"])
    events = arguments.config(split)
    assert events.actions == list(ACTIONS)
    assert events.action_tokens == "none"
    assert arguments.weights(events.actions) == [1.0, 2.0, 1.0, 0.2]
    assert EventArguments().weights([]) is None
    for wrong in ("steal=1", "buy", "buy=-1", "buy=nan", "buy=inf"):
        with pytest.raises(RecipeError, match="--action_weights"):
            EventArguments(action_weights=[wrong]).weights(list(ACTIONS))


def test_events_that_a_log_does_not_have_are_asked_for():
    from dataclasses import replace

    split = random_split()
    bare = replace(split, actions=None, domains=None, timestamps=None, clock=None)
    assert EventArguments().config(bare).actions == []
    for flags, message in (
        ({"action_tokens": "added"}, "no column of actions"),
        ({"target_action": "buy"}, "no column of actions"),
        ({"domain_tokens": "before"}, "no column of domains"),
        ({"request_time": True}, "no times"),
    ):
        with pytest.raises(DataError, match=message):
            EventArguments(**flags).config(bare)
    told = EventArguments(action_tokens="before", target_action="buy", request_time=True).config(split)
    assert told.action(told.target_action) == 1
    assert LoggedHistories(split, told).events is told


@pytest.mark.parametrize(
    ("flags", "causal", "bias", "unread"),
    [
        ({"request_time": True}, True, "position+time", ""),
        ({"request_time": True}, True, "rope", "request_time"),
        ({"request_time": True, "time_features": True}, True, "none", "request_time"),
        ({"request_time": True, "time_features": True, "domain_tokens": "before"}, True, "none", ""),
        ({"request_time": True, "time_features": True}, False, "", ""),
        ({"request_time": True}, False, "", "request_time"),
        ({"target_action": "buy", "action_tokens": "before"}, True, "none", ""),
        ({"target_action": "buy", "action_tokens": "added"}, False, "", ""),
        ({"target_action": "buy", "action_tokens": "added"}, True, "none", "target_action"),
        ({"target_action": "buy", "action_tokens": "after"}, True, "none", "target_action"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_model_would_not_read_is_refused(flags, causal, bias, unread):
    told = EventArguments(**flags)
    if unread:
        with pytest.raises(RecipeError, match=unread):
            told.check(causal, bias)
    else:
        told.check(causal, bias)


def test_a_stride_of_one_window_is_refused():
    with pytest.raises(RecipeError, match="--stride"):
        SequenceArguments(interactions="x", artefact="y", windows="last", stride=5).check()


@pytest.mark.parametrize(
    "flags",
    [{"max_history": 0}, {"stride": 60}, {"stochastic_length": 1.0}, {"hidden_share": 1.0}, {"ks": []}, {"ks": [0]}],
    ids=lambda flags: next(iter(flags)),
)
def test_numbers_that_make_no_sense_are_refused(flags):
    with pytest.raises(RecipeError, match=f"--{next(iter(flags))}"):
        SequenceArguments(interactions="x", artefact="y", **flags).check()

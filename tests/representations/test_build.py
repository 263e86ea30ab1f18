"""Promises that all representations keep: table and lookup agree, gradients, saving, other catalogues."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedConfig, PreTrainedModel

from llmrec.backbones.gru4rec import GRU4RecConfig
from llmrec.ctr.model import CTRModel, ctr_config
from llmrec.exceptions import BackboneError, DataError
from llmrec.representations.build import KINDS, build_representation
from llmrec.representations.item_features import ItemFeatures
from llmrec.representations.representation import ItemRepresentation
from llmrec.sequence.model import SequenceModel, sequence_config

N, D, E = 6, 8, 5
CONFIGS: dict[str, dict[str, Any]] = {
    "ids": {"kind": "ids"},
    "sparse": {"kind": "ids", "sparse": True},
    "text": {"kind": "text", "width": E},
    "mlp": {"kind": "text", "width": E, "adapter": "mlp", "adapter_size": 7},
    "tuned": {"kind": "text", "width": E, "tuned": True},
    "ids+text": {"kind": "ids+text", "width": E},
    "ids+tuned": {"kind": "ids+text", "width": E, "tuned": True, "adapter": "mlp"},
    "unigram": {"kind": "semantic_ids", "codebook_sizes": [3, 4, 2]},
    "bigram": {"kind": "semantic_ids", "codebook_sizes": [3, 4, 2], "pieces": "bigram", "table_size": 11},
    "prefix": {"kind": "semantic_ids", "codebook_sizes": [3, 4, 2], "pieces": "prefix", "table_size": 12},
    "hashed": {"kind": "hashed", "table_size": 997},
}


def features(number: int = N, seed: int = 0, names: str = "item") -> ItemFeatures:
    generator = np.random.default_rng(seed)
    return ItemFeatures(
        [f"{names} {row}" for row in range(number)],
        generator.normal(size=(number, E)).astype(np.float32),
        generator.integers(0, [3, 4, 2], size=(number, 3)),
        np.arange(number) != 1,
    )


def made(name: str, seed: int = 0) -> ItemRepresentation:
    torch.manual_seed(seed)
    representation = build_representation(CONFIGS[name], N, D)
    representation.set_items(features())
    return representation


def test_every_kind_is_here() -> None:
    assert {config["kind"] for config in CONFIGS.values()} == set(KINDS)


@pytest.mark.parametrize("name", CONFIGS)
@settings(max_examples=20, deadline=None)
@given(rows=st.lists(st.integers(0, N - 1), max_size=2 * N), wide=st.booleans())
def test_a_lookup_is_the_tables_row_with_its_gradients(name: str, rows: list[int], wide: bool) -> None:
    representation = made(name).double()
    wanted = torch.tensor(rows, dtype=torch.int64)
    wanted = wanted[:, None].expand(-1, 2) if wide else wanted
    found, table = representation(wanted), representation.table()
    assert table.shape == (N, D)
    assert found.shape == (*wanted.shape, D)
    torch.testing.assert_close(found, table[wanted], atol=1e-12, rtol=1e-12)
    slopes = torch.randn(found.shape, dtype=torch.float64)
    learnt = list(representation.parameters())
    mine = torch.autograd.grad(found, learnt, slopes)
    exact = torch.autograd.grad(table[wanted], learnt, slopes)
    for one, definition in zip(mine, exact, strict=True):
        assert one.is_sparse == (name == "sparse")
        torch.testing.assert_close(one.to_dense(), definition, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_single_row(name: str) -> None:
    representation = made(name)
    torch.testing.assert_close(representation(torch.tensor(3)), representation.table()[3])


@pytest.mark.parametrize("name", CONFIGS)
def test_different_items_differ(name: str) -> None:
    table = made(name).table()
    distances = torch.cdist(table, table) + torch.eye(N)
    codes = features().codes
    assert codes is not None
    assert len(np.unique(codes, axis=0)) == N
    assert distances.min() > 1e-5


@pytest.mark.parametrize("name", CONFIGS)
def test_the_state_dict_is_all_there_is(name: str) -> None:
    representation = made(name)
    other = build_representation(CONFIGS[name], N, D)
    other.load_state_dict(representation.state_dict())
    assert torch.equal(other.table(), representation.table())


class OneConfig(PreTrainedConfig):
    model_type = "one_representation"
    name: str = "ids"


class One(PreTrainedModel):
    """A transformers model that is a representation."""

    config_class = OneConfig
    base_model_prefix = "one"

    def __init__(self, config: OneConfig) -> None:
        super().__init__(config)
        self.representation = build_representation(CONFIGS[config.name], N, D)
        self.post_init()


@pytest.mark.parametrize("name", CONFIGS)
def test_transformers_saves_and_loads_it(name: str, tmp_path: Any) -> None:
    model = One(OneConfig(name=name))
    model.representation.set_items(features())
    model.save_pretrained(tmp_path)
    other = One.from_pretrained(tmp_path)
    assert torch.equal(other.representation.table(), model.representation.table())
    assert {parameter.requires_grad for parameter in other.parameters()} == {True}
    half = One.from_pretrained(tmp_path, dtype=torch.bfloat16).representation.table()
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model.representation.table(), atol=0.01, rtol=0.1)


@pytest.mark.parametrize("task", ["sequence", "ctr"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_leaves_it_the_range_that_was_asked_for(kind: str, task: str) -> None:
    sizes: dict[str, dict[str, Any]] = {
        "text": {"width": 300},
        "ids+text": {"width": 300},
        "semantic_ids": {"codebook_sizes": [400] * 4},
        "hashed": {"table_size": 400, "num_hashes": 4},
    }
    config = {"kind": kind, "initializer_range": 0.5, **sizes.get(kind, {})}
    encoder = GRU4RecConfig(hidden_size=16)
    torch.manual_seed(0)
    model: SequenceModel | CTRModel
    if task == "sequence":
        model = SequenceModel(sequence_config(encoder, 400, 20, config))
    else:
        model = CTRModel(ctr_config(encoder, 400, 20, ["like"], representation=config))
    alone = build_representation(config, 400, 16)
    # Codes and hashes are sums of four rows, which have the range together.
    expected = 0.25 if kind in ("semantic_ids", "hashed") else 0.5
    for representation in (alone, model.representation):
        found = {name: float(part.detach().std()) for name, part in representation.named_parameters()}
        assert found.pop("adapter.bias", 0.0) == found.pop("text.adapter.bias", 0.0) == 0
        assert found == {name: pytest.approx(expected, rel=0.1) for name in found}


@pytest.mark.parametrize("name", CONFIGS)
def test_items_that_nobody_gave_are_loud(name: str) -> None:
    if CONFIGS[name]["kind"] == "ids":
        return
    empty = build_representation(CONFIGS[name], N, D)
    if CONFIGS[name]["kind"] in ("text", "ids+text"):
        assert empty.table().isnan().all()
    else:
        with pytest.raises((RuntimeError, IndexError)):
            empty.table()


@pytest.mark.parametrize("name", CONFIGS)
def test_old_items_in_another_order_keep_their_vectors(name: str) -> None:
    representation = made(name).eval()
    with torch.no_grad():
        for parameter in representation.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    old = np.array([4, 0, 5, 1])
    every = features()
    assert every.vectors is not None
    assert every.codes is not None
    assert every.trained is not None
    some = ItemFeatures([every.item_ids[row] for row in old], every.vectors[old], every.codes[old], every.trained[old])
    other = representation.with_items(some, old)
    assert type(other) is type(representation)
    assert other.num_items == 4
    assert other.hidden_size == D
    assert not other.training
    torch.testing.assert_close(other.table(), representation.table()[old])
    # What is shown of it to a state dict of its own size is whole.
    again = build_representation(CONFIGS[name], 4, D)
    again.load_state_dict(other.state_dict())
    assert torch.equal(again.table(), other.table())


@pytest.mark.parametrize("name", CONFIGS)
def test_new_items_are_made_of_their_features_or_refused(name: str) -> None:
    representation = made(name)
    added = features(8, seed=5, names="new")
    nothing_old = np.full(8, -1)
    if CONFIGS[name]["kind"] == "ids":
        with pytest.raises(BackboneError, match=r"8 item.* 'new 0'.*Train it again"):
            representation.with_items(added, nothing_old)
        return
    other = representation.with_items(added, nothing_old)
    assert other.table().shape == (8, D)
    assert other.table().isfinite().all()
    codes = added.codes
    assert codes is not None
    kinds = len(np.unique(codes, axis=0)) if "codebook_sizes" in CONFIGS[name] else 8
    # A hash may let two of them fall together.
    assert len(other.table().unique(dim=0)) >= kinds - (name == "bigram")
    # Trained parts are shared: what the one learns the other knows.
    first = next(parameter for key, parameter in other.named_parameters() if "adapter" in key or "tables" in key)
    assert any(first is parameter for parameter in representation.parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_foreign_features_are_refused(name: str) -> None:
    representation = made(name)
    with pytest.raises(DataError, match="7 items do not fit"):
        representation.set_items(features(7))
    for rows in (np.arange(5), np.array([0, 1, 2, 3, 4, 6]), np.array([0, 1, 2, 3, 4, -2]), np.zeros((6, 1))):
        with pytest.raises(DataError, match="Old rows"):
            representation.with_items(features(), rows)
    bare = ItemFeatures(features().item_ids)
    kind = CONFIGS[name]["kind"]
    if kind in ("ids", "hashed"):
        representation.set_items(bare)
    else:
        with pytest.raises(DataError, match="no codes" if kind == "semantic_ids" else "no vectors"):
            representation.set_items(bare)
        with pytest.raises(DataError, match="no codes" if kind == "semantic_ids" else "no vectors"):
            representation.with_items(bare, np.arange(N))


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"kind": "bag"},
        {"kind": "ids", "rank": 3},
        {"kind": "text"},
        {"kind": "text", "width": 5, "adapter": "tree"},
        {"kind": "text", "width": 0},
        {"kind": "ids+text", "width": 5, "adapter_size": 0, "adapter": "mlp"},
        {"kind": "semantic_ids"},
        {"kind": "semantic_ids", "codebook_sizes": []},
        {"kind": "semantic_ids", "codebook_sizes": [4], "pieces": "bigram"},
        {"kind": "semantic_ids", "codebook_sizes": [4, 0]},
        {"kind": "semantic_ids", "codebook_sizes": [4, 4], "pieces": "suffix"},
        {"kind": "semantic_ids", "codebook_sizes": [4, 4], "table_size": 0},
        {"kind": "hashed"},
        {"kind": "hashed", "table_size": 0},
        {"kind": "hashed", "table_size": 9, "num_hashes": 9},
        {"kind": "hashed", "table_size": 9, "seed": 2**63},
    ],
)
def test_descriptions_that_make_no_sense(config: dict[str, Any]) -> None:
    with pytest.raises(BackboneError):
        build_representation(config, N, D)


@pytest.mark.parametrize(("num_items", "hidden_size"), [(0, 4), (4, 0)])
def test_no_items_or_no_width(num_items: int, hidden_size: int) -> None:
    with pytest.raises(BackboneError, match="have no table"):
        build_representation({"kind": "ids"}, num_items, hidden_size)

"""Windows and batches against their definitions, and what SASRec's item table makes of planted histories."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.backbones.sasrec import SASRecConfig, SASRecModel
from llmrec.embedding.sequential import Windows, batches_of, fit, sasrec_embeddings, windows_of
from llmrec.exceptions import DataError
from llmrec.representations.id_table import IdTable


def tiny(num_items: int, **sizes: Any) -> tuple[IdTable, SASRecModel]:
    """A new item table and its encoder."""
    encoder = SASRecModel(SASRecConfig(**sizes))
    return IdTable(num_items, encoder.config.hidden_size), encoder


SMALL: dict[str, Any] = {"dim": 8, "num_layers": 1, "epochs": 2, "batch_size": 16, "device": "cpu"}


def random_histories(seed: int, num_items: int = 12, users: int = 20) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, num_items, generator.integers(0, 9)).astype(np.int32) for _ in range(users)]


logs = st.lists(st.lists(st.integers(0, 5), max_size=9), max_size=6)


@settings(max_examples=60, deadline=None)
@given(log=logs, max_length=st.integers(1, 10), batch_size=st.integers(1, 30), seed=st.integers(0, 99))
def test_every_step_of_every_history_is_predicted_once(
    log: list[list[int]], max_length: int, batch_size: int, seed: int
) -> None:
    windows = windows_of([np.array(history, dtype=np.int32) for history in log], 6, max_length)
    expected = sorted(
        (history[place - 1], history[place])
        for history in log
        if len(set(history)) > 1
        for place in range(1, len(history))
    )
    assert len(windows.lengths) == 0 or 1 <= windows.lengths.min() <= windows.lengths.max() <= max_length
    assert windows.lengths.sum() == len(expected)
    found: list[tuple[int, int]] = []
    if expected:
        for inputs, targets, lengths in batches_of(windows, batch_size, [seed]):
            assert inputs.shape == targets.shape == (len(lengths), lengths.max())
            assert len(lengths) == 1 or lengths.sum() <= batch_size
            for row, length in enumerate(lengths):
                found += zip(inputs[row, :length].tolist(), targets[row, :length].tolist(), strict=True)
                np.testing.assert_array_equal(inputs[row, 1:length], targets[row, : length - 1])
    assert sorted(found) == expected


def test_windows_by_hand() -> None:
    windows = windows_of([np.array([4, 4]), np.arange(6), np.array([], dtype=int), np.array([7, 8])], 9, max_length=2)
    assert windows.items.tolist() == [0, 1, 2, 3, 4, 5, 7, 8]
    assert windows.starts.tolist() == [0, 2, 4, 6]
    assert windows.lengths.tolist() == [2, 2, 1, 1]


def test_batches_are_of_like_length_and_in_another_order_every_epoch() -> None:
    windows = windows_of([np.arange(length) for length in range(2, 40)] * 5, 40, 50)
    epochs = [list(batches_of(windows, 60, [0, epoch])) for epoch in (0, 0, 1)]
    np.testing.assert_equal(epochs[0], epochs[1])
    assert [batch[2].tolist() for batch in epochs[0]] != [batch[2].tolist() for batch in epochs[2]]
    lengths = [batch[2] for batch in epochs[0]]
    padded = sum(len(batch) * batch.max() for batch in lengths)
    assert padded < 1.05 * windows.lengths.sum()
    assert [batch.max() for batch in lengths] != sorted(batch.max() for batch in lengths)


def block_histories(num_items: int = 24, users: int = 400) -> list[np.ndarray]:
    """Users who walk through one of four blocks of items; the last item of each block is never taken."""
    generator = np.random.default_rng(0)
    size = num_items // 4
    return [size * (user % 4) + generator.permutation(size - 1)[:4] for user in range(users)]


def test_items_that_follow_one_another_are_neighbours_and_unseen_ones_zero() -> None:
    vectors = sasrec_embeddings(block_histories(), 24, dim=16, epochs=15, batch_size=64, dropout=0.1, device="cpu")
    assert vectors.shape == (24, 16)
    assert vectors.dtype == np.float32
    unseen = np.array([5, 11, 17, 23])
    assert not vectors[unseen].any()
    seen = np.setdiff1d(np.arange(24), unseen)
    unit = vectors[seen] / np.linalg.norm(vectors[seen], axis=1, keepdims=True)
    similarity = unit @ unit.T
    alike = (seen // 6)[:, None] == seen // 6
    np.fill_diagonal(alike, False)
    apart = (seen // 6)[:, None] != seen // 6
    assert similarity[alike].min() > 0.7
    assert similarity[apart].max() < 0.4


def test_a_chain_is_learnt_to_its_end() -> None:
    # Item i is followed by i + 1 always, so that the loss of a model that has understood is nearly nothing.
    histories = [np.arange(start, start + 5) % 10 for start in range(10)] * 8
    torch.manual_seed(0)
    items, encoder = tiny(10, hidden_size=16, dropout=0.0)
    losses = fit(items, encoder, windows_of(histories, 10, 50), epochs=40, batch_size=64, learning_rate=3e-3)
    assert losses[0] > 2
    assert losses[-1] < 0.05
    assert not encoder.training
    hidden = encoder(items(torch.tensor([[6, 7, 8]])))
    assert (hidden @ items.table().T)[0].argmax(dim=1).tolist() == [7, 8, 9]


def test_the_first_loss_is_that_of_the_definition() -> None:
    histories = random_histories(3)
    torch.manual_seed(0)
    table_of_items, encoder = tiny(12, hidden_size=8, max_position_embeddings=3, dropout=0.0)
    windows = windows_of(histories, 12, 3)
    expected = []
    with torch.no_grad():
        for start, length in zip(windows.starts, windows.lengths, strict=True):
            items = torch.from_numpy(windows.items[start : start + length + 1])
            scores = (encoder(table_of_items(items[None, :-1])) @ table_of_items.table().T)[0]
            expected += torch.nn.functional.cross_entropy(scores, items[1:], reduction="none").tolist()
    # A learning rate of almost nothing: the epoch's mean loss is that of the weights as they were.
    (loss,) = fit(table_of_items, encoder, windows, epochs=1, batch_size=7, learning_rate=1e-12)
    assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_every_epoch_has_batches_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []

    def spy(windows: Windows, batch_size: int, seed: list[int]) -> Any:
        seeds.append(seed)
        return batches_of(windows, batch_size, seed)

    monkeypatch.setattr("llmrec.embedding.sequential.batches_of", spy)
    losses = fit(*tiny(12, hidden_size=4), windows_of(random_histories(0), 12, 50), epochs=3, seed=5)
    assert seeds == [[5, 0], [5, 1], [5, 2]]
    assert len(losses) == 3


def test_a_model_in_eval_mode_is_trained_with_dropout_all_the_same() -> None:
    losses = []
    for training in (True, False):
        torch.manual_seed(0)
        items, encoder = tiny(12, hidden_size=4, dropout=0.5)
        losses.append(
            fit(items, encoder.train(training), windows_of(random_histories(0), 12, 50), epochs=2, batch_size=16)
        )
    assert losses[0] == losses[1]


def test_the_same_seed_gives_the_same_rows_and_another_does_not() -> None:
    histories = random_histories(0)
    state = torch.get_rng_state()
    first = sasrec_embeddings(histories, 12, **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    torch.rand(5)
    np.testing.assert_array_equal(first, sasrec_embeddings(histories, 12, **SMALL))
    assert not np.allclose(first, sasrec_embeddings(histories, 12, **SMALL, seed=1))


def test_every_argument_changes_the_training() -> None:
    histories = random_histories(0)
    first = sasrec_embeddings(histories, 12, **SMALL)
    changes: dict[str, Any] = {
        "num_layers": 2, "num_heads": 2, "max_length": 2, "epochs": 3, "batch_size": 8, "learning_rate": 1e-2,
        "dropout": 0.1, "seed": 1,
    }  # fmt: skip
    for name, value in changes.items():
        other = sasrec_embeddings(histories, 12, **{**SMALL, name: value})
        assert not np.array_equal(first, other), name


def test_items_without_a_companion_are_zero_rows() -> None:
    # 1, 2 follow one another; 3 stands alone, 4 with itself, 0 and 5 nowhere.
    vectors = sasrec_embeddings([np.array([1, 2]), np.array([3]), np.array([4, 4, 4]), np.array([], int)], 6, **SMALL)
    assert vectors.any(axis=1).tolist() == [False, True, True, False, False, False]


@pytest.mark.parametrize(
    "histories", [[], [np.array([], dtype=int)], [np.array([0]), np.array([1])], [np.array([0, 0])]]
)
def test_histories_that_teach_nothing_give_zeros(histories: list[np.ndarray]) -> None:
    vectors = sasrec_embeddings(histories, 2, **SMALL)
    assert vectors.shape == (2, 8)
    assert not vectors.any()


def test_one_item() -> None:
    assert not sasrec_embeddings([np.array([0, 0, 0])], 1, **SMALL).any()


def test_misuse_is_refused() -> None:
    for rows in ([0, 3], [-1, 0]):
        with pytest.raises(DataError, match=rf"item rows {min(rows)}\.\.{max(rows)}, the catalog has 3 items"):
            sasrec_embeddings([np.array(rows)], 3, **SMALL)
    for name, value in [
        ("dim", 0), ("num_layers", -1), ("num_heads", 0), ("num_heads", 3), ("max_length", 0), ("epochs", 0),
        ("batch_size", 0), ("learning_rate", 0.0), ("learning_rate", np.nan), ("dropout", 1.0), ("dropout", -0.1),
    ]:  # fmt: skip
        with pytest.raises(DataError, match=f"{name} is {value}"):
            sasrec_embeddings([np.array([0, 1])], 3, **{**SMALL, name: value})
    with pytest.raises(DataError, match="num_items is 0"):
        sasrec_embeddings([], 0, **SMALL)


def test_a_loss_that_is_no_number_is_refused() -> None:
    with pytest.raises(DataError, match=r"loss is (nan|inf) in epoch \d"):
        sasrec_embeddings(random_histories(0), 12, **{**SMALL, "learning_rate": 1e30, "epochs": 4})

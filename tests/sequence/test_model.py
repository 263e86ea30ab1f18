"""Sequence models: every encoder, every layout of events, against one history at a time."""

import numpy as np
import pytest
import torch
from sequence_logs import ACTIONS, DOMAINS, ENCODERS, random_split, small_model
from transformers import AutoModel

from llmrec.examples import IGNORED
from llmrec.exceptions import BackboneError
from llmrec.losses.arguments import LossArguments
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import History, LoggedHistories, collate
from llmrec.sequence.model import SequenceModel, register, sequence_config
from llmrec.sequence.windows import TrainingWindows


def events(**options):
    return EventConfig(actions=list(ACTIONS), domains=list(DOMAINS), **options)


LAYOUTS = {
    "plain": {},
    "added": {"action_tokens": "added", "domain_tokens": "added", "time_features": True},
    "before": {"action_tokens": "before", "domain_tokens": "before", "request_time": True},
    "after": {"action_tokens": "after", "request_time": True},
}


def layouts(encoder):
    return [name for name in LAYOUTS if encoder != "bert4rec" or name in ("plain", "added")]


BOTH = [(encoder, layout) for encoder in ENCODERS for layout in layouts(encoder)]


def case_histories(model, count=12):
    return LoggedHistories(random_split(seed=3), model.events).cases("test")[:count]


@pytest.mark.parametrize(("encoder", "layout"), BOTH)
def test_a_batch_answers_as_each_history_alone(encoder, layout):
    model = small_model(encoder, events=events(**LAYOUTS[layout]))
    histories = case_histories(model)
    with torch.no_grad():
        together = model.last(**collate(histories, 10))
        alone = torch.cat([model.last(**collate([one], 10)) for one in histories])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert together.std(dim=0).min() > 1e-3  # histories are told apart


@pytest.mark.parametrize(("encoder", "layout"), [pair for pair in BOTH if pair[0] != "bert4rec"])
def test_what_training_asks_at_a_place_is_what_serving_answers_there(encoder, layout):
    model = small_model(encoder, events=events(**LAYOUTS[layout]))
    windows = TrainingWindows(LoggedHistories(random_split(), model.events), 10)
    batch = windows.__getitems__([(0, 0), (0, 3)])
    labels = batch.pop("labels")
    batch.pop("first_items")
    with torch.no_grad():
        found = model(**batch)
        for row, window in enumerate((windows.windows[0], windows.windows[3])):
            for place in range(int(batch["mask"][row].sum())):
                end = window.begin + place + 1
                asked = collate([windows.histories.before(window.begin, end)], 10)
                torch.testing.assert_close(found[row, place], model.last(**asked)[0], rtol=1e-4, atol=1e-5)
                assert labels[row, place] == windows.histories.split.rows[end]


@pytest.mark.parametrize("encoder", ENCODERS)
def test_saved_and_loaded_it_answers_alike(encoder, tmp_path):
    register()
    chosen = events(action_tokens="added", time_features=True)
    model = small_model(encoder, events=chosen, similarity="cosine", temperature=0.05)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, SequenceModel)
    assert loaded.events == chosen
    batch = collate(case_histories(model), 10)
    with torch.no_grad():
        torch.testing.assert_close(loaded.last(**batch), model.last(**batch), rtol=0, atol=0)
        torch.testing.assert_close(loaded.table(), model.table(), rtol=0, atol=0)
        torch.testing.assert_close(loaded.vectors(torch.tensor([3, 1])), model.table()[[3, 1]])


def test_a_cloze_model_is_asked_with_a_hidden_item_at_the_end():
    model = small_model("bert4rec", events=events(action_tokens="added", request_time=True, target_action="cart"))
    told = History(np.array([4, 9, 2]), np.array([10, 20, 30]), np.array([1, 2, 3]), next_timestamp=99, next_action=1)
    with torch.no_grad():
        found = model.last(**collate([told], 10))
        items, mask = torch.tensor([[4, 9, 2, 0]]), torch.ones(1, 4, dtype=torch.bool)
        hidden = torch.tensor([[False, False, False, True]])
        times = torch.tensor([[10, 20, 30, 99]])
        shown = model(items, mask, times, torch.tensor([[1, 2, 3, 1]]), hidden=hidden)[:, -1]
        torch.testing.assert_close(found, shown)
        # What stands at the hidden place is not looked at; an action that is not named is the target action.
        other = model(items + hidden, mask, times, torch.tensor([[1, 2, 3, 1]]), hidden=hidden)[:, -1]
        torch.testing.assert_close(found, other)
        unnamed = model.last(**collate([told._replace(next_action=None)], 10))
        as_target = model(items, mask, times, torch.tensor([[1, 2, 3, 2]]), hidden=hidden)[:, -1]
        torch.testing.assert_close(unnamed, as_target)


@pytest.mark.parametrize("request_time", [False, True])
def test_when_a_hidden_item_was_taken_is_shown_only_if_requests_say_it(request_time):
    model = small_model("bert4rec", events=events(time_features=True, request_time=request_time))
    items, mask = torch.tensor([[4, 9, 2]]), torch.ones(1, 3, dtype=torch.bool)
    hidden = torch.tensor([[False, True, False]])
    times = torch.tensor([[1_600_000_000, 1_600_040_000, 1_600_080_000]])
    with torch.no_grad():
        found = model(items, mask, times, hidden=hidden)
        other = model(items, mask, times + torch.tensor([0, 20_000, 0]), hidden=hidden)
        shown = model(items, mask, times + torch.tensor([20_000, 0, 0]), hidden=hidden)
        # As it is asked for the item after a history.
        told = History(items[0, :2].numpy(), times[0, :2].numpy(), next_timestamp=int(times[0, 2]))
        last = torch.tensor([[False, False, True]])
        trained = model(items, mask, times, hidden=last)[:, -1]
        torch.testing.assert_close(model.last(**collate([told], 10)), trained)
    assert torch.equal(found, other) != request_time
    assert not torch.equal(found, shown)


def test_a_cloze_model_learns_every_place_that_it_is_asked_at():
    model = small_model("bert4rec", max_history=5).train()
    split = random_split()
    windows = TrainingWindows(LoggedHistories(split, model.events), 5, hidden_share=0.3)
    batch = windows.__getitems__([(0, place) for place in range(len(windows))])
    model(**batch, loss=LossArguments().build(windows.target_counts())).backward()
    assert (model.encoder.positions.weight.grad.abs().sum(dim=1) > 0).all()
    assert len(model.encoder.positions.weight) == 6


def test_a_cloze_model_is_asked_for_the_last_items_domain_where_none_is_named():
    model = small_model("bert4rec", events=events(domain_tokens="added"))
    told = History(np.array([4, 9]), domains=np.array([1, 2]))
    with torch.no_grad():
        found = model.last(**collate([told], 10))
        torch.testing.assert_close(found, model.last(**collate([told._replace(next_domain=2)], 10)), rtol=0, atol=0)
        assert not torch.equal(found, model.last(**collate([told._replace(next_domain=1)], 10)))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_edges_have_numbers_forwards_and_backwards(encoder):
    model = small_model(encoder).train()
    nothing = np.zeros(0, dtype=np.int64)
    histories = [History(nothing), History(np.array([3])), History(np.arange(25)), History(np.full(6, 7))]
    batch = collate(histories, 10)
    found = model.last(**batch)
    assert found.isfinite().all()
    found.sum().backward()
    assert all(one.grad is None or one.grad.isfinite().all() for one in model.parameters())
    tied = History(np.array([1, 2, 3]), np.array([5, 5, 5]), next_timestamp=5)
    assert model.last(**collate([tied, History(nothing)], 10)).isfinite().all()
    assert model.last(**collate([History(nothing)] * 2, 10)).isfinite().all()


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_new_user_gets_the_start_vector_and_only_it_learns_from_first_items(similarity):
    model = small_model("sasrec", similarity=similarity, temperature=0.5)
    empty = collate([History(np.zeros(0, dtype=np.int64))], 10)
    start = model.start / (model.start.norm() if similarity == "cosine" else 1) / 0.5
    torch.testing.assert_close(model.last(**empty)[0], start)
    first = torch.tensor([4, 4, 9])
    labels = torch.full((1, 1), IGNORED)
    loss = model(**empty, labels=labels, first_items=first, loss=FullSoftmax())
    assert loss.item() == 0.0
    loss.backward()
    named = {name for name, one in model.named_parameters() if one.grad is not None and one.grad.abs().sum() > 0}
    assert named == {"start"}
    expected = torch.nn.functional.cross_entropy(
        (model.table().detach() @ model.queries(model.start)).expand(3, -1), first, reduction="sum"
    )
    (gradient,) = torch.autograd.grad(expected, model.start)
    torch.testing.assert_close(model.start.grad, gradient)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_loss_is_the_labelled_places_cross_entropy(weighted):
    model = small_model("sasrec", temperature=0.7)
    windows = TrainingWindows(LoggedHistories(random_split(), model.events), 5, stride=2)
    batch = windows.__getitems__([(0, place) for place in range(8)])
    batch.pop("first_items")
    labels = batch.pop("labels")
    weights = torch.rand(labels.shape) if weighted else None
    found = model(**batch, labels=labels, weights=weights, loss=FullSoftmax())
    logits = model(**batch) @ model.table().T
    each = torch.nn.functional.cross_entropy(logits[labels != IGNORED], labels[labels != IGNORED], reduction="none")
    expected = each.sum() if weights is None else (each * weights[labels != IGNORED]).sum()
    torch.testing.assert_close(found, expected)


def test_cosine_scores_are_cosines_over_the_temperature():
    model = small_model("gru4rec", similarity="cosine", temperature=0.05)
    with torch.no_grad():
        logits = model.last(**collate(case_histories(model), 10)) @ model.table().T
    assert logits.abs().max() <= 20 * (1 + 1e-5)
    torch.testing.assert_close(model.table().norm(dim=1), torch.ones(25))


def test_what_cannot_be_is_refused():
    with pytest.raises(BackboneError, match="similarity"):
        small_model("sasrec", similarity="jaccard")
    with pytest.raises(BackboneError, match="temperature of 0"):
        small_model("sasrec", temperature=0.0)
    with pytest.raises(BackboneError, match="hides items"):
        small_model("bert4rec", events=events(action_tokens="before"))
    config = small_model("sasrec").config
    config.max_history = 11
    with pytest.raises(BackboneError, match="11 items need 11 positions"):
        SequenceModel(config)
    assert sequence_config(small_model("sasrec").encoder.config, 5, 10).encoder["model_type"] == "sasrec"

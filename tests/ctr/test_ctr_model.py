import numpy as np
import pytest
import torch
from ctr_factories import ENCODERS, some_events, tiny_ctr

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.ctr.dataset import EventRow, case_tensors, collate
from llmrec.ctr.model import CTRModel, action_of, positions_of, register
from llmrec.ctr.rows import MISSING
from llmrec.ctr.scorers import build_scorer
from llmrec.exceptions import BackboneError

CAUSAL = [name for name in ENCODERS if name != "bert4rec"]
BOTH = [(name, "target") for name in ENCODERS] + [(name, "interleaved") for name in CAUSAL]


def windows_batch(histories, asked):
    """Whole histories, every event of which is asked for if `asked`."""
    return collate(
        [
            EventRow(
                *(one.items, one.actions, one.timestamps),
                np.full((len(one.items), 1), 1 if asked else MISSING),
                np.ones(len(one.items), np.float32),
            )
            for one in histories
        ]
    )


@pytest.mark.parametrize(("encoder", "layout"), BOTH)
def test_a_batch_of_histories_is_each_of_them_alone(encoder, layout):
    model = tiny_ctr(encoder, layout)
    histories = [some_events(count, seed=count) for count in (3, 0, 6, 1)]
    times = [2 * 10**9, 10**9, UNKNOWN_TIME, 10**9 + 5]
    together = model(**case_tensors(histories, [4, 0, 7, 7], times, model.config.asked))
    for place, (history, candidate, time) in enumerate(zip(histories, [4, 0, 7, 7], times, strict=True)):
        alone = model(**case_tensors([history], [candidate], [time], model.config.asked))
        torch.testing.assert_close(together[place], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoder", CAUSAL)
def test_one_pass_predicts_every_event_as_a_candidate_behind_its_history(encoder):
    model = tiny_ctr(encoder, "interleaved")
    histories = [some_events(7, seed=1), some_events(4, seed=2)]
    batch = windows_batch(histories, asked=True)
    given = {name: batch[name] for name in ("items", "mask", "timestamps", "actions")}
    passed = model(**given, places=batch["mask"])
    alone = [
        model(
            **case_tensors(
                [type(one)(*(column[:place] for column in one))],
                [int(one.items[place])],
                [int(one.timestamps[place])],
                model.config.asked,
            )
        )[0]
        for one in histories
        for place in range(len(one.items))
    ]
    torch.testing.assert_close(passed, torch.stack(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("encoder", "layout"), BOTH)
def test_everything_that_is_known_of_a_history_matters(encoder, layout):
    model = tiny_ctr(encoder, layout)
    history, time = some_events(5, seed=3), 2 * 10**9
    base = model(**case_tensors([history], [4], [time], model.config.asked))
    changes = {
        "candidate": ([history], [5]),
        "item": ([history._replace(items=np.append(11 - history.items[:1], history.items[1:]))], [4]),
        "action": ([history._replace(actions=(history.actions + 1) % 3)], [4]),
    }
    for histories, candidates in changes.values():
        changed = model(**case_tensors(histories, candidates, [time], model.config.asked))
        assert (changed - base).abs().max() > 1e-4


@pytest.mark.parametrize("layout", ["target", "interleaved"])
def test_times_matter_to_an_encoder_that_reads_them(layout):
    model, history = tiny_ctr("hstu", layout), some_events(5, seed=3)
    near, far = (
        model(**case_tensors([history], [4], [time], model.config.asked))
        for time in (history.timestamps[-1], 2 * 10**9)
    )
    assert (near - far).abs().max() > 1e-4


def test_gradients_are_finite_with_empty_histories():
    model = tiny_ctr("hstu", "interleaved").train()
    empty = some_events(0)
    model(**case_tensors([empty, empty], [1, 2], [5, UNKNOWN_TIME], model.config.asked)).sum().backward()
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert found
    assert all(torch.isfinite(gradient).all() for gradient in found)


def test_a_candidate_has_no_action_token():
    model, history = tiny_ctr("hstu", "interleaved"), some_events(2)
    batch = case_tensors([history, some_events(0)], [3, 4], [5, 6], model.config.asked)
    represented = model.representation(batch["items"])
    tokens = model.tokens(represented, batch["mask"], batch["timestamps"], batch["actions"])
    assert tokens.mask.int().tolist() == [[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]]
    assert torch.equal(tokens.representations[0, 4], represented[0, 2])
    assert torch.equal(tokens.timestamps[:, ::2], tokens.timestamps[:, 1::2])
    assert torch.equal(tokens.representations[0, 1], model.actions.weight[history.actions[0]])


def test_unknown_items_are_learnt_in_training_alone():
    model = tiny_ctr("sasrec")
    model.config.unknown_rate = 0.999999
    tensors = case_tensors([some_events(3)], [4], [5], model.config.asked)
    unknown = dict(tensors, items=torch.zeros_like(tensors["items"]))
    assert (model(**tensors) - model(**unknown)).abs().max() > 1e-4
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    trained = model(**tensors)
    model.config.unknown_rate = 0.0
    torch.testing.assert_close(trained, model(**unknown))


@pytest.mark.parametrize("scorer", ["dot", "mlp", "ffn"])
@pytest.mark.parametrize("layout", ["target", "interleaved"])
def test_saved_and_loaded_is_the_same(tmp_path, scorer, layout):
    register()
    model = tiny_ctr("hstu", layout, scorer, labels=("click", "buy"))
    tensors = case_tensors([some_events(4, num_actions=5)], [3], [10**9], model.config.asked)
    model.save_pretrained(tmp_path)
    again = CTRModel.from_pretrained(tmp_path)
    assert again.config.labels == ["click", "buy"]
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    torch.testing.assert_close(again(**tensors), model(**tensors), atol=1e-6, rtol=1e-6)


def test_scorers_are_their_definitions():
    torch.manual_seed(0)
    states, items = torch.randn(5, 4), torch.randn(5, 4)
    dot = build_scorer("dot", 4, 2, 0.0)
    torch.testing.assert_close(dot(states, items)[:, 1], (states * items).sum(1) / 2)  # a = 1 / √D
    with torch.no_grad():
        dot.weights.normal_()
        dot.linear.normal_()
        dot.bias.normal_()
    wanted = (states * items) @ dot.weights[0] + states @ dot.linear[0, :4] + items @ dot.linear[0, 4:] + dot.bias[0]
    torch.testing.assert_close(dot(states, items)[:, 0], wanted)
    mlp = build_scorer("mlp", 4, 2, 0.5).eval()
    inner = torch.cat([states, items, states * items], 1) @ mlp.inner.weight.T + mlp.inner.bias
    wanted = (inner * inner.sigmoid()) @ mlp.outer.weight.T + mlp.outer.bias
    torch.testing.assert_close(mlp(states, items), wanted)
    ffn = build_scorer("ffn", 4, 2, 0.5).eval()
    normed = states / (states.pow(2).mean(1, keepdim=True) + 1e-6).sqrt()
    gate, value = (normed @ part.T for part in ffn.inner.weight.chunk(2))
    wanted = (states + (gate * gate.sigmoid() * value) @ ffn.outer.weight.T) @ ffn.logits.weight.T + ffn.logits.bias
    torch.testing.assert_close(ffn(states, items), wanted)
    with pytest.raises(BackboneError, match="no scorer"):
        build_scorer("tree", 4, 1, 0.0)


def test_actions_tell_all_labels_apart():
    table = torch.tensor([[a, b, c] for a in (0, 1) for b in (0, 1) for c in (0, 1)])
    assert sorted(action_of(table).tolist()) == list(range(1, 9))
    assert action_of(torch.tensor([[MISSING, MISSING], [MISSING, 1], [MISSING, 0]])).tolist() == [0, 3, 1]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(BackboneError, match="reads to both sides"):
        tiny_ctr("bert4rec", "interleaved")
    with pytest.raises(BackboneError, match="different names"):
        tiny_ctr(labels=("a", "a"))
    with pytest.raises(BackboneError, match="no layout"):
        tiny_ctr(layout="upside down")
    model = tiny_ctr("hstu", "target")
    batch = windows_batch([some_events(3)], asked=True)
    given = {name: batch[name] for name in ("items", "mask", "timestamps", "actions")}
    with pytest.raises(BackboneError, match="whose action is known"):
        model(**given, places=batch["mask"])
    config = model.config
    config.max_history = config.max_history + 1
    assert positions_of(7, "target") > model.encoder.config.max_position_embeddings
    with pytest.raises(BackboneError, match="positions"):
        CTRModel(config)

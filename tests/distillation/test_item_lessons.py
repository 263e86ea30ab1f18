"""What a sequence model learns beside the labels, against brute force."""

import copy

import numpy as np
import pytest
import torch
from small_teachers import sequence_model, split_of

from llmrec.distillation.asked_windows import AskedWindows
from llmrec.distillation.item_distributions import ItemDistributions
from llmrec.distillation.item_lessons import HiddenItemLesson, TableLesson, TaughtItemLoss, TeacherLesson
from llmrec.distillation.kept_layers import supervision_points
from llmrec.distillation.layer_stack import LayerStack, with_layers
from llmrec.exceptions import BackboneError, DataError
from llmrec.losses.full_softmax import FullSoftmax
from llmrec.sequence.events import EventConfig
from llmrec.sequence.histories import LoggedHistories
from llmrec.sequence.windows import TrainingWindows

N = 40
EVENTS = EventConfig(actions=["buy"], action_tokens="before", target_action="buy")


def windows_of(events=None, kind=TrainingWindows, **options):
    return kind(LoggedHistories(split_of(N), events or EventConfig()), 6, "all", 0, **options)


def taught(model, lesson, batch):
    """The loss as the trainer asks for it."""
    loss = TaughtItemLoss(FullSoftmax(), lesson)
    lesson.prepare(batch)
    with lesson.watching():
        return model(**{name: one for name, one in batch.items() if name != "asked"}, loss=loss), loss


def queries_of(model, batch):
    read = {name: one for name, one in batch.items() if name not in ("labels", "weights", "first_items", "asked")}
    return model(**read)[batch["labels"] != -100]


def hard(queries, table, batch):
    targets = batch["labels"][batch["labels"] != -100]
    return torch.nn.functional.cross_entropy(queries @ table.T, targets, reduction="none")


def kl(theirs, mine, temperature):
    p, q = (theirs / temperature).log_softmax(-1), (mine / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("events", [None, EVENTS], ids=["items", "actions"])
def test_a_larger_models_softmax_teaches_a_smaller_one(events, direction):
    teacher = sequence_model("hstu", items=N, seed=1, events=events)
    student = sequence_model("sasrec", layers=1, width=8, items=N, seed=2, events=events)
    batch = windows_of(events).__getitems__([(0, n) for n in range(9)])
    del batch["first_items"]
    found, loss = taught(student, TeacherLesson(teacher, 0.4, 3.0, direction), batch)
    mine, table = queries_of(student, batch), student.table()
    with torch.no_grad():
        theirs = queries_of(teacher, batch) @ teacher.table().T
    pair = (theirs, mine @ table.T) if direction == "forward" else (mine @ table.T, theirs)
    expected = (0.6 * hard(mine, table, batch) + 0.4 * kl(*pair, 3.0)).sum()
    torch.testing.assert_close(found, expected)
    wanted = [parameter for parameter in student.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found, wanted, allow_unused=True)
    for one, two in zip(gradients, torch.autograd.grad(expected, wanted, allow_unused=True), strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-9)
    assert loss.places == len(mine)
    assert loss.sums["kl"].item() == pytest.approx(kl(*pair, 3.0).sum().item())


def test_a_table_teaches_where_it_has_something_to_say():
    windows = windows_of(kind=AskedWindows)
    batch = windows.__getitems__([(0, n) for n in range(6)])
    del batch["first_items"]
    asked = batch["asked"][batch["labels"] != -100].numpy()
    known = np.unique(asked)[::2]
    rows = np.stack([np.random.default_rng(place).permutation(N)[:3] for place in known.tolist()])
    scores = np.log(np.tile([0.5, 0.2, 0.1], (len(known), 1))).astype(np.float32)
    table = ItemDistributions(known, rows, scores, np.ones(N, dtype=bool))
    student = sequence_model(layers=1, items=N)
    weights = torch.rand(batch["labels"].shape, dtype=torch.float64)
    found, loss = taught(student, TableLesson(table, 0.25, 1.0), batch | {"weights": weights})
    assert (int(loss.sums["taught"]), loss.places) == (int(np.isin(asked, known).sum()), len(asked))
    mine = queries_of(student, batch)
    logits = mine @ student.table().T
    expected = torch.zeros((), dtype=torch.float64)
    counts = weights[batch["labels"] != -100]
    for place, one in enumerate(asked.tolist()):
        lost = hard(mine, student.table(), batch)[place]
        if one in known:
            p = torch.full((N,), 0.2 / (N - 3), dtype=torch.float64)
            p[rows[known.tolist().index(one)]] = torch.tensor([0.5, 0.2, 0.1], dtype=torch.float64)
            soft = (p * (p.log() - logits[place].log_softmax(-1))).sum()
            lost = 0.75 * lost + 0.25 * soft
        expected = expected + counts[place] * lost
    assert 0 < len(known) < len(asked)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # probabilities are kept in float32


def test_windows_say_which_interaction_each_label_is():
    windows = windows_of(kind=AskedWindows)
    rows = windows.histories.split.rows
    batch = windows.__getitems__([(0, n) for n in range(len(windows))] + [(0, -3)])
    there = batch["labels"] != -100
    np.testing.assert_array_equal(rows[batch["asked"][there].numpy()], batch["labels"][there].numpy())
    plain = windows_of().__getitems__([(0, n) for n in range(len(windows))] + [(0, -3)])
    assert all(torch.equal(batch[name], plain[name]) for name in plain)
    with pytest.raises(DataError, match="stochastic length"):
        windows_of(kind=AskedWindows, alpha=1.5)


@pytest.mark.parametrize("encoder", ["sasrec", "hstu", "llama", "gpt2"])
@pytest.mark.parametrize("events", [None, EVENTS], ids=["items", "actions"])
def test_hidden_states_and_signals_are_their_definition(encoder, events):
    flags = {"residual": "llama"} if encoder == "hstu" else {}
    teacher = sequence_model(encoder, items=N, seed=1, events=events, **flags)
    student = with_layers(teacher, [0, 3])
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = windows_of(events).__getitems__([(0, n) for n in range(7)])
    del batch["first_items"]
    lesson = HiddenItemLesson(teacher, student, supervision_points(4, 2, 2), 0.7, 0.2, 0.4)
    found, _ = taught(student, lesson, batch)
    mine, table = queries_of(student, batch), student.table()
    # A model of the first layers alone gives the queries that these layers and the last norm make.
    with LayerStack(student).only([0]):
        early = hard(queries_of(student, batch), table, batch).sum()
    total = hard(mine, table, batch).sum() + 0.4 * early
    cosine = norm = 0
    for theirs, own in ((2, 1), (4, 2)):
        h, t = before_norm(student, batch, own), before_norm(teacher, batch, theirs).detach()
        cosine = cosine + (1 - torch.nn.functional.cosine_similarity(h, t)).sum() / 2
        norm = norm + (h - t).square().mean(-1).sum() / 2
    torch.testing.assert_close(found, total + 0.7 * cosine + 0.2 * norm, rtol=1e-6, atol=1e-6)


def before_norm(model, batch, count):
    """The states behind so many layers at the labels, seen at the norm's door."""
    stack = LayerStack(model)
    owner, caught = stack.owner, []
    norm = getattr(owner, "ln_f", getattr(owner, "norm", None))
    hook = norm.register_forward_pre_hook(lambda module, inputs: caught.append(inputs[0]))
    layout = []
    other = model.layout.register_forward_hook(lambda module, inputs, output: layout.append(output))
    with stack.only(list(range(count))):
        queries_of(model, batch)
    hook.remove()
    other.remove()
    states, tokens = caught[0], layout[0]
    if states.dim() == 2:
        whole = states.new_zeros(*tokens.mask.shape, states.shape[-1])
        whole[tokens.mask.bool()] = states
        states = whole
    if tokens.reads is not None:
        states = states.gather(1, tokens.reads[..., None].expand(-1, -1, states.shape[-1]))
    return states[batch["labels"] != -100]


@pytest.mark.parametrize("encoder", ["sasrec", "hstu", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(encoder, dtype):
    teacher = sequence_model(encoder, items=N, dtype=dtype)
    student = copy.deepcopy(teacher)
    batch = windows_of().__getitems__([(0, n) for n in range(8)])
    del batch["first_items"]
    found, _ = taught(student, TeacherLesson(teacher, 1.0, 2.0), batch)
    assert found.item() == 0.0
    found.backward()
    assert all(float(one.grad.abs().sum()) == 0.0 for one in student.parameters() if one.grad is not None)
    lesson = HiddenItemLesson(teacher, student, supervision_points(4, 4, 4), 1.0, 1.0, 0.0)
    found, loss = taught(student, lesson, batch)
    assert {name: float(one) for name, one in loss.sums.items()} == {"cosine": 0.0, "norm": 0.0}
    assert torch.equal(found, student(**batch, loss=FullSoftmax()))


def test_other_widths_are_refused():
    with pytest.raises(BackboneError, match="a width of 16 and the student's of 8"):
        HiddenItemLesson(sequence_model(), sequence_model(width=8), [(4, 4)], 1.0, 1.0, 1.0)

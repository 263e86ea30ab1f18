"""What a language model learns beside the labels, against brute force; a copy of the teacher learns nothing."""

import copy

import numpy as np
import pytest
import torch
from small_teachers import FAMILIES, language_model, token_rows

from llmrec.distillation.head_states import HeadStates, predicting_places
from llmrec.distillation.kept_layers import supervision_points
from llmrec.distillation.layer_stack import with_layers
from llmrec.distillation.lessons import HiddenLesson, LogitsLesson, TaughtHeadLoss
from llmrec.exceptions import BackboneError, DataError
from llmrec.training.batches import folded, padded
from llmrec.training.head import HeadLoss

RANGE = np.arange(40, 61)


def batch_of(rows, layout=padded):
    made = layout(rows)
    labels = made.pop("labels")
    del made["tasks"]
    return made, labels


def places_of(model, batch, labels):
    """(M, V) logits that predict each label, and the labels."""
    logits = model(**batch, use_cache=False).logits
    return logits[:, :-1][labels[:, 1:] != -100], labels[:, 1:][labels[:, 1:] != -100]


def cross_entropy(logits, targets):
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def kl(theirs, mine, temperature):
    p, q = (theirs / temperature).log_softmax(-1), (mine / temperature).log_softmax(-1)
    return temperature**2 * (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("layout", [padded, folded])
@pytest.mark.parametrize("families", [("llama", "llama"), ("gpt2", "qwen3")], ids=["one", "two"])
def test_soft_targets_over_a_range_are_their_definition(families, layout):
    teacher = language_model(families[0], width=32, seed=1)
    student = language_model(families[1], layers=2, width=16, seed=2).train()
    batch, labels = batch_of(token_rows(3, 9), layout)
    lesson = LogitsLesson(HeadStates(teacher), RANGE, RANGE, alpha=0.3, temperature=2.0)
    loss = TaughtHeadLoss(student, None, lesson)
    found = loss(student, batch, labels)
    mine, targets = places_of(student, batch, labels)
    with torch.no_grad():
        theirs, _ = places_of(teacher, batch, labels)
    hard = cross_entropy(mine, targets)
    inside = targets >= 40
    soft = kl(theirs[:, RANGE], mine[:, RANGE], 2.0)
    expected = ((1 - 0.3) * hard + 0.3 * soft)[inside].sum() + hard[~inside].sum()
    assert inside.any()
    assert not inside.all()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(found.each, hard.detach())
    gradients = torch.autograd.grad(found.total, list(student.parameters()))
    for one, two in zip(gradients, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)
    assert loss.means()["kl"] == (pytest.approx(soft[inside].sum().item()), len(targets))
    assert loss.means() == {}


def test_soft_targets_over_the_whole_vocabulary_and_a_narrower_hard_loss():
    teacher, student = language_model(seed=1), language_model("gpt2", layers=1, seed=2).train()
    rows = token_rows(4, 6, least=40)
    batch, labels = batch_of(rows)
    lesson = LogitsLesson(HeadStates(teacher), None, None, alpha=1.0, direction="reverse")
    found = TaughtHeadLoss(student, RANGE.tolist(), lesson)(student, batch, labels)
    mine, targets = places_of(student, batch, labels)
    with torch.no_grad():
        theirs, _ = places_of(teacher, batch, labels)
    torch.testing.assert_close(found.total, kl(mine, theirs, 1.0).sum())
    torch.testing.assert_close(found.each, cross_entropy(mine[:, RANGE], targets - 40).detach())


def test_other_numbers_of_the_same_codes_teach_the_same():
    teacher, student = language_model(seed=1), language_model("gpt2", layers=2, seed=2, words=61).train()
    rows = token_rows(5, 7, least=40)
    plain = LogitsLesson(HeadStates(teacher), RANGE, RANGE, alpha=0.5)
    batch, labels = batch_of(rows)
    expected = TaughtHeadLoss(student, None, plain)(student, batch, labels).total
    # The teacher's vocabulary in another order: its rows, its embeddings, its labels.
    order = torch.randperm(61)
    moved = copy.deepcopy(teacher)
    moved.get_input_embeddings().weight.data[order] = teacher.get_input_embeddings().weight.data
    number = order.numpy()
    paired = LogitsLesson(HeadStates(moved), number[RANGE], RANGE, alpha=0.5)
    theirs = {"teacher_input_ids": order[batch["input_ids"]], "teacher_labels": labels.clone()}
    theirs["teacher_labels"][labels != -100] = order[labels[labels != -100]]
    found = TaughtHeadLoss(student, None, paired)(student, batch | theirs, labels).total
    torch.testing.assert_close(found, expected)
    wrong = theirs | {"teacher_labels": theirs["teacher_labels"].flip(0)}
    with pytest.raises(DataError, match="or others"):
        TaughtHeadLoss(student, None, paired)(student, batch | wrong, labels)


def blocks_of(model, batch, labels, counts):
    """The states behind some numbers of layers at the predicting places, by hooks of the test's own."""
    caught = {}
    layers = getattr(model, "model", getattr(model, "transformer", None))
    layers = getattr(layers, "layers", getattr(layers, "h", None))

    def keep(number):
        def hook(module, inputs, output):
            caught[number] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [layer.register_forward_hook(keep(number + 1)) for number, layer in enumerate(layers)]
    model(**batch, use_cache=False)
    for hook in hooks:
        hook.remove()
    return [caught[count][:, :-1][labels[:, 1:] != -100] for count in counts]


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_and_signals_are_their_definition(family):
    teacher = language_model(family, layers=4, seed=1)
    student = with_layers(teacher, [0, 3]).train()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    batch, labels = batch_of(token_rows(6, 8))
    points = supervision_points(4, 2, 2)
    loss = TaughtHeadLoss(student, None, HiddenLesson(teacher, student, points, 0.7, 0.2, 0.4))
    found = loss(student, batch, labels)
    mine = blocks_of(student, batch, labels, [1, 2])
    with torch.no_grad():
        theirs = blocks_of(teacher, batch, labels, [2, 4])
    logits, targets = places_of(student, batch, labels)
    cosine = sum((1 - torch.nn.functional.cosine_similarity(h, t)).sum() for h, t in zip(mine, theirs, strict=True))
    norm = sum((h - t).square().mean(-1).sum() for h, t in zip(mine, theirs, strict=True))
    last = student.transformer.ln_f if family == "gpt2" else student.model.norm
    early = cross_entropy(last(mine[0]) @ student.get_output_embeddings().weight.T, targets).sum()
    expected = cross_entropy(logits, targets).sum() + 0.7 * cosine / 2 + 0.2 * norm / 2 + 0.4 * early
    torch.testing.assert_close(found.total, expected)
    gradients = torch.autograd.grad(found.total, list(student.parameters()))
    for one, two in zip(gradients, torch.autograd.grad(expected, list(student.parameters())), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)  # RMSNorms compute in float32
    assert {name: total for name, (total, _) in loss.means().items()} == pytest.approx(
        {"cosine": cosine.item() / 2, "norm": norm.item() / 2, "multi_signal": early.item()}
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["logits", "slmrec"])
def test_a_copy_of_the_teacher_has_nothing_to_learn_from_it(family, kind, dtype):
    teacher = language_model(family, dtype=dtype)
    student = copy.deepcopy(teacher).train()
    batch, labels = batch_of(token_rows(7, 8), folded)
    if kind == "logits":
        lesson = LogitsLesson(HeadStates(teacher), RANGE, RANGE, alpha=1.0, temperature=3.0)
        name = "kl"
    else:
        lesson = HiddenLesson(teacher, student, supervision_points(4, 4, 4), 1.0, 1.0, 0.0)
        name = "cosine"
    loss = TaughtHeadLoss(student, None, lesson)
    found = loss(student, batch, labels)
    assert loss.means()[name][0] == 0.0
    if kind == "logits":
        labels_inside = labels.masked_fill(labels < 40, -100)
        loss(student, batch, labels_inside).total.backward()
        assert all(torch.equal(one.grad, torch.zeros_like(one)) for one in student.parameters())
        return
    # What the lesson adds to the labels' gradient is exactly nothing.
    plain = HeadLoss(student)(student, batch, labels)
    assert torch.equal(found.total, plain.total)
    own = torch.autograd.grad(found.total, list(student.parameters()))
    alone = torch.autograd.grad(plain.total, list(student.parameters()))
    assert all(torch.equal(one, two) for one, two in zip(own, alone, strict=True))


def test_an_evaluation_is_cross_entropy_alone():
    teacher, student = language_model(seed=1), language_model(layers=2, seed=2).eval()
    batch, labels = batch_of(token_rows(8, 5))
    loss = TaughtHeadLoss(student, None, LogitsLesson(HeadStates(teacher), RANGE, RANGE))
    found = loss(student, batch, labels)
    assert torch.equal(found.total, HeadLoss(student)(student, batch, labels).total)
    assert loss.means() == {}


def test_the_teacher_is_not_trained_and_reads_without_dropout():
    teacher = language_model("gpt2", seed=1, resid_pdrop=0.5).train()
    states = HeadStates(teacher)
    batch, labels = batch_of(token_rows(9, 4))
    assert torch.equal(states.read(batch, labels).states, states.read(batch, labels).states)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_predicting_places_are_those_before_the_labels(seed):
    generator = np.random.default_rng(seed)
    labels = torch.from_numpy(np.where(generator.random((4, 7)) < 0.4, generator.integers(0, 9, (4, 7)), -100))
    expected = [row * 7 + place - 1 for row in range(4) for place in range(1, 7) if int(labels[row, place]) != -100]
    assert predicting_places(labels).tolist() == expected


def test_a_batch_without_labels_has_gradients_of_zero():
    teacher, student = language_model(seed=1), language_model(layers=2, seed=2).train()
    batch, labels = batch_of(token_rows(10, 3))
    for lesson in (
        LogitsLesson(HeadStates(teacher), RANGE, RANGE),
        HiddenLesson(teacher, student, [(2, 1), (4, 2)], 1.0, 1.0, 1.0),
    ):
        found = TaughtHeadLoss(student, None, lesson)(student, batch, torch.full_like(labels, -100))
        found.total.backward()
        assert float(found.total) == 0.0
        assert all(float(one.grad.abs().sum()) == 0 for one in student.parameters() if one.grad is not None)


def test_widths_and_vocabularies_that_do_not_fit_are_refused():
    teacher, narrow = language_model(), language_model(width=16)
    with pytest.raises(BackboneError, match="a width of 32 and the student's of 16"):
        HiddenLesson(teacher, narrow, [(4, 4)], 1.0, 1.0, 1.0)
    fewer = language_model(words=50).train()
    batch, labels = batch_of(token_rows(1, 3, words=50))
    with pytest.raises(DataError, match="61 tokens and the student's 50"):
        TaughtHeadLoss(fewer, None, LogitsLesson(HeadStates(teacher), None, None))(fewer, batch, labels)

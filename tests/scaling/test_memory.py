from dataclasses import replace

import pytest
import torch
from training_steps import SHAPES, kept, model_of, step_of

from llmrec.scaling.memory import activation_bytes, distinct_items
from llmrec.scaling.shape import Shape

# Of bytes: what is left out are indices and the like, which weigh little beside the vectors of a model of any use.
TOLERANCE = 0.02


def expected(shape, windows, hidden=3):
    """As `activation_bytes`, but for the places that the test's cloze model hides."""
    found = activation_bytes(shape, windows)
    if shape.encoder == "bert4rec":
        found += 4 * shape.width * windows * (hidden - shape.labels)
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_autograd_keeps_as_much(name):
    shape = SHAPES[name]
    model = model_of(shape)
    found = kept(step_of(shape, model, 8), model.parameters())
    assert expected(shape, 8) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("encoder", ["hstu", "sasrec", "bert4rec", "gru4rec", "llama", "gpt2"])
def test_a_layer_keeps_as_much(encoder):
    """The growth with depth, in which what stands before and behind the layers has no part."""
    found, said = [], []
    for depth in (2, 5):
        shape = Shape(encoder, depth, 32, 50, 24)
        model = model_of(shape)
        found.append(kept(step_of(shape, model, 4), model.parameters()))
        said.append(expected(shape, 4))
    assert said[1] - said[0] == pytest.approx(found[1] - found[0], rel=0.005)


@pytest.mark.parametrize(
    ("loss", "negatives", "shared"),
    [("sampled_softmax", 16, False), ("bce", 16, False), ("sampled_softmax", 64, True)],
)
def test_sampled_losses_keep_as_much(loss, negatives, shared):
    shape = Shape("sasrec", 1, 24, 300, 20, negatives=negatives, shared_negatives=shared, loss=loss)
    model = model_of(shape)
    found = kept(step_of(shape, model, 8), model.parameters())
    assert activation_bytes(shape, 8) == pytest.approx(found, rel=TOLERANCE)


def test_a_batch_keeps_the_table_s_gradient_once():
    shape = Shape("hstu", 2, 32, 700, 20)
    one, two, three = (activation_bytes(shape, windows) for windows in (1, 2, 3))
    assert three - two == pytest.approx(two - one)
    assert one - (two - one) == pytest.approx(4 * 700 * 32)


def test_masks_are_bytes_on_a_gpu():
    cpu = Shape("hstu", 2, 32, 700, 20)
    # Of each of three dropouts of D: three bytes less a number.
    assert activation_bytes(cpu, 1) - activation_bytes(replace(cpu, device="gpu"), 1) == 3 * 20 * 3 * 32


def test_distinct_items():
    assert distinct_items(10, 1) == pytest.approx(1)
    assert distinct_items(10, 1e6) == pytest.approx(10)
    drawn = torch.randint(50, (4000, 30), generator=torch.Generator().manual_seed(0))
    mean = sum(len(row.unique()) for row in drawn) / 4000
    assert distinct_items(50, 30) == pytest.approx(mean, rel=0.01)

import pytest
import torch
from tiny_models import FAMILIES, random_rows, reference_losses, tiny

from llmrec.exceptions import BackboneError, DataError
from llmrec.training.batches import Collator, check_restarts, choose_layout, folded, packed, padded
from llmrec.training.head import HeadLoss

LAYOUTS = {"padded": padded, "folded": folded, "packed": packed}


def loss_of(model, batch):
    given = {name: batch[name] for name in ("input_ids", "position_ids") if name in batch}
    return HeadLoss(model)(model, given, batch["labels"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_layout_gives_the_losses_and_gradients_of_rows_by_themselves(family, attention):
    model = tiny(family, attention)
    rows = random_rows(4, 11)
    expected = reference_losses(model, rows)
    torch.cat(expected).sum().backward()
    wanted = {name: parameter.grad for name, parameter in model.named_parameters()}
    for layout, make in LAYOUTS.items():
        model.zero_grad(set_to_none=True)
        batch = make(rows)
        found = loss_of(model, batch)
        found.total.backward()
        # Norms and rotations are computed in float32 in some families.
        torch.testing.assert_close(found.total, torch.cat(expected).sum(), rtol=1e-6, atol=1e-6, msg=layout)
        torch.testing.assert_close(
            found.each.sort().values, torch.cat(expected).detach().sort().values, rtol=1e-5, atol=1e-6, msg=layout
        )
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name], rtol=1e-4, atol=1e-5, msg=f"{layout} {name}")
    assert folded(rows)["input_ids"].shape[0] < len(rows)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_does_not_see_the_row_before_it(family, attention):
    model = tiny(family, attention)
    check_restarts(model)
    row = {"input_ids": [7, 8, 9, 10], "labels": [-100] * 4}

    def logits(first):
        batch = packed([{"input_ids": first, "labels": first}, row])
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0, -4:]

    torch.testing.assert_close(logits([1, 2, 3]), logits([30, 31, 32]), rtol=0, atol=1e-12)
    torch.testing.assert_close(logits([5]), logits([30, 31, 32]), rtol=1e-5, atol=1e-5)


class Leaky(torch.nn.Module):
    """A model that is not told of positions: rows of a line run into one another."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, position_ids=None, **given):
        return self.model(**given)


class Displaced(torch.nn.Module):
    """A model whose attention restarts but whose positions count on."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids, position_ids=None, use_cache=False):
        length = input_ids.shape[1]
        rows = (position_ids == 0).cumsum(1)
        seen = (rows[:, :, None] == rows[:, None, :]) & torch.ones(length, length).tril().bool()
        mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)[:, None]
        return self.model(
            input_ids=input_ids, attention_mask=mask, position_ids=torch.arange(length)[None], use_cache=False
        )


def test_models_that_do_not_restart_are_refused():
    with pytest.raises(BackboneError, match="Leaky lets a row look"):
        check_restarts(Leaky(tiny("llama")))
    with pytest.raises(BackboneError, match="Displaced"):
        check_restarts(Displaced(tiny("gpt2")))
    with pytest.raises(BackboneError, match="Bloom"):
        check_restarts(tiny("bloom", "eager", n_layer=2, n_head=2))


def test_the_check_leaves_the_models_mode():
    model = tiny("gpt2").train()
    check_restarts(model)
    assert model.training


def test_the_first_label_of_every_row_is_taken_away():
    rows = [{"input_ids": [5, 6], "labels": [5, 6]}, {"input_ids": [7], "labels": [7]}]
    assert padded(rows)["labels"].tolist() == [[-100, 6], [-100, -100]]
    assert packed(rows)["labels"].tolist() == [[-100, 6, -100]]
    assert packed(rows)["position_ids"].tolist() == [[0, 1, 0]]
    assert rows[0]["labels"] == [5, 6]


def test_rows_that_fill_their_lines_are_padded():
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}, {"input_ids": [4, 5], "labels": [4, 5]}]
    assert "position_ids" not in folded(rows)
    batch = folded([*rows, {"input_ids": [6], "labels": [6]}], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert batch["position_ids"].tolist() == [[0, 1, 2], [0, 1, 0]]
    batch = folded([{"input_ids": [1] * 5, "labels": [1] * 5}, *rows[1:], *rows[1:], *rows[1:]], pad_token_id=9)
    assert batch["input_ids"].tolist() == [[1] * 5, [4, 5, 4, 5, 9], [4, 5, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 1, 1, 1, 1], [-100, 5, -100, 5, -100], [-100, 5, -100, -100, -100]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 4], [0, 1, 0, 1, 0], [0, 1, 0, 0, 0]]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tasks_are_beside_their_tokens(layout):
    rows = random_rows(6, 20, tasks=("a", "b", "c"))
    rows.append({"input_ids": [3, 3], "labels": [3, 3]})
    batch = Collator(layout, ("a", "b", "c"))([*rows[:5], {"rows": rows[5:]}])
    kept = batch["labels"] != -100
    found = sorted(zip(batch["labels"][kept].tolist(), batch["tasks"][kept].tolist(), strict=True))
    expected = [
        (label, "abc".index(row["task"]) if "task" in row else -1)
        for row in rows
        for label in row["labels"][1:]
        if label != -100
    ]
    assert found == sorted(expected)


def test_bad_rows_are_refused():
    for make in LAYOUTS.values():
        with pytest.raises(DataError, match="0 tokens"):
            make([{"input_ids": [], "labels": []}, {"input_ids": [1], "labels": [1]}])
        with pytest.raises(DataError, match="2 tokens and 1 labels"):
            make([{"input_ids": [1, 2], "labels": [1]}])
        with pytest.raises(DataError, match="task 'search'"):
            make([{"input_ids": [1], "labels": [1], "task": "search"}], ("next_item",))


def test_the_layout_is_chosen_with_a_reason():
    for attention in ("sdpa", "eager", "flex_attention"):
        layout, reason = choose_layout("auto", attention)
        assert layout == "folded"
        assert attention in reason
    for attention in ("flash_attention_2", "kernels-community/flash-attn"):
        assert choose_layout("auto", attention)[0] == "packed"
    assert choose_layout("padded", "flash_attention_2")[0] == "padded"
    with pytest.raises(BackboneError, match="'tight'"):
        choose_layout("tight", "sdpa")

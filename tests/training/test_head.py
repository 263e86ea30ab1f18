import pytest
import torch
from tiny_models import random_rows, reference_losses, tiny
from transformers import AutoConfig, AutoModelForCausalLM

from llmrec.exceptions import BackboneError, DataError
from llmrec.training.batches import padded
from llmrec.training.head import HeadLoss

WORDS = 61
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}


def scaled(family, **sizes):
    torch.manual_seed(0)
    ids = {"vocab_size": WORDS, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES, **ids, **sizes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


MODELS = {
    "tied": lambda: tiny("llama", tied=True),
    "untied": lambda: tiny("llama", tied=False),
    "gpt2": lambda: tiny("gpt2"),
    "bias of the head": lambda: scaled("phi"),
    "logits capped": lambda: scaled("gemma2", num_key_value_heads=1, head_dim=16, final_logit_softcapping=2.0),
    "logits scaled": lambda: scaled("cohere", num_key_value_heads=1, logit_scale=0.3),
    "logits divided": lambda: scaled("granite", num_key_value_heads=1, logits_scaling=3.0),
}


def check(model, wrapped=None, ids=None, rows=None, plain=True):
    """Values and gradients against the logits of each row by itself."""
    rows = rows or random_rows(0, 9)
    batch = padded(rows)
    loss = HeadLoss(model, ids, piece=1)
    found = loss(wrapped or model, {"input_ids": batch["input_ids"]}, batch["labels"])
    found.total.backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad(set_to_none=True)
    expected = torch.cat(reference_losses(model, rows)) if ids is None else torch.cat(restricted(model, rows, ids))
    # The families compute their norms and rotations in float32.
    torch.testing.assert_close(found.each, expected.detach(), rtol=1e-6, atol=1e-7)
    assert batch["labels"].reshape(-1)[found.places].tolist() == [
        label for row in rows for label in row["labels"][1:] if label != -100
    ]
    expected.sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is not None:
            torch.testing.assert_close(got[name], parameter.grad, rtol=1e-5, atol=1e-6)
    # Nothing stays behind in the model.
    head = model.get_output_embeddings()
    assert "forward" not in head.__dict__
    assert (loss._shape is not None) == plain


def restricted(model, rows, ids):
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        narrow = torch.full_like(logits, -torch.inf)
        narrow[:, ids] = logits[:, ids]
        chosen = torch.tensor(row["labels"])[1:]
        kept = chosen != -100
        found.append(-torch.log_softmax(narrow[kept], 1).gather(1, chosen[kept, None])[:, 0])
    return found


@pytest.mark.parametrize("name", MODELS)
def test_all_words(name):
    check(MODELS[name]())


@pytest.mark.parametrize("name", MODELS)
def test_semantic_ids_only(name):
    check(MODELS[name](), ids=list(range(40, 61)), rows=random_rows(1, 9, least=40))


def adapted(tied, **options):
    from peft import LoraConfig, get_peft_model

    model = tiny("llama", tied=tied)
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", init_lora_weights=False, **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for _name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return model


@pytest.mark.parametrize("ids", [None, [3, 17, *range(40, 61)]])
@pytest.mark.parametrize("tied", [True, False])
def test_rows_trained_beside_lora(tied, ids):
    tables = ["embed_tokens"] if tied else ["embed_tokens", "lm_head"]
    new = [9, 57, 40]  # of which one is no semantic ID
    model = adapted(tied, target_modules="all-linear", trainable_token_indices=dict.fromkeys(tables, new)).double()
    rows = random_rows(2, 9, least=40)
    check(model, ids=ids, rows=rows)


@pytest.mark.parametrize("ids", [None, list(range(40, 61))])
def test_a_head_with_lora_is_left_to_the_model(ids):
    model = adapted(False, target_modules=["q_proj", "lm_head"]).double()
    check(model, ids=ids, rows=random_rows(3, 9, least=40))


def test_logits_of_another_kind_are_left_to_the_model():
    model = tiny("llama")
    forward = model.forward

    def bent(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits - 0.01 * output.logits**2
        return output

    model.forward = bent
    check(model, plain=False)


def test_finding_the_shape_draws_no_random_numbers_and_leaves_the_mode():
    model = tiny("gpt2", embd_pdrop=0.5).train()
    loss, batch = HeadLoss(model), padded(random_rows(0, 3))
    torch.manual_seed(5)
    first = loss(model, {"input_ids": batch["input_ids"]}, batch["labels"]).total
    torch.manual_seed(5)
    assert torch.equal(first, loss(model, {"input_ids": batch["input_ids"]}, batch["labels"]).total)
    assert all(module.training for module in model.modules())


def test_hooks_behind_the_head_are_part_of_the_backward_pass():
    """DeepSpeed's ZeRO-3 gathers the head's weight in one; around it the loss would find no weight."""
    model, rows = tiny("llama"), random_rows(0, 3)
    batch, called = padded(rows), []

    class Gather(torch.autograd.Function):
        @staticmethod
        def forward(ctx, answer):
            return answer.view_as(answer)

        @staticmethod
        def backward(ctx, slope):
            called.append(tuple(slope.shape))
            return slope

    model.lm_head.register_forward_hook(lambda module, inputs, answer: Gather.apply(answer))
    found = HeadLoss(model)(model, {"input_ids": batch["input_ids"]}, batch["labels"])
    found.total.backward()
    assert called == [(1, 1, 1)]
    torch.testing.assert_close(found.total.detach(), found.each.sum())
    assert len(model.lm_head._forward_hooks) == 1


def test_a_weight_that_is_not_here_yet_has_the_size_that_deepspeed_tells():
    model = tiny("llama")
    weight = model.get_input_embeddings().weight
    weight.ds_shape = weight.shape
    weight.data = weight.data[:0]
    HeadLoss(model, [weight.ds_shape[0] - 1])
    with pytest.raises(BackboneError, match="tokens of the loss"):
        HeadLoss(model, [weight.ds_shape[0]])


def test_a_failing_forward_pass_leaves_the_head_as_it_was():
    model = tiny("llama")
    with pytest.raises(IndexError):
        HeadLoss(model)(model, {"input_ids": torch.tensor([[99, 99]])}, torch.tensor([[-100, 5]]))
    assert "forward" not in model.lm_head.__dict__


def test_refusals():
    model = tiny("llama")
    for ids in ([], [61], [-1, 3]):
        with pytest.raises(BackboneError, match="tokens of the loss"):
            HeadLoss(model, ids)
    with pytest.raises(BackboneError, match="no output head"):
        HeadLoss(model.model)
    batch = padded([{"input_ids": [50, 50, 7], "labels": [-100, 50, 7]}])
    with pytest.raises(DataError, match="token 7 is a label"):
        HeadLoss(model, [50])(model, {"input_ids": batch["input_ids"]}, batch["labels"])

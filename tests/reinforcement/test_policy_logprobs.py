import pytest
import torch
from tiny_rollouts import cases_of, policy, title_policy

from llmrec.decoding import pad_left
from llmrec.reinforcement.item_logprobs import ItemLogProbs
from llmrec.reinforcement.policy import shared_logprobs, token_logprobs
from llmrec.reinforcement.rollouts import TransformersRollouts

MAKERS = {
    "llama": policy,
    "gpt2": lambda **options: policy(model_type="gpt2", **options),
    "llama-semantic_ids": lambda **options: policy("semantic_ids", **options),
    "gpt2-semantic_ids": lambda **options: policy("semantic_ids", model_type="gpt2", **options),
    "titles": lambda: title_policy(),
}


def batch_of(prompts, proposed, pad=0):
    """Prompts filled on the left with `pad`, proposed tokens filled on the right, and the mask."""
    tokens, mask, _ = pad_left(prompts, torch.device("cpu"))
    longest = max(map(len, proposed))
    behind = torch.tensor([one + [pad] * (longest - len(one)) for one in proposed])
    there = torch.tensor([[1] * len(one) + [0] * (longest - len(one)) for one in proposed])
    tokens[mask == 0] = pad
    return torch.cat([tokens, behind], 1), torch.cat([mask, there], 1), longest


def by_definition(model, prompt, own, vocabulary):
    """Log-probabilities and entropies of one line, run alone, without filling."""
    logits = model(torch.tensor([[*prompt, *own]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    legal = torch.arange(logits.shape[-1]) if vocabulary is None else torch.from_numpy(vocabulary)
    outside = torch.ones(logits.shape[-1], dtype=torch.bool)
    outside[legal] = False
    probability = logits.masked_fill(outside, -torch.inf).softmax(-1)
    each = probability[:, legal]
    return probability[torch.arange(len(own)), own].log(), -(each * each.log()).sum(-1)


@pytest.mark.parametrize("name", MAKERS)
def test_log_probabilities_and_entropies_are_those_of_each_line_alone(name):
    recommender = MAKERS[name]()
    model, catalog = recommender.model.double(), recommender.catalog
    cases = cases_of(recommender, 5, longest=6)
    assert len({len(prompt) for prompt in cases.prompts}) > 1
    proposed = [catalog.tokens_of(row) for row in (3, 11, 0, 7, 20)]
    vocabulary = catalog.softmax_tokens(recommender.settings.softmax)
    tokens, mask, longest = batch_of(cases.prompts, proposed, pad=2)
    chosen = None if vocabulary is None else torch.from_numpy(vocabulary)
    found, entropies, _ = token_logprobs(model, tokens, mask, longest, chosen)
    assert found.dtype == torch.float64
    assert not entropies.requires_grad
    total = 0.0
    for row, (prompt, own) in enumerate(zip(cases.prompts, proposed, strict=True)):
        expected, entropy = by_definition(model, prompt, own, vocabulary)
        torch.testing.assert_close(found[row, : len(own)], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(entropies[row, : len(own)], entropy.detach(), rtol=0, atol=1e-9)
        assert not found[row, len(own) :].any()
        assert not entropies[row, len(own) :].any()
        total = total + ((row + 1) * expected).sum()
    parameters = list(model.parameters())
    weighted = (torch.arange(1, 6)[:, None] * found).sum()
    wanted = torch.autograd.grad(total, parameters, allow_unused=True)
    got = torch.autograd.grad(weighted, parameters, allow_unused=True)
    for one, other in zip(got, wanted, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", MAKERS)
def test_a_prompt_that_is_run_once_for_all_of_its_lines_changes_nothing(name):
    recommender = MAKERS[name]()
    model, catalog = recommender.model.double(), recommender.catalog
    cases = cases_of(recommender, 3, longest=6)
    softmax = recommender.settings.softmax
    # Lines of a prompt lie apart, one has more of them than another, and one item comes twice.
    owners, rows = [2, 0, 2, 1, 0, 2, 2], [3, 11, 0, 7, 20, 5, 3]
    proposed = [catalog.tokens_of(row) for row in rows]
    tokens, mask, longest = batch_of([cases.prompts[one] for one in owners], proposed, pad=2)
    vocabulary = catalog.softmax_tokens(softmax)
    chosen = None if vocabulary is None else torch.from_numpy(vocabulary)
    items = ItemLogProbs(model, catalog, softmax)
    assert items.layout == "branches"
    found, entropies = shared_logprobs(items, model, tokens, mask, longest, chosen, entropy_gradient=True)
    wanted, wanted_entropies, _ = token_logprobs(model, tokens, mask, longest, chosen, entropy_gradient=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(entropies, wanted_entropies, rtol=0, atol=1e-9)
    for one, other in ((found, wanted), (entropies, wanted_entropies)):
        weights = torch.arange(one.numel(), dtype=torch.float64).view_as(one)
        parameters = list(model.parameters())
        gradients = [
            torch.autograd.grad((weights * given).sum(), parameters, retain_graph=True, allow_unused=True)
            for given in (one, other)
        ]
        for mine, theirs in zip(*gradients, strict=True):
            assert (mine is None) == (theirs is None)
            if mine is not None:
                # Llama's norms compute in float32, whose gradients are rounded.
                torch.testing.assert_close(mine, theirs, rtol=0, atol=max(1e-9, 1e-4 * float(theirs.abs().max())))
    assert not shared_logprobs(items, model, tokens, mask, longest, chosen)[1].requires_grad


def test_each_prompt_is_run_once(monkeypatch):
    recommender = policy()
    cases = cases_of(recommender, 3, longest=6)
    proposed = [recommender.catalog.tokens_of(row) for row in range(12)]
    tokens, mask, longest = batch_of([cases.prompts[one % 3] for one in range(12)], proposed)
    items, seen = ItemLogProbs(recommender.model, recommender.catalog), []

    def model(**inputs):
        seen.append(inputs["input_ids"].shape)
        return recommender.model(**inputs)

    monkeypatch.setattr(model, "parameters", recommender.model.parameters, raising=False)
    shared_logprobs(items, model, tokens, mask, longest)
    assert seen == [(3, tokens.shape[1] - longest + 4 * longest)]


@pytest.mark.parametrize("name", MAKERS)
def test_they_are_what_decoding_gives_its_beams(name):
    recommender = MAKERS[name]()
    cases = cases_of(recommender, 5, longest=6)
    softmax = recommender.settings.softmax
    groups = TransformersRollouts(recommender.model, recommender.catalog, cases, 4, softmax=softmax).generate(range(5))
    prompts = [prompt for prompt in cases.prompts for _ in range(4)]
    tokens, mask, longest = batch_of(prompts, groups.tokens)
    vocabulary = recommender.catalog.softmax_tokens(softmax)
    chosen = None if vocabulary is None else torch.from_numpy(vocabulary)
    found, _, _ = token_logprobs(recommender.model, tokens, mask, longest, chosen)
    assert found.dtype == torch.float32
    for row, scores in enumerate(groups.logprobs):
        torch.testing.assert_close(found[row, : len(scores)].detach(), torch.tensor(scores), rtol=0, atol=1e-5)


def test_entropies_have_a_gradient_where_it_is_asked_for():
    recommender = policy()
    model = recommender.model.double()
    tokens, mask, longest = batch_of([[3, 4, 5], [6]], [[290, 295], [291]])
    _, entropies, _ = token_logprobs(model, tokens, mask, longest, entropy_gradient=True)
    (slope,) = torch.autograd.grad(entropies.sum(), model.get_output_embeddings().weight)
    _, first = by_definition(model, [3, 4, 5], [290, 295], None)
    _, second = by_definition(model, [6], [291], None)
    (expected,) = torch.autograd.grad(first.sum() + second.sum(), model.get_output_embeddings().weight)
    torch.testing.assert_close(slope, expected, rtol=0, atol=1e-9)


def test_a_token_of_probability_nought_leaves_entropies_finite():
    class Certain(torch.nn.Module):
        def forward(self, input_ids, logits_to_keep, **_):
            logits = torch.full((*input_ids.shape, 4), -torch.inf)
            logits[..., 1:3] = 0.0
            return type("Output", (), {"logits": logits[:, -logits_to_keep:]})

    found, entropies, _ = token_logprobs(Certain(), torch.tensor([[0, 1, 2]]), torch.ones(1, 3, dtype=torch.long), 2)
    torch.testing.assert_close(found, torch.full((1, 2), -0.6931472))
    torch.testing.assert_close(entropies, torch.full((1, 2), 0.6931472))

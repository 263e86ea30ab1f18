"""The definition of items' log-probabilities: every item behind its prompt, unpadded, alone."""

import torch


def by_hand(model, prompts, items, catalog, softmax="vocabulary"):
    """(B, J) with gradients, for J items after each of B prompts."""
    ids = catalog.softmax_tokens(softmax)
    rows = []
    for prompt, group in zip(prompts, items, strict=True):
        found = []
        for item in group:
            answer = catalog.tokens_of(int(item))
            logits = model(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
            total = 0.0
            for step, token in enumerate(answer):
                line = logits[len(prompt) - 1 + step]
                total = total + line[token] - (line if ids is None else line[torch.from_numpy(ids)]).logsumexp(0)
            found.append(total)
        rows.append(torch.stack(found))
    return torch.stack(rows)

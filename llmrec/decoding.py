"""Catalog-constrained beam search with a transformers model: batched, KV-cached; the reference for the engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from llmrec.beam import Beams, TrieTensors, beam_search
from llmrec.exceptions import RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def decode(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    trie: TrieTensors,
    num_beams: int,
    excluded: Sequence[npt.NDArray[np.integer]] | None = None,
    renormalize: bool = False,
) -> Beams:
    """Searches the catalog for the best continuations of every prompt, in one batch.

    The prompts are padded on the left and run once. The beams of a request are then appended to its cache as if they
    were one more stretch of text, and an attention mask lets each see the prompt and its own ancestors alone: the
    prompt's keys and values are never copied, and each further level costs one forward pass of W tokens per request.

    Args:
        model: a causal LM in eval mode, on the trie's device.
        prompts: B lists of token ids, none empty.
        trie: the catalog's trie with its token ids.
        num_beams: W.
        excluded: for each prompt the catalog rows not to return.
        renormalize: see `beam_search`.

    Raises:
        RequestError: if a prompt is empty, or longer than the model's positions leave room for.
    """
    lengths = [len(prompt) for prompt in prompts]
    levels = trie.trie.num_levels
    limit = getattr(model.config, "max_position_embeddings", None)
    if not lengths or min(lengths) == 0:
        raise RequestError("A prompt has no tokens. Give the template a beginning-of-sequence token.")
    if limit is not None and max(lengths) + levels - 1 > limit:
        raise RequestError(
            f"A prompt of {max(lengths)} tokens and {levels} of an item exceed the model's {limit} positions. "
            "Shorten the history."
        )
    tokens, mask, positions = pad_left(prompts, trie.device)
    rows = torch.arange(len(lengths), device=trie.device).unsqueeze(1)
    position = torch.tensor(lengths, device=trie.device).unsqueeze(1)  # (B, 1) of the next token
    with _masked_attention(model):
        output = model(input_ids=tokens, attention_mask=mask, position_ids=positions, use_cache=True, logits_to_keep=1)
        cache, dtype = output.past_key_values, model.dtype
        sight = mask.bool().unsqueeze(
            1
        )  # (B, W', cached tokens) what each beam sees; before the first step, the prompt

        def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
            nonlocal sight, position
            batch, width = tokens.shape
            itself = torch.eye(width, dtype=torch.bool, device=trie.device).expand(batch, -1, -1)
            sight = torch.cat([sight[rows, parents], itself], dim=2)
            hidden = torch.zeros(sight.shape, dtype=dtype, device=trie.device)
            hidden = hidden.masked_fill(~sight, torch.finfo(dtype).min).unsqueeze(1)  # (B, 1, W, cached tokens)
            logits = model(
                input_ids=tokens,
                attention_mask=hidden,
                position_ids=position.expand(-1, width),
                past_key_values=cache,
                use_cache=True,
            ).logits
            position = position + 1
            return logits  # type: ignore[no-any-return]

        return beam_search(output.logits[:, -1], step, trie, num_beams, excluded, renormalize)


@contextmanager
def _masked_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Runs a model with an attention that takes a mask of any shape: sdpa, in the place of the flash kinds."""
    chosen = model.config._attn_implementation
    if chosen in ("sdpa", "eager"):
        yield
        return
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@torch.inference_mode()
def score_catalog(
    model: "PreTrainedModel", prompt: Sequence[int], trie: TrieTensors, renormalize: bool = False
) -> torch.Tensor:
    """The brute-force definition: the score of every item after one prompt, by running each item's tokens in full.

    No cache, no trie walk for the scores, no padding: slow, and what `decode` is tested against. An item's tokens end
    before the first "nothing"; probabilities are over the trie's `vocabulary`, if it has one.

    Returns:
        (N,) float64 log-probabilities, by catalog row; -inf for a retired item.
    """
    flat = trie.trie
    codes = np.full((len(flat.leaf_of_item), flat.num_levels), -1, dtype=np.int64)
    for level in range(flat.num_levels):  # a leaf's ancestors are the nodes whose run of rows holds it
        node = np.searchsorted(flat.first_leaf[level], np.arange(flat.num_items), side="right") - 1
        codes[flat.item_of_leaf, level] = trie.token[level].cpu().numpy()[node]
    live = flat.leaf_of_item >= 0
    scores = torch.full((len(codes),), -torch.inf, dtype=torch.float64)
    for row in flat.item_of_leaf.tolist():
        continuation = codes[row][codes[row] >= 0].tolist()
        sequence = torch.tensor([[*prompt, *continuation]], device=trie.device)
        logits = model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].double()  # (L, V)
        total = 0.0
        for level, token in enumerate(continuation):
            legal = slice(None) if trie.vocabulary is None else trie.vocabulary
            if renormalize:
                same = live & (codes[:, :level] == codes[row, :level]).all(axis=1)
                legal = torch.from_numpy(np.unique(codes[same, level]))
            total += float(logits[level, token] - logits[level, legal].logsumexp(-1))
        scores[row] = total
    return scores


def pad_left(
    prompts: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and position ids, each (B, T); padding holds token 0, which the mask hides."""
    longest = max(len(prompt) for prompt in prompts)
    tokens = torch.zeros((len(prompts), longest), dtype=torch.long)
    mask = torch.zeros((len(prompts), longest), dtype=torch.long)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return tokens.to(device), mask.to(device), positions.to(device)

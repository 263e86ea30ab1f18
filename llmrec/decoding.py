"""Catalog-constrained beam search with a transformers model: batched, KV-cached; the reference for the engine."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from llmrec.beam import Beams, Draw, PrefixCap, TrieTensors, beam_search
from llmrec.exceptions import RequestError
from llmrec.trie_tensors import Rows

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@torch.inference_mode()
def decode(
    model: "PreTrainedModel",
    prompts: Sequence[Sequence[int]],
    trie: TrieTensors | Sequence[TrieTensors],
    num_beams: int | Sequence[int],
    excluded: Sequence[Rows] | None = None,
    renormalize: bool | Sequence[bool] = False,
    caps: Sequence[PrefixCap | None] | None = None,
    draws: Sequence[Draw | None] | None = None,
) -> Beams:
    """Searches the catalog for the best continuations of every prompt, in one batch.

    The prompts are padded on the left and run once. The beams of a request are then appended to its cache as if they
    were one more stretch of text, and an attention mask lets each see the prompt and its own ancestors alone: the
    prompt's keys and values are never copied, and each further level costs one forward pass of W tokens per request.

    Args:
        model: a causal LM in eval mode, on the trie's device.
        prompts: B lists of token ids, none empty.
        trie: the catalog's trie with its token ids, or one per prompt.
        num_beams: W, or one per prompt.
        excluded: for each prompt the catalog rows not to return.
        renormalize, caps, draws: see `beam_search`.

    Raises:
        RequestError: if a prompt is empty, or longer than the model's positions leave room for.
    """
    from transformers import DynamicCache

    lengths = [len(prompt) for prompt in prompts]
    tries = [trie] if isinstance(trie, TrieTensors) else trie
    levels = max((one.token_levels for one in tries), default=0)
    limit = getattr(model.config, "max_position_embeddings", None)
    if not lengths or min(lengths) == 0:
        raise RequestError("A prompt has no tokens. Give the template a beginning-of-sequence token.")
    if limit is not None and max(lengths) + levels - 1 > limit:
        raise RequestError(
            f"A prompt of {max(lengths)} tokens and {levels} of an item exceed the model's {limit} positions. "
            "Shorten the history."
        )
    device = tries[0].device
    tokens, mask, positions = pad_left(prompts, device)
    rows = torch.arange(len(lengths), device=device).unsqueeze(1)
    position = torch.tensor(lengths, device=device).unsqueeze(1)  # (B, 1) of the next token
    with _masked_attention(model):
        # Of every layer all keys are kept: the mask hides those outside of a window, which differ from beam to beam.
        cache = DynamicCache()
        output = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        # (B, W', cached tokens) what each beam sees; before the first step, the prompt
        sight = mask.bool().unsqueeze(1)

        def step(tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
            nonlocal sight, position, positions
            batch, width = tokens.shape
            itself = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
            sight = torch.cat([sight[rows, parents], itself], dim=2)
            positions = torch.cat([positions, position.expand(-1, width)], dim=1)
            logits = model(
                input_ids=tokens,
                attention_mask=_hidden(model, sight, (position - positions).unsqueeze(1)),
                position_ids=position.expand(-1, width),
                past_key_values=cache,
                use_cache=True,
            ).logits
            position = position + 1
            return logits  # type: ignore[no-any-return]

        return beam_search(output.logits[:, -1], step, trie, num_beams, excluded, renormalize, caps, draws)


def _hidden(model: "PreTrainedModel", sight: torch.Tensor, age: torch.Tensor) -> Any:
    """The attention mask of beams that see `sight` (B, W, n) of n cached tokens, `age` (B, 1, n) places before them.

    Returns:
        (B, 1, W, n) to add to the scores, or one per kind of layer where a model has layers with and without a window.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    near = sight if window is None else sight & (age < window)

    def added(seen: torch.Tensor) -> torch.Tensor:
        nothing = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
        return nothing.masked_fill(~seen, torch.finfo(model.dtype).min).unsqueeze(1)

    kinds = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in kinds:
        return {"full_attention": added(sight), "sliding_attention": added(near)}
    return added(sight if kinds else near)


@contextmanager
def _masked_attention(model: "PreTrainedModel") -> Iterator[None]:
    """Runs a model with an attention that takes a mask of any shape: sdpa, in the place of the flash kinds.

    Of a model that caps its attention's scores only the eager one computes the cap.
    """
    chosen = model.config._attn_implementation
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    if chosen == "eager" or (chosen == "sdpa" and not capped):
        yield
        return
    model.set_attn_implementation("eager" if capped else "sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@torch.inference_mode()
def score_catalog(
    model: "PreTrainedModel", prompt: Sequence[int], trie: TrieTensors, renormalize: bool = False
) -> torch.Tensor:
    """The brute-force definition: the score of every item after one prompt, by running each item's tokens in full.

    No cache, no walk down the trie, no padding: slow, and what `decode` is tested against. An item's tokens end before
    the first "nothing"; probabilities are over the trie's `vocabulary`, if it has one, or over the tokens that the
    trie's items go on with (for a request that excludes some: its `subset` of the others). An item with several codes
    has the score of its best one.

    Returns:
        (N,) float64 log-probabilities, by catalog row; -inf for a row without a leaf.
    """
    tokens = trie.tokens_of_leaves().cpu()
    scores = torch.full((trie.num_rows,), -torch.inf, dtype=torch.float64)
    for row, own in zip(trie.item_of_leaf.tolist(), tokens, strict=True):
        continuation = own[own >= 0].tolist()
        sequence = torch.tensor([[*prompt, *continuation]], device=trie.device)
        logits = model(input_ids=sequence, use_cache=False).logits[0, len(prompt) - 1 : -1].double()  # (L, V)
        total = 0.0
        for level, token in enumerate(continuation):
            legal = slice(None) if trie.vocabulary is None else trie.vocabulary
            if renormalize:
                same = (tokens[:, :level] == own[:level]).all(dim=1)
                legal = tokens[same, level].unique().to(trie.device)
            total += float(logits[level, token] - logits[level, legal].logsumexp(-1))
        scores[row] = scores[row].clamp(min=total)
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

"""Tiny random causal LMs of several families, and rows for them."""

from typing import Any

import numpy as np
import torch

WORDS = 61
FAMILIES = ("llama", "gpt2", "qwen3", "gemma", "mistral")


def tiny(
    family: str = "llama",
    attention: str = "sdpa",
    tied: bool = True,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    words: int = WORDS,
    **sizes: Any,
) -> Any:
    """Two layers of width 32; the weights are drawn wide enough that every token matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    common: dict[str, Any] = {
        "vocab_size": words,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if family not in ("gpt2", "bloom"):
        common |= {"num_key_value_heads": 1, "head_dim": 16}
    if family == "gpt2":
        common |= {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(common | sizes))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.3)
    return model


def random_rows(
    seed: int, count: int, longest: int = 12, words: int = WORDS, tasks: tuple[str, ...] = (), least: int = 0
) -> list[dict[str, Any]]:
    """Rows of 1 to `longest` tokens, of which some are labelled, the first ones too; labels from `least` on."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        tokens = rng.integers(least, words, rng.integers(1, longest + 1)).tolist()
        row: dict[str, Any] = {
            "input_ids": tokens,
            "labels": [token if rng.random() < 0.6 else -100 for token in tokens],
        }
        if tasks:
            row["task"] = tasks[rng.integers(len(tasks))]
        rows.append(row)
    return rows


def reference_losses(model: Any, rows: list[dict[str, Any]]) -> list[torch.Tensor]:
    """The losses of each row by itself, over all logits: the definition."""
    found = []
    for row in rows:
        logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"])[1:]
        each = torch.nn.functional.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
        found.append(each[labels != -100])
    return found

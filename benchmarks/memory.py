"""How much memory each way of training takes, for the checkpoints that the recipes name; counted, not measured.

    python benchmarks/memory.py [--levels 3] [--codes 256] [--rank 16] [--quick] [--json FILE]

Every model is built from its published sizes on torch's meta device, which holds shapes and no numbers, its vocabulary
extended by the semantic-ID tokens, and adapted as train/sft.py does. Then bytes are counted: of the weights in the
format that the way keeps them in, and for every trained parameter its gradient and AdamW's two moments, in float32.

Activations are not in it. They grow with the batch; with gradient checkpointing they are some tens of megabytes a row
for these models, and the logits, which llmrec computes at labelled places alone, are small.

--quick counts the first model alone.
"""

import argparse
from typing import Any

# Published sizes: vocabulary, width, layers, heads, heads of keys and values, size of a head, width of the MLP.
LLAMA = {"model_type": "llama", "tie_word_embeddings": True}
QWEN = {"model_type": "qwen3", "tie_word_embeddings": True}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "Qwen/Qwen3-0.6B": QWEN
    | {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 3072,
    },
    "meta-llama/Llama-3.2-1B": LLAMA
    | {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 8192,
    },
    "Qwen/Qwen3-1.7B": QWEN
    | {
        "vocab_size": 151_936,
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 6144,
    },
}
# 4-bit NormalFloats: half a byte, and a scale of 8 bits for 64 weights whose own scales take 32 bits for 256 of them.
BYTES_OF_LINEAR = {"qlora": 0.5 + 1 / 64 + 4 / (64 * 256), "int8": 1.0}
METHODS = ("full", "lora", "dora", "qlora", "int8", "new_tokens")


def count(sizes: dict[str, Any], method: str, tokens: int, rank: int) -> dict[str, float]:
    """Parameters and gigabytes of one checkpoint and way of training."""
    import torch
    from peft import LoraConfig, TaskType, TrainableTokensConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    values = dict(sizes)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    extended = -(-(config.vocab_size + tokens) // 64) * 64
    new = list(range(config.vocab_size, extended))
    config.vocab_size = extended
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    linear = {"Linear", "Conv1D"}
    head = model.get_output_embeddings()
    blocks = sum(
        module.weight.numel() for module in model.modules() if type(module).__name__ in linear and module is not head
    )
    total = model.num_parameters()
    trained = total
    if method != "full":
        table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
        rows: Any = {table.rpartition(".")[2]: new}
        adapter: Any = TrainableTokensConfig(
            task_type=TaskType.CAUSAL_LM, token_indices=new, target_modules=list(rows)
        )
        if method != "new_tokens":
            adapter = LoraConfig(
                task_type=TaskType.CAUSAL_LM,
                r=rank,
                target_modules="all-linear",
                use_dora=method == "dora",
                trainable_token_indices=rows,
            )
        with torch.device("meta"):
            adapted = get_peft_model(model, adapter, low_cpu_mem_usage=True)
        trained = sum(parameter.numel() for parameter in adapted.parameters() if parameter.requires_grad)
    # A frozen base is kept in bfloat16 (--dtype bfloat16); what is trained is float32.
    weights = 4 * total if method == "full" else 2 * (total - blocks) + BYTES_OF_LINEAR.get(method, 2) * blocks
    states = (12 if method == "full" else 16) * trained
    return {
        "parameters": total,
        "trained": trained,
        "weights_gb": round(weights / 1e9, 2),
        "with_optimiser_gb": round((weights + states) / 1e9, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", type=int, default=3, help="Levels of the semantic IDs.")
    parser.add_argument("--codes", type=int, default=256, help="Codes of a level.")
    parser.add_argument("--rank", type=int, default=16, help="Of LoRA.")
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    before = environment()
    tokens = options.levels * options.codes
    names = list(CHECKPOINTS)[: 1 if options.quick else None]
    result = {
        name: {method: count(CHECKPOINTS[name], method, tokens, options.rank) for method in METHODS} for name in names
    }
    print(f"{'':26}{'':>12}" + "".join(f"{method:>12}" for method in METHODS))
    for name, ways in result.items():
        for key, unit, scale in (("trained", "M trained", 1e6), ("with_optimiser_gb", "GB", 1)):
            print(f"{name:26}{unit:>12}" + "".join(f"{ways[method][key] / scale:12.2f}" for method in METHODS))
    ratios = {
        f"{name}: full over qlora": w["full"]["with_optimiser_gb"] / w["qlora"]["with_optimiser_gb"]
        for name, w in result.items()
    }
    report("memory", {"tokens": tokens, "rank": options.rank, "checkpoints": result}, ratios, before, options)


if __name__ == "__main__":
    main()

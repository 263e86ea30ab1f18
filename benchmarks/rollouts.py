"""How fast groups of catalog items are proposed, beside what TRL's GRPOTrainer generates by itself.

    python benchmarks/rollouts.py [--artefact FOLDER] [--vllm] [--quick] [--json FILE]

One model, one set of prompts, groups of G for each of them, every way in turn (ABCABC):

* beams:     llmrec's constrained beam search, G items for each prompt
* draws:     llmrec's draw without replacement (stochastic beams, temperature 1)
* trl:       TRL's GRPOTrainer, its transformers path as it is (`_generate_single_turn`): each prompt G times in the
             batch, sampled at temperature 1 without constraint, as many tokens as an item has
* vllm:      with --vllm, llmrec's beams by vLLM's engine; its time holds the policy's weights going into the engine

A rollout is one proposal. It is invalid if its tokens spell no item of the catalog, and a duplicate if its group has
the same one before it; `items_per_second` counts those that are neither, which are what a group can learn from.
Without --artefact the model is a small Llama, trained for a moment to continue histories of a random walk; shares of
invalid and duplicate samples are its own, and another model has others. Scores are over the whole vocabulary.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrec.catalog import Catalog
    from llmrec.recommender import Recommender
    from llmrec.reinforcement.cases import RolloutCases

ROOT = Path(__file__).parents[1]
ITEMS, SIZES = 1_000, (16, 16, 16)


def walk_of(rng: Any, items: int, length: int) -> list[int]:
    """A random walk: mostly to the item's own successor, else anywhere."""
    rows = [int(rng.integers(items))]
    while len(rows) < length:
        rows.append((7 * rows[-1] + 3) % items if rng.random() < 0.8 else int(rng.integers(items)))
    return rows


def small_recommender(steps: int, device: str) -> "Recommender":
    """A Llama of two layers on semantic IDs of three levels, trained on `steps` batches of 32 walks."""
    import numpy as np
    import torch

    from llmrec.backbones.causal_lm import BackboneArguments, from_scratch
    from llmrec.catalog import Catalog
    from llmrec.prompt import Prompt
    from llmrec.recommender import Recommender, Settings
    from llmrec.reinforcement.policy import token_logprobs
    from llmrec.vocabulary import add_catalog_tokens, train_tokenizer

    rng = np.random.default_rng(0)
    codes = np.stack(np.unravel_index(rng.choice(np.prod(SIZES), ITEMS, replace=False), SIZES), axis=1)
    catalog = Catalog([{"item_id": str(row), "title": str(row)} for row in range(ITEMS)], codes, SIZES)
    tokenizer = train_tokenizer(["a customer bought a title"], vocab_size=300)
    catalog = add_catalog_tokens(tokenizer, catalog)
    torch.manual_seed(0)
    sizes = BackboneArguments(hidden_size=128, num_hidden_layers=2, num_attention_heads=4, intermediate_size=384)
    model = from_scratch(sizes, tokenizer, 256).to(device)
    prompt = Prompt.read(ROOT / "prompts" / "semantic_ids.jinja")
    made = Recommender(model, tokenizer, catalog, prompt, Settings(max_history=20))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(steps):
        walks = [walk_of(rng, ITEMS, 12) for _ in range(32)]
        lines = [made.encoder.encode(walk[:-1]) + catalog.tokens_of(walk[-1]) for walk in walks]
        tokens = torch.tensor(lines, device=device)  # equally long: every walk is
        found, _, _ = token_logprobs(model, tokens, torch.ones_like(tokens), tokens.shape[1] - 1)
        (-found.mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return made


def cases_of(recommender: "Recommender", count: int, longest: int) -> "RolloutCases":
    """Walks of up to `longest` items and their prompts."""
    import numpy as np

    from llmrec.reinforcement.cases import RolloutCases

    rng, items = np.random.default_rng(1), len(recommender.catalog)
    walks = [walk_of(rng, items, int(rng.integers(2, longest + 2))) for _ in range(count)]
    targets = np.array([walk[-1] for walk in walks])
    return RolloutCases(
        [recommender.encoder.encode(walk[:-1]) for walk in walks],
        [np.array(walk[:-1]) for walk in walks],
        targets,
        [targets[place : place + 1] for place in range(count)],
        np.arange(count),
    )


def trl_generation(
    recommender: "Recommender", cases: "RolloutCases", group: int, folder: str
) -> Callable[[], list[list[int]]]:
    """TRL's own generation of whole groups, as token ids."""
    import torch

    from llmrec.reinforcement.versions import without_trl_notices

    with without_trl_notices():
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        args = GRPOConfig(
            output_dir=folder,
            num_generations=group,
            per_device_train_batch_size=group * len(cases),
            max_completion_length=recommender.catalog.num_levels,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = GRPOTrainer(
            recommender.model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=args,
            train_dataset=Dataset.from_dict({"prompt": ["-"] * len(cases)}),
            processing_class=recommender.tokenizer,
        )
    repeated = [prompt for prompt in cases.prompts for _ in range(group)]

    def generate() -> list[list[int]]:
        completions: list[list[int]] = trainer._generate_single_turn(repeated, None, {}, group)[0]
        return completions

    return generate


def shares(proposed: Sequence[Sequence[int]], group: int, catalog: "Catalog") -> dict[str, float]:
    """The shares of proposals that spell no item, that their group has already, and that are neither."""
    spelt = {tuple(token for token in own if token >= 0) for own in catalog.item_tokens[~catalog.retired].tolist()}
    invalid = duplicate = fresh = 0
    for begin in range(0, len(proposed), group):
        seen: set[tuple[int, ...]] = set()
        for tokens in map(tuple, proposed[begin : begin + group]):
            legal, again = tokens in spelt, tokens in seen
            invalid, duplicate, fresh = invalid + (not legal), duplicate + again, fresh + (legal and not again)
            seen.add(tokens)
    number = len(proposed)
    return {"invalid": invalid / number, "duplicate": duplicate / number, "fresh": fresh / number}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artefact", help="A folder as train/sft.py saved it. Default: a small Llama.")
    parser.add_argument("--vllm", action="store_true", help="Measure vLLM's engine too; its start takes minutes.")
    parser.add_argument("--prompts", type=int, help="Default 64, 16 with --quick.")
    parser.add_argument("--group", type=int, default=16, help="G, proposals for each prompt.")
    parser.add_argument("--repeats", type=int, help="Of each way. Default 5, 3 with --quick.")
    parser.add_argument("--steps", type=int, help="The small Llama's training. Default 600, 60 with --quick.")
    from environment import add_flags, environment, report

    add_flags(parser)
    options = parser.parse_args()
    import torch

    from llmrec.recommender import Recommender
    from llmrec.reinforcement.rollouts import TransformersRollouts

    before = environment()
    count = options.prompts or (16 if options.quick else 64)
    repeats = options.repeats or (3 if options.quick else 5)
    steps = (60 if options.quick else 600) if options.steps is None else options.steps
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = options.artefact is not None
    made = Recommender.from_pretrained(options.artefact) if loaded else small_recommender(steps, device)
    cases, chosen = cases_of(made, count, made.settings.max_history), range(count)
    given: dict[str, Any] = {"exclude_seen": False}
    plain = (made.model, made.catalog, cases, options.group)
    beams = TransformersRollouts(*plain, **given)
    draws = TransformersRollouts(*plain, temperature=1.0, **given)
    found: dict[str, list[tuple[float, list[list[int]]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ways: dict[str, Callable[[], list[list[int]]]] = {
            "beams": lambda: beams.generate(chosen).tokens,
            "draws": lambda: draws.generate(chosen).tokens,
            "trl": trl_generation(made, cases, options.group, folder),
        }
        engine = None
        if options.vllm:
            from llmrec.reinforcement.vllm_rollouts import VLLMRollouts

            made.save_pretrained(Path(folder) / "artefact")
            engine = VLLMRollouts(made.model, Path(folder) / "artefact", *plain[1:], **given)
            ways["vllm"] = lambda: engine.generate(chosen).tokens
        try:
            for turn in range(repeats + 1):  # the first of each is not counted
                for name, way in ways.items():
                    begin = time.perf_counter()
                    proposed = way()
                    if device == "cuda":
                        torch.cuda.synchronize()
                    if turn:
                        found.setdefault(name, []).append((time.perf_counter() - begin, proposed))
        finally:
            if engine is not None:
                engine.close()
    total = count * options.group
    result: dict[str, Any] = {
        "model": {"artefact": loaded, "parameters": made.model.num_parameters(), "training_steps": steps},
        "items": len(made.catalog),
        "prompts": count,
        "prompt_tokens": sum(map(len, cases.prompts)) / count,
        "group": options.group,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "ways": {},
    }
    for name, runs in found.items():
        seconds = statistics.median(one for one, _ in runs)
        of = [shares(proposed, options.group, made.catalog) for _, proposed in runs]
        share = {key: statistics.mean(one[key] for one in of) for key in of[0]}
        result["ways"][name] = {
            "seconds": round(seconds, 4),
            "rollouts_per_second": round(total / seconds, 1),
            "items_per_second": round(share["fresh"] * total / seconds, 1),
            "invalid": round(share["invalid"], 4),
            "duplicate": round(share["duplicate"], 4),
        }
        print(f"{name}: {result['ways'][name]}")
    ratios = {}
    for name in [name for name in found if name != "trl"]:
        pairs = [ours / theirs for (theirs, _), (ours, _) in zip(found[name], found["trl"], strict=True)]
        ratios[f"rollouts/s, {name} over trl"] = round(statistics.median(pairs), 2)
        ratios[f"items/s, {name} over trl"] = round(
            result["ways"][name]["items_per_second"] / max(0.1, result["ways"]["trl"]["items_per_second"]), 2
        )
    result["over_trl"] = ratios
    for path in report("rollouts", result, ratios, before, options):
        print(path)
    for name, ratio in ratios.items():
        print(f"{name}: {ratio} x")


if __name__ == "__main__":
    main()

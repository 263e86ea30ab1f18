"""What a pilot's trainings take on this machine, from two short ones of each encoder: the smallest and the largest."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.scaling.cost import Cost, cost_of
from llmrec.scaling.language import MODELS, LanguageShape
from llmrec.scaling.pilot import LM, PilotEncoder
from llmrec.scaling.pilot_planner import Estimate
from llmrec.scaling.shape import Shape
from llmrec.scaling.throughput import Probe, seconds_per_step
from llmrec.storage import atomic_path

if TYPE_CHECKING:
    from llmrec.data.split import Split

# (cost, events an epoch, arguments, script) -> a measurement
Measure = Callable[[Cost, float, Sequence[str], str], Probe]
# Flags of train/seqrec.py that a `Shape` has under the same name.
_SAME = (
    *("relative_bias", "position_embeddings", "residual", "gate", "concat_ua", "score", "qk_dim", "v_dim", "norm"),
    *("feed_forward", "gru_size"),
)
_LOSSES = {"softmax": "softmax", "sampled_softmax": "sampled_softmax", "bce": "bce", "gbce": "bce"}
_RANKING_BEAMS = 20  # of train/sft.py's evaluations


@dataclass(frozen=True)
class Workload:
    """What a training of an encoder has to do, whatever its size.

    Attributes:
        items: of the catalog.
        length: items that a window has for inputs, the mean; of a language model's row, all of its items.
        targets: of them that are learnt, the mean.
        events: that are learnt from in an epoch, by all users.
        targets_per_token: those of them that are targets, as a share.
        valid, test: cases.
    """

    items: int
    length: float
    targets: float
    events: int
    targets_per_token: float
    valid: int
    test: int

    @classmethod
    def of(cls, entry: PilotEncoder, split: "Split") -> "Workload":
        """The workload of an encoder on a split, with all of its users."""
        from llmrec.data.subset import learnt_events
        from llmrec.scaling.workload import Workload as Windows

        if entry.name.startswith(LM):
            read = Windows.of_rows(split, int(entry.flags.get("max_history", 20)), "sequence")
        else:
            take, stride = entry.flags.get("windows", "all"), int(entry.flags.get("stride", 0))
            read = Windows.of_windows(split, int(entry.flags.get("max_history", 50)), take, stride)
        events = int(learnt_events(split, entry.longest).sum())
        return cls(
            items=split.num_items,
            length=float(read.lengths.mean()),
            targets=float(read.targets.mean()),
            events=events,
            targets_per_token=read.tokens / events,
            valid=len(split.targets("valid")),
            test=len(split.targets("test")),
        )


def measured(
    entry: PilotEncoder,
    split: "Split",
    sizes: Sequence[tuple[int, int]],
    data: Mapping[str, Any],
    folder: str | Path,
    measure: Measure,
) -> Estimate:
    """The seconds and operations of an encoder's trainings, from probes of the smallest and the largest size.

    A training takes its start, its steps (all epochs: early stopping may spare some) and its evaluations, whose
    forward passes are taken to run at the steps' rate. Where it is trained on fewer tokens it has fewer steps.

    Args:
        entry: the encoder.
        split: the whole one.
        sizes: (depth, width) of all its trainings.
        data: flags of all trainings, `interactions` among them.
        folder: for the recipes of the probes.
        measure: runs one; see `llmrec.scaling.probing.probe`.

    Raises:
        DataError: if the sizes make no model.
        StageError: if a probe's training fails.
    """
    work = Workload.of(entry, split)
    ends = dict.fromkeys((min(sizes, key=_weight), max(sizes, key=_weight)))
    learnt = work.targets_per_token * work.events
    probes = []
    for depth, width in ends:
        recipe = _write_recipe(entry, depth, width, data, Path(folder))
        cost = cost_of(shape_of(entry, depth, width, work))
        probes.append(measure(cost, learnt, ["--config", str(recipe)], entry.script))
    each = sum(probe.tokens_per_step for probe in probes) / len(probes)
    start = sum(probe.startup_seconds for probe in probes) / len(probes)

    def steps(tokens: int) -> float:
        most = int(entry.flags.get("max_steps", -1))
        # An epoch has one step at least; its last one may not be full.
        an_epoch = math.ceil(max(1.0, tokens * work.targets_per_token / each))
        return most if most > 0 else an_epoch * float(entry.flags.get("num_train_epochs", 3))

    def seconds(depth: int, width: int, tokens: int) -> float:
        cost = cost_of(shape_of(entry, depth, width, work))
        step = seconds_per_step(cost, probes, each)
        rate = cost.flops_per_token * each / step
        count = steps(tokens)
        return start + count * step + evaluation_flops(entry, cost, work, count, tokens, each) / rate

    def flops(depth: int, width: int, tokens: int) -> float:
        return cost_of(shape_of(entry, depth, width, work)).flops_per_token * each * steps(tokens)

    known = not entry.name.startswith(LM) or (
        entry.flags.get("items") is None and list(entry.flags.get("tasks", ["sequence"])) == ["sequence"]
    )
    return Estimate(seconds, flops if known else None, {"probes": [asdict(probe) for probe in probes]})


def shape_of(entry: PilotEncoder, depth: int, width: int, work: Workload) -> Shape | LanguageShape:
    """The model of an encoder's flags at a size, with its mean window.

    Raises:
        DataError: if there is no such model.
    """
    flags = entry.flags
    device: Any = "gpu" if _on_gpu(flags) else "cpu"
    if entry.name.startswith(LM):
        model_type: Any = flags.get("model_type", "llama")
        levels = _levels(flags.get("semantic_ids"))
        return LanguageShape(
            model_type=model_type if model_type in MODELS else "llama",
            depth=depth,
            width=width,
            vocabulary=int(flags.get("text_vocab_size", 512)) + sum(levels),
            codes=len(levels),
            length=work.length,
            targets=work.targets,
            heads=int(flags.get("num_attention_heads", 4)),
            inner=flags.get("intermediate_size"),
            tied=flags.get("tie_word_embeddings", True),
            dropout=float(flags.get("dropout", 0.0)) > 0,
            checkpointing=bool(flags.get("gradient_checkpointing", False)),
            device=device,
        )
    loss: Any = _LOSSES[flags.get("loss", "softmax")]
    sampled = loss == "sampled_softmax"
    attention = flags.get("attention_dropout")
    encoder: Any = entry.name
    return Shape(
        encoder=encoder,
        depth=depth,
        width=width,
        items=work.items,
        length=work.length,
        heads=flags.get("num_attention_heads"),
        negatives=entry.negatives,
        shared_negatives=sampled and bool(flags.get("shared_negatives")),
        loss=loss,
        max_history=int(flags.get("max_history", 50)),
        targets=work.targets,
        inner=flags.get("intermediate_size"),
        attention_dropout=None if attention is None else attention > 0,
        time_buckets=int(flags.get("num_time_buckets") or 128),
        dropout=flags.get("dropout") is None or float(flags["dropout"]) > 0,
        hidden_share=float(flags.get("hidden_share", 0.2)),
        device=device,
        **{name: flags[name] for name in _SAME if flags.get(name) is not None},
    )


def evaluation_flops(entry: PilotEncoder, cost: Cost, work: Workload, steps: float, tokens: int, each: float) -> float:
    """Operations of all evaluations of a training and of its test: a third of a window's, which is what a forward
    pass costs, and the scores of all items; for a language model, of a row and of as many tokens as beams write."""
    flags, shape = entry.flags, cost.shape
    strategy, every = flags.get("eval_strategy", "no"), float(flags.get("eval_steps") or 500)
    times = 0.0
    if strategy == "epoch":
        times = steps / max(1.0, tokens * work.targets_per_token / each)
    elif strategy == "steps":
        times = 1 / every if every < 1 else steps / every
    window = (cost.window.layers + cost.window.attention) / 3
    if isinstance(shape, LanguageShape):
        row = window / shape.tokens + 2.0 * shape.vocabulary * shape.width  # of a token, its head included
        asked = int(flags.get("test_users", -1))
        tested = work.test if asked < 0 else min(asked, work.test)
        written = tested * int(flags.get("num_beams", 50)) * shape.codes
        ranked = min(int(flags.get("eval_users", 500)), work.valid)
        measured_rows = min(int(flags.get("eval_rows", 5000)), work.valid)
        once = (ranked + measured_rows) * shape.tokens + ranked * _RANKING_BEAMS * shape.codes
        return row * (times * once + tested * shape.tokens + written)
    case = window + 2.0 * shape.items * shape.width
    ranked = min(int(flags.get("eval_users", 0)) or work.valid, work.valid)
    return case * (times * ranked + work.test)


def _weight(size: tuple[int, int]) -> tuple[float, ...]:
    depth, width = size
    return depth * width**2, depth, width


def _levels(folder: str | None) -> list[int]:
    """Sizes of the semantic IDs' codebooks; of titles, which have none, a guess that no speed hangs on."""
    from llmrec.catalog import Catalog

    return [0] * 8 if folder is None else list(Catalog.from_build(str(folder)).codebook_sizes)


def _on_gpu(flags: Mapping[str, Any]) -> bool:
    import torch

    return torch.cuda.is_available() and not flags.get("use_cpu", False)


def _write_recipe(entry: PilotEncoder, depth: int, width: int, data: Mapping[str, Any], folder: Path) -> Path:
    """A recipe of one size for a probe; its name says which."""
    import yaml

    values = {**entry.flags, **data, "num_hidden_layers": depth, "hidden_size": width}
    if not entry.name.startswith(LM):
        values["encoder"] = entry.name
    path = folder / f"{entry.name.replace(':', '.')}-{depth}x{width}.yaml"
    with atomic_path(path) as temporary:
        kept = {name: value for name, value in values.items() if value is not None}
        temporary.write_text(yaml.safe_dump(kept, sort_keys=True, allow_unicode=True), encoding="utf-8")
    return path

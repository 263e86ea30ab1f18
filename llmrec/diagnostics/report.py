"""The doctor's report on semantic IDs: everything that can be said of a tokenizer before a model is trained on it."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from llmrec import __version__
from llmrec.data.split import Split
from llmrec.diagnostics.branching import prefix_branching, prefix_groups
from llmrec.diagnostics.ceiling import beam_recall, collision_ceiling
from llmrec.diagnostics.evidence import Evidence
from llmrec.diagnostics.groups import collision_groups
from llmrec.diagnostics.identifiers import SemanticIDs
from llmrec.diagnostics.neighbours import neighbour_purity
from llmrec.diagnostics.reconstruction import reconstruction
from llmrec.diagnostics.usage import code_counts, level_usage
from llmrec.diagnostics.verdict import verdicts
from llmrec.exceptions import DataError
from llmrec.quantization.quantizer import Quantizer

Codes = npt.NDArray[np.int32]

KS = (1, 5, 10, 20)
WIDTHS = (10, 20, 50)
TOP = 10
GROUPS, GROUP_ITEMS = 20, 10
CURVE_POINTS = 256
# Beyond what float32 and the order of a batch's texts leave between the embeddings of equal texts.
SAME_TEXT = 1 - 1e-6


def report(
    ids: SemanticIDs,
    *,
    split: Split | None = None,
    texts: npt.NDArray[np.floating] | None = None,
    vectors: npt.NDArray[np.floating] | None = None,
    quantizer: Quantizer | None = None,
    others: Sequence[tuple[str, SemanticIDs]] = (),
    skipped: Mapping[str, str] | None = None,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Examines semantic IDs; the same arguments give the same report.

    Only training histories decide which items are sold together and what the reference recommender knows; of the
    test, the targets are what the ceilings are taken over.

    Args:
        ids: the semantic IDs, N items.
        split: of a log of these items, which may hold others; items are matched by id.
        texts: (N, D) embeddings of the items' texts, in the order of `ids`.
        vectors: (N, D') what was quantised, in the same order (text and co-occurrence, if they were joined).
        quantizer: what gave the codes' first levels.
        others: names and semantic IDs of other tokenizers, which are compared on the items that both have.
        skipped: parts that the caller could not provide for, and why ("reconstruction"); told in the report.
        seed: of samples and intervals.
        progress: called with the name of every step that begins.

    Returns:
        JSON-ready, all numbers finite; what cannot be said is None:

        * source: kind, name, quantizer and codebook_sizes_known; items, levels, tokens_per_item, quantised_levels,
          codebook_sizes;
        * collision_rate, sharing_rate, perplexity, used_share, dead_codes: the figures of the level or table below;
        * usage: `level_usage`, and code_counts: per level the items on each code by falling number, thinned;
        * collisions: `collision_groups`, its groups with code, size, and the first items' ids and titles;
        * branching: `prefix_branching`;
        * neighbours: per kind (co_sold, texts) `neighbour_purity`, or None; neighbour_purity: that of the first code,
          by co-sold neighbours if they are known, else by texts, and neighbour_kind says which;
        * duplicates: items whose title (and text, of the queried) another one has, too;
        * reconstruction: see `llmrec.diagnostics.reconstruction`;
        * ceiling: basis ("test targets" or "items"), targets, targets_without_id, collision (`collision_ceiling`, a
          target without an ID is a miss, the items of the test's histories are no candidates); beam (`beam_recall`):
          what beams keep of this reference's best, of which sharper models keep more, and beam_random: the same for
          random codes of the same sizes and length;
        * quantised: the headline figures before collisions were resolved;
        * others: per other tokenizer name, shared_items, and both sides' headline figures on these;
        * verdict: see `llmrec.diagnostics.verdict`; skipped, seed, versions.

    Raises:
        DataError: if vectors do not belong to these items, or the split and the semantic IDs share no item.
    """
    announce = progress or (lambda step: None)
    for name, matrix in (("Text embeddings", texts), ("Quantised vectors", vectors)):
        if matrix is not None and (matrix.ndim != 2 or len(matrix) != len(ids)):
            raise DataError(
                f"{name} of shape {matrix.shape} do not belong to {len(ids)} semantic IDs. Give one row per item, in "
                "their order."
            )
    announce("neighbours")
    evidence, missed = Evidence.gather(ids, split, texts, seed)
    announce("codes")
    usage = level_usage(ids.codes, ids.codebook_sizes)
    grouped = collision_groups(ids.codes, limit=GROUPS)
    announce("beams")
    own = _headline(ids.codes, ids.codebook_sizes, evidence, seed)
    found: dict[str, Any] = {
        "source": {
            "kind": ids.kind,
            "name": ids.source,
            "quantizer": ids.origin.get("quantizer"),
            "codebook_sizes_known": ids.codebook_sizes_known,
        },
        "items": len(ids),
        "levels": ids.num_levels,
        "tokens_per_item": ids.num_levels,
        "quantised_levels": ids.quantised_levels,
        "codebook_sizes": list(ids.codebook_sizes),
        "codebook_sizes_known": ids.codebook_sizes_known,
        **{key: own[key] for key in ("collision_rate", "sharing_rate", "perplexity", "used_share", "dead_codes")},
        "usage": usage,
        "code_counts": [_curve(counts) for counts in code_counts(ids.codes, ids.codebook_sizes)],
        "collisions": grouped | {"groups": [_group(ids, rows) for rows in grouped["groups"]]},
        "branching": prefix_branching(ids.codes),
        "neighbour_purity": own["neighbour_purity"],
        "neighbour_kind": own["neighbour_kind"],
        "neighbours": _purities(ids.codes, evidence),
        "duplicates": _duplicates(ids, texts, evidence),
        "reconstruction": None,
        "ceiling": {
            "basis": "items" if split is None or not len(split.targets("test")) else "test targets",
            "targets": len(evidence.targets) + missed,
            "targets_without_id": missed,
            "collision": _reachable(own["collision_ceiling"], len(evidence.targets), missed),
            "beam": own["beam"],
            "beam_random": _beam(_random_codes(ids, seed), evidence),
            "reference": None if own["beam"] is None else "item-CF on the training histories",
            "cases": len(evidence.histories),
            "k": TOP,
        },
    }
    if vectors is not None and quantizer is not None:
        announce("reconstruction")
        found["reconstruction"] = reconstruction(vectors, ids.codes, quantizer)
    found["quantised"] = _quantised(ids, evidence, seed)
    found["others"] = []
    for name, other in others:
        announce(f"comparison with {name}")
        found["others"].append(_comparison(ids, name, other, evidence, seed))
    found |= {"skipped": dict(skipped or {}), "seed": seed, "versions": _versions()}
    found["verdict"] = verdicts(found)
    return found


def _headline(codes: Codes, sizes: Sequence[int], evidence: Evidence, seed: int) -> dict[str, Any]:
    """The few figures by which tokenizers are compared, of codes (N, L) on the evidence for these N items."""
    usage, groups = level_usage(codes, sizes), collision_groups(codes, limit=0)
    kind = "co_sold" if evidence.co_sold is not None else "texts" if evidence.texts is not None else None
    purities = _purities(codes, evidence)
    lengths = purities[kind] if kind else None
    first = lengths[0] if lengths else None
    targets = evidence.targets
    return {
        "items": len(codes),
        "levels": codes.shape[1],
        "codebook_sizes": list(sizes),
        "collision_rate": groups["collision_rate"],
        "sharing_rate": groups["sharing_rate"],
        "largest_group": groups["largest_group"],
        "perplexity": [level["perplexity"] for level in usage],
        "used_share": [level["used_share"] for level in usage],
        "dead_codes": [level["dead"] for level in usage],
        "neighbour_purity": None if first is None else first["purity"],
        "neighbour_lift": None if first is None else first["lift"],
        "neighbour_kind": kind,
        "collision_ceiling": collision_ceiling(codes, targets, KS, evidence.seen) if len(targets) else None,
        "beam": _beam(codes, evidence),
    }


def _beam(codes: npt.NDArray[np.integer], evidence: Evidence) -> dict[str, Any] | None:
    if evidence.score is None or not evidence.histories:
        return None
    return beam_recall(codes, evidence.score, evidence.histories, WIDTHS, k=TOP)


def _random_codes(ids: SemanticIDs, seed: int) -> npt.NDArray[np.int64]:
    """Codes (N, L) of these sizes that say nothing of the items; an appended digit is the rank among equal codes."""
    generator = np.random.default_rng(seed)
    sizes = np.minimum(ids.codebook_sizes[: ids.quantised_levels], len(ids))
    codes = generator.integers(0, sizes, size=(len(ids), len(sizes)))
    for _ in range(ids.num_levels - ids.quantised_levels):
        group = prefix_groups(codes)[-1]
        order = np.argsort(group, kind="stable")
        digit = np.empty_like(order)
        digit[order] = np.arange(len(order)) - np.searchsorted(group[order], group[order])
        codes = np.column_stack([codes, digit])
    return codes


def _purities(codes: Codes, evidence: Evidence) -> dict[str, list[dict[str, Any]] | None]:
    found: dict[str, list[dict[str, Any]] | None] = {"co_sold": None, "texts": None}
    if evidence.co_sold is not None and (evidence.co_sold >= 0).any():
        found["co_sold"] = neighbour_purity(codes, evidence.co_sold)
    if evidence.texts is not None and (evidence.texts[1] >= 0).any():
        rows, neighbours = evidence.texts
        found["texts"] = neighbour_purity(codes, neighbours, rows)
    return found


def _group(ids: SemanticIDs, rows: Sequence[int]) -> dict[str, Any]:
    items = [{"item_id": ids.item_ids[row], "title": ids.titles[row]} for row in rows[:GROUP_ITEMS]]
    return {"code": ids.codes[rows[0]].tolist(), "size": len(rows), "items": items}


def _curve(counts: Sequence[int]) -> dict[str, list[int]]:
    """Items per code by falling number, of at most `CURVE_POINTS` ranks that keep the first and the last."""
    falling = np.sort(np.asarray(counts))[::-1]
    ranks = np.unique(np.linspace(0, len(falling) - 1, min(len(falling), CURVE_POINTS)).round().astype(int))
    return {"rank": (ranks + 1).tolist(), "items": falling[ranks].tolist()}


def _duplicates(ids: SemanticIDs, texts: npt.NDArray[np.floating] | None, evidence: Evidence) -> dict[str, int | None]:
    titled = Counter(title for item, title in zip(ids.item_ids, ids.titles, strict=True) if title != item)
    found: dict[str, int | None] = {
        "titles": sum(count for count in titled.values() if count > 1),
        "texts": None,
        "queried": None,
    }
    if texts is not None and evidence.texts is not None:
        rows, nearest = evidence.texts[0], evidence.texts[1][:, 0]
        one = np.asarray(texts[rows[nearest >= 0]], dtype=np.float64)
        other = np.asarray(texts[nearest[nearest >= 0]], dtype=np.float64)
        norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        same = (one * other).sum(axis=1) >= SAME_TEXT * norms
        found |= {"texts": int(same.sum()), "queried": len(rows)}
    return found


def _reachable(ceiling: dict[str, float] | None, known: int, missed: int) -> dict[str, float] | None:
    if ceiling is None:
        return None if not missed else {f"{metric}@{k}": 0.0 for metric in ("HR", "NDCG") for k in KS}
    return {name: value * known / (known + missed) for name, value in ceiling.items()}


def _quantised(ids: SemanticIDs, evidence: Evidence, seed: int) -> dict[str, Any] | None:
    """The codes as they were quantised: exactly if a digit was appended, else as far as the build's record says."""
    recorded = ids.origin.get("collisions")
    record = dict(recorded) if isinstance(recorded, Mapping) else {}
    before = record.get("distortion_before")
    facts = {
        "policy": record.get("policy", recorded if isinstance(recorded, str) else None),
        "moved_items": record.get("moved_items"),
        "added_share": record["added_distortion"] / before if before else None,
    }
    levels = ids.quantised_levels
    if levels < ids.num_levels and not facts["moved_items"]:
        return facts | _headline(ids.codes[:, :levels], ids.codebook_sizes[:levels], evidence, seed)
    if not record:
        return None
    kept = ("items", "collision_rate", "sharing_rate", "largest_group")
    return facts | {"levels": levels} | {key: record.get(key) for key in kept}


def _comparison(ids: SemanticIDs, name: str, other: SemanticIDs, evidence: Evidence, seed: int) -> dict[str, Any]:
    theirs = other.rows_of(ids.item_ids)
    rows = np.flatnonzero(theirs >= 0)
    facts: dict[str, Any] = {
        "name": name,
        "items": len(other),
        "shared_items": len(rows),
        "codebook_sizes_known": other.codebook_sizes_known,
    }
    if not len(rows):
        return facts | {"these": None, "other": None}
    shared = evidence.of(rows, len(ids))
    return facts | {
        "these": _headline(ids.codes[rows], ids.codebook_sizes, shared, seed),
        "other": _headline(other.codes[theirs[rows]], other.codebook_sizes, shared, seed),
    }


def _versions() -> dict[str, str]:
    import faiss

    return {"llmrec": __version__, "numpy": np.__version__, "faiss": str(faiss.__version__)}

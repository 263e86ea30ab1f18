"""Verdict: what a doctor's report says in words. Each finding is what was found, and what to try."""

from collections.abc import Iterator
from typing import Any, Literal

from llmrec.diagnostics import advice

Level = Literal["ok", "note", "warning"]
Finding = dict[str, Any]

# Of a codebook's codes. Healthy quantizers use all but a few; collapsed ones (RQ-VAE) are reported far below a half.
FEW_USED, SOME_UNUSED = 0.5, 0.9
# Perplexity by codes. Later levels of residual k-means have 0.11 to 0.2 on catalogs of some thousand items and do no
# harm there; what lies below has collapsed.
COLLAPSED, UNEVEN = 0.1, 0.25
# Items that share an ID. Up to a hundredth costs any metric less than the noise of a test of some thousand users.
MANY_SHARE = 0.01
# The same before collisions were resolved: beyond a fifth the last code no longer says what an item is like.
OFTEN_SHARED, MOSTLY_SHARED = 0.2, 0.5
# What resolving may add to the squared error before codes mean something else.
MUCH_ADDED = 0.05
# A first code is a giant if it has a tenth of the items and eight times what an even spread gives it.
GIANT_SHARE, GIANT_TIMES = 0.1, 8
# Below a tenth of a bit a level decides for fewer than one item in seventy between two children (H(0.013) = 0.1).
NOTHING_BITS = 0.1
# Items that share the prefix before a level which should tell them apart.
STILL_SHARED = 0.05
# Half of the items with a first code of their own: the codes are names, and nothing is learnt of one from another.
ALONE_EARLY = 0.5
# Fewer items per code do not place a centroid, they are its centre (k-means' own rule of thumb is some 40).
ITEMS_PER_CODE = 5
# Purity that is above chance by so little, in ratio and in difference, is no structure that a model could use.
FAINT_LIFT, FAINT_PURITY = 1.5, 0.1
# Squared error by that of one point for all: healthy tokenizers of 3 x 256 codes have 0.4 to 0.5.
POOR_ERROR, MEDIOCRE_ERROR = 0.8, 0.6
# Of the reference's best 10, what a beam search keeps: 50 beams are the default of serving, 20 the usual in papers.
BEAM_WIDTH, BEAM_RECALL = 50, 0.95
SLIM_WIDTH, SLIM_RECALL = 20, 0.9
# Two standard errors of the difference between two tables on 500 test cases are below it.
BEAM_NOISE = 0.02
# Equal texts: unavoidable in any catalog up to a hundredth, beyond a tenth a fault of the table.
SOME_EQUAL, MANY_EQUAL = 0.01, 0.1
# Test targets without a semantic ID, which nothing can hit.
MANY_MISSED = 0.01

_KINDS = {"co_sold": "items sold together", "texts": "items with the nearest texts"}


def verdicts(report: dict[str, Any]) -> list[Finding]:
    """The findings of a report (see `llmrec.diagnostics.report.report`), warnings first, then notes.

    Returns:
        {"check", "level": "ok" | "note" | "warning", "sentence", "value"} each; `value` is the figure that the level
        was decided by. Only what is wrong or worth knowing is there; without a warning one "ok" says so, last.
    """
    found = [
        *_used(report),
        *_even(report),
        *_shared(report),
        *_as_quantised(report),
        *_giant(report),
        *_late(report),
        *_alone(report),
        *_few_items(report),
        *_neighbours(report),
        *_error(report),
        *_beams(report),
        *_equal_texts(report),
        *_missed(report),
        *_unknown(report),
    ]
    if all(finding["level"] != "warning" for finding in found):
        sentence = (
            f"Nothing is wrong with these semantic IDs: {report['items']:,} items with {report['levels']} code(s) "
            f"each{_strengths(report)}. Train on them."
        )
        found.append(_finding("health", "ok", sentence, None))
    order = {"warning": 0, "note": 1, "ok": 2}
    return sorted(found, key=lambda finding: order[finding["level"]])


def _used(report: dict[str, Any]) -> Iterator[Finding]:
    quantizer = report["source"]["quantizer"]
    if not advice.has_vectors(quantizer):
        return
    for level in _quantised(report):
        possible = min(level["codebook_size"], report["items"])
        share = level["used"] / possible
        if share >= SOME_UNUSED:
            continue
        learnt = advice.has_centroids(quantizer)
        yield _finding(
            "dead codes",
            "warning" if share < FEW_USED and learnt else "note",
            f"Level {level['level']} uses {level['used']:,} of {possible:,} codes ({_percent(share)}): the others are "
            f"tokens that nothing teaches. {advice.against_dead_codes(quantizer, _smaller(level['used']))}.",
            share,
        )


def _even(report: dict[str, Any]) -> Iterator[Finding]:
    quantizer = report["source"]["quantizer"]
    if not advice.has_vectors(quantizer):
        return
    for level in _quantised(report):
        # Codes that nobody uses are told by themselves.
        if level["used"] < FEW_USED * min(level["codebook_size"], report["items"]):
            continue
        share = level["perplexity"] / min(level["codebook_size"], report["items"])
        if share >= UNEVEN:
            continue
        yield _finding(
            "uneven codes",
            "warning" if share < COLLAPSED and advice.has_centroids(quantizer) else "note",
            f"Level {level['level']} uses its codes unevenly: its perplexity is {level['perplexity']:,.1f} of "
            f"{level['codebook_size']:,} ({_percent(share)}), and the commonest code has "
            f"{_percent(level['largest_share'])} of the items. {advice.against_uneven_codes(quantizer)}.",
            share,
        )


def _shared(report: dict[str, Any]) -> Iterator[Finding]:
    section, share = report["collisions"], report["sharing_rate"]
    if not section["sharing_items"]:
        return
    ceiling = report["ceiling"]["collision"]
    costs = f", so that a perfect model reaches HR@1 {ceiling['HR@1']:.3f} at most" if ceiling else ""
    yield _finding(
        "collisions",
        "warning" if share > MANY_SHARE else "note",
        f"{section['sharing_items']:,} items ({_percent(share)}) share their ID with another, at most "
        f"{section['largest_group']:,} one ID{costs}; every item needs an ID of its own. "
        f"{advice.against_shared_codes(report['source']['quantizer'])}.",
        share,
    )


def _as_quantised(report: dict[str, Any]) -> Iterator[Finding]:
    section = report["quantised"]
    if section is None or not section.get("sharing_rate") or report["collisions"]["sharing_items"]:
        return
    share, added, quantizer = section["sharing_rate"], section["added_share"], report["source"]["quantizer"]
    if share > OFTEN_SHARED:
        how = {"append": "the appended code tells them apart", "reassign": "other last codes tell them apart"}
        resolved = how.get(section["policy"], "they were told apart afterwards")
        yield _finding(
            "collisions as quantised",
            "warning" if share > MOSTLY_SHARED else "note",
            f"{_percent(share)} of the items shared an ID as quantised, and {resolved}, which says nothing of what "
            f"they are. {advice.against_alike_vectors(quantizer)}.",
            share,
        )
    if added is not None and added > MUCH_ADDED and advice.has_vectors(quantizer):
        yield _finding(
            "cost of reassignment",
            "note",
            f"{section['moved_items']:,} items have other last codes than their vectors asked for, which added "
            f"{_percent(added)} to the squared error. "
            f"Try --collisions append, or {advice.larger_codebook(quantizer)}.",
            added,
        )


def _giant(report: dict[str, Any]) -> Iterator[Finding]:
    level = report["usage"][0]
    share, size = level["largest_share"], min(level["codebook_size"], report["items"])
    if share > GIANT_SHARE and share > GIANT_TIMES / size:
        yield _finding(
            "giant prefix",
            "warning",
            f"{_percent(share)} of the items have the same first code, {share * size:.0f} times an even share: below "
            f"it, all is left to the later codes. {advice.against_a_giant(report['source']['quantizer'])}.",
            share,
        )


def _late(report: dict[str, Any]) -> Iterator[Finding]:
    branching = report["branching"]
    for before, level, usage in zip(branching, branching[1:], report["usage"][1:], strict=False):
        if level["level"] > report["quantised_levels"]:
            continue
        bits, shared = level["conditional_entropy_bits"], 1 - before["alone_share"]
        if bits >= NOTHING_BITS:
            continue
        resolved = (level["alone_share"] - before["alone_share"]) / shared if shared else 1.0
        if shared > STILL_SHARED and resolved < STILL_SHARED:
            what = "has one code for all items" if usage["used"] == 1 else "says what the codes before it say"
            yield _finding(
                "level without information",
                "warning",
                f"Level {level['level']} {what} ({bits:.2f} bits), though {_percent(shared)} of the items still share "
                "the codes before it. Look at how this level was made: its input may be constant, or its codebook "
                "collapsed; else drop it with --num-levels.",
                bits,
            )
        else:
            yield _finding(
                "more levels than needed",
                "note",
                f"After {before['level']} code(s) {_percent(before['alone_share'])} of the items are alone, and level "
                f"{level['level']} adds {bits:.2f} bits: a token per item for little. Try --num-levels "
                f"{before['level']} or {advice.smaller_codebook(report['source']['quantizer'])}.",
                bits,
            )


def _alone(report: dict[str, Any]) -> Iterator[Finding]:
    share = report["branching"][0]["alone_share"]
    quantizer = report["source"]["quantizer"]
    if share > ALONE_EARLY and report["items"] > 1:
        # The steps of scalar quantisation are given, however few the items.
        more = "" if quantizer == advice.SCALAR else " and more levels"
        yield _finding(
            "IDs like names",
            "note" if quantizer == advice.SCALAR else "warning",
            f"{_percent(share)} of the items have a first code of their own: an ID is a name then, and nothing learnt "
            f"of one item helps another. Try {advice.smaller_codebook(quantizer)}{more}.",
            share,
        )


def _few_items(report: dict[str, Any]) -> Iterator[Finding]:
    if not advice.has_centroids(report["source"]["quantizer"]):
        return
    size = max(level["codebook_size"] for level in _quantised(report))
    per_code = report["items"] / size
    if per_code < ITEMS_PER_CODE and report["branching"][0]["alone_share"] <= ALONE_EARLY:
        yield _finding(
            "few items for the codebook",
            "warning",
            f"{report['items']:,} items for {size:,} codes are {per_code:.1f} per code: codes stand for single items, "
            f"not for kinds. Try --codebook-size {_smaller(max(2, report['items'] // (2 * ITEMS_PER_CODE)))}.",
            per_code,
        )


def _neighbours(report: dict[str, Any]) -> Iterator[Finding]:
    known = {kind: rows[0] for kind, rows in report["neighbours"].items() if rows and rows[0]["purity"] is not None}
    faint = [kind for kind in known if _is_faint(known[kind])]
    if not faint:
        return
    told = "; ".join(
        f"{_percent(known[kind]['purity'])} of {_KINDS[kind]} have the same first code (by chance "
        f"{_percent(known[kind]['chance'])})"
        for kind in known
    )
    if report["source"]["quantizer"] == "hash":
        sentence = f"{told}. This is the control that hashes item ids: compare others with it, and serve none of it."
        yield _finding("codes like a hash", "warning", sentence, known[faint[0]]["lift"])
    elif len(faint) == len(known):
        sentence = (
            f"The codes are like a hash of the items: {told}. "
            f"{advice.against_hash_likeness(report['source']['quantizer'])}."
        )
        yield _finding("codes like a hash", "warning", sentence, known[faint[0]]["lift"])
    elif faint == ["co_sold"]:
        sentence = (
            f"The codes follow the texts but not what sells together: {told}. "
            f"{advice.towards_the_sales(report['source']['quantizer'])}."
        )
        yield _finding("codes beside the sales", "warning", sentence, known["co_sold"]["lift"])
    else:
        sentence = (
            f"The codes follow what sells together but not the texts: {told}. That is as it should be for a high "
            "--collaborative-weight; new items without sales will get codes that say little, so try a lower one."
        )
        if report["source"]["quantizer"] == advice.TITLES:
            sentence = f"The codes follow what sells together but not the texts' embeddings: {told}. Use one of both."
        yield _finding("codes beside the texts", "note", sentence, known["texts"]["lift"])


def _is_faint(row: dict[str, Any]) -> bool:
    purity, chance = float(row["purity"]), float(row["chance"])
    if row["interval95"] is not None and row["interval95"][0] <= chance:
        return purity < 1  # one code for all is another finding
    return purity < FAINT_LIFT * chance and purity - chance < FAINT_PURITY


def _error(report: dict[str, Any]) -> Iterator[Finding]:
    section = report["reconstruction"]
    if section is None or section["relative"] is None or section["relative"] <= MEDIOCRE_ERROR:
        return
    error = section["relative"]
    if report["source"]["quantizer"] == "hash":
        return
    yield _finding(
        "reconstruction",
        "warning" if error > POOR_ERROR else "note",
        f"The codes keep {_percent(max(0.0, 1 - error))} of the vectors' variance (relative error {error:.2f}; 1 is "
        f"one point for all items). Try {advice.larger_codebook(report['source']['quantizer'])}, more levels, or "
        "another --quantizer; and check that the embeddings are those that were quantised.",
        error,
    )


def _beams(report: dict[str, Any]) -> Iterator[Finding]:
    section, quantizer = report["ceiling"], report["source"]["quantizer"]
    recall, control = _kept(section["beam"]), _kept(section.get("beam_random"))
    wide, slim = recall.get(BEAM_WIDTH), recall.get(SLIM_WIDTH)
    told = ", ".join(f"{_percent(share)} with {width}" for width, share in sorted(recall.items()))
    told = f"A beam search keeps of the {section['k']} items that {section['reference']} finds best: {told} beams"
    random = control.get(BEAM_WIDTH)
    if random is not None:
        told += f" (through random codes of these sizes {_percent(random)} with {BEAM_WIDTH})"
    # Nothing learnt is lost by the control itself.
    compared = random if quantizer != advice.CONTROL else None
    if wide is not None and wide < BEAM_RECALL and compared is not None and wide < compared - BEAM_NOISE:
        sentence = (
            f"{told}. That is less than random codes keep: what one user chooses among is below too many prefixes. "
            f"Search with more beams, or try {advice.against_lost_beams(quantizer)}."
        )
        yield _finding("beams", "warning", sentence, wide)
    elif wide is not None and wide < BEAM_RECALL:
        sentence = f"{told}. A model that is surer of itself than this reference loses less; else search with more."
        yield _finding("beams", "note", sentence, wide)
    elif slim is not None and slim < SLIM_RECALL:
        sentence = (
            f"{told}. A model that is surer of itself than this reference loses less; else search with {BEAM_WIDTH} "
            "or more."
        )
        yield _finding("beams", "note", sentence, slim)


def _kept(beam: dict[str, Any] | None) -> dict[int, float]:
    """What is known to be kept, by width."""
    shares = {} if beam is None else beam["recall"]
    return {int(width): share for width, share in shares.items() if share is not None}


def _equal_texts(report: dict[str, Any]) -> Iterator[Finding]:
    section = report["duplicates"]
    by_text = section["texts"] is not None
    count = section["texts"] if by_text else section["titles"]
    share = count / max(1, section["queried"] if by_text else report["items"])
    if share <= SOME_EQUAL:
        return
    if by_text:
        told = "have the same text as another, which no quantizer of texts tells apart"
    else:
        told = "have the same title as another, which only their other columns tell apart"
    yield _finding(
        "equal texts" if by_text else "equal titles",
        "warning" if share > MANY_EQUAL and by_text else "note",
        f"{count:,} items ({_percent(share)}) {told}. "
        f"{advice.against_equal_texts(report['source']['quantizer'], by_text)}.",
        share,
    )


def _missed(report: dict[str, Any]) -> Iterator[Finding]:
    count, targets = report["ceiling"]["targets_without_id"], report["ceiling"]["targets"]
    if not count:
        return
    yield _finding(
        "targets without an ID",
        "warning" if count / targets > MANY_MISSED else "note",
        f"{count:,} of {targets:,} test targets ({_percent(count / targets)}) have no semantic ID, so that nothing "
        "can hit them. Build the IDs from a table that holds all items of the log.",
        count / targets,
    )


def _unknown(report: dict[str, Any]) -> Iterator[Finding]:
    if not report["codebook_sizes_known"]:
        sizes = " × ".join(f"{size:,}" for size in report["codebook_sizes"])
        yield _finding(
            "codebook sizes",
            "note",
            f"How many codes each level could have is not recorded; by the codes that occur it is {sizes}. Read the "
            "shares of unused codes with this in mind.",
            None,
        )
    for part, why in report["skipped"].items():
        yield _finding(f"{part} left out", "note", why, None)


def _quantised(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The usage of the levels that a quantizer gave: an appended digit is uneven by its nature."""
    levels: list[dict[str, Any]] = report["usage"][: report["quantised_levels"]]
    return levels


def _strengths(report: dict[str, Any]) -> str:
    """What is known to be good, as a part of the sentence."""
    parts = []
    if not report["collisions"]["sharing_items"]:
        parts.append("no two alike")
    if report["neighbour_purity"] is not None:
        row = report["neighbours"][report["neighbour_kind"]][0]
        parts.append(
            f"{_percent(row['purity'])} of {_KINDS[report['neighbour_kind']]} have the same first code (by chance "
            f"{_percent(row['chance'])})"
        )
    kept = _kept(report["ceiling"]["beam"]).get(BEAM_WIDTH)
    if kept is not None:
        parts.append(f"{BEAM_WIDTH} beams keep {_percent(kept)} of a reference's best")
    return "".join(f", {part}" for part in parts)


def _smaller(size: int) -> int:
    """The largest power of two up to `size`, at least 2.

    >>> [_smaller(size) for size in (1, 31, 64)]
    [2, 16, 64]
    """
    return 1 << max(1, size.bit_length() - 1)


def _finding(check: str, level: Level, sentence: str, value: float | None) -> Finding:
    return {"check": check, "level": level, "sentence": sentence, "value": value}


def _percent(share: float) -> str:
    """A share as people read it, with more digits where it is small.

    >>> _percent(0.4352), _percent(0.00012), _percent(0), _percent(1)
    ('43.5 %', '0.012 %', '0 %', '100 %')
    """
    if share in (0, 1):
        return f"{100 * share:.0f} %"
    return f"{100 * share:.1f} %" if share >= 0.01 else f"{100 * share:.2g} %"

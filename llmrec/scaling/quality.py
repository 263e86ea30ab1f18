"""Data quality: how much there is to learn from in a log and in shares of its users, beside published logs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from llmrec.data.split import Split
from llmrec.data.subset import learnt_events, learnt_split
from llmrec.exceptions import DataError
from llmrec.scaling.entropy import MAX_TOKENS, Places, entropies

SHARES = (0.25, 0.5, 1.0)


@dataclass(frozen=True)
class PublishedLog:
    """A log as the Performance Law's authors describe it (P-Law, NeurIPS 2025, table 3).

    Attributes:
        name: of the log.
        longest: how many of a user's latest items were kept.
        tokens: as printed.
        quality: S' = 1 / S, as printed.
    """

    name: str
    longest: int
    tokens: int
    quality: float

    @property
    def effective_data(self) -> float:
        """D' = tokens * S'."""
        return self.tokens * self.quality


# The tokens of Industrial are printed in millions.
PUBLISHED = (
    PublishedLog("KR-Pure", 25, 447_407, 0.2998),
    PublishedLog("KR-Pure", 50, 570_537, 0.3153),
    PublishedLog("KR-Pure", 100, 661_028, 0.3544),
    PublishedLog("ML-1M", 100, 505_108, 0.1864),
    PublishedLog("ML-1M", 150, 802_493, 0.1856),
    PublishedLog("ML-1M", 200, 1_058_511, 0.1854),
    PublishedLog("AMZ-Books", 25, 7_076_238, 0.1129),
    PublishedLog("AMZ-Books", 50, 8_044_865, 0.1130),
    PublishedLog("Industrial", 25, 327_500_000, 0.4001),
    PublishedLog("Industrial", 50, 513_900_000, 0.3769),
)
PUBLISHED_NOTE = (
    "The published S' are of code that computes the dictionary variant, and on MovieLens-1M they lie nearer to it. "
    "The tokens printed for ML-1M at 200 are more than that log has (1,000,209), and those printed for KR-Pure are, "
    "within 0.1 %, MovieLens-1M's own at 100, 150 and 200: take the published D' of these two as orders of magnitude."
)


def data_quality(
    split: Split,
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    longest: int | None = None,
    max_tokens: int = MAX_TOKENS,
    announce: Callable[[str, float | None], None] = lambda name, done: None,
) -> dict[str, Any]:
    """How much information the training part holds, all of it and shares of its users.

    Only what a next-item model learns from counts (`llmrec.data.subset.learnt_events`): the training sequences of two
    interactions or more. So `tokens` and `quality` are those of a training with `--train_share` and
    `--train_share_seed`, as the scaling laws take them. The shares are nested.

    Args:
        split: whose training part.
        shares: of the users who have training interactions, in (0, 1]; the whole is always looked at, too.
        seed: by which the users are drawn, and tokens where there are more than `max_tokens`.
        longest: only so many of each user's latest training interactions; None: all.
        max_tokens: entropies are of whole users with no more tokens than these; see `llmrec.scaling.entropy`.
        announce: is told what is computed next, and how much of all is done.

    Returns:
        JSON-ready, all numbers finite:

        * protocol, content_hash, seed, longest;
        * users, items, tokens, median_length, mean_length, of the whole;
        * repeat_rate: the share of tokens whose item the user had before;
        * looked_at: users and tokens that the entropies are of;
        * the figures of `llmrec.scaling.entropy.entropies`, without users, tokens and tokens_in_all;
        * shares: the same of every share, from the smallest to the whole, beside its `share`;
        * published: a list of name, longest, tokens, quality, effective_data;
        * nearest: the published log whose effective data are nearest, with name, longest, and the ratio of ours to it;
        * notes: sentences on what to beware of.

    Raises:
        DataError: if a share is none, `longest` is less than 2, or there is nothing to learn from.
    """
    if longest is not None and longest < 2:
        raise DataError(
            f"The longest sequence is {longest}, in which nothing follows on anything. Give 2 interactions or more."
        )
    if wrong := [share for share in shares if not 0 < share <= 1]:
        raise DataError(f"A share is {wrong[0]}. Give shares of the users above 0, and at most 1.")
    chosen = sorted({*shares, 1.0})
    parts = [learnt_split(split, share, seed) for share in chosen]
    seen = [learnt_events(part, longest) for part in parts]
    for share, events in zip(chosen, seen, strict=True):
        if not events.any():
            raise DataError(
                f"{share:.0%} of the users have no training sequence of two interactions, so there is nothing to "
                "learn. Give larger shares, or more interactions."
            )
    whole = sum(min(int(events.sum()), max_tokens) for events in seen)
    done = 0
    found: list[dict[str, Any]] = []
    for share, part, events in zip(chosen, parts, seen, strict=True):
        lengths = np.bincount(part.owner[events], minlength=len(part.all_users))

        def told(name: str, share: float = share, done: int = done) -> None:
            announce(f"{name}, {share:.0%} of the users", done / whole)

        found.append(_of_share(part, lengths, seed, max_tokens, told))
        done += min(int(events.sum()), max_tokens)
    return {
        "protocol": dict(split.protocol),
        "content_hash": split.content_hash,
        "seed": seed,
        "longest": longest,
        **found[-1],
        "shares": [{"share": share, **figures} for share, figures in zip(chosen, found, strict=True)],
        "published": [
            {
                **{"name": log.name, "longest": log.longest, "tokens": log.tokens, "quality": log.quality},
                "effective_data": log.effective_data,
            }
            for log in PUBLISHED
        ],
        "nearest": _nearest(found[-1]["effective_data"]),
        "notes": list(_notes(found[-1])),
    }


def _of_share(
    split: Split, lengths: Places, seed: int, max_tokens: int, announce: Callable[[str], None]
) -> dict[str, Any]:
    """Counts and figures of each user's latest training interactions, `lengths` (U,) of them."""
    ends = split.train_ends
    starts = ends - lengths
    places = np.arange(len(split.rows))
    inside = (places >= starts[split.owner]) & (places < ends[split.owner])
    rows, owner = split.rows[inside], split.owner[inside]
    kept = lengths[lengths > 0]
    pairs = len(np.unique(owner * split.num_items + rows))
    figures = entropies(split.rows, starts, ends, seed, max_tokens, announce)
    return {
        "users": len(kept),
        "items": len(np.unique(rows)),
        "tokens": len(rows),
        "median_length": float(np.median(kept)),
        "mean_length": float(kept.mean()),
        "repeat_rate": 1 - pairs / len(rows),
        "looked_at": {"users": figures.pop("users"), "tokens": figures.pop("tokens")},
        **{name: value for name, value in figures.items() if name != "tokens_in_all"},
    }


def _nearest(effective: float) -> dict[str, Any]:
    log = min(PUBLISHED, key=lambda log: abs(math.log(effective / log.effective_data)))
    return {"name": log.name, "longest": log.longest, "ratio": effective / log.effective_data}


def _notes(whole: dict[str, Any]) -> list[str]:
    notes = []
    if whole["approximate_users"]["warning"]:
        notes.append(whole["approximate_users"]["warning"])
    looked = whole["looked_at"]
    if looked["tokens"] < whole["tokens"]:
        notes.append(
            f"Entropies are of {looked['users']:,} users drawn at random, with {looked['tokens']:,} of "
            f"{whole['tokens']:,} tokens. S' hangs a little on how many are looked at."
        )
    notes.append(PUBLISHED_NOTE)
    return notes

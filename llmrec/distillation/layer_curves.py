"""Which layers of a trained recommender matter: it is asked the same cases with some of its layers left out.

Nothing is trained: a curve says what a layer does in this model, not what a model trained without it would do.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from llmrec.distillation.layer_stack import LayerStack
from llmrec.evaluation.metrics import values
from llmrec.evaluation.ranks import Ranks
from llmrec.evaluation.uncertainty import bootstrap_means, paired_difference
from llmrec.exceptions import BackboneError, DataError
from llmrec.recommender import Recommender

if TYPE_CHECKING:
    from llmrec.data.split import Part, Split
    from llmrec.examples import Row
    from llmrec.sequence.histories import History
    from llmrec.sequence.recommender import SequenceRecommender

Table = npt.NDArray[np.float64]
Announce = Callable[[str, float | None], None]

METRICS = ("NDCG@10", "HR@10", "loss")
_K = 10
_AT_ONCE = 32  # rows of tokens that a language model reads for their loss


@dataclass
class LayerCases:
    """Held-out cases that a recommender is asked, whatever layers it has at the moment.

    Attributes:
        recommender: of a language model, or of a sequence model.
        split: of the cases.
        cases: (C,) places in `part`.
        part: which part.
        num_beams: of a language model's searches.
    """

    recommender: Recommender
    split: "Split"
    cases: npt.NDArray[np.int64]
    part: "Part" = "valid"
    num_beams: int = 20
    _rows: "list[Row]" = field(init=False, default_factory=list)
    _asked: "list[History]" = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        """Raises DataError if there is no case, or the recommender's items are not the split's."""
        from llmrec.sequence.histories import LoggedHistories
        from llmrec.sequence.recommender import SequenceRecommender

        if not len(self.cases):
            raise DataError(
                f"The {self.part} part has no case, so no layer can be told from another. Give more users."
            )
        if self.recommender.catalog.ids != self.split.item_ids:
            raise DataError(
                f"The artefact has {len(self.recommender.catalog)} items and the split {self.split.num_items}, or "
                "others. Give the interactions that it was trained on."
            )
        every = self.split.histories(self.part)
        self._histories = [every[case].tolist() for case in self.cases.tolist()]
        self._targets = self.split.targets(self.part)[self.cases]
        self._events: list[Any] | None = None
        if isinstance(self.recommender, SequenceRecommender):
            told = self.recommender.model.events
            self._asked = LoggedHistories(self.split, told).cases(self.part, self.cases)
        else:
            self._read()

    @property
    def users(self) -> npt.NDArray[np.int64]:
        """(C,) whose cases they are."""
        return self.split.case_users(self.part)[self.cases]

    def table(self) -> Table:
        """(C, 3) every case's NDCG@10, HR@10 and loss: the target's negative log-probability, in nats.

        Of a language model that is the sum over its tokens; items of the history are no candidates in the ranking.
        """
        places, lost = self._ranked() if self._asked else (self._searched(), self.losses())
        ranks = Ranks(places, np.zeros(len(places), dtype=np.int64))
        return np.stack([values(ranks, "NDCG", _K), values(ranks, "HR", _K), lost], axis=1)

    def losses(self) -> Table:
        """(C,) the last column of `table`, without a search."""
        return self._ranked()[1] if self._asked else self._of_tokens()

    def _read(self) -> None:
        from llmrec.examples import next_item_rows
        from llmrec.prompt import EVENT_COLUMNS
        from llmrec.tasks.events import LoggedEvents
        from llmrec.vocabulary import PlainText, start_token

        asked = self.recommender
        if needed := sorted(asked.prompt.variables - {"history"}):
            raise DataError(
                f"The artefact's prompt shows {', '.join(needed)} beside the history, which is not given here. Ask a "
                "model whose prompt shows the history alone."
            )
        if asked.prompt.attributes & set(EVENT_COLUMNS):
            self._events = LoggedEvents(self.split).of_cases(self.part, self.cases.tolist())
        histories = [np.array(one, dtype=np.int64) for one in self._histories]
        text, start = PlainText(asked.tokenizer), start_token(asked.tokenizer)
        self._rows = list(
            next_item_rows(
                *(asked.prompt, asked.catalog, histories, self._targets.tolist(), text, start),
                asked.settings.max_history,
                self._events,
            )
        )

    def _searched(self) -> npt.NDArray[np.int64]:
        lists, _ = self.recommender.recommend_rows(self._histories, _K, num_beams=self.num_beams, events=self._events)
        return Ranks.from_lists(lists, self._targets).better

    def _of_tokens(self) -> Table:
        import torch

        from llmrec.training.batches import padded
        from llmrec.training.head import HeadLoss

        model = self.recommender.model
        softmax = self.recommender.catalog.softmax_tokens(self.recommender.settings.softmax)
        head = HeadLoss(model, None if softmax is None else softmax.tolist())
        found = np.zeros(len(self._rows))
        order = sorted(range(len(self._rows)), key=lambda place: (len(self._rows[place]["input_ids"]), place))
        with torch.no_grad():
            for begin in range(0, len(order), _AT_ONCE):
                some = order[begin : begin + _AT_ONCE]
                batch = padded([self._rows[place] for place in some])
                ids, labels = (batch[name].to(model.device) for name in ("input_ids", "labels"))
                lost = head(model, {"input_ids": ids}, labels)
                owner = lost.places.div(labels.shape[1], rounding_mode="floor")
                sums = torch.zeros(len(some), dtype=torch.float64, device=model.device)
                found[some] = sums.index_add_(0, owner, lost.each.double()).cpu().numpy()
        return found

    def _ranked(self) -> tuple[npt.NDArray[np.int64], Table]:
        from llmrec.sequence.scores import CaseScores
        from llmrec.sequence.trainer import places_of_targets

        model = cast("SequenceRecommender", self.recommender).model
        places, lost, begin = [], [], 0
        for scores in CaseScores(model, []).batches(self._asked):
            some = self._asked[begin : begin + len(scores)]
            better, loss = places_of_targets(
                scores, [one.rows for one in some], self._targets[begin : begin + len(scores)].astype(np.int64)
            )
            places.append(better.cpu().numpy())
            lost.append(loss.double().cpu().numpy())
            begin += len(scores)
        return np.concatenate(places), np.concatenate(lost)


def layer_curves(
    cases: LayerCases,
    greedy: bool = False,
    resamples: int = 1000,
    seed: int = 0,
    announce: Announce | None = None,
) -> dict[str, Any]:
    """What each layer adds, JSON-ready.

    * `drop_one`: the model without one layer, for each of its M layers.
    * `keep_first`: its first k layers, k from 1 to M - 1; final norm and head stay.
    * `greedy`, if asked for: layers removed one after another, each time the one whose removal leaves the lowest mean
      loss (of equal ones the deepest), down to one layer.

    Args:
        cases: that are asked; the model is as before afterwards.
        greedy: whether the third curve is made: M² / 2 measurements of the loss more.
        resamples: of the intervals, over users.
        seed: of these.
        announce: is told what is measured, and how much is done.

    Returns:
        `layers` (M), `cases`, `users`, `part`, `whole` (per metric its mean and `interval95`) and the curves, each a
        list of points: `removed` and `kept` (places of layers), and per metric `mean`, `difference` to the whole model
        and `difference interval95`, paired by case. `advice`: see `advice`.

    Raises:
        BackboneError: if the model has no list of layers, or but one.
    """
    stack = LayerStack(cases.recommender.model)
    depth = len(stack)
    if depth < 2:
        raise BackboneError("The model has one layer and none to spare. Ask a deeper one.")
    every = list(range(depth))
    plan = [("drop_one", [n for n in every if n != place]) for place in every]
    plan += [("keep_first", every[:count]) for count in range(depth - 1, 0, -1)]
    # A search counts as much as some losses.
    steps = 1 + len(plan) + (depth - 1 + depth if greedy else 0)
    done = 0

    def tell(name: str) -> None:
        nonlocal done
        if announce is not None:
            announce(name, done / steps)
        done += 1

    tell("the whole model")
    whole, users = cases.table(), cases.users
    mean = bootstrap_means(whole, users, resamples=resamples, seed=seed)
    curves: dict[str, list[dict[str, Any]]] = {"drop_one": [], "keep_first": []}

    def point(kept: list[int]) -> dict[str, Any]:
        with stack.only(kept):
            found = cases.table()
        return _point(every, kept, found, whole, users, resamples, seed)

    for name, kept in plan:
        tell(f"layers {kept}" if depth < 8 else f"{len(kept)} layers")
        curves[name].append(point(kept))
    if greedy:
        curves["greedy"] = []
        for kept in _greedy(cases, stack):
            tell(f"greedy: {len(kept)} layers")
            curves["greedy"].append(point(kept))
    found: dict[str, Any] = {
        "layers": depth,
        "part": cases.part,
        "cases": len(whole),
        "users": len(np.unique(users)),
        "resamples": resamples,
        "seed": seed,
        "whole": {
            name: {"mean": float(mean.mean[m]), "interval95": [float(mean.low[m]), float(mean.high[m])]}
            for m, name in enumerate(METRICS)
        },
        **curves,
    }
    return found | {"advice": advice(found)}


def advice(found: dict[str, Any]) -> str:
    """How many layers could go, in a sentence or two.

    Counted is along the greedy curve, or else the first layers kept: the most removed layers such that neither they
    nor fewer of them leave the whole of NDCG@10's paired 95 % interval below 0.
    """
    name = "greedy" if "greedy" in found else "keep_first"
    how = "removed greedily" if name == "greedy" else "removed from the end"
    spared: dict[str, Any] | None = None
    for one in found[name]:
        if one["NDCG@10"]["difference interval95"][1] < 0:
            break
        spared = one
    least = min(found["drop_one"], key=lambda one: (-one["NDCG@10"]["mean"], one["removed"]))
    single = f"The layer that is missed least is {least['removed'][0]} ({_said(least)})."
    if spared is None:
        return (
            f"No layer could go: already the first of {found['layers']} {how} lowers NDCG@10 "
            f"({_said(found[name][0])}). {single}"
        )
    count = len(spared["removed"])
    return (
        f"{count} of {found['layers']} layers {how} could go before NDCG@10 falls beyond its interval "
        f"({_said(spared)}); that it does not fall at all is not said, and training on without them may gain more. "
        f"{single}"
    )


def _said(one: dict[str, Any]) -> str:
    low, high = one["NDCG@10"]["difference interval95"]
    return f"{one['NDCG@10']['difference']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _greedy(cases: LayerCases, stack: LayerStack) -> Iterator[list[int]]:
    """Layers that are left, one fewer each time."""
    kept = list(range(len(stack)))
    while len(kept) > 1:
        choices = [[n for n in kept if n != place] for place in kept]
        lost = [_loss_of(cases, stack, choice) for choice in choices]
        # Of equal losses the last: the deepest layer goes.
        kept = choices[len(lost) - 1 - int(np.argmin(lost[::-1]))]
        yield kept


def _loss_of(cases: LayerCases, stack: LayerStack, kept: Sequence[int]) -> float:
    with stack.only(kept):
        lost = float(cases.losses().mean())
    return lost if np.isfinite(lost) else float("inf")


def _point(
    every: list[int],
    kept: list[int],
    found: Table,
    whole: Table,
    users: npt.NDArray[np.int64],
    resamples: int,
    seed: int,
) -> dict[str, Any]:
    gap = paired_difference(found, whole, users, resamples=resamples, seed=seed)
    point: dict[str, Any] = {"removed": [n for n in every if n not in kept], "kept": kept}
    for m, name in enumerate(METRICS):
        point[name] = {
            "mean": float(found[:, m].mean()),
            "difference": float(gap.mean[m]),
            "difference interval95": [float(gap.low[m]), float(gap.high[m])],
        }
    return point

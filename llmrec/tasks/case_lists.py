"""CaseLists: what a language model recommends to held-out cases, asked as it will be served."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmrec.data.split import Part
from llmrec.prompt import EVENT_COLUMNS
from llmrec.tasks.task_data import TaskData
from llmrec.training.ranking import Recommend

if TYPE_CHECKING:
    from llmrec.artefact_parts import Settings
    from llmrec.recommender import Recommender

VALIDATION_BEAMS = 20  # of the cases that are ranked while a model is trained


class CaseLists:
    """What a model recommends in cases of a part, asked as it will be served; what a `RankingCallback` takes.

    Called with a model it gives (places among the cases, k) -> catalog rows, best first.
    """

    def __init__(self, held: TaskData, settings: "Settings", part: Part, cases: Sequence[int], num_beams: int) -> None:
        """
        Args:
            held: split, catalog, tokenizer and prompt.
            settings: of the artefact.
            part: whose cases.
            cases: their places in it.
            num_beams: beams of the search; k if that is more.
        """
        chosen = [int(case) for case in cases]
        every = held.split.histories(part)
        said = list(held.case_variables(part, chosen))
        self._held, self._settings, self._num_beams = held, settings, num_beams
        self._histories: list[list[int]] = [every[case].tolist() for case in chosen]
        self._events = held.case_events(part, chosen) if held.prompt.attributes & set(EVENT_COLUMNS) else None
        shown = held.prompt.variables - {"history"}
        self._variables = [{name: value for name, value in case.items() if name in shown} for case in said]

    def __call__(self, model: Any) -> Recommend:
        from llmrec.recommender import Recommender

        held = self._held
        recommender = Recommender(model, held.tokenizer, held.catalog, held.prompt, self._settings)
        return lambda places, k: self.of(recommender, places, k)

    def of(self, recommender: "Recommender", places: Sequence[int], k: int, progress: bool = False) -> list[list[int]]:
        """The lists of a recommender for the cases at these places."""
        alike: dict[tuple[str, ...], list[int]] = {}  # who said nothing has a prompt without it
        for number, place in enumerate(places):
            alike.setdefault(tuple(sorted(self._variables[place])), []).append(number)
        found: list[list[int]] = [[]] * len(places)
        for names, numbers in alike.items():
            some = [places[number] for number in numbers]
            given: dict[str, Any] = {name: [self._variables[place][name] for place in some] for name in names}
            lists, _ = recommender.recommend_rows(
                [self._histories[place] for place in some],
                k,
                num_beams=max(k, self._num_beams),
                progress=progress,
                events=None if self._events is None else [self._events[place] for place in some],
                **given,
            )
            for number, one in zip(numbers, lists, strict=True):
                found[number] = one
        return found

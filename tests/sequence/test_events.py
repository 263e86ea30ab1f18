"""How events become tokens, against a loop over one history at a time."""

from datetime import UTC, datetime

import numpy as np
import pytest
import torch

from llmrec.backbones.encoder import UNKNOWN_TIME
from llmrec.exceptions import BackboneError
from llmrec.sequence.events import EventConfig, EventLayout, _month

ACTIONS, DOMAINS = ["buy", "view"], ["books", "toys"]


def config(**options):
    return EventConfig(actions=ACTIONS, domains=DOMAINS, **options)


def layout_of(events, width=4, seed=0):
    torch.manual_seed(seed)
    return EventLayout(events, width)


def batch(seed=0, lengths=(4, 1, 0, 3), width=4, left=False):
    rng = np.random.default_rng(seed)
    longest = max(lengths)
    mask = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, longest - length :] = left
        if not left:
            mask[row, :length] = True
    shape = tuple(mask.shape)
    numbers = {
        "timestamps": torch.from_numpy(rng.integers(1, 10**9, shape)),
        "actions": torch.from_numpy(rng.integers(0, 3, shape)),
        "domains": torch.from_numpy(rng.integers(0, 3, shape)),
    }
    asked = {f"next_{name}": torch.roll(values, -1, 1) for name, values in numbers.items()}
    for row, length in enumerate(lengths):
        end = longest - 1 if left else length - 1
        if length:
            asked["next_timestamps"][row, end] = int(rng.integers(1, 10**9))
            asked["next_actions"][row, end] = int(rng.integers(0, 3))
            asked["next_domains"][row, end] = int(rng.integers(0, 3))
    return (
        {"representations": torch.from_numpy(rng.normal(size=(*shape, width))).float(), "mask": mask} | numbers | asked
    )


def clock(layout, time):
    if not len(layout.times):
        return 0
    if time == UNKNOWN_TIME:
        return sum(table.weight[-1] for table in layout.times)
    moment = datetime.fromtimestamp(int(time), UTC)
    numbers = (moment.hour, moment.weekday(), moment.month - 1)
    return sum(table.weight[number] for table, number in zip(layout.times, numbers, strict=True))


def tokens_by_hand(layout, given, row):
    """The tokens of one history and, per item, which of them is read: a list of vectors and a list of places."""
    events = layout.config
    places = given["mask"][row].nonzero()[:, 0].tolist()
    action = {"none": None, "added": "item", "before": "slot", "after": "behind"}[events.action_tokens]
    domain = {"none": None, "added": "item", "before": "slot"}[events.domain_tokens]
    tokens, reads = [], []

    def slot(number_a, number_d, time):
        vector = clock(layout, time)
        if action == "slot":
            vector = vector + layout.actions.weight[number_a]
        if domain == "slot":
            vector = vector + layout.domains.weight[number_d]
        return vector

    for order, place in enumerate(places):
        number_a, number_d = given["actions"][row, place], given["domains"][row, place]
        time = given["timestamps"][row, place]
        if "slot" in (action, domain):
            before = places[order - 1] if order else None
            asked = time if before is None else given["timestamps"][row, before]
            if before is not None and events.request_time:
                asked = given["next_timestamps"][row, before]
            tokens.append(slot(number_a, number_d, asked))
        item = given["representations"][row, place] + clock(layout, time)
        if action == "item":
            item = item + layout.actions.weight[number_a]
        if domain == "item":
            item = item + layout.domains.weight[number_d]
        tokens.append(item)
        if action == "behind":
            tokens.append(layout.actions.weight[number_a] + clock(layout, time))
            reads.append(len(tokens) - 1)
        elif "slot" in (action, domain):
            reads.append(len(tokens))
        else:
            reads.append(len(tokens) - 1)
    if places and "slot" in (action, domain):
        last = places[-1]
        time = given["next_timestamps" if events.request_time else "timestamps"][row, last]
        tokens.append(slot(given["next_actions"][row, last], given["next_domains"][row, last], time))
    return tokens, reads


LAYOUTS = [
    {}, {"action_tokens": "added"}, {"action_tokens": "before"}, {"action_tokens": "after"},
    {"domain_tokens": "added"}, {"domain_tokens": "before"}, {"action_tokens": "before", "domain_tokens": "before"},
    {"action_tokens": "added", "domain_tokens": "before"}, {"action_tokens": "after", "domain_tokens": "added"},
]  # fmt: skip


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("clocked", [False, True], ids=["", "clock"])
@pytest.mark.parametrize("request_time", [False, True], ids=["", "asked"])
@pytest.mark.parametrize("chosen", LAYOUTS, ids=lambda chosen: "-".join(chosen.values()) or "plain")
def test_tokens_are_those_laid_out_by_hand(chosen, request_time, clocked, left):
    layout = layout_of(config(**chosen, request_time=request_time, time_features=clocked))
    given = batch(left=left)
    found = layout(**given)
    assert found.mask.shape == found.representations.shape[:2]
    for row in range(len(given["mask"])):
        tokens, reads = tokens_by_hand(layout, given, row)
        shown = found.representations[row][found.mask[row]]
        assert len(shown) == len(tokens)
        if tokens:
            torch.testing.assert_close(shown, torch.stack(tokens))
        assert len(tokens) <= layout.config.positions(len(reads))
        if found.reads is None:
            assert reads == list(range(len(tokens)))
            continue
        order = found.mask[row].cumsum(0) - 1
        places = given["mask"][row].nonzero()[:, 0]
        assert [int(order[found.reads[row, place]]) for place in places] == reads
        assert bool(found.mask[row][found.reads[row, places]].all())


@pytest.mark.parametrize("chosen", LAYOUTS, ids=lambda chosen: "-".join(chosen.values()) or "plain")
def test_what_is_not_said_is_unknown_and_asked_for_under_the_target_action(chosen):
    layout = layout_of(config(**chosen, target_action="view"))
    given = batch()
    ends = (given["mask"].sum(1) - 1).clamp_min(0)
    rows = torch.arange(len(ends))
    told = {name: value for name, value in given.items() if name != "next_timestamps"}
    told["next_actions"] = torch.roll(given["actions"], -1, 1)
    told["next_actions"][rows, ends] = 2
    told["next_domains"] = torch.roll(given["domains"], -1, 1)
    told["next_domains"][rows, ends] = given["domains"][rows, ends]
    left_out = {name: value for name, value in told.items() if not name.startswith("next_")}

    def shown(given):
        tokens = layout(**given)
        return tokens.representations[tokens.mask]

    torch.testing.assert_close(shown(left_out), shown(told))
    marked = told | {"next_actions": told["next_actions"].clone()}
    marked["next_actions"][rows, ends] = -1
    torch.testing.assert_close(shown(marked), shown(told))
    bare = {"representations": given["representations"], "mask": given["mask"]}
    nothing = bare | {"actions": torch.zeros_like(given["actions"]), "domains": torch.zeros_like(given["domains"])}
    torch.testing.assert_close(shown(bare), shown(nothing))


def test_times_of_tokens_before_items_are_the_requests():
    given = batch(lengths=(3,))
    told = layout_of(config(action_tokens="before", request_time=True))(**given)
    times, asked = given["timestamps"][0], given["next_timestamps"][0]
    assert told.timestamps[0].tolist() == [*(times[0], times[0], asked[0], times[1], asked[1], times[2], asked[2])]
    own = layout_of(config(action_tokens="before"))(**given)
    assert own.timestamps[0].tolist() == [times[0], times[0], times[0], times[1], times[1], times[2], times[2]]
    assert own.next_timestamps is None


def test_months_are_the_calendars():
    days = np.random.default_rng(0).integers(-100_000, 100_000, 5000)
    dates = days.astype("datetime64[D]").astype("datetime64[M]").astype(np.int64) % 12
    assert _month(torch.from_numpy(days)).tolist() == dates.tolist()


def test_numbers_of_names():
    events = config()
    assert [events.action(name) for name in ("buy", "view", "other", None, "")] == [1, 2, 0, 0, 0]
    assert events.domain("toys") == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"action_tokens": "behind"}, "action_tokens"),
        ({"domain_tokens": "after"}, "domain_tokens"),
        ({"action_tokens": "after", "domain_tokens": "before"}, "no layout"),
        ({"target_action": "steal"}, "target_action"),
    ],
    ids=["action", "domain", "both", "target"],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(BackboneError, match=message):
        config(**options)

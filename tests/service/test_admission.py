"""The queue against a definition that keeps plain lists, under any order of arrivals, endings and cancellations."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec.service.admission import Admission
from llmrec.service.errors import DrainingError, QueueFullError


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def defined(running, queue, limit):
    """What runs and what waits after the head of the queue has begun as often as it fits."""
    running, queue = list(running), list(queue)
    while queue and sum(rows for _, rows in running) + queue[0][1] <= limit:
        running.append(queue.pop(0))
    return running, queue


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), st.lists(st.integers(1, 10), min_size=1, max_size=4)),
        st.tuples(st.just("release"), st.integers(0, 100)),
        st.tuples(st.just("leave"), st.integers(0, 100)),
        st.tuples(st.just("tick"), st.floats(0.001, 5.0)),
    ),
    max_size=40,
)


@given(STEPS, st.integers(10, 20), st.integers(0, 25))
@settings(max_examples=300, deadline=None)
def test_it_is_a_fifo_queue_of_rows(steps, most_running, most_waiting):
    clock = Clock()
    admission = Admission(most_running, most_waiting, clock)
    told = []
    admission.changed = lambda running, waiting: told.append((running, waiting))
    tickets, running, queue, number = {}, [], [], 0
    for step, value in steps:
        if step == "tick":
            clock.now += value
        elif step == "enter":
            new = [(number + place, rows) for place, rows in enumerate(value)]
            after = defined(running, [*queue, *new], most_running)
            if sum(rows for _, rows in after[1]) > most_waiting and any(one in after[1] for one in new):
                before = (admission.running, admission.waiting)
                with pytest.raises(QueueFullError) as refused:
                    admission._enter(value)
                assert 1 <= refused.value.retry_after <= 60
                assert (admission.running, admission.waiting) == before
                continue
            tickets.update(zip(range(number, number + len(value)), admission._enter(value), strict=True))
            number += len(value)
            running, queue = after
        else:
            among = running if step == "release" else queue
            if not among:
                continue
            gone = among[value % len(among)]
            tickets[gone[0]].release(completed=step == "release")
            tickets[gone[0]].release()  # once more changes nothing
            among.remove(gone)
            running, queue = defined(running, queue, most_running)
        assert {name for name, ticket in tickets.items() if ticket.running} == {name for name, _ in running}
        assert admission.running == sum(rows for _, rows in running) <= most_running
        assert admission.waiting == sum(rows for _, rows in queue) <= most_waiting
        assert not told or told[-1] == (admission.running, admission.waiting)
    for ticket in tickets.values():
        ticket.release()
    assert (admission.running, admission.waiting) == (0, 0)


@given(st.lists(st.integers(1, 12), max_size=6), st.integers(1, 10), st.integers(0, 25))
def test_what_fits_is_what_an_idle_server_takes(rows, most_running, most_waiting):
    admission = Admission(most_running, most_waiting)
    try:
        admission._enter(rows)
        taken = True
    except QueueFullError:
        taken = False
    # A search wider than all that runs at once would wait for ever: it may enter the queue, but never fits.
    assert admission.fits(rows) == (taken and max(rows, default=0) <= most_running)


@given(st.lists(st.tuples(st.integers(1, 8), st.sampled_from(["done", "failed", "cancelled"])), max_size=30))
@settings(max_examples=60, deadline=None)
def test_concurrent_searches_give_back_what_they_took(searches):
    admission = Admission(8, 1000)
    begun, over_limit = [], []

    async def one(place, rows, end):
        with admission.enter([rows]) as (ticket,):
            await ticket.granted()
            begun.append(place)
            over_limit.append(admission.running > 8)
            await asyncio.sleep(0)
            if end == "failed":
                raise ValueError("failed")
            if end == "cancelled":
                await asyncio.sleep(3600)
            ticket.release()

    async def run():
        tasks = [asyncio.create_task(one(place, rows, end)) for place, (rows, end) in enumerate(searches)]
        while pending := [task for task in tasks if not task.done()]:
            for _ in range(3):
                await asyncio.sleep(0)
            for place, (_, end) in enumerate(searches):
                if end == "cancelled" and place in begun and tasks[place] in pending:
                    tasks[place].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    ends = asyncio.run(run())
    assert begun == list(range(len(searches)))  # first come, first served, the wide ones too
    assert not any(over_limit)
    assert (admission.running, admission.waiting) == (0, 0)
    kinds = {"done": type(None), "failed": ValueError, "cancelled": asyncio.CancelledError}
    assert [type(end) for end in ends] == [kinds[end] for _, end in searches]


def test_who_leaves_the_queue_lets_the_next_begin():
    admission = Admission(10, 100)
    first, wide, narrow = (admission._enter([rows])[0] for rows in (6, 10, 4))
    assert [ticket.running for ticket in (first, wide, narrow)] == [True, False, False]
    wide.release(completed=False)
    assert [ticket.running for ticket in (first, wide, narrow)] == [True, False, True]


def test_retry_after_is_the_time_that_what_is_there_takes():
    clock = Clock()
    admission = Admission(100, 300, clock)
    assert admission.rate is None
    assert admission.retry_after == 1.0
    (ticket,) = admission._enter([100])
    clock.now += 2.0
    ticket.release()
    assert admission.rate == pytest.approx(50.0)
    clock.now += 1000.0  # nobody asked: says nothing of its speed
    assert admission.rate == pytest.approx(50.0)
    admission._enter([100])
    admission._enter([100, 100])
    assert admission.retry_after == 6.0
    with pytest.raises(QueueFullError, match="100 beam rows are running and 200 wait; 101 more") as refused:
        admission._enter([101])
    assert refused.value.retry_after == 6.0
    clock.now += 1e6
    assert admission.retry_after <= 60.0


def test_cancelled_work_does_not_count_as_speed():
    clock = Clock()
    admission = Admission(100, 300, clock)
    (ticket,) = admission._enter([100])
    clock.now += 1.0
    ticket.release(completed=False)
    assert admission.rate is None


def test_a_draining_server_takes_nothing_new_and_ends_what_it_has():
    admission = Admission(10, 100)
    first, waits = admission._enter([10, 5])
    admission.draining = True
    with pytest.raises(DrainingError), admission.enter([1]):
        raise AssertionError("it was let in")
    first.release()
    assert waits.running


def test_what_is_being_prepared_has_a_place_and_no_rows():
    admission = Admission(10, 20)
    told = []
    admission.changed = lambda running, waiting: told.append((running, waiting))

    async def run():
        with admission.enter([6, 7], prepared=False) as (first, second):
            assert (admission.running, admission.waiting, admission.preparing) == (0, 0, 13)
            with admission.enter([10]) as (other,):  # overtakes them
                assert other.running
                with pytest.raises(QueueFullError), admission.enter([8]):
                    raise AssertionError("23 and 8 are over 30")
                asking = asyncio.create_task(second.granted())
                await asyncio.sleep(0)
                assert (admission.running, admission.waiting, admission.preparing) == (10, 7, 6)
                with pytest.raises(QueueFullError), admission.enter([8]):
                    raise AssertionError("13 wait, and 8 more are over 20")
            await asking  # its turn, though the one before it is not ready
            assert (second.running, first.running) == (True, False)
            await second.granted()  # once more changes nothing
        assert (admission.running, admission.waiting, admission.preparing) == (0, 0, 0)

    asyncio.run(run())
    assert told[0] == (0, 13)
    assert told[-1] == (0, 0)

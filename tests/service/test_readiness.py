"""Whether a server says that it is ready, over its canaries' ups and downs."""

import asyncio
import logging

import pytest

from llmrec.exceptions import EngineError
from llmrec.service.readiness import Readiness


class Canary:
    """Passes, fails or hangs, as it is told."""

    def __init__(self):
        self.mood = "pass"
        self.asked = 0

    async def __call__(self):
        self.asked += 1
        if self.mood == "hang":
            await asyncio.sleep(3600)
        if self.mood == "fail":
            raise ValueError("wrong at /root/secret")


def test_it_is_as_ready_as_its_last_canary():
    canary, told = Canary(), []
    readiness = Readiness(canary, 30.0, 0.05, told.append)
    assert "No recommendation was tried yet" in readiness.reason
    asyncio.run(readiness.try_once())
    assert readiness.reason is None
    for mood, said in (("fail", "failed or was wrong"), ("hang", "took over 0.05 s")):
        canary.mood = mood
        with pytest.raises(EngineError):
            asyncio.run(readiness.try_once())
        assert said in readiness.reason
        assert "secret" not in readiness.reason
    canary.mood = "pass"
    asyncio.run(readiness.try_once())
    assert readiness.reason is None
    assert told == [True, False, False, True]


def test_it_goes_on_asking_until_it_is_stopped(caplog):
    canary, told, first = Canary(), [], Canary()
    readiness = Readiness(canary, 0.01, 0.05, told.append)

    async def run():
        await readiness.start(first)
        assert (first.asked, canary.asked, readiness.reason) == (1, 0, None)
        while len(told) < 3:
            await asyncio.sleep(0.005)
        canary.mood = "fail"
        while told[-1]:
            await asyncio.sleep(0.005)
        assert readiness.reason is not None
        canary.mood = "hang"
        while len(told) < 6:
            await asyncio.sleep(0.005)
        canary.mood = "pass"
        while not told[-1]:
            await asyncio.sleep(0.005)
        assert readiness.reason is None
        await readiness.stop()
        await readiness.stop()
        asked = canary.asked
        await asyncio.sleep(0.05)
        return asked

    with caplog.at_level(logging.ERROR):
        assert asyncio.run(run()) == canary.asked
    assert "secret" in caplog.text  # the log is for who runs the server


def test_a_first_canary_that_fails_starts_nothing():
    canary, first = Canary(), Canary()
    first.mood = "fail"
    readiness = Readiness(canary, 0.01, 1.0)

    async def run():
        with pytest.raises(EngineError, match="wrong at"):
            await readiness.start(first)
        await asyncio.sleep(0.05)

    asyncio.run(run())
    assert canary.asked == 0
    assert "failed or was wrong" in readiness.reason


def test_a_task_that_hangs_is_not_taken_for_ready():
    now = [0.0]
    readiness = Readiness(Canary(), 30.0, 20.0, clock=lambda: now[0])
    asyncio.run(readiness.try_once())
    now[0] = 100.0
    assert readiness.reason is None
    now[0] = 101.0
    assert "No recommendation was tried for 101 s" in readiness.reason


def test_who_cannot_be_told_does_not_end_the_asking(caplog):
    canary, told = Canary(), []

    def tell(passed):
        told.append(passed)
        if len(told) in (2, 3):
            raise OSError("a file of metrics is gone")

    readiness = Readiness(canary, 0.001, 0.05, tell)

    async def run():
        await readiness.start(Canary())
        async with asyncio.timeout(10.0):
            while len(told) < 5:
                await asyncio.sleep(0.002)
        await readiness.stop()

    with caplog.at_level(logging.ERROR):
        asyncio.run(run())
    assert "could not be told" in caplog.text
    assert readiness.reason is None

"""A Redis that carries an append out and is not heard any more: nobody may take it for one that did nothing."""

import asyncio

import pytest

from llmrec.exceptions import BusyError, DeadlineError
from llmrec.history_store import open_store
from llmrec.service.errors import problem_of
from llmrec.service.schema import StoredEvent


class Cut:
    """A line to Redis that breaks behind the command that it waits for, or falls silent."""

    def __init__(self, port, word, silent):
        self.port, self.word, self.silent, self.writers = port, word, silent, []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.connect, "127.0.0.1", 0)
        return self.server.sockets[0].getsockname()[1]

    async def __aexit__(self, *_):
        self.server.close()
        for writer in self.writers:
            writer.close()

    async def connect(self, reader, writer):
        there, here = await asyncio.open_connection("127.0.0.1", self.port)
        self.writers += [writer, here]
        while data := await reader.read(1 << 16):
            here.write(data)
            answer = await there.read(1 << 16)  # it was carried out
            if self.word in data:
                if self.silent:
                    return
                writer.close()
                return
            writer.write(answer)


@pytest.mark.parametrize("silent", [True, False])
def test_an_append_of_unknown_fate_is_not_called_undone(redis_server, silent):
    async def body():
        plain = open_store(f"{redis_server.url}?prefix=cut")
        async with Cut(redis_server.port, b"RPUSH", silent) as port:
            store = open_store(f"redis://127.0.0.1:{port}/0?prefix=cut&socket_timeout=0.5")
            with pytest.raises(DeadlineError, match="not known") as caught:
                await store.append(f"u{silent}", [StoredEvent(item="a")])
            await store.close()
        # A 503 would be asked again by every client and proxy, and the event be there twice.
        assert problem_of(caught.value).status == 504
        assert [event.item for event in await plain.read(f"u{silent}", 5)] == ["a"]
        await plain.close()

    asyncio.run(body())


def test_an_append_that_reached_nobody_may_be_tried_again():
    async def body():
        store = open_store("redis://127.0.0.1:1/0")
        with pytest.raises(BusyError, match="cannot be asked now"):
            await store.append("u", [StoredEvent(item="a")])
        await store.close()

    asyncio.run(body())


def test_appends_that_are_cancelled_take_no_connection_along(redis_server):
    async def body():
        store = open_store(f"{redis_server.url}?prefix=cancelled_appends&max_connections=2&timeout=1")
        for number in range(60):
            appending = asyncio.create_task(store.append("u", [StoredEvent(item=str(number))]))
            await asyncio.sleep(0.0002 * (number % 7))
            appending.cancel()
            await asyncio.gather(appending, return_exceptions=True)
        await store.append("u", [StoredEvent(item="last")])
        assert (await store.read("u", 1))[0].item == "last"
        await store.close()

    asyncio.run(body())

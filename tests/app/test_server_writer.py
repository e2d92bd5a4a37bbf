"""The server's one thread: what nobody waits for any more is given up, and the next is written."""

from __future__ import annotations

import asyncio
import threading
from contextlib import aclosing
from typing import Any

import pytest

from ggml_diffusion.app.server.requests import RequestError
from ggml_diffusion.app.server.writer import Cancelled, Tell, Writer


class Endless:
    """A job that goes on until it is told that nobody waits, or for half a minute."""

    def __init__(self) -> None:
        self.given_up = threading.Event()

    def __call__(self, tell: Tell) -> str:
        for step in range(3000):
            try:
                tell(step)
            except Cancelled:
                self.given_up.set()
                raise
            threading.Event().wait(0.01)
        return "the end"


async def nobody_has_gone() -> bool:
    return False


async def read(writer: Writer, job: Any, is_gone: Any) -> list[Any]:
    async with aclosing(writer.write(job, is_gone)) as written:
        return [value async for _, value in written]


def test_a_job_ends_when_its_client_goes_and_the_next_is_written() -> None:
    writer, job = Writer(2), Endless()

    async def talk() -> list[Any]:
        looks = 0

        async def goes_soon() -> bool:
            nonlocal looks
            looks += 1
            return looks > 3

        with pytest.raises(Cancelled):
            await read(writer, job, goes_soon)
        return await read(writer, lambda tell: "next", nobody_has_gone)

    assert asyncio.run(talk()) == ["next"]
    assert job.given_up.is_set()
    writer.close()
    assert writer.join(30.0)


def test_what_still_waits_when_its_client_goes_is_never_begun() -> None:
    writer, first, begun = Writer(2), Endless(), []

    async def at_once() -> bool:
        return True

    async def talk() -> None:
        long = asyncio.create_task(read(writer, first, nobody_has_gone))
        await asyncio.sleep(0.05)
        with pytest.raises(Cancelled):
            await read(writer, lambda tell: begun.append(1), at_once)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        assert await read(writer, lambda tell: "last", nobody_has_gone) == ["last"]

    asyncio.run(talk())
    assert first.given_up.is_set() and begun == []
    writer.close()
    assert writer.join(30.0)


def test_a_full_queue_and_an_ending_server_refuse() -> None:
    writer, job = Writer(1), Endless()

    async def talk() -> None:
        long = asyncio.create_task(read(writer, job, nobody_has_gone))
        await asyncio.sleep(0.2)  # the thread has taken it
        waits = asyncio.create_task(read(writer, job, nobody_has_gone))
        await asyncio.sleep(0.05)
        with pytest.raises(RequestError) as full:
            await read(writer, job, nobody_has_gone)
        assert full.value.code == "queue_full"
        writer.close()
        for task in (long, waits):
            with pytest.raises(RequestError) as ends:
                await task
            assert ends.value.code == "shutting_down"

    asyncio.run(talk())
    assert writer.join(30.0) and job.given_up.is_set()

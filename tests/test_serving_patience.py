"""A limit of time on what is done again and again."""

import asyncio

import pytest
from api_calls import run

from dsv3.serving.api.patience import Patience


def test_what_takes_too_long_is_broken_off_however_often_it_was_quick():
    async def work() -> float:
        patience = Patience(0.1)
        for _ in range(30):
            with patience:
                await asyncio.sleep(0.01)
        since = asyncio.get_running_loop().time()
        with pytest.raises(TimeoutError), patience:
            await asyncio.sleep(20)
        took = asyncio.get_running_loop().time() - since
        with patience:  # and it may be tried again
            await asyncio.sleep(0.01)
        patience.close()
        return took

    assert 0.1 <= run(work()) < 5


def test_who_is_cancelled_from_outside_is_cancelled():
    async def waits() -> None:
        with Patience(0.05):
            await asyncio.sleep(20)

    async def work() -> None:
        task = asyncio.create_task(waits())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())


def test_time_between_blocks_does_not_count():
    async def work() -> None:
        patience = Patience(0.05)
        for _ in range(3):
            with patience:
                await asyncio.sleep(0)
            await asyncio.sleep(0.08)
        patience.close()

    run(work())

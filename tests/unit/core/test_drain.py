"""How a process leaves: what it was asked, what it was told, and when it does not wait any longer."""

import asyncio
import os
import signal
import threading
from collections.abc import Callable

import pytest

from mooncake.core.drain import Leaving
from mooncake.core.health import Health, Phase


def make(drain_s: float = 60.0) -> tuple[Leaving, Health]:
    health = Health()
    health.started()
    health.ready()
    return Leaving(health, drain_s), health


async def test_asked_from_another_thread_it_drains_and_does_not_end():
    leaving, health = make()
    thread = threading.Thread(target=leaving.drains.begin, args=("asked for",))
    thread.start()
    thread.join()
    assert health.phase is Phase.DRAINING, "at once, whatever the loop does"
    async with asyncio.timeout(5):
        await leaving.draining.wait()
    assert not leaving.told.is_set()
    assert not leaving.at_once.is_set()


class Slow(Health):
    """A process whose next move lets another thread in between what it reads and what it writes."""

    between: Callable[[], None] | None = None

    @property
    def _state(self):
        state = self.__dict__["state"]
        between, self.between = self.between, None
        if between is not None:
            between()
        return state

    @_state.setter
    def _state(self, state):
        self.__dict__["state"] = state


@pytest.mark.parametrize("move", ["ready", "unready", "started"])
async def test_a_drain_that_comes_in_the_middle_of_a_move_is_not_lost(move):
    health = Slow()
    health.started()
    health.ready()
    leaving = Leaving(health, 60.0)
    thread = threading.Thread(target=leaving.ask, args=("asked for",))

    def ask() -> None:
        thread.start()
        thread.join()

    health.between = ask
    getattr(health, move)(*(["x"] if move == "unready" else []))
    async with asyncio.timeout(5):
        await leaving.draining.wait()
    assert health.phase is Phase.DRAINING
    health.ready()
    assert not health.ready_now().ok, "for good"


async def test_a_signal_tells_it_to_drain_and_end_and_a_second_one_at_once():
    leaving, health = make()
    leaving.on_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    async with asyncio.timeout(5):
        await leaving.told.wait()
    assert leaving.draining.is_set()
    assert health.ready_now().why == "draining: SIGTERM"
    assert not leaving.at_once.is_set()
    os.kill(os.getpid(), signal.SIGINT)
    async with asyncio.timeout(5):
        await leaving.at_once.wait()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().remove_signal_handler(number)


async def test_its_time_is_over_drain_s_after_it_was_told_not_after_it_was_asked():
    leaving, _ = make(drain_s=0.05)
    leaving.ask("asked for")
    await leaving.pause(0.2)
    assert not leaving.at_once.is_set()
    leaving.tell()
    async with asyncio.timeout(5):
        await leaving.at_once.wait()


async def test_work_is_done_or_cut_short():
    leaving, _ = make()
    done = []

    async def work(event: asyncio.Event) -> None:
        await event.wait()
        done.append(1)

    ready, never = asyncio.Event(), asyncio.Event()
    ready.set()
    assert await leaving.unless_at_once(work(ready))
    assert done == [1]
    asyncio.get_running_loop().call_soon(leaving.at_once.set)
    assert not await leaving.unless_at_once(work(never))
    await leaving.pause(60.0)  # returns at once


async def test_what_fails_in_a_drain_is_not_hidden():
    leaving, _ = make()

    async def broken() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await leaving.unless_at_once(broken())


async def test_in_flight_may_be_known_later():
    leaving, _ = make()
    assert leaving.drains.in_flight() == 0
    drains = leaving.drains
    leaving.in_flight = lambda: 7
    assert drains.in_flight() == 7

"""An instance that is to go waits for what its engine has, and not for ever."""

import asyncio

import pytest

from mooncake.core.drain import Leaving
from mooncake.core.health import Health
from mooncake.core.messages import DRAINING, RoleOrder
from mooncake.worker import leave
from mooncake.worker.role import HeldRole


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leave, "SETTLE_S", 0.02)
    monkeypatch.setattr(leave, "LOOK_S", 0.005)


def leaving(*counts: int) -> Leaving:
    """`counts` at the first looks, then the last one for ever."""
    told = list(counts)
    return Leaving(Health(), 60.0, lambda: told.pop(0) if len(told) > 1 else told[0])


async def test_it_waits_until_two_looks_in_a_row_find_nothing():
    one = leaving(2, 0, 1, 0, 0)
    async with asyncio.timeout(5):
        await leave.drained(one)
    assert one.is_done


async def test_it_does_not_wait_for_what_never_ends_once_it_has_to_go():
    one = leaving(7)
    draining = asyncio.create_task(leave.drained(one))
    one.tell()
    await asyncio.sleep(0.05)
    assert not draining.done()
    one.tell()
    async with asyncio.timeout(5):
        await draining
    assert one.is_done, "what is left is handed over when its record goes"


async def test_told_twice_it_does_not_even_settle(monkeypatch):
    monkeypatch.setattr(leave, "SETTLE_S", 60.0)
    one = leaving(7)
    one.at_once.set()
    async with asyncio.timeout(5):
        await leave.drained(one)


def test_no_order_calls_an_instance_back_that_leaves():
    role = HeldRole("decode")
    role.leave()
    assert role.now(0.0) == DRAINING
    role.order(1.0, RoleOrder("prefill", 0.0))
    role.order(2.0, RoleOrder("decode", 30.0))
    assert {role.now(s) for s in (1.0, 2.0, 60.0)} == {DRAINING}

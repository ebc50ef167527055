"""Conditional disaggregation through the production dispatcher, over fake engines."""

from conftest import make_request
from test_dispatch import PROMPT, expected, two_instances


async def test_a_short_prompt_runs_whole_on_the_decode_engine_while_prefill_is_busy(make_world) -> None:
    world = make_world(inline=True)
    prefill, decode = await two_instances(world)
    ticket = world.view.charge_prefill(0.0, "p0", 1e9, 1)  # a queue that stays long
    assert await world.finish(world.add(make_request(PROMPT))) == expected(PROMPT, 8)
    assert prefill.legs() == []
    assert decode.legs() == ["whole"]
    await world.until(lambda: world.metric("mooncake_decisions_total", kind="inlined") == 1)
    world.view.release(0.0, ticket)
    assert await world.finish(world.add(make_request(PROMPT, rid="second"))) == expected(PROMPT, 8)
    await world.until(lambda: world.view.charged == 0)

"""An instance that is to go finishes what its engine has; what is left after its time is handed over.

Nothing more is planned on an instance that registers as DRAINING. When its record goes, gateways move what
still runs there, prompts and emitted tokens, to another instance, which finds the blocks in the pool: clients
do not see it.
"""

import structlog

from mooncake.core.drain import Leaving

log = structlog.get_logger(__name__)

SETTLE_S = 0.5
"""Until every gateway and core has seen the record, and what they had planned before has come."""
LOOK_S = 0.2
"""Between two looks; the engine tells twice in that time."""
LOOKS = 2
"""In a row that find nothing: a request may be between two queues at one of them."""


async def drained(leaving: Leaving) -> None:
    """Return when nothing is in flight any more, or when it has to be handed over."""
    await leaving.pause(SETTLE_S)
    idle = 0
    while idle < LOOKS and not leaving.at_once.is_set():
        idle = 0 if leaving.in_flight() else idle + 1
        await leaving.pause(LOOK_S)
    leaving.is_done = True
    log.info("drain.ends", handed_over=leaving.in_flight())

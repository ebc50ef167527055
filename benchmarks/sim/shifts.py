"""Loads whose shape changes: phases of long prompts and short answers, of short prompts and long answers."""

from collections.abc import Sequence
from random import Random

import msgspec

from benchmarks.sim.trace import BLOCK_TOKENS, TraceRequest
from mooncake.core.errors import ConfigError

SPREAD = 0.5
"""Lengths are drawn from 1 - SPREAD to 1 + SPREAD times their mean."""


class Phase(msgspec.Struct, frozen=True):
    """So long, requests come at `rate` a second, with so many tokens on average.

    shared: part of each prompt, in whole blocks, that all prompts of such phases begin with.
    """

    length_s: float
    rate: float
    prompt_tokens: int
    answer_tokens: int
    shared: float = 0.0


def shifting(phases: Sequence[Phase], seed: int) -> list[TraceRequest]:
    """Return Poisson arrivals of one phase after the other.

    Raises:
        ConfigError: a number is not positive.
    """
    random = Random(seed)
    requests: list[TraceRequest] = []
    fresh, begin_s = 1 << 32, 0.0  # what is shared has ids from 0 on
    for phase in phases:
        if not (phase.rate > 0 and phase.prompt_tokens > 0 and phase.answer_tokens > 0):
            raise ConfigError(f"{phase}: rate and tokens must be positive")
        now_s, end_s = begin_s + random.expovariate(phase.rate), begin_s + phase.length_s
        common = range(int(phase.prompt_tokens * phase.shared) // BLOCK_TOKENS)
        while now_s < end_s:
            tokens, answer = (
                max(1, round(mean * random.uniform(1 - SPREAD, 1 + SPREAD)))
                for mean in (phase.prompt_tokens, phase.answer_tokens)
            )
            blocks = -(-tokens // BLOCK_TOKENS)
            known = common[: tokens // BLOCK_TOKENS]
            ids = (*known, *range(fresh, fresh + blocks - len(known)))
            fresh += blocks
            requests.append(TraceRequest(now_s, tokens, answer, ids))
            now_s += random.expovariate(phase.rate)
        begin_s = end_s
    if not requests:
        raise ConfigError("no phase is long enough for a request")
    return requests

"""Requests to replay: the public Mooncake traces (FAST'25 release), and a seeded generator.

A trace is JSON lines of {timestamp (ms), input_length, output_length, hash_ids}; an id names a block of
512 tokens together with all before it, the last one a partial block. Randomness lives here only, so
that what runs in the world is a function of the list of requests.
"""

from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from random import Random

import msgspec

from mooncake.core.errors import ConfigError

BLOCK_TOKENS = 512
"""Of the public traces."""
TIMESTAMP_MS_MAX = 31 * 86_400_000
"""A month: beyond it, the unit is not milliseconds."""
LENGTH_MAX = 10_000_000
"""Tokens of one request, an order of magnitude above any model's context."""
CONTINUED = 0.6
"""Chance that a synthetic request goes on with an earlier conversation."""
SESSIONS_MAX = 512
"""Conversations that may be gone on with; the oldest ends first."""
SYSTEM_BLOCKS = 2
"""Of synthetic requests: what all of them begin with."""

CROWD_IDS = 1 << 40
"""First block of a crowd: no trace has it."""
CROWD_S = 10.0
CROWD_NEW_TOKENS = 1000
"""Mean of what one of a crowd adds."""


class Row(msgspec.Struct, frozen=True):
    """One line of a trace file."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]


class TraceRequest(msgspec.Struct, frozen=True):
    """One request: when it comes, how long it is, the names of its blocks."""

    arrival_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: Sequence[int]


def read_trace(path: Path) -> list[TraceRequest]:
    """Return the requests of a trace file, in order.

    Raises:
        ConfigError: it cannot be read, or a line is not what a trace has; names file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror}") from None
    decode = msgspec.json.Decoder(Row).decode
    requests: list[TraceRequest] = []
    before = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = decode(line)
        except msgspec.MsgspecError as error:
            raise ConfigError(f"trace {path}, line {number}: {error}") from None
        if wrong := _wrong(row, before):
            raise ConfigError(f"trace {path}, line {number}: {wrong}")
        before = row.timestamp
        requests.append(
            TraceRequest(row.timestamp / 1000, row.input_length, row.output_length, tuple(row.hash_ids))
        )
    if not requests:
        raise ConfigError(f"trace {path}: no request in it")
    return requests


def _wrong(row: Row, before_ms: int) -> str:
    """Return what is wrong with a line; "" = nothing."""
    if not before_ms <= row.timestamp <= TIMESTAMP_MS_MAX:
        return f"timestamp {row.timestamp}: must be ms, at least that of the line before ({before_ms})"
    if not (0 < row.input_length <= LENGTH_MAX and 0 < row.output_length <= LENGTH_MAX):
        return f"input_length {row.input_length}, output_length {row.output_length}: must be positive"
    blocks = -(-row.input_length // BLOCK_TOKENS)
    if len(row.hash_ids) != blocks:
        return f"{len(row.hash_ids)} hash_ids for {row.input_length} tokens: must be {blocks}"
    if min(row.hash_ids) < 0:
        return "a hash_id is negative"
    return ""


def requests_of(
    trace: str,
    *,
    count: int,
    rate: float,
    seed: int,
    speed: float,
    start_s: float,
    length_s: float,
    sample: float,
    spread_s: float,
) -> list[TraceRequest]:
    """Return the requests of a trace file, or `count` generated ones, rescaled.

    Raises:
        ConfigError: the trace, or what is wanted of it.
    """
    found = read_trace(Path(trace)) if trace else synthesize(count, rate, seed)
    return rescale(
        found, speed=speed, start_s=start_s, length_s=length_s, sample=sample, spread_s=spread_s, seed=seed
    )


def rescale(
    requests: Sequence[TraceRequest],
    *,
    speed: float = 1.0,
    start_s: float = 0.0,
    length_s: float = 0.0,
    sample: float = 1.0,
    spread_s: float = 0.0,
    seed: int = 0,
) -> list[TraceRequest]:
    """Return a part of a trace, faster or slower, starting at 0 s.

    Args:
        requests: in order of arrival.
        speed: 2 = twice as many requests per second.
        start_s: skip what comes before, in the trace's time.
        length_s: keep so much of it; 0 = to the end.
        sample: share of requests to keep, drawn one by one.
        spread_s: delay each by uniform(0, spread_s): undoes the rounding of stamps (3 s in one trace).
        seed: of sample and spread.

    Raises:
        ConfigError: a number is out of range, or nothing is left.
    """
    if not (speed > 0 and 0 < sample <= 1 and min(start_s, length_s, spread_s) >= 0):
        raise ConfigError(
            f"speed={speed} must be positive, sample={sample} in (0, 1], "
            f"start_s={start_s}, length_s={length_s}, spread_s={spread_s} not negative"
        )
    end_s = start_s + length_s if length_s else float("inf")
    random = Random(seed)
    kept = []
    for one in requests:
        if start_s <= one.arrival_s < end_s and (sample >= 1 or random.random() < sample):
            at_s = one.arrival_s - start_s + (random.uniform(0, spread_s) if spread_s else 0.0)
            kept.append(msgspec.structs.replace(one, arrival_s=at_s / speed))
    if not kept:
        raise ConfigError(f"no request between {start_s} and {end_s} s of the trace")
    return sorted(kept, key=lambda one: one.arrival_s)


def sessions_of(requests: Sequence[TraceRequest]) -> list[str]:
    """Name each request's conversation: that of whoever was first with its deepest known block.

    What all prompts begin with is taken for a system prompt, which joins nobody.
    """
    common = takewhile(lambda ids: len(set(ids)) == 1, zip(*(one.hash_ids for one in requests), strict=False))
    system = sum(1 for _ in common)
    first: dict[int, int] = {}  # block -> conversation
    found = []
    for number, one in enumerate(requests):
        known = [first[block] for block in one.hash_ids[system:] if block in first]
        session = known[-1] if known else number
        for block in one.hash_ids[system:]:
            first.setdefault(block, session)
        found.append(str(session))
    return found


def crowd(
    prompt_tokens: int, seed: int, *, rate: float = 0.1, quiet_s: float = 300.0, count: int = 200
) -> list[TraceRequest]:
    """Return requests behind one long system prompt: one now and then, at last `count` of them within 10 s.

    Raises:
        ConfigError: a number is not positive.
    """
    if not (prompt_tokens >= BLOCK_TOKENS and rate > 0 and quiet_s > 0 and count > 0):
        raise ConfigError(
            f"{prompt_tokens=} (a block at least), {rate=}, {quiet_s=}, {count=}: must be positive"
        )
    random = Random(seed)
    system = list(range(CROWD_IDS, CROWD_IDS + prompt_tokens // BLOCK_TOKENS))
    arrivals = [quiet_s + random.uniform(0, CROWD_S) for _ in range(count)]
    now_s = random.expovariate(rate)
    while now_s < quiet_s:
        arrivals.append(now_s)
        now_s += random.expovariate(rate)
    requests, fresh = [], system[-1] + 1
    for at_s in sorted(arrivals):
        tokens = 1 + int(random.expovariate(1 / CROWD_NEW_TOKENS))
        blocks = -(-tokens // BLOCK_TOKENS)
        ids = (*system, *range(fresh, fresh + blocks))
        fresh += blocks
        requests.append(TraceRequest(at_s, len(system) * BLOCK_TOKENS + tokens, 1, ids))
    return requests


def synthesize(
    count: int, rate: float, seed: int, *, new_tokens: int = 3000, output_tokens: int = 200
) -> list[TraceRequest]:
    """Return `count` Poisson arrivals of growing conversations behind one system prompt.

    Args:
        count: requests.
        rate: of them per second.
        seed: the same seed gives the same requests.
        new_tokens: mean of what a turn adds (exponential).
        output_tokens: mean of an answer (exponential).

    Raises:
        ConfigError: a number is not positive.
    """
    if not (count > 0 and rate > 0 and new_tokens > 0 and output_tokens > 0):
        raise ConfigError(f"count={count}, rate={rate}, {new_tokens=}, {output_tokens=}: must be positive")
    random = Random(seed)
    fresh = SYSTEM_BLOCKS
    sessions: list[tuple[int, list[int]]] = []  # (tokens of the context, ids of its full blocks)
    requests = []
    now_s = 0.0
    for _ in range(count):
        now_s += random.expovariate(rate)
        if sessions and random.random() < CONTINUED:
            tokens, known = sessions.pop(random.randrange(len(sessions)))
        else:
            tokens, known = SYSTEM_BLOCKS * BLOCK_TOKENS, list(range(SYSTEM_BLOCKS))
        tokens += 1 + int(random.expovariate(1 / new_tokens))
        answer = 1 + int(random.expovariate(1 / output_tokens))
        blocks = -(-tokens // BLOCK_TOKENS)
        ids = known + list(range(fresh, fresh + blocks - len(known)))
        fresh += blocks - len(known)
        requests.append(TraceRequest(now_s, tokens, answer, tuple(ids)))
        sessions.append((tokens + answer, ids[: tokens // BLOCK_TOKENS]))
        if len(sessions) > SESSIONS_MAX:
            del sessions[0]
    return requests


def losses(share: float, seed: int) -> Callable[[], bool]:
    """Return what says of one message after another whether it is lost."""
    random = Random(seed)
    return lambda: share > 0 and random.random() < share

"""A replay as asked for on the command line: which requests, which endpoints, what is checked before."""

import asyncio
import signal
from collections.abc import Callable, Mapping, Sequence

import msgspec

from benchmarks.replay.client import Outcome, Target, replay, served
from benchmarks.replay.prompts import Shape, tokens_max
from benchmarks.replay.report import Summary
from benchmarks.sim.trace import TraceRequest, sessions_of
from mooncake.core.errors import ConfigError

IN_FLIGHT_MAX = 65_536
"""Of an option: each is a connection, and a file descriptor here."""


def targets_of(
    urls: Sequence[str],
    *,
    model: str,
    api_key: str,
    chat: bool,
    ignore_eos: bool,
    timeout_s: float,
    in_flight_max: int,
) -> dict[str, Target]:
    """Return the endpoints by name; a URL without one is its own.

    Raises:
        ConfigError: one is no URL, or stands there twice, or a number is out of range.
    """
    if timeout_s <= 0 or not 1 <= in_flight_max <= IN_FLIGHT_MAX:
        raise ConfigError(
            f"timeout_s={timeout_s} must be positive, in_flight_max={in_flight_max} 1 to {IN_FLIGHT_MAX}"
        )
    found: dict[str, Target] = {}
    for text in urls:
        name, _, url = text.rpartition("=")
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"url {text!r}: must be http://HOST:PORT or NAME=http://HOST:PORT")
        if (name or url) in found:
            raise ConfigError(f"url {text!r}: {name or url} stands there twice")
        url = url.rstrip("/").removesuffix("/v1")
        found[name or url] = Target(
            url=url,
            model=model,
            api_key=api_key,
            chat=chat,
            ignore_eos=ignore_eos,
            timeout_s=timeout_s,
            in_flight_max=in_flight_max,
        )
    return found


def ready(target: Target, requests: Sequence[TraceRequest], shape: Shape) -> Target:
    """Return `target` with its model named, when it can take the longest request.

    Raises:
        PeerGone: it does not answer. ConfigError: it cannot serve these requests.
    """
    shape.check()
    found = served(target)
    longest = tokens_max(requests, shape)
    if found.context_tokens and longest > found.context_tokens and not shape.text:
        fits = shape.scale * found.context_tokens / longest
        raise ConfigError(
            f"{target.url}: the longest request has {longest} tokens, {found.model} takes"
            f" {found.context_tokens}: try --scale {fits * 0.99:.3g}, or a part of the trace"
        )
    return msgspec.structs.replace(target, model=found.model)


def headers_of(requests: Sequence[TraceRequest]) -> list[dict[str, str]]:
    """Return what names each request's conversation."""
    return [{"x-session-id": session} for session in sessions_of(requests)]


async def replay_until_stopped(
    requests: Sequence[TraceRequest],
    shape: Shape,
    target: Target,
    tell: Callable[[Outcome | None], None],
    headers: Sequence[Mapping[str, str]],
) -> list[Outcome]:
    """Replay; SIGINT or SIGTERM ends it early with what came until then.

    Raises:
        KeyboardInterrupt: before anything was due.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    try:
        outcomes = await replay(requests, shape, target, tell, headers, stop)
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
    if not outcomes:
        raise KeyboardInterrupt
    return outcomes


def as_json(title: str, shape: Shape, targets: dict[str, Target], summaries: dict[str, Summary]) -> bytes:
    """Return what was asked for and what came of it; no key, no single request."""
    content = {
        "title": title,
        "shape": msgspec.to_builtins(shape),
        "endpoints": {name: {"url": one.url, "model": one.model} for name, one in targets.items()},
        "runs": {name: msgspec.to_builtins(summary) for name, summary in summaries.items()},
    }
    return msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n"

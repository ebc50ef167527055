"""Sends requests when their trace says so, whatever became of those before (an open loop), and takes notes.

An endpoint that is too slow gets no mercy: that is what an open loop measures. `in_flight_max` bounds it;
what would go beyond is not sent and counted, never queued here. How late requests were sent is reported too:
late by much means that this process, not the endpoint, was the bottleneck.
"""

import asyncio
from array import array
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import msgspec

from benchmarks.harness import sse_lines
from benchmarks.replay.prompts import Prompt, Shape, prompt_of
from benchmarks.sim.trace import TraceRequest
from mooncake.core.errors import ConfigError, PeerGone

CONNECT_S_MAX = 10.0
ASK_S_MAX = 30.0
"""For the list of models, before anything is sent."""
STOP_S_MAX = 5.0
"""For requests to end when the run is broken off."""
DETAIL_MAX = 200
"""Characters kept of an error."""
NOT_SENT = "not sent: too many in flight"
BROKEN_OFF = "broken off"
"""By whoever runs this, not by the endpoint."""
LATE = "no end within the time of a request"


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """Where requests go, and how.

    chat: /v1/chat/completions instead of /v1/completions; wants a text.
    ignore_eos: ask for answers of exactly the trace's length (an extension of vLLM's and SGLang's).
    timeout_s: of one request, to its last token.
    """

    url: str
    model: str = ""
    api_key: str = ""
    chat: bool = False
    ignore_eos: bool = True
    timeout_s: float = 300.0
    in_flight_max: int = 1024


class Served(msgspec.Struct, frozen=True):
    """What the endpoint says it serves; context_tokens 0 = not told."""

    model: str
    context_tokens: int


class Outcome(msgspec.Struct, kw_only=True):
    """What became of one request. Times are seconds; those of nothing that happened are -1.

    status: of HTTP; 0 = no answer. error: "" = answered to its end. late_s: sent so long after its time.
    answered_s: until the status line; ttft_s: until the first token; gaps_s: between chunks with tokens.
    """

    number: int
    due_s: float
    late_s: float = -1.0
    status: int = 0
    error: str = ""
    retry_after_s: float = -1.0
    answered_s: float = -1.0
    ttft_s: float = -1.0
    end_s: float = -1.0
    gaps_s: "array[float]" = msgspec.field(default_factory=lambda: array("d"))
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0

    @property
    def is_refused(self) -> bool:
        """Whether the endpoint said that it has too much to do."""
        return self.status in {429, 503}


def served(target: Target) -> Served:
    """Ask the endpoint what it serves.

    Raises:
        PeerGone: it does not answer. ConfigError: it serves no such model, or refuses the key.
    """
    url = f"{target.url}/v1/models"
    try:
        answer = httpx.get(url, headers=_headers(target), timeout=ASK_S_MAX)
        found = {str(one["id"]): one for one in answer.json().get("data", [])}
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise PeerGone(f"{url}: {error or type(error).__name__}; is the server running?") from None
    except (ValueError, AttributeError, KeyError, TypeError):
        raise ConfigError(
            f"{url}: status {answer.status_code}, no list of models: is this OpenAI's API?"
        ) from None
    if answer.status_code in {401, 403}:
        raise ConfigError(f"{url}: status {answer.status_code}: give its key in MOONCAKE_API_KEY")
    name = target.model or next(iter(found), "")
    if name not in found:
        raise ConfigError(f"{url}: no model {name!r}; there are {', '.join(found) or 'none'}")
    return Served(name, int(found[name].get("max_model_len") or 0))


async def replay(
    requests: Sequence[TraceRequest],
    shape: Shape,
    target: Target,
    tell: Callable[[Outcome | None], None],
    headers: Sequence[Mapping[str, str]],
    stop: asyncio.Event,
) -> list[Outcome]:
    """Send all requests at their times and return what became of them, in their order.

    Args:
        requests: in order of arrival, the first at 0 s or later.
        shape: how prompts are made.
        target: the endpoint; its model must be named.
        tell: hears None when a request is sent, and its outcome when it has ended.
        headers: of each request besides the usual ones; empty = none.
        stop: once set, nothing more is sent, what is in flight is broken off; only what was due is returned.
    """
    assert target.model
    limits = httpx.Limits(
        max_connections=target.in_flight_max, max_keepalive_connections=target.in_flight_max
    )
    timeout = httpx.Timeout(target.timeout_s, connect=CONNECT_S_MAX)
    outcomes = []
    running: set[asyncio.Task[None]] = set()
    clock = asyncio.get_running_loop().time
    async with httpx.AsyncClient(limits=limits, timeout=timeout, headers=_headers(target)) as client:
        begun_s = clock()
        for number, one in enumerate(requests):
            prompt = prompt_of(one, shape)  # before its time has come
            if await _stopped_within(stop, begun_s + one.arrival_s - clock()):
                break
            outcome = Outcome(number=number, due_s=one.arrival_s)
            outcomes.append(outcome)
            if len(running) >= target.in_flight_max:
                outcome.error = NOT_SENT
                tell(outcome)
                continue
            outcome.late_s = clock() - begun_s - one.arrival_s
            tell(None)
            own = headers[number] if headers else {}
            sending = _one(client, target, prompt, own, outcome, lambda: clock() - begun_s)
            task = asyncio.create_task(sending)
            running.add(task)
            task.add_done_callback(running.discard)
            task.add_done_callback(lambda _, outcome=outcome: tell(outcome))  # type: ignore[misc]
        stopping = asyncio.create_task(stop.wait())
        either: set[asyncio.Future[Any]] = {asyncio.gather(*running, return_exceptions=True), stopping}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        for task in tuple(running):
            task.cancel()
        if running:
            await asyncio.wait(tuple(running), timeout=STOP_S_MAX)
    return outcomes


async def _stopped_within(stop: asyncio.Event, wait_s: float) -> bool:
    if wait_s <= 0:
        await asyncio.sleep(0)
        return stop.is_set()
    try:
        async with asyncio.timeout(wait_s):
            return await stop.wait()
    except TimeoutError:
        return False


async def _one(
    client: httpx.AsyncClient,
    target: Target,
    prompt: Prompt,
    headers: Mapping[str, str],
    outcome: Outcome,
    clock: Callable[[], float],
) -> None:
    """Send one request and note in `outcome` what became of it; `clock` counts from the begin of the run."""
    path = "/v1/chat/completions" if target.chat else "/v1/completions"
    sent_s = clock()
    try:
        async with (
            asyncio.timeout(target.timeout_s),
            client.stream("POST", target.url + path, json=_body(target, prompt), headers=headers) as response,
        ):
            outcome.status, outcome.answered_s = response.status_code, clock() - sent_s
            if response.status_code == 200:
                outcome.error = await _listen(response, outcome, clock, sent_s)
            else:
                outcome.retry_after_s = _seconds(response.headers.get("retry-after", ""))
                outcome.error = _message(await response.aread()) or f"status {response.status_code}"
    except TimeoutError:
        outcome.error = LATE
    except msgspec.DecodeError as error:
        outcome.error = f"an event is no JSON: {error}"
    except httpx.HTTPError as error:
        outcome.error = f"{type(error).__name__}: {error}"[:DETAIL_MAX]
    except asyncio.CancelledError:
        outcome.error = BROKEN_OFF
        raise
    finally:
        outcome.end_s = clock()


async def _listen(
    response: httpx.Response, outcome: Outcome, clock: Callable[[], float], sent_s: float
) -> str:
    """Read a stream to its end; return what was wrong with it, "" = nothing."""
    before_s, finished = 0.0, False
    async for line in sse_lines(response):
        if line.startswith(b"data: [DONE]"):
            return "" if finished else "the stream ended without a finish reason"
        if not line.startswith(b"data: "):
            continue
        event = msgspec.json.decode(line[6:])
        if "error" in event:
            return _message(line[6:]) or "an error without a message"
        if usage := event.get("usage"):
            outcome.input_tokens = usage.get("prompt_tokens") or 0
            outcome.output_tokens = usage.get("completion_tokens") or 0
            outcome.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        for choice in event.get("choices", ()):
            finished = finished or choice.get("finish_reason") is not None
            if _has_tokens(choice):
                now_s = clock()
                if outcome.ttft_s < 0:
                    outcome.ttft_s = now_s - sent_s
                else:
                    outcome.gaps_s.append(now_s - before_s)
                before_s = now_s
    return "the stream broke off"


def _has_tokens(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta")
    if delta is None:
        return True  # a token whose text is empty comes as a chunk all the same
    return any(delta.get(field) for field in ("content", "reasoning", "reasoning_content", "tool_calls"))


def _body(target: Target, prompt: Prompt) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": prompt.output_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.ignore_eos:
        body["ignore_eos"] = True
    if target.chat:
        body["messages"] = [{"role": "user", "content": prompt.content}]
    else:
        body["prompt"] = prompt.content
    return body


def _headers(target: Target) -> dict[str, str]:
    return {"Authorization": f"Bearer {target.api_key}"} if target.api_key else {}


def _message(body: bytes) -> str:
    """Return the message of an error in OpenAI's form, or the begin of whatever it is."""
    try:
        error = msgspec.json.decode(body)
        error = error.get("error", error)
        return str(error.get("message", error) if isinstance(error, dict) else error)[:DETAIL_MAX]
    except (msgspec.DecodeError, AttributeError):
        return body[:DETAIL_MAX].decode(errors="replace")


def _seconds(header: str) -> float:
    try:
        return float(header)
    except ValueError:
        return -1.0

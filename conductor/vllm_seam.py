"""The one place where the gateway touches vLLM 0.32: types, configuration, front end, HTTP app.

Everything the project uses of vLLM is listed in VLLM_SYMBOLS, and tests/contract checks each entry
against the installed version: after an upgrade that test says what to look at again.
The front end is vLLM's own (AsyncLLM, OpenAI and Anthropic routes); only its EngineCoreClient is
ours. Tokenisation: the renderer tokenises text prompts in its own thread pool
(`--renderer-num-workers`), off the event loop, once; chat templates are rendered there too.
"""

import argparse
import asyncio
import os
import socket
from collections.abc import Callable, Collection, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from vllm.exceptions import GracefulHTTPError
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import (
    EngineCoreEvent,
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    EngineCoreRequestType,
    FinishReason,
)
from vllm.v1.engine.core_client import EngineCoreClient
from vllm.v1.metrics.stats import PrefillStats, SchedulerStats
from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

from conductor import token_cache
from conductor.quick_stream import quick_chat, quick_completion
from mooncake.core.drain import Leaving
from mooncake.core.errors import ConfigError
from mooncake.core.shared_port import join

__all__ = [
    "EngineCoreClient",
    "EngineCoreEvent",
    "EngineCoreEventType",
    "EngineCoreOutput",
    "EngineCoreOutputs",
    "EngineCoreRequest",
    "EngineCoreRequestType",
    "FinishReason",
    "MsgpackDecoder",
    "MsgpackEncoder",
    "PrefillStats",
    "RequestOutputKind",
    "SamplingParams",
    "SchedulerStats",
]

VLLM_SERIES: Final = "0.32."
"""The version the seam was written against; another one needs the contract test to be read."""

END_S = 5.0
"""For a server that has to end: uvicorn gives what is open one second (see _server_config)."""
STARTED_POLL_S, CLOSED_POLL_S = 0.02, 0.02
LINGER_S: Final = 1.0
"""A client that uses its connection all the time does so within a second."""

INSECURE_ENV: Final = "VLLM_ALLOW_INSECURE_SERIALIZATION"

_APP: Final = "vllm.entrypoints.launchers"
VLLM_SYMBOLS: Final[dict[str, str]] = {
    "vllm.v1.engine:EngineCoreRequest": "legs.py copies it; the relay forwards it by position",
    "vllm.v1.engine:EngineCoreOutput": "legs.py rewrites ids, usage and events",
    "vllm.v1.engine:EngineCoreOutputs": "links.py decodes it",
    "vllm.v1.engine:EngineCoreEvent": "event times move to the gateway's clock",
    "vllm.v1.engine:EngineCoreEventType": "SCHEDULED starts the measured prefill",
    "vllm.v1.engine:EngineCoreRequestType": "first frame of what the engine is sent",
    "vllm.v1.engine:FinishReason": "mapped to and from the request machine's words",
    "vllm.v1.engine:UtilityOutput": "answers to utility calls",
    "vllm.v1.metrics.stats:PrefillStats": "usage of leg 1 replaces that of leg 2",
    "vllm.v1.metrics.stats:SchedulerStats": "engine_gauges.py says what gauges show",
    "vllm.sampling_params:SamplingParams": "legs.LEG1_PARAMS names every field",
    "vllm.sampling_params:RequestOutputKind": "FINAL_ONLY in leg 1",
    "vllm.v1.serial_utils:MsgpackEncoder": "our requests on the wire",
    "vllm.v1.serial_utils:MsgpackDecoder": "engine outputs off the wire",
    "vllm.v1.engine.core_client:EngineCoreClient": "ClusterCoreClient implements it",
    "vllm.v1.engine.parallel_sampling:ParentRequest": "children are '<index>_<parent id>'",
    "vllm.v1.engine.async_llm:AsyncLLM": "the front end",
    "vllm.v1.engine.output_processor:OutputProcessor": "fail_requests ends a request's stream",
    "vllm.envs:enable_envs_cache": "settings do not change while we serve",
    "vllm.envs:disable_envs_cache": "the same",
    "vllm.exceptions:GracefulHTTPError": "rejections with an HTTP status of our choice",
    "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat": "quick_stream.py writes its chunks",
    "vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion": "the same",
    "vllm.renderers.base:BaseRenderer": "token_cache.py stands before its tokenizer",
    "vllm.utils.async_utils:make_async": "as that tokenizer is called",
    "vllm.v1.engine.detokenizer:FastIncrementalDetokenizer": "decode_tail.py primes its stream",
    "vllm.config:VllmConfig": "built without an engine",
    "vllm.engine.arg_utils:AsyncEngineArgs": "model, logging and parser settings from the arguments",
    "vllm.utils.argparse_utils:FlexibleArgumentParser": "vLLM's own flags pass through",
    f"{_APP}.cli_args:make_arg_parser": "vLLM's own flags pass through",
    f"{_APP}.cli_args:validate_parsed_serve_args": "vLLM's own checks of its flags",
    f"{_APP}.app:build_app": "all HTTP routes",
    f"{_APP}.api_server.app_state:init_app_state": "the serving objects behind the routes",
    f"{_APP}.launcher:NoSignalServer": "uvicorn without its signal handlers: we drain first",
    f"{_APP}.utils.server_utils:get_uvicorn_log_config": "vLLM's log settings for uvicorn",
    "vllm.reasoning:ReasoningParserManager": "plugin of --reasoning-parser-plugin",
    "vllm.tool_parsers:ToolParserManager": "plugin of --tool-parser-plugin",
}
"""module:name -> what we use it for."""


class Unavailable(GracefulHTTPError):
    """A request the cluster turns away: vLLM answers it with `status`, we add Retry-After."""

    def __init__(self, message: str, retry_after_s: float, status: HTTPStatus) -> None:
        super().__init__(message, status)
        self.retry_after_s = retry_after_s


def check_environment() -> None:
    """Refuse to run over a vLLM we do not know, or with pickle on its wire.

    Raises:
        ConfigError: names what is wrong and what to do.
    """
    from vllm.version import __version__

    if not __version__.startswith(VLLM_SERIES):
        raise ConfigError(
            f"vllm {__version__} is installed, this release is built on {VLLM_SERIES}*: install that"
        )
    if os.environ.get(INSECURE_ENV, "0") not in ("", "0"):
        raise ConfigError(f"{INSECURE_ENV} makes vLLM unpickle what it receives: unset it")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """Return vLLM's arguments for its front end.

    Args:
        argv: vLLM's own flags (--model, --served-model-name, --tool-call-parser, --api-key, ...).

    Raises:
        ConfigError: vLLM rejects a flag or a combination of flags.
    """
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = make_arg_parser(FlexibleArgumentParser(description="Mooncake gateway"))
    # cached_tokens in usage is how a client sees the pool at work
    defaults = ["--enable-prompt-tokens-details", "--aggregate-engine-logging"]
    try:
        args = parser.parse_args([*defaults, *argv])
        validate_parsed_serve_args(args)
    except SystemExit as error:
        raise ConfigError("vLLM does not accept the gateway's arguments (see its message above)") from error
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"vLLM does not accept the gateway's arguments: {error}") from error
    if args.model_tag:
        args.model = args.model_tag
    return args


def build_config(args: argparse.Namespace) -> Any:
    """Return a VllmConfig for a front end without an engine.

    As vLLM's own GPU-less renderer does it (launchers/render/entry.py), plus the settings that the
    front end itself reads.
    """
    from vllm import envs
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs

    engine_args = AsyncEngineArgs.from_cli_args(args)
    model_config = engine_args.create_model_config()
    model_config.quantization = None  # no kernels here: skip their capability checks
    envs.VLLM_CPU_KVCACHE_SPACE = 0  # no KV cache here: silence the warning about its size
    config = VllmConfig(
        model_config=model_config,
        logging_config=engine_args.create_logging_config(),
        structured_outputs_config=engine_args.create_structured_outputs_config(),
    )
    scheduler = config.scheduler_config
    scheduler.stream_interval = engine_args.stream_interval
    scheduler.max_num_queued_reqs = engine_args.max_num_queued_reqs
    scheduler.max_num_queued_tokens = engine_args.max_num_queued_tokens
    if engine_args.block_size:
        config.cache_config.block_size = engine_args.block_size
    return config


@contextmanager
def _core_client(client: EngineCoreClient) -> Iterator[None]:
    """Let AsyncLLM's constructor, and nothing else, get `client` instead of starting an engine."""
    original = EngineCoreClient.__dict__["make_async_mp_client"]
    EngineCoreClient.make_async_mp_client = staticmethod(lambda **_: client)
    try:
        yield
    finally:
        EngineCoreClient.make_async_mp_client = original


def build_llm(
    args: argparse.Namespace, config: Any, client: EngineCoreClient, tenant: Callable[[], str] = str
) -> Any:
    """Return vLLM's AsyncLLM over `client`. Call it on the event loop that will serve.

    `tenant`: whose request the running task serves.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    with _core_client(client):
        llm = AsyncLLM(
            vllm_config=config,
            executor_class=None,
            log_stats=not args.disable_log_stats,
            log_requests=args.enable_log_requests,
            aggregate_engine_logging=args.aggregate_engine_logging,
        )
    token_cache.quicken(llm.renderer, tenant)
    return llm


def fail_requests(llm: Any, request_id: str, error: Exception) -> list[str]:
    """End one request's stream with `error`; return the ids whose legs must be aborted.

    A child of n > 1 takes its siblings with it: they share the client's one response.
    """
    processor = llm.output_processor
    state = processor.request_states.get(request_id)
    if state is None:
        return []
    queue = state.queue
    root = request_id if state.parent_req is None else state.parent_req.request_id
    aborted: list[str] = processor.abort_requests([root], internal=True)
    if queue is not None:
        queue.output = None  # the abort's own final output must not reach the client first
        queue.put(error)
    return [rid for rid in aborted if rid != request_id]


def load_plugins(args: argparse.Namespace) -> None:
    """Import the tool and reasoning parser plugins that the arguments name."""
    if args.tool_parser_plugin:
        from vllm.tool_parsers import ToolParserManager

        ToolParserManager.import_tool_parser(args.tool_parser_plugin)
    if args.reasoning_parser_plugin:
        from vllm.reasoning import ReasoningParserManager

        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)


async def build_app(llm: Any, args: argparse.Namespace) -> Any:
    """Return vLLM's FastAPI app over `llm`."""
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app as build

    tasks = await llm.get_supported_tasks()
    app = build(args, tasks, llm.model_config)
    state = app.state
    await init_app_state(llm, state, args, tasks)
    state.openai_serving_chat = quick_chat(state.openai_serving_chat)
    state.openai_serving_completion = quick_completion(state.openai_serving_completion)
    return app


@dataclass(frozen=True)
class Serving:
    """How a server begins and ends.

    leaving: when it drains, and when it ends.
    drain: done when no connection is left, for what has none.
    serves: called once connections are answered.
    share_port: with other gateways of this host, see mooncake.core.shared_port.
    delay_s: from the drain until it takes no more connections: balancers have seen that it is unready.
    """

    leaving: Leaving
    drain: Callable[[], Coroutine[Any, Any, None]]
    serves: Callable[[], None] = lambda: None
    share_port: bool = False
    delay_s: float = 0.0


async def serve(app: Any, asgi: Any, args: argparse.Namespace, serving: Serving) -> None:
    """Serve HTTP until told to leave, then take no new connections, finish what came, and close.

    Args:
        app: what build_app returned.
        asgi: `app`, or middleware around it (vLLM has built its own middleware stack by then).
        args: from parse_args.
        serving: how it begins and ends.

    Raises:
        ConfigError: the port is not ours to bind.
        Exception: what `serves` or `drain` raises; the server has ended then, too.

    vLLM's serve_http would stop its engine client before the HTTP server, which cuts requests in
    flight; here the order is the other way round.
    """
    from vllm import envs
    from vllm.entrypoints.launchers.launcher import NoSignalServer

    server = NoSignalServer(_server_config(asgi, args))
    app.state.server = server
    envs.enable_envs_cache()  # as vLLM's engine does: its front end asks the environment for every token
    leaving = serving.leaving
    joined = join(args.host or "", args.port) if serving.share_port and not args.uds else None
    http = asyncio.create_task(server.serve(joined), name="http")
    stopping = asyncio.create_task(_stopped(server, leaving, serving.serves), name="stop")
    try:
        await asyncio.wait({http, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if not http.done():
            stopping.result()  # it may have failed, too
            await leaving.pause(serving.delay_s)
            await _leave(server, leaving.at_once)
            await leaving.unless_at_once(serving.drain())
            leaving.is_done = True
            await leaving.told.wait()
            server.should_exit = True
        await http
    finally:
        server.should_exit = True  # whatever it was that failed
        stopping.cancel()
        await asyncio.wait({http}, timeout=END_S)
        http.cancel()
        await asyncio.gather(http, stopping, return_exceptions=True)
        envs.disable_envs_cache()


def _server_config(asgi: Any, args: argparse.Namespace) -> Any:
    import uvicorn
    from vllm import envs
    from vllm.entrypoints.launchers.utils.server_utils import get_uvicorn_log_config

    config = uvicorn.Config(
        asgi,
        host=args.host,
        port=args.port,
        uds=args.uds,
        log_level=args.uvicorn_log_level,
        access_log=not args.disable_uvicorn_access_log,
        timeout_keep_alive=envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        timeout_graceful_shutdown=1,
        ssl_keyfile=args.ssl_keyfile,
        ssl_certfile=args.ssl_certfile,
        ssl_ca_certs=args.ssl_ca_certs,
        ssl_cert_reqs=args.ssl_cert_reqs,
        log_config=get_uvicorn_log_config(args),  # None: uvicorn's lines go where ours do
    )
    if args.h11_max_incomplete_event_size is not None:
        config.h11_max_incomplete_event_size = args.h11_max_incomplete_event_size
    if args.h11_max_header_count is not None:
        config.h11_max_header_count = args.h11_max_header_count
    config.load()
    return config


async def _stopped(server: Any, leaving: Leaving, serves: Callable[[], None]) -> None:
    while not server.started:  # noqa: ASYNC110 - uvicorn has no event for it
        await asyncio.sleep(STARTED_POLL_S)
    serves()
    await leaving.draining.wait()


async def _leave(server: Any, at_once: asyncio.Event) -> None:
    """Take no new connections; return when the open ones are done, or `at_once`.

    A client may be about to use a connection that is idle: it gets LINGER_S for that, and is told with each
    answer that the connection ends.
    """
    state = server.server_state
    await _accept_rest(server)
    server.config.encoded_headers.append((b"connection", b"close"))
    state.default_headers = [*state.default_headers, (b"connection", b"close")]  # of the requests to come
    for connection in list(state.connections):
        if connection.cycle is not None and not connection.cycle.response_complete:
            connection.shutdown()  # after its answer
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            await _closed(state.connections, at_once)
    for connection in list(state.connections):
        connection.shutdown()
    await _closed(state.connections, at_once)


async def _closed(connections: Collection[Any], at_once: asyncio.Event) -> None:
    while connections and not at_once.is_set():  # noqa: ASYNC110 - nor for this
        await asyncio.sleep(CLOSED_POLL_S)


async def _accept_rest(server: Any) -> None:
    """Close the listeners. Connections that the kernel has made already are served: else they were reset."""
    config, loop = server.config, asyncio.get_running_loop()
    last: list[socket.socket] = []
    for listener in server.servers:
        listening = [socket.socket(fileno=os.dup(one.fileno())) for one in listener.sockets]
        listener.close()
        for one in listening:
            one.setblocking(False)
            with suppress(BlockingIOError, InterruptedError):
                while True:
                    last.append(one.accept()[0])
            one.close()

    def protocol() -> asyncio.Protocol:
        made: asyncio.Protocol = config.http_protocol_class(
            config=config, server_state=server.server_state, app_state=server.lifespan.state
        )
        return made

    for one in last:
        with suppress(OSError, TimeoutError):  # the client has gone, or speaks no TLS
            await loop.connect_accepted_socket(protocol, one, ssl=config.ssl)

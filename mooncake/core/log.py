"""Logs: coloured and short on a terminal, else one JSON object a line; ours, vLLM's and uvicorn's.

A line of a request has its request_id, and its trace_id where it is traced (docs/tracing.md).
"""

import logging
import os
import sys
from types import TracebackType
from typing import Any, Final

import structlog

from mooncake.core.errors import ConfigError

FORMATS: Final = ("auto", "json", "console")
LEVELS: Final = ("debug", "info", "warning", "error")
INHERITED_ENV: Final = "_MOONCAKE_LOGS"
"""Level and format for a child that is started by name: an engine, by its relay."""

_VLLM_CONFIGURES: Final = "VLLM_CONFIGURE_LOGGING"
_VLLM_OWN: Final = (_VLLM_CONFIGURES, "VLLM_LOGGING_CONFIG_PATH")
"""Who sets one of these wants vLLM's own logs."""
_ACCESS_ARGS: Final = 5
"""Of a line of uvicorn's access log: client, method, path, HTTP version, status."""


class _Handler(logging.StreamHandler[Any]):
    """Ours among the root logger's."""


def setup(service: str, level: str = "info", log_format: str = "auto") -> None:
    """Configure the logs of this process. `service` names it on every line.

    Logs go to stderr; stdout stays for what a command was asked to print.

    Args:
        service: what this process is.
        level: debug, info, warning or error.
        log_format: auto (console on a terminal, else JSON), json or console.

    Raises:
        ConfigError: no such level or format.
    """
    _check("log_level", level.lower(), LEVELS)
    _check("log_format", log_format, FORMATS)
    people = sys.stderr.isatty() if log_format == "auto" else log_format == "console"
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
        if people
        else structlog.processors.JSONRenderer()
    )

    def of_service(_logger: Any, _name: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event["service"] = service
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        of_service,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if people else "iso", utc=not people),
        structlog.processors.StackInfoRenderer(),
    ]
    ending: list[structlog.typing.Processor] = [renderer]
    if not people:
        ending.insert(0, structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*shared, *ending],
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=False,  # set_level
    )
    structlog.contextvars.clear_contextvars()
    _take_over(shared, ending)
    set_level(level)
    os.environ[INHERITED_ENV] = f"{service}/{level}/{log_format}"
    if not people:
        sys.excepthook = _uncaught


def setup_inherited(part: str) -> None:
    """Configure the logs of a child process as its parent's; `part`: of the parent's service."""
    service, level, log_format = os.environ.get(INHERITED_ENV, "mooncake/info/auto").split("/")
    setup(f"{service}-{part}", level, log_format)


def set_level(level: str) -> None:
    """Log from `level` on, at once and everywhere in this process.

    Raises:
        ConfigError: no such level.
    """
    _check("log_level", level.lower(), LEVELS)
    number = _number(level)
    structlog.configure(
        **{**structlog.get_config(), "wrapper_class": structlog.make_filtering_bound_logger(number)}
    )
    logging.getLogger().setLevel(max(number, logging.WARNING) if number > logging.DEBUG else logging.INFO)
    own = os.environ.get("VLLM_LOGGING_LEVEL", "").upper()
    logging.getLogger("vllm").setLevel(own or number)


def as_library(level: str = "warning") -> None:
    """Where the application has not configured its logs: warnings to stderr, stdout is the application's."""
    if structlog.is_configured():
        return
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(_number(level)),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # looked up anew: it may be replaced
        cache_logger_on_first_use=False,
    )


def _check(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{key} = {value!r}: must be one of {', '.join(allowed)}")


def _number(level: str) -> int:
    return logging.getLevelNamesMapping()[level.upper()]


def _take_over(shared: list[structlog.typing.Processor], ending: list[structlog.typing.Processor]) -> None:
    """Let what others log through `logging` look as ours."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.add_logger_name, _access],
            pass_foreign_args=True,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *ending],
        )
    )
    root = logging.getLogger()
    for known in [one for one in root.handlers if isinstance(one, _Handler)]:
        root.removeHandler(known)
    root.addHandler(handler)
    logging.captureWarnings(True)
    if not any(os.environ.get(name) for name in _VLLM_OWN):
        os.environ[_VLLM_CONFIGURES] = "0"  # read when vLLM is imported, or configured
    if os.environ.get(_VLLM_CONFIGURES) == "0":
        vllm = logging.getLogger("vllm")  # has handlers already in what a warm process forks
        vllm.handlers.clear()
        vllm.propagate = True


def _access(
    _logger: structlog.typing.WrappedLogger, _name: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    """Make fields of a line of uvicorn's access log."""
    args = event.pop("positional_args", ())
    if event.get("logger") == "uvicorn.access" and len(args) == _ACCESS_ARGS:
        client, method, path, _, status = args
        event.update(event="http.access", client=client, method=method, path=path, status=status)
    return event


def _uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """An error that ends the process is one line, too."""
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    structlog.get_logger(__name__).critical("uncaught", error=str(error), exc_info=(kind, error, trace))

"""Logs: coloured and short on a terminal, one JSON object a line otherwise."""

import logging
import sys

import structlog


def setup(service: str, level: str = "info") -> None:
    """Configure structlog for this process. `service` names it on every line.

    Logs go to stderr; stdout stays for what a command was asked to print.
    """
    tty = sys.stderr.isatty()
    renderer: structlog.typing.Processor = (
        structlog.dev.ConsoleRenderer(colors=True) if tty else structlog.processors.JSONRenderer()
    )
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S.%f" if tty else "iso", utc=not tty),
        structlog.processors.StackInfoRenderer(),
    ]
    if not tty:
        processors.append(structlog.processors.format_exc_info)
    structlog.configure(
        processors=[*processors, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service)


def as_library(level: str = "warning") -> None:
    """Where the application has not configured its logs: warnings to stderr, stdout is the application's."""
    if structlog.is_configured():
        return
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=lambda *_: structlog.PrintLogger(sys.stderr),  # looked up anew: it may be replaced
        cache_logger_on_first_use=False,
    )

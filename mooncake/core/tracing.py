"""Tracing with OpenTelemetry: off unless an endpoint is named, and then nothing of it is imported.

Switched by OpenTelemetry's own variables, which every process of the cluster inherits: where spans go
(OTEL_EXPORTER_OTLP_ENDPOINT), how many are kept (OTEL_TRACES_SAMPLER), as which service (OTEL_SERVICE_NAME).
Spans hold names, counts and seconds: never a prompt, an answer, a token or a key.
"""

import os
import re
import time
from typing import TYPE_CHECKING, Final

from mooncake.core.config import fail
from mooncake.core.errors import ConfigError

if TYPE_CHECKING:
    from mooncake.core.tracing_sdk import Tracing

ENDPOINT_ENV: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
TRACES_ENDPOINT_ENV: Final = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
_OFF: Final = {"OTEL_SDK_DISABLED": "true", "OTEL_TRACES_EXPORTER": "none"}
_URL: Final = re.compile(r"https?://[^\s/?#]+[^\s]*", re.ASCII)


def use_endpoint(url: str) -> None:
    """Let this process and its children send spans to `url`; "" changes nothing.

    Raises:
        ConfigError: it is no URL.
    """
    if url:
        check_url(url, "otlp_endpoint")
        os.environ[ENDPOINT_ENV] = url
        os.environ.pop(TRACES_ENDPOINT_ENV, None)  # which comes before it: a setting comes before both


def endpoint() -> str:
    """Return where spans go; "" = nowhere.

    Raises:
        ConfigError: the environment names no URL.
    """
    if any(os.environ.get(name, "").strip().lower() == value for name, value in _OFF.items()):
        return ""
    for name in (TRACES_ENDPOINT_ENV, ENDPOINT_ENV):
        if url := os.environ.get(name, "").strip():
            check_url(url, name)
            return url
    return ""


def check_url(url: str, key: str) -> None:
    """Return if `url` may be where spans go.

    Raises:
        ConfigError: it is no URL; `key` is who said it.
    """
    if not _URL.fullmatch(url):
        raise fail(
            key, url, "must be http://HOST:PORT of an OTLP collector; its HTTP port is 4318, gRPC's 4317"
        )


def open_tracing(role: str, name: str = "") -> "Tracing | None":
    """Return what makes spans in this process, with a thread that sends them; None: tracing is off.

    Args:
        role: gateway, core, prefill or decode: service.name is mooncake-ROLE unless the environment says.
        name: of the process, among those of its role.

    Raises:
        ConfigError: it is switched on and cannot be.
    """
    url = endpoint()
    if not url:
        return None
    try:
        from mooncake.core.tracing_sdk import Tracing, exporter

        sender = exporter()  # imports the package of its protocol
    except ImportError as error:
        what = f"{url!r} asks for traces, but {error.name} is not installed"
        raise ConfigError(f"{what}: pip install 'mooncake-serving[otel]', or unset {ENDPOINT_ENV}") from error
    return Tracing(sender, role, name)


class WallClock:
    """Times of the monotonic clock as spans have them."""

    __slots__ = ("_offset_ns",)

    def __init__(self) -> None:
        """Compare the clocks now: right for as long as a request takes."""
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def ns(self, monotonic_s: float) -> int:
        """Return nanoseconds since 1970."""
        return int(monotonic_s * 1e9) + self._offset_ns

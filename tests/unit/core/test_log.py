"""Logs off a terminal are one JSON object a line, whoever writes them, and lines of a request have its id."""

import json
import os
import pty
import subprocess
import sys

import pytest

from mooncake.core import log
from mooncake.core.errors import ConfigError

SPEAKERS = """
import logging, threading, warnings, structlog
from mooncake.core import log
log.setup("gateway", {level!r}, {format!r})
ours = structlog.get_logger("ours")
with structlog.contextvars.bound_contextvars(request_id="r-1", trace_id="t-1"):
    ours.info("dispatch.something", blocks=3)
    logging.getLogger("vllm.v1.engine").info("Added request %s", "r-1")
    access = logging.getLogger("uvicorn.access")
    access.setLevel("INFO")
    access.info('%s - "%s %s HTTP/%s" %d', "127.0.0.1:5", "POST", "/v1/completions", "1.1", 200)
logging.getLogger("httpx").info("chatter")
warnings.warn("careful")
try:
    int("x")
except ValueError:
    ours.exception("went.wrong")
thread = threading.Thread(target=lambda: ours.warning("from.a.thread"))
thread.start(); thread.join()
ours.debug("too.much")
log.set_level("error")
ours.info("no.more")
logging.getLogger("vllm.v1.engine").info("no more")
log.set_level("debug")
ours.debug("again")
raise RuntimeError("the end")
"""


def run(level: str = "info", log_format: str = "auto", **options: object) -> subprocess.CompletedProcess[str]:
    code = SPEAKERS.format(level=level, format=log_format)
    return subprocess.run(
        [sys.executable, "-c", code],
        text=True,
        timeout=60,
        check=False,
        **{"capture_output": True, **options},
    )


@pytest.fixture(scope="module")
def lines() -> list[dict[str, object]]:
    done = run()
    assert done.stdout == ""
    return [json.loads(line) for line in done.stderr.splitlines()]


def the(lines: list[dict[str, object]], event: str) -> dict[str, object]:
    (found,) = (line for line in lines if str(line["event"]).startswith(event))
    return found


def test_every_line_is_an_object_with_its_service_level_and_time(lines: list[dict[str, object]]) -> None:
    assert lines
    assert all({"event", "service", "level", "timestamp"} <= set(line) for line in lines)
    assert {line["service"] for line in lines} == {"gateway"}
    assert the(lines, "from.a.thread")["level"] == "warning"


def test_lines_of_a_request_have_its_ids_whoever_writes_them(lines: list[dict[str, object]]) -> None:
    for event in ("dispatch.something", "Added request r-1", "http.access"):
        line = the(lines, event)
        assert (line["request_id"], line["trace_id"]) == ("r-1", "t-1")
    assert "request_id" not in the(lines, "from.a.thread")


def test_the_access_log_has_fields(lines: list[dict[str, object]]) -> None:
    line = the(lines, "http.access")
    assert (line["method"], line["path"], line["status"]) == ("POST", "/v1/completions", 200)


def test_an_error_is_one_line_also_the_one_that_ends_the_process(lines: list[dict[str, object]]) -> None:
    assert "ValueError: invalid literal" in str(the(lines, "went.wrong")["exception"])
    assert the(lines, "uncaught")["error"] == "the end"
    assert "careful" in str(next(line for line in lines if line.get("logger") == "py.warnings")["event"])


def test_the_level_changes_while_the_process_runs(lines: list[dict[str, object]]) -> None:
    said = [line["event"] for line in lines]
    assert "again" in said
    assert not {"too.much", "no.more", "no more", "chatter"} & set(said)


def test_on_a_terminal_lines_are_for_people() -> None:
    ours, theirs = pty.openpty()
    try:
        with os.fdopen(theirs, "wb", closefd=False) as terminal:
            assert run(capture_output=False, stdout=subprocess.DEVNULL, stderr=terminal).returncode == 1
        text = os.read(ours, 1 << 16).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert "dispatch.something" in text
    assert "Added request r-1" in text
    assert not text.lstrip().startswith("{")


def test_a_format_can_be_chosen() -> None:
    assert not run(log_format="console").stderr.startswith("{")


@pytest.mark.parametrize(
    ("level", "log_format", "key"), [("loud", "auto", "log_level"), ("info", "xml", "log_format")]
)
def test_a_level_or_format_that_there_is_not_is_told(level: str, log_format: str, key: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} = .*must be one of"):
        log.setup("x", level, log_format)


def test_an_engine_logs_as_its_relay_does() -> None:
    code = (
        "from mooncake.core import log; log.setup('prefill', 'warning', 'json')\n"
        "import subprocess, sys\n"
        "child = 'import structlog; from mooncake.core import log; log.setup_inherited(\"engine\");'\n"
        'child += \'structlog.get_logger().info("no"); structlog.get_logger().warning("yes")\'\n'
        "subprocess.run([sys.executable, '-c', child], check=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    (line,) = (json.loads(line) for line in done.stderr.splitlines())
    assert (line["event"], line["service"]) == ("yes", "prefill-engine")

"""Asks a master over HTTP, and waits for what comes with a store's own clock."""

import http.client
import json
import threading
import urllib.parse
from collections.abc import Callable
from typing import Any

PATIENCE_S = 30.0
PAUSE_S = 0.02


def ask(master, path: str, method: str = "GET", body: Any = None) -> tuple[int, str]:
    """Return status and text; `body` is sent as JSON, or as it is if it is bytes."""
    url = urllib.parse.urlsplit(master.url)
    connection = http.client.HTTPConnection(url.hostname, url.port, timeout=PATIENCE_S)
    raw = body if isinstance(body, bytes) else json.dumps({} if body is None else body).encode()
    try:
        sends = method in ("POST", "PUT")
        connection.request(method, path, raw if sends else None, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask_json(master, path: str, method: str = "GET", body: Any = None) -> tuple[int, dict]:
    """As `ask`, decoded."""
    status, text = ask(master, path, method, body)
    return status, json.loads(text)


def numbers(master) -> dict[str, int]:
    """Return the metrics without labels."""
    lines = [line for line in ask(master, "/metrics")[1].splitlines() if line[:1] != "#" and "{" not in line]
    return {name: float(value) for name, value in map(str.split, lines)}


def until(holds: Callable[[], Any]) -> Any:
    """Return the first true answer of `holds`."""
    pause = threading.Event()
    for _ in range(int(PATIENCE_S / PAUSE_S)):
        if answer := holds():
            return answer
        pause.wait(PAUSE_S)
    raise AssertionError("it never came")

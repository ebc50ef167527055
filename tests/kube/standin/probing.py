"""Asking a container how it is: one attempt of a probe."""

import asyncio
import contextlib
from typing import Any

from tests.kube.standin.container import Container

Object = dict[str, Any]
LINE_BYTES_MAX = 4096


def port_number(container: Object, port: int | str) -> int:
    """Return a port's number; a text names one of the container's ports.

    Raises:
        KeyError: the container has no port of that name.
    """
    if isinstance(port, int):
        return port
    named = {one.get("name"): one["containerPort"] for one in container.get("ports", [])}
    return int(named[port])


async def attempt(probe: Object, spec: Object, ip: str, container: Container, timeout_s: float) -> bool:
    """Return whether one attempt succeeds in time."""
    if "exec" in probe:
        return await container.exec(probe["exec"]["command"], timeout_s) == 0
    action = probe.get("httpGet") or probe["tcpSocket"]
    host = action.get("host") or ip
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host, port_number(spec, action["port"]))
            try:
                return "httpGet" not in probe or await _get(reader, writer, action, host)
            finally:
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
    except (OSError, TimeoutError, ValueError, asyncio.IncompleteReadError):
        return False


async def _get(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, action: Object, host: str) -> bool:
    headers = "".join(f"{one['name']}: {one['value']}\r\n" for one in action.get("httpHeaders", []))
    path = action.get("path", "/")
    lines = [f"GET {path} HTTP/1.1", f"Host: {host}", "User-Agent: kube-probe", "Connection: close"]
    writer.write(("\r\n".join(lines) + f"\r\n{headers}\r\n").encode())
    await writer.drain()
    words = (await reader.readline()).split()  # none: hung up without an answer
    return len(words) > 1 and 200 <= int(words[1]) < 400

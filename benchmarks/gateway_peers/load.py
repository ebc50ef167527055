"""A load client that takes little of the machine: plain sockets, kept open, looked at together.

Streams are read in sweeps: a client that woke up for every token would compete with what it measures.
"""

import json
import select
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

from mooncake.core.errors import PeerTimeout, ProtocolError

ROUND_S_MAX = 120.0
SWEEP_S = 0.02
READ_BYTES = 1 << 18
END_OF_CHUNKS = b"\r\n0\r\n\r\n"


def body(messages: list[dict[str, str]], max_tokens: int, *, stream: bool) -> bytes:
    """Return the JSON of one chat request."""
    asked: dict[str, Any] = {
        "model": "m",
        "messages": messages,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    if stream:
        asked |= {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps(asked).encode()


class Connection:
    """One kept connection; one exchange at a time."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=ROUND_S_MAX)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.events = 0
        self._answer = bytearray()
        self._length = -1
        self._seen = 0

    def send(self, payload: bytes) -> None:
        """Ask."""
        self._answer, self._length, self._seen, self.events = bytearray(), -1, 0, 0
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(payload)}\r\n\r\n"
        )
        self.socket.sendall(head.encode() + payload)

    def read(self) -> bool:
        """Take what is there; True: the answer is whole.

        Raises:
            ProtocolError: it is no answer of the kind we asked for.
        """
        got = self.socket.recv(READ_BYTES)
        answer = self._answer
        answer += got
        if not got:
            raise ProtocolError(f"closed early: {bytes(answer[-300:])!r}")
        if self._length < 0 and (end := answer.find(b"\r\n\r\n")) >= 0:
            head = bytes(answer[:end]).lower()
            if not answer.startswith(b"HTTP/1.1 200"):
                raise ProtocolError(f"answered {bytes(answer[:500])!r}")
            _, found, rest = head.partition(b"content-length:")
            self._length = end + 4 + int(rest.split(b"\r\n")[0]) if found else 0
        self.events += answer.count(b"data: {", max(0, self._seen - 6))
        self._seen = len(answer)
        if self._length > 0:
            return len(answer) >= self._length
        return answer.endswith(END_OF_CHUNKS)

    def tokens(self) -> int:
        """Return completion_tokens of the answer's usage."""
        _, _, rest = bytes(self._answer).rpartition(b'"completion_tokens":')
        digits = rest.lstrip()
        return int(digits[: len(digits) - len(digits.lstrip(b"0123456789"))] or b"0")

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def streams(connections: list[Connection], payloads: list[bytes]) -> tuple[int, int]:
    """Stream one answer per connection, all at once; return (tokens, events that carried them)."""
    for connection, payload in zip(connections, payloads, strict=True):
        connection.send(payload)
    left = {one.socket.fileno(): one for one in connections}
    end_s = time.monotonic() + ROUND_S_MAX
    while left:
        ready, _, _ = select.select(list(left), (), (), 1.0)
        for number in ready:
            if left[number].read():
                del left[number]
        if time.monotonic() > end_s:
            raise PeerTimeout(f"{len(left)} streams are not over after {ROUND_S_MAX:g} s")
        time.sleep(SWEEP_S)
    return sum(one.tokens() for one in connections), sum(one.events for one in connections)


def requests(connections: list[Connection], payloads: Iterator[bytes], count: int) -> None:
    """Send `count` requests, one at a time per connection; every answer has one token."""
    idle, busy, sent, done = list(connections), {}, 0, 0
    end_s = time.monotonic() + ROUND_S_MAX
    while done < count:
        while idle and sent < count:
            one = idle.pop()
            one.send(next(payloads))
            busy[one.socket.fileno()] = one
            sent += 1
        ready, _, _ = select.select(list(busy), (), (), 1.0)
        for number in ready:
            one = busy[number]
            if one.read():
                if one.tokens() != 1:
                    raise ProtocolError(f"{one.tokens()} tokens where one was asked for")
                idle.append(busy.pop(number))
                done += 1
        if time.monotonic() > end_s:
            raise PeerTimeout(f"{count - done} requests are not over after {ROUND_S_MAX:g} s")


def first_tokens(connection: Connection, payload: Callable[[], bytes], count: int) -> list[float]:
    """Stream `count` answers, one after the other; return seconds from asking to each first token's text."""
    found = []
    for _ in range(count):
        asked = payload()
        began_s = time.perf_counter()
        connection.send(asked)
        first_s, over = 0.0, False
        while not over:
            over = connection.read()
            # the first event of a chat only says who speaks
            if not first_s and connection.events >= 2:
                first_s = time.perf_counter() - began_s
        found.append(first_s)
    return found

"""Hands samples to a Prometheus by its remote-write protocol, holes as the stale markers that scrapes leave.

The protocol is protobuf in a snappy block; both are written by hand here, the latter without compression.
"""

import math
import struct
import urllib.request

from mooncake.live.samples import Samples

STALE = struct.pack("<Q", 0x7FF0000000000002)
CHUNK = 60_000


def write(url: str, samples: Samples) -> None:
    """Hand over everything in `samples`; raises where Prometheus refuses."""
    body = b""
    for labels, values in zip(samples.labels, samples.values, strict=True):
        series = b"".join(_field(1, _field(1, n.encode()) + _field(2, v.encode())) for n, v in sorted(labels))
        had = False
        for at_s, value in zip(samples.times_s.tolist(), values.tolist(), strict=True):
            if math.isnan(value) and not had:
                continue
            had = not math.isnan(value)
            number = struct.pack("<d", value) if had else STALE
            series += _field(2, b"\x09" + number + b"\x10" + _varint(round(at_s * 1000)))
        body += _field(1, series)
    request = urllib.request.Request(
        f"{url}/api/v1/write",
        _snappy(body),
        {
            "Content-Encoding": "snappy",
            "Content-Type": "application/x-protobuf",
            "X-Prometheus-Remote-Write-Version": "0.1.0",
        },
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        assert reply.status in (200, 204)


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)


def _field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + _varint(len(content)) + content


def _snappy(content: bytes) -> bytes:
    found = bytearray(_varint(len(content)))
    for i in range(0, len(content), CHUNK):
        piece = content[i : i + CHUNK]
        found += bytes([61 << 2]) + struct.pack("<H", len(piece) - 1) + piece
    return bytes(found)

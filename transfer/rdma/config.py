"""Settings of the RDMA transport, and the bounds that are not settings."""

from collections.abc import Callable

import msgspec

from mooncake.core.errors import ConfigError

CONNECT_S = 3.0
"""Longest wait for the owner's half of a new queue pair. Both halves take 9-28 ms under emulation; address
resolution of a route that does not exist gives up after 1-3 s."""
FENCE_S = 1.0
"""Longest wait for the owner to destroy its ends. An owner that lives answers within a millisecond; within
this bound a WRITE that failed holds its caller up, also past the deadline of the call."""
CLOSE_S = 5.0
"""Longest wait for running transfers when the transport is closed; they see it at their next poll."""
STALL_S = 3.0
"""Without any completion for so long, a path is dead: a queue pair gives up by itself after 0.5 s, but some
devices take 7 retries for 'for ever', and a twin that was closed then never answers."""
GIVES_UP_S = 0.5
"""A call of a shorter deadline that saw no completion says nothing about the path: it gives up after this."""
POLL_MAX = 64
"""Completions taken at once."""
ATTEMPTS = 3
"""Rounds with a broken lane before the rest is handed back: the second goes elsewhere, the third is luck."""
WINDOW_BYTES = 16 << 20
"""In flight on one queue pair: 400 Gbit/s for 300 us, and the most that a cancelled call has to tear."""
BURST = 16
"""Works per post: software devices send inside the call, and cancellation is looked at in between."""
SPINS = 64
"""Empty polls before the first nap: a few 10 us, the latency of a small read."""
NAP_S = 20e-6
NAP_S_MAX = 200e-6
"""Naps double up to this: with 16 MiB in flight no NIC runs dry, and a core is left to the engine."""

Meter = Callable[[str, str, int, float], None]
"""Called with (link, event, size_bytes, elapsed_s); link is "rdma/<local>-<remote>@<peer>", event is one of
"connected", "moved", "retried", "failed", "evicted", "quarantined"."""


def no_meter(link: str, event: str, size_bytes: int, elapsed_s: float) -> None:
    """Count nothing."""


class RdmaConfig(msgspec.Struct, frozen=True):
    """Settings."""

    devices: tuple[str, ...] = ()
    """Ports to open, "mlx5_0" or "mlx5_0:2"; () = the first port of every device."""
    gid_index: int | None = None
    """None = the first IPv4-mapped one."""
    slice_bytes: int = 1 << 20
    """Longest work: Python's 50 us each do not count, and it is small enough to spread and to retry."""
    depth_max: int = 128
    """Works in flight on one queue pair, if the device allows."""
    endpoints_max: int = 256
    """Queue pairs that this engine makes (upstream's default)."""
    guests_max: int = 1024
    """Queue pairs that peers have us make."""
    lanes: int = 2
    """Runs to one peer that profit from being made at once: one posts while the other polls."""

    def __post_init__(self) -> None:
        """Check.

        Raises:
            ConfigError: a value that cannot work.
        """
        for spec in self.devices:
            name, colon, port = spec.partition(":")
            if not name or (colon and not port.isdecimal()):
                raise ConfigError(f"rdma devices: {spec!r}: write NAME or NAME:PORT")
        for key, least, most in (
            ("slice_bytes", 4096, 1 << 30),
            ("depth_max", 1, 4096),
            ("endpoints_max", 1, 65_536),
            ("guests_max", 1, 65_536),
            ("lanes", 1, 16),
        ):
            value = getattr(self, key)
            if not least <= value <= most:
                raise ConfigError(f"rdma {key} = {value}: must be between {least} and {most}")

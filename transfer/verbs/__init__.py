"""RDMA verbs behind one small protocol, with two real backends and a fake (docs/adr/0003)."""

from pathlib import Path

import msgspec

from mooncake.core.errors import ConfigError
from transfer.verbs import ibverbs_backend, pyverbs_backend
from transfer.verbs.api import Verbs

KERNEL = Path("/sys/class/infiniband_verbs")
"""Is there as soon as the kernel's module ib_uverbs is, with or without a device."""

_BACKENDS = {
    ibverbs_backend.NAME: ibverbs_backend.load,
    pyverbs_backend.NAME: pyverbs_backend.load,
}
"""In the order of preference."""

NAMES = ("auto", *_BACKENDS)


class Loaded(msgspec.Struct, frozen=True):
    """What was found. `reason` is for people: why there is none, or which one it is."""

    verbs: Verbs | None
    reason: str


def load(name: str = "auto") -> Loaded:
    """Find a verbs library that sees a device.

    Args:
        name: "ibverbs", "pyverbs", or "auto" = the first of these that works.

    Raises:
        ConfigError: unknown name. A machine without RDMA is no error.
    """
    if name not in NAMES:
        raise ConfigError(f"verbs {name!r}: choose one of {', '.join(NAMES)}")
    if not KERNEL.is_dir():
        return Loaded(None, f"no RDMA here: the kernel has no InfiniBand support (no {KERNEL})")
    reasons = []
    for each in _BACKENDS if name == "auto" else (name,):
        try:
            verbs = _BACKENDS[each]()
        except ConfigError as error:
            reasons.append(str(error))
            continue
        devices = verbs.devices()
        if devices:
            return Loaded(verbs, f"{each}: {', '.join(devices)}")
        reasons.append(f"{each}: no device")
    return Loaded(None, f"no RDMA here: {'; '.join(reasons)}")

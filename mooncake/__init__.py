"""Mooncake: KVCache-centric, disaggregated LLM serving on vLLM."""

import importlib

__version__ = "0.1.0"

_LAZY = ("BufferPool", "RegisteredBufferPool")
"""Upstream's package has them at its root; here they are loaded when asked for, not by every process."""


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(importlib.import_module("mooncake.buffer_pool"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

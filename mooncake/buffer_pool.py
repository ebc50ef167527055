"""`mooncake.buffer_pool`: registered memory by lease; see mooncake.dropin.store.buffers."""

from mooncake.store import BufferPool, RegisteredBufferPool

__all__ = ["BufferPool", "RegisteredBufferPool"]

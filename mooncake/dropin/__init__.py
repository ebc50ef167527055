"""Upstream's interfaces on our parts: behind `mooncake.engine`, `mooncake.store` and their commands."""

"""Imported by vLLM in the process of each rank (`--worker-extension-cls`), before it opens its device."""

from mooncake.worker.nodes import bind_rendezvous

bind_rendezvous()  # an import is the only moment of ours there, whether that process is a fork or a fresh one


class Rank:
    """Adds nothing to vLLM's worker."""

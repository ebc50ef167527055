"""Imported by vLLM in the process of each rank (`--worker-extension-cls`), before it opens its device."""

from mooncake.worker.nodes import hold_rank

hold_rank()  # an import is the only moment of ours in that process before torch.distributed listens


class Rank:
    """Adds nothing to vLLM's worker."""

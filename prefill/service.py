"""`mooncake prefill`: an engine that computes prompts and hands their KV blocks to the pool.

What makes it a prefill instance is what the Conductor sends it (leg "prefill": one token, full
blocks and the partial tail saved) and how its engine is tuned. The state machine of a request spans
both legs and therefore lives in the Conductor (conductor/request.py, ADR 0001).
"""

from mooncake.core.options import WorkerOptions
from mooncake.worker import instance


def main(options: WorkerOptions) -> int:
    """Run one prefill instance in this process; return its exit code."""
    return instance.main(options)

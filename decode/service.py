"""`mooncake decode`: an engine that takes a prompt's KV blocks from the pool and streams tokens.

What makes it a decode instance is what the Conductor sends it (leg "decode": the whole prompt is
loaded, the partial tail too; decoded full blocks go back to the pool). The state machine of a
request spans both legs and therefore lives in the Conductor (conductor/request.py, ADR 0001).
"""

from mooncake.core.options import WorkerOptions
from mooncake.worker import instance


def main(options: WorkerOptions) -> int:
    """Run one decode instance in this process; return its exit code."""
    return instance.main(options)

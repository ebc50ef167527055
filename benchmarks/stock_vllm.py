"""`python -m benchmarks.stock_vllm FLAGS`: stock vLLM's API server, started in a third of the time.

vLLM's CPU platform spawns its two children, so one server imports vLLM three times (108 s on two
cores). Here they are forked after the first import. Nothing that runs afterwards is changed.
"""

import multiprocessing
import runpy


def main() -> None:
    """Run vLLM's own entry module."""
    from vllm.utils import system_utils

    # before anything else of vLLM is imported: others take the function by name
    system_utils.get_mp_context = lambda: multiprocessing.get_context("fork")
    runpy.run_module("vllm.entrypoints.launchers.api_server.entry", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

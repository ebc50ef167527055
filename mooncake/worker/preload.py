"""What the warm process imports once, so that its forked children start in seconds.

Only imports: nothing here may start a thread, open a device or read a model.
"""


def preload() -> None:
    """Import everything that a gateway or an engine needs (about 20 CPU-seconds)."""
    import vllm.entrypoints.launchers.api_server.entry
    import vllm.model_executor.models.llama
    import vllm.platforms
    import vllm.v1.attention.backends.cpu_attn
    import vllm.v1.engine.async_llm
    import vllm.v1.engine.core
    import vllm.v1.executor.uniproc_executor
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker

    assert vllm.platforms.current_platform is not None  # resolved once, here

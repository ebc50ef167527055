"""The vLLM side that prefill and decode share: connector, relay, engine process, KV layout."""

"""The ground everything stands on: names, messages, codec, rpc, metadata, logs, metrics."""

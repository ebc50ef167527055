"""Our part of a request, as it travels inside vLLM's sampling params (core.messages.KvParams)."""

from typing import Any


def kv_params_of(extra_args: dict[str, Any] | None) -> dict[str, Any]:
    """Return our part of a request's sampling_params.extra_args, or {}."""
    outer = (extra_args or {}).get("kv_transfer_params")
    inner = outer.get("mooncake") if isinstance(outer, dict) else None
    return inner if isinstance(inner, dict) else {}


def emitted_of(sampling_params: Any) -> list[int]:
    """Return the tokens that an earlier engine emitted for this request."""
    if sampling_params is None:
        return []
    emitted = kv_params_of(sampling_params.extra_args).get("emitted") or []
    return list(emitted)

"""Everything that changes the bytes of a KV block for the same tokens, in one list. Pure.

An engine fills in a KvContext when its model is loaded; the root of its block names commits to every
field, so two engines that differ in any of them never meet in the pool. What differs between requests
of one engine is no part of it: `request_root` (tenant, adapter) and `variant_root` (codec, rank) add that.

What belongs here: a setting of which two values can make other bytes, or the same bytes with another
meaning. In doubt it belongs here: a field too many costs hits, a field too few serves wrong KV. What
does not: anything that only moves the last bits of a sum (threads, batch, torch's version), because no
engine promises these anyway.
"""

import msgspec

from mooncake.core.keys import context_root

CONTEXT_VERSION = 2
"""Of this list. Raise it when a field changes its meaning; a new one changes every root by itself."""


class KvContext(msgspec.Struct, frozen=True, kw_only=True):
    """One engine's settings; no field has a default, so that none is forgotten.

    A field that does not apply is "". Sizes are in tokens. Texts are compared, never parsed.
    """

    # ---- the model
    weights: str  # content of the weight files: core.fingerprint, never a name or a path
    draft: str  # method and weights of a speculative draft, whose layers lie in the same blocks
    model_config: (
        str  # digest of the configuration as resolved: rope, overrides, windows, sinks, quantization
    )
    implementation: str  # which code computes the model: rotary halves may be interleaved or not
    load: str  # how weights are read: dummy ones are another model, another format other files
    lora: str  # how adapters are applied; the adapter itself belongs to the request
    max_model_len: int  # LongRoPE, dynamic NTK and Llama 4's temperature choose by it
    # ---- numbers
    dtype: str
    quantization: str  # of weights, as resolved: method and its settings
    kv_dtype: str  # of the cache, and which layers are left out; static scales are weights
    # ---- how a block lies in memory
    block_size: int
    spec: str  # vLLM's KV cache spec: heads, head size, quantization mode, sliding window, sinks
    layers: str  # count and names, in order: a pipeline stage holds some of them
    page_layout: str  # order of heads, tokens and layers in the engine
    pool_layout: str  # how the pages make one object: mooncake.worker.layout
    attention: str  # backends: they pack keys and values as their kernels want them
    hardware: str  # device and instruction set, which choose the kernels
    engine: str  # vLLM's version: kernels change between releases without a name for it
    # ---- how a model is cut up; which part a block is of, is a variant
    tensor_parallel: int
    pipeline_parallel: int
    prefill_context_parallel: int
    decode_context_parallel: int
    context_interleave: int

    def settings(self) -> dict[str, str]:
        """Return every field as text, and the version of the list."""
        fields = {name: str(getattr(self, name)) for name in self.__struct_fields__}
        return {"version": str(CONTEXT_VERSION), **fields}

    def root(self) -> bytes:
        """Return the 32-byte root of the names of this engine's blocks.

        The encoding is core.keys.context_root's: names and values with their lengths, so no two
        contexts spell the same bytes.
        """
        return context_root(self.settings())


def differences(mine: dict[str, str], other: dict[str, str]) -> list[str]:
    """Return the settings in which two engines differ, by name: why they share nothing."""
    return sorted(name for name in mine.keys() | other.keys() if mine.get(name) != other.get(name))

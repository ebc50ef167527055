"""The clusters that the tests share; each costs about 40 seconds."""

from tests.integration.cluster import Setup

FP32 = Setup("fp32 async")
FP32_LAYERWISE = Setup("fp32 layerwise", load_mode="layerwise")
BF16 = Setup("bf16 async", dtype="bfloat16", vllm=("--enable-auto-tool-choice", "--tool-call-parser=hermes"))
BF16_LAYERWISE = Setup("bf16 layerwise", dtype="bfloat16", load_mode="layerwise")
AGGREGATED = Setup("bf16 aggregated", dtype="bfloat16", flags=("--aggregated=2",))
"""Two, so that each has one core: threads change the sums of bf16, and with them tokens."""
FIRST_TOKEN = Setup("bf16 first token", dtype="bfloat16", flags=("--first-token",))
THREE = Setup("fp32 three engines", flags=("--prefill=2",), instances=3, traced=True)
TWO_RANKS = Setup("fp32 two ranks", vllm=("--tensor-parallel-size=2",))
TIGHT = Setup("fp32 tight", flags=("--kv-memory=16MiB", "--max-model-len=1024"))
"""KV for 4,096 tokens: engines would have to take it from one request to give it to another."""

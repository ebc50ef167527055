"""What this machine computes fast. No torch: the light commands ask too."""

import functools
from pathlib import Path

GPU_DEVICES = ("/dev/nvidia0", "/dev/kfd")
BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""x86 names, then Arm's. Without one of them bfloat16 is emulated: measured 9 GFLOP/s on one AVX2 core
against 75 in float32, so a 2,000-token prompt took 59 s."""


def compiler_env() -> dict[str, str]:
    """Return what must be in the environment before vLLM is imported, so that nothing needs a compiler.

    vLLM's logprobs and xgrammar's masks are torch.compile functions: on a CPU their first use calls a
    C++ compiler, which stops the engine for 10 s, or fails the request where there is none.
    """
    return {} if has_gpu() else {"TORCHDYNAMO_DISABLE": "1"}


def flags_of(cpuinfo: str) -> set[str]:
    """Return the features of the first CPU in the text of /proc/cpuinfo."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return set(value.split())
    return set()


def has_gpu() -> bool:
    """Return whether the kernel offers a GPU that torch could use."""
    return any(Path(device).exists() for device in GPU_DEVICES)


@functools.cache
def computes_bfloat16() -> bool:
    """Return whether bfloat16 is fast here: a GPU, or a CPU with instructions for it."""
    if has_gpu():
        return True
    try:
        return bool(flags_of(Path("/proc/cpuinfo").read_text()) & BFLOAT16_FLAGS)
    except OSError:
        return True  # not Linux: leave the choice to vLLM


def resolve_dtype(dtype: str) -> str:
    """Return `dtype`; for "auto" float32 where bfloat16 is emulated, else auto (vLLM: the model's own).

    Engines share KV blocks only within one dtype: hosts of different kinds need an explicit one.
    """
    return "float32" if dtype == "auto" and not computes_bfloat16() else dtype

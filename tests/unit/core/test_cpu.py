"""The default dtype is one that this machine computes in hardware."""

import pytest

from mooncake.core import cpu

X86 = "processor\t: 0\nflags\t\t: fpu avx2 {}\npower management:\n\nprocessor\t: 1\nflags\t\t: amx_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd {}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        (X86.format(""), False),
        (X86.format("avx512_bf16"), True),
        (X86.format("amx_bf16"), True),
        (ARM.format(""), False),
        (ARM.format("bf16"), True),
        ("", False),
    ],
)
def test_the_first_cpus_features_decide(cpuinfo, fast):
    assert bool(cpu.flags_of(cpuinfo) & cpu.BFLOAT16_FLAGS) is fast


@pytest.mark.parametrize(
    ("wish", "fast", "dtype"),
    [
        ("auto", True, "auto"),
        ("auto", False, "float32"),
        ("bfloat16", False, "bfloat16"),
        ("float32", True, "float32"),
    ],
)
def test_only_auto_is_resolved(monkeypatch, wish, fast, dtype):
    monkeypatch.setattr(cpu, "computes_bfloat16", lambda: fast)
    assert cpu.resolve_dtype(wish) == dtype


@pytest.mark.parametrize("gpu", [True, False])
def test_compilers_are_avoided_where_no_gpu_would_profit(monkeypatch, tmp_path, gpu):
    monkeypatch.setattr(cpu, "GPU_DEVICES", (str(tmp_path if gpu else tmp_path / "none"),))
    assert ("TORCHDYNAMO_DISABLE" in cpu.compiler_env()) is not gpu

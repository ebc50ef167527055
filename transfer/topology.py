"""Which NICs are near which memory (FAST'25 4.2, the topology matrix), read from sysfs.

The matrix maps a location ("cpu:0", "cuda:1") to its preferred NICs, those that are nearest, and its
secondary ones, for when these fail. Near a CPU means on its NUMA node. Near a GPU means behind the
same PCI switch, that is the longest common way from the root complex; the NUMA node decides where no
way is common. GPUs are numbered by PCI address, as nvidia-smi and CUDA_DEVICE_ORDER=PCI_BUS_ID do.

No NIC at all is a normal machine: every list is empty then.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from mooncake.core.errors import ConfigError

SYS_ROOT = Path("/sys")
JSON_BYTES_MAX = 1 << 20
"""A machine of 16 nodes, 16 GPUs and 16 NICs needs about 6 KB."""
FOUND_CHARS_MAX = 200
"""Of a wrong value, in a message."""
NO_NODE = -1
"""What the kernel says where a device belongs to no NUMA node."""
NVIDIA = 0x10DE
GPU_CLASSES = (0x0300, 0x0302)
"""PCI classes: VGA controller, 3D controller."""

_PCI = re.compile(r"pci[0-9a-f]{4,}:[0-9a-f]{2}|[0-9a-f]{4,}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
_LOCATION = re.compile(r"\*|[a-z_]+:[0-9]+")

Row = tuple[list[str], list[str]]
"""Preferred and secondary NICs of one location."""


class Device(msgspec.Struct, frozen=True):
    """A NIC or a GPU as sysfs shows it."""

    name: str
    node: int  # NUMA
    pci: tuple[str, ...]  # bridges from the root complex down to the device itself; () = not on PCI
    ports: tuple[int, ...] = ()  # of a NIC: those that are active


class Machine(msgspec.Struct, frozen=True):
    """What matters for the matrix; see `read_machine`."""

    nodes: list[int]
    nics: list[Device]
    gpus: list[Device]


class Topology:
    """The matrix. Made by `discover`, `parse` or `load`; not changed afterwards."""

    def __init__(self, rows: dict[str, Row]) -> None:
        """`rows`: location -> (preferred, secondary)."""
        self.rows = rows
        self._names = _natural({name for row in rows.values() for names in row for name in names})

    @classmethod
    def discover(
        cls, sys_root: Path = SYS_ROOT, only: Sequence[str] = (), visible: str | None = None
    ) -> "Topology":
        """Read this machine's.

        Args:
            sys_root: where sysfs is mounted.
            only: use these NICs, even if none of their ports is active; () = all that have an active one.
            visible: CUDA_VISIBLE_DEVICES as this process has it, because it renumbers the GPUs. If it
                names them otherwise than by number, the matrix has no row for them.

        Raises:
            ConfigError: `only` names a NIC that is not there.
        """
        machine = read_machine(sys_root)
        _check_known(only, [nic.name for nic in machine.nics])
        nics = [nic for nic in machine.nics if (nic.name in only if only else nic.ports)]
        rows = {}
        for node in machine.nodes:
            rows[f"cpu:{node}"] = _row({nic.name: (0, _node_distance(nic.node, node)) for nic in nics})
        for index, gpu in enumerate(_visible(machine.gpus, visible)):
            rows[f"cuda:{index}"] = _row({nic.name: _distance(nic, gpu) for nic in nics})
        return cls(rows)

    @classmethod
    def parse(cls, text: str | bytes, only: Sequence[str] = (), source: str = "topology") -> "Topology":
        """Read a matrix from JSON: {"cpu:0": [["mlx5_0"], ["mlx5_1"]], ...}.

        Args:
            text: JSON.
            only: leave out all other NICs; () = none.
            source: where the text is from, for messages.

        Raises:
            ConfigError: it is not a matrix, or has no NIC that `only` names.
        """
        if len(text) > JSON_BYTES_MAX:
            raise ConfigError(f"{source}: {len(text)} bytes, at most {JSON_BYTES_MAX} are read")
        try:
            matrix = msgspec.json.decode(text)
        except (msgspec.DecodeError, UnicodeError, RecursionError) as error:  # may be from a peer
            raise ConfigError(f"{source}: not JSON: {error}") from error
        if not isinstance(matrix, dict):
            raise ConfigError(f'{source}: must be an object such as {{"cpu:0": [["mlx5_0"], []]}}')
        rows = {location: _parse_row(source, location, lists) for location, lists in matrix.items()}
        if only:
            _check_known(only, cls(rows)._names)
            rows = {location: _keep(row, only) for location, row in rows.items()}
        return cls(rows)

    @classmethod
    def load(cls, path: Path, only: Sequence[str] = ()) -> "Topology":
        """Read a matrix from the file `path` (MC_CUSTOM_TOPO_JSON); see `parse`.

        Raises:
            ConfigError: the file cannot be read, or is not a matrix.
        """
        try:
            with path.open("rb") as file:
                text = file.read(JSON_BYTES_MAX + 1)
        except OSError as error:
            raise ConfigError(f"topology file {path}: {error.strerror}") from error
        return cls.parse(text, only, f"topology file {path}")

    def preferred(self, location: str) -> list[str]:
        """Return the nearest NICs; all of them where `location` is "*" or has no row."""
        row = self.rows.get(location)
        return list(self._names) if row is None else list(row[0])

    def secondary(self, location: str) -> list[str]:
        """Return the others, in no order of preference."""
        row = self.rows.get(location)
        return [] if row is None else list(row[1])

    def names(self) -> list[str]:
        """Return all NICs."""
        return list(self._names)

    def to_json(self) -> str:
        """Return the matrix as `parse` reads it, and as upstream prints it."""
        return msgspec.json.encode(self.rows).decode()


def parse_names(text: str) -> list[str]:
    """Return the NICs of a list such as "mlx5_0,mlx5_1" (MC_TE_FILTERS, device_name); "" = []."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


# ---------------------------------------------------------------- sysfs


def read_machine(sys_root: Path = SYS_ROOT) -> Machine:
    """Read NUMA nodes, RDMA devices and NVIDIA GPUs. What is not there or not readable is left out."""
    nodes = [int(path.name[4:]) for path in sys_root.glob("devices/system/node/node[0-9]*")]
    nics = {path.name: path for path in sys_root.glob("class/infiniband/*")}
    gpus = {path.name: path for path in sys_root.glob("bus/pci/devices/*") if _is_gpu(path)}
    return Machine(
        nodes=sorted(nodes) or [0],  # a kernel without NUMA
        nics=[_read_nic(sys_root, name, nics[name]) for name in _natural(nics)],
        gpus=[_device(name, gpus[name]) for name in sorted(gpus)],
    )


def _read_nic(sys_root: Path, name: str, path: Path) -> Device:
    ports = (int(port.name) for port in path.glob("ports/[0-9]*") if _text(port / "state").startswith("4:"))
    device = path / "device"
    if not device.exists():  # software RDMA: as near as the network interface below it
        device = sys_root / "class" / "net" / (_text(path / "parent") or "-") / "device"
    return _device(name, device, tuple(sorted(ports)))


def _device(name: str, path: Path, ports: tuple[int, ...] = ()) -> Device:
    if not path.exists():
        return Device(name, NO_NODE, (), ports)
    path = path.resolve()
    node = _text(path / "numa_node") or _text(path.parent / "numa_node")  # virtio has it one above
    pci = tuple(part for part in path.parts if _PCI.fullmatch(part))
    return Device(name, int(node) if node.isdecimal() else NO_NODE, pci, ports)


def _is_gpu(path: Path) -> bool:
    # "class" is six hex digits, the last two are the programming interface
    return _hex(path / "vendor") == NVIDIA and _hex(path / "class") >> 8 in GPU_CLASSES


def _hex(path: Path) -> int:
    text = _text(path)
    return int(text, 16) if re.fullmatch(r"0x[0-9a-f]+", text) else 0


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- distance


def _node_distance(node: int, other: int) -> int:
    """Return 0 for the same node, 1 where nobody knows, 2 for different nodes."""
    if NO_NODE in (node, other):
        return 1
    return 0 if node == other else 2


def _distance(nic: Device, gpu: Device) -> tuple[int, int]:
    common = 0
    for mine, theirs in zip(nic.pci, gpu.pci, strict=False):
        if mine != theirs:
            break
        common += 1
    return (-common, _node_distance(nic.node, gpu.node))


def _row(distances: dict[str, tuple[int, int]]) -> Row:
    """Return the nearest as preferred, all of them where they are equally far."""
    nearest = min(distances.values(), default=(0, 0))
    return (
        [name for name, distance in distances.items() if distance == nearest],
        [name for name, distance in distances.items() if distance != nearest],
    )


def _visible(gpus: list[Device], visible: str | None) -> list[Device]:
    if visible is None:
        return gpus
    numbers = parse_names(visible)
    if not all(number.isdecimal() and int(number) < len(gpus) for number in numbers):
        return []
    return [gpus[int(number)] for number in numbers]


# ---------------------------------------------------------------- checks


def _parse_row(source: str, location: str, lists: Any) -> Row:
    if not _LOCATION.fullmatch(location):
        raise ConfigError(f'{source}: location {location!r}: must look like "cpu:0", "cuda:1" or "*"')
    try:
        row = msgspec.convert(lists, tuple[list[str], list[str]])
    except msgspec.ValidationError as error:
        found = repr(lists)[:FOUND_CHARS_MAX]
        raise ConfigError(
            f"{source}: {location} is {found}: must be two lists of NIC names: {error}"
        ) from error
    seen: set[str] = set()
    for name in row[0] + row[1]:
        if not name or name in seen:
            raise ConfigError(f"{source}: {location}: NIC {name!r} is {'named twice' if name else 'no name'}")
        seen.add(name)
    return row


def _keep(row: Row, only: Sequence[str]) -> Row:
    preferred, secondary = ([name for name in names if name in only] for names in row)
    return (preferred, secondary) if preferred else (secondary, [])


def _check_known(only: Sequence[str], known: Sequence[str]) -> None:
    for name in only:
        if name not in known:
            there = ", ".join(known) or "none"
            raise ConfigError(f"NIC filter {','.join(only)!r}: there is no NIC {name!r}; there are: {there}")


def _natural(names: "set[str] | dict[str, Path]") -> list[str]:
    """Sort so that mlx5_2 comes before mlx5_10."""
    return sorted(names, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])

"""Trees that look like /sys: as the kernel does, classes and buses are links into devices/."""

import os
from pathlib import Path

ACTIVE, DOWN = "4: ACTIVE", "1: DOWN"


class FakeSysfs:
    """Start with NUMA nodes only, then add devices."""

    def __init__(self, root: Path, nodes: int = 1) -> None:
        self.root = root
        for node in range(nodes):
            (root / f"devices/system/node/node{node}").mkdir(parents=True)
        (root / "devices/system/node/online").write_text("0\n") if nodes else None

    def pci(self, way: str, node: int, vendor: str = "0x15b3", kind: str = "0x020700") -> Path:
        """Add a PCI device; `way` goes from the root complex to it: "pci0000:00/0000:00:01.0/..."."""
        device = self.root / "devices" / way
        device.mkdir(parents=True)
        (device / "numa_node").write_text(f"{node}\n")
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
        self._link(self.root / "bus/pci/devices" / device.name, device)
        return device

    def gpu(self, way: str, node: int, kind: str = "0x030200") -> None:
        self.pci(way, node, vendor="0x10de", kind=kind)

    def nic(self, name: str, way: str, node: int, *states: str) -> None:
        """Add a PCI NIC with an RDMA device of as many ports as there are `states` (one, active)."""
        device = self.pci(way, node)
        self._rdma(device / "infiniband" / name, name, states or (ACTIVE,))
        self._link(device / "infiniband" / name / "device", device)

    def rxe(self, name: str, interface: str) -> None:
        """Add a software RDMA device over a network interface; it has no `device` link."""
        folder = self.root / "devices/virtual/infiniband" / name
        self._rdma(folder, name, (ACTIVE,))
        (folder / "parent").write_text(f"{interface}\n")

    def interface(self, name: str, way: str, node: int, below: str = "") -> None:
        """Add a PCI Ethernet card without RDMA; `below`: the bus device that virtio puts in between."""
        device = self.pci(way, node, kind="0x020000") / below
        folder = device / "net" / name
        folder.mkdir(parents=True)
        self._link(folder / "device", device)
        self._link(self.root / "class/net" / name, folder)

    def _rdma(self, folder: Path, name: str, states: tuple[str, ...]) -> None:
        for port, state in enumerate(states, 1):
            (folder / f"ports/{port}").mkdir(parents=True)
            (folder / f"ports/{port}/state").write_text(f"{state}\n")
        self._link(self.root / "class/infiniband" / name, folder)

    def _link(self, link: Path, target: Path) -> None:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(target, link.parent))


def two_sockets(root: Path) -> FakeSysfs:
    """Two sockets; on each a switch with a GPU and a NIC, and a second NIC on a root port of its own."""
    sys = FakeSysfs(root, nodes=2)
    for node, bus in ((0, 0x10), (1, 0x80)):
        top = f"pci0000:{bus:02x}"
        switch = f"{top}/0000:{bus:02x}:01.0/0000:{bus + 1:02x}:00.0"
        sys.nic(f"mlx5_{2 * node}", f"{switch}/0000:{bus + 2:02x}:00.0/0000:{bus + 3:02x}:00.0", node)
        sys.gpu(f"{switch}/0000:{bus + 2:02x}:01.0/0000:{bus + 4:02x}:00.0", node)
        sys.nic(f"mlx5_{2 * node + 1}", f"{top}/0000:{bus:02x}:02.0/0000:{bus + 5:02x}:00.0", node)
    return sys

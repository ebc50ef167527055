"""`transfer_engine_topology_dump`: which NICs this machine would use for which memory.

Prints the matrix as JSON, in the form that a custom topology file has: redirect it into a file, edit
that, and give its path as MC_CUSTOM_TOPO_JSON.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mooncake.core.errors import ConfigError
from transfer.topology import SYS_ROOT, Device, Machine, Topology, parse_names, read_machine


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: without the program's name; None = this process's.

    Returns:
        Exit code: 0, or 1 if the filter names a NIC that is not there.
    """
    options = _parser().parse_args(argv)
    try:
        topology = Topology.discover(options.sys_root, parse_names(options.only))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    if options.table:
        _show(Console(highlight=False), read_machine(options.sys_root), topology)
    else:
        sys.stdout.write(f"{topology.to_json()}\n")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="transfer_engine_topology_dump",
        description="Print which NICs are near which memory: location -> [preferred, secondary].",
    )
    parser.add_argument("--table", action="store_true", help="for people, with the devices and their ports")
    parser.add_argument(
        "--only", "--device-name", default="", metavar="NICS", help="as a device filter would: mlx5_0,mlx5_1"
    )
    parser.add_argument("--sys-root", type=Path, default=SYS_ROOT, help=argparse.SUPPRESS)
    return parser


def _show(console: Console, machine: Machine, topology: Topology) -> None:
    if not machine.nics:
        console.print("No RDMA device: transfers use shared memory on this host and TCP to others.")
    devices = Table("device", "NUMA node", "active ports", "PCI", box=None)
    for nic in machine.nics:
        ports = ", ".join(map(str, nic.ports)) or "none: left out unless named"
        devices.add_row(nic.name, _node(nic), ports, " ".join(nic.pci))
    for index, gpu in enumerate(machine.gpus):
        devices.add_row(f"cuda:{index}", _node(gpu), "-", " ".join(gpu.pci))
    if devices.row_count:
        console.print(devices, "")
    matrix = Table("location", "preferred", "secondary", box=None)
    for location in topology.rows:
        matrix.add_row(
            location,
            " ".join(topology.preferred(location)) or "-",
            " ".join(topology.secondary(location)) or "-",
        )
    console.print(matrix)


def _node(device: Device) -> str:
    return str(device.node) if device.node >= 0 else "-"


if __name__ == "__main__":
    sys.exit(main())

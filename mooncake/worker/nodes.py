"""vLLM's side of an engine that spans several nodes: its arguments, its sockets, and what a follower runs.

Each rank of a node is a process (ranks.py). Ranks of all nodes find each other by
torch.distributed's TCPStore on the leader, compute over gloo or NCCL, and get their steps over vLLM's
MessageQueue (pickle over ZMQ). None of this is authenticated: core.options wants it accepted in words, and
all of it is held to the one address of this node that the operator named (docs/deploy.md).
"""

import importlib
import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from mooncake.core.errors import ConfigError
from mooncake.worker.spec import STOP_SIGNAL, EngineFacts, EngineSpec, NodeSpec, write_facts

RANK = "mooncake.worker.rank.Rank"


def arguments(nodes: NodeSpec) -> list[str]:
    """Return vLLM's arguments for one node of `nodes.count`."""
    return [
        f"--nnodes={nodes.count}",
        f"--node-rank={nodes.rank}",
        f"--master-addr={nodes.leader}",
        f"--master-port={nodes.port}",
        f"--worker-extension-cls={RANK}",
    ]


def interface_of(address: str) -> str:
    """Return the network interface that has `address`.

    Raises:
        ConfigError: none of this host has it.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == address for one in addresses):
            return name
    raise ConfigError(f"address = {address!r}: no network interface of this host has it; name one that does")


def environment(nodes: NodeSpec, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that hold vLLM's sockets to this node's address; what the operator says wins.

    Without them vLLM takes the address by which this host would reach the internet, and gloo the one of the
    host's name.
    """
    interface = interface_of(nodes.address)
    wanted = {
        "VLLM_HOST_IP": nodes.address,
        "GLOO_SOCKET_IFNAME": interface,
        "NCCL_SOCKET_IFNAME": f"={interface}",
    }
    return {name: value for name, value in wanted.items() if name not in environ}


def follow(spec: EngineSpec, config: Any, executor_class: Any) -> int:
    """Run the ranks of a follower's node until told to stop, which ends the process.

    As vLLM's `serve --headless` does for a node above 0: the leader's executor drives them. They have nothing
    to save and wait for steps without end, so that they are ended by the kernel, with this process; and one
    that ends takes this process along (ranks.py).
    """
    signal.signal(STOP_SIGNAL, lambda *_: os._exit(0))
    for number in (signal.SIGTERM, signal.SIGINT):  # these may reach the whole group; the follower decides
        signal.signal(number, signal.SIG_IGN)
    executor = executor_class(config, monitor_workers=False)
    executor.start_worker_monitor()
    write_facts(spec.facts_path, EngineFacts("", 0, {}))
    while True:
        signal.pause()


# ---------------------------------------------------------------- in a rank's own process


def listener(host: str, port: int) -> socket.socket:
    """Return a listening socket of one address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=512)


def bind_rendezvous() -> None:
    """Make torch's TCPStore listen on the leader's address: by itself it takes every address of the host."""
    from torch.distributed import TCPStore

    module = importlib.import_module("torch.distributed.rendezvous")  # as an attribute it is a function

    def store(host: str, port: int, rank: int, world_size: int, timeout: Any, use_libuv: bool = True) -> Any:
        shared = {"world_size": world_size, "timeout": timeout, "multi_tenant": True, "use_libuv": use_libuv}
        if rank:
            return TCPStore(host, port, is_master=False, **shared)
        return TCPStore(host, port, is_master=True, master_listen_fd=listener(host, port).detach(), **shared)

    module._create_c10d_store = store  # type: ignore[attr-defined]


def free_port(address: str) -> int:
    """Return a port of `address` that nobody has now."""
    with listener(address, 0) as found:
        number: int = found.getsockname()[1]
        return number


def is_present(model: str) -> bool:
    """Return whether a model that the leader names is here: a folder of this host, or a name of the hub."""
    return not os.path.isabs(model) or Path(model).is_dir()

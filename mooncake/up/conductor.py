"""`mooncake conductor --gateways N`: a decision core and its gateways on one host, supervised as one thing.

The core is a child like the gateways: its end takes none of them along. Another host's core, or one started
with `--gateways 0`, is its standby where the metadata store is etcd.
"""

import asyncio
import os
import socket
from pathlib import Path

from rich.console import Console

from mooncake.core import log as logs
from mooncake.core.config import host_port, seen_at
from mooncake.core.options import ConductorOptions
from mooncake.core.shared_port import Held
from mooncake.up.cluster import Cluster, prepare_run_dir
from mooncake.up.metrics import admin_ports
from mooncake.up.plan import base_env, gateway_names, plan_conductor
from mooncake.up.run import live, tenant_keys
from mooncake.up.show import Board


def conductor(options: ConductorOptions, model_is_local: bool, console: Console) -> int:
    """Run a core and its gateways (at least 1) until Ctrl-C or SIGTERM; return the exit code.

    Raises:
        ConfigError: a setting cannot work.
        MooncakeError: a process gave up.
    """
    logs.setup("conductor", "error")  # states are on the board; details in the children's logs
    run_dir = Path(options.run_dir)
    if not options.name:
        name = f"{socket.gethostname().split('.')[0][:40]}-{os.getpid()}"
        options = options.replace(name=name)
    with Held(options.host, options.port):
        ports = admin_ports(
            gateway_names(options.gateways), options.port, options.admin_port, options.admin_host
        )
        keys = tenant_keys(options.tenants)
        plan = plan_conductor(options, options.gateways, ports, keys)
        prepare_run_dir(run_dir)
        board = Board(console)
        env = base_env(os.environ, model_is_local, keys)
        cluster = Cluster(plan, run_dir, env, board, options.zygote, metadata=options.metadata_endpoint)
        return asyncio.run(
            live(cluster, board, options.host, options.port, lambda: ready_text(options, ports))
        )


def ready_text(options: ConductorOptions, ports: dict[str, int]) -> str:
    """Return what to tell once requests are taken."""
    url = f"http://{host_port(seen_at(options.host), options.port)}"
    own = " ".join(f"{name}:{port}" for name, port in ports.items())
    return f"""
The Conductor is ready at {url} with {len(ports) - 1} gateways; metadata {options.metadata_endpoint}
metrics on {options.admin_host}: {own}
logs: {options.run_dir}   watch: mooncake top --url {url}   stop: Ctrl-C
"""

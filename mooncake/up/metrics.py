"""Where the processes of a cluster serve their metrics: ports, Prometheus' configuration, text."""

import json
import os
import socket
from collections.abc import Sequence
from pathlib import Path

from mooncake.core.config import (
    ADMIN_TOKEN_ENV,
    ADMIN_TOKEN_FILE_ENV,
    LOOPBACK,
    fail,
    host_port,
    seen_at,
)
from mooncake.core.options import UpOptions
from mooncake.up.plan import CONDUCTOR, CORE, admin_names

PORTS_TRIED_MAX = 1000
"""Beyond so many taken ports in a row something is wrong with the machine."""
PORT_MIN, PORT_MAX = 1024, 65535
CONFIG_NAME = "prometheus.yml"
SCRAPE_S = 5


def with_admin_ports(options: UpOptions) -> UpOptions:
    """Return `options` with a port of its admin host for the store and each engine.

    `admin_port`: these ports from there on, in the order of start; 0 = the first free ones above the
    gateway's (below the range that the kernel gives to outgoing connections, so that a restarted process
    finds its port free).

    Raises:
        ConfigError: a wanted port is taken or out of range, or none is free.
    """
    ports = admin_ports(admin_names(options), options.port, options.admin_port, options.admin_host)
    return options.replace(admin_ports=ports)


def admin_ports(names: Sequence[str], port: int, base: int = 0, host: str = LOOPBACK) -> dict[str, int]:
    """Return a port of `host` for each of `names`, see with_admin_ports for `base`; `port` is the gateway's.

    Raises:
        ConfigError: a wanted port is taken or out of range, or none is free.
    """
    ports = _wanted(base, len(names), host) if base else _free(port, len(names), host)
    return dict(zip(names, ports, strict=True))


def _wanted(base: int, count: int, host: str) -> list[int]:
    if not 1 <= base <= PORT_MAX - count + 1:
        raise fail("admin_port", base, f"{count} ports from here on must fit below {PORT_MAX + 1}")
    for port in range(base, base + count):
        if not can_bind(port, host):
            raise fail("admin_port", base, f"{host_port(host, port)} is taken; choose another base")
    return list(range(base, base + count))


def _free(after: int, count: int, host: str) -> list[int]:
    found: list[int] = []
    first = max(after, PORT_MIN - 1) + 1 - PORT_MIN
    for step in range(PORTS_TRIED_MAX):
        port = (first + step) % (PORT_MAX - PORT_MIN + 1) + PORT_MIN  # goes on from the start after the end
        if port != after and can_bind(port, host):
            found.append(port)
        if len(found) == count:
            return found
    advice = f"no {count} free ports of {host} above {after}: is it an address of this host? or name a base"
    raise fail("admin_port", 0, advice)


def can_bind(port: int, host: str = LOOPBACK) -> bool:
    """Return whether a server could take this port now."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the servers do
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def write_prometheus_config(options: UpOptions) -> None:
    """Write a configuration that scrapes the whole cluster."""
    host = seen_at(options.admin_host)
    targets = [(name, host_port(host, port)) for name, port in options.admin_ports.items()]
    token_file = os.environ.get(ADMIN_TOKEN_FILE_ENV, "")
    if not token_file and os.environ.get(ADMIN_TOKEN_ENV):
        token_file = f"FILE-WITH-{ADMIN_TOKEN_ENV}"  # a secret is not copied into a file that others may read
    (Path(options.run_dir) / CONFIG_NAME).write_text(prometheus_config(targets, token_file))


def prometheus_config(targets: Sequence[tuple[str, str]], token_file: str = "") -> str:
    """Return prometheus.yml that scrapes (name, host:port) pairs; strings are JSON, which is YAML.

    `token_file`: with what the admin servers want to be shown; "" = nothing.
    """
    lines = ["# prometheus --config.file=prometheus.yml", "global:", f"  scrape_interval: {SCRAPE_S}s"]
    lines += ["scrape_configs:", "  - job_name: mooncake"]
    if token_file:
        lines.append(f"    authorization: {{credentials_file: {json.dumps(token_file)}}}")
    lines.append("    static_configs:")
    for name, address in targets:
        lines += [
            f"      - targets: [{json.dumps(address)}]",
            f"        labels: {{process: {json.dumps(name)}}}",
        ]
    return "\n".join(lines) + "\n"


def dashboard_url(options: UpOptions) -> str:
    """Return where the live page is; of the process that decides: its memory begins with it."""
    port = options.admin_ports.get(CONDUCTOR if options.gateways is None else CORE, 0)
    return f"http://{host_port(seen_at(options.admin_host), port)}/dashboard" if port else ""


def metrics_text(options: UpOptions, url: str) -> str:
    """Return one line for people: who serves metrics where."""
    others = " ".join(f"{name}:{port}" for name, port in options.admin_ports.items())
    text = "metrics:" if options.gateways is not None else f"metrics: {url}/metrics  "
    if others:
        text += f" on {options.admin_host}: {others}   {options.run_dir}/{CONFIG_NAME}"
    return text

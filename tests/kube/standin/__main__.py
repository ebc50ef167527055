"""Run the stand-in until SIGTERM.

    python -m tests.kube.standin --port 16443 --folder /tmp/k --publish mooncake/gateway:8000=18000
    kubectl --server http://127.0.0.1:16443 apply -k deploy/overlays/dev-cpu

Prints one line, "ready", when it serves. Nothing of it outlives it, however it ends.
"""

import argparse
import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

from aiohttp import web

from tests.kube.standin.api import ApiServer
from tests.kube.standin.controllers import Controllers
from tests.kube.standin.kubelet import Kubelet
from tests.kube.standin.pod import Settings, foreign_folders, hidden_folders
from tests.kube.standin.proxy import Proxy, Published
from tests.kube.standin.sandbox import isolate, unable
from tests.kube.standin.store import ObjectStore

PUBLISH = re.compile(r"([a-z0-9.-]+)/([a-z0-9.-]+):([0-9]+)=([0-9]+)")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def arguments() -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description="A stand-in for Kubernetes that runs pods as local processes."
    )
    parser.add_argument("--port", type=int, required=True, help="of the API server, on 127.0.0.1")
    parser.add_argument(
        "--folder", type=Path, required=True, help="short, for logs and volumes; made if need be"
    )
    parser.add_argument(
        "--publish", action="append", default=[], help="NAMESPACE/SERVICE:PORT=PORT of 127.0.0.1"
    )
    parser.add_argument(
        "--claim", action="append", default=[], help="CLAIM=FOLDER of a persistent volume claim"
    )
    parser.add_argument("--env", action="append", default=[], help="NAME=VALUE for every container")
    parser.add_argument("--node-count", type=int, default=1)
    parser.add_argument(
        "--probe-factor", type=float, default=1.0, help="probes' periods are so many times as long"
    )
    parser.add_argument("--back-off-factor", type=float, default=1.0)
    parser.add_argument("--proxy-lag-s", type=float, default=0.5, help="until endpoints reach the proxy")
    parser.add_argument("--as-root", action="store_true", help="ignore users and capabilities of pods")
    return parser.parse_args()


def pairs(texts: list[str]) -> dict[str, str]:
    """Return NAME=VALUE texts as a dictionary."""
    return dict(text.split("=", 1) for text in texts)


def listen(port: int) -> socket.socket:
    """Open a port of this machine."""
    return socket.create_server(("127.0.0.1", port), backlog=512)


async def serve(options: argparse.Namespace, api: socket.socket, published: list[Published]) -> None:
    """Serve until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    store = ObjectStore(time.time)
    store.create("namespaces", {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "default"}})
    for index in range(options.node_count):
        labels = {
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": "amd64",
            "kubernetes.io/hostname": f"node-{index}",
        }
        meta = {"name": f"node-{index}", "labels": labels}
        store.create("nodes", {"apiVersion": "v1", "kind": "Node", "metadata": meta, "spec": {}})
    programs = Path(sys.executable).parent
    foreign = foreign_folders(Path(sys.executable), Path(__file__))
    hidden = [one for one in hidden_folders(Path(sys.executable)) if not one.startswith(foreign)]
    settings = Settings(
        path=f"{programs}:{SYSTEM_PATH}", probe_factor=options.probe_factor, env=pairs(options.env),
        back_off_factor=options.back_off_factor, hidden=tuple(hidden), foreign=foreign,
        as_root=options.as_root,
    )  # fmt: skip
    claims = {name: Path(folder) for name, folder in pairs(options.claim).items()}
    kubelet = Kubelet(store, options.folder, settings, claims)
    controllers = Controllers(store)
    runner = web.AppRunner(
        ApiServer(store, kubelet, controllers.settle).app(), access_log=None, shutdown_timeout=1.0
    )
    await runner.setup()
    await web.SockSite(runner, api).start()
    parts = [
        controllers.run(),
        kubelet.run(),
        Proxy(store, published, options.proxy_lag_s).run(),
        stop.wait(),
    ]
    tasks = [asyncio.ensure_future(part) for part in parts]
    print("ready", flush=True)
    done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await runner.cleanup()
    for task in done:
        task.result()  # what broke it


def main() -> int:
    """Run; return the exit code."""
    options = arguments()
    if reason := unable():
        print(f"cannot run pods: {reason}", file=sys.stderr)
        return 69
    published = []
    for text in options.publish:
        match = PUBLISH.fullmatch(text)
        if match is None:
            print(f"--publish {text!r}: write NAMESPACE/SERVICE:PORT=PORT", file=sys.stderr)
            return 2
        published.append(Published(listen(int(match[4])), (match[1], match[2], int(match[3]))))
    api = listen(options.port)
    options.folder.mkdir(parents=True, exist_ok=True)
    options.folder = options.folder.resolve()
    isolate(options.folder / "memory")
    os.umask(0o022)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve(options, api, published))
    return 0


if __name__ == "__main__":
    sys.exit(main())

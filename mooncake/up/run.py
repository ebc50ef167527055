"""The life of `mooncake up`: check, model, start, ready line, watch, stop."""

import asyncio
import contextlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from conductor.tenants_file import read_tenants
from mooncake.core import log as logs
from mooncake.core.config import host_port, is_loopback, seen_at
from mooncake.core.options import UpOptions
from mooncake.core.reload import has_terminal
from mooncake.core.shared_port import Held, check_port
from mooncake.up.cluster import Cluster, prepare_run_dir
from mooncake.up.metrics import dashboard_url, metrics_text, with_admin_ports, write_prometheus_config
from mooncake.up.plan import base_env, make_plan
from mooncake.up.show import Board


def default_run_dir() -> Path:
    """Return a fresh private folder for sockets and logs."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    parent = runtime if runtime and os.access(runtime, os.W_OK) else tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=f"mooncake-{os.getuid()}-", dir=parent))  # 0700


def up(options: UpOptions, console: Console) -> int:
    """Run the cluster until Ctrl-C or SIGTERM; return the exit code.

    Raises:
        ConfigError: a setting cannot work.
        MooncakeError: a process gave up.
    """
    logs.setup("up", "error")  # states are on the board; details in the children's logs
    with contextlib.ExitStack() as stack:
        if options.gateways is None:
            check_port(options.host, options.port)
        else:
            stack.enter_context(Held(options.host, options.port))
        return _up(options, console)


def _up(options: UpOptions, console: Console) -> int:
    options = with_admin_ports(options)
    keys = tenant_keys(options.tenants)
    plan = make_plan(options, sorted(os.sched_getaffinity(0)), keys)
    run_dir = Path(options.run_dir)
    prepare_run_dir(run_dir)
    write_prometheus_config(options)
    board = Board(console)
    env = base_env(os.environ, options.model_is_local, keys)
    cluster = Cluster(plan, run_dir, env, board, options.zygote)
    has_key = bool(options.api_key)
    ready = lambda: ready_text(options, board.seconds, has_key)  # noqa: E731
    return asyncio.run(live(cluster, board, options.host, options.port, ready))


def tenant_keys(path: str) -> dict[str, str]:
    """Return the environment variables that a file of tenants takes keys from; "" = no file.

    Raises:
        ConfigError: something in the file is wrong.
    """
    return {name: os.environ[name] for name in read_tenants(path).keys_env}


async def live(cluster: Cluster, board: Board, host: str, port: int, ready: Callable[[], str]) -> int:
    """Start the cluster, say `ready` once it serves on `host` and `port`, watch it, stop it when told."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    # who asks for a reload is heard: every process looks at its file itself, see mooncake.core.reload
    hang_up = stop.set if has_terminal() else lambda: None
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hang_up)
    with board:
        try:
            await cluster.start()
            asked = host if is_loopback(host) and host != "localhost" else "127.0.0.1"
            if await cluster.wait_ready(stop, asked, port):
                board.say(ready())
                await cluster.watch(stop)
            board.say("stopping when requests in flight have ended; Ctrl-C again ends them")
            return 0
        finally:
            await _close(cluster, stop)


async def _close(cluster: Cluster, stop: asyncio.Event) -> None:
    """Stop politely; a second signal cuts the graces short by ending this process (PDEATHSIG)."""
    stop.clear()
    closing = asyncio.create_task(cluster.close())
    again = asyncio.create_task(stop.wait())
    await asyncio.wait([closing, again], return_when=asyncio.FIRST_COMPLETED)
    if not closing.done():
        os._exit(130)  # the children's death signal does the rest
    again.cancel()
    await closing


def ready_text(options: UpOptions, seconds: float, has_key: bool) -> str:
    """Return what to tell once requests can be served."""
    url = f"http://{host_port(seen_at(options.host), options.port)}"
    header = ' -H "Authorization: Bearer $MOONCAKE_API_KEY"' if has_key else ""
    key = 'os.environ["MOONCAKE_API_KEY"]' if has_key else '"none"'
    imports = "import os\n    from openai" if has_key else "from openai"
    return f"""
Mooncake is ready after {seconds:.1f} s at {url} serving {options.served_name}

  curl {url}/v1/chat/completions{header} -H "Content-Type: application/json" \\
    -d '{{"model": "{options.served_name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

    {imports} import OpenAI
    client = OpenAI(base_url="{url}/v1", api_key={key})
    answer = client.chat.completions.create(
        model="{options.served_name}", messages=[{{"role": "user", "content": "Hello!"}}])
    print(answer.choices[0].message.content)

{metrics_text(options, url)}
logs: {options.run_dir}   watch: {dashboard_url(options)}   or: mooncake top --url {url}   stop: Ctrl-C
"""

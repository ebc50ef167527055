"""What the commands share: options, how errors are told, how a model is found. Imports nothing heavy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mooncake.core.errors import MooncakeError
    from mooncake.model import ModelRef

Model = Annotated[str, typer.Option(help="Folder, hub name, or nothing for SmolLM2-135M-Instruct.")]
Metadata = Annotated[
    str, typer.Option(help="Address of the cluster's metadata, tcp://127.0.0.1:7700 or etcd://HOST:PORT,...")
]
Address = Annotated[
    str,
    typer.Option(help="Address of this host for the cluster; all but loopback need MOONCAKE_SECRET_FILE."),
]
Eviction = Annotated[
    str, typer.Option(help="lru, lfu, length or tail: which blocks a full pool gives up first.")
]
Hugepages = Annotated[
    str, typer.Option(help="auto (where the machine has them), off, or require: pages of the pool's memory.")
]
Ssd = Annotated[Path | None, typer.Option(help="Folder of the pool's SSD tier; KV there outlives restarts.")]
SsdSize = Annotated[str, typer.Option(help="Size of the SSD tier's file.")]
RunDir = Annotated[Path | None, typer.Option(help="Folder for sockets and logs, yours alone.")]
Dtype = Annotated[
    str, typer.Option(help="auto (not bfloat16 where it is emulated), bfloat16, float16, float32.")
]
BlockSize = Annotated[int, typer.Option(help="Tokens of a KV block.")]
MaxModelLen = Annotated[int, typer.Option(help="Longest context in tokens; 0 = the model's own.")]
KvMemory = Annotated[str, typer.Option(help="KV cache of each engine, e.g. 512MiB.")]
LoadMode = Annotated[str, typer.Option(help="async (whole requests) or layerwise.")]
ApiKey = Annotated[
    str, typer.Option(envvar="MOONCAKE_API_KEY", show_envvar=True, help="Better in the environment.")
]
LogLevel = Annotated[str, typer.Option(help="debug, info, warning or error.")]
VllmArgs = Annotated[list[str] | None, typer.Argument(help="After --: more arguments for vLLM.")]
Policy = Annotated[
    str, typer.Option(help="kvcache, cache_aware, least_load, round_robin or random: who gets a request.")
]
TtftSlo = Annotated[float, typer.Option(help="Refuse requests predicted to start later; 0 = none.")]
TbtSlo = Annotated[float, typer.Option(help="Refuse requests predicted to stream slower; 0 = none.")]
Hold = Annotated[
    float,
    typer.Option(help="Requests wait, by class and tenant, while engines have work for so long."),
]
Admission = Annotated[str, typer.Option(help="When decode load counts: objectives, late, early, predicted.")]
DecodeTime = Annotated[float, typer.Option(help="How long `predicted` takes an answer for; 0 = learned.")]
Inline = Annotated[bool, typer.Option(help="Short prompts may run on decode instances, beside their batch.")]
Tenants = Annotated[
    Path | None, typer.Option(help="TOML file of tenants: shares, quotas, keys (docs/scheduling.md).")
]
PlanRoles = Annotated[
    bool, typer.Option(help="Instances change between prefill and decode as the load asks for.")
]
Gateways = Annotated[
    int | None,
    typer.Option(help="So many gateway processes share the port, the core beside them; unset = one process."),
]
HotCopies = Annotated[
    int, typer.Option(help="Hosts that get a prefix ahead which many ask for, at most; 0 = none.")
]
Host = Annotated[str, typer.Option(help="Address to serve on; others than loopback need an API key.")]


def console(stderr: bool = False) -> "Console":
    """Return a console that changes nothing of what is printed."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def die(error: "MooncakeError") -> NoReturn:
    """Tell the error in one line and end."""
    from mooncake.up.launch import exit_code

    console(stderr=True).print(f"mooncake: {error}", style="red", markup=False, soft_wrap=True)
    raise typer.Exit(exit_code(error))


@contextmanager
def errors_told() -> Iterator[None]:
    """Our errors are one line and an exit code; anything else is a bug and shows its traceback."""
    from mooncake.core.errors import MooncakeError

    try:
        yield
    except MooncakeError as error:
        die(error)
    except KeyboardInterrupt:
        raise typer.Exit(130) from None


def refuse_conflicts() -> None:
    """Raise ConfigError if another package of our name is installed too."""
    from mooncake import doctor
    from mooncake.core.errors import ConfigError

    for row in doctor.refuse_conflicts():
        raise ConfigError(f"{row.name}: {row.found}: {row.advice}")


def run_dir_of(path: Path | None) -> str:
    """Return the folder that was asked for, or a fresh one."""
    from mooncake.up.run import default_run_dir

    if path is None:
        return str(default_run_dir())
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    return str(path.resolve())


def resolve(name: str) -> "ModelRef":
    """Return the model, with progress bars while it is fetched and converted."""
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TaskID, TextColumn

    from mooncake.model import resolve_model

    texts = {"download": "fetching", "wait": "waiting for another process", "read": "reading GGUF"}
    texts |= {"weights": "converting weights", "tokenizer": "building tokenizer"}
    shown = console(stderr=True)
    tasks: dict[str, tuple[Progress, TaskID]] = {}
    shared = [TextColumn("{task.description:<28}"), BarColumn()]
    download = Progress(*shared, DownloadColumn(), console=shown)
    convert = Progress(*shared, MofNCompleteColumn(), console=shown)

    def report(stage: str, done: int, total: int) -> None:
        if stage not in tasks:
            if not shown.is_terminal:
                shown.print(texts[stage], markup=False)
            bars = download if stage == "download" else convert
            if bars is convert and "download" in tasks:
                download.stop()  # two live displays at once are not possible
            bars.start()
            tasks[stage] = (bars, bars.add_task(texts[stage], total=total))
        bars, task = tasks[stage]
        bars.update(task, completed=done)

    try:
        return resolve_model(name or None, report)
    finally:
        for bars in {id(bars): bars for bars, _ in tasks.values()}.values():
            bars.stop()


def run_role(service: str, log_level: str, main: Callable[[], int]) -> NoReturn:
    """Run one process of the cluster in this one, then exit."""
    from mooncake.up.launch import guarded

    raise typer.Exit(guarded(service, log_level, main))

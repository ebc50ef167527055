"""What the commands share: how errors are told, how a model is found. Imports nothing heavy."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mooncake.core.errors import MooncakeError
    from mooncake.core.options_base import Options
    from mooncake.model import ModelRef


def console(stderr: bool = False) -> "Console":
    """Return a console that changes nothing of what is printed."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def die(error: "MooncakeError") -> NoReturn:
    """Tell the error, a line for each setting that is wrong, and end."""
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


def run_dir_of(path: str) -> str:
    """Return the folder that was asked for, or a fresh one.

    Raises:
        ConfigError: it cannot be made.
    """
    from mooncake.core.config import fail
    from mooncake.up.run import default_run_dir

    try:
        if not path:
            return str(default_run_dir())
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        return str(Path(path).resolve())
    except OSError as error:
        raise fail("run_dir", path, f"{error.strerror}: name a folder that can be made") from error


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


def run_role(service: str, options: "Options", main: Callable[[], int]) -> NoReturn:
    """Run one process of the cluster in this one, then exit."""
    from mooncake.up.launch import guarded

    raise typer.Exit(guarded(service, options, main))

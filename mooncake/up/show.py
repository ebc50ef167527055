"""What `mooncake up` shows: a live table on a terminal, one line per change elsewhere."""

import time
from types import TracebackType
from typing import Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

BUSY = {"starting", "loading", "importing", "restarting", "stopping"}
STYLES = {"ready": "green", "failed": "bold red", "restarting": "yellow", "stopped": "dim"}


class Board:
    """Rows of (name, state, detail). Use as a context; `set` may be called at any time."""

    def __init__(self, console: Console) -> None:
        """A console that is no terminal gets plain lines."""
        self.console = console
        self._start_s = time.monotonic()
        self._rows: dict[str, tuple[str, str, float]] = {}
        self._spinner = Spinner("dots")
        self._live: Live | None = None

    @property
    def seconds(self) -> float:
        """Since the board was made."""
        return time.monotonic() - self._start_s

    def __enter__(self) -> Self:
        """Begin to draw."""
        if self.console.is_terminal:
            self._live = Live(
                get_renderable=self._draw, console=self.console, refresh_per_second=8, transient=False
            )
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the last table on the screen."""
        if self._live:
            self._live.__exit__(kind, error, trace)
            self._live = None

    def set(self, name: str, state: str, detail: str = "") -> None:
        """Show that `name` is in `state`."""
        if self._rows.get(name, ("", "", 0.0))[:2] == (state, detail):
            return
        self._rows[name] = (state, detail, self.seconds)
        if self._live is None:
            line = f"{self.seconds:6.1f} s  {name:<12} {state}{f': {detail}' if detail else ''}"
            self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Print a line above the table."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _draw(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        for name, (state, detail, since_s) in self._rows.items():
            mark: RenderableType = self._spinner if state in BUSY else Text("●", STYLES.get(state, ""))
            waited = f"{self.seconds - since_s:.0f} s" if state in BUSY else f"{since_s:.1f} s"
            table.add_row(
                mark, name, Text(state, STYLES.get(state, "")), Text(waited, "dim"), Text(detail, "dim")
            )
        return table

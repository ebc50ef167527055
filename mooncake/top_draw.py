"""How `mooncake top` looks: tables that give up their least important columns on a narrow terminal."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from mooncake.core.config import format_size
from mooncake.top_pages import Deciding, Look
from mooncake.top_stats import (
    FrontRow,
    InstanceRow,
    Mark,
    StoreRow,
    Totals,
    front_rows,
    instance_rows,
    marks,
    store_rows,
    totals,
)

WIDTH = 80
"""Of a terminal over ssh that nobody has made larger."""
NAME_CHARS_MAX = 28
REASONS_MAX = 3
"""Reasons and paths shown by name; the others are in the sum."""
BAR_CELLS = 6
BAR_WIDTH_MIN = 100
"""Terminals narrower than this have no room for bars."""
STATES = {"alive": "green", "suspect": "yellow", "dead": "bold red"}
ROLES = {"prefill": "cyan", "decode": "magenta", "both": "blue", "draining": "yellow"}
FULL, FILLING = 0.95, 0.8

Item = tuple[str, str]
Cell = Text | str


class Column(msgspec.Struct, frozen=True):
    """One column; the highest `drop` goes first, 0 never does."""

    title: str
    drop: int = 0
    left: bool = False


def draw(before: Look, now: Look, width: int = WIDTH) -> RenderableType:
    """Return everything there is to see in two looks, `width` characters wide."""
    found = totals(before, now)
    parts: list[RenderableType] = [_items(_summary(found), width)]
    if shown := marks(now):
        parts += [Text(), _marks(shown)]
    fronts = front_rows(before, now)
    if fronts:
        parts += [Text(), _fronts(fronts, now.members.core, width)]
    parts += [
        Text(),
        _instances(instance_rows(before, now), width),
        Text(),
        _stores(store_rows(before, now), width),
    ]
    return Group(*parts)


# ------------------------------------------------------------ the summary


def _summary(found: Totals) -> list[list[Item]]:
    rejected = sum(found.rejected_per_s.values())
    moved = sum(found.moved_per_s.values())
    return [
        [
            ("in flight", f"{found.in_flight}"),
            ("waiting", _count(found.waiting) + _named(found.waiting_by_class, lambda n: f"{n:.0f}")),
            ("requests/s", _number(found.requests_per_s)),
            ("tokens/s", _number(found.tokens_per_s)),
            ("rejected/s", _number(rejected) + _named(found.rejected_per_s, _number)),
        ],
        [
            ("TTFT p50", _latency(found.ttft_p50_s)),
            ("p95", _latency(found.ttft_p95_s)),
            ("TBT p50", _latency(found.tbt_p50_s)),
            ("p95", _latency(found.tbt_p95_s)),
            ("prefix hits", _percent(found.prefix_hits)),
        ],
        [
            ("pool to engines", _bandwidth(found.loaded_per_s)),
            ("engines to pool", _bandwidth(found.saved_per_s)),
            ("between hosts", _bandwidth(moved) + _named(found.moved_per_s, _bandwidth) if moved else "-"),
        ],
    ]


def _named(values: Mapping[str, float], form: Callable[[float], str]) -> str:
    shown = [f"{name} {form(value)}" for name, value in list(values.items())[:REASONS_MAX]]
    rest = len(values) - len(shown)
    return f" ({', '.join([*shown, f'{rest} more'] if rest > 0 else shown)})" if shown else ""


def _items(lines: Iterable[Sequence[Item]], width: int) -> Text:
    """Return names and values, several to a line, none of them broken."""
    text = Text()
    for line in lines:
        used = 0
        for name, value in line:
            size = len(name) + len(value) + 4
            if used and used + size - 3 > width:
                text.append("\n")
                used = 0
            text.append(f"{name} ", "dim").append(_printable(f"{value}"), "bold").append("   ")
            used += size
        text.append("\n")
    text.right_crop(1)
    return text


def _marks(shown: Iterable[Mark]) -> Text:
    lines = [Text(f"! {_printable(mark.text)}", "bold red" if mark.grave else "yellow") for mark in shown]
    return Text("\n").join(lines)


# ------------------------------------------------------------ tables


def _fronts(rows: Iterable[FrontRow], core: Deciding, width: int) -> RenderableType:
    columns = [
        Column("process", left=True),
        Column("pid", 1, left=True),
        Column("does", left=True),
        Column("in flight"),
        Column("requests/s"),
    ]
    cells: list[list[Cell]] = []
    for row in rows:
        does = Text("serves, decides alone", "bold yellow") if row.alone else Text(row.does)
        if row.does == "decides":
            does = Text(f"decides, term {core.term}", "green")
        numbers = [_count(row.in_flight), _number(row.requests_per_s)]
        cells.append([_name(row.name), str(row.pid), does, *numbers])
    return _table(columns, cells, width)


def _instances(rows: Iterable[InstanceRow], width: int) -> RenderableType:
    columns = [
        Column("instance", left=True),
        Column("role", left=True),
        Column("state", left=True),
        Column("running"),
        Column("waiting"),
        Column("KV"),
        Column("own hits", 2),
        Column("pool hits", 1),
        Column("loads", 3),
        Column("saves", 4),
        Column("bad", 5),
    ]
    cells: list[list[Cell]] = [
        [
            _name(row.name),
            Text(_printable(row.role), ROLES.get(row.role, "")),
            Text(_printable(row.state), STATES.get(row.state, "")),
            _count(row.running),
            _count(row.waiting),
            _meter(row.kv_use, width),
            _percent(row.engine_hits),
            _percent(row.pool_hits),
            _bandwidth(row.loaded_per_s),
            _bandwidth(row.saved_per_s),
            _bad(row.bad_blocks),
        ]
        for row in rows
    ]
    return _table(columns, cells, width)


def _stores(rows: Sequence[StoreRow], width: int) -> RenderableType:
    columns = [
        Column("pool node", left=True),
        Column("DRAM"),
        Column("of", 1),
        Column("blocks", 3),
        Column("hits"),
        Column("evicted/s", 2),
        Column("bad", 4),
    ]
    with_ssd = any(row.ssd_capacity_bytes for row in rows)
    if with_ssd:
        columns[5:5] = [Column("SSD"), Column("of", 1), Column("SSD hits", 2)]
    cells: list[list[Cell]] = []
    for row in rows:
        ssd: list[Cell] = [_size(row.ssd_used_bytes), _size(row.ssd_capacity_bytes), _percent(row.ssd_hits)]
        cells.append([
            _name(row.node),
            _size(row.used_bytes),
            _size(row.capacity_bytes),
            _count(row.blocks),
            _percent(row.hits),
            *(ssd if with_ssd else []),
            _number(row.evicted_per_s),
            _bad(row.bad_blocks),
        ])  # fmt: skip
    return _table(columns, cells, width)


def _table(columns: Sequence[Column], rows: Sequence[Sequence[Cell]], width: int) -> Table:
    """Return a table of those columns that there is room for."""
    sizes = [max([len(column.title), *(len(row[i]) for row in rows)]) for i, column in enumerate(columns)]
    kept = list(range(len(columns)))
    while sum(sizes[i] for i in kept) + 2 * (len(kept) - 1) > width:
        worst = max(kept, key=lambda i: columns[i].drop)
        if not columns[worst].drop:
            break
        kept.remove(worst)
    table = Table(
        box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, show_edge=False, collapse_padding=True
    )
    for i in kept:
        column = columns[i]
        table.add_column(column.title, justify="left" if column.left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(row[i] for i in kept))
    return table


# ------------------------------------------------------------ cells


def _printable(text: str) -> str:
    return "".join(char if char.isprintable() else "?" for char in text)  # no terminal codes of others


def _name(text: str) -> Text:
    shown = _printable(text)
    return Text(shown if len(shown) <= NAME_CHARS_MAX else f"{shown[: NAME_CHARS_MAX - 1]}…")


def _bad(value: float | None) -> Text:
    return Text(_count(value), "bold red" if value else "")


def _meter(share: float | None, width: int) -> Text:
    if share is None:
        return Text("-")
    style = "bold red" if share >= FULL else "yellow" if share >= FILLING else "green"
    text = Text()
    if width >= BAR_WIDTH_MIN:
        filled = round(min(1.0, max(0.0, share)) * BAR_CELLS)
        text.append("━" * filled, style).append("━" * (BAR_CELLS - filled), "grey35").append(" ")
    return text.append(f"{share:4.0%}", style if share >= FILLING else "")


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _size(value: float | None) -> str:
    return "-" if value is None else format_size(int(value))


def _bandwidth(value: float | None) -> str:
    if value is None:
        return "-"
    for unit, size in (("GB/s", 1e9), ("MB/s", 1e6), ("kB/s", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return "0" if value < 0.5 else f"{value:.0f} B/s"


def _latency(value_s: float | None) -> str:
    if value_s is None:
        return "-"
    return f"{value_s * 1000:.0f} ms" if value_s < 1 else f"{value_s:.2f} s"

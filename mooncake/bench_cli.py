"""`mooncake bench`: replay a trace against endpoints that speak OpenAI's API, in real time.

Imports nothing heavy before it runs, as mooncake.cli.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.replay.client import Outcome, Target
    from benchmarks.replay.prompts import Shape
    from benchmarks.replay.report import Summary
    from benchmarks.sim.trace import TraceRequest


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    app.command()(bench)


def bench(
    url: Annotated[
        list[str] | None, typer.Option(help="Of the server, or NAME=URL; several are replayed one by one.")
    ] = None,
    trace: Annotated[str, typer.Option(help="Mooncake trace (JSON lines); nothing = a generated one.")] = "",
    requests: Annotated[int, typer.Option(help="Of a generated trace.")] = 100,
    rate: Annotated[float, typer.Option(help="Requests per second of a generated trace.")] = 1.0,
    speed: Annotated[float, typer.Option(help="Replay so many times faster.")] = 1.0,
    scale: Annotated[
        float, typer.Option(help="Tokens sent for one of the trace; 0.0625 makes its blocks 32 tokens.")
    ] = 1.0,
    start_s: Annotated[float, typer.Option(help="Begin there in the trace.")] = 0.0,
    length_s: Annotated[float, typer.Option(help="Take so much of the trace; 0 = to its end.")] = 0.0,
    sample: Annotated[float, typer.Option(help="Share of requests to keep.")] = 1.0,
    spread_s: Annotated[
        float, typer.Option(help="Delay each by a random part of it; undoes rounded stamps.")
    ] = 0.0,
    model: Annotated[str, typer.Option(help="Nothing = the first that the server names.")] = "",
    vocabulary: Annotated[int, typer.Option(help="Token ids below this are sent.")] = 1000,
    text: Annotated[bool, typer.Option(help="Send words instead of token ids.")] = False,
    chat: Annotated[bool, typer.Option(help="Send them to /v1/chat/completions.")] = False,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers as long as the trace's; not every server can.")
    ] = True,
    sessions: Annotated[bool, typer.Option(help="Say in x-session-id which conversation it is.")] = False,
    ttft_slo_s: Annotated[float, typer.Option(help="Objective by which requests are judged.")] = 30.0,
    tbt_slo_s: Annotated[float, typer.Option(help="The same, mean of the longest tenth.")] = 0.1,
    timeout_s: Annotated[float, typer.Option(help="Longest time of one request.")] = 300.0,
    in_flight_max: Annotated[int, typer.Option(help="Beyond it requests are not sent, and counted.")] = 1024,
    api_key: Annotated[
        str, typer.Option(envvar="MOONCAKE_API_KEY", show_envvar=True, help="Better in the environment.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write the figures there.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw distributions and load there (.svg).")] = None,
) -> None:
    """Replay a trace against any OpenAI endpoint, open loop, and say what came of it."""
    from mooncake.cli import _console, _errors_told

    with _errors_told():
        _need_httpx()
        from benchmarks.replay.prompts import Shape
        from benchmarks.replay.run import check_objectives, requests_of, targets_of

        check_objectives(ttft_slo_s, tbt_slo_s)
        shape = Shape(scale=scale, vocabulary=vocabulary, text=text or chat, seed=seed)
        wanted = requests_of(
            trace, count=requests, rate=rate, seed=seed,
            speed=speed, start_s=start_s, length_s=length_s, sample=sample, spread_s=spread_s,
        )  # fmt: skip
        targets = targets_of(
            url or ["http://127.0.0.1:8000"], model=model, api_key=api_key, chat=chat, ignore_eos=ignore_eos,
            timeout_s=timeout_s, in_flight_max=in_flight_max,
        )  # fmt: skip
        title = f"{Path(trace).name if trace else 'generated trace'}, {speed:g}x, tokens x {scale:g}"
        _run(
            wanted, shape, targets, _console(), _console(stderr=True),
            slo_s=(ttft_slo_s, tbt_slo_s), sessions=sessions, title=title, json=json, picture=plot,
        )  # fmt: skip


def _need_httpx() -> None:
    from importlib.util import find_spec

    from mooncake.core.errors import ConfigError

    if find_spec("httpx") is None:
        raise ConfigError("mooncake bench needs httpx: pip install 'mooncake-serving[bench]'")


def _run(
    requests: "Sequence[TraceRequest]",
    shape: "Shape",
    targets: "dict[str, Target]",
    console: "Console",
    stderr: "Console",
    *,
    slo_s: tuple[float, float],
    sessions: bool,
    title: str,
    json: Path | None,
    picture: Path | None,
) -> None:
    from benchmarks.replay.prompts import digest
    from benchmarks.replay.report import plot, summarize, warnings
    from benchmarks.replay.run import as_json, headers_of, ready

    targets = {name: ready(target, requests, shape) for name, target in targets.items()}
    of = digest(requests, shape)
    headers = headers_of(requests) if sessions else []
    runs: dict[str, Sequence[Outcome]] = {}
    for name, target in targets.items():
        runs[name] = _one(name, requests, shape, target, headers, stderr)
    summaries = {name: summarize(outcomes, *slo_s, of) for name, outcomes in runs.items()}
    _show(title, summaries, console)
    for line in warnings(summaries):
        stderr.print(line, style="yellow", markup=False)
    if json is not None:
        from mooncake.simulate_cli import _write

        _write(json, as_json(title, shape, targets, summaries))
    if picture is not None:
        plot(str(picture), runs, title, slo_s)


def _one(
    name: str,
    requests: "Sequence[TraceRequest]",
    shape: "Shape",
    target: "Target",
    headers: "Sequence[dict[str, str]]",
    stderr: "Console",
) -> "list[Outcome]":
    """Run one endpoint; Ctrl-C ends the run, and what came until then is reported."""
    import asyncio

    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from benchmarks.replay.run import replay_until_stopped

    columns = (
        TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("{task.fields[state]}"),
    )  # fmt: skip
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(name, total=len(requests), state="")
        sent = unsent = refused = failed = ended = 0

        def tell(outcome: "Outcome | None") -> None:
            nonlocal sent, unsent, refused, failed, ended
            if outcome is None:
                sent += 1
                return
            ended += 1
            refused += outcome.is_refused
            failed += bool(outcome.error) and not outcome.is_refused
            unsent += outcome.late_s < 0
            state = f"{sent + unsent - ended} in flight, {refused} rejected, {failed} failed"
            bar.update(task, completed=ended, state=state)

        return asyncio.run(replay_until_stopped(requests, shape, target, tell, headers))


def _show(title: str, summaries: "dict[str, Summary]", console: "Console") -> None:
    from rich.table import Table

    from benchmarks.replay.report import rows

    table = Table(title=title, box=None)
    table.add_column("")
    for name in summaries:
        table.add_column(name, justify="right")
    for name, cells in rows(summaries):
        table.add_row(name, *cells)
    console.print(table)

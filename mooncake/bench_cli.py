"""`mooncake bench`: replay a trace against endpoints that speak OpenAI's API, in real time.

Imports nothing heavy before it runs, as mooncake.cli.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mooncake import trace_cli as common

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.replay.client import Outcome, Target
    from benchmarks.replay.prompts import Shape
    from benchmarks.sim.trace import TraceRequest


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    app.command()(bench)


def bench(
    url: Annotated[
        list[str] | None, typer.Option(help="Of the server, or NAME=URL; several are replayed one by one.")
    ] = None,
    trace: common.Trace = "",
    requests: common.Requests = 100,
    rate: common.Rate = 1.0,
    speed: common.Speed = 1.0,
    scale: Annotated[
        float, typer.Option(help="Tokens sent for one of the trace; 0.0625 makes its blocks 32 tokens.")
    ] = 1.0,
    start_s: common.StartS = 0.0,
    length_s: common.LengthS = 0.0,
    sample: common.Sample = 1.0,
    spread_s: common.SpreadS = 0.0,
    model: Annotated[str, typer.Option(help="Nothing = the first that the server names.")] = "",
    vocabulary: Annotated[int, typer.Option(help="Token ids below this are sent.")] = 1000,
    text: Annotated[bool, typer.Option(help="Send words instead of token ids.")] = False,
    chat: Annotated[bool, typer.Option(help="Send them to /v1/chat/completions.")] = False,
    ignore_eos: Annotated[
        bool, typer.Option(help="Ask for answers as long as the trace's; not every server can.")
    ] = True,
    sessions: Annotated[bool, typer.Option(help="Say in x-session-id which conversation it is.")] = False,
    ttft_slo_s: common.TtftSloS = common.TTFT_SLO_S,
    tbt_slo_s: common.TbtSloS = common.TBT_SLO_S,
    timeout_s: Annotated[float, typer.Option(help="Longest time of one request.")] = 300.0,
    in_flight_max: Annotated[int, typer.Option(help="Beyond it requests are not sent, and counted.")] = 1024,
    api_key: Annotated[
        str, typer.Option(envvar="MOONCAKE_API_KEY", show_envvar=True, help="Better in the environment.")
    ] = "",
    seed: common.Seed = 0,
    json: common.Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw distributions and load there (.svg).")] = None,
) -> None:
    """Replay a trace against any OpenAI endpoint, open loop, and say what came of it."""
    from mooncake.cli_common import console, errors_told

    with errors_told():
        _need_httpx()
        from benchmarks.replay.prompts import Shape
        from benchmarks.replay.run import targets_of
        from benchmarks.sim.report import check_objectives
        from benchmarks.sim.trace import requests_of

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
            wanted, shape, targets, console(), console(stderr=True),
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
    from benchmarks.replay.report import plot, rows, summarize, warnings
    from benchmarks.replay.run import as_json, headers_of, ready
    from benchmarks.sim.charts import pyplot

    if picture is not None:
        pyplot("--plot")
    targets = {name: ready(target, requests, shape) for name, target in targets.items()}
    of = digest(requests, shape)
    headers = headers_of(requests) if sessions else []
    runs: dict[str, Sequence[Outcome]] = {}
    for name, target in targets.items():
        runs[name] = _one(name, requests, shape, target, headers, stderr)
    summaries = {name: summarize(outcomes, *slo_s, of) for name, outcomes in runs.items()}
    common.show(title, summaries, rows(summaries), console)
    for line in warnings(summaries):
        stderr.print(line, style="yellow", markup=False)
    if json is not None:
        common.write(json, as_json(title, shape, targets, summaries))
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

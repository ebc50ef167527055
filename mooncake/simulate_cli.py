"""`mooncake simulate`: replay a trace through the production Conductor in virtual time.

Imports nothing heavy before it runs, as mooncake.cli.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mooncake import trace_cli as common

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.sim.run import Options, Result


def register(app: typer.Typer) -> None:
    """Add our command to `mooncake`."""
    app.command()(simulate)


def simulate(
    trace: common.Trace = "",
    requests: common.Requests = 2000,
    rate: common.Rate = 4.0,
    policy: Annotated[
        str,
        typer.Option(help="kvcache, cache_aware, least_load, round_robin, random; a,b compares; or all."),
    ] = "kvcache",
    prefill: Annotated[int, typer.Option(help="Prefill instances.")] = 8,
    decode: Annotated[int, typer.Option(help="Decode instances.")] = 8,
    both: Annotated[int, typer.Option(help="Instead: so many instances that do both.")] = 0,
    chunk_tokens: Annotated[
        int, typer.Option(help="Prefill in chunks of it, beside the batch with --both; 0 = whole prompts.")
    ] = 0,
    profile: Annotated[
        str, typer.Option(help="Costs: a800-llama2-70b, h800-llama2-70b, or FILE.toml[:NAME].")
    ] = "a800-llama2-70b",
    speed: common.Speed = 1.0,
    start_s: common.StartS = 0.0,
    length_s: common.LengthS = 0.0,
    sample: common.Sample = 1.0,
    spread_s: common.SpreadS = 0.0,
    pool_tokens: Annotated[
        int, typer.Option(help="Tokens in the store beside each prefill instance; -1 = the profile's.")
    ] = -1,
    decode_pool_tokens: Annotated[
        int, typer.Option(help="The same beside each decode instance; what is handed over stays there.")
    ] = 0,
    eviction: Annotated[str, typer.Option(help="lru, lfu, length or tail.")] = "lru",
    ttft_slo_s: common.TtftSloS = common.TTFT_SLO_S,
    tbt_slo_s: common.TbtSloS = common.TBT_SLO_S,
    admission: Annotated[
        str, typer.Option(help="none, or whom to refuse: objectives, late, early or predicted.")
    ] = "none",
    decode_s: Annotated[float, typer.Option(help="How long predicted takes an answer for; 0 = learned.")] = 0,
    plan_roles: Annotated[
        bool, typer.Option(help="Let instances change their roles as the load asks for.")
    ] = False,
    kill: Annotated[
        str,
        typer.Option(
            help="What breaks down: prefill-003@120+30 (at 120 s, for 30 s), host-prefill-003@120, ..."
        ),
    ] = "",
    mtbf_s: Annotated[float, typer.Option(help="Seconds between failures of an instance; 0 = none.")] = 0,
    repair_s: Annotated[float, typer.Option(help="Until such an instance is back.")] = 30.0,
    event_delay_s: Annotated[
        float, typer.Option(help="From a store's change to the Conductor's index.")
    ] = 0.005,
    event_loss: Annotated[float, typer.Option(help="Share of these messages that is lost.")] = 0.0,
    seed: common.Seed = 0,
    report: Annotated[
        Path | None, typer.Option(help="Folder for a page with table and pictures (index.html, *.png).")
    ] = None,
    json: common.Json = None,
    plot: Annotated[Path | None, typer.Option(help="Draw all charts into one file (.svg).")] = None,
) -> None:
    """Replay a trace through the production Conductor and stores, with simulated engines."""
    from mooncake.cli_common import console, errors_told

    with errors_told():
        from benchmarks.sim.run import Options

        options = Options(
            trace=trace, requests=requests, rate=rate, policy=policy, prefill=0 if both else prefill,
            decode=0 if both else decode, both=both, chunk_tokens=chunk_tokens, profile=profile, speed=speed,
            start_s=start_s, length_s=length_s, sample=sample, spread_s=spread_s, pool_tokens=pool_tokens,
            decode_pool_tokens=decode_pool_tokens, eviction=eviction, ttft_slo_s=ttft_slo_s,
            tbt_slo_s=tbt_slo_s, admission=admission, decode_s=decode_s, plan_roles=plan_roles, seed=seed,
            kill=kill, mtbf_s=mtbf_s, repair_s=repair_s, event_delay_s=event_delay_s, event_loss=event_loss,
        )  # fmt: skip
        _run(options, report, json, plot, console(), console(stderr=True))


def _run(
    options: "Options",
    report: Path | None,
    json: Path | None,
    picture: Path | None,
    console: "Console",
    stderr: "Console",
) -> None:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from benchmarks.sim.run import as_json, command_of, simulate

    if report is not None:
        from benchmarks.sim import page

        page.check(report)
    if picture is not None:
        from benchmarks.sim.charts import pyplot

        pyplot("--plot")
    columns = (TextColumn("{task.description:<12}"), BarColumn(), MofNCompleteColumn())
    remaining = TimeRemainingColumn(elapsed_when_finished=True)
    begun_s, cpu_s = time.perf_counter(), time.process_time()
    with Progress(*columns, remaining, console=stderr, disable=not stderr.is_terminal) as bar:
        tasks: dict[str, int] = {}

        def progress(name: str, arrived: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(bar.task_ids[tasks[name]], completed=arrived)

        results = simulate(options, progress)
    took_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    _show(options, results, took_s, cpu_s, console)
    if json is not None:
        common.write(json, as_json(options, results))
    if picture is not None:
        from benchmarks.sim.plot import plot

        plot(str(picture), results, _title(options))
    if report is not None:
        data = as_json(options, results)
        page.write(report, results, _title(options), command_of(options), data)
        console.print(f"report: {report / page.INDEX}", markup=False, highlight=False, soft_wrap=True)


def _title(options: "Options") -> str:
    name = Path(options.trace).name if options.trace else f"{options.requests} generated requests"
    kinds = {"prefill": options.prefill, "decode": options.decode, "both": options.both}
    who = " + ".join(f"{count} {kind}" for kind, count in kinds.items() if count)
    return f"{name}, {options.speed:g}x: {who}, {options.profile}"


def _show(
    options: "Options", results: "dict[str, Result]", took_s: float, cpu_s: float, console: "Console"
) -> None:
    from benchmarks.sim.report import rows

    lines = rows({name: result.summary for name, result in results.items()})
    common.show(_title(options), results, lines, console)
    runs = [result.summary for result in results.values()]
    count, simulated_s = sum(run.requests for run in runs), sum(run.simulated_s for run in runs)
    console.print(
        f"{count:,} requests in {took_s:.1f} s: {count / took_s:,.0f} requests/s,"
        f" {simulated_s / took_s:,.0f} times real time ({simulated_s / cpu_s:,.0f} by processor time)",
        markup=False,
    )
    digests = ", ".join(f"{name} {result.summary.digest}" for name, result in results.items())
    console.print(f"digest: {digests}", markup=False, highlight=False, soft_wrap=True)

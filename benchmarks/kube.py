"""Kubernetes: from `kubectl apply` to the first token, and what rolling restarts cost clients.

deploy/overlays/dev-cpu (with a tiny model) in the stand-in of tests/kube, which runs each pod's real command
as local processes on this machine: no image is pulled, packages have their bytecode, as in images, and probes
ask four times as often as the manifests say; else the times are those of our processes. Needs root. `--cold`
drops the page cache before the first apply: files come from the disk, as on a new node.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from tests.kube.cluster import unable_here
from tests.kube.serving import OVERLAY, READY_S, Serving, Tally, fill, serving

REQUESTS, QUICK_REQUESTS = 120, 24
"""Of undisturbed traffic, the yardstick."""
ROLLS: dict[str, tuple[str, ...]] = {
    "core": ("deploy/core",), "stores": ("ds/store",), "gateway": ("deploy/gateway",),
    "prefill": ("deploy/prefill",), "decode": ("deploy/decode",),
}  # fmt: skip


def options(parser: argparse.ArgumentParser) -> None:
    """Add ours."""
    parser.add_argument("--cold", action="store_true", help="drop the page cache before the first apply")


def drop_caches() -> None:
    """Let the kernel forget the content of all files."""
    subprocess.run(["sync"], check=True, timeout=60.0)
    Path("/proc/sys/vm/drop_caches").write_text("3")


def row(what: str, tally: Tally, yardstick: Tally) -> dict[str, Any]:
    """Return what became of the requests of one phase; tell what was dropped."""
    for line in tally.dropped:
        print(f"{what}: dropped: {line}", file=sys.stderr)
    if not tally.answered:
        raise SystemExit(f"benchmarks.kube: {what}: no request was answered")
    return {
        "phase": what, "requests": tally.answered, "dropped": len(tally.dropped),
        "ttft_p50_s": round(tally.p50_s, 3), "ttft_p99_s": round(tally.p99_s, 3),
        "added_p99_s": round(tally.p99_s - yardstick.p99_s, 3),
    }  # fmt: skip


def apply_again(cluster: Serving) -> float:
    """Delete everything, apply it again, and return the seconds to the first token."""
    cluster.kube.kubectl(
        "delete", "-k", str(OVERLAY), "--ignore-not-found", f"--timeout={READY_S:g}s", timeout_s=READY_S
    )
    cluster.apply()
    return cluster.first_token_s


def main() -> None:
    """Run it."""
    arguments = harness.arguments(__doc__ or "", options)
    if reason := unable_here():
        raise SystemExit(f"benchmarks.kube: {reason}")
    with tempfile.TemporaryDirectory(prefix="mk-models-") as name, harness.progress(3 + len(ROLLS)) as begin:
        models = Path(name)
        fill(models)
        begin("apply")
        if arguments.cold:
            drop_caches()
        with serving(models) as cluster:
            applied = {"first": round(cluster.first_token_s, 1)}
            begin("delete, apply")
            applied["again"] = round(apply_again(cluster), 1)
            cluster.rolled("deploy/core", "deploy/gateway", "deploy/prefill", "deploy/decode", "ds/store")
            cluster.learn()
            begin("undisturbed")
            with cluster.traffic() as yardstick:
                cluster.wait_answered(yardstick, QUICK_REQUESTS if arguments.quick else REQUESTS)
            rows = [row("undisturbed", yardstick, yardstick)]
            for what, workloads in ROLLS.items():
                begin(f"restart of {what}")
                with cluster.traffic() as tally:
                    cluster.restart(*workloads)
                    cluster.wait_answered(tally, 6)
                rows.append(row(f"restart of {what}", tally, yardstick))
    harness.show("seconds from `kubectl apply` to the first token", [applied])
    harness.show("rolling restarts under traffic", rows)
    harness.save(arguments.json, {"cold": arguments.cold, "first_token_s": applied, "phases": rows})


if __name__ == "__main__":
    main()

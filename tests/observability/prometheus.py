"""A real Prometheus for a test: started with a configuration, asked over HTTP, gone with the test."""

import contextlib
import functools
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from mooncake.core.process import set_parent_death_signal
from tests.integration.ports import lasting_port

NEEDS_PROMETHEUS = pytest.mark.skipif(
    any(shutil.which(program) is None for program in ("prometheus", "promtool", "amtool")),
    reason="no prometheus, promtool, amtool: run scripts/prometheus-parts",
)
READY_S = 60.0


class Prometheus:
    """Of a URL."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, timeout=30.0)

    def ready(self) -> bool:
        """Whether it answers."""
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def _get(self, path: str, **parameters: Any) -> Any:
        answer = self._http.get(f"/api/v1/{path}", params=parameters).json()
        assert answer["status"] == "success", f"{parameters}: {answer.get('error')}"
        return answer["data"]

    def series(self, expr: str, start_s: float, end_s: float, step_s: float) -> list[list[float]]:
        """Return the values of each series of `expr` over time.

        Raises:
            AssertionError: Prometheus does not take the query.
        """
        data = self._get("query_range", query=expr, start=start_s, end=end_s, step=step_s)
        return [[float(value) for _, value in series["values"]] for series in data["result"]]

    def value(self, expr: str) -> float | None:
        """Return the value of the only series of `expr` now; None without one."""
        result = self._get("query", query=expr)["result"]
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def label_values(self, metric: str, label: str) -> list[str]:
        """Return what `label_values(metric, label)` gives in a board."""
        values: list[str] = self._get(f"label/{label}/values", **{"match[]": metric})
        return values

    def rules(self) -> list[dict[str, Any]]:
        """Return every loaded rule and how its last evaluation went."""
        return [rule for group in self._get("rules")["groups"] for rule in group["rules"]]

    def targets(self) -> list[dict[str, Any]]:
        """Return what is scraped."""
        targets: list[dict[str, Any]] = self._get("targets")["activeTargets"]
        return targets

    def close(self) -> None:
        """Close connections."""
        self._http.close()


@contextlib.contextmanager
def running(folder: Path, config: str) -> Iterator[Prometheus]:
    """Run one on loopback with `config` (prometheus.yml), data in `folder`."""
    (folder / "prometheus.yml").write_text(config)
    port = lasting_port()
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
            ],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            preexec_fn=functools.partial(set_parent_death_signal, os.getpid()),  # noqa: PLW1509
        )  # fmt: skip
    prometheus = Prometheus(f"http://127.0.0.1:{port}")
    try:
        end_s = time.monotonic() + READY_S
        while not prometheus.ready():
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            assert time.monotonic() < end_s, f"not ready within {READY_S:g} s"
            time.sleep(0.1)
        yield prometheus
    finally:
        prometheus.close()
        process.kill()
        process.wait(10.0)

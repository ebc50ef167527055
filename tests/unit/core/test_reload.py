"""Settings change while a process runs: all that may, or nothing; and it says what came of it."""

import asyncio
import contextlib
import json
import os
import signal
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from mooncake.core import reload
from mooncake.core.admin import AdminServer
from mooncake.core.errors import ConfigError
from mooncake.core.options import ConductorOptions, GatewayOptions, PrefillOptions, UpOptions
from mooncake.core.reload import reloading
from mooncake.core.settings import load


class Site:
    """One process with a settings file; `applied` has every change of what it goes by."""

    def __init__(self, folder: Path, **flags: object) -> None:
        self.path = folder / "mooncake.yaml"
        self.flags = flags
        self.applied: list[GatewayOptions] = []
        self.registry = CollectorRegistry()
        self.refuses = ""

    def write(self, text: str) -> None:
        """As a ConfigMap does: another file takes its place."""
        fresh = self.path.with_suffix(".new")
        fresh.write_text(text)
        fresh.replace(self.path)

    def options(self) -> ConductorOptions:
        return load(ConductorOptions, {"config": str(self.path), **self.flags})

    def prepare(self, options: GatewayOptions):
        if self.refuses:
            raise ConfigError(self.refuses)
        return lambda: self.applied.append(options)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"mooncake_config_{name}", labels)

    @contextlib.asynccontextmanager
    async def running(self, options: GatewayOptions | None = None, admin: AdminServer | None = None):
        async with reloading(options or self.options(), self.registry, admin, self.prepare) as reloader:
            self.applied.clear()
            yield reloader


@pytest.fixture
def site(tmp_path, monkeypatch):
    monkeypatch.setattr(reload, "POLL_S", 0.01)
    monkeypatch.setattr(reload, "has_terminal", lambda: False)
    made = Site(tmp_path)
    made.write("conductor:\n  ttft_slo_s: 5\n")
    return made


def ask_json(method: str, url: str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=60) as reply:
            return reply.status, json.load(reply)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


async def until(true) -> None:
    async with asyncio.timeout(60):
        while not true():  # noqa: ASYNC110 -- a thread reads the file
            await asyncio.sleep(0.005)


async def test_what_may_change_changes_and_the_rest_is_named(site):
    async with site.running() as reloader:
        site.write("conductor:\n  ttft_slo_s: 7\n  policy: least_load\n  block_size: 64\n")
        outcome = await reloader.reload("test")
        assert outcome.result == "changed"
        assert set(outcome.changed) == {"ttft_slo_s", "policy"}
        assert outcome.needs_restart == ["block_size"]
        assert (site.applied[-1].ttft_slo_s, site.applied[-1].policy) == (7, "least_load")
        assert reloader.options.block_size == 32
        assert reloader.options.origins["ttft_slo_s"] == f"{site.path}:2"
        assert (site.metric("generation"), site.metric("last_reload_success")) == (1, 1)


async def test_a_key_that_is_left_out_has_its_default_again(site):
    async with site.running() as reloader:
        site.write("conductor: {}\n")
        assert (await reloader.reload("test")).changed == ["ttft_slo_s"]
        assert reloader.options.ttft_slo_s == 0
        assert "ttft_slo_s" not in reloader.options.origins


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("conductor:\n  ttft_slo_s: 9\n  tbt_slo_s: -1\n", "tbt_slo_s = '-1'"),
        ("conductor:\n  ttft_slo_s: 9\n  ttft_slo: 1\n", "did you mean ttft_slo_s?"),
        ("conductor:\n  ttft_slo_s: 9\n  block_size: 33\n", "block_size"),
        ("conductor: [", "no YAML"),
        ("", None),
    ],
)
async def test_a_wrong_file_changes_nothing_and_is_told(site, text, told):
    async with site.running() as reloader:
        before = reloader.options
        if told is None:
            site.path.unlink()
            told = "name a file that is there"
        else:
            site.write(text)
        with capture_logs() as logs:
            outcome = await reloader.reload("test")
        assert outcome.result == "refused"
        assert told in "\n".join(outcome.errors)
        assert [line["event"] for line in logs] == ["config.refused"]
        assert reloader.options is before
        assert site.applied == []
        assert (site.metric("last_reload_success"), site.metric("reloads_total", result="refused")) == (0, 1)
        site.write("conductor:\n  ttft_slo_s: 6\n")
        assert (await reloader.reload("test")).result == "changed"
        assert site.metric("last_reload_success") == 1


async def test_what_hangs_on_it_is_asked_before_anything_holds(site):
    async with site.running() as reloader:
        site.refuses = "tenants: [tenants.a]: wrong"
        site.write("conductor:\n  ttft_slo_s: 8\n")
        assert (await reloader.reload("test")).errors == [site.refuses]
        assert (reloader.options.ttft_slo_s, site.applied) == (5, [])


async def test_flags_and_environment_come_before_the_file_for_ever(site, monkeypatch):
    monkeypatch.setenv("MOONCAKE_HOLD_S", "2")
    site.flags = {"ttft_slo_s": "3"}
    async with site.running() as reloader:
        site.write("conductor:\n  ttft_slo_s: 7\n  hold_s: 9\n  tbt_slo_s: 1\n")
        assert (await reloader.reload("test")).changed == ["tbt_slo_s"]
        assert (reloader.options.ttft_slo_s, reloader.options.hold_s) == (3, 2)


async def test_what_goes_together_is_judged_with_what_flags_and_environment_said(site, monkeypatch):
    monkeypatch.setattr(reload.logs, "set_level", lambda level: None)  # of all tests that come after
    monkeypatch.setenv("MOONCAKE_MAX_NUM_BATCHED_TOKENS", "2048")
    site.write("prefill:\n  metadata: tcp://127.0.0.1:7700\n  block_size: 1024\n")
    async with site.running(load(PrefillOptions, {"config": str(site.path)})) as reloader:
        assert reloader.last.result == "unchanged", "it could start: it can go on"
        site.write("prefill:\n  log_level: debug\n  block_size: 1024\n  metadata: tcp://127.0.0.1:7700\n")
        assert (await reloader.reload("test")).changed == ["log_level"]
    monkeypatch.delenv("MOONCAKE_MAX_NUM_BATCHED_TOKENS")
    site.registry = CollectorRegistry()
    flags = {"config": str(site.path), "block_size": "64", "max_num_batched_tokens": "64"}
    async with site.running(load(PrefillOptions, flags)) as reloader:
        site.write("prefill:\n  log_level: info\n  max_num_batched_tokens: 32\n  metadata: tcp://x:7700\n")
        assert (await reloader.reload("test")).result == "changed", "the flag comes first"
    site.registry = CollectorRegistry()
    async with site.running(load(PrefillOptions, {"config": str(site.path), "block_size": "32"})) as reloader:
        site.write("prefill:\n  log_level: debug\n  max_num_batched_tokens: 16\n  metadata: tcp://x:7700\n")
        outcome = await reloader.reload("test")
        assert outcome.result == "refused", "the next start would fail"
        assert reloader.options.log_level == "info"
        assert "must be at least block_size, 32" in outcome.errors[0]


async def test_children_do_not_judge_what_flags_of_their_parent_made_right(site):
    site.write("up:\n  prefill: 0\n  ttft_slo_s: 5\n")
    up = load(UpOptions, {"config": str(site.path), "aggregated": "2", "decode": "0"}).checked()
    child = GatewayOptions(**{**up.shared(GatewayOptions), "aggregated": True, "source": "up"})
    async with site.running(child) as reloader:
        site.write("up:\n  prefill: 0\n  ttft_slo_s: 6\n")
        assert (await reloader.reload("test")).changed == ["ttft_slo_s"]


async def test_a_file_that_has_changed_is_found(site):
    async with site.running() as reloader:
        site.write("common:\n  tbt_slo_s: 0.5\n")
        await until(lambda: reloader.options.tbt_slo_s == 0.5)
        assert reloader.options.ttft_slo_s == 0


async def test_a_file_that_the_settings_name_is_followed_too(site, tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("a")
    site.write(f"conductor:\n  tenants: {tenants}\n")
    async with site.running() as reloader:
        before = reloader.hash
        tenants.write_text("b")
        await until(lambda: site.applied)
        assert reloader.last.changed == ["tenants"]
        assert reloader.generation == 1
        assert reloader.hash != before
        assert (await reloader.reload("test")).result == "unchanged"
        tenants.write_text("a")
        with capture_logs() as logs:
            assert (await reloader.reload("test")).result == "changed"
        assert [line["keys"] for line in logs if line["event"] == "config.changed"] == [["tenants"]]
        assert reloader.hash == before, "processes that agree show the same"


async def test_a_text_that_is_refused_does_not_show_as_what_holds(site, tmp_path):
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("a")
    site.write(f"conductor:\n  tenants: {tenants}\n")
    async with site.running() as reloader:
        before, site.refuses = reloader.hash, "tenants: wrong"
        tenants.write_text("b")
        await until(lambda: reloader.last.result == "refused")
        assert (reloader.hash, reloader.generation) == (before, 0)


async def test_hang_up_means_reload(site):
    async with site.running() as reloader:
        reloader._seen = "never looked"
        site.write("conductor:\n  ttft_slo_s: 4\n")
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: reloader.options.ttft_slo_s == 4)


async def test_a_process_that_starts_again_begins_with_what_the_file_says_now(site):
    old = site.options()
    site.write("conductor:\n  ttft_slo_s: 1\n")
    async with reloading(old, site.registry, None, site.prepare) as reloader:
        assert reloader.options.ttft_slo_s == 1
        assert site.applied[-1].ttft_slo_s == 1


async def test_children_follow_the_section_of_who_started_them(site):
    site.write("up:\n  ttft_slo_s: 5\nconductor:\n  ttft_slo_s: 99\n")
    up = load(UpOptions, {"config": str(site.path)})
    child = GatewayOptions(
        **{**up.shared(GatewayOptions), "aggregated": False, "source": "up", "hot_copies": 0}
    )
    async with site.running(child) as reloader:
        site.write("up:\n  ttft_slo_s: 6\n  prefill: 3\nconductor:\n  ttft_slo_s: 98\n  hot_copies: 4\n")
        outcome = await reloader.reload("test")
        assert (outcome.changed, outcome.needs_restart) == (["ttft_slo_s"], ["prefill"])
        assert (reloader.options.ttft_slo_s, reloader.options.hot_copies) == (6, 0)


async def test_without_a_file_there_is_nothing_to_change(site):
    async with site.running(load(ConductorOptions, {"ttft_slo_s": "3"})) as reloader:
        assert (await reloader.reload("test")).result == "unchanged"
        assert reloader.options.ttft_slo_s == 3


async def test_operators_reload_and_look_over_http_and_see_no_secret(site, monkeypatch):
    monkeypatch.setenv("MOONCAKE_API_KEY", "s3cret" * 3)
    admin = AdminServer(site.registry, 0)
    admin.start()
    try:
        async with site.running(admin=admin):
            status, told = await asyncio.to_thread(ask_json, "GET", f"{admin.url}/config")
            assert status == 200
            assert told["settings"]["ttft_slo_s"] == {
                "value": "5", "origin": f"{site.path}:2", "reloads": True,
            }  # fmt: skip
            assert told["settings"]["api_key"]["value"] == "(set)"
            assert "s3cret" not in str(told)
            site.write("conductor:\n  ttft_slo_s: 2\n")
            status, told = await asyncio.to_thread(ask_json, "POST", f"{admin.url}/config/reload")
            assert (status, told["changed"]) == (200, ["ttft_slo_s"])
            site.write("conductor:\n  ttft_slo_s: x\n")
            status, told = await asyncio.to_thread(ask_json, "POST", f"{admin.url}/config/reload")
            assert (status, told["result"]) == (422, "refused")
    finally:
        admin.close()

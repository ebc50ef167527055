"""Two gateways share a port and a core; cores and gateways die, stand still and have to go, under load."""

import json
import os
import signal
import time
from typing import Any

import httpx
import pytest

from mooncake.core.process import alive
from tests.integration.client import GREEDY, Client
from tests.integration.etcd_servers import NEEDS_ETCD
from tests.integration.fronts import Fronts, Load
from tests.integration.reference import random_prompt

pytestmark = [pytest.mark.integration, NEEDS_ETCD]

TOKENS = 150
"""Of a stream: it lasts some seconds beside others."""
LONG = 1000
"""Of one that outlasts a few reloads and some short requests: 4 s at the least."""
REBUILT_S = 10.0
AWAY = {"kind": "core_away"}


def test_both_gateways_serve_on_one_port_and_one_core_decides_for_both(fronts: Fronts):
    pids = set(fronts.gateways().values())
    assert len(pids) == 2
    assert set(fronts.views()) == pids

    def answers() -> float:
        return fronts.gateways_metric("mooncake_http_responses_total", code="200")

    before = answers()
    with Load(fronts) as load:
        load.wait_answered(16)
    assert not load.failures
    urls = [one["metrics_url"] for one in fronts.view()["gateways"]]
    served = [fronts.metric(url, "mooncake_requests_total", outcome="finished") for url in urls]
    assert all(served), "the kernel deals connections out"
    assert len(set(urls)) == 2, "a page each: their HTTP port is one"
    fronts.wait("their counters add up", lambda: answers() == before + load.answered, 10.0)
    page = fronts.leader()["metrics_url"]
    assert fronts.metric(page, "mooncake_decisions_total") >= sum(served)
    asked = fronts.client.http.get("/mooncake/decisions").json()["decisions"]
    assert len(asked) >= 16, "any gateway tells what the core decided for all"


def reloads(fronts: Fronts, page: str, result: str) -> float:
    return fronts.metric(page, "mooncake_config_reloads_total", result=result)


def reload_by_post(page: str) -> tuple[int, dict[str, Any]]:
    answer = httpx.post(page.replace("/metrics", "/config/reload"), timeout=30.0)
    return answer.status_code, answer.json()


def reload_all(fronts: Fronts, values: dict[str, Any], result: str) -> list[tuple[int, dict[str, Any]]]:
    """Let the file say `values`; one gateway gets SIGHUP, the rest POST; return what those answered."""
    hung_up, *others = [*fronts.view()["gateways"], *fronts.view()["cores"]]
    before = {one["metrics_url"]: reloads(fronts, one["metrics_url"], result) for one in (hung_up, *others)}
    fronts.write_settings(json.dumps(values))
    os.kill(hung_up["pid"], signal.SIGHUP)
    answers = [reload_by_post(one["metrics_url"]) for one in others]

    def counted() -> bool:
        return all(reloads(fronts, page, result) == count + 1 for page, count in before.items())

    fronts.wait(f"every process counts a reload that is {result}", counted, 10.0)
    return answers


def ask(client: Client, tenant: str = "") -> tuple[int, str]:
    """Return the status and the text of one short request."""
    body = client.body(random_prompt(40, 77), {"max_tokens": 2, **GREEDY})
    answer = client.http.post(
        "/v1/completions", json=body, headers={"x-mooncake-tenant": tenant} if tenant else {}
    )
    return answer.status_code, answer.text


def test_what_changes_in_the_file_holds_for_the_next_requests_at_both_gateways_and_streams_go_on(
    fronts: Fronts,
):
    first, second = (fronts.bound_client(pid) for pid in fronts.gateways().values())
    pages = [one["metrics_url"] for one in fronts.view()["gateways"]]
    beside = [fronts.bound_client(pid) for pid in fronts.gateways().values()]
    streams = [
        client.stream(random_prompt(60, 80 + i), max_tokens=LONG, **GREEDY) for i, client in enumerate(beside)
    ]
    for stream in streams:
        stream.wait_tokens(5)
    tenants = fronts.run_dir / "tenants.toml"
    tenants.write_text("[tenants.small]\nrequests_per_s = 0.001\nrequests_burst = 1\n")
    kind = {"kind": "least_load"}

    def planned() -> float:
        return fronts.metric(fronts.leader()["metrics_url"], "mooncake_decisions_total", **kind)

    before = planned()
    said = {"policy": "least_load", "ttft_slo_s": 30, "tenants": str(tenants)}
    for status, told in reload_all(fronts, said, "changed"):
        assert (status, set(told["changed"])) == (200, set(said))
    assert [ask(client, "small")[0] for client in (first, second, first)] == [200, 429, 429]
    assert "quota" in ask(second, "small")[1]
    assert [ask(client)[0] for client in (first, second)] == [200, 200], "others have no quota"
    assert planned() == before + 3
    for page in pages:
        shown = fronts.metric(page, "mooncake_slo_objective_seconds", objective="ttft", slo_class="default")
        assert shown == 30

    reload_all(fronts, {**said, "ttft_slo_s": 1e-4}, "changed")
    for client in (first, second):
        status, text = ask(client)
        assert status == 429
        assert "time to first token" in text
    assert all(stream.answer.finish is None for stream in streams), "they ran all the time"
    for stream in streams:
        assert len(stream.result().tokens) == LONG

    reload_all(fronts, {}, "changed")
    assert [ask(client, "small")[0] for client in (first, second, first)] == [200, 200, 200]
    for client in (first, second, *beside):
        client.close()


def test_a_wrong_file_changes_nothing_at_any_process_and_is_told_by_key_and_value(fronts: Fronts):
    pages = [one["metrics_url"] for one in (*fronts.view()["gateways"], *fronts.view()["cores"])]
    held = [fronts.metric(page, "mooncake_config_hash") for page in pages]
    assert len(set(held)) == 2, "gateways agree, and cores do"
    for status, told in reload_all(fronts, {"policy": "random", "ttft_slo_s": -1}, "refused"):
        assert (status, told["result"], told["changed"]) == (422, "refused", [])
        assert any("ttft_slo_s = '-1'" in line for line in told["errors"]), told
    assert [fronts.metric(page, "mooncake_config_hash") for page in pages] == held
    assert [fronts.metric(page, "mooncake_config_last_reload_success") for page in pages] == [0] * len(pages)
    assert ask(fronts.client)[0] == 200
    decided = fronts.client.http.get("/mooncake/decisions").json()["decisions"][0]
    assert decided["kind"] == "kvcache_centric", "it is not decided at random"
    reload_all(fronts, {}, "unchanged")
    assert [fronts.metric(page, "mooncake_config_last_reload_success") for page in pages] == [1] * len(pages)


def test_the_death_of_the_core_fails_no_request_and_its_standby_knows_the_blocks(fronts: Fronts):
    for seed in range(4):
        fronts.client.complete(random_prompt(200, seed), max_tokens=4, **GREEDY)  # blocks to know
    old = fronts.leader()
    known = fronts.metric(old["metrics_url"], "mooncake_index_blocks")
    assert known > 20
    away = fronts.gateways_metric("mooncake_fallbacks_total", **AWAY)
    streams = [
        fronts.client.stream(random_prompt(60, 100 + i), max_tokens=TOKENS, **GREEDY) for i in range(3)
    ]
    with Load(fronts) as load:
        for stream in streams:
            stream.wait_tokens(5)
        load.wait_answered(5)
        os.kill(old["pid"], signal.SIGKILL)
        struck_s = time.monotonic()
        new = fronts.wait_led(after_term=old["term"])
        taken_s = time.monotonic() - struck_s
        fronts.wait(
            f"{known:.0f} blocks are known again",
            lambda: fronts.metric(new["metrics_url"], "mooncake_index_blocks") >= 0.99 * known,
            REBUILT_S,
        )
        rebuilt_s = time.monotonic() - struck_s
        load.wait_answered(10)
    assert load.failures == []
    for stream in streams:
        assert len(stream.result().tokens) == TOKENS
    assert new["pid"] != old["pid"]
    away = fronts.gateways_metric("mooncake_fallbacks_total", **AWAY) - away
    print(f"another core led after {taken_s:.2f} s, knew all after {rebuilt_s:.2f} s, {away:.0f} fell back")
    assert away > 0, "what was decided without a core is counted"


def test_a_core_that_stood_still_decides_nothing_when_it_goes_on(fronts: Fronts):
    fronts.wait("both cores are there", lambda: len(fronts.view()["cores"]) == 2, 60.0)
    old = fronts.leader()
    with Load(fronts) as load:
        load.wait_answered(3)
        os.kill(old["pid"], signal.SIGSTOP)
        try:
            new = fronts.wait_led(after_term=old["term"])
        finally:
            os.kill(old["pid"], signal.SIGCONT)
        decided = fronts.metric(old["metrics_url"], "mooncake_decisions_total")
        fronts.wait(
            "the old core stands by again",
            lambda: old["name"] in [one["name"] for one in fronts.view()["cores"]],
            30.0,
        )
        load.wait_answered(20)
        assert fronts.metric(old["metrics_url"], "mooncake_decisions_total") == decided
    assert load.failures == []
    assert new["pid"] != old["pid"]
    assert fronts.leader()["term"] == new["term"]


def test_sigterm_of_a_gateway_under_load_drops_nothing(fronts: Fronts):
    victim = next(iter(fronts.gateways().values()))
    bound = fronts.bound_client(victim)
    stream = bound.stream(random_prompt(60, 7), max_tokens=TOKENS, **GREEDY)
    with Load(fronts, 4) as load:
        stream.wait_tokens(5)
        load.wait_answered(5)
        os.kill(victim, signal.SIGTERM)
        load.wait_answered(30)
    assert load.failures == []
    assert len(stream.result().tokens) == TOKENS, "it finished what it had"
    bound.http.close()
    fronts.wait("it ended", lambda: not alive(victim), 30.0)
    fronts.wait_two_gateways(without=victim)


def test_the_death_of_a_gateway_breaks_its_own_connections_and_nothing_else(fronts: Fronts):
    victim, other = fronts.gateways().values()
    bound, beside = fronts.bound_client(victim), fronts.bound_client(other)
    broken = bound.stream(random_prompt(60, 8), max_tokens=TOKENS, **GREEDY)
    kept = beside.stream(random_prompt(60, 9), max_tokens=TOKENS, **GREEDY)
    broken.wait_tokens(5)
    kept.wait_tokens(5)
    os.kill(victim, signal.SIGKILL)
    fronts.wait("it is gone", lambda: not alive(victim), 10.0)
    with Load(fronts) as load:
        load.wait_answered(20)
    assert load.failures == [], "the kernel sends new connections to the one that lives"
    assert len(kept.result().tokens) == TOKENS
    fronts.wait("its clients see it", lambda: broken.answer.error, 30.0)
    for client in (bound, beside):
        client.http.close()
    fronts.wait_two_gateways(without=victim)

    def idle() -> bool:
        loads = [row["load"] for row in fronts.view()["instances"]]
        return not any(any(load.values()) for load in loads)

    fronts.wait("the core forgets what a dead gateway had", idle, 30.0)

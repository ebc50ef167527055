"""What `mooncake top` shows: honest numbers, "-" where nothing is known, one look at a time."""

import http.server
import io
import json
import threading
import time
from collections.abc import Iterator

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from mooncake import cli, top
from mooncake.core.errors import PeerGone, ProtocolError
from mooncake.top_stats import Look, Members, Page, front_rows, instance_rows, quantile, store_rows, totals

GATEWAY = """\
# HELP mooncake_tokens_total Tokens.
# TYPE mooncake_tokens counter
mooncake_tokens_total {tokens}
# TYPE mooncake_requests counter
mooncake_requests_total{{outcome="finished"}} {requests}
mooncake_requests_total{{outcome="aborted"}} 1
# TYPE mooncake_ttft_seconds histogram
mooncake_ttft_seconds_bucket{{le="0.1"}} {fast}
mooncake_ttft_seconds_bucket{{le="0.5"}} {requests}
mooncake_ttft_seconds_bucket{{le="+Inf"}} {requests}
# TYPE mooncake_prefix_lookup_blocks counter
mooncake_prefix_lookup_blocks_total 8
mooncake_prefix_hit_blocks_total 6
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} 2
vllm:num_requests_running{{engine="1",model_name="m"}} 3
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{{engine="1",model_name="m"}} 0.25
# TYPE vllm:something_else gauge
vllm:something_else 1
"""
WORKER = """\
# TYPE mooncake_kv_hit_tokens counter
mooncake_kv_hit_tokens_total{instance="decode-0",role="decode"} 30
mooncake_kv_lookup_tokens_total{instance="decode-0",role="decode"} 40
mooncake_kv_checksum_failures_total{instance="decode-0",role="decode"} 1
"""
STORE = """\
mooncake_store_used_bytes{node="local"} 1048576
mooncake_store_blocks{node="local"} 7
mooncake_store_hits_total{node="local"} 9
mooncake_store_misses_total{node="local"} 1
mooncake_store_evictions_total{node="local"} 4
mooncake_store_checksum_failures_total{node="local"} 0
"""


def gateway(tokens=0, requests=0, fast=0) -> str:
    return GATEWAY.format(tokens=tokens, requests=requests, fast=fast)


def members(base: str = "") -> dict:
    instance = {"role": "decode", "state": "alive", "load": {}, "node": "local"}
    return {
        "in_flight": 5,
        "instances": [
            {"instance_id": "decode-0", "engine": 1, "metrics_url": f"{base}/decode-0", **instance},
            {"instance_id": "evil\x1b[2J", "engine": 7, "metrics_url": "http://10.0.0.1/x", **instance},
        ],
        "stores": [{"node": "local", "capacity_bytes": 4 << 20, "pid": 1, "metrics_url": f"{base}/store"}],
    }


def look(at_s: float, text: str) -> Look:
    known = Members(instances=[], in_flight=5)
    return Look(at_s, known, {"": Page(text)}, {}, {})


FRONTS = {
    "gateways": [{"name": "gateway-0", "pid": 7, "url": "http://h:1"}, {"name": "gateway-1", "pid": 8}],
    "cores": [{"name": "core", "pid": 5}, {"name": "core-b", "pid": 6}],
    "core": {"mode": "core", "leader": "core-b-1f2e", "term": 3, "address": "tcp://h:2"},
}


def two_gateways(at_s: float, first: str, second: str, **changes) -> Look:
    known = msgspec.convert({"instances": [], "in_flight": 1, **FRONTS, **changes}, Members)
    return Look(at_s, known, {"gateway-0": Page(first), "gateway-1": Page(second)}, {}, {})


# ---------------------------------------------------------------- numbers


def test_rates_and_latencies_are_those_between_two_looks():
    found = totals(look(10.0, gateway(100, 10, fast=10)), look(12.0, gateway(150, 14, fast=10)))
    assert (found.tokens_per_s, found.requests_per_s, found.in_flight) == (25.0, 2.0, 5)
    assert found.ttft_p50_s == pytest.approx(0.3)  # all four of these two seconds were in 0.1..0.5
    assert found.prefix_hits == 0.75


def test_without_new_requests_latencies_are_those_since_the_start():
    quiet = look(10.0, gateway(100, 10, fast=10))
    assert totals(quiet, look(11.0, gateway(100, 10, fast=10))).ttft_p50_s == pytest.approx(0.05)


def test_what_is_not_known_is_not_invented():
    found = totals(look(10.0, ""), look(11.0, ""))
    assert (found.tokens_per_s, found.ttft_p50_s, found.tbt_p50_s, found.prefix_hits) == (None,) * 4


def test_a_restarted_gateway_counts_from_zero_and_rates_never_get_negative():
    assert totals(look(10.0, gateway(100)), look(11.0, gateway(5))).tokens_per_s == 0.0


def test_gateways_are_summed_wherever_the_question_was_answered():
    flying = "mooncake_requests_in_flight 4\n"
    before = two_gateways(10.0, gateway(100, 10, fast=10), gateway(1000, 20, fast=20))
    now = two_gateways(12.0, gateway(150, 14, fast=10) + flying, gateway(1010, 24, fast=24) + flying)
    found = totals(before, now)
    assert (found.tokens_per_s, found.requests_per_s, found.in_flight) == (30.0, 4.0, 8)
    assert found.ttft_p50_s == pytest.approx(0.1)  # four of these two seconds' eight were below it
    assert found.prefix_hits == 0.75


def test_a_gateway_that_comes_or_does_not_answer_makes_no_rates_of_its_whole_life():
    before = two_gateways(10.0, gateway(100, 10), "")
    before = msgspec.structs.replace(before, fronts={"gateway-0": before.fronts["gateway-0"]})
    assert totals(before, two_gateways(12.0, gateway(120, 10), gateway(5000, 90))).tokens_per_s == 10.0
    assert totals(before, two_gateways(12.0, gateway(120, 10), "")).tokens_per_s == 10.0


def test_who_decides_and_which_gateway_has_to_do_without_is_told():
    away = 'mooncake_fallback_active{kind="core_away"} 1\n'
    before, now = two_gateways(10.0, gateway(), gateway()), two_gateways(11.0, gateway(0, 3), away)
    assert [(row.name, row.does, row.requests_per_s, row.alone) for row in front_rows(before, now)] == [
        ("core", "stands by", None, None),
        ("core-b", "decides", None, None),
        ("gateway-0", "serves", 3.0, None),
        ("gateway-1", "serves", None, 1.0),
    ]


def test_engines_of_several_gateways_show_what_was_given_to_them():
    engine = {"instance_id": "p", "role": "prefill", "state": "alive", "engine": 0}
    load = {"prefill_requests": 2, "decode_requests": 3, "prefill_tokens": 9}
    (row,) = instance_rows(
        two_gateways(1.0, gateway(), gateway(), instances=[{**engine, "load": load}])
    )  # a statistic of an engine reaches one gateway, which one is chance
    assert (row.running, row.waiting, row.kv_use) == (5.0, None, None)


@pytest.mark.parametrize(
    ("share", "buckets", "expected"),
    [
        (0.5, {0.1: 0, 0.2: 10, float("inf"): 10}, 0.15),
        (0.95, {0.1: 5, 0.2: 5, float("inf"): 10}, 0.2),  # beyond the last limit: at least that
        (0.5, {}, None),
        (0.5, {0.1: 0, float("inf"): 0}, None),
    ],
)
def test_quantiles_are_estimated_as_prometheus_does(share, buckets, expected):
    assert quantile(share, buckets) == (None if expected is None else pytest.approx(expected))


# ---------------------------------------------------------------- a cluster over http


class Handler(http.server.BaseHTTPRequestHandler):
    pages: dict[str, str] = {}  # noqa: RUF012 - set by each test
    key = ""
    moved_to = ""

    def do_GET(self) -> None:
        wants_key = self.key and self.path == "/mooncake/instances"
        status = 200 if self.path in self.pages else 404
        if wants_key and self.headers.get("Authorization") != f"Bearer {self.key}":
            status = 401
        if self.moved_to:
            status = 302
        self.send_response(status)
        self.send_header("Location", self.moved_to)
        self.end_headers()
        self.wfile.write(self.pages.get(self.path, "").encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def served(monkeypatch) -> Iterator[tuple[str, type[Handler]]]:
    monkeypatch.delenv("MOONCAKE_API_KEY", raising=False)
    monkeypatch.setattr(time, "sleep", lambda _: None)

    class Mine(Handler):
        pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Mine)
    url = f"http://127.0.0.1:{server.server_port}"
    Mine.pages = {
        "/mooncake/instances": json.dumps(members(url)),
        "/metrics": gateway(100, 10, fast=10),
        "/decode-0": WORKER,
        "/store": STORE,
    }
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield url, Mine
    server.shutdown()
    server.server_close()


def shown(url: str, **options) -> str:
    console = Console(file=io.StringIO(), width=120)
    assert top.top(url, console, once=True, refresh_s=0.01, **options) == 0
    return console.file.getvalue()


def test_every_row_comes_from_its_own_process(served):
    now = top.Cluster(served[0]).look()
    first, second = instance_rows(now)
    assert (first.name, first.running, first.kv_use, first.pool_hits, first.bad_blocks) == (
        "decode-0", 3.0, 0.25, 0.75, 1.0,
    )  # fmt: skip
    assert (second.running, second.pool_hits) == (None, None)  # its address is not on this machine
    (store,) = store_rows(now)
    assert (store.used_bytes, store.capacity_bytes, store.hits, store.evictions) == (1 << 20, 4 << 20, 0.9, 4)


def test_several_gateways_are_each_asked_at_their_own_address(served):
    url, handler = served
    gateways = [{"name": f"gateway-{i}", "pid": i, "metrics_url": f"{url}/own-{i}"} for i in range(2)]
    handler.pages["/mooncake/instances"] = json.dumps({**members(url), **FRONTS, "gateways": gateways})
    handler.pages["/own-0"] = gateway(5, 1) + "mooncake_requests_in_flight 11\n"
    handler.pages["/own-1"] = gateway(5, 1) + "mooncake_requests_in_flight 31\n"
    del handler.pages["/metrics"]  # any of them would answer there
    text = shown(url)
    for word in ("in flight 42", "gateway-0", "gateway-1", "core-b", "decides", "stands by"):
        assert word in text


def test_that_no_core_decides_is_told(served):
    url, handler = served
    core = {"mode": "fallback", "reason": "no leader"}
    handler.pages["/mooncake/instances"] = json.dumps({**members(url), **FRONTS, "core": core})
    assert "no core decides: no leader" in shown(url)


def test_once_prints_one_table_and_exits(served):
    result = CliRunner().invoke(cli.app, ["top", "--once", "--url", served[0]])
    assert result.exit_code == 0
    assert result.output.count("instance") == 1
    for word in ("in flight 5", "decode-0", "25%", "75%", "1 MiB", "4 MiB", "90%"):
        assert word in result.output


def test_names_of_others_cannot_steer_the_terminal(served):
    text = shown(served[0])
    assert "\x1b[2J" not in text
    assert "evil?[2J" in text


def test_a_part_that_does_not_answer_is_a_dash(served):
    del served[1].pages["/store"]
    assert "-" in shown(served[0]).splitlines()[-2]


def test_the_key_comes_from_the_environment(served, monkeypatch):
    served[1].key = "secret"
    result = CliRunner().invoke(cli.app, ["top", "--once", "--url", served[0]])
    assert result.exit_code == 1
    assert "MOONCAKE_API_KEY" in result.output
    monkeypatch.setenv("MOONCAKE_API_KEY", "secret")
    assert "decode-0" in shown(served[0])


@pytest.mark.parametrize("page", ["not json", "[]", '{"instances": 3}'])
def test_what_is_no_gateway_is_told_so(served, page):
    served[1].pages["/mooncake/instances"] = page
    with pytest.raises(ProtocolError, match="no Mooncake gateway"):
        top.Cluster(served[0]).look()


def test_a_redirect_is_not_followed_for_it_would_carry_the_key_elsewhere(served):
    served[1].moved_to = f"{served[0]}/elsewhere"
    with pytest.raises(ProtocolError, match="HTTP 302"):
        top.Cluster(served[0], "secret").look()


def test_nobody_there_is_one_line_and_an_exit_code():
    result = CliRunner().invoke(cli.app, ["top", "--once", "--url", "http://127.0.0.1:9"])
    assert result.exit_code == 69
    assert "is the cluster up?" in result.output
    assert "Traceback" not in result.output


def test_ctrl_c_is_a_clean_end_and_an_outage_is_shown_meanwhile(served, monkeypatch):
    looks = iter([top.Cluster.look, top.Cluster.look, None, top.Cluster.look])
    real = top.Cluster.look

    def look(self):
        if next(looks) is None:
            raise PeerGone("gateway went away")
        return real(self)

    naps = iter([None, None, None])

    def nap(_: float) -> None:
        if next(naps, "end") == "end":
            raise KeyboardInterrupt

    monkeypatch.setattr(top.Cluster, "look", look)
    monkeypatch.setattr(time, "sleep", nap)
    console = Console(file=io.StringIO(), width=120, force_terminal=True)
    assert top.top(served[0], console) == 0
    assert "gateway went away" in console.file.getvalue()

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
from mooncake.top_draw import draw
from mooncake.top_pages import Look, Members, Page, quantile
from mooncake.top_stats import Mark, front_rows, instance_rows, marks, store_rows, totals

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
# TYPE vllm:something_else gauge
vllm:something_else 1
"""
WORKER = """\
# TYPE mooncake_engine_requests_running gauge
mooncake_engine_requests_running{instance_id="decode-0",role="decode"} 3
mooncake_engine_requests_waiting{instance_id="decode-0",role="decode"} 1
mooncake_engine_kv_use_ratio{instance_id="decode-0",role="decode"} 0.25
mooncake_engine_prefix_hit_tokens_total{instance_id="decode-0",role="decode"} 5
mooncake_engine_prefix_lookup_tokens_total{instance_id="decode-0",role="decode"} 50
# TYPE mooncake_kv_hit_tokens counter
mooncake_kv_hit_tokens_total{instance_id="decode-0",role="decode"} 30
mooncake_kv_lookup_tokens_total{instance_id="decode-0",role="decode"} 40
mooncake_kv_checksum_failures_total{instance_id="decode-0",role="decode"} 1
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


def test_an_engine_that_cannot_be_asked_shows_what_was_given_to_it():
    engine = {"instance_id": "p", "role": "prefill", "state": "alive", "engine": 0}
    load = {"prefill_requests": 2, "decode_requests": 3, "prefill_tokens": 9}
    now = two_gateways(1.0, gateway(), gateway(), instances=[{**engine, "load": load}])
    (row,) = instance_rows(now, now)
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


def test_queues_are_told_by_class_and_rejections_by_reason():
    before = look(10.0, 'mooncake_rejections_total{reason="queue full",slo_class="batch"} 5\n')
    now = look(12.0, """\
mooncake_rejections_total{reason="queue full",slo_class="batch"} 9
mooncake_rejections_total{reason="quota",slo_class="batch"} 0
mooncake_requests_waiting{slo_class="batch"} 4
mooncake_requests_waiting{slo_class="interactive"} 6
mooncake_requests_waiting{slo_class="premium"} 0
""")  # fmt: skip
    found = totals(before, now)
    assert found.rejected_per_s == {"queue full": 2.0}
    assert (found.waiting, found.waiting_by_class) == (10.0, {"interactive": 6.0, "batch": 4.0})
    shown = Console(file=io.StringIO(), width=80)
    shown.print(draw(before, now, 80))
    text = shown.file.getvalue()
    assert "waiting 10 (interactive 6, batch 4)" in text
    assert "rejected/s 2.0 (queue full 2.0)" in text


def moving(at_s: float, loaded: int, over_tcp: int) -> Look:
    known = msgspec.convert(
        {
            "instances": [{"instance_id": "p", "role": "prefill", "state": "alive"}],
            "stores": [{"node": "n", "capacity_bytes": 4 << 30}],
        },
        Members,
    )
    engine = f'mooncake_kv_copy_bytes_total{{direction="load"}} {loaded}\n'
    store = f"""\
mooncake_transfer_bytes_total{{transport="tcp",link="n2",op="read"}} {over_tcp}
mooncake_transfer_bytes_total{{transport="rdma",link="n3",op="read"}} {over_tcp * 100}
mooncake_store_ssd_capacity_bytes 8589934592
mooncake_store_ssd_live_bytes 1073741824
mooncake_store_ssd_hits_total 1
mooncake_store_ssd_misses_total 3
"""
    return Look(at_s, known, {"": Page()}, {"p": Page(engine)}, {"n": Page(store)})


def test_bytes_are_told_by_path_and_the_ssd_beside_memory():
    before, now = moving(10.0, 0, 0), moving(12.0, 4_000_000, 2_000_000)
    found = totals(before, now)
    assert (found.loaded_per_s, found.moved_per_s) == (2e6, {"rdma": 1e8, "tcp": 1e6})
    (store,) = store_rows(before, now)
    assert (store.ssd_used_bytes, store.ssd_hits) == (1 << 30, 0.25)
    shown = Console(file=io.StringIO(), width=120)
    shown.print(draw(before, now, 120))
    text = shown.file.getvalue()
    for word in ("2 MB/s", "101 MB/s (rdma 100 MB/s, tcp 1 MB/s)", "1 GiB", "8 GiB", "25%"):
        assert word in text


def test_what_an_operator_should_know_is_marked_the_grave_first():
    state = """\
mooncake_fallback_active{kind="index_stale"} 1
mooncake_fallback_active{kind="core_away"} 0
mooncake_index_mode{mode="degraded"} 1
mooncake_index_mode{mode="exact"} 0
"""
    engine = {"role": "prefill", "state": "alive"}
    instances = [
        {"instance_id": "a", **engine, "role": "draining"},
        {"instance_id": "b", **engine, "state": "suspect"},
        {"instance_id": "c", **engine, "state": "dead"},
        {"instance_id": "d", **engine},
    ]
    core = {"mode": "fallback", "reason": "no leader"}
    found = marks(two_gateways(1.0, state, "", instances=instances, core=core))
    assert found == [
        Mark("no core decides: no leader", grave=True),
        Mark("c is dead", grave=True),
        Mark("a drains"),
        Mark("b is suspect"),
        Mark("fallback: index stale"),
        Mark("prefix index degraded"),
    ]
    assert marks(look(1.0, 'mooncake_index_mode{mode="exact"} 1\n')) == []


@pytest.mark.parametrize("width", [60, 72, 80, 100, 140, 200])
def test_on_a_narrow_terminal_columns_are_left_out_and_none_is_broken(width):
    before, now = moving(10.0, 0, 0), moving(12.0, 4_000_000, 2_000_000)
    console = Console(file=io.StringIO(), width=width)
    console.print(draw(before, now, width))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert "…" not in console.file.getvalue()
    (head,) = (line.split() for line in lines if line.strip().startswith("instance"))
    assert head[:5] == ["instance", "role", "state", "running", "waiting"]
    assert ("saves" in head) == (width >= 100)


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
    for name in ("MOONCAKE_API_KEY", "MOONCAKE_API_KEY_FILE", "MOONCAKE_ADMIN_TOKEN"):
        monkeypatch.delenv(name, raising=False)
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
    first, second = instance_rows(now, now)
    assert (first.name, first.running, first.kv_use, first.pool_hits, first.bad_blocks) == (
        "decode-0", 3.0, 0.25, 0.75, 1.0,
    )  # fmt: skip
    assert (first.waiting, first.engine_hits) == (1.0, 0.1)
    assert (second.waiting, second.pool_hits) == (None, None)  # its address is not on this machine
    (store,) = store_rows(now, now)
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
    assert result.output.count("pool node") == 1
    for word in ("in flight 5", "decode-0", "25%", "75%", "1 MiB", "4 MiB", "90%"):
        assert word in result.output


def test_json_has_all_numbers_for_programs(served):
    result = CliRunner().invoke(cli.app, ["top", "--json", "--url", served[0]])
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert list(found) == ["totals", "marks", "core", "fronts", "instances", "stores"]
    assert found["totals"]["in_flight"] == 5
    assert found["instances"][0]["kv_use"] == 0.25
    assert found["stores"][0]["ssd_used_bytes"] is None


def test_parts_of_other_machines_are_asked_only_with_the_token_of_their_admin_servers(served, monkeypatch):
    asked = []
    monkeypatch.setattr(top.Cluster, "_get", lambda self, url, key="": asked.append((url, key)) or b"")
    top.Cluster("http://gateway:8000", "key")._part("http://10.0.0.1:9/metrics")
    top.Cluster("http://gateway:8000", "key", "token")._part("http://127.0.0.1:9/metrics")
    top.Cluster("http://gateway:8000", "key", "token")._part("file:///etc/passwd")
    assert asked == []
    top.Cluster("http://gateway:8000", "key", "token")._part("http://10.0.0.1:9/metrics")
    assert asked == [("http://10.0.0.1:9/metrics", "token")]


def test_names_of_others_cannot_steer_the_terminal(served):
    text = shown(served[0])
    assert "\x1b[2J" not in text
    assert "evil?[2J" in text


def test_a_part_that_does_not_answer_is_a_dash(served):
    del served[1].pages["/store"]
    assert "-" in shown(served[0]).splitlines()[-1].split()


def test_the_key_comes_from_the_environment(served, monkeypatch):
    served[1].key = "secret"
    result = CliRunner().invoke(cli.app, ["top", "--once", "--url", served[0]])
    assert result.exit_code == 1
    assert "MOONCAKE_API_KEY" in result.output
    monkeypatch.setenv("MOONCAKE_API_KEY", "secret")
    assert "decode-0" in shown(served[0])


def test_the_key_comes_from_a_file_where_secrets_are_files(served, monkeypatch, tmp_path):
    served[1].key = "secret"
    monkeypatch.setenv("MOONCAKE_API_KEY_FILE", str(tmp_path / "key"))
    result = CliRunner().invoke(cli.app, ["top", "--once", "--url", served[0]])
    assert result.exit_code != 0
    assert "MOONCAKE_API_KEY_FILE" in result.output
    (tmp_path / "key").write_text("secret\n")
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

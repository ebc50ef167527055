"""GET /dashboard and what is under it, over a real admin server and a ring that real pages fill."""

import concurrent.futures
import http.client
import json
import math
import threading
import urllib.parse

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from mooncake.core.admin import AdminServer
from mooncake.live import page as page_module
from mooncake.live import scrape
from mooncake.live.boards import load_boards
from mooncake.live.page import SERIES_MAX, LivePage
from mooncake.live.prometheus import Prometheus
from mooncake.live.ring import Part, Ring, part_of, samples_of
from mooncake.live.scrape import Scraper

OWN = Part("gateway-0", "http://127.0.0.1:1/metrics", "127.0.0.1:1")
TOKEN = "0123456789abcdef-token"


def serve(ring: Ring, token: str = "", prometheus: Prometheus | None = None, visited=lambda: None):
    admin = AdminServer(CollectorRegistry(), 0, token=token)
    LivePage(load_boards(), ring, prometheus, visited).register(admin)
    admin.start()
    return admin


@pytest.fixture
def ring():
    ring = Ring(["c_total", "up"])
    for i in range(20):
        ring.add(1000.0 + 5 * i, {OWN: f'c_total{{kind="<b>"}} {10 * i}\n'})
    return ring


@pytest.fixture
def admin(ring):
    admin = serve(ring)
    yield admin
    admin.close()


def get(admin, path: str, headers: dict | None = None, **values):
    connection = http.client.HTTPConnection("127.0.0.1", admin.port, timeout=10)
    try:
        query = f"?{urllib.parse.urlencode(values)}" if values else ""
        connection.request("GET", path + query, headers=headers or {})
        reply = connection.getresponse()
        return reply, reply.read()
    finally:
        connection.close()


def query(admin, expression, start=1060, end=1080, step=5):
    reply, body = get(admin, "/dashboard/api/query_range", query=expression, start=start, end=end, step=step)
    return reply.status, json.loads(body)


def test_an_answer_has_the_shape_of_prometheus(admin):
    status, answer = query(admin, "rate(c_total[20s])")
    assert (status, answer["status"], answer["data"]["resultType"]) == (200, "success", "matrix")
    (series,) = answer["data"]["result"]
    assert series["metric"] == {
        "kind": "<b>", "instance": "127.0.0.1:1", "job": "mooncake", "process": "gateway-0"
    }  # fmt: skip
    assert series["values"] == [[1060.0 + 5 * i, "2"] for i in range(5)]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"query": "sum("}, "cannot parse"),
        ({"query": "(" * 5000}, "levels"),
        ({"query": "foo(c_total)"}, "foo"),
        ({"step": "0"}, "steps"),
        ({"step": "0.0001"}, "steps"),
        ({"end": "1e18"}, "start..end"),
        ({"start": "nan"}, "start"),
        ({"start": ""}, "start"),
        ({"end": "1"}, "start..end"),
    ],
)
def test_a_bad_question_is_answered_with_what_is_wrong(admin, changes, says):
    asked = {"query": "up", "start": "1000", "end": "1010", "step": "5", **changes}
    reply, body = get(admin, "/dashboard/api/query_range", **asked)
    answer = json.loads(body)
    assert reply.status == 400
    assert says in answer["error"]


def test_more_series_than_a_chart_can_show_are_cut_and_told():
    ring = Ring(["c_total"])
    ring.add(1000.0, {OWN: "".join(f'c_total{{i="{i}"}} 1\n' for i in range(SERIES_MAX + 5))})
    admin = serve(ring)
    try:
        _, answer = query(admin, "c_total", 1000, 1000)
        assert len(answer["data"]["result"]) == SERIES_MAX
        assert answer["warnings"] == [f"{SERIES_MAX} of {SERIES_MAX + 5} series are shown"]
    finally:
        admin.close()


def test_a_question_that_would_fill_the_memory_is_refused(admin, monkeypatch):
    monkeypatch.setattr(page_module, "CELLS_MAX", 4)
    status, answer = query(admin, "c_total", 1060, 1080)
    assert (status, answer["error"]) == (400, "1 series at 5 times: ask for less")
    assert query(admin, "c_total", 1060, 1075)[0] == 200


def test_values_of_labels_fill_the_menus(admin):
    _, body = get(admin, "/dashboard/api/label/kind/values", **{"match[]": 'c_total{process=~"g.*"}'})
    assert json.loads(body)["data"] == ["<b>"]
    _, body = get(admin, "/dashboard/api/label/process/values")
    assert json.loads(body)["data"] == ["gateway-0"]
    reply, _ = get(admin, "/dashboard/api/label/no%20label/values")
    assert reply.status == 404


def test_menus_and_refusals_copy_no_values(admin, ring, monkeypatch):
    def copied(names, matchers=()):
        raise AssertionError("values were copied")

    monkeypatch.setattr(ring, "samples", copied)
    _, body = get(admin, "/dashboard/api/label/kind/values", **{"match[]": 'c_total{process=~"g.*"}'})
    assert json.loads(body)["data"] == ["<b>"]
    assert json.loads(get(admin, "/dashboard/api/label/job/values")[1])["data"] == ["mooncake"]
    monkeypatch.setattr(page_module, "CELLS_MAX", 4)
    assert query(admin, "c_total", 1060, 1080)[0] == 400


def test_menus_and_charts_take_turns_and_who_waits_too_long_is_told(ring, monkeypatch):
    monkeypatch.setattr(page_module, "WAIT_S_MAX", 0.01)
    begun, go = threading.Semaphore(0), threading.Event()
    labels = ring.labels

    def slow(names, matchers=()):
        begun.release()
        assert go.wait(30)
        return labels(names, matchers)

    monkeypatch.setattr(ring, "labels", slow)
    admin = serve(ring)
    try:
        with concurrent.futures.ThreadPoolExecutor(page_module.AT_ONCE_MAX) as pool:
            menus = [
                pool.submit(get, admin, "/dashboard/api/label/kind/values")
                for _ in range(page_module.AT_ONCE_MAX)
            ]
            assert all(begun.acquire(timeout=30) for _ in menus)
            status, answer = query(admin, "c_total")
            assert (status, answer["errorType"]) == (503, "timeout")
            reply, body = get(admin, "/dashboard/api/label/kind/values")
            assert (reply.status, json.loads(body)["errorType"]) == (503, "timeout")
            go.set()
            assert [menu.result(30)[0].status for menu in menus] == [200] * len(menus)
        assert query(admin, "c_total")[0] == 200
    finally:
        go.set()
        admin.close()


def test_the_page_comes_with_a_policy_that_lets_nothing_foreign_in(admin):
    for path in ("/dashboard", "/dashboard/", "/dashboard/app.js", "/dashboard/style.css"):
        reply, body = get(admin, path)
        assert reply.status == 200
        assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
        assert "unsafe" not in reply.headers["Content-Security-Policy"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
        assert body
    _, frame = get(admin, "/dashboard")
    assert b"http:" not in frame and b"https:" not in frame and b"//" not in frame  # noqa: PT018
    assert b"style=" not in frame
    assert b"onclick" not in frame


@pytest.mark.parametrize(
    "path", ["../page.py", "..%2fpage.py", "%2e%2e/page.py", "nothing", "api", "static/"]
)
def test_only_the_page_s_own_files_are_served(admin, path):
    reply, body = get(admin, f"/dashboard/{path}")
    assert reply.status == 404
    assert b"import" not in body


def test_scripts_never_turn_what_they_were_told_into_html(admin):
    for name in ("app.js", "panels.js", "query.js", "units.js"):
        _, body = get(admin, f"/dashboard/{name}")
        for way in (
            b"innerHTML",
            b"outerHTML",
            b"insertAdjacentHTML",
            b"document.write",
            b"eval(",
            b"new Function",
        ):
            assert way not in body, (name, way)


def test_with_a_token_the_frame_is_open_and_nothing_of_the_cluster_is(ring):
    admin = serve(ring, TOKEN)
    try:
        assert get(admin, "/dashboard")[0].status == 200
        assert get(admin, "/dashboard/app.js")[0].status == 200
        for path in ("status", "boards", "query_range", "label/process/values"):
            assert get(admin, f"/dashboard/api/{path}")[0].status == 401
            assert get(admin, f"/dashboard/api/{path}", {"Authorization": "Bearer wrong"})[0].status == 401
        reply, body = get(admin, "/dashboard/api/status", {"Authorization": f"Bearer {TOKEN}"})
        assert (reply.status, json.loads(body)["source"]) == (200, "memory")
    finally:
        admin.close()


def units_of(part: object) -> set[str]:
    """Return what every "unit" below `part` says."""
    if isinstance(part, list):
        return set().union(*map(units_of, part))
    if not isinstance(part, dict):
        return set()
    own = {part["unit"]} if isinstance(part.get("unit"), str) else set()
    return own.union(*map(units_of, part.values()))


def test_the_page_knows_every_unit_of_the_boards(admin):
    _, script = get(admin, "/dashboard/units.js")
    units = set().union(*map(units_of, load_boards().values()))
    assert "si:tok/s" in units
    assert b'unit?.startsWith("si:")' in script
    for unit in units - {"short", "si:tok/s"}:
        assert f'"{unit}"'.encode() in script or f"{unit}: ".encode() in script, unit


def test_boards_are_those_that_grafana_gets(admin):
    _, body = get(admin, "/dashboard/api/boards")
    listed = json.loads(body)
    assert [one["uid"] for one in listed] == list(load_boards())
    _, board = get(admin, f"/dashboard/api/boards/{listed[0]['uid']}")
    assert json.loads(board) == load_boards()[listed[0]["uid"]]
    assert get(admin, "/dashboard/api/boards/nothing")[0].status == 404


def test_the_first_question_is_noticed(ring):
    visits = []
    admin = serve(ring, visited=lambda: visits.append(1))
    try:
        get(admin, "/dashboard")
        assert visits == []
        get(admin, "/dashboard/api/status")
        assert visits == [1]
    finally:
        admin.close()


# ------------------------------------------------------------ the ring is filled by asking


class SaysTrue(Collector):
    def describe(self):
        return self.collect()

    def collect(self):
        yield GaugeMetricFamily("c_true", "A value that is no number for JSON.", value=True)


@pytest.fixture
def part():
    """Another process: its registry and its admin server."""
    registry = CollectorRegistry()
    counter = Counter("c", "Of something.", ["kind"], registry=registry)
    for i in range(200):
        counter.labels(f"kind-{i}").inc(i)  # large enough to come packed
    admin = AdminServer(registry, 0, token=TOKEN)
    admin.start()
    yield registry, admin
    admin.close()


def one_round(scraper: Scraper) -> None:
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        scraper.round(pool)


def test_a_round_asks_all_parts_with_the_token_and_itself_directly(part):
    registry, admin = part
    ring = Ring(["c_total", "up"])
    other = part_of("prefill-0", f"{admin.url}/metrics")
    gone = part_of("prefill-1", "http://127.0.0.1:9/metrics")

    def own_page() -> list:
        return samples_of(registry, ring.names)

    scraper = Scraper(ring, OWN, own_page, lambda: [OWN, other, gone, Part("nowhere")], TOKEN)
    one_round(scraper)
    one_round(scraper)  # over the connection that it kept
    up = ring.samples(["up"])
    shown = {dict(labels)["process"]: up.values[i].tolist() for i, labels in enumerate(up.labels)}
    assert shown == {"gateway-0": [1.0, 1.0], "prefill-0": [1.0, 1.0], "prefill-1": [0.0, 0.0]}
    assert len(ring.samples(["c_total"]).labels) == 400


def test_processes_with_a_live_page_hand_over_samples_which_wakes_no_ring(part):
    registry, admin = part
    Gauge("c_age", "Of nothing.", registry=registry).set(math.nan)  # JSON has no such number
    registry.register(SaysTrue())
    ring, visits = Ring(["c_total", "c_age", "c_true"]), []
    page = LivePage(
        {}, ring, visited=lambda: visits.append(1), samples=lambda: samples_of(registry, ring.names)
    )
    page.register(admin)
    found = scrape.Source(f"{admin.url}{scrape.SAMPLES_PATH}", TOKEN).fetch()
    assert len(found) == 201
    assert ("c_true", {}, 1.0) in found
    assert ("c_total", {"kind": "kind-7"}, 7.0) in found
    assert visits == []
    ring.add(1000.0, {OWN: found})
    as_text = Ring(["c_total"])
    as_text.add(1000.0, {OWN: scrape.Source(f"{admin.url}/metrics", TOKEN).fetch()})
    assert sorted(ring.samples(["c_total"]).labels) == sorted(as_text.samples(["c_total"]).labels)


@pytest.mark.parametrize(("cpu_s", "round_s"), [(0.001, 5.0), (0.05, 5.0), (0.1, 10.0), (3.0, 30.0)])
def test_rounds_that_cost_more_come_later(monkeypatch, cpu_s, round_s):
    done = threading.Event()
    scraper = Scraper(Ring(["up"]), OWN, list, list)

    def costly(pool) -> float:
        done.set()
        return cpu_s

    monkeypatch.setattr(scraper, "round", costly)
    scraper.start()
    assert done.wait(30)
    scraper.close()
    assert scraper.round_s == pytest.approx(round_s)


def test_a_wrong_token_or_a_page_without_end_is_no_page(part, monkeypatch):
    _, admin = part
    assert scrape.Source(f"{admin.url}/metrics", "wrong").fetch() is None
    assert "c_total" in (scrape.Source(f"{admin.url}/metrics", TOKEN).fetch() or "")
    monkeypatch.setattr(scrape, "PAGE_BYTES_MAX", 1000)  # less than it unpacks to
    assert scrape.Source(f"{admin.url}/metrics", TOKEN).fetch() is None


def test_a_part_with_an_address_that_is_none_costs_nobody_else_a_sample(part):
    _, admin = part
    ring = Ring(["up"])
    odd = [Part(name, url, name) for name, url in
           (("port", "http://h:99999/"), ("bracket", "http://[/"), ("space", "http://a b/"))]  # fmt: skip
    good = part_of("prefill-0", f"{admin.url}/metrics")
    scraper = Scraper(ring, OWN, lambda: "", lambda: [*odd, good], TOKEN)
    one_round(scraper)
    one_round(scraper)
    up = ring.samples(["up"])
    assert {dict(labels)["process"]: up.values[i].tolist() for i, labels in enumerate(up.labels)} == {
        "gateway-0": [1.0, 1.0], "prefill-0": [1.0, 1.0], "port": [0.0, 0.0], "bracket": [0.0, 0.0],
        "space": [0.0, 0.0],
    }  # fmt: skip


def test_a_page_that_fails_in_a_new_way_is_asked_for_again_and_costs_nobody_else_a_sample(part, monkeypatch):
    _, admin = part
    ring = Ring(["up"])
    good, odd = part_of("prefill-0", f"{admin.url}/metrics"), Part("odd", f"{admin.url}/odd", "odd")
    failing = [True]

    def fetched(source):
        if source._url == odd.url and failing[0]:
            raise RuntimeError("nobody thought of this")
        return ""

    def own_page():
        if failing[0]:
            raise RuntimeError("nor of this")
        return ""

    monkeypatch.setattr(scrape.Source, "fetch", fetched)
    scraper = Scraper(ring, OWN, own_page, lambda: [odd, good], TOKEN)
    one_round(scraper)
    failing[0] = False
    one_round(scraper)
    up = ring.samples(["up"])
    assert {dict(labels)["process"]: up.values[i].tolist() for i, labels in enumerate(up.labels)} == {
        "gateway-0": [0.0, 1.0], "odd": [0.0, 1.0], "prefill-0": [1.0, 1.0],
    }  # fmt: skip


def test_an_answer_that_comes_after_its_round_is_not_the_next_one_s(monkeypatch):
    monkeypatch.setattr(scrape, "ROUND_S", 0.0)
    ring, late, go = Ring(["c"]), part_of("late", "http://127.0.0.1:9/metrics"), threading.Event()
    pages = iter(["c 1\n", "c 2\n"])

    def fetched(source):
        assert go.wait(30)
        return next(pages)

    monkeypatch.setattr(scrape.Source, "fetch", fetched)
    scraper = Scraper(ring, OWN, lambda: "", lambda: [late])
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        scraper.round(pool)
        go.set()
        pool.submit(lambda: None).result(30)  # the one thread has done what was before it
        monkeypatch.setattr(scrape, "ROUND_S", 60.0)
        scraper.round(pool)
    found = ring.samples(["c"])
    assert found.values.tolist()[0][1] == 2.0


def test_it_stops_when_told():
    ring, asked = Ring(["up"]), threading.Event()

    def parts():
        asked.set()
        return []

    scraper = Scraper(ring, OWN, lambda: "", parts)
    scraper.start()
    scraper.start()
    assert asked.wait(30)
    scraper.close()
    assert [t for t in threading.enumerate() if t.name == "live scraper"] == []


# ------------------------------------------------------------ a Prometheus instead


def test_with_a_prometheus_questions_go_there_as_they_are_and_to_no_other_path(ring):
    seen = []
    stub = AdminServer(CollectorRegistry(), 0)

    def answer(asked):
        from mooncake.core.admin import json_answer

        seen.append((asked.path, asked.query))
        return json_answer(422 if asked.query.get("query") == "bad" else 200, {"status": "success"})

    stub.route("/api/v1/", answer)
    stub.start()
    admin = serve(ring, prometheus=Prometheus(f"{stub.url}/"))
    try:
        assert query(admin, "up")[0] == 200
        assert query(admin, "bad")[0] == 422
        get(admin, "/dashboard/api/label/job/values", **{"match[]": "up", "start": "1", "end": "2"})
        assert get(admin, "/dashboard/api/admin/tsdb/delete_series")[0].status == 404
        assert [path for path, _ in seen] == ["/api/v1/query_range"] * 2 + ["/api/v1/label/job/values"]
        assert seen[0][1]["query"] == "up"
        assert seen[2][1] == {"match[]": "up", "start": "1.0", "end": "2.0"}
    finally:
        stub.close()
        admin.close()
    admin = serve(ring, prometheus=Prometheus(stub.url or "http://127.0.0.1:9"))
    try:
        status, answer = query(admin, "up")
        assert status == 503
        assert "does not answer" in answer["error"]
    finally:
        admin.close()

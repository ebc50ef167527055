"""Ports of the metrics: distinct, free, or exactly the wanted ones; Prometheus can scrape them all."""

import socket

import pytest
import yaml

from mooncake.core.errors import ConfigError
from mooncake.up.metrics import (
    can_bind,
    metrics_text,
    prometheus_config,
    with_admin_ports,
    write_prometheus_config,
)
from mooncake.up.plan import UpOptions, admin_names, make_plan
from mooncake.up.run import ready_text

WISH = UpOptions(model="/m", served_name="m", run_dir="/run/x", port=20_000)


def listener() -> socket.socket:
    taken = socket.socket()
    taken.bind(("127.0.0.1", 0))
    taken.listen()
    return taken


def test_the_first_free_ports_above_the_gateways_are_taken():
    ports = with_admin_ports(WISH).admin_ports
    assert list(ports) == ["store", "conductor", "prefill-0", "decode-0"]
    assert sorted(set(ports.values())) == list(ports.values())
    assert min(ports.values()) > WISH.port


def test_a_taken_port_is_skipped():
    with listener() as taken:
        port = taken.getsockname()[1]
        options = UpOptions(model="/m", served_name="m", run_dir="/r", port=port - 1)
        assert port not in with_admin_ports(options).admin_ports.values()


@pytest.mark.parametrize("port", [80, 65_535])
def test_ports_are_never_privileged_nor_beyond_the_last(port):
    options = UpOptions(model="/m", served_name="m", run_dir="/r", port=port)
    assert all(1024 <= found < 65_535 for found in with_admin_ports(options).admin_ports.values())


def test_a_base_fixes_the_ports_in_the_order_of_start():
    base = next(p for p in range(21_000, 30_000) if all(can_bind(p + i) for i in range(4)))
    assert with_admin_ports(WISH.replace(admin_port=base)).admin_ports == {
        "store": base,
        "conductor": base + 1,
        "prefill-0": base + 2,
        "decode-0": base + 3,
    }


@pytest.mark.parametrize("layout", [{}, {"gateways": 3}, {"aggregated": 2}, {"prefill": 3, "decode": 2}])
def test_a_base_whose_ports_would_take_the_gateways_is_refused(layout):
    wish = WISH.replace(**layout)
    count = len(admin_names(wish))
    for base in (wish.port - count, wish.port + 1):
        assert wish.replace(admin_port=base).conflicts() == []
    for base in (wish.port - count + 1, wish.port):
        (problem,) = wish.replace(admin_port=base).conflicts()
        assert problem.key == "admin_port"
        assert f"{count} ports from here on, and port is one of them, {wish.port}" in problem.advice
        with pytest.raises(ConfigError, match="admin_port"):
            make_plan(wish.replace(admin_port=base), [0])


@pytest.mark.parametrize("base", [-1, 65_534, 70_000])
def test_a_base_out_of_range_is_refused(base):
    with pytest.raises(ConfigError, match="admin_port"):
        with_admin_ports(WISH.replace(admin_port=base))


def test_a_base_whose_ports_are_taken_is_refused():
    with listener() as taken, pytest.raises(ConfigError, match="taken"):
        with_admin_ports(WISH.replace(admin_port=taken.getsockname()[1]))


def test_prometheus_scrapes_everyone():
    config = yaml.safe_load(prometheus_config([("gateway", "[::1]:8000"), ("store", "127.0.0.1:8001")]))
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [
        {"targets": ["[::1]:8000"], "labels": {"process": "gateway"}},
        {"targets": ["127.0.0.1:8001"], "labels": {"process": "store"}},
    ]


def test_every_process_is_scraped_at_its_admin_port(tmp_path):
    options = UpOptions(model="/m", served_name="m", run_dir=str(tmp_path), port=20_000, gateways=2)
    options = with_admin_ports(options)
    write_prometheus_config(options)
    (job,) = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
    names = [target["labels"]["process"] for target in job["static_configs"]]
    assert names == ["store", "core", "gateway-0", "gateway-1", "prefill-0", "decode-0"]
    assert "20000/metrics" not in metrics_text(options, "http://127.0.0.1:20000")


def scraping(tmp_path, **changes) -> dict:
    write_prometheus_config(with_admin_ports(WISH.replace(run_dir=str(tmp_path), **changes)))
    (job,) = yaml.safe_load((tmp_path / "prometheus.yml").read_text())["scrape_configs"]
    return job


@pytest.mark.parametrize(("host", "seen"), [("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2")])
def test_prometheus_and_people_are_told_an_address_that_this_machine_reaches(tmp_path, host, seen):
    for target in scraping(tmp_path, admin_host=host)["static_configs"]:
        assert target["targets"][0].startswith(f"{seen}:")
    options = WISH.replace(admin_host=host, admin_ports={"conductor": 8002})
    text = ready_text(options, 1, has_key=False)
    assert f"http://{seen}:8002/dashboard" in text
    assert f"on {host}: conductor:8002" in text


def test_a_port_is_free_if_it_is_on_the_address_that_is_to_be_bound():
    with listener() as taken:
        port = taken.getsockname()[1]
        assert not can_bind(port, "0.0.0.0")
        assert can_bind(port, "127.0.0.2")


def test_an_address_of_another_host_is_said(tmp_path):
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1 .*an address of this host"):
        scraping(tmp_path, admin_host="192.0.2.1")


def test_prometheus_shows_the_token_that_admin_servers_want_and_no_copy_of_it_is_made(tmp_path, monkeypatch):
    assert "authorization" not in scraping(tmp_path)
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN", "very-secret-token")
    assert scraping(tmp_path)["authorization"] == {"credentials_file": "FILE-WITH-MOONCAKE_ADMIN_TOKEN"}
    assert "very-secret-token" not in (tmp_path / "prometheus.yml").read_text()
    monkeypatch.setenv("MOONCAKE_ADMIN_TOKEN_FILE", "/etc/mooncake/token")
    assert scraping(tmp_path)["authorization"] == {"credentials_file": "/etc/mooncake/token"}


def test_the_ready_text_says_where_metrics_are():
    options = UpOptions(
        model="/m", served_name="m", run_dir="/r", admin_ports={"store": 8001, "prefill-0": 8002}
    )
    text = ready_text(options, 1, has_key=False)
    assert metrics_text(options, "http://127.0.0.1:8000") in text
    for part in ("http://127.0.0.1:8000/metrics", "store:8001", "prefill-0:8002", "/r/prometheus.yml"):
        assert part in text


@pytest.mark.parametrize(("gateways", "who"), [(None, "conductor"), (2, "core")])
def test_the_ready_text_says_where_the_live_page_is(gateways, who):
    options = UpOptions(
        model="/m", served_name="m", run_dir="/r", gateways=gateways, admin_ports={"store": 8001, who: 8002}
    )
    assert "http://127.0.0.1:8002/dashboard" in ready_text(options, 1, has_key=False)

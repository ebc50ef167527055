"""Rolling updates, probes, endpoints, budgets, environments: the stand-in's policy, without a process."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mooncake.core.errors import ConfigError
from tests.kube.standin import endpoints
from tests.kube.standin.disruption import budget_status, forbids
from tests.kube.standin.environment import command_line, content, environment, expand, quantity
from tests.kube.standin.probes import BackOff, Checks
from tests.kube.standin.rollout import (
    HASH_LABEL,
    REVISION_LABEL,
    Replicas,
    bounds,
    daemon_step,
    recreate_step,
    rolling_step,
    stateful_step,
    surplus,
)
from tests.kube.standin.selectors import by_labels, by_query

NEVER = "2026-01-01T00:00:00Z"


def pod(name: str, ready: bool = True, ending: bool = False, **more: Any) -> dict[str, Any]:
    meta: dict[str, Any] = {
        "name": name, "namespace": "ns", "creationTimestamp": NEVER, "labels": {"app": "web"},
        **more.pop("meta", {}),
    }  # fmt: skip
    if ending:
        meta["deletionTimestamp"] = NEVER
    ports = [{"name": "http", "containerPort": 8000}]
    status = {
        "podIP": more.pop("ip", "10.0.0.1"),
        "conditions": [{"type": "Ready", "status": str(ready), "lastTransitionTime": NEVER}],
    }
    spec = {"nodeName": "node-0", "containers": [{"name": "c", "ports": ports}], **more}
    return {"metadata": meta, "spec": spec, "status": status}


# ---------------------------------------------------------------- Deployment


def roll(wanted: int, surge: int, unavailable: int) -> list[tuple[int, int, int]]:
    """Play a rolling update; return (new, old, available) after each step."""
    new, old, ready = 0, wanted, 0
    seen = []
    for _ in range(20 * wanted + 20):
        steps = rolling_step(
            wanted, surge, unavailable, Replicas("new", new, ready), [Replicas("old", old, old)]
        )
        new, old = steps.get("new", new), steps.get("old", old)
        ready = min(ready, new)
        seen.append((new, old, ready + old))
        if not steps and ready == new:
            break
        if not steps:
            ready += 1
    return seen


@given(wanted=st.integers(0, 12), surge=st.integers(0, 4), unavailable=st.integers(0, 4))
def test_a_rolling_update_ends_and_keeps_within_its_bounds(wanted: int, surge: int, unavailable: int) -> None:
    if not surge and not unavailable:
        unavailable = 1
    seen = roll(wanted, surge, unavailable)
    assert seen[-1] == (wanted, 0, wanted)
    for new, old, available in seen:
        assert new + old <= wanted + surge
        assert available >= wanted - unavailable


def test_what_never_gets_ready_stops_the_update_and_the_old_pods_serve_on() -> None:
    new, old = Replicas("new", 1, 0), Replicas("old", 2, 2)
    assert rolling_step(2, 1, 0, new, [old]) == {}


def test_old_pods_that_serve_nobody_go_first() -> None:
    old = [Replicas("a", 1, 1), Replicas("b", 2, 0)]
    assert rolling_step(3, 1, 0, Replicas("new", 1, 1), old) == {"b": 1}


def test_percentages_are_rounded_so_that_no_pod_too_many_is_missing() -> None:
    assert bounds({}, 4) == (1, 1)
    assert bounds({}, 1) == (1, 0)
    assert bounds({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 0}}}, 3) == (0, 1)


def test_recreate_starts_nothing_before_the_last_old_pod_has_ended() -> None:
    new, old = Replicas("new", 0, 0), Replicas("old", 2, 2)
    assert recreate_step(2, new, [old], 2) == {"old": 0}
    assert recreate_step(2, new, [Replicas("old", 0, 0)], 1) == {}
    assert recreate_step(2, new, [Replicas("old", 0, 0)], 0) == {"new": 2}


def test_of_too_many_pods_those_that_are_not_ready_go_first() -> None:
    assert [one["metadata"]["name"] for one in surplus([pod("a"), pod("b", ready=False), pod("c")], 1)] == [
        "b"
    ]


# ---------------------------------------------------------------- StatefulSet, DaemonSet


def of_revision(name: str, revision: str, **more: Any) -> dict[str, Any]:
    return pod(name, meta={"labels": {REVISION_LABEL: revision, HASH_LABEL: revision}}, **more)


def test_a_stateful_set_starts_one_after_another_and_is_updated_from_the_last() -> None:
    names = ["e-0", "e-1", "e-2"]
    assert stateful_step(names, [], "r", parallel=False).create == ("e-0",)
    assert stateful_step(names, [of_revision("e-0", "r", ready=False)], "r", parallel=False).create == ()
    assert stateful_step(names, [], "r", parallel=True).create == tuple(names)
    pods = [of_revision("e-0", "old"), of_revision("e-1", "old"), of_revision("e-2", "r")]
    assert stateful_step(names, pods, "r", parallel=True).delete == ("e-1",)
    pods[2] = of_revision("e-2", "r", ready=False)
    assert stateful_step(names, pods, "r", parallel=True).delete == ()
    assert stateful_step(names[:1], pods, "old", parallel=False).delete == ("e-2",)


def test_a_daemon_set_has_one_pod_on_each_node_and_replaces_so_many_at_a_time() -> None:
    nodes = ["a", "b"]
    assert daemon_step(nodes, [], "r", 0, 1, set()).create == ("a", "b")
    pods = [of_revision("s-1", "old", nodeName="a"), of_revision("s-2", "old", nodeName="b")]
    step = daemon_step(nodes, pods, "r", 0, 1, {"s-1", "s-2"})
    assert len(step.delete) == 1
    assert step.create == ()
    pods[0] = of_revision("s-1", "old", nodeName="a", ending=True)
    waits = daemon_step(nodes, pods, "r", 0, 1, {"s-2"})
    assert (waits.create, waits.delete) == ((), ())  # the old pod of a node ends first


def test_with_surge_a_daemon_sets_new_pod_serves_before_the_old_one_goes() -> None:
    old, new = of_revision("s-1", "old", nodeName="a"), of_revision("s-2", "r", nodeName="a")
    assert daemon_step(["a"], [old], "r", 1, 0, {"s-1"}).create == ("a",)
    assert daemon_step(["a"], [old, new], "r", 1, 0, {"s-1"}).delete == ()
    assert daemon_step(["a"], [old, new], "r", 1, 0, {"s-1", "s-2"}).delete == ("s-1",)


# ---------------------------------------------------------------- probes


def checks(**probes: dict[str, Any]) -> Checks:
    return Checks({f"{kind}Probe": {"httpGet": {}, **probe} for kind, probe in probes.items()})


def test_nothing_but_the_startup_probe_runs_until_it_succeeds_once() -> None:
    probes = checks(startup={"failureThreshold": 3}, readiness={}, liveness={})
    assert probes.due == ("startup",)
    assert not probes.on_outcome("startup", ok=False).started
    assert probes.on_outcome("startup", ok=True).started
    assert probes.due == ("readiness", "liveness")


def test_a_container_that_does_not_start_is_condemned_after_so_many_failures() -> None:
    probes = checks(startup={"failureThreshold": 2})
    assert not probes.on_outcome("startup", ok=False).condemned
    assert probes.on_outcome("startup", ok=False).condemned


def test_readiness_comes_with_the_first_success_and_goes_after_so_many_failures() -> None:
    probes = checks(readiness={"failureThreshold": 2})
    assert not probes.health.ready
    assert probes.on_outcome("readiness", ok=True).ready
    assert probes.on_outcome("readiness", ok=False).ready
    assert not probes.on_outcome("readiness", ok=False).ready


def test_a_success_in_between_forgives_failures_of_liveness() -> None:
    probes = checks(liveness={"failureThreshold": 2})
    outcomes = [probes.on_outcome("liveness", ok=ok).condemned for ok in (False, True, False, False)]
    assert outcomes == ["", "", "", "liveness probe failed"]


def test_a_container_without_probes_is_ready_at_once() -> None:
    assert Checks({}).health.ready


def test_a_container_that_ends_again_and_again_waits_ever_longer() -> None:
    back_off = BackOff()
    assert [back_off.on_exit(1.0) for _ in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert back_off.on_exit(1000.0) == 0


# ---------------------------------------------------------------- Services, budgets


SERVICE = {
    "metadata": {"name": "web", "namespace": "ns", "uid": "u"},
    "spec": {
        "selector": {"app": "web"},
        "clusterIP": "10.96.0.9",
        "ports": [{"port": 80, "targetPort": "http"}],
    },
}


def test_only_pods_that_are_ready_and_not_ending_get_new_connections() -> None:
    pods = [
        pod("a", ip="10.0.0.1"), pod("b", ready=False, ip="10.0.0.2"), pod("c", ending=True, ip="10.0.0.3"),
        pod("d", ip="10.0.0.4", meta={"labels": {"app": "other"}}),
        pod("e", ip="10.0.0.5", meta={"namespace": "x"}),
    ]  # fmt: skip
    (port,) = endpoints.ports(SERVICE, pods)
    assert (port.port, port.backends) == (80, (("10.0.0.1", 8000),))
    early = {**SERVICE, "spec": {**SERVICE["spec"], "publishNotReadyAddresses": True}}
    assert len(endpoints.ports(early, pods)[0].backends) == 3


def test_names_lead_to_the_services_address_or_without_one_to_each_pod() -> None:
    headless = {**SERVICE, "spec": {**SERVICE["spec"], "clusterIP": "None"}}
    member = pod("web-0", subdomain="web", hostname="web-0")
    assert "10.96.0.9 web web.ns web.ns.svc web.ns.svc.cluster.local" in endpoints.hosts([SERVICE], [])["ns"]
    (line,) = [one for one in endpoints.hosts([headless], [member])["ns"] if one.startswith("10.0.0.1")]
    assert {"web", "web-0.web", "web-0.web.ns.svc.cluster.local"} <= set(line.split())


def test_what_a_pod_is_called_is_not_what_others_know_it_by() -> None:
    """A kubelet writes a pod's own name for itself; the DNS of a cluster knows Services."""
    web_0, web_1 = pod("web-0"), pod("web-1", ip="10.0.0.2")
    assert not any("web-1" in line.split() for line in endpoints.hosts([SERVICE], [web_0, web_1])["ns"])
    assert endpoints.own_host("10.0.0.2", "web-1") == "10.0.0.2 web-1"


def test_a_budget_lets_one_go_and_no_second_before_its_replacement_is_ready() -> None:
    budget = {
        "metadata": {"name": "b"},
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": {"app": "web"}}},
    }
    assert not forbids(pod("a"), [pod("a"), pod("b")], [budget])
    assert forbids(pod("a"), [pod("a"), pod("b", ending=True), pod("c", ready=False)], [budget])
    assert budget_status(budget, [pod("a"), pod("b")])["disruptionsAllowed"] == 1


# ---------------------------------------------------------------- what a container is given


CONFIG = {"kind": "ConfigMap", "data": {"key": "value"}}
SECRET = {"kind": "Secret", "data": {"key": "c2VjcmV0"}}
OBJECTS = {("configmaps", "c"): CONFIG, ("secrets", "s"): SECRET}


def lookup(plural: str, name: str) -> dict[str, Any] | None:
    return OBJECTS.get((plural, name))


def test_variables_come_from_the_pod_secrets_config_maps_and_each_other() -> None:
    env = [
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        {"name": "URL", "value": "http://$(IP):80/$(UNKNOWN)/$$(IP)"},
        {"name": "MAYBE", "valueFrom": {"secretKeyRef": {"name": "none", "key": "x", "optional": True}}},
    ]
    container = {
        "env": env,
        "envFrom": [{"prefix": "C_", "configMapRef": {"name": "c"}}],
        "args": ["--at=$(IP)"],
    }
    found = environment(pod("a"), container, lookup)
    assert found == {
        "C_key": "value", "IP": "10.0.0.1", "KEY": "secret", "URL": "http://10.0.0.1:80/$(UNKNOWN)/$(IP)",
    }  # fmt: skip
    assert command_line(container, found) == ["--at=10.0.0.1"]


def test_a_secret_that_is_missing_is_told_by_name() -> None:
    env = [{"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "none", "key": "key"}}}]
    with pytest.raises(ConfigError, match="none"):
        environment(pod("a"), {"env": env}, lookup)


@pytest.mark.parametrize(
    ("text", "number"), [("500m", 0.5), ("2", 2.0), ("1Gi", 2.0**30), ("3G", 3e9), (4, 4.0)]
)
def test_quantities(text: str | int, number: float) -> None:
    assert quantity(text) == number


@given(st.text(alphabet="$()ab", max_size=20))
def test_expanding_without_variables_changes_nothing_but_double_dollars(text: str) -> None:
    assert "$$" in text or expand(text, {}) == text


def test_secrets_are_decoded() -> None:
    assert content(SECRET) == {"key": b"secret"}


@pytest.mark.parametrize(("query", "taken"), [
    ("", True), ("app=web", True), ("app==web,tier", False), ("app!=db", True), ("!tier", True),
    ("app in (web, db)", True), ("app notin (web)", False), ("app=db", False),
])  # fmt: skip
def test_label_selectors_of_queries(query: str, taken: bool) -> None:
    assert by_query(query, {"app": "web"}) is taken


def test_label_selectors_of_objects() -> None:
    selector = {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]}
    assert by_labels(selector, {"app": "web"})
    assert not by_labels(None, {"app": "web"})
    assert by_labels({}, {})

"""What holds of every pod, whichever overlay it comes from."""

from typing import Any

import pytest

from tests.deploy.conftest import flags_of
from tests.deploy.manifests import (
    CLUSTERS,
    COMPONENT,
    DEPLOY,
    NO_POOL,
    OVERLAYS,
    Object,
    containers,
    is_ours,
    main_container,
    names,
    needs_kubectl,
    of_kind,
    pod,
    pod_labels,
    selects,
    workloads,
)

pytestmark = needs_kubectl
PROBES = {"startupProbe": "/startupz", "readinessProbe": "/readyz", "livenessProbe": "/livez"}
LONGEST_REQUEST_S = 600
"""What the guide promises in-flight requests of gateways and engines, but in dev-cpu."""
ROLL_ROOM_S = 5
"""Between the last second that something may take and the kill."""
EPHEMERAL = (32768, 60999)
"""net.ipv4.ip_local_port_range of Linux: ports that our processes let the kernel choose."""
OPERATORS = {
    "mooncake-cluster",
    "mooncake-admin",
    "mooncake-api",
    "mooncake-etcd-server",
    "mooncake-etcd-client",
}
"""Secrets that deploy/secrets.sh makes."""
OURS = ("core", "gateway", "prefill", "decode", "store")
TALKS = [
    ("gateway", "core"), ("gateway", "prefill"), ("gateway", "decode"), ("prefill", "gateway"),
    ("decode", "gateway"), ("core", "prefill"), ("core", "decode"), ("core", "store"), ("prefill", "core"),
    ("decode", "core"), ("prefill", "store"), ("decode", "store"), ("store", "store"),
]  # fmt: skip
"""Who opens connections to whom at ports of the kernel's choice: links, tokens, decisions, events, copies."""


def component(workload: Object) -> str:
    return pod_labels(workload)[COMPONENT]


def each() -> list[Any]:
    """Every workload of every overlay."""
    return [
        pytest.param(overlay, one, id=f"{overlay}-{one['metadata']['name']}")
        for overlay in OVERLAYS
        for one in workloads(overlay)
    ]


def drain_wait_s(workload: Object) -> float:
    """Return how long preStop may take."""
    command = main_container(workload)["lifecycle"]["preStop"]["exec"]["command"]
    wait_s: float = flags_of(command)["wait_s"]
    return wait_s


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_a_pod_runs_as_nobody_special_with_nothing_writable(overlay: str, workload: Object) -> None:
    spec = pod(workload)
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] >= 10_000
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert spec["enableServiceLinks"] is False  # else MOONCAKE_..._PORT of a Service is a setting of ours
    assert spec["serviceAccountName"] in names(overlay, "ServiceAccount")
    assert not any(spec.get(key) for key in ("hostNetwork", "hostPID", "hostIPC"))
    for container in containers(workload):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["privileged"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"]["drop"] == ["ALL"]
        if (workload["metadata"]["name"], container["name"]) != ("store", "run-dir"):  # see store.yaml
            assert context["runAsNonRoot"] is True
            allowed = ["IPC_LOCK"] if overlay == "rdma" and component(workload) == "store" else []
            assert context["capabilities"].get("add", []) == allowed


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_the_host_lends_one_folder_to_stores_and_engines_and_nothing_else(
    overlay: str, workload: Object
) -> None:
    paths = [volume["hostPath"]["path"] for volume in pod(workload)["volumes"] if "hostPath" in volume]
    shares = component(workload) in ("store", "prefill", "decode") and overlay not in NO_POOL
    assert paths == (["/run/mooncake"] if shares else [])


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_service_accounts_have_no_token(overlay: str, workload: Object) -> None:
    for account in of_kind(overlay, "ServiceAccount"):
        assert account["automountServiceAccountToken"] is False
    assert names(overlay, "ServiceAccount") == {pod(one)["serviceAccountName"] for one in workloads(overlay)}
    assert not of_kind(overlay, "Role", "RoleBinding", "ClusterRole", "ClusterRoleBinding")
    assert pod(workload)["serviceAccountName"] != "default"


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_every_container_says_what_it_needs_and_may_take(overlay: str, workload: Object) -> None:
    for container in containers(workload):
        resources = container["resources"]
        for kind in ("requests", "limits"):
            assert {"cpu", "memory"} <= set(resources[kind]), container["name"]
        for name, amount in resources["limits"].items():
            if "/" in name or name.startswith("hugepages-"):
                assert resources["requests"][name] == amount


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_every_process_has_three_probes_that_ask_three_questions(overlay: str, workload: Object) -> None:
    container = main_container(workload)
    ports = {port["name"] for port in container["ports"]}
    for probe in PROBES:
        check = container[probe].get("httpGet") or container[probe]["tcpSocket"]
        assert check["port"] in ports
    if is_ours(workload):
        asked = {probe: container[probe]["httpGet"] for probe in PROBES}
        assert {probe: ask["path"] for probe, ask in asked.items()} == PROBES
        assert {ask["port"] for ask in asked.values()} == {"admin"}
        start = container["startupProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 1800  # the longest load of a model
        live = container["livenessProbe"]
        assert live["periodSeconds"] * live["failureThreshold"] >= 60
        assert live["terminationGracePeriodSeconds"] <= 30  # what hangs is not drained


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_drain_has_its_time_before_the_kill(overlay: str, settings_of: Any) -> None:
    for workload in filter(is_ours, workloads(overlay)):
        options = settings_of(overlay, workload)
        wait_s = drain_wait_s(workload)
        takes_s = wait_s + options.drain_s + getattr(options, "drain_delay_s", 0.0)
        assert pod(workload)["terminationGracePeriodSeconds"] >= takes_s + ROLL_ROOM_S, workload["metadata"]
        if overlay != "dev-cpu" and component(workload) in ("gateway", "prefill", "decode", "follower"):
            assert wait_s >= LONGEST_REQUEST_S


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_a_rollout_takes_nothing_away_before_there_is_something_new(overlay: str, workload: Object) -> None:
    if workload["kind"] == "Deployment" and is_ours(workload):
        rolling = workload["spec"]["strategy"]["rollingUpdate"]
        assert rolling == {"maxSurge": 1, "maxUnavailable": 0}
    elif workload["kind"] == "DaemonSet":
        assert workload["spec"]["updateStrategy"]["rollingUpdate"]["maxUnavailable"] == 1


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_eviction_of_one_pod_is_always_allowed(overlay: str) -> None:
    budgets = of_kind(overlay, "PodDisruptionBudget")
    for budget in budgets:
        assert budget["spec"]["maxUnavailable"] == 1
        assert "minAvailable" not in budget["spec"]
    for workload in workloads(overlay):
        covering = [one for one in budgets if selects(one["spec"]["selector"], pod_labels(workload))]
        single = workload["kind"] == "DaemonSet" or (overlay == "dev-cpu" and component(workload) == "etcd")
        assert len(covering) == (0 if single else 1), workload["metadata"]["name"]


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_selectors_select_these_pods_and_no_others(overlay: str, workload: Object) -> None:
    selector = workload["spec"]["selector"]
    assert [one for one in workloads(overlay) if selects(selector, pod_labels(one))] == [workload]
    for spread in pod(workload).get("topologySpreadConstraints", []):
        assert selects(spread["labelSelector"], pod_labels(workload))
    if workload["kind"] == "StatefulSet":
        assert workload["spec"]["serviceName"] in names(overlay, "Service")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_reach_pods_at_ports_that_they_name(overlay: str) -> None:
    for service in of_kind(overlay, "Service"):
        (workload,) = (one for one in workloads(overlay) if selects(_labels(service), pod_labels(one)))
        ports = {port["name"] for port in main_container(workload)["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def _labels(service: Object) -> Object:
    return {"matchLabels": service["spec"]["selector"]}


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_copies_of_a_process_are_spread_over_hosts_and_zones(overlay: str, workload: Object) -> None:
    if workload["kind"] == "DaemonSet" or (workload["spec"].get("replicas") == 1 and not is_ours(workload)):
        return
    keys = [spread["topologyKey"] for spread in pod(workload)["topologySpreadConstraints"]]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_every_reference_resolves(overlay: str, workload: Object) -> None:
    spec = pod(workload)
    mounts = {mount["name"] for container in containers(workload) for mount in container["volumeMounts"]}
    claims = {template["metadata"]["name"] for template in workload["spec"].get("volumeClaimTemplates", [])}
    assert mounts == {volume["name"] for volume in spec["volumes"]} | claims
    secrets = names(overlay, "Secret") | (set() if overlay == "dev-cpu" else OPERATORS)
    for volume in spec["volumes"]:
        if "configMap" in volume:
            assert volume["configMap"]["name"] in names(overlay, "ConfigMap")
        if "persistentVolumeClaim" in volume:
            assert volume["persistentVolumeClaim"]["claimName"] in names(overlay, "PersistentVolumeClaim")
        if "secret" in volume and not volume["secret"].get("optional"):
            assert volume["secret"]["secretName"] in secrets
            assert volume["secret"]["defaultMode"] == 0o440
    for container in containers(workload):
        for variable in container.get("env", []):
            source = variable.get("valueFrom", {})
            assert "secretKeyRef" not in source, (
                "secrets are files: an environment is seen by children and logs"
            )
            if "configMapKeyRef" in source:
                assert source["configMapKeyRef"]["name"] in names(overlay, "ConfigMap")


def test_only_the_overlay_for_a_try_has_secrets_in_it() -> None:
    assert {overlay for overlay in OVERLAYS if of_kind(overlay, "Secret")} == {"dev-cpu"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_images_are_pinned_and_said_in_one_place(overlay: str) -> None:
    for workload in workloads(overlay):
        for container in containers(workload):
            name, _, version = container["image"].rpartition(":")
            assert version not in ("latest", ""), container["image"]
            assert name.rpartition("/")[2] in {
                "mooncake-conductor", "mooncake-worker", "mooncake-store", "etcd",
            }  # fmt: skip
            assert container["imagePullPolicy"] == "IfNotPresent"
    elsewhere = [
        path
        for path in DEPLOY.rglob("*.yaml")
        if path.parent.name != "images" and ("newTag" in path.read_text() or "image: gcr" in path.read_text())
    ]
    assert elsewhere == []


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_cut_off_but_for_what_they_need(overlay: str) -> None:
    policies = {one["metadata"]["name"]: one["spec"] for one in of_kind(overlay, "NetworkPolicy")}
    assert policies.pop("default-deny") == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    for name, spec in policies.items():
        for rule in spec.get("ingress", []) + spec.get("egress", []):
            assert rule.get("ports"), f"{name} opens every port"
            for port in rule["ports"]:
                if "endPort" in port:
                    assert (port["port"], port["endPort"]) == EPHEMERAL
        for rule in spec.get("ingress", []):
            assert rule.get("from") or name == "gateway-clients", f"{name} lets everybody in"
        for rule in spec.get("egress", []):
            assert rule.get("to"), f"{name} lets out to everywhere"


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_those_who_talk_may_at_both_ends(overlay: str) -> None:
    there = {component(one): one for one in workloads(overlay)}
    for source, target in TALKS:
        if source in there and target in there:
            assert _lets(overlay, there[source], there[target], EPHEMERAL[0]), f"{source} -> {target}"
    for source in OURS:
        if source in there:
            assert _lets(overlay, there[source], there["etcd"], 2379), source
    for looking in ("core", "gateway"):  # the live page, `mooncake top`
        assert all(_lets(overlay, there[looking], there[one], 9100) for one in OURS if one in there)
    assert not _lets(overlay, there["prefill"], there["gateway"], 9100)
    assert not _lets(overlay, there["prefill"], there["etcd"], 2381)
    if "store" in there:
        assert not _lets(overlay, there["gateway"], there["store"], EPHEMERAL[0])


def _lets(overlay: str, source: Object, target: Object, number: int) -> bool:
    """Whether policies let `source` out to, and into `target` at, a port."""
    ends = ((source, "egress", "to", target), (target, "ingress", "from", source))
    for end, direction, whom, other in ends:
        rules = [
            rule
            for policy in of_kind(overlay, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], pod_labels(end))
            for rule in policy["spec"].get(direction, [])
        ]
        if not any(_matches(rule, whom, other, number, target) for rule in rules):
            return False
    return True


def _matches(rule: Object, whom: str, other: Object, number: int, target: Object) -> bool:
    peers = rule.get(whom)
    if peers is not None and not any(
        "podSelector" in peer
        and "namespaceSelector" not in peer
        and selects(peer["podSelector"], pod_labels(other))
        for peer in peers
    ):
        return False
    known = {port["name"]: port["containerPort"] for port in main_container(target)["ports"]}
    for port in rule["ports"]:
        first = known.get(port["port"], -1) if isinstance(port["port"], str) else port["port"]
        if first <= number <= port.get("endPort", first):
            return True
    return False


@pytest.mark.parametrize(("overlay", "workload"), each())
def test_every_port_is_named_and_somebody_is_let_in(overlay: str, workload: Object) -> None:
    monitored = bool(of_kind(overlay, "PodMonitor"))
    opened = {
        port["port"]
        for policy in of_kind(overlay, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], pod_labels(workload))
        for rule in policy["spec"].get("ingress", [])
        for port in rule["ports"]
    }
    for port in main_container(workload)["ports"]:
        scraped = port["name"] in ("admin", "metrics")  # else only probes ask there, which come from the node
        assert port["name"] in opened or (scraped and not monitored), port["name"]


@pytest.mark.parametrize("overlay", ["gpu", "lws", "prod", "rdma"])
def test_prometheus_finds_every_process_and_shows_the_token(overlay: str) -> None:
    monitors = of_kind(overlay, "PodMonitor")
    for workload in workloads(overlay):
        (monitor,) = (one for one in monitors if selects(one["spec"]["selector"], pod_labels(workload)))
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in {port["name"] for port in main_container(workload)["ports"]}
        if is_ours(workload):
            assert endpoint["authorization"]["credentials"] == {"name": "mooncake-admin", "key": "token"}
            targets = {one["targetLabel"] for one in endpoint["relabelings"]}
            assert {"job", "process"} <= targets


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_what_an_autoscaler_scales_is_there_and_says_no_number_itself(overlay: str) -> None:
    scaled = []
    for one in of_kind(overlay, "HorizontalPodAutoscaler", "ScaledObject"):
        target = one["spec"]["scaleTargetRef"]
        (workload,) = (
            found
            for found in workloads(overlay)
            if (found["kind"], found["metadata"]["name"]) == (target["kind"], target["name"])
        )
        assert "replicas" not in workload["spec"]
        scaled.append(target["name"])
    assert len(set(scaled)) == len(scaled)
    for workload in workloads(overlay):
        if workload["kind"] != "DaemonSet" and workload["metadata"]["name"] not in scaled:
            assert workload["spec"]["replicas"] >= 1


@pytest.mark.parametrize("overlay", ["prod", "rdma"])
def test_an_autoscaler_that_hears_no_wish_takes_nothing_away(overlay: str) -> None:
    for one in of_kind(overlay, "ScaledObject"):
        for trigger in one["spec"]["triggers"]:
            assert trigger["metadata"]["ignoreNullValues"] == "false"  # KEDA's default takes no answer for 0


@pytest.mark.parametrize("overlay", ["gpu", "prod", "rdma"])
def test_traces_and_the_live_page_s_questions_get_to_the_monitoring_namespace(overlay: str) -> None:
    monitoring = [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}]
    for workload in filter(is_ours, workloads(overlay)):
        let_out = {
            port["port"]
            for policy in of_kind(overlay, "NetworkPolicy")
            if selects(policy["spec"]["podSelector"], pod_labels(workload))
            for rule in policy["spec"].get("egress", [])
            if rule["to"] == monitoring
            for port in rule["ports"]
        }
        assert let_out == (set() if component(workload) == "store" else {9090, 4317, 4318})


def test_the_autoscaler_asks_for_a_metric_that_the_planner_has() -> None:
    from conductor import planner  # noqa: F401 - the package is there

    queries = [
        trigger["metadata"]["query"]
        for one in of_kind("prod", "ScaledObject")
        for trigger in one["spec"]["triggers"]
    ]
    source = "\n".join(path.read_text() for path in (DEPLOY.parent / "conductor").glob("*.py"))
    for query in queries:
        name = query.removeprefix("max(").partition("{")[0]
        assert f'"{name}"' in source, name

"""Every word of every command, and every key of every settings file, is one that our processes know."""

from collections.abc import Callable
from typing import Any

import pytest
import typer

from mooncake.core.config_file import parse_config
from mooncake.core.options import SECTIONS
from mooncake.core.options_base import Options
from tests.deploy.conftest import FACTS, flags_of
from tests.deploy.manifests import (
    CLUSTERS,
    NO_POOL,
    Object,
    is_ours,
    main_container,
    named,
    needs_kubectl,
    pod_labels,
    workloads,
)

pytestmark = needs_kubectl
Settings = Callable[[str, Object], Options]
USAGE_ERROR = typer.BadParameter.__mro__[1]
"""Click's, of the copy that typer carries."""


def ours() -> list[Any]:
    return [
        pytest.param(overlay, one, id=f"{overlay}-{one['metadata']['name']}")
        for overlay in CLUSTERS
        for one in workloads(overlay)
        if is_ours(one)
    ]


@pytest.mark.parametrize(("overlay", "workload"), ours())
def test_a_pod_starts_with_settings_that_are_valid(
    overlay: str, workload: Object, settings_of: Settings
) -> None:
    options: Any = settings_of(overlay, workload)
    assert options.admin_port == _port(workload, "admin")
    assert options.address == FACTS["status.podIP"]
    assert options.admin_host == "0.0.0.0"  # also loopback: preStop and port-forward come from there
    if options.section == "gateway":
        assert (options.host, options.port) == ("0.0.0.0", _port(workload, "http"))
        assert options.api_key
    if options.section in ("prefill", "decode"):
        assert options.instance_id == FACTS["metadata.name"]
        assert options.use_pool == (overlay not in NO_POOL)


def _port(workload: Object, name: str) -> int:
    (port,) = (one for one in main_container(workload)["ports"] if one["name"] == name)
    number: int = port["containerPort"]
    return number


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_processes_of_a_cluster_agree(overlay: str, settings_of: Settings) -> None:
    every: list[Any] = [settings_of(overlay, one) for one in workloads(overlay) if is_ours(one)]
    asking = [one for one in every if one.section != "follower"]  # it asks its leader only
    metadata = {getattr(one, "metadata_endpoint", "") or one.metadata for one in asking}
    assert len(metadata) == 1 or overlay != "dev-cpu"
    assert len({one.block_size for one in every if hasattr(one, "block_size")}) == 1
    assert len({one.aggregated for one in every if hasattr(one, "aggregated")}) == 1
    nodes = {one.node for one in every if hasattr(one, "node")}
    assert nodes == {FACTS["spec.nodeName"]}
    shared = {
        one.run_dir.rpartition("/")[2] for one in every if one.section in ("store", "decode", "prefill")
    }
    assert len(shared) == 1


@pytest.mark.parametrize("overlay", CLUSTERS)
def test_the_settings_file_has_no_unknown_key(overlay: str) -> None:
    text = named(overlay, "ConfigMap", "mooncake-config")["data"]["mooncake.yaml"]
    file = parse_config(text, "mooncake.yaml")
    for section in SECTIONS:
        assert file.of(section)[1] == []


@pytest.mark.parametrize(("overlay", "workload"), ours())
def test_the_command_before_the_end_is_one_of_ours_and_asks_the_own_admin_port(
    overlay: str, workload: Object
) -> None:
    flags = flags_of(main_container(workload)["lifecycle"]["preStop"]["exec"]["command"])
    assert flags["url"] == f"http://127.0.0.1:{_port(workload, 'admin')}"


def test_a_word_that_our_commands_do_not_know_is_found() -> None:
    with pytest.raises(USAGE_ERROR, match="No such option"):
        flags_of(["mooncake", "store", "--metadata=tcp://127.0.0.1:7700", "--capacityy=1GiB"])


def test_the_store_has_the_memory_that_its_settings_take(settings_of: Settings) -> None:
    for overlay in CLUSTERS:
        for workload in workloads(overlay):
            if pod_labels(workload)["app.kubernetes.io/component"] != "store":
                continue
            limits = main_container(workload)["resources"]["limits"]
            options: Any = settings_of(overlay, workload)
            room = limits.get("hugepages-2Mi", limits["memory"])
            assert _bytes(room) >= 1.05 * options.capacity_bytes  # the pool's tables, and the process
            assert (options.hugepages == "require") == ("hugepages-2Mi" in limits)


def _bytes(quantity: str) -> int:
    units = {"Mi": 1 << 20, "Gi": 1 << 30}
    return int(quantity[:-2]) * units[quantity[-2:]]

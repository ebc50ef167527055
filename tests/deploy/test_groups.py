"""Engines of several nodes: a group of pods starts, is cut off, and ends as one."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mooncake.core.options_base import Options
from tests.deploy.manifests import (
    GROUPS,
    LWS,
    Object,
    followers,
    leaders,
    main_container,
    needs_kubectl,
    of_kind,
    pod,
    pod_labels,
    selects,
    workloads,
)
from tests.deploy.test_policies import EPHEMERAL, _lets, component
from tests.integration.nodes import TwoNodes

pytestmark = needs_kubectl
Settings = Callable[[str, Object], Options]


def groups() -> Object:
    (found,) = of_kind("lws", GROUPS)
    return found


def test_followers_are_made_before_the_leader_is_ready_as_it_waits_for_them() -> None:
    assert groups()["spec"]["startupPolicy"] == "LeaderCreated"


def test_no_node_of_a_group_is_exchanged_by_itself() -> None:
    assert groups()["spec"]["leaderWorkerTemplate"]["restartPolicy"] == "RecreateGroupOnPodRestart"


def test_leader_and_follower_find_each_other(settings_of: Settings) -> None:
    leader: Any = settings_of("lws", leaders(groups()))
    follower: Any = settings_of("lws", followers(groups()))
    assert leader.nodes == groups()["spec"]["leaderWorkerTemplate"]["size"]
    assert follower.leader == f"engine-0.engine.mooncake:{leader.nodes_port}"
    assert 1 <= follower.node_rank < leader.nodes
    (port,) = (one for one in main_container(leaders(groups()))["ports"] if one["name"] == "nodes")
    assert port["containerPort"] == leader.nodes_port


def test_ranks_are_as_many_as_the_gpus_of_a_group(settings_of: Settings) -> None:
    leader: Any = settings_of("lws", leaders(groups()))
    sizes = dict(word.removeprefix("--").split("=") for word in leader.vllm_args if "-parallel-size" in word)
    ranks = math.prod(map(int, sizes.values()))
    for half in (leaders(groups()), followers(groups())):
        gpus = int(main_container(half)["resources"]["limits"]["nvidia.com/gpu"])
        assert ranks == gpus * leader.nodes


def test_what_is_unproved_is_accepted_in_words_by_both(settings_of: Settings) -> None:
    for half in (leaders(groups()), followers(groups())):
        options: Any = settings_of("lws", half)
        assert options.accept_unauthenticated_nodes
        assert "--accept-unauthenticated-nodes" in main_container(half)["args"]


@pytest.mark.parametrize("port", [7710, EPHEMERAL[0], EPHEMERAL[1]])
def test_the_pods_of_a_group_reach_each_other_and_no_other_groups(port: int) -> None:
    count = groups()["spec"]["replicas"]
    for mine in range(count):
        for other in range(count):
            leader, follower = leaders(groups(), mine), followers(groups(), other)
            assert _lets("lws", leader, follower, port) == (mine == other and port != 7710)
            assert _lets("lws", follower, leader, port) == (mine == other)
            assert _lets("lws", followers(groups(), mine), follower, port) == (mine == other and port != 7710)


def test_a_follower_talks_to_nobody_but_its_group() -> None:
    follower = followers(groups())
    for one in workloads("lws"):
        if one["kind"] != GROUPS:
            for port in (2379, 7710, 8000, EPHEMERAL[0]):
                assert not _lets("lws", follower, one, port), component(one)
                assert not _lets("lws", one, follower, port), component(one)


def test_the_commands_are_those_of_the_test_that_runs_them() -> None:
    """With other values, and what only a pod has: a settings file, and a folder of its own."""
    two = TwoNodes.__new__(TwoNodes)
    two.model, two.apart = Path("m"), True
    two.metadata = two.meeting = 1
    two.admin = {"leader": 2, "follower": 3}
    for name, half in (("leader", leaders(groups())), ("follower", followers(groups()))):
        container = main_container(half)
        pods, tests = container["command"] + container["args"], ["mooncake", *two.commands()[name]]
        assert pods[:2] == tests[:2]
        # CUDA graphs are no matter of CPUs
        assert _flags(pods) - {"--config", "--run-dir", "--no-enforce-eager"} <= _flags(tests)


def _flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def test_one_budget_holds_all_pods_of_all_groups() -> None:
    budgets = [
        one
        for one in of_kind("lws", "PodDisruptionBudget")
        if selects(one["spec"]["selector"], {f"{LWS}/name": "engine"})
    ]
    assert [one["metadata"]["name"] for one in budgets] == ["engine"]


def test_a_follower_has_the_time_of_its_leader_to_go() -> None:
    leader, follower = leaders(groups()), followers(groups())
    key = "terminationGracePeriodSeconds"
    assert pod(leader)[key] == pod(follower)[key]
    assert main_container(leader)["lifecycle"] == main_container(follower)["lifecycle"]


def test_both_run_the_same_image_on_the_same_machine() -> None:
    leader, follower = main_container(leaders(groups())), main_container(followers(groups()))
    assert leader["image"] == follower["image"]
    assert leader["resources"] == follower["resources"]
    assert pod_labels(leaders(groups())) != pod_labels(followers(groups()))

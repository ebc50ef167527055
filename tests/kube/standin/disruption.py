"""How many pods a PodDisruptionBudget lets go now. Pure."""

import math
from typing import Any

from tests.kube.standin.selectors import by_labels

Object = dict[str, Any]


def is_ready(pod: Object) -> bool:
    """Return whether a pod's condition Ready is True."""
    conditions = pod.get("status", {}).get("conditions", [])
    return any(one["type"] == "Ready" and one["status"] == "True" for one in conditions)


def amount(value: int | str, total: int, up: bool) -> int:
    """Return a number or a percentage of `total`, rounded up or down."""
    if isinstance(value, int):
        return value
    share = int(value.removesuffix("%")) * total / 100
    return math.ceil(share) if up else math.floor(share)


def budget_status(budget: Object, pods: list[Object]) -> dict[str, int]:
    """Return the status of a budget. Its pods are expected to be as many as there are now."""
    chosen = [
        pod for pod in pods if by_labels(budget["spec"].get("selector"), pod["metadata"].get("labels", {}))
    ]
    chosen = [pod for pod in chosen if "deletionTimestamp" not in pod["metadata"]]
    healthy = sum(map(is_ready, chosen))
    spec = budget["spec"]
    if "maxUnavailable" in spec:
        wanted = len(chosen) - amount(spec["maxUnavailable"], len(chosen), up=True)
    else:
        wanted = amount(spec.get("minAvailable", 1), len(chosen), up=True)
    return {
        "expectedPods": len(chosen), "currentHealthy": healthy, "desiredHealthy": max(0, wanted),
        "disruptionsAllowed": max(0, healthy - max(0, wanted)),
    }  # fmt: skip


def forbids(pod: Object, pods: list[Object], budgets: list[Object]) -> str:
    """Return which budget forbids to evict a pod, "" if none does. A pod that is not ready may always go."""
    if not is_ready(pod):
        return ""
    for budget in budgets:
        if by_labels(budget["spec"].get("selector"), pod["metadata"].get("labels", {})):
            status = budget_status(budget, pods)
            if status["disruptionsAllowed"] < 1:
                name = budget["metadata"]["name"]
                healthy, wanted = status["currentHealthy"], status["desiredHealthy"]
                return (
                    f"the disruption budget {name}: needs {wanted} healthy pods and has {healthy} currently"
                )
    return ""

"""Which kinds of objects the stand-in knows: what discovery tells, and how a path names one of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Resource:
    """One kind of objects."""

    group: str  # "" = core
    version: str
    plural: str
    kind: str
    short: tuple[str, ...] = ()
    namespaced: bool = True
    subresources: tuple[str, ...] = ()

    @property
    def api_version(self) -> str:
        """As objects carry it."""
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def prefix(self) -> str:
        """Where its API group lives."""
        return f"apis/{self.api_version}" if self.group else f"api/{self.version}"


_SCALED = ("scale", "status")
_ALL = (
    Resource("", "v1", "namespaces", "Namespace", ("ns",), namespaced=False),
    Resource("", "v1", "nodes", "Node", ("no",), namespaced=False, subresources=("status",)),
    Resource("", "v1", "pods", "Pod", ("po",), subresources=("status", "eviction", "log")),
    Resource("", "v1", "services", "Service", ("svc",), subresources=("status",)),
    Resource("", "v1", "configmaps", "ConfigMap", ("cm",)),
    Resource("", "v1", "secrets", "Secret"),
    Resource("", "v1", "serviceaccounts", "ServiceAccount", ("sa",)),
    Resource("", "v1", "events", "Event", ("ev",)),
    Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim", ("pvc",)),
    Resource("apps", "v1", "deployments", "Deployment", ("deploy",), subresources=_SCALED),
    Resource("apps", "v1", "replicasets", "ReplicaSet", ("rs",), subresources=_SCALED),
    Resource("apps", "v1", "statefulsets", "StatefulSet", ("sts",), subresources=_SCALED),
    Resource("apps", "v1", "daemonsets", "DaemonSet", ("ds",), subresources=("status",)),
    Resource("discovery.k8s.io", "v1", "endpointslices", "EndpointSlice"),
    Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget", ("pdb",)),
    # kept, validated where Kubernetes has a schema, and acted upon by nobody here
    Resource("", "v1", "resourcequotas", "ResourceQuota", ("quota",)),
    Resource("", "v1", "limitranges", "LimitRange", ("limits",)),
    Resource("batch", "v1", "jobs", "Job"),
    Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy", ("netpol",)),
    Resource("networking.k8s.io", "v1", "ingresses", "Ingress", ("ing",)),
    Resource("autoscaling", "v2", "horizontalpodautoscalers", "HorizontalPodAutoscaler", ("hpa",)),
    Resource("rbac.authorization.k8s.io", "v1", "roles", "Role"),
    Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding"),
    Resource("scheduling.k8s.io", "v1", "priorityclasses", "PriorityClass", ("pc",), namespaced=False),
    Resource("monitoring.coreos.com", "v1", "podmonitors", "PodMonitor"),
    Resource("monitoring.coreos.com", "v1", "servicemonitors", "ServiceMonitor"),
    Resource("monitoring.coreos.com", "v1", "prometheusrules", "PrometheusRule"),
    Resource("keda.sh", "v1alpha1", "scaledobjects", "ScaledObject"),
    Resource("leaderworkerset.x-k8s.io", "v1", "leaderworkersets", "LeaderWorkerSet", ("lws",)),
)
RESOURCES = {one.plural: one for one in _ALL}
"""By plural name, which is unique among them."""
WORKLOADS = ("deployments", "statefulsets", "daemonsets", "replicasets")
CRD_GROUPS = frozenset({"monitoring.coreos.com", "keda.sh", "leaderworkerset.x-k8s.io"})
"""Kubernetes itself has no schema of these."""


def groups() -> dict[str, str]:
    """Return API group -> its version; the core group is not among them."""
    return {one.group: one.version for one in _ALL if one.group}

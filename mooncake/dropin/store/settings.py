"""Settings of `mooncake.store`: those of `setup`, and those that a master has for all who join it.

Upstream's names mean here:

    master_server_addr   HOST:PORT of `mooncake_master`, or etcd://...: where stores and directories register
    metadata_server      accepted and not used: stores say themselves where their memory is
    global_segment_size  memory that this process gives to the pool; 0 = none, it only uses the pool
    local_buffer_size    accepted and not used: nothing is staged
    enable_ssd_offload   the segment has an SSD tier below it, see mooncake.dropin.store.offload
    enable_client_http_server, client_http_port   see mooncake.dropin.client.http
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import msgspec
import structlog

from kvstore.store.config import EVICT_RATIO, StoreConfig
from mooncake.core.config import fail
from mooncake.core.metadata_open import check_metadata
from mooncake.dropin.engine.env import FALSE, TRUE
from mooncake.dropin.store.offload import Offload

SEGMENT_BYTES = 16 << 20
BUFFER_BYTES = 16 << 20
MASTER = "127.0.0.1:50051"
PROTOCOL = "tcp"
TENANT = "default"
CLIENT_HTTP_PORT = 9300
"""Upstream's defaults of the dict form."""
MASTER_KEY = "mooncake/master"
"""Where a master says what its flags are: a JSON object of MasterSettings."""
QUOTAS_KEY = "mooncake/quotas"
"""Where it says what tenants may have, for stores that join: a JSON object of bytes by tenant."""
SEGMENT_TTL_S = 5.0
"""A process whose interpreter is busy for so long is no dead one; upstream waits 10 s."""
AGE_NEVER_S = 86_400.0
"""Of blocks that go to the SSD only when memory runs short."""
PROTOCOLS = ("tcp", "rdma", "")
OTHER_NAMES = {"master_server_address": "master_server_addr", "device_name": "rdma_devices"}
"""What LMCache calls settings of the dict form; not to know them would mean the default master."""

_UNITS = "bkmgt"
_SIZE = re.compile(r"(-?[0-9]+(?:[.][0-9]+)?) *([bkmgt]?)i?b?")
log = structlog.get_logger(__name__)


class MasterSettings(msgspec.Struct, frozen=True):
    """What clients have to know of a master's flags."""

    kv_lease_ttl_s: float = 10.0
    soft_pin_ttl_s: float = 1800.0
    client_ttl_s: float = SEGMENT_TTL_S
    evict_above_ratio: float = 1.0
    evict_ratio: float = EVICT_RATIO
    evict_soft_pins: bool = True
    offload: bool = False
    offload_on_evict: bool = False
    ssd_reads: int = 1
    multi_tenants: bool = False

    def tuned(self, config: StoreConfig) -> StoreConfig:
        """Return `config` with what a master has to say about it."""
        return msgspec.structs.replace(
            config,
            evict_above_ratio=self.evict_above_ratio,
            evict_ratio=self.evict_ratio,
            evict_soft_pins=self.evict_soft_pins,
            quota_needed=self.multi_tenants,
            ssd_age_s=AGE_NEVER_S if self.offload_on_evict else config.ssd_age_s,
            ssd_reads=self.ssd_reads,
        )


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """Arguments of setup, checked."""

    local_hostname: str
    metadata_server: str
    global_segment_size: int = SEGMENT_BYTES
    local_buffer_size: int = BUFFER_BYTES
    protocol: str = PROTOCOL
    rdma_devices: str = ""
    master_server_addr: str = MASTER
    tenant_id: str = TENANT
    enable_ssd_offload: bool = False
    ssd_offload_path: str = ""
    enable_client_http_server: bool = False
    client_http_port: int = CLIENT_HTTP_PORT

    def __post_init__(self) -> None:
        """Refuse settings that cannot work.

        Raises:
            ConfigError: names the setting and its value.
        """
        for name in ("local_hostname", "metadata_server"):
            if not getattr(self, name):
                raise fail(name, "", "it must be given")
        for name in ("global_segment_size", "local_buffer_size"):
            if getattr(self, name) < 0:
                raise fail(name, getattr(self, name), "must not be negative")
        if self.protocol not in PROTOCOLS:
            raise fail("protocol", self.protocol, "tcp or rdma")
        if not 0 <= self.client_http_port < 1 << 16:
            raise fail("client_http_port", self.client_http_port, "a port, 0 to 65535")
        self.offload  # noqa: B018 - raises

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Settings":
        """Return the settings of the dict form; sizes may be texts like "16MB".

        Raises:
            ConfigError: one is missing or wrong. Names that mean nothing here are logged.
        """
        known: dict[str, Any] = {}
        named = {OTHER_NAMES[name]: value for name, value in values.items() if name in OTHER_NAMES}
        named.update((name, value) for name, value in values.items() if name not in OTHER_NAMES)
        for name, value in named.items():
            if name in ("global_segment_size", "local_buffer_size"):
                known[name] = size_bytes(name, value)
            elif name in ("enable_ssd_offload", "enable_client_http_server"):
                known[name] = _truth(name, value)
            elif name == "client_http_port":
                known[name] = size_bytes(name, value)
            elif name in cls.__struct_fields__:
                known[name] = str(value)
            elif value not in (None, "", False, "false", "False", "0", 0):
                log.warning("mooncake.store: a setting that means nothing here", setting=name)
        missing = [name for name in ("local_hostname", "metadata_server") if name not in known]
        if missing:
            raise fail(missing[0], "", "it must be given")
        return cls(**known)

    @property
    def master(self) -> str:
        """The address of the metadata store, as core.metadata_open has it.

        Raises:
            ConfigError: it is no address.
        """
        text = self.master_server_addr or MASTER
        return check_metadata(text if "://" in text else f"tcp://{text}")

    @property
    def offload(self) -> Offload | None:
        """Where the segment's SSD tier may be; None: nobody named a place.

        Raises:
            ConfigError: a setting of it, or of the environment, makes no sense.
        """
        return Offload.of(self.enable_ssd_offload, self.ssd_offload_path, os.environ)

    @property
    def tenant(self) -> str:
        """Whose names ours are; the default tenant's need no label."""
        return "" if self.tenant_id in ("", TENANT) else self.tenant_id


def size_bytes(name: str, value: Any) -> int:
    """Return a size that is a number, or a text with a unit: "16MB", "1.5 gb"; 1 KB = 1024 bytes as upstream.

    Raises:
        ConfigError: it is neither.
    """
    match = _SIZE.fullmatch(str(value).strip().lower())
    if match is None or isinstance(value, bool):
        raise fail(name, value, "a number of bytes, or a text like 16MB or 1.5GB")
    unit = 1024 ** _UNITS.index(match[2])
    # a float has 53 bits: whole numbers stay whole
    return int(float(match[1]) * unit) if "." in match[1] else int(match[1]) * unit


def _truth(name: str, value: Any) -> bool:
    text = str(value).strip().lower()
    if text not in TRUE + FALSE + ("none",):
        raise fail(name, value, "true or false")
    return text in TRUE


def node_of(hostname: str) -> str:
    """Return the name of the store node of the client that calls itself `hostname`, "host:port"."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", hostname).lstrip("._-")[:63]


def segment_name(node: str) -> str:
    """Return the hostname of the client whose store node is `node`; another node's own name."""
    return re.sub(r"-(\d{1,5})$", r":\1", node)

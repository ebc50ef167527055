"""`mooncake.mooncake_config`: where a store joins, from a JSON file or the environment, as upstream's.

| field | environment | default |
|---|---|---|
| local_hostname | MOONCAKE_LOCAL_HOSTNAME | in a file required, else localhost |
| metadata_server | MOONCAKE_TE_META_DATA_SERVER | in a file required, else P2PHANDSHAKE |
| master_server_address | MOONCAKE_MASTER | required |
| global_segment_size | MOONCAKE_GLOBAL_SEGMENT_SIZE | 3355443200 |
| local_buffer_size | MOONCAKE_LOCAL_BUFFER_SIZE | 1073741824 |
| protocol | MOONCAKE_PROTOCOL | tcp |
| device_name | MOONCAKE_DEVICE | all |
| tenant_id | MOONCAKE_TENANT_ID | default |
| enable_ssd_offload | MOONCAKE_OFFLOAD_ENABLED | false |
| ssd_offload_path | MOONCAKE_OFFLOAD_FILE_STORAGE_PATH | |
| enable_client_http_server | MOONCAKE_ENABLE_CLIENT_HTTP_SERVER | false |
| client_http_port | MOONCAKE_CLIENT_HTTP_PORT | 9300 |

MOONCAKE_CONFIG_PATH names the file; it goes before all others. What the settings do here is in docs/store.md.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from mooncake.core.config import fail
from mooncake.core.errors import ConfigError
from mooncake.dropin.store.settings import size_bytes

DEFAULT_GLOBAL_SEGMENT_SIZE = 3355443200
DEFAULT_LOCAL_BUFFER_SIZE = 1073741824
CLIENT_HTTP_PORT = 9300
CONFIG_ENV = "MOONCAKE_CONFIG_PATH"
ENV = {
    "local_hostname": "MOONCAKE_LOCAL_HOSTNAME",
    "metadata_server": "MOONCAKE_TE_META_DATA_SERVER",
    "global_segment_size": "MOONCAKE_GLOBAL_SEGMENT_SIZE",
    "local_buffer_size": "MOONCAKE_LOCAL_BUFFER_SIZE",
    "protocol": "MOONCAKE_PROTOCOL",
    "device_name": "MOONCAKE_DEVICE",
    "master_server_address": "MOONCAKE_MASTER",
    "enable_ssd_offload": "MOONCAKE_OFFLOAD_ENABLED",
    "ssd_offload_path": "MOONCAKE_OFFLOAD_FILE_STORAGE_PATH",
    "tenant_id": "MOONCAKE_TENANT_ID",
    "enable_client_http_server": "MOONCAKE_ENABLE_CLIENT_HTTP_SERVER",
    "client_http_port": "MOONCAKE_CLIENT_HTTP_PORT",
}
REQUIRED = ("local_hostname", "metadata_server", "master_server_address")
SIZES = {
    "global_segment_size": DEFAULT_GLOBAL_SEGMENT_SIZE,
    "local_buffer_size": DEFAULT_LOCAL_BUFFER_SIZE,
}
SWITCHES = ("enable_ssd_offload", "enable_client_http_server")
TEXTS_OR_NULL = {"ssd_offload_path": "", "tenant_id": "default"}
YES = ("true", "1", "yes", "on", "enable")
NO = ("false", "0", "no", "off", "disable", "")

log = structlog.get_logger(__name__)


@dataclasses.dataclass
class MooncakeConfig:
    """Settings of a store, checked; names as in the table above."""

    local_hostname: str
    metadata_server: str
    global_segment_size: int
    local_buffer_size: int
    protocol: str
    device_name: str | None
    master_server_address: str
    enable_ssd_offload: bool = False
    ssd_offload_path: str = ""
    tenant_id: str = "default"
    enable_client_http_server: bool = False
    client_http_port: int = CLIENT_HTTP_PORT

    def __post_init__(self) -> None:
        """Refuse what cannot work.

        Raises:
            ConfigError: names the field and its value.
        """
        if not isinstance(self.protocol, str) or not self.protocol.strip():
            raise fail("protocol", self.protocol, "a text like tcp or rdma")
        self.protocol = self.protocol.strip().lower()
        for name in SIZES:
            if getattr(self, name) < 0:
                raise fail(name, getattr(self, name), "must not be negative")
        for name in REQUIRED:
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise fail(name, value, "must be given")
        if not 0 <= self.client_http_port <= 65535:
            raise fail("client_http_port", self.client_http_port, "a port, 0 to 65535")

    @staticmethod
    def from_file(file_path: str) -> "MooncakeConfig":
        """Read a JSON object with the fields above; sizes may be texts like "16MB".

        Raises:
            ConfigError: no such file, no JSON object, or a field is missing or wrong.
        """
        try:
            values = json.loads(Path(file_path).read_bytes())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{file_path}: {error}: a JSON object is needed") from error
        if not isinstance(values, dict):
            raise ConfigError(f"{file_path}: a JSON object is needed, not {type(values).__name__}")
        for name in REQUIRED:
            if name not in values:
                raise ConfigError(f"{file_path}: {name} is missing")
        unknown = [name for name in values if name not in ENV]
        if unknown:
            log.warning("mooncake_config: fields that mean nothing here", file=file_path, fields=unknown)
        try:
            return _config(values)
        except ConfigError as error:
            raise ConfigError(f"{file_path}: {error}") from error

    @staticmethod
    def load_from_env() -> "MooncakeConfig":
        """Read the file that MOONCAKE_CONFIG_PATH names or, without that, the variables above.

        Raises:
            ConfigError: neither it nor MOONCAKE_MASTER is set, or a value is wrong.
        """
        path = os.environ.get(CONFIG_ENV)
        if path is not None:
            return MooncakeConfig.from_file(path)
        values = {name: os.environ[variable] for name, variable in ENV.items() if variable in os.environ}
        if not values.get("master_server_address"):
            raise ConfigError(f"neither {CONFIG_ENV} nor {ENV['master_server_address']} is set: set one")
        try:
            return _config({"local_hostname": "localhost", "metadata_server": "P2PHANDSHAKE"} | values)
        except ConfigError as error:
            raise ConfigError(f"environment (MOONCAKE_*): {error}") from error


def _config(given: Mapping[str, Any]) -> MooncakeConfig:
    values = {"protocol": "tcp", "device_name": ""} | {name: given[name] for name in ENV if name in given}
    for name, default in SIZES.items():
        values[name] = size_bytes(name, values.get(name, default))
    for name in SWITCHES:
        values[name] = _switch(name, values.get(name, False))
    for name, text in TEXTS_OR_NULL.items():
        values[name] = text if values.get(name) is None else str(values[name])
    try:
        values["client_http_port"] = int(values.get("client_http_port", CLIENT_HTTP_PORT))
    except (TypeError, ValueError):
        raise fail("client_http_port", values["client_http_port"], "a port, 0 to 65535") from None
    return MooncakeConfig(**values)


def _switch(name: str, value: Any) -> bool:
    if isinstance(value, int | float):
        return bool(value)
    text = "" if value is None else str(value).strip().lower()
    if text not in YES + NO:
        raise fail(name, value, f"one of {', '.join(YES)}, or {', '.join(filter(None, NO))}")
    return text in YES

"""One text names a metadata store: the embedded one of a Conductor, or etcd.

tcp://127.0.0.1:7700, ipc://PATH      the embedded store, served by a MetadataServer
etcd://..., etcds://...               an etcd cluster, see metadata_etcd_options
"""

from mooncake.core.metadata import MetadataStore
from mooncake.core.metadata_client import RemoteMetadata
from mooncake.core.metadata_etcd import EtcdMetadata
from mooncake.core.metadata_etcd_options import is_etcd, parse_etcd
from mooncake.core.rpc import check_endpoint


def check_metadata(text: str) -> str:
    """Return `text` if `open_metadata` takes it.

    Raises:
        ConfigError: it names no metadata store, or one that must not be used so.
    """
    if is_etcd(text):
        options = parse_etcd(text)  # files that are missing are found at the start
        options.ssl_context()
        if options.user:
            options.password()
        return text
    return check_endpoint(text)


def open_metadata(text: str) -> MetadataStore:
    """Return a client of the store that `text` names; connecting is lazy.

    Raises:
        ConfigError: see check_metadata.
    """
    check_metadata(text)
    return EtcdMetadata(parse_etcd(text)) if is_etcd(text) else RemoteMetadata(text)

"""`mooncake.dataproto_catalog`: which stored batch holds which rows; see docs/structured.md."""

from mooncake.dropin.structured.catalog import DataProtoCatalog
from mooncake.dropin.structured.catalog_transfer import DataProtoCatalogTransfer

__all__ = ["DataProtoCatalog", "DataProtoCatalogTransfer"]

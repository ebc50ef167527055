"""The file of tenants on disk."""

import os
from collections.abc import Mapping

from conductor.tenants import Tenants, parse_tenants
from mooncake.core.config_file import read_text


def read_tenants(path: str, environ: Mapping[str, str] | None = None) -> Tenants:
    """Return what a file of tenants says; "" = no file, nobody is limited.

    `environ`: where the keys are that the file names; None = this process's.

    Raises:
        ConfigError: it cannot be read, or something in it is wrong.
    """
    if not path:
        return Tenants()
    return parse_tenants(read_text(path, "tenants"), os.environ if environ is None else environ, path)

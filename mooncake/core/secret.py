"""The shared secret of the cluster: whoever has it belongs to it. Only the environment names it."""

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from mooncake.core.errors import ConfigError

SECRET_ENV = "MOONCAKE_SECRET"
SECRET_FILE_ENV = "MOONCAKE_SECRET_FILE"
SECRET_BYTES_MIN = 16
SECRET_BYTES_MAX = 4096


def read_secret(env: Mapping[str, str]) -> bytes:
    """Return the shared secret: MOONCAKE_SECRET, or the contents of MOONCAKE_SECRET_FILE; b"" = none.

    Raises:
        ConfigError: both are set, the file cannot be read, or the secret is too short. It is not shown.
    """
    text, path = env.get(SECRET_ENV, ""), env.get(SECRET_FILE_ENV, "")
    if text and path:
        raise ConfigError(f"{SECRET_ENV} and {SECRET_FILE_ENV} are both set: choose one")
    secret = text.encode()
    if path:
        try:
            with Path(path).open("rb") as file:
                secret = file.read(SECRET_BYTES_MAX + 1).strip()
        except OSError as error:
            raise ConfigError(f"{SECRET_FILE_ENV} = {path!r}: {error}") from error
    if (secret or path) and not SECRET_BYTES_MIN <= len(secret) <= SECRET_BYTES_MAX:
        raise ConfigError(
            f"{SECRET_FILE_ENV if path else SECRET_ENV}: {len(secret)} bytes, a secret has "
            f"{SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}"
        )
    return secret


@lru_cache(1)
def cluster_secret() -> bytes:
    """Return this process's secret, b"" = none; read once. Raises as `read_secret`."""
    return read_secret(os.environ)

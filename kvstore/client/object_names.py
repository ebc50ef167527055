"""Names of objects become keys here, and only here. Pure.

A block of KV is called by its 32-byte key, which commits to tenant, model and tokens (mooncake.core.keys).
Anything else has a name of any length; its key is a hash that commits to the tenant as well, under a label
that no KV key is made with, so that a name can never answer for a block or for another tenant's name.
"""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

from mooncake.core.errors import RequestError
from mooncake.core.keys import KEY_BYTES

if TYPE_CHECKING:
    from hashlib import _Hash

LABEL = b"mooncake-object-1"
TENANTS_KEPT = 1_024
"""Beginnings of the hash that are kept: a copy costs a third of beginning anew."""


def object_key(name: str | bytes, tenant: str = "") -> bytes:
    """Return the key of the object called `name`: text and its UTF-8 bytes are one name.

    Raises:
        RequestError: text that has no UTF-8.
    """
    try:
        begun = _begun(tenant).copy()
        begun.update(name.encode() if isinstance(name, str) else name)
    except UnicodeEncodeError as error:
        raise RequestError(f"name {name!r}: {error}") from error
    return begun.digest()


@lru_cache(TENANTS_KEPT)
def _begun(tenant: str) -> "_Hash":
    raw = tenant.encode()
    # the length comes first: no tenant and name spell another tenant's
    return sha256(LABEL + len(raw).to_bytes(4, "little") + raw)


def keys_of(names: Sequence[str | bytes], tenant: str = "") -> list[bytes]:
    """Return `key_of` each, quicker. Raises as it."""
    begun = _begun(tenant)
    keys = []
    for name in names:
        if isinstance(name, str):
            digest = begun.copy()
            try:
                digest.update(name.encode())
            except UnicodeEncodeError as error:
                raise RequestError(f"name {name!r}: {error}") from error
            keys.append(digest.digest())
        else:
            keys.append(key_of(name, tenant))
    return keys


def key_of(name: str | bytes, tenant: str = "") -> bytes:
    """Return `name` if it is a key, that is 32 bytes; else `object_key`. Raises as it."""
    if isinstance(name, bytes) and len(name) == KEY_BYTES:
        return name
    return object_key(name, tenant)

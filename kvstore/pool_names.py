"""Names of objects become keys here, and only here. Pure.

A block of KV is called by its 32-byte key, which commits to tenant, model and tokens (mooncake.core.keys).
Anything else has a name of any length; its key is a hash that commits to the tenant as well, under a label
that no KV key is made with, so that a name can never answer for a block or for another tenant's name.
"""

from hashlib import sha256

import msgspec

from mooncake.core.errors import RequestError
from mooncake.core.keys import KEY_BYTES

LABEL = b"mooncake-object-1"


def object_key(name: str | bytes, tenant: str = "") -> bytes:
    """Return the key of the object called `name`: text and its UTF-8 bytes are one name.

    Raises:
        RequestError: text that has no UTF-8.
    """
    try:
        raw = name.encode() if isinstance(name, str) else name
        # two byte strings in msgpack: no name of one tenant spells one of another
        return sha256(LABEL + msgspec.msgpack.encode((tenant.encode(), raw))).digest()
    except UnicodeEncodeError as error:
        raise RequestError(f"name {name!r}: {error}") from error


def key_of(name: str | bytes, tenant: str = "") -> bytes:
    """Return `name` if it is a key, that is 32 bytes; else `object_key`. Raises as it."""
    if isinstance(name, bytes) and len(name) == KEY_BYTES:
        return name
    return object_key(name, tenant)

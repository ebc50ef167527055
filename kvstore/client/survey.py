"""What all stores of the pool have: where copies are, and what objects are called. Every store is asked."""

from kvstore.client.access import Access
from kvstore.client.members import Members
from kvstore.client.model import BATCH_KEYS_MAX, Place
from kvstore.client.object_names import object_key
from mooncake.core.errors import MooncakeError
from mooncake.core.keys import KEY_BYTES


def places(members: Members, keys: list[bytes], end_s: float) -> list[list[Place]]:
    """See Pool.places."""
    found: list[list[Place]] = [[] for _ in keys]
    for access in list(members.stores.values()):
        try:
            _add_places(access, keys, end_s, found)
        except MooncakeError as error:
            members.lost(access, error)
            raise
    return found


def _add_places(access: Access, keys: list[bytes], end_s: float, found: list[list[Place]]) -> None:
    record = access.record
    for at in range(0, len(keys), BATCH_KEYS_MAX):
        look = access.find(keys[at : at + BATCH_KEYS_MAX], end_s)
        for row, (offset, size) in enumerate(zip(look.offsets, look.sizes, strict=True), at):
            if size:
                address = record.segment_address + offset if offset >= 0 else 0
                found[row].append(Place(record.node, record.transfer, size, address, offset >= 0))


def names(members: Members, tenant: str, end_s: float) -> list[str]:
    """See Pool.names."""
    found: dict[str, None] = {}
    for access in list(members.stores.values()):
        try:
            _add_names(access, tenant, end_s, found)
        except MooncakeError as error:
            members.lost(access, error)
            raise
    return list(found)


def _add_names(access: Access, tenant: str, end_s: float, found: dict[str, None]) -> None:
    cursor = 0
    while True:
        page = access.names(cursor, end_s)
        for at, raw in enumerate(page.names):
            key = page.keys[KEY_BYTES * at : KEY_BYTES * (at + 1)]
            if object_key(raw, tenant) == key:  # of this tenant, and no other name's
                found[raw.decode("utf-8", "replace")] = None
        cursor = page.cursor
        if not cursor:
            return

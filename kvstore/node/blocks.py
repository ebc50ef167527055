"""What a store node keeps of a block in each of its states. Pure."""

import msgspec

from kvstore.node.tags import Tags
from mooncake.core.messages import Block


class Write(msgspec.Struct, frozen=True, gc=False):
    """A block that is being written; everything that is known of it until it is complete."""

    ticket: int
    writer: str
    key: bytes
    offset: int
    size_bytes: int
    expires_s: float
    tags: Tags
    depth: int | None
    below: int | None


class Entry(Block, frozen=True, gc=False):
    """A complete block. There may be millions: nothing in here that only some of them need."""

    since_s: int
    """When it was committed: whole seconds, so that many share one number. Readers on a wire skip it."""


class Held(msgspec.Struct, gc=False):
    """A block that is leased; `hidden` once it was dropped meanwhile."""

    key: bytes
    entry: Entry
    leases: int = 0
    hidden: bool = False
    below: int = -1
    """The most blocks that a reader asked for after it."""

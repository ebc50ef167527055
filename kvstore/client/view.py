"""Leased bytes where they lie."""

import time
from collections.abc import Sequence
from typing import Self

from kvstore.client.local import LocalStore
from kvstore.client.model import Look


class Views:
    """`views[i]` are the bytes of `keys[i]`, read-only, or None. Release it, or use it as a context.

    Bytes are guaranteed until `expires_s` (time.monotonic) or `release`; the memory itself stays mapped as
    long as a view is held, but its contents may change after that.
    """

    def __init__(self, rows: int, expires_s: float) -> None:
        """Made by Pool.view."""
        self.views: list[memoryview | None] = [None] * rows
        self.expires_s = expires_s
        self._held: list[tuple[LocalStore, Look]] = []

    def add(self, access: LocalStore, look: Look, rows: Sequence[int], verify: bool) -> None:
        """Take what `look` has leased, for these rows; what does not verify is left out and reported."""
        self._held.append((access, look))
        for at, (row, view) in enumerate(zip(rows, access.views(look), strict=True)):
            if view is None:
                continue
            if verify and not look.is_sound(at, (view,)):
                access.report_bad(look, at)
            else:
                self.views[row] = view

    def release(self) -> None:
        """Give the leases back (idempotent)."""
        held, self._held = self._held, []
        for access, look in held:
            access.release(look)

    @property
    def left_s(self) -> float:
        """How long the bytes stay."""
        return max(0.0, self.expires_s - time.monotonic()) if self._held else 0.0

    def __len__(self) -> int:
        return len(self.views)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.release()

"""How a copy is cut into pieces, and which path carries which piece. Pure."""

import heapq
from collections.abc import Sequence


def cut(size_bytes: int, piece_bytes: int) -> list[tuple[int, int]]:
    """Cut `size_bytes` into pieces of `piece_bytes`; a rest of at most a quarter piece joins the last one.

    Returns:
        (offset, size) in order, without gap or overlap; [] for nothing.
    """
    assert piece_bytes > 0
    if size_bytes <= 0:
        return []
    if size_bytes <= piece_bytes:
        return [(0, size_bytes)]
    count, rest = divmod(size_bytes, piece_bytes)
    if rest > piece_bytes // 4:
        count += 1
    ends = [piece_bytes * (i + 1) for i in range(count - 1)] + [size_bytes]
    return [(piece_bytes * i, end - piece_bytes * i) for i, end in enumerate(ends)]


def spread(sizes: Sequence[int], loads: Sequence[int]) -> list[int]:
    """Give every piece to the path that has least to do by then.

    Args:
        sizes: bytes of each piece.
        loads: bytes that each path has to move already; at least one path.

    Returns:
        For each piece the index of its path. The first of equally loaded paths is taken.
    """
    heap = [(load, path) for path, load in enumerate(loads)]
    heapq.heapify(heap)
    chosen = []
    for size in sizes:
        load, path = heap[0]
        chosen.append(path)
        heapq.heapreplace(heap, (load + size, path))
    return chosen

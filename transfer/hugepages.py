"""Which pages a large segment is made of: huge ones where the machine has them, and one line that says why.

Huge pages spare TLB misses of copies, and page tables: 2 MiB of these per GiB and process otherwise.
hugetlb ones are certain but must be set aside (`sysctl vm.nr_hugepages`); transparent ones need nothing
but a kernel that allows them for shared memory, and free memory in whole pieces.

Modes: auto = the best there is; off = plain pages; require = hugetlb pages or no start.
"""

from pathlib import Path

import structlog

from mooncake.core.config import HUGEPAGES
from mooncake.core.errors import ConfigError
from transfer.segment import HUGE_PAGE_BYTES, Pages, Progress, Segment

log = structlog.get_logger(__name__)

POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
SHMEM_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
ADVICE_COUNTS = frozenset({"always", "within_size", "advise", "force"})
"""Values of SHMEM_ENABLED with which MADV_HUGEPAGE has an effect; the others are never and deny."""


def free_huge_bytes() -> int:
    """Return the bytes of 2 MiB pages that are free and promised to nobody."""
    try:
        free, promised = (int((POOL / name).read_text()) for name in ("free_hugepages", "resv_hugepages"))
    except (OSError, ValueError):
        return 0  # a kernel without them
    return max(0, free - promised) * HUGE_PAGE_BYTES


def transparent_allowed() -> bool:
    """Return whether shared memory may get transparent huge pages by MADV_HUGEPAGE."""
    try:
        chosen = SHMEM_ENABLED.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return False
    return chosen in ADVICE_COUNTS


def create_segment(name: str, size_bytes: int, mode: str, progress: Progress | None = None) -> Segment:
    """Return a new segment made of the pages that `mode` (see above) and this machine allow.

    Raises:
        ConfigError: as Segment.create; or mode is `require` and there are not enough huge pages.
    """
    if mode not in HUGEPAGES:
        raise ConfigError(f"hugepages={mode!r}: one of {', '.join(HUGEPAGES)}")
    why = "hugepages=off"
    if mode != "off":
        try:
            segment = _hugetlb(name, size_bytes, progress)
        except ConfigError as error:
            if mode == "require":
                raise ConfigError(f"hugepages=require: {error}") from error
            why = str(error)
        else:
            log.info("segment.pages", pages=Pages.HUGETLB, size_bytes=size_bytes, why=f"hugepages={mode}")
            return segment
    pages = Pages.TRANSPARENT if mode != "off" and transparent_allowed() else Pages.PLAIN
    if mode != "off" and pages is Pages.PLAIN:
        why += f"; {SHMEM_ENABLED} allows no transparent ones"
    segment = Segment.create(name, size_bytes, progress, pages=pages)
    log.info("segment.pages", pages=pages, size_bytes=size_bytes, why=why)
    return segment


def _hugetlb(name: str, size_bytes: int, progress: Progress | None) -> Segment:
    if size_bytes % HUGE_PAGE_BYTES:
        raise ConfigError(f"{size_bytes} bytes are no whole pages of 2 MiB")
    free_bytes = free_huge_bytes()
    if free_bytes < size_bytes:
        raise ConfigError(
            f"{free_bytes >> 20} MiB of 2 MiB pages are free, {size_bytes >> 20} MiB are wanted "
            f"(sysctl vm.nr_hugepages)"
        )
    return Segment.create(name, size_bytes, progress, pages=Pages.HUGETLB)

"""Huge pages for a test, on machines where it may have them."""

import contextlib
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from transfer.hugepages import free_huge_bytes
from transfer.segment import HUGE_PAGE_BYTES

NR_HUGEPAGES = Path("/proc/sys/vm/nr_hugepages")


@contextlib.contextmanager
def more_huge_pages(wanted: int) -> Iterator[None]:
    """Set `wanted` pages more aside for a while; skip where this process may not, or there is no room."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.skip("stores of tests running beside this one would take the pages: run it without -n")
    before = free_huge_bytes()

    def add(pages: int) -> None:
        NR_HUGEPAGES.write_text(str(int(NR_HUGEPAGES.read_text()) + pages))

    try:
        add(wanted)
    except OSError as error:
        pytest.skip(f"vm.nr_hugepages cannot be raised: {error}")
    try:
        if free_huge_bytes() < before + wanted * HUGE_PAGE_BYTES:
            pytest.skip("vm.nr_hugepages was raised, but there is no memory in whole pieces of 2 MiB")
        yield
    finally:
        gc.collect()  # a page that is still mapped would only become a surplus one
        add(-wanted)

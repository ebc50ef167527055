"""Folders of instances that were killed are removed by the next one that starts beside them.

An instance's folder holds its sockets, its counters and what it was told. In pods it lies on the node, in
memory, where nobody else cleans up after a SIGKILL. A lock that the kernel gives back with the process tells
who lives, also across containers, whose process ids say nothing to each other.
"""

import fcntl
import os
import shutil
from pathlib import Path

import structlog

log = structlog.get_logger(__name__)

LOCK = "instance.lock"
"""Folders without one are left alone: they are somebody else's, or a moment old."""


def hold(run_dir: Path) -> int:
    """Mark a folder as in use until this process, and any child that it forks, has ended.

    Returns the lock's descriptor: closing it ends that earlier.
    """
    fresh = run_dir / f"{LOCK}.new"
    descriptor = os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    fresh.rename(run_dir / LOCK)  # never there without being held
    return descriptor


def remove_orphans(parent: Path) -> list[str]:
    """Remove the folders below `parent` that nobody holds any more; return their names."""
    return [path.name for path in sorted(parent.iterdir()) if _removed(path)]


def _removed(path: Path) -> bool:
    if path.is_symlink():
        return False
    try:
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:  # none there, or not ours
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(path)
    except BlockingIOError:
        return False
    except OSError as error:
        log.warning("run_dir.stays", path=str(path), error=str(error))
        return False
    finally:
        os.close(descriptor)
    log.info("run_dir.orphan_removed", path=str(path))
    return True

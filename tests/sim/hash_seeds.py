"""The same program under two hash seeds: what differs then depends on the order of a set."""

import os
import subprocess
import sys


def under_two_hash_seeds(program: str) -> list[str]:
    """Return what it prints under each."""
    return [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": seed},
            check=True,
            capture_output=True,
            text=True,
            timeout=120,
        ).stdout
        for seed in ("1", "2")
    ]

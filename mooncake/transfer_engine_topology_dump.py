"""`mooncake.transfer_engine_topology_dump`: upstream's name of mooncake.topology_dump."""

import sys

from mooncake.topology_dump import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

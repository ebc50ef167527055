"""`mooncake.cli_client`: upstream's name of the `mooncake_client` command."""

import sys

from mooncake.dropin.client.command import main

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())

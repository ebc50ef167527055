"""`python -m mooncake`."""

from mooncake.cli import main

main()

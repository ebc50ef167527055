"""One real client per host, light ones beside it, and their HTTP: for `mooncake.store` and commands."""

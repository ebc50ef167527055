"""The prefix index as a service: upstream Mooncake's indexer API over HTTP, for routers that are not ours."""

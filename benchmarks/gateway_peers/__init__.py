"""What stands before and behind a gateway under test: null engines, plain vLLM, routers, a load client."""

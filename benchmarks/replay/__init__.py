"""`mooncake bench`: real requests, made from a trace, against any endpoint that speaks OpenAI's API."""

"""The KV pool: nodes that own segments of KV blocks, and their clients."""

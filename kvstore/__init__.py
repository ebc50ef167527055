"""The KV pool: nodes that own memory, their policies, and the clients inside engines (DESIGN 6)."""

"""The process around a node: its sockets, its peers, what it copies from them."""

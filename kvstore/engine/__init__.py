"""The pool as an inference engine sees it: blocks in and out of its KV cache, by leases."""

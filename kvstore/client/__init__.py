"""The pool for plain threads: put, get, view and remove objects, wherever their stores are."""

"""A store node as a pure state machine, and what it decides with: allocation, leases, eviction, pins."""

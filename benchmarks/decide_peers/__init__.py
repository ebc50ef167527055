"""Indexes that benchmarks.decide compares with the Conductor's."""

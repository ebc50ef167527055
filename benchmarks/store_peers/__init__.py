"""Stores that benchmarks.store compares with ours."""

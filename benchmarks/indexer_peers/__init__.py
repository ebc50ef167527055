"""Contenders of benchmarks.indexer that run under another Python."""

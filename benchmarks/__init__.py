"""Measurements: `python -m benchmarks.NAME [--quick] [--json FILE]`. Findings go to LOG.md."""

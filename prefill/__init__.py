"""Prefill instances."""

"""Decode instances."""

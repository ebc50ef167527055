"""The transfer engine: segments, and how bytes move between them."""

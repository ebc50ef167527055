"""The transfer engine: memory that other processes can reach, and the ways bytes get there (DESIGN 7)."""

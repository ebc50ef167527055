"""The SSD tier of a store node: a log of segments in one file, and when blocks go there and come back."""

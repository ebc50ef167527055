"""What is behind `mooncake.engine`."""

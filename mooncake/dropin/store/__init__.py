"""What is behind `mooncake.store`."""

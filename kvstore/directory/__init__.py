"""Which stores hold which blocks: soft state that follows the stores' events."""

"""Predicted seconds of prefill, transfer and decode, corrected by what was measured."""


class CostModel:
    """One model for all instances of a model."""

    def prefill_s(self, new_tokens: int, prefix_tokens: int) -> float:
        """Predict the engine time of computing new_tokens after prefix_tokens known ones."""
        raise NotImplementedError

    def observe_prefill(self, new_tokens: int, prefix_tokens: int, seconds: float) -> None:
        """Learn from one measured prefill (engine time without its queue)."""

    def transfer_s(self, size_bytes: int, *, remote: bool) -> float:
        """Predict loading size_bytes from the own node's store, or from another node's."""
        raise NotImplementedError

    def observe_transfer(self, size_bytes: int, seconds: float, *, remote: bool) -> None:
        """Learn from one measured load or hand-over."""

    def tbt_s(self, batch: int, kv_tokens: int) -> float:
        """Predict the time between tokens of a decode batch with kv_tokens in all its contexts."""
        raise NotImplementedError

    def observe_tbt(self, batch: int, kv_tokens: int, seconds: float) -> None:
        """Learn from one measured gap."""

    def output_tokens(self, max_tokens: int) -> int:
        """Predict how many tokens a request with this limit will emit."""
        raise NotImplementedError

    def observe_output(self, tokens: int) -> None:
        """Learn from one finished request."""

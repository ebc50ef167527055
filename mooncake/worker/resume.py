"""Continue a request on another engine exactly where an earlier engine stopped.

A gateway that moves a request sends its original prompt and parameters plus the tokens already
emitted (core.messages.KvParams). Here the engine turns them into *output* tokens of the request
before its first step, as if this engine had produced them: length and stop checks, min_tokens,
penalties, bad words and thinking budgets then hold without any arithmetic. What vLLM cannot know
is restored in three places (each named in the contract test):

(a) `Request`: emitted tokens are appended; prefill stats are dropped (the first engine gave them).
(b) `CachedRequestState` (model runner): emitted tokens join `output_token_ids`, and a seeded
    generator is advanced by the draws that the earlier engine made.
(c) `StructuredOutputManager._create_grammar`: the grammar accepts the emitted tokens.

Not restored: unseeded sampling (fresh randomness: same distribution, other tokens), and a
reasoning parser's "reasoning ended" state inside a grammar.
"""

from typing import Any

import torch
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager
from vllm.v1.worker import gpu_input_batch, gpu_model_runner

from mooncake.worker.params import emitted_of

_INSTALLED = "_mooncake_resume"


def resume_request(request: Request) -> int:
    """Append the emitted tokens as output tokens; return how many."""
    emitted = emitted_of(request.sampling_params)
    if emitted:
        request.append_output_token_ids(emitted)
        request.prefill_stats = None
    return len(emitted)


def advance_generator(generator: torch.Generator, draws: int, device: torch.device, vocab_size: int) -> None:
    """Advance `generator` by the draws that sampling `draws` tokens makes.

    CPU (TopKTopPSampler.forward_cpu): one randint per token. Other devices (random_sample): one
    exponential_ over the vocabulary row per token.
    """
    if device.type == "cpu":
        for _ in range(draws):
            torch.randint(0, 2**31, (1,), generator=generator, dtype=torch.long)
        return
    row = torch.empty(vocab_size, dtype=torch.float32, device=device)
    for _ in range(draws):
        row.exponential_(generator=generator)


def install(vocab_size: int) -> None:
    """Patch the two vLLM classes, once per process."""
    if getattr(StructuredOutputManager, _INSTALLED, False):
        return
    state_class = gpu_input_batch.CachedRequestState
    original_post_init = state_class.__post_init__

    def post_init(self: Any) -> None:
        original_post_init(self)
        # a request that is rebuilt from its own outputs already has them
        emitted = [] if self.output_token_ids else emitted_of(self.sampling_params)
        if not emitted:
            return
        self.output_token_ids = emitted
        if self.generator is not None:
            advance_generator(self.generator, len(emitted), self.generator.device, vocab_size)

    state_class.__post_init__ = post_init
    original_create = StructuredOutputManager._create_grammar

    def create_grammar(self: Any, request: Request) -> Any:
        grammar = original_create(self, request)
        emitted = emitted_of(request.sampling_params)
        if emitted and not grammar.accept_tokens(request.request_id, emitted):
            raise ValueError(f"{request.request_id}: the grammar refuses tokens emitted before the move")
        return grammar

    StructuredOutputManager._create_grammar = create_grammar
    setattr(StructuredOutputManager, _INSTALLED, True)
    assert gpu_model_runner.CachedRequestState is state_class

"""The Conductor's own classes: names of blocks, prefix index, pricing, scheduler, load given back."""

import itertools
import random
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.decide_peers.base import (
    ASKED,
    BLOCK_TOKENS,
    CHURN_KEYS,
    NODES,
    PROMPT_TOKENS,
    SEED,
    Decider,
    Go,
    Tokens,
    holdings,
    path_of,
    tokens_of,
)
from conductor.cluster import ClusterView
from conductor.cost import CostModel
from conductor.index import PrefixIndex
from conductor.plan import Plan, RequestFacts
from conductor.prompt_keys import KeyMemo, PromptKeys
from conductor.scheduler import Scheduler, SchedulerConfig
from mooncake.core.keys import KEY_BYTES, chain
from mooncake.core.messages import InstanceRecord, StoreRecord

ROOT = bytes(32)
QUEUED = 96
"""Requests that are under way: three prefills per instance."""
CHURN_MESSAGES = 4
"""Of stores between two decisions, 64 keys each: 256 blocks come, and as many go."""


def cluster() -> ClusterView:
    """Return 32 instances that prefill and 32 that decode, each with a node and a store of its own."""
    view = ClusterView()
    for number in range(NODES):
        node = f"n{number:02}"
        view.store_up(StoreRecord(node, "e", "tcp://x", "tcp://y", "/fd", 1 << 40, 1, transfer="x:1"))
        record = InstanceRecord(
            instance_id=f"i{number:02}",
            role="prefill" if number % 2 == 0 else "decode",
            epoch="e",
            endpoint=f"inproc://{number}",
            node=node,
            pid=1,
            model="m",
            context_root=ROOT.hex(),
            block_size=BLOCK_TOKENS,
            max_model_len=1 << 20,
            kv_blocks=1 << 17,
            max_num_seqs=256,
            max_num_batched_tokens=8192,
            block_bytes=40 << 20,
            vllm_version="0.32.0",
            context={},
        )
        view.instance_up(0.0, record)
        view.link_up(0.0, record.instance_id)
        view.pulse(0.0, record.instance_id, 0.0)
    return view


class Filled:
    """A PrefixIndex with numbered blocks."""

    def __init__(self, groups: int) -> None:
        """Filled."""
        self.index = PrefixIndex()
        self.draw = random.Random(SEED + 2)
        self.stored: deque[tuple[str, bytes]] = deque()
        asked: dict[int, bytes] = {}
        for group in range(ASKED):
            keys = chain(ROOT, tokens_of(group), BLOCK_TOKENS)
            asked.update(zip(path_of(group, 0), keys, strict=True))
        count = 1 + max(path_of(groups - 1, 9))
        table = np.random.default_rng(SEED).integers(0, 256, (count, KEY_BYTES), np.uint8)
        for number, key in asked.items():
            table[number] = np.frombuffer(key, np.uint8)
        for node, path in holdings(groups):
            self.index.apply(f"n{node:02}", table[path].tobytes(), b"")

    def churn(self) -> None:
        """A node stores new blocks, another one removes what it stored a while ago."""
        node = f"n{self.draw.randrange(NODES):02}"
        fresh = self.draw.randbytes(CHURN_KEYS * KEY_BYTES)
        self.index.apply(node, fresh, b"")
        self.stored.append((node, fresh))
        if len(self.stored) > NODES:
            node, old = self.stored.popleft()
            self.index.apply(node, b"", old)


class Ours(Decider):
    """HASH, MATCH, SCORE; DECIDE for all, and the same in other circumstances.

    FIRST: nobody has sent the prompt before. PACKED: its tokens are no list. CHURN: between events of stores.
    """

    def __init__(self, pool_bytes: int, folder: Path) -> None:
        """See Decider."""
        super().__init__(pool_bytes, folder)
        self.filled = Filled(self.groups)
        self.memo = KeyMemo()
        self.view = cluster()
        self.scheduler = Scheduler(SchedulerConfig(), self.filled.index, CostModel(), self.view)
        self.now_s = itertools.count(1.0, 1e-3)
        draw = random.Random(SEED)
        for number in range(QUEUED):
            keys = [draw.randbytes(KEY_BYTES) for _ in range(100)]
            answer = self.scheduler.on_request(1.0, self.facts(f"q{number}", 12_800, keys))
            assert isinstance(answer, Plan)

    def facts(self, request_id: str, prompt_len: int, keys: Sequence[bytes]) -> RequestFacts:
        """Return what conductor.clients.facts_of makes of a request."""
        return RequestFacts(
            request_id=request_id,
            prompt_len=prompt_len,
            max_tokens=500,
            keys=keys,
            arrival_s=1.0,
            context_root=ROOT.hex(),
            slo_class="default",
        )

    def keys(self, tokens: Sequence[int], memo: KeyMemo | None = None) -> PromptKeys:
        """Return the names of a prompt's blocks."""
        return PromptKeys(ROOT, tokens, BLOCK_TOKENS, self.memo if memo is None else memo)

    def decide(self, keys: Sequence[bytes]) -> Plan:
        """Plan, and give the load back."""
        now_s = next(self.now_s)
        plan = self.scheduler.on_request(now_s, self.facts("r", PROMPT_TOKENS, keys))
        assert isinstance(plan, Plan)
        self.scheduler.release(now_s, plan.prefill_ticket)
        self.scheduler.release(now_s, plan.decode_ticket)
        return plan

    def depth(self, tokens: list[int]) -> int:
        """See Decider."""
        return max(self.filled.index.longest_prefix(self.keys(tokens)).values(), default=0)

    def ready(self, op: str, prompts: list[Tokens]) -> tuple[Go, Go]:
        """See Decider."""
        turn, index = 0, self.filled.index
        asked: Sequence[int] = ()
        keys: Sequence[bytes] = ()
        memo = self.memo

        def before() -> None:
            nonlocal turn, asked, keys, memo
            turn = (turn + 1) % ASKED
            asked = prompts[turn] if op == "PACKED" else prompts[turn].tolist()
            if op == "MATCH":
                keys = list(self.keys(asked))
            elif op == "FIRST":
                memo = KeyMemo()
            elif op == "CHURN":
                for _ in range(CHURN_MESSAGES):
                    self.filled.churn()

        if op == "HASH":
            return lambda: self.keys(asked, KeyMemo())[:], before
        if op == "MATCH":
            return lambda: index.longest_prefix(keys), before
        if op == "SCORE":
            return lambda: self.decide(()), before
        return lambda: self.decide(self.keys(asked, memo)), before

"""The indexer: who is registered, and what is asked. Changes come on one loop, queries from any thread."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog
import zmq.asyncio

from conductor.index import BLOCKS_MAX
from conductor.indexer import endpoints, requests
from conductor.indexer.contexts import Context, Contexts, InstanceHits, RankHits, Tier
from conductor.indexer.follow import Follower, State
from conductor.indexer.hashes import XXH3_SEED, Salt, low64
from conductor.indexer.source import Service, Source
from conductor.indexer.stream import Stream
from mooncake.core.errors import CapacityError, RequestError

log = structlog.get_logger(__name__)

SERVICES_MAX = 1_024
"""Publishers, one for each data-parallel rank: two sockets and a task each."""


class Options(msgspec.Struct, frozen=True):
    """How to index."""

    publishers: str = endpoints.PUBLISHERS
    blocks_max: int = BLOCKS_MAX  # of each context
    seed: int = XXH3_SEED


class Indexer:
    """See the module. Made on the loop that it is to run on."""

    def __init__(self, options: Options) -> None:
        """Empty; raises ConfigError for networks that are none."""
        self._allowed = endpoints.networks(options.publishers)
        self._contexts = Contexts(options.seed, options.blocks_max)
        self._lock = threading.RLock()
        self._zmq = zmq.asyncio.Context()
        self._followers: dict[str, Follower] = {}
        self._leaving: set[str] = set()
        self.queries: Counter[str] = Counter()

    @property
    def lock(self) -> "threading.RLock":
        """Held whenever contexts are read or changed."""
        return self._lock

    @property
    def contexts(self) -> Contexts:
        """All contexts; see `lock`."""
        return self._contexts

    # ------------------------------------------------------------ on the loop

    async def register(self, service: Service) -> bool:
        """Begin to follow a publisher; False = it is followed already.

        Raises:
            RequestError: it conflicts with another registration, or its endpoint is not to be connected to.
            CapacityError: there are too many.
        """
        for endpoint, what in ((service.endpoint, "endpoint"), (service.replay_endpoint, "replay_endpoint")):
            if endpoint:
                self._check(endpoint, what)
        known = self._followers.get(service.key)
        if known is not None:
            if known.stream.source.service == service and service.key not in self._leaving:
                return False
            raise _conflict(f"conflicting registration for service key: {service.key}")
        if any(one.stream.source.service.endpoint == service.endpoint for one in self._followers.values()):
            raise _conflict(f"conflicting active registration for endpoint: {service.endpoint}")
        if len(self._followers) >= SERVICES_MAX:
            raise CapacityError(f"{SERVICES_MAX} publishers are registered: unregister some")
        try:
            with self._lock:
                source = Source(service, self._contexts)
        except RequestError as error:
            raise _conflict(str(error)) from error
        follower = self._followers[service.key] = Follower(
            Stream(source), self._lock, self._zmq, self._allowed
        )
        follower.start()
        log.info("indexer.registered", service=service.key, kind=service.kind, endpoint=service.endpoint)
        return True

    async def unregister(self, key: str) -> bool:
        """Stop to follow, and forget what was told; False = nobody is registered so."""
        follower = self._followers.get(key)
        if follower is None or key in self._leaving:
            return False
        self._leaving.add(key)
        try:
            await follower.close()
        finally:
            self._leaving.discard(key)
            del self._followers[key]
        log.info("indexer.unregistered", service=key)
        return True

    async def close(self) -> None:
        """Stop (idempotent)."""
        await asyncio.gather(*(self.unregister(key) for key in list(self._followers)))
        self._zmq.destroy(linger=0)

    def _check(self, endpoint: str, what: str) -> None:
        try:
            endpoints.check(endpoint, what, self._allowed)
        except RequestError as error:
            raise requests.wrong(str(error), "invalid_value", what) from error

    # ------------------------------------------------------------ from any thread

    def by_tokens(
        self, query: requests.QueryBody | requests.PackedQueryBody
    ) -> tuple[Context | None, dict[str, InstanceHits]]:
        """Return what instances have of a prompt; nothing where the context is unknown.

        Raises:
            RequestError: see packed_tokens.
        """
        packed = requests.packed_tokens(query.token_ids)
        with self._lock:
            found = self._find(query)
            if found is None:
                return None, {}
            context, salt = found
            return context, context.by_tokens(packed, salt, query.instance_id or None)

    def by_hashes(self, query: requests.HashQueryBody) -> tuple[Context | None, dict[str, InstanceHits]]:
        """Return what instances have of the blocks named; raises RequestError, see hashes_of."""
        hashes = [low64(one) for one in requests.hashes_of(query)]
        with self._lock:
            found = self._find(query)
            if found is None:
                return None, {}
            return found[0], found[0].by_hashes(hashes, query.instance_id or None)

    def _find(
        self, query: "requests.QueryBody | requests.PackedQueryBody | requests.HashQueryBody"
    ) -> tuple[Context, Salt] | None:
        requests.check_lora(query)
        found = self._contexts.find(
            query.tenant, query.model, query.lora, query.block_size, query.cache_salt or None
        )
        self.queries["known" if found else "unknown"] += 1
        return found

    def generation(self, context: Context | None) -> int | None:
        """Return in which words a context's publishers were registered; None where nobody was."""
        if context is None or not context.services:
            return None
        told = (self._followers.get(key) for key in list(context.services))
        return 2 if any(one is not None and one.stream.source.service.profile for one in told) else 1

    def global_view(self) -> dict[str, Any]:
        """Return all contexts, as upstream shows them."""
        with self._lock:
            views = [
                {
                    "model_name": key.model, "lora_name": key.lora, "block_size": key.block_size,
                    "tenant_id": key.tenant, "additional_salt": key.salt, "prefix_count": context.blocks(),
                    "hash_profile": requests.shown(context.profile), "instances": context.instances(),
                }
                for key, context in self._contexts.all.items()
            ]  # fmt: skip
        return {"context_count": len(views), "contexts": views}

    def services(self) -> dict[str, Any]:
        """Return all registrations, as upstream shows them, and how each is."""
        shown = [_shown(one) for one in list(self._followers.values())]
        return {"count": len(shown), "services": shown}

    def followers(self) -> Sequence[Follower]:
        """Return who is followed."""
        return list(self._followers.values())

    def states(self) -> Counter[State]:
        """Return how many publishers are in which state."""
        return Counter(one.state for one in list(self._followers.values()))


def _conflict(text: str) -> RequestError:
    return requests.wrong(text, "invalid_registration")


def _shown(follower: Follower) -> dict[str, Any]:
    service, stream = follower.stream.source.service, follower.stream
    return {
        "Endpoint": service.endpoint, "ReplayEndpoint": service.replay_endpoint, "Type": service.kind,
        "ModelName": service.model, "LoraName": service.lora, "TenantID": service.tenant,
        "InstanceID": service.instance, "BlockSize": service.block_size, "DPRank": service.rank,
        "AdditionalSalt": service.salt, "CacheGroup": None,
        "HashProfile": None if service.profile is None else requests.shown(service.profile),
        "State": str(follower.state), "Blocks": len(stream.source), "Gaps": stream.gaps,
        "Lost": stream.lost, "Restarts": stream.restarts, "Undecodable": stream.undecodable,
        "LeftOut": {str(reason): count for reason, count in dict(stream.source.left_out).items() if count},
    }  # fmt: skip


def hits_shown(hits: InstanceHits, generation: int) -> dict[str, Any]:
    """Return one instance's part of an answer."""
    best = hits.best
    gpu_by_rank = {str(rank): of.gpu for rank, of in hits.ranks.items()}
    if generation == 1:
        alone = {tier.upper(): hits.alone[tier] for tier in (Tier.GPU, Tier.CPU, Tier.DISK)}
        return {"longest_matched": best.disk, "DP": gpu_by_rank, **alone}
    return {
        "longest_matched": best.disk, **_three(best), "dp": gpu_by_rank,
        "rank_matches": {str(rank): _three(of) for rank, of in hits.ranks.items()},
    }  # fmt: skip


def _three(hits: RankHits) -> dict[str, int]:
    return {"gpu": hits.gpu, "cpu": hits.cpu, "disk": hits.disk}

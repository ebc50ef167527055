"""vLLM's EngineCoreClient over a cluster: what AsyncLLM believes to be its engine."""

import asyncio
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, NoReturn

from conductor.decode_tail import begin_with_tail, byte_level
from conductor.dispatch import Dispatcher
from conductor.links import LinkState
from conductor.members import ENGINE_SLOTS, Members
from conductor.vllm_seam import (
    EngineCoreClient,
    EngineCoreOutputs,
    EngineCoreRequest,
    Unavailable,
)

UTILITY_S_MAX = 30.0
"""Deadline of a utility call to one engine: cache resets wait for a running step."""


class Resources:
    """What AsyncLLM asks about its engine: a cluster without engines is not dead, it waits."""

    engine_dead = False


class ClusterCoreClient(EngineCoreClient):
    """Requests go through the dispatcher; maintenance calls go to every engine."""

    def __init__(self, dispatcher: Dispatcher, members: Members) -> None:
        self.engine_ranks_managed = list(range(ENGINE_SLOTS))
        self.resources = Resources()
        self._dispatcher = dispatcher
        self._members = members
        self._forget: Callable[[str], object] = lambda _: None
        self._states: Mapping[str, Any] = {}  # of the front end, by request; empty: nothing to make quicker

    def bind(self, llm: Any, fail_requests: Callable[[Any, str, Exception], list[str]]) -> None:
        """Learn of the AsyncLLM over this client, which is made after it."""
        self._dispatcher.fail_request = lambda request_id, error: fail_requests(llm, request_id, error)
        self._forget = lambda request_id: llm.output_processor.abort_requests([request_id], internal=True)
        if byte_level(llm.tokenizer):
            self._states = llm.output_processor.request_states

    # ------------------------------------------------------------ serving

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        """Dispatch; returns without waiting for any engine.

        Raises:
            Unavailable: turned away.
        """
        try:
            self._dispatcher.add(request)
        except Unavailable:
            # AsyncLLM registered it already and does not clean up behind its engine
            self._forget(request.request_id)
            raise
        state = self._states.get(request.request_id)
        if state is not None and request.prompt_token_ids:
            begin_with_tail(state.detokenizer, request.prompt_token_ids)

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        """Abort all legs of these requests; unknown ids are fine."""
        self._dispatcher.abort(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        """Return the next step's outputs of any engine."""
        return await self._dispatcher.outputs.get()

    async def get_supported_tasks_async(self) -> tuple[str, ...]:
        """What a text generation model's engine answers; other routes stay 404 as in vLLM."""
        return ("generate",)

    def dp_engines_running(self) -> bool:
        """Whether anything is in flight."""
        return self._dispatcher.in_flight > 0

    def shutdown(self, timeout: float | None = None) -> None:
        """Refuse from now on; sockets are closed by Members.close."""
        del timeout
        self.resources.engine_dead = True

    # ------------------------------------------------------------ maintenance, on every engine

    async def _call_all(self, method: str, *args: Any) -> list[Any]:
        links = [link for link in self._members.links.values() if link.state is LinkState.UP]
        if not links:
            raise Unavailable(f"{method}: no instance alive", 1.0, HTTPStatus.SERVICE_UNAVAILABLE)
        return list(
            await asyncio.gather(*(link.call(method, *args, deadline_s=UTILITY_S_MAX) for link in links))
        )

    async def reset_mm_cache_async(self) -> None:
        """Clear multi-modal caches; without engines there are none."""
        if self._members.links:
            await self._call_all("reset_mm_cache")

    async def reset_prefix_cache_async(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        """Clear every engine's own prefix cache; the pool is not touched."""
        return all(await self._call_all("reset_prefix_cache", reset_running_requests, reset_connector))

    async def reset_encoder_cache_async(self) -> None:
        """Clear every engine's encoder cache."""
        await self._call_all("reset_encoder_cache")

    async def pause_scheduler_async(self, mode: str = "abort", clear_cache: bool = True) -> None:
        """Pause every engine."""
        await self._call_all("pause_scheduler", mode, clear_cache)

    async def resume_scheduler_async(self) -> None:
        """Resume every engine."""
        await self._call_all("resume_scheduler")

    async def is_scheduler_paused_async(self) -> bool:
        """Whether all engines are paused."""
        return all(await self._call_all("is_scheduler_paused"))

    async def is_sleeping_async(self) -> bool:
        """Engines of a cluster do not sleep: their pool would serve stale blocks."""
        return False

    async def profile_async(
        self,
        is_start: bool = True,
        profile_prefix: str | None = None,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
    ) -> None:
        """Start or stop the profiler of every engine."""
        await self._call_all("profile", is_start, profile_prefix, delay_iterations, max_iterations)

    async def list_loras_async(self) -> set[int]:
        """Return the adapters that every engine has."""
        loaded = [set(result) for result in await self._call_all("list_loras")]
        return set.intersection(*loaded)

    async def get_weight_version_async(self) -> str:
        """Return the weight version, if all engines agree."""
        versions = set(await self._call_all("get_weight_version"))
        if len(versions) != 1:
            _refuse(f"engines report different weight versions: {sorted(map(str, versions))}")
        return str(versions.pop())

    async def sleep_async(self, level: int = 1, mode: str = "abort") -> None:
        """Refused: stop the instance instead, the cluster moves its work."""
        del level, mode
        _refuse("sleep is an operation of one engine: stop the instance instead")

    async def wake_up_async(self, tags: list[str] | None = None) -> bool:
        """Refused, as sleep is."""
        del tags
        _refuse("wake_up is an operation of one engine: start an instance instead")

    async def add_lora_async(self, lora_request: Any) -> bool:
        """Refused: adapters are loaded when an engine starts."""
        del lora_request
        _refuse("adapters are loaded at engine start (--lora-modules): not at run time")

    async def collective_rpc_async(
        self,
        method: str,
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> list[Any]:
        """Refused: arbitrary worker calls do not pass the gateway."""
        del timeout, args, kwargs
        _refuse(f"collective_rpc({method!r}) does not pass the gateway")


def _refuse(message: str) -> NoReturn:
    raise Unavailable(message, 0.0, HTTPStatus.NOT_IMPLEMENTED)

"""What the dispatcher remembers of a request: no behaviour beyond naming and grouping."""

from collections.abc import Sequence
from math import inf

from conductor.http import HttpFate
from conductor.legs import Leg1Result, exact_first, two_legs_possible
from conductor.plan import Leg, Plan, RequestFacts
from conductor.prompt_keys import KeyMemo, PromptKeys
from conductor.quick_metrics import QuickSeries
from conductor.request import PrefillGroup, RequestMachine
from conductor.spans import AnswerTrace
from conductor.terms import DEFAULT_TERMS, Terms
from conductor.vllm_seam import EngineCoreRequest
from mooncake.core.fingerprint import AdapterNames
from mooncake.core.keys import request_root, tail_key

NOT_BEGUN = QuickSeries(())
"""Stands for the series of those that have no token yet."""


class Family:
    """Requests that share one leg 1: the children of an n > 1 request, or one lone request."""

    __slots__ = ("clients", "eids", "family_id", "shared")

    def __init__(self, family_id: str, *, lone: bool) -> None:
        self.family_id = family_id
        self.shared = None if lone else PrefillGroup(family_id)
        self.clients: list[Client] = []
        self.eids: list[str] = []  # of leg 1, one per attempt


class Client:
    """One request of vLLM's front end (a child, when n > 1)."""

    __slots__ = (
        "due_s",
        "eids",
        "emitted",
        "family",
        "fate",
        "first_s",
        "gaps",
        "heard_s",
        "last_s",
        "late_gaps",
        "leg1",
        "leg1_end_s",
        "leg1_node",
        "machine",
        "move_reason",
        "plan",
        "prompt",
        "request",
        "started_s",
        "tbt",
        "tbt_slo_s",
        "told",
        "trace",
        "ttft_slo_s",
        "turned_away",
        "waits",
    )

    def __init__(
        self,
        request: EngineCoreRequest,
        prompt: "Prompt",
        family: Family,
        now_s: float,
        fate: HttpFate | None,
        trace: AnswerTrace | None = None,
    ) -> None:
        self.request = request
        self.prompt = prompt
        self.machine = RequestMachine(prompt.facts, family.shared)  # till its place is known
        self.family = family
        self.fate = fate
        self.trace = trace
        self.plan: Plan | None = None
        self.eids: list[str] = []  # of legs that work for this request alone
        self.emitted: list[int] = []  # tokens the front end has
        self.told = False  # whether it has seen any output, and with it usage and queue times
        self.leg1: Leg1Result | None = None
        self.leg1_end_s = 0.0
        self.leg1_node = ""  # whose store has the prompt's blocks since
        self.started_s = now_s
        self.heard_s = now_s
        self.due_s = now_s  # when its first token was planned to come
        self.first_s = 0.0
        self.last_s = 0.0
        self.ttft_slo_s, self.tbt_slo_s = inf, inf  # as of its first token; inf = none
        self.tbt = NOT_BEGUN  # where its gaps are counted
        self.gaps, self.late_gaps = 0, 0  # between outputs; of these, longer than the objective
        self.move_reason = ""
        self.turned_away = False
        self.waits = False  # for its first plan

    @property
    def names(self) -> dict[str, str]:
        """What log lines call it."""
        return self.prompt.names

    @property
    def slo_class(self) -> str:
        """Name of its class of service: a metric label."""
        return (DEFAULT_TERMS if self.fate is None else self.fate.terms).slo_class.name


class Prompt:
    """A client's request as the policy may know it (an Asked)."""

    __slots__ = (
        "_adapters",
        "_first_token",
        "_memo",
        "_request",
        "_shared",
        "facts",
        "is_sibling",
        "names",
        "started_s",
        "terms",
        "trace",
    )

    def __init__(
        self,
        request: EngineCoreRequest,
        terms: Terms,
        family: Family,
        started_s: float,
        adapters: AdapterNames,
        memo: KeyMemo,
        first_token: bool,
        names: dict[str, str] | None = None,
        trace: str = "",
    ) -> None:
        """`first_token`: whether leg 1's own token may be streamed at all; others: see facts_of and Asked."""
        self.terms = terms
        self.started_s = started_s
        self.names = names or {"request_id": request.external_req_id or request.request_id}
        self.trace = trace
        self._request = request
        self.is_sibling = bool(family.clients)
        self._shared = family.shared is not None
        self._adapters = adapters
        self._memo = memo
        self._first_token = first_token
        self.facts = self.look("", 1)

    @property
    def request_id(self) -> str:
        """See Asked."""
        return str(self._request.request_id)

    @property
    def client_id(self) -> str:
        """See Asked."""
        return self._request.external_req_id or ""

    def look(self, root: str, block_size: int) -> RequestFacts:
        """See Asked."""
        self.facts = facts_of(
            self._request, root, block_size, self._adapters, self._memo,
            first_token=self._first_token, shared=self._shared,
            terms=self.terms, arrival_s=self.started_s,
        )  # fmt: skip
        return self.facts

    def unnamed(self) -> str:
        """See Asked."""
        if self._request.prompt_embeds is not None:
            return "prompt embeddings"
        if self._request.lora_request is not None:
            return "an adapter whose weights cannot be read here"
        return "no tokens"


class Running:
    """One leg an engine works on; `clients` are those it works for (shared with the family)."""

    __slots__ = ("clients", "eid", "instance_id", "leg", "measured")

    def __init__(self, eid: str, leg: Leg, instance_id: str, clients: list[Client]) -> None:
        self.eid = eid
        self.leg = leg
        self.instance_id = instance_id
        self.clients = clients
        self.measured = False


def family_of(request: EngineCoreRequest) -> str | None:
    """Return the parent's id if `request` is a child of an n > 1 request, else None.

    vLLM names children "<index>_<parent id>", and a parent's id starts with the client-visible one
    (ParentRequest.get_child_info, InputProcessor.assign_request_id).
    """
    request_id: str = request.request_id
    index, separator, parent = request_id.partition("_")
    external = request.external_req_id
    if not separator or external is None or not index.isdecimal():
        return None
    if request_id.startswith(external) or not parent.startswith(external):
        return None
    return parent


def facts_of(
    request: EngineCoreRequest,
    context_root: str,
    block_size: int,
    adapters: AdapterNames,
    memo: KeyMemo,
    *,
    first_token: bool,
    shared: bool,
    terms: Terms = DEFAULT_TERMS,
    arrival_s: float,
) -> RequestFacts:
    """Return what the policy may know of `request`.

    Args:
        request: the client's request.
        context_root: hex root of the instances considered; "" = none known.
        block_size: tokens per KV block of these instances.
        adapters: names LoRA adapters as the engines do; one it cannot name leaves the request without keys.
        memo: keys of prompts that came before.
        first_token: whether leg 1's own token may be streamed at all.
        shared: siblings share leg 1 (n > 1).
        terms: what it asks of its service.
        arrival_s: when it came (monotonic).
    """
    tokens: Sequence[int] = request.prompt_token_ids or ()
    params = request.sampling_params
    max_tokens = params.max_tokens if params is not None and params.max_tokens is not None else 1
    single = not two_legs_possible(request) or max_tokens == 1
    keys: Sequence[bytes] = ()
    tail: bytes | None = None
    lora = None if request.lora_request is None else adapters.name_of(request.lora_request)
    named = request.lora_request is None or lora is not None
    if context_root and tokens and named:
        root = request_root(bytes.fromhex(context_root), request.cache_salt, lora)
        keys = PromptKeys(root, tokens, block_size, memo)
        tail = None if keys else tail_key(root, tokens)
    return RequestFacts(
        request_id=request.request_id,
        prompt_len=len(tokens),
        max_tokens=max_tokens,
        keys=keys,
        tail_key=tail,
        arrival_s=arrival_s,
        ttft_slo_s=terms.ttft_slo_s,
        tbt_slo_s=terms.tbt_slo_s,
        context_root=context_root,
        single_leg=single,
        first_token=first_token and not single and exact_first(request, 2 if shared else 1),
        session=terms.affinity,
        tenant=terms.tenant,
        slo_class=terms.slo_class.name,
    )

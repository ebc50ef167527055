"""What a request asks of its service: class, tenant and objectives, from its headers and its body. Pure.

    x-slo-class           premium | interactive | default | batch
    x-slo-ttft-ms         objective of time to first token (the name llm-d uses)
    x-slo-tpot-ms         objective of time between tokens (the same)
    x-slo-job-ms          batch: the answer is worth something until so long after its arrival
    x-session-id          its conversation: instances that served it last are preferred, all else equal;
                          without it, prompt_cache_key of the OpenAI API, in the body, says the same
                          (vLLM's session_id, in the body, comes before that)
    x-program-id          the run of an agent that it is a turn of (or program_id in the body); without it,
                          its session; see conductor.programs
    x-cache-ttl-s         for how long its context is worth keeping (or cache_ttl_s in the body)
    x-mooncake-tenant     whose work it is; a name, no authentication: let your ingress set it

    service_tier          of OpenAI's API, in the body: the class of a request without x-slo-class (TIERS)
    priority              vLLM's, in the body or its header: lower goes first, among those of one class

A header that makes no sense is the client's mistake (400), never ignored. A class above what its tenant may
have is lowered, as OpenAI lowers tiers, and the answer says so.
"""

from collections.abc import Iterable
from hashlib import sha256

import msgspec

from mooncake.core.errors import RequestError

CLASS_HEADER = b"x-slo-class"
TTFT_HEADER = b"x-slo-ttft-ms"
TPOT_HEADER = b"x-slo-tpot-ms"
JOB_HEADER = b"x-slo-job-ms"
TENANT_HEADER = b"x-mooncake-tenant"
SESSION_HEADER = b"x-session-id"
PROGRAM_HEADER = b"x-program-id"
TTL_HEADER = b"x-cache-ttl-s"
MARKS = (
    b'"prompt_cache_key"', b'"service_tier"', b'"session_id"', b'"program_id"', b'"cache_ttl_s"', b'"tools"'
)  # fmt: skip
"""A body without any of them says nothing here: most bodies are not read twice."""
OWN_MAX = 49
"""Of a request's own priority, which stays within its class: those of engines lie CLASS_STEP apart."""
CLASS_STEP = 100
TTL_S_MAX = 24 * 3600.0
"""Of a context: as stores have it for pins; what is given is bounded again (conductor.programs)."""
MS_MAX = 7 * 24 * 3600 * 1000
"""A week: an objective beyond it is a mistake."""
NAME_CHARS_MAX = 128
"""Of a tenant or a session: names are kept, so they are short."""


class SloClass(msgspec.Struct, frozen=True):
    """One class of service. `rank`: lower goes first; `priority`: vLLM's, lower goes first.

    tier: what OpenAI's API calls it. sheddable: it runs in what others leave idle, and may be given up for
    a request of a lower rank when the queue is full.
    """

    name: str
    rank: int
    priority: int
    tier: str
    sheddable: bool


CLASSES = {
    one.name: one
    for one in (
        SloClass("premium", 0, -2 * CLASS_STEP, "priority", False),
        SloClass("interactive", 1, -CLASS_STEP, "priority", False),
        SloClass("default", 2, 0, "default", False),
        SloClass("batch", 3, CLASS_STEP, "flex", True),
    )
}
"""As FastServe-like systems divide them; objectives are the operator's and the request's, not the class's."""

TIERS = {"priority": "premium", "default": "default", "standard_only": "default", "flex": "batch"}
"""Classes of service tiers; of `auto`, and of `scale` (what was bought in advance), it is the tenant's own.
`standard_only` is what Anthropic's API calls its default."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Objectives that are None are those of the Conductor's configuration.

    asked: the class it asked for, where its tenant may not have it. says_class: it has x-slo-class; tier: the
    service_tier it asks for. priority: its own, within its class; may_rise: that may be below 0, because its
    tenant may have a better class anyway.

    tools, cache_ttl_s: its answer may call tools; for how long it wants its context kept. since_s: when the
    first turn of its program came, once that is known. See conductor.programs.
    """

    slo_class: SloClass = CLASSES["default"]
    asked: str = ""
    says_class: bool = False
    tier: str = ""
    priority: int = 0
    may_rise: bool = True
    tenant: str = ""
    session: str = ""
    program: str = ""
    tools: bool = False
    cache_ttl_s: float | None = None
    since_s: float | None = None
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    job_s: float | None = None

    @property
    def affinity(self) -> str:
        """Key of what it belongs to: no two tenants have one in common; "" = nothing."""
        return f"{self.tenant}\n{self.session}" if self.session else ""  # names have no line breaks

    @property
    def run(self) -> str:
        """Key of the agent's run it is a turn of, as `affinity`: its conversation's, if nobody says one."""
        return f"{self.tenant}\n\n{self.program}" if self.program else self.affinity

    @property
    def engine_priority(self) -> int:
        """What vLLM is told: its class, then its own; among equals engines ask who came first."""
        return self.slo_class.priority + self.priority

    def bounded(self, highest: SloClass) -> "Terms":
        """Return these terms, with no better class than `highest`."""
        may_rise = self.slo_class.rank > highest.rank
        if self.slo_class.rank >= highest.rank:
            return self if may_rise == self.may_rise else msgspec.structs.replace(self, may_rise=may_rise)
        return msgspec.structs.replace(self, slo_class=highest, asked=self.slo_class.name, may_rise=False)

    def ranked(self, priority: int) -> "Terms":
        """Return these terms with what the request says of its priority, as far as it counts."""
        own = max(-OWN_MAX if self.may_rise else 0, min(priority, OWN_MAX))
        return self if own == self.priority else msgspec.structs.replace(self, priority=own)


DEFAULT_TERMS = Terms()


def terms_of(headers: Iterable[tuple[bytes, bytes]]) -> Terms:
    """Return what the headers (names in lower case, as ASGI gives them) ask for.

    Raises:
        RequestError: names the header, what it says and what it may say.
    """
    found = {name: value.decode("latin-1").strip() for name, value in headers if name in _HEADERS}
    if not found:
        return DEFAULT_TERMS
    name = found.get(CLASS_HEADER, "default").lower()
    if name not in CLASSES:
        raise RequestError(f"{CLASS_HEADER.decode()}: {name[:40]!r}: one of {', '.join(CLASSES)}")
    return Terms(
        slo_class=CLASSES[name],
        says_class=CLASS_HEADER in found,
        tenant=_name(found, TENANT_HEADER),
        session=_name(found, SESSION_HEADER),
        program=_name(found, PROGRAM_HEADER),
        cache_ttl_s=_ttl_s(found),
        ttft_slo_s=_seconds(found, TTFT_HEADER),
        tbt_slo_s=_seconds(found, TPOT_HEADER),
        job_s=_seconds(found, JOB_HEADER),
    )


class Said(msgspec.Struct):
    """What a JSON body says of the service it wants."""

    prompt_cache_key: str | None = None
    service_tier: str | None = None
    session_id: str | None = None
    program_id: str | None = None
    cache_ttl_s: float | None = None
    tools: msgspec.Raw = msgspec.Raw()


def said_in(body: bytes) -> Said:
    """Return what a body says; what is wrong with one, vLLM tells the client: here it says nothing."""
    if not any(mark in body for mark in MARKS):
        return NOTHING_SAID
    try:
        return msgspec.json.decode(body, type=Said)
    except msgspec.MsgspecError:
        return NOTHING_SAID


NOTHING_SAID = Said()


def with_body(terms: Terms, said: Said) -> Terms:
    """Return `terms` with a body's session and class, where the headers name none; not bounded again."""
    session = terms.session or _short(said.session_id or said.prompt_cache_key or "")
    program = terms.program or _short(said.program_id or "")
    ttl_s, tools = terms.cache_ttl_s, len(said.tools) > len(b"null")
    if ttl_s is None and said.cache_ttl_s is not None and 0 < said.cache_ttl_s <= TTL_S_MAX:
        ttl_s = said.cache_ttl_s
    if (session, program, ttl_s, tools) != (terms.session, terms.program, terms.cache_ttl_s, terms.tools):
        terms = msgspec.structs.replace(
            terms, session=session, program=program, cache_ttl_s=ttl_s, tools=tools
        )
    if not said.service_tier:
        return terms
    terms = msgspec.structs.replace(terms, tier=said.service_tier)
    wanted = None if terms.says_class else TIERS.get(said.service_tier)
    return terms if wanted is None else msgspec.structs.replace(terms, slo_class=CLASSES[wanted], asked="")


_HEADERS = frozenset((
    CLASS_HEADER, TTFT_HEADER, TPOT_HEADER, JOB_HEADER, TENANT_HEADER, SESSION_HEADER, PROGRAM_HEADER,
    TTL_HEADER,
))  # fmt: skip


def _short(name: str) -> str:
    """Return a name of a body's: clients may put anything there."""
    if len(name) > NAME_CHARS_MAX or not name.isprintable():
        return sha256(name.encode(errors="replace")).hexdigest()
    return name


def _name(found: dict[bytes, str], header: bytes) -> str:
    name = found.get(header, "")
    if len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise RequestError(f"{header.decode()}: up to {NAME_CHARS_MAX} printable characters")
    return name


def _ttl_s(found: dict[bytes, str]) -> float | None:
    text = found.get(TTL_HEADER)
    if text is None:
        return None
    try:
        ttl_s = float(text)
    except ValueError:
        ttl_s = -1.0
    if not 0 < ttl_s <= TTL_S_MAX:
        raise RequestError(f"{TTL_HEADER.decode()}: {text[:40]!r}: seconds above 0, up to {TTL_S_MAX:.0f}")
    return ttl_s


def _seconds(found: dict[bytes, str], header: bytes) -> float | None:
    text = found.get(header)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= MS_MAX:  # also refuses NaN
        raise RequestError(f"{header.decode()}: {text[:40]!r}: milliseconds above 0, up to {MS_MAX}")
    return value / 1000

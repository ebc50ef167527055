"""What a request asks of its service: class, tenant and objectives, from its HTTP headers. Pure.

    x-slo-class           premium | interactive | default | batch
    x-slo-ttft-ms         objective of time to first token (the name llm-d uses)
    x-slo-tpot-ms         objective of time between tokens (the same)
    x-slo-job-ms          batch: the answer is worth something until so long after its arrival
    x-session-id          its conversation: instances that served it last are preferred, all else equal;
                          without it, prompt_cache_key of the OpenAI API, in the body, says the same
    x-mooncake-tenant     whose work it is; a name, no authentication: let your ingress set it

A header that makes no sense is the client's mistake (400), never ignored.
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
CACHE_KEY = b'"prompt_cache_key"'
MS_MAX = 7 * 24 * 3600 * 1000
"""A week: an objective beyond it is a mistake."""
NAME_CHARS_MAX = 128
"""Of a tenant or a session: names are kept, so they are short."""


class SloClass(msgspec.Struct, frozen=True):
    """One class of service. `rank`: lower goes first; `priority`: vLLM's, lower goes first.

    sheddable: may be given up for a request of a lower rank when the queue is full.
    """

    name: str
    rank: int
    priority: int
    sheddable: bool


CLASSES = {
    one.name: one
    for one in (
        SloClass("premium", 0, -2, False),
        SloClass("interactive", 1, -1, False),
        SloClass("default", 2, 0, False),
        SloClass("batch", 3, 1, True),
    )
}
"""As FastServe-like systems divide them; objectives are the operator's and the request's, not the class's."""


class Terms(msgspec.Struct, frozen=True, kw_only=True):
    """Objectives that are None are those of the Conductor's configuration."""

    slo_class: SloClass = CLASSES["default"]
    tenant: str = ""
    session: str = ""
    ttft_slo_s: float | None = None
    tbt_slo_s: float | None = None
    job_s: float | None = None

    @property
    def affinity(self) -> str:
        """Key of what it belongs to: no two tenants have one in common; "" = nothing."""
        return f"{self.tenant}\n{self.session}" if self.session else ""  # names have no line breaks


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
        tenant=_name(found, TENANT_HEADER),
        session=_name(found, SESSION_HEADER),
        ttft_slo_s=_seconds(found, TTFT_HEADER),
        tbt_slo_s=_seconds(found, TPOT_HEADER),
        job_s=_seconds(found, JOB_HEADER),
    )


class _Body(msgspec.Struct):
    prompt_cache_key: str | None = None


def with_cache_key(terms: Terms, body: bytes) -> Terms:
    """Return `terms` with the prompt_cache_key of a JSON body as session, if they name none.

    What is wrong with a body, vLLM tells the client: here it only has no key.
    """
    if terms.session or CACHE_KEY not in body:
        return terms
    try:
        key = msgspec.json.decode(body, type=_Body).prompt_cache_key
    except msgspec.MsgspecError:
        return terms
    if key and (len(key) > NAME_CHARS_MAX or not key.isprintable()):
        key = sha256(key.encode()).hexdigest()  # clients may put anything there
    return msgspec.structs.replace(terms, session=key) if key else terms


_HEADERS = frozenset((CLASS_HEADER, TTFT_HEADER, TPOT_HEADER, JOB_HEADER, TENANT_HEADER, SESSION_HEADER))


def _name(found: dict[bytes, str], header: bytes) -> str:
    name = found.get(header, "")
    if len(name) > NAME_CHARS_MAX or not name.isprintable():
        raise RequestError(f"{header.decode()}: up to {NAME_CHARS_MAX} printable characters")
    return name


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

"""Tenants: who they are, which share of a busy cluster is theirs, and how much they may ask for. Pure.

    weight      of the work that is done while requests wait (conductor.waiting)
    quotas      of requests and of tokens per second, each a token bucket, and of requests at once
    class       of requests that do not say one
    highest     class a request may have: what asks for a better one is lowered
    keys        whoever shows one is this tenant, whatever else is said

A tenant is a name: that of the key shown, else that of the header, else "". Names that are not listed have
the entry `default`, each for itself. Tokens are those of the prompt and, as long as the answer is not over,
its expected length; then what it really took is settled, so a bucket may go below 0 and the rate still holds.
"""

import tomllib
from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import msgspec

from conductor.plan import Reason, Rejection
from conductor.terms import (
    CLASSES,
    NAME_CHARS_MAX,
    NOTHING_SAID,
    TENANT_HEADER,
    Terms,
    said_in,
    terms_of,
    with_body,
)
from mooncake.core.errors import ConfigError, RequestError

OTHER = "other"
"""Metric label of all that are not listed: how many labels there are is the operator's choice."""
BURST_S = 10.0
"""A bucket holds what its rate gives in so many seconds, unless said otherwise: a page's requests at once."""
AT_ONCE_RETRY_S = 1.0
"""Told to a tenant that has its number of requests at once: when one ends is not known."""
NAMES_MAX = 4096
"""Names that are not listed, remembered at once: of idle ones beyond, the oldest start afresh."""
LISTED_MAX = 1024
"""Entries of a file: each is a metric label."""
KEY_CHARS_MIN = 16
"""As for the gateway's own key: a shorter one can be guessed."""
NUMBER_MIN, NUMBER_MAX = 1e-6, 1e12
"""Of weights and rates: beyond these a Retry-After is no time."""
ROUNDING = 1e-9
"""Of a bucket: who waited as told is not refused for as much."""


class Tenant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry of the file. Rates that are None are not limited; a burst that is None: see BURST_S."""

    weight: float = 1.0
    slo_class: str | None = msgspec.field(name="class", default=None)
    highest: str = "premium"
    requests_per_s: float | None = None
    requests_burst: float | None = None
    tokens_per_s: float | None = None
    tokens_burst: float | None = None
    concurrent: int | None = None
    keys_sha256: list[str] = []
    keys_env: list[str] = []


class Tenants:
    """What a file says; does not change."""

    def __init__(
        self,
        listed: Mapping[str, Tenant] | None = None,
        default: Tenant | None = None,
        keys: Mapping[bytes, str] | None = None,
    ) -> None:
        """`keys`: SHA-256 of a key -> who shows it. Without anything: nobody is limited."""
        self._listed = dict(listed or {})
        self._default = Tenant() if default is None else default
        self._keys = dict(keys or {})

    def __len__(self) -> int:
        return len(self._listed)

    @property
    def keys_env(self) -> list[str]:
        """Names of the environment variables that have keys."""
        return [name for tenant in self._listed.values() for name in tenant.keys_env]

    def of(self, name: str) -> Tenant:
        """Return the entry that holds for `name`."""
        return self._listed.get(name, self._default)

    def label(self, name: str) -> str:
        """Return `name` as a metric label."""
        return name if name in self._listed else OTHER

    def weight(self, name: str) -> float:
        """Return the weight of `name`."""
        return self.of(name).weight

    def of_key(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Return whose key the headers show; None: nobody's here."""
        if not self._keys:
            return None
        shown = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = shown.partition(b" ")
        return self._keys.get(sha256(key.strip()).digest()) if scheme.lower() == b"bearer" else None

    def terms_of(self, headers: Iterable[tuple[bytes, bytes]]) -> Terms:
        """Return what the headers ask for, with the tenant its key says and that tenant's class.

        Raises:
            RequestError: a header makes no sense, or names another tenant than the key shown.
        """
        headers = list(headers)
        terms = terms_of(headers)
        owner = self.of_key(headers)
        if owner is not None and terms.tenant not in {"", owner}:
            raise RequestError(f"{TENANT_HEADER.decode()}: not the tenant of the key shown: leave it out")
        name = terms.tenant if owner is None else owner
        tenant = self.of(name)
        if name != terms.tenant:
            terms = msgspec.structs.replace(terms, tenant=name)
        if not terms.says_class:
            own = max(CLASSES[tenant.slo_class or "default"], CLASSES[tenant.highest], key=lambda c: c.rank)
            terms = terms if own is terms.slo_class else msgspec.structs.replace(terms, slo_class=own)
        return self.bound(terms)

    def with_body(self, terms: Terms, body: bytes) -> Terms:
        """Return `terms`, which the headers asked for, with what the body says and its tenant may have."""
        said = said_in(body)
        return terms if said is NOTHING_SAID else self.bound(with_body(terms, said))

    def bound(self, terms: Terms) -> Terms:
        """Return `terms` as far as its tenant may have them."""
        return terms.bounded(CLASSES[self.of(terms.tenant).highest])


# ---------------------------------------------------------------- the file


def parse_tenants(text: str, environ: Mapping[str, str], where: str) -> Tenants:
    """Return what a file of tenants says.

    Args:
        text: TOML: [default] and [tenants.NAME], with the fields of Tenant.
        environ: where the keys are that the file names.
        where: its path, for messages.

    Raises:
        ConfigError: names file, entry and field, and what may stand there; never a key.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:  # tells line and column
        raise ConfigError(f"tenants {where}: no TOML: {error}") from None
    default = _entry(where, "default", content.pop("default", {}))
    tables = content.pop("tenants", {})
    if content:
        raise ConfigError(f"tenants {where}: {next(iter(content))!r}: only [default] and [tenants.NAME]")
    if not isinstance(tables, dict) or len(tables) > LISTED_MAX:
        raise ConfigError(f"tenants {where}: tenants: up to {LISTED_MAX} tables [tenants.NAME]")
    if default.keys_sha256 or default.keys_env:
        raise ConfigError(f"tenants {where}: [default]: keys are those of one tenant: put them there")
    listed: dict[str, Tenant] = {}
    keys: dict[bytes, str] = {}
    for name, table in tables.items():
        entry = f"tenants.{name}"
        if not 0 < len(name) <= NAME_CHARS_MAX or not name.isprintable() or name == OTHER:
            raise ConfigError(
                f"tenants {where}: [{entry}]: a name of 1 to {NAME_CHARS_MAX} printable characters,"
                f" but {OTHER!r}, as metrics call those that are not listed"
            )
        listed[name] = _entry(where, entry, table)
        for digest in _keys(where, entry, listed[name], environ):
            if digest in keys:
                raise ConfigError(f"tenants {where}: [{entry}]: {keys[digest]!r} has the same key")
            keys[digest] = name
    return Tenants(listed, default, keys)


def _entry(where: str, entry: str, table: Any) -> Tenant:
    try:
        tenant = msgspec.convert(table, Tenant)
    except msgspec.ValidationError as error:
        raise ConfigError(f"tenants {where}: [{entry}]: {error}; fields: {', '.join(_FIELDS)}") from None
    for field in ("weight", "requests_per_s", "requests_burst", "tokens_per_s", "tokens_burst", "concurrent"):
        value = getattr(tenant, field)
        if value is not None and not NUMBER_MIN <= value <= NUMBER_MAX:  # also refuses NaN
            advice = f"{NUMBER_MIN:g} to {NUMBER_MAX:g}; without a limit, leave it out"
            raise ConfigError(f"tenants {where}: [{entry}]: {field} = {value}: {advice}")
    for kind in ("requests", "tokens"):
        if getattr(tenant, f"{kind}_burst") is not None and getattr(tenant, f"{kind}_per_s") is None:
            raise ConfigError(f"tenants {where}: [{entry}]: {kind}_burst: say {kind}_per_s as well")
    if tenant.requests_burst is not None and tenant.requests_burst < 1:
        raise ConfigError(f"tenants {where}: [{entry}]: requests_burst: at least 1, or nobody gets in")
    for field, name in (("class", tenant.slo_class), ("highest", tenant.highest)):
        if name is not None and name not in CLASSES:
            raise ConfigError(f"tenants {where}: [{entry}]: {field} = {name!r}: one of {', '.join(CLASSES)}")
    if tenant.slo_class is not None and CLASSES[tenant.slo_class].rank < CLASSES[tenant.highest].rank:
        advice = f"highest = {tenant.highest!r} does not allow it"
        raise ConfigError(f"tenants {where}: [{entry}]: class = {tenant.slo_class!r}: {advice}")
    return tenant


_FIELDS = Tenant.__struct_encode_fields__


def _keys(where: str, entry: str, tenant: Tenant, environ: Mapping[str, str]) -> list[bytes]:
    """Return the SHA-256 of a tenant's keys; the keys themselves are not kept."""
    found = []
    for text in tenant.keys_sha256:
        try:
            digest = bytes.fromhex(text)
        except ValueError:
            digest = b""
        if len(digest) != sha256().digest_size:
            advice = "64 hex digits, of `printf %s KEY | sha256sum`"
            raise ConfigError(f"tenants {where}: [{entry}]: keys_sha256: {advice}")
        found.append(digest)
    for name in tenant.keys_env:
        key = environ.get(name, "")
        if len(key) < KEY_CHARS_MIN:
            advice = f"set it to a key of at least {KEY_CHARS_MIN} characters" if not key else "key too short"
            raise ConfigError(f"tenants {where}: [{entry}]: keys_env: environment variable {name}: {advice}")
        found.append(sha256(key.encode()).digest())
    return found


# ---------------------------------------------------------------- quotas


class Bucket:
    """A token bucket that may go into debt: `rate` per second comes in, up to `burst`."""

    def __init__(self, now_s: float, rate: float, burst: float) -> None:
        """Full."""
        self.rate = rate
        self.burst = burst
        self._level = burst
        self._at_s = now_s

    def wait_s(self, now_s: float, amount: float) -> float:
        """Return when `amount` may be used; what is more than it holds, when it is full."""
        missing = min(amount, self.burst) - self.level(now_s)
        return missing / self.rate if missing > ROUNDING * max(1.0, self.burst, self.rate) else 0.0

    def use(self, now_s: float, amount: float) -> None:
        """Take `amount` out; a negative one is given back."""
        self._level = min(self.burst, self.level(now_s) - amount)
        self._at_s = max(self._at_s, now_s)

    def level(self, now_s: float) -> float:
        """Return what is in it."""
        return min(self.burst, self._level + self.rate * max(0.0, now_s - self._at_s))


class _Use:
    """What one name has used."""

    __slots__ = ("requests", "running", "tokens")

    def __init__(self, now_s: float, tenant: Tenant) -> None:
        self.running = 0
        self.requests = _bucket(now_s, tenant.requests_per_s, tenant.requests_burst)
        self.tokens = _bucket(now_s, tenant.tokens_per_s, tenant.tokens_burst)


def _bucket(now_s: float, rate: float | None, burst: float | None) -> Bucket | None:
    if rate is None:
        return None
    return Bucket(now_s, rate, max(1.0, rate * BURST_S) if burst is None else burst)


class Quotas:
    """Every request admitted ends once (`ended`). Constant work per call."""

    def __init__(self, tenants: Tenants | None = None) -> None:
        """Nobody has used anything."""
        self.tenants = Tenants() if tenants is None else tenants
        self._uses: dict[str, _Use] = {}
        self._running: dict[str, tuple[str, int, int]] = {}  # request -> tenant, tokens of prompt, answer

    def change(self, now_s: float, tenants: Tenants) -> None:
        """The file has changed: what is in buckets stays, up to the new bursts."""
        self.tenants = tenants
        for name, use in self._uses.items():
            fresh = _Use(now_s, tenants.of(name))
            for old, new in ((use.requests, fresh.requests), (use.tokens, fresh.tokens)):
                if old is not None and new is not None:
                    new.use(now_s, new.burst - old.level(now_s))
            use.requests, use.tokens = fresh.requests, fresh.tokens

    def admit(
        self,
        now_s: float,
        request_id: str,
        name: str,
        prompt_tokens: int,
        answer_tokens: int,
        *,
        sibling: bool = False,
    ) -> Rejection | None:
        """Take a request's part of the quotas of `name`, or say when to come again.

        Args:
            now_s: the time.
            request_id: the request's.
            name: its tenant.
            prompt_tokens: of its prompt.
            answer_tokens: its answer is expected to have.
            sibling: another answer to a request that was admitted: never refused.
        """
        tenant = self.tenants.of(name)
        use = self._uses.get(name)
        if use is None:
            self._forget()
            use = self._uses[name] = _Use(now_s, tenant)
        tokens = prompt_tokens + answer_tokens
        if not sibling:
            if found := _over(now_s, tenant, use, tokens):
                kind, wait_s = found
                detail = f"{kind} of tenant {name!r}"
                return Rejection(
                    request_id=request_id, reason=Reason.QUOTA, retry_after_s=wait_s, detail=detail
                )
            if use.requests is not None:
                use.requests.use(now_s, 1)
        if use.tokens is not None:
            use.tokens.use(now_s, tokens)
        use.running += 1
        self._running[request_id] = (name, prompt_tokens, answer_tokens)
        return None

    def ended(self, now_s: float, request_id: str, answer_tokens: int, *, ran: bool) -> int:
        """A request is over, with so many tokens delivered; return what it took. Unknown ones are fine.

        What `ran` not at all takes no tokens; but asking is what a quota of requests counts.
        """
        if request_id not in self._running:
            return 0
        name, prompt_tokens, expected = self._running.pop(request_id)
        taken = prompt_tokens + answer_tokens if ran else 0
        use = self._uses[name]  # who has something running is not forgotten
        use.running -= 1
        if use.tokens is not None:
            use.tokens.use(now_s, taken - prompt_tokens - expected)
        return taken

    def __len__(self) -> int:
        return len(self._running)

    def _forget(self) -> None:
        if len(self._uses) < NAMES_MAX + LISTED_MAX:
            return
        unlisted = [name for name in self._uses if self.tenants.label(name) == OTHER]
        for name in [name for name in unlisted if not self._uses[name].running][: NAMES_MAX // 2]:
            del self._uses[name]


def _over(now_s: float, tenant: Tenant, use: _Use, tokens: int) -> tuple[str, float] | None:
    """Return which quota a request exceeds, and for how long; None: none."""
    if tenant.concurrent is not None and use.running >= tenant.concurrent:
        return f"{tenant.concurrent} requests at once", AT_ONCE_RETRY_S
    waits = []
    if use.requests is not None:
        waits.append((use.requests.wait_s(now_s, 1), f"{tenant.requests_per_s:g} requests/s"))
    if use.tokens is not None:
        waits.append((use.tokens.wait_s(now_s, tokens), f"{tenant.tokens_per_s:g} tokens/s"))
    wait_s, kind = max(waits, default=(0.0, ""))
    return (kind, wait_s) if wait_s > 0 else None

"""Tenants: what a file may say, who a request is counted as, and that nobody gets more than the quota."""

from hashlib import sha256
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conductor.plan import Reason
from conductor.tenants import LISTED_MAX, NAMES_MAX, OTHER, Bucket, Quotas, Tenant, Tenants, parse_tenants
from conductor.tenants_file import read_tenants
from conductor.terms import CLASSES, Terms, said_in, with_body
from mooncake.core.errors import ConfigError, RequestError

KEY = "a-key-of-the-search-team"
FILE = f"""
[default]
requests_per_s = 2

[tenants.search]
weight = 4
class = "interactive"
requests_per_s = 50.5
requests_burst = 100
tokens_per_s = 200000
tokens_burst = 1e6
concurrent = 64
keys_env = ["SEARCH_KEY"]

[tenants."night shift"]
class = "batch"
keys_sha256 = ["{sha256(b"another-key-of-theirs").hexdigest()}"]
"""
ENVIRON = {"SEARCH_KEY": KEY}


def parse(text: str, environ: dict[str, str] = ENVIRON) -> Tenants:
    return parse_tenants(text, environ, "t.toml")


def asked(quotas: Quotas, now_s: float, name: str, prompt: int = 0, answer: int = 0, request_id: str = ""):
    return quotas.admit(now_s, request_id or f"{now_s}/{len(quotas)}", name, prompt, answer)


def limited(**fields) -> Quotas:
    return Quotas(Tenants({"a": Tenant(**fields)}))


# ---------------------------------------------------------------- the file


def test_a_file_says_weights_quotas_classes_and_keys():
    tenants = parse(FILE)
    search = tenants.of("search")
    assert (search.weight, search.slo_class, search.concurrent) == (4.0, "interactive", 64)
    assert (search.requests_per_s, search.requests_burst) == (50.5, 100.0)
    assert (search.tokens_per_s, search.tokens_burst) == (200_000.0, 1_000_000.0)
    assert tenants.of("night shift").slo_class == "batch"
    assert tenants.of("anybody else").requests_per_s == 2.0
    assert [tenants.label(name) for name in ("search", "anybody else", "")] == ["search", OTHER, OTHER]
    assert tenants.keys_env == ["SEARCH_KEY"]


def test_an_empty_file_limits_nobody():
    quotas = Quotas(parse(""))
    assert all(asked(quotas, 0.0, "x", 10**9) is None for _ in range(100))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("[tenants.a]\nweight = \n", "line 2"),
        ("[tenants.a]\nwieght = 2\n", r"\[tenants.a\].*wieght.*weight"),
        ("[tenants.a]\nweight = 'much'\n", r"\[tenants.a\].*weight"),
        ("[tenants.a]\nweight = 0\n", r"\[tenants.a\].*weight = 0"),
        ("[tenants.a]\nrequests_per_s = nan\n", "requests_per_s = nan"),
        ("[tenants.a]\ntokens_per_s = -1\n", "tokens_per_s = -1"),
        ("[tenants.a]\nconcurrent = 1.5\n", "concurrent"),
        ("[tenants.a]\nrequests_per_s = 1\nrequests_burst = 0.5\n", "requests_burst: at least 1"),
        ("[default]\ntokens_burst = 5\n", r"\[default\].*tokens_per_s as well"),
        ("[tenants.a]\nclass = 'gold'\n", r"class = 'gold': one of premium"),
        ("[tenants.a]\nhighest = 'gold'\n", r"highest = 'gold': one of premium"),
        ("[tenants.a]\nclass = 'premium'\nhighest = 'batch'\n", r"highest = 'batch' does not allow it"),
        ("[tenants.other]\n", r"\[tenants.other\]: a name"),
        ("[tenants.'']\n", "a name of 1 to"),
        ("[tenant.a]\n", r"'tenant': only \[default\] and \[tenants.NAME\]"),
        ("tenants = 3\n", "tables"),
        ("tenants.a = 3\n", r"\[tenants.a\].*object"),
        ("[default]\nkeys_env = ['SEARCH_KEY']\n", r"\[default\]: keys"),
        ("[tenants.a]\nkeys_env = ['NOT_THERE']\n", "environment variable NOT_THERE: set it"),
        ("[tenants.a]\nkeys_env = ['SHORT']\n", "SHORT: key too short"),
        ("[tenants.a]\nkeys_sha256 = ['abc']\n", "64 hex digits"),
        ("[tenants]\na.keys_env=['SEARCH_KEY']\nb.keys_env=['SEARCH_KEY']\n", "'a' has the same key"),
        ("".join(f"[tenants.t{n}]\n" for n in range(LISTED_MAX + 1)), f"up to {LISTED_MAX}"),
    ],
)
def test_a_mistake_in_the_file_is_told_with_its_place_and_without_keys(text, named):
    environ = {**ENVIRON, "SHORT": "s3cret"}
    with pytest.raises(ConfigError, match=f"tenants t.toml: .*{named}") as caught:
        parse(text, environ)
    assert not any(key in str(caught.value) for key in environ.values())


@settings(deadline=None)
@given(st.text(max_size=80) | st.binary(max_size=80).map(lambda data: data.decode("latin-1")))
def test_whatever_a_file_has_is_understood_or_refused(text):
    try:
        tenants = parse(text)
    except ConfigError:
        return
    assert tenants.of("anybody").weight > 0


@pytest.mark.parametrize("content", [b"\xff", b"#" * ((1 << 20) + 1), None])
def test_a_file_that_is_no_text_too_long_or_not_there_is_refused(tmp_path, content):
    path = tmp_path / "t.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=str(path)):
        read_tenants(str(path), {})


# ---------------------------------------------------------------- who somebody is


def headers(key: str = "", **named: str) -> list[tuple[bytes, bytes]]:
    shown = [(b"authorization", f"Bearer {key}".encode())] if key else []
    return shown + [(name.replace("_", "-").encode(), value.encode()) for name, value in named.items()]


def test_a_key_names_its_tenant_without_the_header_and_brings_its_class():
    terms = parse(FILE).terms_of(headers(KEY))
    assert terms == Terms(tenant="search", slo_class=CLASSES["interactive"])
    assert parse(FILE).terms_of(headers("another-key-of-theirs")).tenant == "night shift"


def test_a_header_names_the_tenant_where_no_key_does_and_what_a_request_says_of_its_class_wins():
    tenants = parse(FILE)
    assert tenants.terms_of(headers("unknown-key", x_mooncake_tenant="search")).tenant == "search"
    asked = tenants.terms_of(headers(KEY, x_slo_class="default"))
    assert (asked.tenant, asked.slo_class.name) == ("search", "default")
    assert tenants.terms_of(headers(x_mooncake_tenant="stranger")) == Terms(tenant="stranger")
    assert tenants.terms_of(headers()) == Terms()


def test_a_key_is_not_lent_to_another_tenant():
    with pytest.raises(RequestError, match="x-mooncake-tenant"):
        parse(FILE).terms_of(headers(KEY, x_mooncake_tenant="night shift"))
    assert parse(FILE).terms_of(headers(KEY, x_mooncake_tenant="search")).tenant == "search"


@pytest.mark.parametrize("shown", [b"", b"Bearer", b"Basic " + KEY.encode(), KEY.encode(), b"Bearer x\xff"])
def test_what_is_no_key_names_nobody(shown):
    assert parse(FILE).of_key([(b"authorization", shown)]) is None


@pytest.mark.parametrize(
    ("body", "session"),
    [
        (b'{"messages": [], "prompt_cache_key": "chat-7"}', "chat-7"),
        (b'{"messages": [{"prompt_cache_key": "inner"}]}', ""),
        (b'{"prompt_cache_key": 7}', ""),
        (b'{"prompt_cache_key": null}', ""),
        (b'{"prompt_cache_key": ""}', ""),
        (b'["prompt_cache_key"]', ""),
        (b'{"prompt_cache_key": "cut', ""),
        (b"", ""),
    ],
)
def test_prompt_cache_key_is_the_session_of_a_request_that_names_none(body, session):
    assert with_body(Terms(tenant="a"), said_in(body)) == Terms(tenant="a", session=session)
    assert with_body(Terms(session="own"), said_in(body)) == Terms(session="own")


@settings(deadline=None)
@given(st.text(max_size=300))
def test_any_prompt_cache_key_makes_a_session_that_is_short_and_its_own(key):
    try:
        body = msgspec.json.encode({"prompt_cache_key": key})
    except UnicodeEncodeError:  # half a surrogate pair is no JSON of ours
        return
    terms = with_body(Terms(), said_in(body))
    assert bool(terms.session) == bool(key)
    assert len(terms.session) <= 128
    assert terms.session.isprintable()


@settings(deadline=None)
@given(*[st.text(st.characters(categories=["L", "N", "P"]), max_size=3) for _ in range(4)])
def test_affinity_of_two_tenants_is_never_the_same(left, right, key, other):
    mine, theirs = Terms(tenant=left, session=key), Terms(tenant=right, session=other)
    if key and other:
        assert (mine.affinity == theirs.affinity) == ((left, key) == (right, other))
    else:
        assert "" in {mine.affinity, theirs.affinity}


# ---------------------------------------------------------------- classes

BOUNDS = parse(
    """
    [default]
    highest = "default"
    [tenants.any]
    [tenants.inter]
    highest = "interactive"
    [tenants.night]
    class = "batch"
    highest = "batch"
    [tenants.cheap]
    class = "batch"
    """
)


def granted(tenant: str, said: str = "", **fields: object) -> Terms:
    given = headers(x_mooncake_tenant=tenant, **({"x_slo_class": said} if said else {}))
    return BOUNDS.with_body(BOUNDS.terms_of(given), msgspec.json.encode(fields))


@pytest.mark.parametrize(
    ("tenant", "said", "got", "asked_for"),
    [
        ("any", "premium", "premium", ""),
        ("inter", "premium", "interactive", "premium"),
        ("inter", "interactive", "interactive", ""),
        ("inter", "batch", "batch", ""),
        ("night", "premium", "batch", "premium"),
        ("cheap", "", "batch", ""),
        ("cheap", "interactive", "interactive", ""),
        ("nobody's", "premium", "default", "premium"),
        ("nobody's", "", "default", ""),
    ],
)
def test_a_class_above_the_tenant_s_highest_is_lowered_and_known_to_be(tenant, said, got, asked_for):
    terms = granted(tenant, said)
    assert (terms.slo_class.name, terms.asked) == (got, asked_for)


def test_a_tenant_s_highest_class_holds_for_what_says_nothing_too_and_that_is_no_lowering():
    tenants = parse('[tenants.late]\nhighest = "batch"')
    terms = tenants.terms_of(headers(x_mooncake_tenant="late"))
    assert (terms.slo_class.name, terms.asked) == ("batch", "")


@pytest.mark.parametrize(
    ("tier", "tenant", "got"),
    [
        ("priority", "any", "premium"),
        ("priority", "inter", "interactive"),
        ("priority", "night", "batch"),
        ("default", "any", "default"),
        ("default", "cheap", "default"),
        ("default", "night", "batch"),
        ("standard_only", "cheap", "default"),
        ("flex", "any", "batch"),
        ("auto", "any", "default"),
        ("auto", "cheap", "batch"),
        ("scale", "cheap", "batch"),
        ("made up", "cheap", "batch"),
    ],
)
def test_a_service_tier_is_a_class_within_the_tenant_s_bounds(tier, tenant, got):
    terms = granted(tenant, service_tier=tier)
    assert (terms.slo_class.name, terms.tier) == (got, tier)


def test_the_header_beats_the_tier():
    assert granted("any", "interactive", service_tier="flex").slo_class.name == "interactive"


@pytest.mark.parametrize(
    "body", [b'{"service_tier": 7}', b'{"service_tier": null}', b'["service_tier"]', b'{"service_tier']
)
def test_a_tier_that_makes_no_sense_is_vllm_s_to_refuse(body):
    terms = BOUNDS.terms_of(headers(x_mooncake_tenant="cheap"))
    assert BOUNDS.with_body(terms, body) == terms


@pytest.mark.parametrize(
    ("tenant", "said", "priority", "counts"),
    [
        ("any", "", -7, -7),  # it might have a better class: then it may go first in this one
        ("any", "", 7, 7),
        ("any", "", 10**9, 49),
        ("any", "", -(10**9), -49),
        ("any", "premium", -7, 0),
        ("inter", "default", -7, -7),
        ("inter", "premium", -7, 0),
        ("nobody's", "", -7, 0),
        ("nobody's", "", 7, 7),
        ("night", "batch", -1, 0),
    ],
)
def test_a_priority_counts_within_its_class_and_raises_nobody_above_what_the_tenant_may_have(
    tenant, said, priority, counts
):
    assert granted(tenant, said).ranked(priority).priority == counts


@settings(deadline=None)
@given(st.integers(-(2**63), 2**63 - 1), st.sampled_from(sorted(CLASSES)), st.sampled_from(sorted(CLASSES)))
def test_no_priority_goes_before_a_better_class(priority, one, other):
    mine, theirs = (Terms(slo_class=CLASSES[name]).ranked(priority) for name in (one, other))
    if mine.slo_class.rank < theirs.slo_class.rank:
        assert mine.engine_priority < theirs.ranked(-priority).engine_priority


# ---------------------------------------------------------------- quotas


def test_a_burst_is_let_in_then_the_rate_and_who_waits_as_told_is_let_in():
    quotas = limited(requests_per_s=2.0, requests_burst=3.0)
    assert [asked(quotas, 0.0, "a") for _ in range(3)] == [None] * 3
    refused = asked(quotas, 0.0, "a")
    assert (refused.reason, refused.retry_after_s) == (Reason.QUOTA, pytest.approx(0.5, abs=1e-3))
    assert refused.detail == "2 requests/s of tenant 'a'"
    assert asked(quotas, refused.retry_after_s, "a") is None
    assert asked(quotas, refused.retry_after_s, "a") is not None


def test_without_a_burst_said_it_is_ten_seconds_of_the_rate_and_at_least_one_request():
    fast, slow = limited(requests_per_s=2.0), limited(requests_per_s=0.01)
    assert [asked(fast, 0.0, "a") is None for _ in range(21)] == [True] * 20 + [False]
    assert [asked(slow, 0.0, "a") is None for _ in range(2)] == [True, False]


def test_one_tenant_s_quota_is_not_another_s_and_names_that_are_not_listed_have_one_each():
    quotas = Quotas(Tenants({"a": Tenant()}, Tenant(requests_per_s=0.1)))
    assert [asked(quotas, 0.0, name) is None for name in ("x", "x", "y", "", "", "a", "a")] == [
        True, False, True, True, False, True, True,
    ]  # fmt: skip


def test_requests_at_once_are_counted_until_they_end():
    quotas = limited(concurrent=2)
    assert [asked(quotas, 0.0, "a", request_id=name) is None for name in "123"] == [True, True, False]
    quotas.ended(0.0, "1", 0, ran=True)
    quotas.ended(0.0, "1", 0, ran=True)  # once is enough
    quotas.ended(0.0, "3", 0, ran=True)  # was never let in
    assert [asked(quotas, 0.0, "a", request_id=name) is None for name in "45"] == [True, False]


def test_what_an_answer_really_took_is_settled_when_it_is_over():
    quotas = limited(tokens_per_s=10.0, tokens_burst=100.0)
    assert asked(quotas, 0.0, "a", 40, 60, "1") is None
    assert asked(quotas, 0.0, "a", 1, 0).retry_after_s == pytest.approx(0.1)
    assert quotas.ended(0.0, "1", 10, ran=True) == 50  # 50 of the answer's are given back
    assert asked(quotas, 0.0, "a", 20, 30, "2") is None
    assert quotas.ended(0.0, "2", 80, ran=True) == 100  # 50 more than expected: a debt
    assert asked(quotas, 0.0, "a", 10, 0).retry_after_s == pytest.approx(6.0)


def test_what_never_ran_takes_no_tokens():
    quotas = limited(tokens_per_s=1.0, tokens_burst=100.0)
    assert asked(quotas, 0.0, "a", 60, 40, "1") is None
    assert quotas.ended(0.0, "1", 0, ran=False) == 0
    assert asked(quotas, 0.0, "a", 60, 40) is None


def test_a_prompt_longer_than_the_bucket_waits_for_a_full_one_and_is_paid_for_afterwards():
    quotas = limited(tokens_per_s=10.0, tokens_burst=100.0)
    assert asked(quotas, 0.0, "a", 500, 0) is None
    assert asked(quotas, 0.0, "a", 500, 0).retry_after_s == pytest.approx(50.0)
    assert asked(quotas, 50.0, "a", 500, 0) is None


def test_further_answers_to_one_prompt_are_not_refused_but_counted():
    quotas = limited(tokens_per_s=10.0, tokens_burst=100.0, concurrent=1)
    assert quotas.admit(0.0, "0_r", "a", 50, 20) is None
    assert quotas.admit(0.0, "1_r", "a", 0, 20, sibling=True) is None
    assert quotas.admit(0.0, "2_r", "a", 0, 20, sibling=True) is None
    assert len(quotas) == 3
    for name in ("0_r", "1_r", "2_r"):
        quotas.ended(0.0, name, 20, ran=True)
    assert asked(quotas, 0.0, "a", 10, 0).retry_after_s == pytest.approx(2.0)  # of 110, 10 are a debt


def test_a_new_file_keeps_what_was_used_up_to_its_own_burst():
    quotas = limited(requests_per_s=1.0, requests_burst=10.0)
    for _ in range(9):
        assert asked(quotas, 0.0, "a") is None
    quotas.change(0.0, Tenants({"a": Tenant(requests_per_s=1.0, requests_burst=5.0)}))
    assert [asked(quotas, 0.0, "a") is None for _ in range(2)] == [True, False]
    quotas.change(0.0, Tenants({"a": Tenant()}))
    assert asked(quotas, 0.0, "a") is None
    quotas.change(0.0, Tenants({"a": Tenant(concurrent=11)}))  # those running still count
    assert asked(quotas, 0.0, "a").reason is Reason.QUOTA


def test_names_made_up_without_end_take_bounded_room_and_running_ones_are_never_forgotten():
    quotas = Quotas(Tenants({}, Tenant(concurrent=1)))
    assert asked(quotas, 0.0, "runs", request_id="r") is None
    for n in range(2 * (NAMES_MAX + LISTED_MAX)):
        assert asked(quotas, 0.0, f"name {n}", request_id="x") is None
        quotas.ended(0.0, "x", 0, ran=True)
    assert len(quotas._uses) <= NAMES_MAX + LISTED_MAX
    assert asked(quotas, 0.0, "runs") is not None


@given(
    rate=st.floats(0.1, 100),
    burst=st.floats(1, 500),
    asks=st.lists(st.tuples(st.floats(0, 5), st.integers(0, 300), st.integers(0, 300)), max_size=60),
)
@settings(deadline=None)
def test_over_any_time_no_more_than_burst_and_rate_is_let_in_but_for_one_request(rate, burst, asks):
    quotas = limited(tokens_per_s=rate, tokens_burst=burst)
    now_s, taken = 0.0, 0
    for number, (pause_s, prompt, answer) in enumerate(asks):
        now_s += pause_s
        refused = asked(quotas, now_s, "a", prompt, answer, str(number))
        if refused is None:
            # before the last one, all of it had come in; only a prompt beyond the bucket makes a debt
            assert taken + min(prompt + answer, burst) <= burst + rate * now_s + 0.01
            taken += prompt + answer
        else:
            now_s += refused.retry_after_s
            assert asked(quotas, now_s, "a", prompt, answer, f"{number} again") is None
            taken += prompt + answer


@settings(deadline=None)
@given(st.lists(st.tuples(st.floats(-1, 3), st.floats(-5, 5)), max_size=30))
def test_a_bucket_is_never_above_its_burst_even_if_time_seems_to_go_back(steps):
    bucket, now_s = Bucket(0.0, 1.0, 10.0), 0.0
    for pause_s, amount in steps:
        now_s += pause_s
        bucket.use(now_s, amount)
        assert bucket.level(now_s) <= 10.0
        assert bucket.wait_s(now_s, 1.0) >= 0.0


def test_the_documented_example_is_understood():
    page = (Path(__file__).parents[3] / "docs" / "scheduling.md").read_text()
    tenants = parse(page.partition("```toml\n")[2].partition("```")[0])
    assert (tenants.of("search").weight, tenants.of("night shift").tokens_per_s) == (4.0, 20_000.0)
    assert tenants.of("somebody").requests_per_s == 5.0

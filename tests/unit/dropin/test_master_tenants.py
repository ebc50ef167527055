"""With --enable_multi_tenants only tenants with a quota write, none beyond it; nobody pays for another."""

import contextlib
import json

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from mooncake.core.errors import ConfigError
from mooncake.dropin.master.quotas import TENANTS_MAX, read_quotas, write_quotas
from mooncake.dropin.master.shares import divide
from mooncake.store import ReplicateConfig

from .conftest import MasterThread, client
from .master_http import ask, ask_json, until

MB = 1 << 20
QUOTAS = "/api/v1/tenant_quotas"


def write(path, **quotas) -> str:
    write_quotas(str(path), quotas)
    return str(path)


@pytest.fixture
def quotas(tmp_path):
    return tmp_path / "quotas.json"


@pytest.fixture
def strict(quotas):
    """A master with tenants "a", 4 MB, and "default", 2 MB."""
    path = write(quotas, a=4 * MB, default=2 * MB)
    master = MasterThread(enable_multi_tenants=True, tenant_quota_connector_uri=path)
    with contextlib.ExitStack() as stack:
        stack.callback(master.stop)
        master.join = lambda *args, **settings: stack.enter_context(
            contextlib.closing(client(master, *args, **settings))
        )
        yield master


def segments(master) -> list[str]:
    return ask(master, "/get_all_segments")[1].split()


def told(master, tenant: str) -> dict:
    return ask_json(master, f"{QUOTAS}?tenant_id={tenant}")[1]["data"]


# ---------------------------------------------------------------- puts


def test_a_tenant_stays_within_its_quota_and_its_own_oldest_objects_pay(strict) -> None:
    default = strict.join(16 * MB)
    a = strict.join(0, tenant_id="a")
    assert default.put("mine", bytes(MB)) == 0
    assert [a.put(f"k{n}", bytes([n]) * MB) for n in range(8)] == [0] * 8
    assert a.batch_is_exist([f"k{n}" for n in range(8)]) == [0, 0, 0, 0, 1, 1, 1, 1]
    assert default.is_exist("mine") == 1
    assert told(strict, "a")["charged_bytes"] == 4 * MB


def test_a_tenant_that_can_give_nothing_is_told_so(strict) -> None:
    strict.join(16 * MB)
    a = strict.join(0, tenant_id="a")
    pinned = ReplicateConfig()
    pinned.with_hard_pin = True
    assert [a.put(f"k{n}", bytes(MB), pinned) for n in range(5)] == [0, 0, 0, 0, -1700]
    assert a.put("larger than the quota", bytes(5 * MB)) == -1700
    assert a.put_batch(["k5", "k6"], [bytes(MB), bytes(MB)]) == -1700
    assert a.remove("k0", force=True) == 0
    assert a.put("k4", bytes(MB)) == 0


def test_a_tenant_without_a_quota_is_refused(strict) -> None:
    strict.join(16 * MB)
    stranger = strict.join(0, tenant_id="stranger")
    assert stranger.put("k", b"x") == -1701
    assert (stranger.is_exist("k"), stranger.get("k"), stranger.get_size("k")) == (0, b"", -704)


def test_without_the_flag_tenants_are_names_only(master, join) -> None:
    someone = join(tenant_id="someone")
    assert someone.put("k", b"x") == 0
    assert ask_json(master, QUOTAS) == (
        409, {"success": False, "error_code": -1011, "error_message": "UNAVAILABLE_IN_CURRENT_MODE"},
    )  # fmt: skip
    assert ask_json(master, f"{QUOTAS}?tenant_id=a", "PUT")[0] == 409
    assert ask_json(master, f"{QUOTAS}?tenant_id=a", "DELETE")[0] == 409


def test_room_follows_a_tenant_from_one_segment_to_the_others(strict) -> None:
    first = strict.join(8 * MB, tenant_id="a")
    second = strict.join(8 * MB, tenant_id="a")
    here, there = ReplicateConfig(), ReplicateConfig()
    here.preferred_segment, there.preferred_segment = first.get_hostname(), second.get_hostname()
    until(lambda: told(strict, "a")["effective_quota_bytes"] == 4 * MB and len(segments(strict)) == 2)
    told(strict, "a")  # divides the quota, as the master does once a second
    for config, name in ((here, "here"), (there, "there")):
        for n in range(4):
            assert first.put(f"{name} {n}", bytes(MB), config) == 0
            assert told(strict, "a")["charged_bytes"] <= 4 * MB + MB, "more than the quota for a moment only"
    until(lambda: told(strict, "a")["charged_bytes"] <= 4 * MB)
    assert first.is_exist("there 3") == second.is_exist("there 3") == 1


# ---------------------------------------------------------------- HTTP


def test_quotas_are_shown_in_upstream_s_shape(strict) -> None:
    tenant = {
        "tenant_id": "a", "requested_quota_bytes": 4 * MB, "effective_quota_bytes": 0, "charged_bytes": 0,
        "admission_closed": False, "over_quota": False, "has_explicit_policy": True,
    }  # fmt: skip
    default = {**tenant, "tenant_id": "default", "requested_quota_bytes": 2 * MB}
    assert ask_json(strict, QUOTAS) == (200, {"success": True, "data": [tenant, default]})
    assert ask_json(strict, f"{QUOTAS}?tenant_id=a") == (200, {"success": True, "data": tenant})
    missing = {"success": False, "error_code": -704, "error_message": "OBJECT_NOT_FOUND"}
    assert ask_json(strict, f"{QUOTAS}?tenant_id=nobody") == (404, missing)
    assert ask(strict, QUOTAS, "POST")[0] == 404


def test_a_quota_that_is_set_holds_at_once_and_is_in_the_file(strict, quotas) -> None:
    strict.join(16 * MB)
    b = strict.join(0, tenant_id="b")
    assert b.put("k", bytes(MB)) == -1701
    status, answer = ask_json(strict, f"{QUOTAS}?tenant_id=b", "PUT", {"requested_quota_bytes": 3 * MB})
    assert (status, answer["data"]["requested_quota_bytes"], answer["data"]["charged_bytes"]) == (
        200,
        3 * MB,
        0,
    )
    assert answer["data"]["effective_quota_bytes"] == 3 * MB
    assert read_quotas(str(quotas))["b"] == 3 * MB
    assert [b.put(f"k{n}", bytes(MB)) for n in range(3)] == [0] * 3
    assert ask_json(strict, f"{QUOTAS}?tenant_id=b", "PUT", {"requested_quota_bytes": MB})[1]["data"][
        "over_quota"
    ]
    assert b.put("k3", bytes(MB)) == 0
    assert told(strict, "b")["charged_bytes"] == MB, "brought back to its quota"


def test_a_tenant_is_ended_when_it_has_nothing_more(strict, quotas) -> None:
    strict.join(16 * MB)
    a = strict.join(0, tenant_id="a")
    a.put("k", bytes(MB))
    not_empty = {"success": False, "error_code": -1702, "error_message": "TENANT_NOT_EMPTY"}
    assert ask_json(strict, f"{QUOTAS}?tenant_id=a", "DELETE") == (409, not_empty)
    assert a.remove_all(force=True) == 1
    assert ask_json(strict, f"{QUOTAS}?tenant_id=a", "DELETE") == (200, {"success": True, "data": None})
    assert a.put("k", bytes(MB)) == -1701
    assert read_quotas(str(quotas)) == {"default": 2 * MB}
    assert ask_json(strict, f"{QUOTAS}?tenant_id=a", "DELETE")[0] == 404


@pytest.mark.parametrize(
    ("query", "body", "said"),
    [
        ("", {"requested_quota_bytes": 1}, "Missing or invalid tenant_id"),
        ("?tenant_id=", {"requested_quota_bytes": 1}, "Missing or invalid tenant_id"),
        ("?tenant_id=%07", {"requested_quota_bytes": 1}, "Invalid tenant_id"),
        ("?tenant_id=" + "x" * 200, {"requested_quota_bytes": 1}, "Invalid tenant_id"),
        ("?tenant_id=b", {"quota_bytes": 1}, "Tenant quota must be in [1, 2^63 - 1] bytes"),
        ("?tenant_id=b", {"requested_quota_bytes": -1}, "Tenant quota must be in [1, 2^63 - 1] bytes"),
        ("?tenant_id=b", b"nonsense", "Invalid JSON body"),
    ],
)
def test_a_quota_that_makes_no_sense_changes_nothing(strict, quotas, query, body, said) -> None:
    status, answer = ask_json(strict, QUOTAS + query, "PUT", body)
    assert (status, answer["error_code"]) == (400, -600)
    assert said in answer["error_message"]
    assert list(read_quotas(str(quotas))) == ["a", "default"]


def test_the_keys_shown_are_those_of_the_default_tenant_and_all_are_removed(strict) -> None:
    default, a = strict.join(16 * MB), strict.join(0, tenant_id="a")
    default.put("mine", b"x" * 5000)
    a.put("theirs", b"y" * 5000)
    assert ask(strict, "/get_all_keys") == (200, "mine\n")
    assert ask_json(strict, "/query_key?key=mine")[0] == 200
    assert ask_json(strict, "/query_key?key=theirs")[0] == 404
    text = ask(strict, "/metrics")[1]
    assert 'mooncake_tenant_quota_charged_bytes{tenant_id="a"} 8192\n' in text
    assert ask_json(strict, "/api/v1/remove_all", "POST")[1] == {"success": True, "removed_count": 2}


# ---------------------------------------------------------------- the file


def test_the_file_is_upstream_s_in_yaml_or_json(quotas) -> None:
    quotas.write_text('version: 1\ntenants:\n  - name: "a"\n    quota: 10MB\n  - name: b\n    quota: 2000\n')
    assert read_quotas(str(quotas)) == {"a": 10 * MB, "b": 2000}
    quotas.write_text('{"version": 1, "tenants": [{"name": "a", "quota": "1KB"}]}')
    assert read_quotas(str(quotas)) == {"a": 1024}
    quotas.write_text("version: 1\ntenants: []\n")
    assert read_quotas(str(quotas)) == {}


@pytest.mark.parametrize(
    "document",
    [
        [],
        {"tenants": []},
        {"version": 2, "tenants": []},
        {"version": 1},
        {"version": 1, "tenants": {"a": 1}},
        {"version": 1, "tenants": ["a"]},
        {"version": 1, "tenants": [{"quota": 1}]},
        {"version": 1, "tenants": [{"name": "", "quota": 1}]},
        {"version": 1, "tenants": [{"name": "a"}]},
        {"version": 1, "tenants": [{"name": "a", "quota": "much"}]},
        {"version": 1, "tenants": [{"name": "a", "quota": 0}]},
        {"version": 1, "tenants": [{"name": "a", "quota": 1}, {"name": "a", "quota": 2}]},
        {"version": 1, "tenants": [{"name": str(n), "quota": 1} for n in range(TENANTS_MAX + 1)]},
    ],
)
def test_a_file_that_does_not_say_what_it_has_to_is_refused(quotas, document) -> None:
    quotas.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="quota"):
        read_quotas(str(quotas))


@settings(max_examples=20)  # each writes a file to the disk
@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(str.isprintable),
        st.integers(1, 1 << 62),
        max_size=20,
    )
)
def test_what_is_written_is_read(tmp_path_factory, quotas_) -> None:
    path = tmp_path_factory.mktemp("quotas") / "file"
    write_quotas(str(path), quotas_)
    assert read_quotas(str(path)) == quotas_
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_a_file_that_cannot_be_written_says_so(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot be written"):
        write_quotas(str(tmp_path / "none" / "file"), {"a": 1})


# ---------------------------------------------------------------- shares


@given(
    st.integers(0, 1 << 50),
    st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 1 << 40), max_size=6),
    st.integers(0, 1 << 40),
)
def test_shares_never_sum_up_to_more_than_the_quota_and_use_all_of_it_that_is_free(
    quota, used, reserved
) -> None:
    shares = divide(quota, used, reserved)
    room = max(0, quota - reserved)
    assert sum(shares.values()) <= room
    assert list(shares) == list(used) or set(shares) == set(used)
    if used and sum(used.values()) <= room:
        assert sum(shares.values()) == room
        assert all(shares[node] >= size for node, size in used.items())
    else:
        assert all(shares[node] <= size for node, size in used.items())


def test_what_is_free_is_divided_evenly() -> None:
    assert divide(100, {"a": 10, "b": 0, "c": 0}, reserved_bytes=30) == {"a": 30, "b": 20, "c": 20}
    assert divide(10, {"a": 15, "b": 5}) == {"a": 7, "b": 2}
    assert divide(10, {}) == {}

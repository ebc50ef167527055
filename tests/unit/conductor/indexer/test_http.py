"""The HTTP API as upstream documents it, over real sockets: bodies, errors, who is let in, bounds."""

import asyncio
import http.client
import json
import struct
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import pytest

from conductor.indexer import http as http_module
from conductor.indexer.endpoints import PUBLISHERS, check, networks, resolve
from conductor.indexer.hashes import xxh3_names
from conductor.indexer.requests import TOKENS_MAX, Wrong
from conductor.indexer.run import check as check_settings
from conductor.indexer.service import SERVICES_MAX
from conductor.indexer.source import Source
from mooncake.core.errors import ConfigError, RequestError
from mooncake.core.options import IndexerOptions
from mooncake.worker.gpu_blocks import decode_batch
from tests.unit.conductor.indexer.make import Site, batch, send, service, stored

KEY = "a-key-of-more-than-sixteen-characters"
NOBODY = "tcp://127.0.0.1:9"
REGISTRATION = {
    "endpoint": NOBODY, "replay_endpoint": None, "type": "vLLM", "modelname": "m", "lora_name": None,
    "tenant_id": "default", "instance_id": "i0", "block_size": 4, "dp_rank": 0, "additionalsalt": None,
}  # fmt: skip
PROFILE = {
    "strategy": "vllm_v1", "algorithm": "sha256", "python_hash_seed": "0", "index_projection": "low64_be",
}  # fmt: skip
QUERY = {"model": "m", "block_size": 4, "token_ids": [1, 2, 3, 4, 5, 6, 7, 8]}
EMPTY = {"longest_matched": 0, "GPU": 0, "CPU": 0, "DISK": 0, "DP": {"0": 0}}


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    made = Site()
    yield made
    await made.close()


def hold(site: Site, *events: Any, **more: Any) -> None:
    """Let a publisher that needs no socket have told events."""
    made = Source(service(**more), site.indexer.contexts)
    made.apply(decode_batch(batch(*events)))


# ---------------------------------------------------------------- as documented


async def test_register_and_unregister_answer_as_upstream_does(site: Site) -> None:
    assert await site.send("/register", REGISTRATION) == (
        200,
        {"status": "registered successfully", "instance_id": "i0"},
    )
    assert await site.send("/query", QUERY) == (200, {"default": {"i0": EMPTY}})
    bye = {key: REGISTRATION[key] for key in ("type", "modelname", "instance_id", "block_size", "dp_rank")}
    assert await site.send("/unregister", bye) == (
        200,
        {"status": "unregistered successfully", "removed_instances": ["i0|default|0"]},
    )
    status, answer = await site.send("/unregister", bye)
    assert (status, answer["error"]) == (404, "service not found: i0|default|0")


async def test_a_query_of_generation_1_is_answered_by_tenant_and_instance(site: Site) -> None:
    hold(site, stored([1], [1, 2, 3, 4]))
    hold(site, stored([1, 2], [1, 2, 3, 4, 5, 6, 7, 8]), rank=1)
    expected = {"longest_matched": 8, "GPU": 8, "CPU": 0, "DISK": 0, "DP": {"0": 4, "1": 8}}
    assert await site.send("/query", QUERY) == (200, {"default": {"i0": expected}})
    status, answer = await site.send("/query?generation=2", QUERY)
    assert (status, set(answer)) == (200, {"instances"})


async def test_a_query_of_generation_2_is_answered_by_instance_and_rank(site: Site) -> None:
    await site.send("/register", {**REGISTRATION, "hash_profile": PROFILE})
    hold(site, stored([1], [1, 2, 3, 4]), rank=1)
    expected = {
        "longest_matched": 4, "gpu": 4, "cpu": 4, "disk": 4, "dp": {"0": 0, "1": 4},
        "rank_matches": {"0": {"gpu": 0, "cpu": 0, "disk": 0}, "1": {"gpu": 4, "cpu": 4, "disk": 4}},
    }  # fmt: skip
    assert await site.send("/query", QUERY) == (200, {"instances": {"i0": expected}})
    packed = {**QUERY, "token_ids": struct.pack("<8i", *range(1, 9))}
    assert await site.pack("/query", packed) == (200, {"instances": {"i0": expected}})
    assert await site.pack("/query", QUERY) == (200, {"instances": {"i0": expected}})


async def test_what_nobody_registered_is_no_error(site: Site) -> None:
    assert await site.send("/query", QUERY) == (200, {"default": {}, "instances": {}})
    assert await site.pack("/query", QUERY) == (200, {"instances": {}})
    assert await site.send("/query", {**QUERY, "instance_id": "x"}) == (200, {"default": {}, "instances": {}})


async def test_names_of_blocks_can_be_asked_for_by_either_field(site: Site) -> None:
    hold(site, stored([1, 2], [1, 2, 3, 4, 5, 6, 7, 8]))
    (context,) = site.indexer.contexts.all.values()
    names = xxh3_names(None, struct.pack("<8i", *range(1, 9)), 4, context.seed)
    for field in ("seq_hashes", "block_hash"):
        asked = {"model": "m", "block_size": 4, field: [*names, 2**64 - 1]}
        status, answer = await site.send("/query_by_hash", asked)
        assert status == 200
        assert answer["default"]["i0"]["longest_matched"] == 8


async def test_views_and_services_have_upstream_s_fields(site: Site) -> None:
    await site.send("/register", {**REGISTRATION, "hash_profile": PROFILE})
    _, view = await site.send("/global_view")
    (context,) = view["contexts"]
    assert view["context_count"] == 1
    assert {**context, "hash_profile": None} == {
        "model_name": "m", "lora_name": "", "block_size": 4, "tenant_id": "default", "additional_salt": "",
        "prefix_count": 0, "instances": {"i0": [0]}, "hash_profile": None,
    }  # fmt: skip
    assert context["hash_profile"]["root_digest"].startswith("1973e238")
    _, services = await site.send("/services")
    (one,) = services["services"]
    assert services["count"] == 1
    names = ("Endpoint", "Type", "TenantID", "InstanceID", "DPRank", "BlockSize")
    assert {key: one[key] for key in names} == {
        "Endpoint": NOBODY, "Type": "vLLM", "TenantID": "default", "InstanceID": "i0", "DPRank": 0,
        "BlockSize": 4,
    }  # fmt: skip
    assert (one["HashProfile"]["algorithm"], one["State"]) == ("sha256", "connecting")
    assert (await site.send("/health"))[1] == {"status": "ok", "publishers": {"connecting": 1}}
    status, page = await site.send("/metrics")
    assert status == 200
    assert 'mooncake_indexer_publishers{state="connecting"} 1.0' in page


async def test_registering_the_same_again_changes_nothing_and_anything_else_is_a_conflict(site: Site) -> None:
    assert (await site.send("/register", REGISTRATION))[0] == 200
    assert (await site.send("/register", REGISTRATION))[0] == 200
    assert (await site.send("/services"))[1]["count"] == 1
    for change in (
        {"endpoint": "tcp://127.0.0.1:10"},  # another endpoint of the same service
        {"instance_id": "i1"},  # the endpoint of another service
        {"instance_id": "i1", "endpoint": "tcp://127.0.0.1:10", "hash_profile": PROFILE},  # another profile
    ):
        status, answer = await site.send("/register", {**REGISTRATION, **change})
        assert (status, answer["reason"]) == (400, "invalid_registration"), change


# ---------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"model": None}, Wrong("", "invalid_type", "model")),
        ({"model": ""}, Wrong("", "invalid_value", "model")),
        ({"model": 5}, Wrong("", "invalid_type", "model")),
        ({"block_size": 0}, Wrong("", "out_of_range", "block_size")),
        ({"block_size": 1.5}, Wrong("", "invalid_type", "block_size")),
        ({"token_ids": "1,2"}, Wrong("", "not_array", "token_ids")),
        ({"token_ids": [1, "2"]}, Wrong("", "invalid_type", "token_ids", 1)),
        ({"token_ids": [1, True]}, Wrong("", "invalid_type", "token_ids", 1)),
        ({"token_ids": [1, 2, 2**31]}, Wrong("", "out_of_range", "token_ids", 2)),
        ({"token_ids": [-(2**31) - 1]}, Wrong("", "out_of_range", "token_ids", 0)),
        ({"token_ids": [2**70]}, Wrong("", "out_of_range", "token_ids", 0)),
        ({"token_id": []}, Wrong("", "unknown_field", "token_id")),
        ({"lora_name": "a", "lora_id": 1}, Wrong("", "invalid_value", "lora_id")),
        ({"cache_salt": "s" * 5000}, Wrong("", "invalid_value", "cache_salt")),
    ],
)
async def test_a_bad_query_is_told_what_where_and_why(site: Site, change: dict, expected: Wrong) -> None:
    status, answer = await site.send("/query", {**QUERY, **change})
    assert status == 400
    assert answer.pop("error")
    assert answer == {key: value for key, value in msgspec.to_builtins(expected).items() if key != "error"}


@pytest.mark.parametrize("field", ["model", "block_size", "token_ids"])
async def test_a_field_that_is_missing_is_named(site: Site, field: str) -> None:
    wish = {key: value for key, value in QUERY.items() if key != field}
    assert await site.send("/query", wish) == (
        400,
        {"error": f"{field} is required", "reason": "missing", "field": field},
    )


@pytest.mark.parametrize(
    ("change", "reason", "field"),
    [
        ({"type": "llama.cpp"}, "invalid_value", "type"),
        ({"dp_rank": -1}, "out_of_range", "dp_rank"),
        ({"cache_group": 1}, "unsupported", "cache_group"),
        ({"hash_profile": {**PROFILE, "algorithm": "md5"}}, "invalid_value", "algorithm"),
        ({"hash_profile": {**PROFILE, "strategy": "v2"}}, "invalid_value", "strategy"),
        ({"hash_profile": {**PROFILE, "index_projection": "high"}}, "invalid_value", "index_projection"),
        (
            {"hash_profile": {**PROFILE, "python_hash_seed": "4294967296"}},
            "invalid_value",
            "python_hash_seed",
        ),
        ({"hash_profile": {**PROFILE, "python_hash_seed": "x"}}, "invalid_value", "python_hash_seed"),
        ({"hash_profile": {**PROFILE, "extra_keys": "x"}}, "invalid_value", "extra_keys"),
        ({"hash_profile": {"algorithm": "sha256"}}, "missing", "strategy"),
        ({"hash_profile": "sha256"}, "invalid_type", "hash_profile"),
        ({"endpoint": "ipc:///tmp/x"}, "invalid_value", "endpoint"),
        ({"replay_endpoint": "tcp://169.254.169.254:80"}, "invalid_value", "replay_endpoint"),
    ],
)
async def test_a_bad_registration_is_told_too_and_leaves_nothing_behind(
    site: Site, change: dict, reason: str, field: str
) -> None:
    status, answer = await site.send("/register", {**REGISTRATION, **change})
    assert (status, answer["reason"], answer["field"]) == (400, reason, field)
    assert (await site.send("/services"))[1]["count"] == 0
    assert (await site.send("/global_view"))[1]["context_count"] == 0


@pytest.mark.parametrize("seed", ["0", "00", "4294967295", "random", "vllm-none-hash"])
async def test_seeds_of_every_vllm_are_taken(site: Site, seed: str) -> None:
    profile = {**PROFILE, "python_hash_seed": seed}
    assert (await site.send("/register", {**REGISTRATION, "hash_profile": profile}))[0] == 200


async def test_bodies_that_are_no_map_paths_that_are_none_and_other_methods(site: Site) -> None:
    assert (await site.send("/query", raw=b"{"))[1]["reason"] == "invalid_json"
    assert (await site.send("/query", [1]))[1]["reason"] == "invalid_type"
    assert (await site.send("/query", raw=b'{"model": "\xff"}'))[0] == 400
    assert (await site.pack("/query", "text"))[0] == 400
    assert (await site.pack("/query", {**QUERY, "token_ids": b"123"}))[1]["reason"] == "invalid_value"
    assert (await site.send("/nothing", QUERY))[0] == 404
    for path in ("/query", "/register", "/unregister", "/query_by_hash"):
        assert (await site.send(path))[1]["error"] == "Method not allowed"
    assert (await site.send("/services", QUERY))[0] == 405
    assert (await site.send("/query?generation=3", QUERY))[1]["field"] == "generation"


@pytest.mark.parametrize("field", ["model", "cache_salt", "lora_name", "tenant_id", "instance_id"])
async def test_text_that_is_no_text_is_refused(site: Site, field: str) -> None:
    body = json.dumps({**QUERY, field: "x"}).replace('"x"', '"\\ud800"').encode()
    assert (await site.send("/query", raw=body))[0] == 400


async def test_hashes_have_64_bits(site: Site) -> None:
    wish = {"model": "m", "block_size": 4, "seq_hashes": [1, 2**64]}
    status, answer = await site.send("/query_by_hash", wish)
    assert (status, answer["reason"], answer["index"]) == (400, "out_of_range", 1)
    del wish["seq_hashes"]
    assert (await site.send("/query_by_hash", wish))[1]["reason"] == "missing"


# ---------------------------------------------------------------- who is let in, and bounds


async def test_with_a_key_nobody_gets_in_without_it() -> None:
    site = Site(KEY)
    try:
        assert (await site.send("/query", QUERY))[0] == 401
        assert (await site.send("/health", headers={"Authorization": "Bearer wrong"}))[0] == 401
        assert (await site.send("/query", QUERY, {"Authorization": f"Bearer {KEY}"}))[0] == 200
    finally:
        await site.close()


async def test_without_a_key_no_web_page_can_ask(site: Site) -> None:
    assert (await site.send("/query", QUERY, {"Host": "evil.example"}))[0] == 403
    assert (await site.send("/query", QUERY, {"Content-Type": "text/plain"}))[0] == 415


def test_other_addresses_than_loopback_need_a_key() -> None:
    settings = IndexerOptions(host="0.0.0.0")
    with pytest.raises(ConfigError, match="MOONCAKE_API_KEY"):
        check_settings(settings)
    check_settings(settings.replace(api_key=KEY))


@pytest.mark.parametrize(
    "change", [{"publishers": "10.0.0.0/33"}, {"blocks_max": -1}, {"xxh3_seed": -1}, {"port": 1 << 16}]
)
def test_a_bad_setting_stops_the_process_with_its_name(change: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(change))):
        check_settings(IndexerOptions(**change))


@pytest.mark.parametrize(
    "endpoint",
    [
        "http://10.0.0.1:80", "tcp://*:5557", "tcp://10.0.0.1", "tcp://10.0.0.1:0", "tcp://10.0.0.1:99999",
        "tcp://user@10.0.0.1:1", "tcp://169.254.169.254:80", "tcp://8.8.8.8:5557", "tcp://0.0.0.0:5557",
        "tcp://[fe80::1]:5557", "tcp://[::ffff:8.8.8.8]:80", "ipc:///run/x", "inproc://x", "",
    ],
)  # fmt: skip
async def test_publishers_may_be_in_their_networks_only(endpoint: str) -> None:
    with pytest.raises(RequestError):
        check(endpoint, "endpoint", networks(PUBLISHERS))
    with pytest.raises(RequestError):
        await resolve(endpoint, "endpoint", networks(PUBLISHERS))


@pytest.mark.parametrize(
    "endpoint", ["tcp://10.1.2.3:5557", "tcp://[::1]:5557", "tcp://engine.pods.svc:5557"]
)
def test_private_addresses_and_names_may_be_registered(endpoint: str) -> None:
    check(endpoint, "endpoint", networks(PUBLISHERS))


async def test_a_name_is_resolved_and_its_address_looked_at() -> None:
    assert await resolve("tcp://localhost:5557", "endpoint", networks(PUBLISHERS)) in (
        "tcp://127.0.0.1:5557",
        "tcp://[::1]:5557",
    )
    with pytest.raises(RequestError, match="publishers"):
        await resolve("tcp://localhost:5557", "endpoint", networks("10.0.0.0/8"))


async def test_publishers_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    assert SERVICES_MAX > 1
    monkeypatch.setattr("conductor.indexer.service.SERVICES_MAX", 1)
    await site.send("/register", REGISTRATION)
    other = {**REGISTRATION, "instance_id": "i1", "endpoint": "tcp://127.0.0.1:10"}
    assert (await site.send("/register", other))[0] == 503


async def test_bodies_are_bounded_and_long_prompts_are_not_too_long(site: Site, monkeypatch) -> None:
    assert http_module.BODY_BYTES_MAX >= 4 * TOKENS_MAX
    long = list(range(131_072))
    hold(site, stored(range(1, 32_769), long))
    assert await site.longest(long) == 131_072
    monkeypatch.setattr(http_module._Handler, "body_bytes_max", 100)
    assert (await site.send("/query", QUERY))[0] == 200
    status, _ = await site.send("/query", {**QUERY, "cache_salt": "s" * 100})
    assert status == 413


async def test_many_routers_ask_at_once_while_engines_tell(site: Site) -> None:
    hold(site, stored([1, 2], [1, 2, 3, 4, 5, 6, 7, 8]))
    body = json.dumps(QUERY).encode()

    def ask(count: int) -> set[int]:
        host, port = site.url.removeprefix("http://").split(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=30.0)
        found = set()
        for _ in range(count):
            connection.request("POST", "/query", body, {"Content-Type": "application/json"})
            found.add(json.loads(connection.getresponse().read())["default"]["i0"]["longest_matched"])
        connection.close()
        return found

    def tell() -> None:
        made = Source(service(instance="i1"), site.indexer.contexts)
        for number in range(300):
            with site.indexer.lock:
                made.apply(decode_batch(batch(stored([number], [number] * 4))))

    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(9) as pool:
        asking = [loop.run_in_executor(pool, ask, 30) for _ in range(8)]
        telling = loop.run_in_executor(pool, tell)
        assert set().union(*await asyncio.gather(*asking)) == {8}
        await telling
    assert send(site.url + "/global_view")[1]["contexts"][0]["prefix_count"] == 302

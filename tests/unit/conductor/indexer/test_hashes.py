"""Names of blocks, against vectors of upstream's own fixtures and against pickle itself."""

import pickle
from array import array
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from conductor.indexer.hashes import (
    KEY_BYTES,
    After,
    ExtraKeys,
    LazyKeys,
    VllmNaming,
    VllmV1,
    Xxh3Naming,
    blob_of,
    key_of,
    low64,
    pickle_block,
    pickle_text,
    xxh3_names,
    xxh3_root,
)
from conductor.prompt_keys import KeyMemo


def pack(tokens: Sequence[int]) -> bytes:
    return array("i", tokens).tobytes()


def digests(profile: VllmV1, tokens: Sequence[int], size: int, lora: str = "", salt: str = "") -> list[str]:
    """In upstream's form: bare extra keys."""
    return [
        one.hex() for one in profile.digests(None, pack(tokens), size, *profile.forms(lora, salt or None)[-1])
    ]


# ---------------------------------------------------------------- upstream's golden vectors
# kvcache-ai/Mooncake, branch dev/conductor, mooncake-conductor/tests/fixtures/hash_golden_vectors*.json

INT32 = [-(1 << 31), -1, 0, 255, 256, 65535, 65536, (1 << 31) - 1]
WIDE, WIDE_SALT = "模型-适配器", "盐值-🚀"
PICKLED = [
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "", "", [
        "762b2e7e1520febd3a0aedb7358e8602facf3924440e18538fce057e23bae91d",
        "9e62b5a7ec298f33cb4c7d9e00b659874bb2432d23ad6879ad1746592a2b036b",
    ]),
    (1, [7], "", "", ["4e7493abc7315520e17ce180ee400439b7dc83e7406fb239462766705eb058c8"]),
    (2, [7, 8], "", "", ["aa9e79304bb6921235ea2e187b25f9bb43d9044ec232e3d1c07d7e21e51e64ee"]),
    (3, [7, 8, 9], "", "", ["6368e68a46c970c8ec2ebab3eb9d2fe7ddc2730165bb64d698aaed2907396794"]),
    (8, INT32, "", "", ["6c9e5f944f0a93319b3ba9478115a9447de2f6d4ef1cd1c0b19a7ebd607353e8"]),
    (4, [1, 2, 3, 4], WIDE, WIDE_SALT, ["cc1a2ab147f91a34070bb430e35dbc6ca6261a93b490a2307d0b4b31696a247a"]),
    (4, [1, 2, 3, 4], "a" * 255, "", ["866b277c9d76457e35bd6a5dd3ec0d5b598faa9e36d108608f6e925149b1524b"]),
    (4, [1, 2, 3, 4], "a" * 256, "", ["0c934ab8aa543128da871a91a46387ed907ed3ca8b39e5c137da510f80a106df"]),
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "", "tenant-salt", [
        "373c09c29ab08b91b13bf1a67e0a461990572d476016c064b6ba6b75c163ceb1",
        "141900dd6fe59d22764357a125ecf4d670923bb12ad705a520de0e98c7338d5d",
    ]),
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "adapter-A", "tenant-salt", [
        "dacd8a5addba8cf4b89589bedab04999b3676299a455ba3e085cc7777be6b328",
        "55575bd9b63ced6a3dc36c355afbb5f551599533795c26d27d8b5fc836681618",
    ]),
    (22_000, [256] * 22_000, "", "", ["7f245129165bb9ba11747856a9a908740bf7b29c0033da4958281d87b252f469"]),
    (4, [1, 2, 3], "", "", []),
]  # fmt: skip
IN_CBOR = [
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "", "", [
        "c9d58ba695280d69b243e1e0df813136ca9196b286fb1a021e0b2e028ef071cb",
        "24125b23e68883b5c2141db2959d48433fe6bde2f26bd914efad121d154ab2d6",
    ]),
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "adapter-A", "", [
        "1424c0ec536f82188b592f263601d4e48c0255081c5f1e9225163c6d611a5222",
        "4a2ec941640a8f2470869ec2b3cf6bdd90e2be83b21807b628ac9abe9341eea9",
    ]),
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "", "tenant-salt", [
        "3be45574566e2f3c51c9f254d9627cf113382b627aeaefe8b661d66cfa089359",
        "22dea68f80ff7f40243dfb906a33db02571905c78a3b42153a56de5ad08c661a",
    ]),
    (4, [1, 2, 3, 4, 5, 6, 7, 8], "adapter-A", "tenant-salt", [
        "22977da6c71098507264dbf4161d451c2d98494c5c146717f36787e184b36040",
        "6a3cd7de2626c2d2982eb5bc9d4878a49745c3784bde8a2334ffac47286bb866",
    ]),
    (12, [-(1 << 31), -257, -256, -25, -24, -1, 0, 23, 24, 255, 256, (1 << 31) - 1], "", "", [
        "d4e5cc975a84b5ae7299d36910284bf256ea1eade2689dba6391b08d86e006d7",
    ]),
    (4, [1, 2, 3, 4], "a" * 23, "", ["3cc96f507898959352d1d123c849d0ab4b11846c8de3c67123d72e78957adb07"]),
    (4, [1, 2, 3, 4], "a" * 24, "", ["553263ebbf33660ecba67f9fcabea06d20cca3a71c79abf6e1894d39c7fa8ff8"]),
    (4, [1, 2, 3, 4], WIDE, WIDE_SALT, ["69af00b1b180a366c69003a00527c2baf6bbc71880abc3b1d3b60fa2f553cdca"]),
    (24, list(range(24)), "", "", ["792917e681c347b21bebfdd57cabcca6b79c865f83ccd2cfbd9cb56ffed2b088"]),
]  # fmt: skip
ROOTS = [
    ("sha256", "0", "1973e23848344dc43a988a9b478663803cfffe1243480253f9a3cf004b14aa7c"),
    ("sha256", "00", "67c61e0f70ad5d3fc0eacb59744008ac6f2a8bd2edad43540a743eaf0fb4993c"),
    ("sha256", "random", "fa1326fc0ad784c54e10f808051a77f999f7b675b12fba49cbef92b3e1a09cb7"),
    ("sha256", "4294967295", "670c2eca46f5f7e11b9dce5c3bd2ff0e9e19567fd45b50c2db5cc0c9aae470d9"),
    ("sha256_cbor", "0", "4e1195df020de59e0d65a33a4279f1183e7ae4e5d980e309f8b55adff2e61c3e"),
    ("sha256_cbor", "00", "8d912e4e62b3cc377b1d1c7a14ef61dffbdaa0990237035c05401c29414c4172"),
]


@pytest.mark.parametrize(("algorithm", "seed", "root"), ROOTS)
def test_a_seed_makes_the_root_that_upstream_has(algorithm: str, seed: str, root: str) -> None:
    assert VllmV1(algorithm, seed).root().hex() == root


@pytest.mark.parametrize(("algorithm", "cases"), [("sha256", PICKLED), ("sha256_cbor", IN_CBOR)])
def test_tokens_adapters_and_salts_make_the_hashes_that_upstream_has(algorithm: str, cases: list) -> None:
    for size, tokens, lora, salt, expected in cases:
        assert digests(VllmV1(algorithm, "0"), tokens, size, lora, salt) == expected


def test_the_low_64_bits_are_the_last_of_a_digest_as_upstream_projects_it() -> None:
    digest = bytes.fromhex("762b2e7e1520febd3a0aedb7358e8602facf3924440e18538fce057e23bae91d")
    assert low64(digest) == 10362225831949560093
    assert low64(-685567553150498463) == 0xF67C5FF154EE4961, "SGLang's are signed"


# ---------------------------------------------------------------- pickle itself

int32 = st.one_of(st.sampled_from(INT32), st.integers(-(1 << 31), (1 << 31) - 1))
texts = st.one_of(st.text(max_size=20), st.sampled_from(["a" * 255, "a" * 256, "ü" * 128]))
extras = st.one_of(
    st.none(),
    st.lists(
        st.one_of(texts, st.lists(texts, min_size=2, max_size=3).map(tuple)), min_size=1, max_size=4
    ).map(tuple),
)


def distinct(value: object) -> object:
    """Equal texts are equal objects to pickle's memo only if they are the same one: vLLM's are not."""
    return tuple(map(distinct, value)) if isinstance(value, tuple) else "".join(list(str(value)))


@settings(max_examples=200, deadline=None)
@given(
    parent=st.binary(min_size=32, max_size=32), tokens=st.lists(int32, min_size=1, max_size=40), extra=extras
)
def test_the_spelling_is_that_of_pickle(parent, tokens, extra) -> None:
    value = (parent, tuple(tokens), extra and distinct(extra))
    if len({id(one) for one in _texts(value[2])}) == len(_texts(value[2])):  # one-letter texts are shared
        assert pickle_block(parent, tokens, extra) == pickle.dumps(value, protocol=5)


def _texts(value: object) -> list[str]:
    if isinstance(value, tuple):
        return [text for one in value for text in _texts(one)]
    return [value] if isinstance(value, str) else []


def test_large_blocks_are_framed_as_pickle_frames_them() -> None:
    for count in (13_000, 16_384, 40_000):
        tokens = [70_000 + one for one in range(count)]
        assert pickle_block(b"p" * 32, tokens, ("x",)) == pickle.dumps((b"p" * 32, tuple(tokens), ("x",)), 5)
    assert pickle_text("0") == pickle.dumps("0", protocol=5)


# ---------------------------------------------------------------- tagged and bare


def test_extra_keys_come_tagged_as_in_vllm_0_32_and_bare_as_before() -> None:
    profile = VllmV1("sha256", lora_path="/adapters/a")
    tagged, bare = profile.forms("a", "s")
    assert tagged == ((("lora", "a", "/adapters/a"), ("cache_salt", "s")), (("lora", "a", "/adapters/a"),))
    assert bare == (("a", "s"), ("a",))
    assert profile.forms("", "s") == [((("cache_salt", "s"),), None), (("s",), None)]


def test_without_adapter_and_salt_there_is_one_form() -> None:
    for extra_keys in ExtraKeys:
        assert VllmV1("sha256", extra_keys=extra_keys).forms("", None) == [(None, None)]


def test_an_adapter_whose_path_is_not_told_has_no_tagged_form() -> None:
    assert VllmV1("sha256").forms("a", None) == [(("a",), ("a",))]
    assert VllmV1("sha256", extra_keys=ExtraKeys.TAGGED).forms("a", None) == []


# ---------------------------------------------------------------- XXH3


def test_names_of_the_standard_roll_over_local_hashes() -> None:
    tokens = list(range(1, 13))
    local = [xxh3_64_intdigest(pack(tokens[at : at + 4]), 1337) for at in (0, 4, 8)]
    names = [local[0]]
    for one in local[1:]:
        names.append(xxh3_64_intdigest(names[-1].to_bytes(8, "little") + one.to_bytes(8, "little"), 1337))
    assert list(xxh3_names(None, pack([*tokens, 13]), 4, 1337)) == names
    assert list(xxh3_names(names[0], pack(tokens[4:]), 4, 1337)) == names[1:]


def test_local_hashes_are_those_of_dynamo() -> None:
    """What ai-dynamo-runtime 1.6.1 answers to compute_block_hash_for_seq."""
    assert xxh3_names(None, pack(range(1, 17)), 16, 1337) == [16863443419780771464]
    assert xxh3_names(None, pack(range(17, 33)), 16, 1337) == [2287610619914608821]
    assert xxh3_names(None, pack([0, 1, 65535, 131071]), 4, 1337) == [7769772091053205496]


def test_a_salt_and_a_seed_change_every_name() -> None:
    packed = pack(range(8))
    plain = list(xxh3_names(None, packed, 4, 1337))
    salted = list(xxh3_names(xxh3_root("s", 1337), packed, 4, 1337))
    assert not {*plain} & {*salted, *xxh3_names(None, packed, 4, 0)}
    assert xxh3_root("", 1337) is None


def all_of(keys: Sequence[bytes]) -> bytes:
    return b"".join(keys[:])


def test_keys_are_made_only_as_far_as_they_are_looked_at_and_remembered() -> None:
    made: list[int] = []

    class Counted(Xxh3Naming):
        def span(self, parent: bytes | None, packed: bytes) -> bytes:
            keys = super().span(parent, packed)
            made.append(len(keys) // KEY_BYTES)
            return keys

    packed, memo = pack(range(403)), KeyMemo()
    expected = list(map(key_of, xxh3_names(None, packed, 4, 1337)))
    keys = LazyKeys(Counted(1337, 4, None), packed, 4, memo)
    rest = After(keys, 10)
    assert (len(keys), len(rest), made) == (100, 90, [])
    assert b"".join(rest[2:4]) == b"".join(expected[12:14])
    assert made == [32]
    assert (rest[0], rest[-1], list(keys)) == (expected[10], expected[99], expected)
    assert made == [32, 32, 32, 4]
    assert all_of(LazyKeys(Counted(1337, 4, None), packed, 4, memo)) == b"".join(expected)
    assert made == [32, 32, 32, 4], "known by their tokens"
    assert all_of(LazyKeys(Counted(1337, 4, "s"), packed, 4, memo)) != b"".join(expected)
    assert all_of(LazyKeys(Counted(1337, 8, None), packed, 8, memo)) != b"".join(expected[:50])
    assert all_of(LazyKeys(Counted(1337, 4, None), b"", 4, memo)) == all_of(After(keys, 100)) == b""


@pytest.mark.parametrize("algorithm", ["sha256", "sha256_cbor"])
def test_a_chain_in_spans_is_the_same_chain_and_its_keys_begin_with_the_low_64_bits(algorithm: str) -> None:
    profile, packed = VllmV1(algorithm, "0", lora_path="/p"), pack(range(403))
    for form in profile.forms("a", "s"):
        whole = profile.digests(None, packed, 4, *form)
        keys = LazyKeys(VllmNaming(profile, 4, form), packed, 4, KeyMemo())
        assert [one[:8] for one in keys] == [key_of(low64(one))[:8] for one in whole]


def test_many_names_in_a_row_are_their_keys() -> None:
    for names in ([0, 1, 2**64 - 1, 2**63], [*range(2**64 - 200, 2**64)]):
        assert blob_of(names) == b"".join(map(key_of, names))
    assert blob_of([]) == b""

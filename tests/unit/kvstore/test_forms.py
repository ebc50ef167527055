"""Who asks for a block in one form gets that form or nothing: in memory, on the SSD, after a restart.

The store knows no codecs and no layouts: it keeps bytes under keys. The form is in the key (core.keys).
"""

import asyncio
import itertools

import numpy as np
import pytest

from kvstore.header import HEADER_BYTES, NO_LAYOUT, Codec, ObjectHeader, Record, decode_record
from kvstore.ssd.model import SsdConfig
from kvstore.store.config import StoreConfig
from kvstore.store.service import StoreService
from mooncake.core.keys import block_checksum, chain, context_root, request_root, variant_root
from mooncake.core.messages import Acquire, Commit, Reserve

SIZE = 16 << 10
TOKENS = range(32)
RAW = ("raw", "0", None)
CODECS, RANKS, TENANTS = ("raw", "int8", "int4", "zstd"), ("0", "1"), (None, "", "a")
FORMS = list(itertools.product(CODECS, RANKS, TENANTS))
"""(codec, rank, tenant), all of one prompt."""


def keys(form) -> list[bytes]:
    codec, rank, tenant = form
    variant = {"codec": codec} if codec != "raw" else {}
    variant |= {"rank": rank} if rank != "0" else {}
    return chain(request_root(variant_root(context_root({"model": "m"}), variant), tenant, None), TOKENS, 8)


def content(form, block: int) -> bytes:
    return np.random.default_rng([FORMS.index(form), block]).bytes(SIZE)


@pytest.fixture
async def start(tmp_path):
    services = []

    async def started() -> StoreService:
        ssd = SsdConfig(
            node="n1", path=str(tmp_path / "ssd"), capacity_bytes=16 << 20, segment_bytes=1 << 20,
            object_bytes=SIZE,
        )  # fmt: skip
        config = StoreConfig(
            node="n1", capacity_bytes=8 << 20, run_dir=str(tmp_path / "run"), ssd=ssd, ssd_age_s=0.0
        )
        services.append(StoreService(config))
        await services[-1].start()
        return services[-1]

    yield started
    for service in services:
        await service.close()


async def put(service: StoreService, form) -> None:
    for block, key in enumerate(keys(form)):
        got = await service.requests.handle(Reserve("w", [key], SIZE))
        service._segment.view(got.offsets[0], SIZE)[:] = content(form, block)
        done = await service.requests.handle(Commit(got.tickets, [block_checksum(key, content(form, block))]))
        assert done.done == [True]


async def served(service: StoreService, form) -> list[bytes]:
    got = await service.requests.handle(Acquire(keys(form), 5.0, 5.0))
    found = [bytes(service._segment.view(block.offset, block.size_bytes)) for block in got.blocks]
    service.node.release(service._clock(), got.lease_id)
    return found


async def expect(service: StoreService, there) -> None:
    for form in FORMS:
        wanted = [content(form, block) for block in range(4)] if form in there else []
        assert await served(service, form) == wanted, form


async def test_each_form_of_one_prompt_answers_for_itself_alone(start):
    service = await start()
    for form, following in itertools.pairwise(FORMS):
        await put(service, form)
        assert await served(service, following) == []
    await expect(service, FORMS[:-1])


async def test_a_reader_of_raw_blocks_meets_no_other_codec_even_where_nothing_raw_is(start):
    service = await start()
    there = [form for form in FORMS if form[0] != "raw"]
    for form in there:
        await put(service, form)
    await expect(service, there)
    assert await served(service, RAW) == []


async def on_ssd(service: StoreService, forms) -> None:
    """Store `forms` and wait until the SSD has them."""
    for form in forms:
        await put(service, form)
    async with asyncio.timeout(30):
        while not all(key in service.tiering.tier for form in forms for key in keys(form)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_the_same_holds_for_what_comes_back_from_the_ssd(start):
    service = await start()
    there = FORMS[1::2]
    await on_ssd(service, there)
    await service.close()
    again = await start()
    assert again.node.stats().blocks == 0, "all of it comes from the SSD"
    await expect(again, there)
    assert again.tiering.tier.stats().hits == 4 * len(there)


async def test_every_object_on_the_ssd_carries_a_header_that_says_what_it_is(start, tmp_path):
    service = await start()
    await on_ssd(service, FORMS[:6])
    await service.close()
    (path,) = (path for path in (tmp_path / "ssd").iterdir() if path.stat().st_size > HEADER_BYTES)
    image = memoryview(path.read_bytes())
    pages = (decode_record(image[at : at + HEADER_BYTES]) for at in range(0, len(image), HEADER_BYTES))
    records = {found.object.key: found for found in pages if isinstance(found, Record)}
    assert len(records) == 4 * 6
    for form in FORMS[:6]:
        for block, key in enumerate(keys(form)):
            data, at = content(form, block), records[key].offset
            assert records[key].object == ObjectHeader(
                key, SIZE, block_checksum(key, data), NO_LAYOUT, Codec.RAW, SIZE
            )
            assert bytes(image[at : at + SIZE]) == data

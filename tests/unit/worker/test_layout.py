"""A block's pages, seen as one array where the engine's layout allows it."""

import numpy as np

from mooncake.worker.layout import PagedKv
from transfer.copy import scatter


def caches(layers: int = 3, blocks: int = 5, page: int = 64):
    """Layer-major, as vLLM's CPU engine allocates: [layer][block][byte] in one allocation."""
    storage = np.random.default_rng(0).integers(0, 255, (layers, blocks, page), np.uint8)
    return storage, PagedKv([f"l{i}" for i in range(layers)], list(storage))


def test_layers_of_one_allocation_are_one_array_per_block():
    storage, kv = caches()
    pages = kv.block_pages(3)
    assert isinstance(pages, np.ndarray)
    assert np.array_equal(pages, storage[:, 3])
    scatter(memoryview(bytes(range(192))), pages)
    assert storage[:, 3].tobytes() == bytes(range(192))


def test_layers_of_several_allocations_are_a_list_of_pages_in_layer_order():
    layers = [np.full((4, 16), n, np.uint8) for n in (1, 2)]
    layers.append(np.full((4, 32), 3, np.uint8))
    kv = PagedKv(["a", "b", "c"], layers)
    pages = kv.block_pages(2)
    assert isinstance(pages, list)
    assert [page.tolist() for page in pages] == [[1] * 16, [2] * 16, [3] * 32]


def test_layers_in_descending_order_are_not_mistaken_for_one_array():
    storage, _ = caches()
    kv = PagedKv(["c", "b", "a"], [storage[2], storage[1], storage[0]])
    assert isinstance(kv.block_pages(0), list)


def test_one_layer_is_one_array():
    storage, kv = caches(layers=1)
    assert np.array_equal(kv.block_pages(4), storage[:, 4])


def test_both_views_write_the_same_bytes():
    storage, kv = caches()
    source = np.arange(192, dtype=np.uint8)
    for layer in range(3):
        kv.write_layer(layer, 1, source)
    one_by_one = storage.copy()
    storage[:, 1] = 0
    scatter(source.data, kv.block_pages(1))
    assert np.array_equal(storage, one_by_one)

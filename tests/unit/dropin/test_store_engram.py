"""`EngramStore` keeps embedding tables in the pool and looks rows up, as upstream's (measured)."""

import numpy as np
import pytest

from mooncake.core.errors import RequestError
from mooncake.dropin.store.engram import EngramStore, EngramStoreConfig
from mooncake.store import MooncakeDistributedStore

A = np.arange(12, dtype=np.float32).reshape(3, 4)
B = 100 + np.arange(20, dtype=np.float32).reshape(5, 4)


def shape(sizes: list[int], dim: int) -> EngramStoreConfig:
    config = EngramStoreConfig()
    config.table_vocab_sizes, config.embedding_dim = sizes, dim
    return config


@pytest.fixture
def engram(store: MooncakeDistributedStore) -> EngramStore:
    return EngramStore(7, shape([3, 5], 4), store)


def test_defaults_are_upstream_s() -> None:
    assert (EngramStoreConfig().table_vocab_sizes, EngramStoreConfig().embedding_dim) == ([1024], 64)


def test_it_says_its_shape_and_its_names_without_a_store() -> None:
    config = shape([3, 5], 4)
    engram = EngramStore(7, config)
    config.embedding_dim = 8
    assert engram.get_embedding_dim() == 4
    assert (engram.get_num_heads(), engram.get_table_vocab_sizes()) == (2, [3, 5])
    assert engram.get_store_keys() == ["engram:l7:h0", "engram:l7:h1"]
    with pytest.raises(RequestError, match="without a store"):
        engram.lookup([[[0, 0]]])


@pytest.mark.parametrize(
    "ids",
    [
        [[[0, 0]]],
        [[[2, 4], [1, 1]]],
        np.array([[[0, 1]], [[2, 3]]], np.int32),
        np.array([[[0.0, 1.0]]]),
        np.zeros((2, 6, 2), np.int64)[:, ::2],
    ],
)
def test_a_lookup_gives_the_rows_of_each_head(engram: EngramStore, ids) -> None:
    engram.populate([A, B])
    rows = np.asarray(ids, np.int64)
    found = engram.lookup(ids)
    assert (found.shape, found.dtype) == ((*rows.shape, 4), np.float32)
    assert (found[:, :, 0] == A[rows[:, :, 0]]).all()
    assert (found[:, :, 1] == B[rows[:, :, 1]]).all()


def test_tables_are_plain_float32_objects(engram: EngramStore, store: MooncakeDistributedStore) -> None:
    engram.populate([np.asfortranarray(A.astype(np.float64)), B])
    assert [store.get(key) for key in engram.get_store_keys()] == [A.tobytes(), B.tobytes()]


def test_tables_that_are_there_are_not_replaced(engram: EngramStore) -> None:
    engram.populate([A, B])
    with pytest.raises(RequestError, match="remove_from_store first"):
        engram.populate([A + 1, B])
    assert (engram.lookup([[[0, 0]]])[0, 0, 0] == A[0]).all()


def test_removal_counts_what_was_there_and_keeps_what_was_just_read(engram: EngramStore) -> None:
    assert engram.remove_from_store() == 0
    engram.populate([A, B])
    engram.lookup([[[0, 0]]])
    with pytest.raises(RequestError, match="force=True"):
        engram.remove_from_store()
    assert engram.remove_from_store(force=True) == 2
    with pytest.raises(RequestError, match="populate it"):
        engram.lookup([[[0, 0]]])


def test_a_table_of_another_shape_is_no_table_of_ours(
    engram: EngramStore, store: MooncakeDistributedStore
) -> None:
    store.put("engram:l7:h0", B)
    store.put("engram:l7:h1", B)
    with pytest.raises(RequestError, match="80 bytes in the store, not 3 rows"):
        engram.lookup([[[0, 0]]])


@pytest.mark.parametrize(
    "ids",
    [
        [[[3, 0]]], [[[0, 5]]], [[[-1, 0]]], [[[0.5, 0]]], [[[0]]], [[0, 0]], [[[0, 0, 0]]],
        [], [[]], [[[]]], np.zeros((1, 0, 2), np.int64), "x", None, [[[0, 0]], [[1, 1], [2, 2]]],
    ],
)  # fmt: skip
def test_rows_that_make_no_sense_are_refused(engram: EngramStore, ids) -> None:
    engram.populate([A, B])
    with pytest.raises(RequestError, match="row_ids"):
        engram.lookup(ids)


@pytest.mark.parametrize("buffers", [[A], [A, A], [A, B.tolist()], [A.ravel(), B.ravel()]])
def test_tables_of_wrong_shape_are_refused_and_nothing_is_stored(
    engram: EngramStore, store: MooncakeDistributedStore, buffers: list
) -> None:
    with pytest.raises(RequestError, match="head"):
        engram.populate(buffers)
    assert store.batch_is_exist(engram.get_store_keys()) == [0, 0]


def test_tables_that_do_not_fit_leave_nothing_behind(join) -> None:
    store = join(0)
    engram = EngramStore(1, shape([4, 40_000], 512), store)
    with pytest.raises(Exception, match="populate"):
        engram.populate([np.zeros((4, 512)), np.zeros((40_000, 512))])
    assert store.batch_is_exist(engram.get_store_keys()) == [0, 0]


@pytest.mark.parametrize(
    ("sizes", "dim", "match"),
    [([3], 0, "embedding_dim"), ([], 4, "not be empty"), ([0], 4, "positive"), ([3, -1], 4, "positive")],
)
def test_a_bad_shape_is_refused(sizes: list[int], dim: int, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        EngramStore(1, shape(sizes, dim))


def test_what_is_no_store_is_refused() -> None:
    with pytest.raises(RequestError, match="object is no store"):
        EngramStore(1, EngramStoreConfig(), object())


def test_a_store_that_is_not_set_up_is_an_error_not_a_crash() -> None:
    engram = EngramStore(7, shape([3, 5], 4), MooncakeDistributedStore())
    with pytest.raises(RequestError, match="set up"):
        engram.populate([A, B])
    with pytest.raises(RequestError, match="call setup first"):
        engram.lookup([[[0, 0]]])

"""`mooncake.shared_segment`: the ranks of a host have tensors in one memory, or every one an error."""

import gc
import threading
from collections.abc import Callable

import pytest

from mooncake.core.errors import RequestError

torch = pytest.importorskip("torch")
shared_segment = pytest.importorskip("mooncake.shared_segment")

PATIENCE_S = 30.0
BLOCKS = {
    "k": {"count": 3, "shape": (5, 7), "dtype": torch.bfloat16},
    "scale": {"count": 2, "shape": (3,), "dtype": torch.float32},
}


class Ranks:
    """Runs each rank in a thread; they tell each other what they have to as a process group would."""

    def __init__(self, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.size = size
        self._told: dict[int, bytes] = {}
        self._barrier = threading.Barrier(size, timeout=PATIENCE_S)
        self._rank = threading.local()
        monkeypatch.setattr(shared_segment, "_gather", self._gather)

    def _gather(self, mine: bytes, group: object) -> list[bytes]:
        assert group == "group"
        self._told[self._rank.number] = mine
        self._barrier.wait()
        told = [self._told[rank] for rank in range(self.size)]
        self._barrier.wait()
        return told

    def run(self, call: Callable[[int], object]) -> list[object]:
        """Return what `call` gives for each rank, or its error."""
        results: list[object] = [None] * self.size

        def work(rank: int) -> None:
            self._rank.number = rank
            try:
                results[rank] = call(rank)
            except RequestError as error:
                results[rank] = error

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
            assert not thread.is_alive()
        return results


def alone(blocks=BLOCKS, **flags):
    return shared_segment.create_shared_segment("t", blocks, 1, 0, **flags)


def test_ranks_see_what_each_other_writes(monkeypatch) -> None:
    def make(rank: int):
        return shared_segment.create_shared_segment("t", BLOCKS, 3, rank, owner_rank=1, comm_group="group")

    segments = Ranks(3, monkeypatch).run(make)
    assert len({segment.base_addr() for segment in segments}) == 3
    for index, tensor in enumerate(segments[0].tensors("k")):
        tensor.fill_(index + 1)
    segments[2].tensors("scale")[1][:] = torch.tensor([1.5, 2.5, 3.5])
    assert [float(tensor.sum()) for tensor in segments[1].tensors("k")] == [35.0, 70.0, 105.0]
    assert segments[0].tensors("scale")[1].tolist() == [1.5, 2.5, 3.5]
    assert segments[0].tensors("scale")[0].tolist() == [0, 0, 0]


def test_tensors_are_zeroed_contiguous_pages_of_their_shape() -> None:
    segment = alone()
    tensors = segment.tensors("k") + segment.tensors("scale")
    assert [(tuple(one.shape), one.dtype) for one in tensors[2:4]] == [
        ((5, 7), torch.bfloat16), ((3,), torch.float32),
    ]  # fmt: skip
    starts = [one.data_ptr() for one in tensors]
    assert all(one.is_contiguous() and not one.any() for one in tensors)
    assert all((start - segment.base_addr()) % 4096 == 0 for start in starts)
    assert len(set(starts)) == 5
    assert all(0 <= start - segment.base_addr() < segment.total_size() for start in starts)


def test_a_tensor_keeps_the_memory() -> None:
    tensor = alone().tensors("k")[0]
    gc.collect()
    tensor.fill_(3)
    assert float(tensor.sum()) == 105.0


def test_ranks_that_declare_other_blocks_are_all_told(monkeypatch) -> None:
    def make(rank: int):
        blocks = BLOCKS if rank else {**BLOCKS, "k": {**BLOCKS["k"], "shape": (7, 5)}}
        return shared_segment.create_shared_segment("t", blocks, 2, rank, comm_group="group")

    errors = Ranks(2, monkeypatch).run(make)
    assert all(isinstance(error, RequestError) and "disagrees" in str(error) for error in errors)


def test_an_error_of_one_rank_is_told_to_all(monkeypatch) -> None:
    def make(rank: int):
        blocks = BLOCKS if rank else {"k": {"count": 0, "shape": (1,), "dtype": torch.float32}}
        return shared_segment.create_shared_segment("t", blocks, 2, rank, comm_group="group")

    errors = Ranks(2, monkeypatch).run(make)
    assert all(isinstance(error, RequestError) and "rank 0: block 'k'" in str(error) for error in errors)


def test_the_older_name_of_the_group_and_vllm_s_coordinator_serve(monkeypatch) -> None:
    class Coordinator:
        cpu_group = "group"

    def make(rank: int):
        return shared_segment.create_shared_segment("t", BLOCKS, 2, rank, tp_group=Coordinator())

    assert all(segment.total_size() for segment in Ranks(2, monkeypatch).run(make))


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ({"mmap": False}, "without Ascend NPUs"),
        ({"host_register": True}, "without Ascend NPUs"),
        ({"comm_group": 1, "tp_group": 2}, "give comm_group only"),
        ({"blocks": {}}, "needs a block"),
        ({"blocks": {"k": {"count": 1}}}, "needs count, shape and dtype"),
        ({"blocks": {"k": {"count": 1, "shape": (), "dtype": torch.int8}}}, "must be positive"),
        ({"blocks": {"k": {"count": 1, "shape": (0,), "dtype": torch.int8}}}, "must be positive"),
        ({"blocks": {"k": {"count": 1, "shape": (1,), "dtype": "float"}}}, "needs count, shape and dtype"),
        ({"owner_rank": 1}, "owner 1 of 1"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: dict, match: str) -> None:
    with pytest.raises(shared_segment.SharedSegmentError, match=match):
        alone(**flags)


def test_several_ranks_need_a_group() -> None:
    with pytest.raises(RequestError, match="need a comm_group"):
        shared_segment.create_shared_segment("t", BLOCKS, 2, 0)


def test_an_unknown_block_is_named_with_those_there_are() -> None:
    with pytest.raises(RequestError, match="no block 'v': there are k, scale"):
        alone().tensors("v")


def test_support_is_for_host_memory_only() -> None:
    supported = shared_segment.shared_segment_supported
    assert (supported(), supported(mmap=False), supported(host_register=True)) == (True, False, False)

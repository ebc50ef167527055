"""An engine whose ranks cannot share blocks through the pool is refused before it loads, and told why."""

from types import SimpleNamespace

import pytest

from mooncake.core.errors import ConfigError
from mooncake.worker.context import ranks_of
from mooncake.worker.spec import EngineSpec


def engine(load_mode: str = "async", **sizes: int) -> tuple[SimpleNamespace, EngineSpec]:
    parallel = {
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1,
        "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1, "nnodes": 1, **sizes,
    }  # fmt: skip
    spec = EngineSpec(instance_id="i", role="both", epoch="e", run_dir="/r", model="m", load_mode=load_mode)
    return SimpleNamespace(parallel_config=SimpleNamespace(**parallel)), spec


@pytest.mark.parametrize("mode", ["async", "layerwise"])
def test_one_rank_may_load_in_every_mode(mode):
    assert ranks_of(*engine(mode)) == 1


def test_tensor_parallel_ranks_share_blocks():
    assert ranks_of(*engine(tensor_parallel_size=4)) == 4


@pytest.mark.parametrize("kind", ["pipeline", "data", "prefill_context", "decode_context"])
def test_other_kinds_of_ranks_are_refused_by_name(kind):
    with pytest.raises(ConfigError, match=rf"{kind.replace('_', ' ')} parallel size 2: .*--no-pool"):
        ranks_of(*engine(tensor_parallel_size=2, **{f"{kind}_parallel_size": 2}))


def test_an_engine_over_several_hosts_is_refused():
    with pytest.raises(ConfigError, match=r"an engine on 2 hosts: .*--no-pool"):
        ranks_of(*engine(tensor_parallel_size=2, nnodes=2))


def test_several_ranks_cannot_load_layer_by_layer():
    with pytest.raises(ConfigError, match="load mode layerwise with 2 ranks"):
        ranks_of(*engine("layerwise", tensor_parallel_size=2))

"""Other projects' own connectors run on our package as on upstream's: SGLang, LMCache, LMDeploy and more.

vLLM's run in engines, in test_mooncake_connector.py and test_mooncake_store_connector.py; here only those of
its encoder cache. The others' Python files lie where scripts/connector-parts puts them, in the versions of
requirements/connectors.txt. What of them is replaced, and by what, is said in tests/integration/others/.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mooncake.dropin.client.command import ClientOptions, RealClient
from tests.integration.engine_script import ROOT, run_script
from tests.unit.dropin.conftest import MasterThread

pytestmark = pytest.mark.integration

CACHE = Path(os.environ.get("MOONCAKE_CACHE", "~/.cache/mooncake")).expanduser()
CONNECTORS = Path(os.environ.get("MOONCAKE_CONNECTORS", CACHE / "connectors"))
PINS = ROOT.joinpath("requirements/connectors.txt").read_text().splitlines()
PACKAGES = [line.split()[0].replace("==", "-") for line in PINS if not line.startswith("#")]
PAGES = 8
"""Of tests.integration.others.sglang_hicache."""


@pytest.fixture(scope="module")
def master() -> Iterator[MasterThread]:
    master = MasterThread()
    yield master
    master.stop()


class Others:
    """Runs programs of tests/integration/others."""

    def __init__(self, master: MasterThread, folder: Path) -> None:
        self._folder = folder
        self._job = {
            "master": master.address, "metrics_port": int(master.url.rpartition(":")[2]),
            "scratch": str(folder),
        }  # fmt: skip

    def run(self, program: str, *packages: str, **more: Any) -> dict[str, Any]:
        missing = [name for name in packages if not CONNECTORS.joinpath(name).is_dir()]
        if missing:
            pytest.skip(f"{', '.join(missing)}: not in {CONNECTORS}: run scripts/connector-parts")
        job = {**self._job, "folders": [str(CONNECTORS / name) for name in packages], **more}
        return json.loads(run_script(f"others.{program}", [], json.dumps(job), self._folder))


@pytest.fixture
def others(master: MasterThread, tmp_path: Path) -> Others:
    return Others(master, tmp_path)


def versions(project: str) -> list[str]:
    return [name for name in PACKAGES if name.startswith(project + "-")]


# ------------------------------------------------------------ vLLM


def test_vllms_encoder_cache_is_shared_through_the_store_and_pushed_by_the_engine(
    others: Others, master: MasterThread
) -> None:
    config = {
        "metadata_server": "P2PHANDSHAKE", "master_server_address": master.address, "protocol": "tcp",
        "global_segment_size": "16MB", "local_buffer_size": "16MB",
    }  # fmt: skip
    assert others.run("vllm_encoder_cache", config=config) == {
        "store": {"before": 0, "loaded": True, "same": True, "other shape": 0},
        "transfer": {
            "registered": 0, "same": True, "refused": True, "released": [True, True], "unregistered": True,
        },
    }  # fmt: skip


# ------------------------------------------------------------ SGLang


@pytest.fixture(scope="module", params=versions("sglang"))
def sglang(
    request: pytest.FixtureRequest, master: MasterThread, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Any]]:
    """What SGLang's storage class says, with a `mooncake_client` beside it."""
    client = RealClient(
        ClientOptions(port=0, global_segment_size="16MB", master_server_address=master.address)
    )
    client.start()
    others = Others(master, tmp_path_factory.mktemp("sglang"))
    try:
        yield others.run("sglang_hicache", request.param, client=f"127.0.0.1:{client.port}")
    finally:
        client.close()


newest_sglang = pytest.mark.parametrize("sglang", versions("sglang")[:1], indirect=True)
"""For what older versions do not have; the pins begin with the newest."""


@newest_sglang
def test_sglangs_own_test_of_its_store_passes(sglang: dict[str, Any]) -> None:
    assert sglang["own tests"] == ["single", "mha 0/1", "mla 0/1", "mha 1/4", "mla 3/8"]


def test_sglang_finds_the_pool_by_environment_file_and_extra_config(sglang: dict[str, Any]) -> None:
    assert sglang["configs"] == {
        "environment": True,
        "file": [True, True],
        "extra_config": [True, True],
    }


def test_sglang_sees_the_longest_prefix_and_reads_it(sglang: dict[str, Any]) -> None:
    assert sglang["prefixes"] == {
        "exists": [0, 3, PAGES, 0], "set": [True, True], "got": [True, True, False], "same": True,
    }  # fmt: skip


def test_sglangs_disaggregation_writes_into_the_other_engine_and_hears_of_failures(
    sglang: dict[str, Any],
) -> None:
    assert sglang["engine"] == {
        "registered": [0, 0], "wrote": 0, "same": True, "probe": 0, "single": 0, "outside": True,
        "gone": True, "ends": 0,
    }  # fmt: skip


@newest_sglang
def test_sglangs_layer_first_pages_go_in_pieces_and_groups(sglang: dict[str, Any]) -> None:
    assert sglang["layer first"] == [True, True, True]


@newest_sglang
def test_sglangs_hybrid_pools_are_read_and_written_in_one_call(sglang: dict[str, Any]) -> None:
    assert sglang["side pools"] == {
        "missing": 0, "set": True, "hits": PAGES, "got": True, "same": True,
    }  # fmt: skip


@newest_sglang
def test_sglangs_embedding_store_reads_what_it_has_put(sglang: dict[str, Any]) -> None:
    answers = sglang["embeddings"]
    assert answers["got"] == [False] + [True] * 2 * PAGES
    assert (answers["put"], answers["exist"], answers["same"]) == (True, [True, False], True)


def test_sglangs_standalone_storage_is_a_light_client_with_shared_memory(sglang: dict[str, Any]) -> None:
    assert sglang["standalone"] == [True, True, True]


# ------------------------------------------------------------ LMCache


@pytest.mark.parametrize("package", versions("lmcache"))
def test_lmcaches_remote_backend_stores_finds_and_reads_chunks(others: Others, package: str) -> None:
    answers = others.run("lmcache_connector", package)
    expected = {
        "contains": [0, 3], "got": [True, True, True, False], "missing": True, "lookup": 48,
        "removed": True,
    }  # fmt: skip
    channel = answers.pop("channel", None)
    assert answers == {"zero copy": expected, "with shapes": expected}
    assert channel in (None, {"succeeded": [True, True], "same": [True, True], "untouched": True})


# ------------------------------------------------------------ others


@pytest.mark.parametrize("package", versions("lmdeploy"))
def test_lmdeploys_connector_loads_what_it_has_saved_and_its_engines_migrate(
    others: Others, package: str
) -> None:
    assert others.run("lmdeploy_store", package) == {
        "connector": {"lookup": [0, 48], "same": True, "invalid": [4]},
        "migration": {"read": True},
    }


@pytest.mark.parametrize("package", versions("TransferQueue"))
def test_transfer_queue_reads_tensors_and_objects_and_replaces_them(others: Others, package: str) -> None:
    assert others.run("transfer_queue", package) == {
        "tensors": True, "objects": True, "written again": True, "left": 0,
    }  # fmt: skip


@pytest.mark.parametrize("packages", [(*versions("checkpoint-engine"), *versions("verl"))])
def test_weights_go_from_memory_to_memory_for_checkpoint_engine_and_verl(
    others: Others, packages: tuple[str, ...]
) -> None:
    assert others.run("weights", *packages) == {
        "checkpoint-engine": {"same": True, "ended": [5, 1]},
        "verl": {"same": True, "count": 9},
    }

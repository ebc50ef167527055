"""The page of an instance: what its engine wrote into shared memory, under its id and the role of now."""

from types import SimpleNamespace

from prometheus_client import CollectorRegistry

from mooncake.worker.gpu_blocks import GpuBlocks, LeftOut, Removed
from mooncake.worker.metrics import GpuCollector, PulseCollector
from mooncake.worker.pulse import FIELDS, Pulse


def test_every_number_of_the_engine_is_on_the_page_under_the_role_of_now(tmp_path):
    pulse, roles, registry = Pulse(tmp_path / "pulse", create=True), ["prefill"], CollectorRegistry()
    registry.register(PulseCollector(pulse, "p0", lambda: roles[0], lambda: 10.0))
    for number, field in enumerate(FIELDS[1:], start=1):
        pulse.add(field, number)
    page = [sample for family in registry.collect() for sample in family.samples]
    assert {sample.value for sample in page} == {*range(1, len(FIELDS)), 10.0}  # 10: the age of the pulse
    assert {tuple(sample.labels[n] for n in ("instance_id", "role")) for sample in page} == {
        ("p0", "prefill")
    }
    roles[0] = "decode"
    pulse.set("requests_running", 0)
    now = {"instance_id": "p0", "role": "decode"}
    assert registry.get_sample_value("mooncake_engine_requests_running", now) == 0


def test_the_engines_own_cache_is_shown_in_bytes_with_what_it_gave_up_once_it_tells():
    registry = CollectorRegistry()
    gpu = GpuCollector("p0", lambda: "prefill")
    registry.register(gpu)
    assert list(registry.collect()) == []
    blocks = GpuBlocks(b"", 4, 100)
    blocks.apply([Removed([1, 2, 3])])
    blocks.left_out[LeftOut.LORA] = 5
    gpu.events = SimpleNamespace(reader=SimpleNamespace(blocks=blocks, undecodable=1, gaps=2, lost=3))
    gpu.block_bytes, gpu.blocks_max = 1000, 100

    def value(name: str, **labels: str) -> float | None:
        return registry.get_sample_value(
            f"mooncake_gpu_{name}", {"instance_id": "p0", "role": "prefill", **labels}
        )

    assert (value("cache_bytes"), value("capacity_bytes")) == (0, 100_000)
    assert value("evicted_blocks_total") == 3
    assert value("blocks_left_out_total", reason="lora") == 5
    assert [value(f"events_{name}_total") for name in ("undecodable", "gaps", "lost")] == [1, 2, 3]

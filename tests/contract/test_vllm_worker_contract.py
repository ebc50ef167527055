"""The engine side of the seam: every vLLM symbol that mooncake/worker uses, and the shapes it relies on.

A failure means: read the named vLLM place again, then decide (ADR 0002).
"""

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mooncake.worker

SYMBOLS = {
    "vllm.v1.engine:EngineCoreRequest": "undecodable() builds one by keyword",
    "vllm.v1.engine:EngineCoreRequestType": "WAKEUP ends a blocked input queue at SIGTERM",
    "vllm.v1.engine:core": "MooncakeEngine extends its EngineCoreProc; its MsgpackDecoder is replaced",
    "vllm.v1.engine.core:EngineShutdownState": "REQUESTED asks the busy loop to end",
    "vllm.v1.engine.utils:EngineZmqAddresses": "what a handshake would have answered",
    "vllm.v1.metrics.stats:SchedulerStats": "what a step tells of the engine's own prefix cache",
    "vllm.v1.request:Request": "resume appends output tokens to it",
    "vllm.v1.request:RequestStatus": "FINISHED_ABORTED for everything of a gateway that is gone",
    "vllm.v1.serial_utils:MsgpackDecoder": "TolerantDecoder extends it",
    "vllm.v1.serial_utils:MsgpackEncoder": "one per output thread",
    "vllm.v1.executor:Executor": "get_class(config)",
    "vllm.v1.executor:multiproc_executor": "RanksExecutor extends its executor; its WorkerProc is replaced",
    "vllm.platforms:current_platform": "ranks of a CPU engine are forks",
    "vllm.distributed.device_communicators.shm_broadcast:ShmRingBuffer": "unlinked once it is mapped",
    "vllm.engine.arg_utils:AsyncEngineArgs": "engine settings from flags",
    "vllm.entrypoints.launchers.cli_args:make_arg_parser": "vLLM's own flags pass through",
    "vllm.utils.argparse_utils:FlexibleArgumentParser": "vLLM's own flags pass through",
    "vllm.v1.structured_output:StructuredOutputManager": "_create_grammar is patched by resume",
    "vllm.v1.worker:gpu_input_batch": "CachedRequestState is patched by resume",
    "vllm.v1.worker:gpu_model_runner": "must use the same CachedRequestState",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorBase_V1": "base of MooncakeConnector",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorMetadata": "StepMeta is registered as one",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:KVConnectorRole": "scheduler or worker side",
    "vllm.distributed.kv_transfer.kv_connector.v1.base:SupportsHMA": "keeps the hybrid allocator on",
    "vllm.config:VllmConfig": "annotation",
    "vllm.v1.core.sched.output:SchedulerOutput": "annotation",
    "vllm.v1.kv_cache_interface:KVCacheConfig": "annotation",
}
"""module:name -> what we use it for."""


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def used_symbols() -> set[str]:
    """Every `from vllm... import name` of the worker package, except imports that only warm up."""
    used = set()
    for path in Path(mooncake.worker.__path__[0]).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                used |= {f"{node.module}:{alias.name}" for alias in node.names}
    return used


def test_the_list_names_every_symbol_that_the_worker_imports():
    assert used_symbols() == set(SYMBOLS)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_every_symbol_exists(symbol):
    module, _, name = symbol.partition(":")
    assert getattr(importlib.import_module(module), name, None) or importlib.import_module(f"{module}.{name}")


class TestTheRanks:
    def test_are_started_by_the_class_that_we_replace(self):
        from vllm.v1.executor import multiproc_executor as module

        assert "WorkerProc.make_worker_process(" in inspect.getsource(module.MultiprocExecutor._init_executor)
        source = inspect.getsource(module.WorkerProc.make_worker_process)
        assert "target=WorkerProc.worker_main" in source
        assert "daemon=True" in source
        assert {"rank", "local_rank", "vllm_config"} <= set(re.findall(r'"(\w+)": ', source))

    def test_take_no_thread_count_of_their_own(self):
        from vllm.v1.executor import multiproc_executor as module

        source = inspect.getsource(module.set_multiprocessing_worker_envs)
        assert source.index("is_cpu()") < source.index("set_num_threads")

    def test_have_mapped_all_queues_when_we_unlink_them(self):
        from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
        from vllm.v1.executor import multiproc_executor as module

        engine = inspect.getsource(module.MultiprocExecutor._init_executor)
        assert "= get_file_store_init_method()" in engine, "replaced by name"
        assert engine.index("response_mq.wait_until_ready()") < engine.index("self._post_init_executor()")
        rank = inspect.getsource(module.WorkerProc.worker_main)
        assert rank.index("worker.worker_response_mq.wait_until_ready()") < rank.index("worker_busy_loop()")
        assert "worker = WorkerProc(" in rank
        source = inspect.getsource(ShmRingBuffer)
        assert "self.is_creator = True" in source
        assert "if self.is_creator:\n                self.shared_memory.unlink()" in source

    def test_take_the_names_of_their_own_queues_only(self):
        """vLLM's queues of a parent are in a fork as if it had made them."""
        code = """
import os
from pathlib import Path
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
from mooncake.worker import ranks
def there(queue):
    return (Path("/dev/shm") / queue.shared_memory.name).exists()
engines = ShmRingBuffer(1, 1024, 4)
pid = os.fork()
if not pid:
    ranks.leave_queues_to_others()
    own = ShmRingBuffer(1, 1024, 4)
    ranks.unlink_shared_memory()
    os._exit(10 * there(own) + (not there(engines)))
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
assert there(engines)
ranks.unlink_shared_memory()
assert not there(engines)
"""
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
        )
        assert done.returncode == 0, done.stderr

    def test_are_watched_by_the_method_that_we_replace(self):
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor

        assert parameters(MultiprocExecutor.start_worker_monitor) == ["self", "inline"]
        assert "self.start_worker_monitor()" in inspect.getsource(MultiprocExecutor._init_executor)
        shutdown = inspect.getsource(MultiprocExecutor.shutdown)
        assert shutdown.index("self.shutting_down = True") < shutdown.index("death_writer.close()")

    def test_are_waited_for_with_the_outcome_of_their_loads(self):
        """The scheduler half gives the lease back then, and one rank's bad block is bad for all."""
        from vllm.distributed.kv_transfer.kv_connector.utils import KVOutputAggregator
        from vllm.v1.outputs import KVConnectorOutput, ModelRunnerOutput

        def heard(*outputs: KVConnectorOutput) -> KVConnectorOutput:
            empty = [ModelRunnerOutput(req_ids=[], req_id_to_index={}) for _ in outputs]
            for one, output in zip(empty, outputs, strict=True):
                one.kv_connector_output = output
            return aggregator.aggregate(empty).kv_connector_output

        aggregator = KVOutputAggregator(2)
        first = heard(KVConnectorOutput(finished_recving={"r"}), KVConnectorOutput(invalid_block_ids={7}))
        assert (first.finished_recving, first.invalid_block_ids) == (None, {7})
        second = heard(KVConnectorOutput(), KVConnectorOutput(finished_recving={"r"}))
        assert second.finished_recving == {"r"}

    def test_know_their_number_before_they_make_a_connector(self):
        from vllm.v1.worker.worker_base import WorkerBase

        assert "self.parallel_config.rank = rank" in inspect.getsource(WorkerBase.__init__)


class TestTheEngine:
    def test_takes_our_addresses_and_threads(self):
        from vllm.v1.engine.core import EngineCoreProc
        from vllm.v1.engine.utils import EngineZmqAddresses

        assert parameters(EngineCoreProc.process_output_sockets)[1:] == [
            "output_paths",
            "coord_output_path",
            "engine_index",
        ]
        assert {"inputs", "outputs"} <= set(EngineZmqAddresses.__dataclass_fields__)
        wanted = {"vllm_config", "local_client", "handshake_address", "executor_class", "log_stats"}
        assert wanted <= set(parameters(EngineCoreProc.__init__))

    def test_shakes_hands_through_the_one_method_that_we_replace(self):
        from vllm.v1.engine.core import EngineCoreProc

        source = inspect.getsource(EngineCoreProc.__init__)
        assert "self._perform_handshakes(" in source
        assert "as addresses" in source

    def test_decodes_requests_with_the_decoder_that_we_replace(self):
        from vllm.v1.engine.core import EngineCoreProc

        source = inspect.getsource(EngineCoreProc.process_input_sockets)
        assert re.search(r"= MsgpackDecoder\(\s*EngineCoreRequest", source), (
            "install_decoder replaces it by name"
        )
        assert "self.preprocess_add_request(" in source

    def test_answers_a_request_that_preprocessing_refuses(self):
        from vllm.v1.engine.core import EngineCoreProc

        assert "_handle_request_preproc_error" in inspect.getsource(EngineCoreProc.process_input_sockets)
        assert parameters(EngineCoreProc.preprocess_add_request) == ["self", "request"]

    def test_queues_outputs_by_client_index(self):
        from vllm.v1.engine.core import EngineCoreProc

        assert "output_queue" in inspect.getsource(EngineCoreProc.__init__)
        assert "client_index, outputs = output" in inspect.getsource(EngineCoreProc.process_output_sockets)

    def test_says_how_many_run_and_wait_how_much_kv_is_in_use_and_what_its_cache_found(self):
        from vllm.v1.core.kv_cache_manager import KVCacheManager
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.metrics.stats import PrefixCacheStats, SchedulerStats

        assert parameters(Scheduler.get_request_counts) == ["self"]
        assert "num_running, num_waiting = self.get_request_counts()" in inspect.getsource(
            Scheduler.make_stats
        )
        assert "num_deferred = len(self.deferred_waiting)" in inspect.getsource(Scheduler.make_stats)
        assert isinstance(KVCacheManager.usage, property)
        found = SchedulerStats().prefix_cache_stats
        assert isinstance(found, PrefixCacheStats)
        assert (found.queries, found.hits, found.preempted_requests) == (0, 0, 0)

    def test_lets_a_scheduler_end_requests_of_a_client(self):
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.request import Request

        assert parameters(Scheduler.finish_requests)[1:] == ["request_ids", "finished_status"]
        assert "client_index" in parameters(Request.__init__)


class TestResume:
    def test_request_appends_output_tokens_and_carries_prefill_stats(self):
        from vllm.v1.request import Request

        assert parameters(Request.append_output_token_ids) == ["self", "token_ids"]
        assert "self.prefill_stats" in inspect.getsource(Request.__init__)

    def test_the_runner_keeps_what_we_restore(self):
        from vllm.v1.worker import gpu_input_batch, gpu_model_runner

        state = gpu_input_batch.CachedRequestState
        assert {"output_token_ids", "generator", "sampling_params"} <= set(state.__dataclass_fields__)
        assert "__post_init__" in vars(state)
        assert gpu_model_runner.CachedRequestState is state

    def test_a_grammar_is_made_in_one_place_and_can_be_advanced(self):
        from vllm.v1.structured_output import StructuredOutputManager
        from vllm.v1.structured_output.backend_types import StructuredOutputGrammar

        assert parameters(StructuredOutputManager._create_grammar)[:2] == ["self", "request"]
        assert parameters(StructuredOutputGrammar.accept_tokens) == ["self", "request_id", "tokens"]

    def test_cpu_sampling_draws_one_integer_per_token(self):
        from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

        source = inspect.getsource(TopKTopPSampler.forward_cpu)
        assert "torch.randint" in source, "advance_generator must draw what the sampler draws"


CALLS = {
    "on_new_request": ["request"],
    "get_num_new_matched_tokens": ["request", "num_computed_tokens"],
    "update_state_after_alloc": ["request", "blocks", "num_external_tokens"],
    "build_connector_meta": ["scheduler_output"],
    "update_connector_output": ["connector_output"],
    "request_finished": ["request", "block_ids"],
    "register_kv_caches": ["kv_caches"],
    "bind_connector_metadata": ["connector_metadata"],
    "start_load_kv": ["forward_context", "kwargs"],
    "wait_for_layer_load": ["layer_name"],
    "save_kv_layer": ["layer_name", "kv_layer", "attn_metadata", "kwargs"],
    "wait_for_save": [],
    "get_finished": ["finished_req_ids"],
    "get_block_ids_with_load_errors": [],
    "shutdown": [],
}


class TestTheConnector:
    @pytest.mark.parametrize("name", CALLS)
    def test_is_called_as_its_base_class_says(self, name):
        from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1

        from mooncake.worker.connector import MooncakeConnector

        theirs = getattr(KVConnectorBase_V1, name)
        assert parameters(theirs)[1:] == CALLS[name]
        assert parameters(getattr(MooncakeConnector, name))[1:] == CALLS[name]

    def test_has_no_abstract_method_left(self):
        from mooncake.worker.connector import MooncakeConnector

        assert not MooncakeConnector.__abstractmethods__

    def test_block_ids_of_a_step_come_with_the_scheduler_output(self):
        from vllm.v1.core.sched.output import SchedulerOutput

        assert "kv_connector_block_state" in SchedulerOutput.__dataclass_fields__


class TestNodes:
    """An engine over several nodes: mooncake/worker/nodes.py, rank.py."""

    def test_a_follower_needs_no_more_than_an_executor_that_does_not_watch(self):
        from vllm.v1.executor.multiproc_executor import MultiprocExecutor, WorkerProcHandle

        assert parameters(MultiprocExecutor.__init__) == ["self", "vllm_config", "monitor_workers"]
        assert "proc" in WorkerProcHandle.__dataclass_fields__
        source = inspect.getsource(importlib.import_module("vllm.entrypoints.cli.serve").run_headless)
        assert "MultiprocExecutor(vllm_config, monitor_workers=False)" in source

    def test_flags_of_nodes_exist(self):
        from vllm.engine.arg_utils import EngineArgs

        fields = EngineArgs.__dataclass_fields__
        assert {"nnodes", "node_rank", "master_addr", "master_port", "worker_extension_cls"} <= set(fields)

    def test_ranks_import_our_module_before_their_worker_is_made(self):
        from vllm.v1.worker.worker_base import WorkerWrapperBase

        source = inspect.getsource(WorkerWrapperBase.init_worker)
        assert source.index("parallel_config.worker_extension_cls") < source.index("worker_class(**kwargs)")

    def test_ranks_find_each_other_by_the_store_that_we_bind(self):
        rendezvous = importlib.import_module("torch.distributed.rendezvous")
        assert parameters(rendezvous._create_c10d_store) == [
            "hostname", "port", "rank", "world_size", "timeout", "use_libuv",
        ]  # fmt: skip
        assert "_create_c10d_store(" in inspect.getsource(rendezvous._tcp_rendezvous_handler)
        state = importlib.import_module("vllm.distributed.parallel_state")
        assert "get_distributed_init_method(ip, port)" in inspect.getsource(
            state.init_distributed_environment
        )

    def test_queues_between_nodes_listen_where_they_are_told(self):
        from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

        source = inspect.getsource(MessageQueue.__init__)
        assert 'bind(f"tcp://{connect_ip}:0")' in source
        assert "connect_ip = get_ip()" in source
        network = importlib.import_module("vllm.utils.network_utils")
        assert "envs.VLLM_HOST_IP" in inspect.getsource(network.get_ip)

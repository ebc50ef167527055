"""The engine process: vLLM's engine core (engine_core.py) with our settings and signals.

One process for an engine of one rank: executor `uni`, because a second process costs a second import and a
message queue per step (measured: half of stock vLLM's CPU time per token on a small model). An engine of
several has a process for each beside this one, which schedules: ranks.py.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import msgspec

from mooncake.core import log as logs
from mooncake.core.errors import ConfigError
from mooncake.core.process import set_parent_death_signal
from mooncake.worker import nodes
from mooncake.worker.context import ranks_of
from mooncake.worker.pulse import Pulse
from mooncake.worker.spec import STOP_SIGNAL, EngineSpec

INSECURE_ENV = "VLLM_ALLOW_INSECURE_SERIALIZATION"


def refuse_insecure_serialization() -> None:
    """Raise if vLLM's pickle fallback is enabled: no pickle on any wire, ever.

    Raises:
        ConfigError: the variable is set to anything but 0 or empty.
    """
    value = os.environ.get(INSECURE_ENV, "")
    if value not in ("", "0"):
        raise ConfigError(
            f"{INSECURE_ENV}={value}: this makes vLLM unpickle network data (remote code execution); "
            f"unset it and start again"
        )


def executor_of(spec: EngineSpec, config: Any, pulse: Pulse) -> Any:
    """Return the class of vLLM's executor, made ready: for one rank in this process, or a process for each.

    One rank computes here, so torch's thread pool is sized here, by call: the process may be a fork of one
    that has read its environment. Several are forks of this process, in which no thread pool may have run.
    """
    if config.parallel_config.distributed_executor_backend == "mp":
        from mooncake.worker import ranks

        pulse.has_ranks(config.parallel_config.local_world_size)
        return ranks.executor(spec, config)
    import torch
    from vllm.v1.executor import Executor

    torch.set_num_threads(spec.threads_used)
    return Executor.get_class(config)


def engine_arguments(spec: EngineSpec) -> list[str]:
    """Return vLLM command-line arguments for `spec`; later ones win, so the user's come last."""
    arguments = [
        f"--model={spec.model}",
        f"--dtype={spec.dtype}",
        f"--block-size={spec.block_size}",
        f"--kv-cache-memory-bytes={spec.kv_memory_bytes}",
        f"--max-num-seqs={spec.max_num_seqs}",
        f"--max-num-batched-tokens={spec.max_num_batched_tokens}",
        "--enforce-eager",
        "--prefix-caching-hash-algo=sha256",
        "--scheduling-policy=priority",  # first come, first served among those of one priority
    ]
    if spec.max_model_len:
        arguments.append(f"--max-model-len={spec.max_model_len}")
    if spec.store is not None:
        transfer = {
            "kv_connector": "MooncakeConnector",
            "kv_connector_module_path": "mooncake.worker.connector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "engine_id": spec.instance_id,
            "kv_connector_extra_config": {"mooncake_spec": msgspec.to_builtins(spec)},
        }
        arguments.append(f"--kv-transfer-config={msgspec.json.encode(transfer).decode()}")
        # without a pool an engine's blocks have no names by which gateways could look for them
        events = {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": spec.kv_events,
            "replay_endpoint": spec.kv_replay,
        }
        arguments.append(f"--kv-events-config={msgspec.json.encode(events).decode()}")
    if spec.nodes is not None:
        arguments += nodes.arguments(spec.nodes)
    return [*arguments, *spec.vllm_args]


def build_config(spec: EngineSpec) -> Any:
    """Return the VllmConfig of `spec`.

    Raises:
        ConfigError: it has ranks of a kind that cannot share blocks through the pool.
    """
    # read by vLLM when the configuration is made: keeps the CPU executor in this process
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # the server's parser: the user's flags go to gateway and engines alike, each takes its own
    parser = make_arg_parser(FlexibleArgumentParser())
    arguments = AsyncEngineArgs.from_cli_args(parser.parse_args(engine_arguments(spec)))
    config = arguments.create_engine_config()
    if spec.store is not None:
        ranks_of(config, spec)  # refuse now what each rank would refuse once it is loaded
    return config


def run(spec: EngineSpec) -> int:
    """Run the engine until its relay says stop; return the exit code."""
    logs.setup_inherited("engine")
    refuse_insecure_serialization()
    pulse = Pulse(spec.pulse_path, create=False)
    pulse.start_beating()
    if spec.cores:  # vLLM's own binding needs its OMP environment before the import
        os.sched_setaffinity(0, spec.cores)
    if spec.nodes is not None:
        os.environ.update(nodes.environment(spec.nodes, os.environ))
    config = build_config(spec)
    executor_class = executor_of(spec, config, pulse)
    if spec.nodes is not None and spec.nodes.rank:
        return nodes.follow(spec, config, executor_class)
    from mooncake.worker import engine_core, resume

    resume.install(config.model_config.get_vocab_size())
    engine_core.install_decoder()
    stopping = threading.Event()
    engine: Any = None

    def stop(*_: Any) -> None:
        if engine is None:
            os._exit(0)  # still loading: nothing to save
        if not stopping.is_set():
            stopping.set()
            from vllm.v1.engine.core import EngineShutdownState

            engine.shutdown_state = EngineShutdownState.REQUESTED
            # put from another thread: this handler may interrupt the queue's own lock
            threading.Thread(target=wake, daemon=True).start()

    def wake() -> None:
        from vllm.v1.engine import EngineCoreRequestType

        engine.input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

    signal.signal(STOP_SIGNAL, stop)
    for number in (signal.SIGTERM, signal.SIGINT):  # these may reach the whole group; the relay decides
        signal.signal(number, signal.SIG_IGN)
    engine = engine_core.MooncakeEngine(
        spec,
        pulse,
        vllm_config=config,
        local_client=True,
        handshake_address="",
        executor_class=executor_class,
        log_stats=True,
    )
    try:
        engine.run_busy_loop()
    except SystemExit:
        return 0
    finally:
        engine.shutdown()
    return 0


def main() -> None:
    """`python -m mooncake.worker.engine SPEC.json PARENT_PID`."""
    set_parent_death_signal(int(sys.argv[2]))
    spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=EngineSpec)
    code = run(spec)
    sys.stdout.flush()
    sys.stderr.flush()
    # vLLM's threads (ZMQ contexts with linger) may outlive the loop: everything is flushed, leave
    os._exit(code)


if __name__ == "__main__":
    main()

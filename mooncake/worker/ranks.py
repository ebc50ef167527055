"""The ranks of an engine of several (tensor parallel): a process each on this host that dies with its engine.

vLLM's own multiprocess executor starts, feeds and hears them. Ours differs in what it must not leave to it:

- a rank takes SIGKILL from the kernel when its engine ends in whatever way, and no signal that comes to the
  whole process group: the relay drains first, then ends the engine;
- a rank that ends takes the engine along at once: the others wait for it in shared memory, deaf to signals,
  and nothing here is worth saving. The relay sees the engine end, as it would with one rank;
- what they share has no name any more once all have it, so nothing of it is left, however they end;
- on a CPU, ranks are forks of the engine (an import less for each, 20 CPU-seconds), and its cores and threads
  are shared out among them here, as vLLM's own binding wants a NUMA node for each rank.
"""

import functools
import gc
import glob
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import structlog
import torch
from vllm.distributed.device_communicators.shm_broadcast import ShmRingBuffer
from vllm.platforms import current_platform
from vllm.v1.executor import multiproc_executor

from mooncake.core import log as logs
from mooncake.core.process import set_parent_death_signal
from mooncake.worker import resume
from mooncake.worker.pulse import RankPulse
from mooncake.worker.spec import EngineSpec

log = structlog.get_logger(__name__)

LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
"""Ranks of one host talk by shared memory, and by sockets of gloo's without any authentication."""
RANK_ENDED = 1
"""Exit code of an engine that lost a rank."""
REAP_S = 1.0
"""For the exit code of a rank: its end shows a moment before."""
_run_rank = multiproc_executor.WorkerProc.worker_main


class RankProcess(multiproc_executor.WorkerProc):
    """Stands for vLLM's class when processes are started; `worker_main` is then set to rank_main."""

    def worker_busy_loop(self) -> None:
        """Serve until the engine ends; all others have mapped by now what is ours."""
        unlink_shared_memory()
        mark = os.environ.get("VLLM_DIST_IDENT")  # of what vLLM's CPU kernels share, which they leave behind
        for path in Path("/dev/shm").glob(f"{glob.escape(mark)}-*_{self.rank}") if mark else ():
            path.unlink(missing_ok=True)
        super().worker_busy_loop()


class RanksExecutor(multiproc_executor.MultiprocExecutor):
    """vLLM's executor, but for what follows the end of a rank."""

    def _post_init_executor(self) -> None:
        unlink_shared_memory()

    def start_worker_monitor(self, inline: bool = False) -> None:  # noqa: ARG002 - vLLM's contract
        """End this process when a rank ends unasked."""
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def _watch(self) -> None:
        processes = {worker.proc.sentinel: worker for worker in self.workers}
        ended = multiprocessing.connection.wait(list(processes))
        if getattr(self, "shutting_down", False):
            return
        worker = processes[ended[0]]
        worker.proc.join(REAP_S)
        log.error("engine.rank_ended", rank=worker.rank, code=worker.proc.exitcode)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(RANK_ENDED)


def executor(spec: EngineSpec, config: Any) -> type[RanksExecutor]:
    """Return the executor for an engine whose ranks are processes, made ready to start those of this host.

    Args:
        spec: of the engine.
        config: its VllmConfig.
    """
    ranks = config.parallel_config.local_world_size
    if current_platform.is_cpu():
        # set by vLLM to have OpenMP read its environment anew: our threads are sized by call instead
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    if config.parallel_config.nnodes == 1:
        for name, value in LOOPBACK.items():
            os.environ.setdefault(name, value)
    # in our folder, which goes with us; its last part is also the mark of what ranks share
    rendezvous = f"file://{spec.run_dir}/ranks-{spec.instance_id}-{spec.epoch}"
    multiproc_executor.get_file_store_init_method = lambda: rendezvous
    RankProcess.worker_main = staticmethod(functools.partial(rank_main, spec, ranks))
    multiproc_executor.WorkerProc = RankProcess
    return RanksExecutor


def rank_main(spec: EngineSpec, ranks: int, *arguments: Any, **named: Any) -> None:
    """Run one rank, in its own process, until its engine ends. `arguments` are WorkerProc.worker_main's."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    set_parent_death_signal(parent.pid)
    # blocked, not ignored: vLLM sets handlers for both. They may come to the whole group
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGINT))
    leave_queues_to_others()
    rank = int(named["local_rank"])
    logs.setup_inherited(f"rank-{rank}")
    if current_platform.is_cpu():
        cores, threads = spec.share_of_cores(rank, ranks)
        if cores:
            os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)
    RankPulse(spec.pulse_path, rank).start_beating()
    resume.install(named["vllm_config"].model_config.get_vocab_size())
    multiproc_executor.WorkerProc = RankProcess  # in a fresh interpreter it is vLLM's still
    try:
        _run_rank(*arguments, **named)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # not the interpreter's own end, which waits for threads: nothing is left to do
        os._exit(RANK_ENDED if isinstance(sys.exception(), Exception) else 0)


def unlink_shared_memory() -> None:
    """Take their names from the queues that this process has made and all others have mapped."""
    for queue in _own_queues():
        queue.shared_memory.unlink()
        queue.is_creator = False  # else it is unlinked again with its last reference


def leave_queues_to_others() -> None:
    """Say that what a fork has inherited is not its own."""
    for queue in _own_queues():
        queue.is_creator = False


def _own_queues() -> list[ShmRingBuffer]:
    return [each for each in gc.get_objects() if type(each) is ShmRingBuffer and each.is_creator]

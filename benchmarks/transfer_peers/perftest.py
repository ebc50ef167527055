"""ib_write_bw and ib_read_bw: verbs with nothing around them."""

import resource
import subprocess
import time
from pathlib import Path

from benchmarks.transfer_peers.worker import Contender

ADDRESS = "10.0.0.1"
PORT = "18515"
LISTEN_S_MAX = 30.0
RUN_S_MAX = 60.0
FIRST_BYTES = 8 << 20
"""Moved in the first run, which tells how much fits into a sample."""


class Perftest(Contender):
    """A server and a client per sample; CPU seconds are with their starts."""

    rate = 0.0  # bytes a second, of the last run

    def check(self) -> None:
        """Have both programs work."""
        for op in ("WRITE", "READ"):
            self.once(op, 1 << 16, 128)

    def run(self, op: str, size: int, pages: int, for_s: float) -> dict[str, float]:
        """See Contender; it warms itself up."""
        messages = max(pages, int((for_s * self.rate or FIRST_BYTES) / size))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.rate = self.once(op, size, messages)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        seconds = messages * size / self.rate
        count = messages / pages
        return {"count": count, "seconds": seconds, "median_s": seconds / count, "cpu_s": cpu_s}

    def once(self, op: str, size: int, messages: int) -> float:
        """Return the average bytes a second."""
        gids = Path("/sys/class/infiniband/rxe0/ports/1/gids").iterdir()
        index = next(gid.name for gid in gids if "0000:ffff:0a00:0001" in gid.read_text())
        argv = [f"ib_{op.lower()}_bw", "-d", "rxe0", "-x", index, "-p", PORT, "-F"]
        argv += ["-s", str(size), "-n", str(messages)]
        server = subprocess.Popen(argv, stdout=subprocess.DEVNULL)
        try:
            end_s = time.monotonic() + LISTEN_S_MAX
            listens = f":{int(PORT):04X} 00000000:0000 0A"
            while listens not in Path("/proc/net/tcp").read_text() and time.monotonic() < end_s:
                time.sleep(0.02)
            done = subprocess.run(
                [*argv, ADDRESS], capture_output=True, text=True, timeout=RUN_S_MAX, check=True
            )
        finally:
            server.kill()
            server.wait()
        rows = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == [str(size)]]
        if not rows:
            raise RuntimeError(f"no result in {done.stdout!r}")
        return float(rows[-1][3]) * (1 << 20)  # its MB are MiB

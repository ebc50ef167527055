"""One-sided READ and WRITE over RC queue pairs. `open_rdma` is the way in."""

from transfer.rdma.config import Meter, RdmaConfig
from transfer.rdma.transport import RdmaTransport, open_rdma

__all__ = ["Meter", "RdmaConfig", "RdmaTransport", "open_rdma"]

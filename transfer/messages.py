"""Messages between transfer engines, grouped by who receives them. Frozen, array-like, tagged."""

import msgspec

VERSION = 1
"""Of this protocol; engines of another version are refused by name."""


# ---------------------------------------------------------------- what an engine tells of itself


class ShmInfo(msgspec.Struct, frozen=True, array_like=True):
    """The buffer lies in a memfd that same-host peers of the same user can map."""

    offset: int  # of the buffer's first byte in the memfd


class BufferInfo(msgspec.Struct, frozen=True, array_like=True):
    """One registered range of the owner's address space."""

    buffer_id: int
    address: int
    size_bytes: int
    location: str
    key: bytes = b""  # 16 bytes; b"" = the owner gives it to whom it trusts by other means
    shm: ShmInfo | None = None
    rkeys: dict[str, int] = {}  # NIC name -> remote key


class NicInfo(msgspec.Struct, frozen=True, array_like=True):
    """One port of one RDMA device that its owner has opened."""

    name: str  # device, "mlx5_0"
    port: int
    gid: bytes  # 16 bytes
    gid_index: int
    lid: int
    mtu: int  # bytes, active
    link_layer: str  # "ethernet" | "infiniband"


class SegmentInfo(msgspec.Struct, frozen=True, array_like=True, tag="seg"):
    """Everything a peer must know of an engine. `version` grows with every change."""

    name: str
    epoch: str  # one start of one engine, 32 hex digits
    version: int
    host: str  # equal = same kernel and same network namespace
    pid: int
    buffers: list[BufferInfo]
    unix_path: str = ""  # control socket for peers on the same host, "" = none
    nics: list[NicInfo] = []
    topology: str = ""  # JSON of transfer.topology: location -> [preferred, secondary]


# ---------------------------------------------------------------- greeting, on every connection


class Hello(msgspec.Struct, frozen=True, array_like=True, tag="hello"):
    """First frame of a connection. `purpose` says what it will carry: "control" | "data"."""

    version: int
    purpose: str
    epoch: str  # of the initiator
    name: str
    link: int  # number of this connection among the initiator's, for Fence
    nonce: bytes  # 16 random bytes


class Challenge(msgspec.Struct, frozen=True, array_like=True, tag="chal"):
    """The owner proves that it knows the shared secret, and asks the same."""

    nonce: bytes
    proof: bytes  # HMAC-SHA256, b"" without a secret


class Proof(msgspec.Struct, frozen=True, array_like=True, tag="proof"):
    """The initiator's half."""

    proof: bytes


class Welcome(msgspec.Struct, frozen=True, array_like=True, tag="welc"):
    """The owner takes the connection."""

    epoch: str
    name: str


# ---------------------------------------------------------------- to an owner, on a control connection


class Describe(msgspec.Struct, frozen=True, array_like=True, tag="desc"):
    """Answer: SegmentInfo."""


class Ping(msgspec.Struct, frozen=True, array_like=True, tag="ping"):
    """Are you there? Answer: Ok."""


class Notify(msgspec.Struct, frozen=True, array_like=True, tag="note"):
    """A word from one application to the other. Answer: Ok, once it is in the owner's bounded queue."""

    name: str
    text: str


class Ask(msgspec.Struct, frozen=True, array_like=True, tag="ask"):
    """A question to an application that serves `service` there. Answer: Told, or its Failure."""

    service: str
    body: bytes


class Told(msgspec.Struct, frozen=True, array_like=True, tag="told"):
    """The application's answer."""

    body: bytes


class Fence(msgspec.Struct, frozen=True, array_like=True, tag="fence"):
    """End the initiator's data connection `link`. Answer: Ok, once it can write no byte any more."""

    link: int


class AttachMemory(msgspec.Struct, frozen=True, array_like=True, tag="attach"):
    """Give me the memfd of a buffer. Answer: MemoryGrant with one descriptor (unix sockets only)."""

    buffer_id: int
    key: bytes


class MemoryGrant(msgspec.Struct, frozen=True, array_like=True, tag="grant"):
    """Travels with the memfd."""

    buffer_id: int
    size_bytes: int  # of the whole memfd
    offset: int


class Revoke(msgspec.Struct, frozen=True, array_like=True, tag="revoke"):
    """From the owner: touch this buffer no more. Answer: Revoked, once no copy is under way."""

    buffer_id: int


class Revoked(msgspec.Struct, frozen=True, array_like=True, tag="revoked"):
    """No copy is under way and none will begin."""

    buffer_id: int


# ---------------------------------------------------------------- RDMA, on a control connection


class QpInfo(msgspec.Struct, frozen=True, array_like=True):
    """One queue pair, as the other side must know it to connect."""

    nic: str
    port: int
    qpn: int
    psn: int
    gid: bytes
    lid: int
    mtu: int


class RdmaConnect(msgspec.Struct, frozen=True, array_like=True, tag="rconn"):
    """Make one queue pair on your NIC `nic` and connect it to mine. Answer: RdmaConnected."""

    link: int  # the initiator's number of this queue pair
    nic: str
    qp: QpInfo


class RdmaConnected(msgspec.Struct, frozen=True, array_like=True, tag="rconnd"):
    """The owner's queue pair is ready to receive."""

    qp: QpInfo


class RdmaDisconnect(msgspec.Struct, frozen=True, array_like=True, tag="rdisc"):
    """Destroy the queue pairs with these numbers. Answer: Ok, once none can write any more (a fence)."""

    links: list[int]

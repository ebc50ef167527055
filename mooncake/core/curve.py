"""Control sockets between hosts: ZMQ's CURVE, with both ends' keys made from the cluster's secret.

The public key of the serving end is never sent in a handshake: a client proves the secret by knowing that
key, a server by having its other half. So no list of keys is kept, and what travels is encrypted. Without
a secret, sockets stay on loopback (`rpc.check_endpoint`); ipc sockets are guarded by their folder.
"""

from functools import lru_cache
from hashlib import sha256
from typing import Any

import zmq
from zmq.utils import z85

from mooncake.core.secret import cluster_secret

Pair = tuple[bytes, bytes]
"""Public and secret key, in ZMQ's text form."""


@lru_cache(4)
def _pair(end: bytes, secret: bytes) -> Pair:
    private = z85.encode(sha256(b"mooncake control plane, " + end + b"\0" + secret).digest())
    return zmq.curve_public(private), private


def guard_server(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Let only those who have the secret connect to `socket`, before it is bound to `endpoint`."""
    if (secret := cluster_secret()) and endpoint.startswith("tcp://"):
        socket.curve_publickey, socket.curve_secretkey = _pair(b"serving", secret)
        socket.curve_server = True


def guard_client(socket: zmq.Socket[Any], endpoint: str) -> None:
    """Prove the secret to `endpoint`, before `socket` is connected to it."""
    if (secret := cluster_secret()) and endpoint.startswith("tcp://"):
        socket.curve_publickey, socket.curve_secretkey = _pair(b"asking", secret)
        socket.curve_serverkey = _pair(b"serving", secret)[0]

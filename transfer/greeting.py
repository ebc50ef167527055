"""The greeting on every connection: protocol version, who is who, and proof of the shared secret.

Both sides show that they know the secret without sending it: HMAC-SHA256 over both nonces and the side's
name. Without a secret the proofs are empty, which is accepted on loopback and unix sockets only
(EngineConfig refuses to bind anything else then).
"""

import hashlib
import hmac
import secrets
import socket

from mooncake.core import wire
from mooncake.core.errors import ConfigError, MooncakeError, PeerGone, ProtocolError
from mooncake.core.messages import Failure
from mooncake.core.rpc import failure_of, raise_failure
from transfer.messages import VERSION, Challenge, Hello, Proof, Welcome
from transfer.stream import Check, recv_message, send_message

NONCE_BYTES = 16
GREETING_BYTES_MAX = 1024
"""Whoever speaks another protocol (TLS, HTTP) is recognised by his first four bytes."""
NAME_CHARS_MAX = 200
PURPOSES = ("control", "data", "memory")


def prove(secret: bytes, side: str, hello: Hello, nonce: bytes) -> bytes:
    """Return the proof of `side` ("initiator" | "owner"); b"" without a secret."""
    if not secret:
        return b""
    return hmac.digest(secret, side.encode() + b"\0" + wire.encode(hello) + nonce, hashlib.sha256)


def greet(
    sock: socket.socket, purpose: str, me: tuple[str, str], link: int, secret: bytes, check: Check
) -> Welcome:
    """Introduce ourselves on a fresh connection; `me` is (epoch, name).

    Raises:
        ConfigError: the secrets differ, or the peer speaks another version.
        PeerGone, ProtocolError: what answers is no engine.
    """
    epoch, name = me
    hello = Hello(VERSION, purpose, epoch, name, link, secrets.token_bytes(NONCE_BYTES))
    send_message(sock, hello, check)
    challenge = raise_failure(recv_message(sock, Challenge | Failure, check, GREETING_BYTES_MAX), "peer")
    if not hmac.compare_digest(challenge.proof, prove(secret, "owner", hello, challenge.nonce)):
        raise ConfigError("the peer has another secret: give all engines the same one")
    send_message(sock, Proof(prove(secret, "initiator", hello, challenge.nonce)), check)
    welcome: Welcome = raise_failure(recv_message(sock, Welcome | Failure, check, GREETING_BYTES_MAX), "peer")
    return welcome


def receive(sock: socket.socket, secret: bytes, check: Check) -> Hello:
    """Hear the initiator out and prove ourselves; the caller then registers it and sends `welcome`.

    Raises:
        MooncakeError: it is no engine, of another version or without the secret; it has been told.
    """
    try:
        hello: Hello = recv_message(sock, Hello, check, GREETING_BYTES_MAX)
        if hello.version != VERSION:
            raise ConfigError(f"this engine speaks version {VERSION}, the initiator {hello.version}")
        if hello.purpose not in PURPOSES or len(hello.name) > NAME_CHARS_MAX or len(hello.epoch) != 32:
            raise ProtocolError("not a greeting of an engine")
        nonce = secrets.token_bytes(NONCE_BYTES)
        send_message(sock, Challenge(nonce, prove(secret, "owner", hello, nonce)), check)
        proof: Proof = recv_message(sock, Proof, check, GREETING_BYTES_MAX)
        if not hmac.compare_digest(proof.proof, prove(secret, "initiator", hello, nonce)):
            raise ConfigError("the initiator has another secret: give all engines the same one")
    except PeerGone:
        raise
    except MooncakeError as error:
        send_message(sock, failure_of(error), check)
        raise
    return hello


def welcome(sock: socket.socket, me: tuple[str, str], check: Check) -> None:
    """Take the connection; `me` is (epoch, name)."""
    send_message(sock, Welcome(*me), check)

"""Every exception of the project, drawn as one tree.

    MooncakeError
    |-- UserError            the caller or operator is wrong; a retry cannot help
    |   |-- ConfigError      a bad setting: names the key, the value and what to do
    |   `-- RequestError     a bad request: maps to HTTP 4xx
    |-- PeerError            another process is wrong or gone; a retry may help
    |   |-- PeerTimeout      no answer within the deadline
    |   |-- PeerGone         the link or the process died
    |   `-- ProtocolError    the peer sent something that is not our protocol
    |-- CapacityError        a bounded thing is full; retry later
    |-- NotLeader            another process leads now: ask that one
    `-- IntegrityError       bytes are not what was committed; never served

`retryable` says whether the same call may succeed later; `code` is the wire name.
"""

from typing import ClassVar


class MooncakeError(Exception):
    """Root of the tree. Message says what, where and what to do."""

    code: ClassVar[str] = "internal"
    retryable: ClassVar[bool] = False


class UserError(MooncakeError):
    """The caller or the operator has to change something."""

    code = "user"


class ConfigError(UserError):
    """A setting is wrong; the process must not start with it."""

    code = "config"


class RequestError(UserError):
    """A request is wrong; HTTP 4xx."""

    code = "request"


class PeerError(MooncakeError):
    """Another process misbehaved; another attempt may help."""

    code = "peer"
    retryable = True


class PeerTimeout(PeerError):
    """No answer within the deadline of the call."""

    code = "timeout"


class PeerGone(PeerError):
    """The peer's link or process is gone."""

    code = "gone"


class ProtocolError(PeerError):
    """The peer sent bytes that are not our protocol."""

    code = "protocol"
    retryable = False


class CapacityError(MooncakeError):
    """A bounded resource is full; retry later."""

    code = "capacity"
    retryable = True


class NotLeader(MooncakeError):
    """Only the leader may do this, and it is another process; the message names it where it is known."""

    code = "not_leader"
    retryable = True


class IntegrityError(MooncakeError):
    """Bytes differ from what was committed."""

    code = "integrity"


WIRE_ERRORS: dict[str, type[MooncakeError]] = {
    cls.code: cls
    for cls in (
        MooncakeError,
        UserError,
        ConfigError,
        RequestError,
        PeerError,
        PeerTimeout,
        PeerGone,
        ProtocolError,
        CapacityError,
        NotLeader,
        IntegrityError,
    )
}

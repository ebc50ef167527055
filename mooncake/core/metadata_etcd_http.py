"""Just enough HTTP/1.1 for etcd's JSON gateway: POST, one answer or a stream of lines, TLS.

Everything read is bounded. Deadlines are the caller's (`asyncio.timeout`): a connection on which
an exchange was cut short is not used again.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Iterator

from mooncake.core.errors import ConfigError, PeerGone, ProtocolError
from mooncake.core.metadata_etcd_options import Endpoint, EtcdOptions

BODY_BYTES_MAX = 24 << 20
"""A listing of 16 MiB (what a message of ours may hold) in base64 and JSON."""
PIECE_BYTES = 64 << 10


class HttpConnection:
    """One connection to one server; one exchange at a time."""

    def __init__(
        self, endpoint: Endpoint, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Use `open`."""
        self.endpoint = endpoint
        self._reader, self._writer = reader, writer
        self._idle = True
        self._chunked = False
        self._rest_bytes = 0  # of a body with a length, or of the current chunk
        self._ended = True
        self._line = bytearray()

    @classmethod
    async def open(cls, options: EtcdOptions, endpoint: Endpoint, addresses: list[str]) -> "HttpConnection":
        """Connect to the first of a server's addresses (at least one) where somebody is.

        Raises:
            ConfigError: TLS failed: certificates and settings do not fit.
            PeerGone: nobody is there.
        """
        for address in addresses[:-1]:
            with contextlib.suppress(PeerGone):
                return await cls._open_at(options, endpoint, address)
        return await cls._open_at(options, endpoint, addresses[-1])

    @classmethod
    async def _open_at(cls, options: EtcdOptions, endpoint: Endpoint, address: str) -> "HttpConnection":
        context = options.ssl_context()
        name = endpoint.host if context else None
        try:
            reader, writer = await asyncio.open_connection(
                address, endpoint.port, ssl=context, server_hostname=name
            )
        except ssl.SSLCertVerificationError as error:
            raise ConfigError(
                f"etcd server {endpoint}: its certificate is refused: {error.verify_message}; "
                f"`ca` ({options.ca or 'the system authorities'}) must have signed it, for this name"
            ) from error
        except ssl.SSLError as error:
            raise ConfigError(
                f"etcd server {endpoint}: no TLS with it: {error.reason or error}; "
                "does it speak TLS, and does it want `cert` and `key`?"
            ) from error
        except OSError as error:
            hint = " (does it speak TLS?)" if context and isinstance(error, ConnectionResetError) else ""
            raise PeerGone(f"etcd server {endpoint} cannot be reached: {error!r}{hint}") from error
        return cls(endpoint, reader, writer)

    @property
    def reusable(self) -> bool:
        """Whether the last exchange was read to its end and the server has not hung up since."""
        return self._idle and not self._reader.at_eof() and not self._writer.is_closing()

    def abort(self) -> None:
        """Hang up at once; idempotent."""
        self._writer.transport.abort()

    async def post(self, path: str, body: bytes, token: str = "") -> int:
        """Send one request and return the status; the body waits to be read.

        Raises:
            PeerGone, ProtocolError, ConfigError: see `_translated`.
        """
        self._idle = self._ended = False
        self._line.clear()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {self.endpoint}\r\nContent-Type: application/json\r\n"
            # by this header etcd knows its gateway, whose certificate names no user
            "Accept: application/json\r\n"
            f"Content-Length: {len(body)}\r\n" + (f"Authorization: {token}\r\n" if token else "") + "\r\n"
        )
        with self._translated():
            self._writer.write(head.encode("ascii") + body)
            await self._writer.drain()
            lines = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            version, status, *_ = lines[0].split(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError(lines[0])
            headers = {}
            for line in filter(None, lines[1:]):
                name, _, value = line.partition(":")
                headers[name.strip().lower()] = value.strip()
            self._chunked = "chunked" in headers.get("transfer-encoding", "").lower()
            self._rest_bytes = 0 if self._chunked else int(headers["content-length"])
            return int(status)

    async def read_body(self) -> bytes:
        """Return the whole body."""
        body = bytearray()
        with self._translated():
            while piece := await self._piece():
                body += piece
                self._bound(len(body))
        self._idle = True
        return bytes(body)

    async def read_line(self) -> bytes:
        """Return the next line of a streamed body; b"" = the stream has ended."""
        with self._translated():
            while (end := self._line.find(b"\n")) < 0:
                piece = await self._piece()
                if not piece:
                    return b""
                self._line += piece
                self._bound(len(self._line))
            line = bytes(self._line[: end + 1])
            del self._line[: end + 1]
            return line

    async def _piece(self) -> bytes:
        """Return the next bytes of the body; b"" = its end."""
        if self._ended:
            return b""
        if self._chunked and not self._rest_bytes:
            self._rest_bytes = int((await self._reader.readline()).strip(), 16)
            if not self._rest_bytes:
                while await self._reader.readuntil(b"\r\n") != b"\r\n":
                    pass  # trailers tell nothing that the body does not
                self._ended = True
                return b""
        if not self._rest_bytes:
            self._ended = True
            return b""
        piece = await self._reader.read(min(self._rest_bytes, PIECE_BYTES))
        if not piece:
            raise EOFError
        self._rest_bytes -= len(piece)
        if self._chunked and not self._rest_bytes:
            await self._reader.readexactly(2)
        return piece

    def _bound(self, size_bytes: int) -> None:
        if size_bytes > BODY_BYTES_MAX:
            raise ProtocolError(f"etcd server {self.endpoint} answers more than {BODY_BYTES_MAX} bytes")

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        """Turn what can go wrong below into our errors.

        Raises:
            ConfigError: TLS 1.3 says only now that our certificate is refused.
            PeerGone: the connection broke.
            ProtocolError: what came is not HTTP as etcd speaks it.
        """
        try:
            yield
        except ssl.SSLError as error:
            raise ConfigError(
                f"etcd server {self.endpoint} ended TLS: {error.reason or error}; "
                "does it want `cert` and `key` of its authority?"
            ) from error
        except (OSError, EOFError) as error:
            raise PeerGone(f"etcd server {self.endpoint} hung up: {error!r}") from error
        except (ValueError, LookupError, asyncio.LimitOverrunError) as error:
            raise ProtocolError(f"etcd server {self.endpoint} speaks no HTTP/1.1: {error!r}") from error

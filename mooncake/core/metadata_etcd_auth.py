"""etcd's user and password: who we are travels as a token, fetched when etcd asks for one.

No token is fetched ahead: etcd says when it wants one (at first, after it expired, after a restart
of a server, after the password was changed), and a refused request was not done, so it is sent once
more with the new token. An etcd whose authentication is switched on later needs no restart of ours.
"""

import asyncio

import msgspec

from mooncake.core.errors import ConfigError, ProtocolError, RequestError
from mooncake.core.metadata_etcd_http import HttpConnection
from mooncake.core.metadata_etcd_options import PASSWORD_ENV, EtcdOptions
from mooncake.core.metadata_etcd_wire import AUTHENTICATE, SignedIn, decode, refusal_of, wants_token

TOKEN_CHARS_MAX = 8192
"""A simple token has 20 characters, a JWT some hundreds; it is a line of every request."""


class Token:
    """The token of one client; "" = none yet, or nobody has asked for one."""

    def __init__(self, options: EtcdOptions) -> None:
        """Nothing is fetched before `renew`."""
        self._options = options
        self._lock = asyncio.Lock()
        self.value = ""

    def may_help(self, body: bytes) -> bool:
        """Return whether a new token may turn this refusal into an answer."""
        return bool(self._options.user) and wants_token(body.decode(errors="replace"))

    async def renew(self, connection: HttpConnection, refused: str) -> None:
        """Sign in over `connection`, unless somebody has done so since `refused` was in use.

        Raises:
            ConfigError: etcd does not accept user and password, or there is none.
            PeerError: the server is lost.
        """
        async with self._lock:
            if self.value == refused:
                self.value = await self._sign_in(connection)

    async def _sign_in(self, connection: HttpConnection) -> str:
        user = self._options.user
        request = {"name": user, "password": self._options.password()}
        status = await connection.post(AUTHENTICATE, msgspec.json.encode(request))
        answer = await connection.read_body()
        if status != 200:
            refusal = refusal_of(status, answer)
            if not isinstance(refusal, RequestError):
                raise refusal
            raise ConfigError(
                f"etcd does not sign in user {user!r}: {refusal}; "
                f"the password is that of {self._options.password_file or PASSWORD_ENV}"
            )
        token = decode(answer, SignedIn).token
        if not (0 < len(token) <= TOKEN_CHARS_MAX and token.isascii() and token.isprintable()):
            raise ProtocolError(f"etcd server {connection.endpoint} gives a token that is none")
        return token

"""Where an etcd cluster is and how to reach it: one text on the command line, one checked struct.

    etcd://[user@]host:port[,host:port...][/namespace][?insecure=true]
    etcds://[user@]host:port[,host:port...][/namespace]?ca=FILE[&cert=FILE&key=FILE]

`etcds` is TLS; `ca` is the authority of the servers (absent = the system's), `cert` and `key` show
who we are (mutual TLS). Names are looked up at every new connection, so that a server may move.

`user` is one of etcd's. Its password never stands in the address, which others see in the list of
processes: it is the first line of `?password_file=FILE`, or else MOONCAKE_ETCD_PASSWORD. It is read
at each signing in, so a changed one needs no restart. The user needs to read and write keys that
begin with the namespace: `etcdctl role grant-permission ROLE --prefix=true readwrite /mooncake/`.
With users, etcd's gateway refuses certificates that have a common name: `cert` must be without.
"""

import os
import re
import ssl
import urllib.parse
from collections.abc import Callable

import msgspec

from mooncake.core.config import host_port
from mooncake.core.errors import ConfigError

PORT = 2379
ENDPOINTS_MAX = 9
"""Of one etcd cluster; more than 7 members only slow it down."""
NAMESPACE = "/mooncake"
"""Several clusters may share one etcd: each needs a namespace of its own."""
PASSWORD_ENV = "MOONCAKE_ETCD_PASSWORD"

_SCHEMES = {"etcd": False, "etcds": True}
_FILES = ("ca", "cert", "key")
_PASSWORD = "password_file"
_ENDPOINT = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([A-Za-z0-9][A-Za-z0-9._-]{0,252}))(?::([0-9]{1,5}))?", re.A)
_USER = re.compile(r"[A-Za-z0-9._-]{1,128}", re.A)
_PERHAPS_PASSWORD = re.compile(r".*?://.*:.*@", re.DOTALL)
_NAMESPACE = re.compile(r"(/[A-Za-z0-9._-]{1,64}){1,4}", re.A)


class Endpoint(msgspec.Struct, frozen=True):
    """One etcd server: a name or an address, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return host_port(self.host, self.port)


class EtcdOptions(msgspec.Struct, frozen=True, kw_only=True):
    """See the module; "" = no such file."""

    endpoints: tuple[Endpoint, ...]
    namespace: str = NAMESPACE
    secure: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    user: str = ""
    password_file: str = ""

    def __str__(self) -> str:
        scheme = "etcds" if self.secure else "etcd"
        return f"{scheme}://{','.join(map(str, self.endpoints))}{self.namespace}"

    def password(self) -> str:
        """Return the password of `user`, read anew.

        Raises:
            ConfigError: there is none.
        """
        if not self.password_file:
            password = os.environ.get(PASSWORD_ENV, "")
        else:
            try:
                with open(self.password_file, encoding="utf-8") as file:
                    password = file.readline().rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"etcd: password_file = {self.password_file!r}: {error}") from error
        if not password:
            where = self.password_file or f"{PASSWORD_ENV}, and there is no password_file="
            raise ConfigError(f"etcd: user {self.user!r} has no password: nothing in {where}")
        return password

    def ssl_context(self) -> ssl.SSLContext | None:
        """Return what a new connection needs; None = plain text.

        Files are read anew each time (about a millisecond, connections are few): certificates
        that were rotated need no restart.

        Raises:
            ConfigError: a file is missing or is not what it should be.
        """
        if not self.secure:
            return None
        try:
            context = ssl.create_default_context(cafile=self.ca or None)
        except OSError as error:
            raise ConfigError(f"etcd: ca = {self.ca!r}: {error}; name the authority's PEM file") from error
        if self.cert:
            try:
                context.load_cert_chain(self.cert, self.key or None)
            except OSError as error:
                raise ConfigError(
                    f"etcd: cert = {self.cert!r}, key = {self.key!r}: {error}; name PEM files of one pair"
                ) from error
        return context


def is_etcd(text: str) -> bool:
    """Return whether a metadata address means etcd."""
    return text.partition("://")[0] in _SCHEMES


_UNKNOWN_SETTING = re.compile(rf"([?&](?!(?:insecure|{'|'.join([*_FILES, _PASSWORD])})=)[^=&]*=)[^&]+")
"""Its value is not repeated: it may be a password."""


def parse_etcd(text: str) -> EtcdOptions:
    """Return what an address like those in the module's text says.

    Raises:
        ConfigError: it is none; or it is plain text across a network that was not asked for.
    """
    # the configuration checks its metadata option with this module
    from mooncake.core.config import is_loopback

    def fail(advice: str) -> ConfigError:
        if not _PERHAPS_PASSWORD.match(text):
            shown = _UNKNOWN_SETTING.sub(r"\1...", text)
            return ConfigError(f"metadata = {shown!r}: {advice}")
        return ConfigError(
            f"metadata = '{text.partition('://')[0]}://...@{text.rpartition('@')[2]}': not understood; "
            f"others can read a password here: use ?password_file=FILE or {PASSWORD_ENV}"
        )

    try:
        url = urllib.parse.urlsplit(text)
        settings = dict(
            urllib.parse.parse_qsl(url.query, keep_blank_values=True, strict_parsing=bool(url.query))
        )
    except ValueError as error:
        raise fail(f"{error}; write etcd://host:port,host:port") from error
    if url.scheme not in _SCHEMES or url.fragment:
        raise fail("write etcd://host:port or etcds://host:port?ca=FILE")
    secure = _SCHEMES[url.scheme]
    user, at, hosts = url.netloc.rpartition("@")
    if at and ":" in user:
        raise fail("a password does not belong here")
    if at and not _USER.fullmatch(user):
        raise fail("a user is made of letters, digits, dots, dashes and underscores")
    _check_settings(secure, bool(user), settings, fail)
    endpoints = tuple(_endpoint(part, fail) for part in hosts.split(","))
    if len(endpoints) > ENDPOINTS_MAX:
        raise fail(f"at most {ENDPOINTS_MAX} endpoints")
    if not secure and "insecure" not in settings and not all(is_loopback(e.host) for e in endpoints):
        raise fail("others can read and change it on the way: use etcds://, or add ?insecure=true")
    namespace = url.path.rstrip("/") or NAMESPACE
    if not _NAMESPACE.fullmatch(namespace):
        raise fail("a namespace is up to four parts of letters, digits, dots, dashes and underscores")
    files = {name: settings.get(name, "") for name in (*_FILES, _PASSWORD)}
    return EtcdOptions(endpoints=endpoints, namespace=namespace, secure=secure, user=user, **files)


def _check_settings(
    secure: bool, user: bool, settings: dict[str, str], fail: Callable[[str], ConfigError]
) -> None:
    allowed = (_FILES if secure else ("insecure",)) + ((_PASSWORD,) if user else ())
    for name, value in settings.items():
        if name not in allowed or not value:
            raise fail(f"{name} means nothing here; there are {', '.join(allowed)}")
    if settings.get("insecure", "true") != "true":
        raise fail("insecure is true or left away")
    if ("cert" in settings) != ("key" in settings):
        raise fail("cert and key belong together")


def _endpoint(part: str, fail: Callable[[str], ConfigError]) -> Endpoint:
    match = _ENDPOINT.fullmatch(part.strip())
    if match is None or not 0 < int(match[3] or PORT) < 65536:
        raise fail(f"{part!r} is no host:port")
    return Endpoint(match[1] or match[2], int(match[3] or PORT))

"""With TLS, data and control travel encrypted between engines that show certificates of one authority."""

import datetime
import ipaddress

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from mooncake.core.errors import ConfigError, MooncakeError
from transfer.config import TlsConfig
from transfer.model import Opcode


def make_authority(folder, name: str) -> TlsConfig:
    """Write an authority and one certificate of it for 127.0.0.1."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(subject: str, key, issuer: str, issuer_key, authority: bool) -> x509.Certificate:
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
        )
        if not authority:
            address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
            builder = builder.add_extension(x509.SubjectAlternativeName([address]), critical=False)
        return builder.sign(issuer_key, hashes.SHA256())

    root_key, own_key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    root = certificate(f"{name} root", root_key, f"{name} root", root_key, True)
    own = certificate(f"{name} engine", own_key, f"{name} root", root_key, False)
    pem = serialization.Encoding.PEM
    for file, data in (
        ("root", root.public_bytes(pem)),
        ("own", own.public_bytes(pem)),
        (
            "key",
            own_key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        ),
    ):
        (folder / f"{name}-{file}.pem").write_bytes(data)
    paths = {file: str(folder / f"{name}-{file}.pem") for file in ("root", "own", "key")}
    return TlsConfig(certificate=paths["own"], key=paths["key"], authority=paths["root"])


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return make_authority(tmp_path_factory.mktemp("tls"), "ours")


def test_bytes_arrive_over_tls(make_engine, tls):
    here, there = (make_engine(tls=tls, transports=("tcp",)) for _ in range(2))
    size = 3 << 20
    mine, theirs = here.allocate(2 * size), there.allocate(size)
    mine.view[:size] = bytes(range(256)) * (size // 256)
    pages = [(i * 65_536, 65_536) for i in range(size // 65_536)]
    here.transfer(
        Opcode.WRITE,
        there.name,
        [mine.address + at for at, _ in pages],
        [theirs.address + at for at, _ in pages],
        [n for _, n in pages],
    )
    assert bytes(theirs.view) == bytes(mine.view[:size])
    here.transfer(Opcode.READ, there.name, mine.address + size, theirs.address, size)
    assert bytes(mine.view[size:]) == bytes(mine.view[:size])


def test_certificates_of_another_authority_and_plain_visitors_are_refused(make_engine, tls, tmp_path):
    owner = make_engine(tls=tls)
    other = make_authority(tmp_path, "others")
    for settings in ({"tls": other}, {}):
        with pytest.raises(MooncakeError):
            make_engine(**settings).peer(owner.name, deadline_s=5.0)
    with pytest.raises(MooncakeError):
        make_engine(tls=tls).peer(make_engine().name, deadline_s=5.0)
    assert make_engine(tls=tls).probe(owner.name) >= 0


def test_a_missing_certificate_is_named(make_engine, tls):
    with pytest.raises(ConfigError, match="nowhere"):
        make_engine(tls=TlsConfig(certificate="/nowhere.pem", key=tls.key, authority=tls.authority))

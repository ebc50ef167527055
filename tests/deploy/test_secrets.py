"""What deploy/secrets.sh makes is what pods mount, and etcd and our client accept each other with it."""

import base64
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from cryptography import x509

from mooncake.core.metadata_etcd import EtcdMetadata
from mooncake.core.metadata_etcd_options import parse_etcd
from mooncake.core.secret import read_secret
from tests.deploy.manifests import DEPLOY, main_container, named, needs_kubectl, of_kind, pod, workloads
from tests.integration.etcd_servers import NEEDS_ETCD, EtcdServers, Tls

pytestmark = [
    needs_kubectl,
    pytest.mark.integration,
    pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl"),
]
SCRIPT_S_MAX = 60
MOUNT = "/var/run/secrets/mooncake/etcd"


def _made() -> dict[str, dict[str, bytes]]:
    done = subprocess.run(
        [str(DEPLOY / "secrets.sh")], capture_output=True, text=True, timeout=SCRIPT_S_MAX, check=True
    )
    return {
        one["metadata"]["name"]: {key: base64.b64decode(value) for key, value in one["data"].items()}
        for one in yaml.safe_load_all(done.stdout)
    }


@pytest.fixture(scope="module")
def secrets() -> dict[str, dict[str, bytes]]:
    return _made()


@pytest.fixture(scope="module")
def folder(secrets: dict[str, dict[str, bytes]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each Secret, as if mounted."""
    root = tmp_path_factory.mktemp("secrets")
    for name, files in secrets.items():
        (root / name).mkdir()
        for file, data in files.items():
            (root / name / file).write_bytes(data)
    return root


def test_every_secret_that_pods_need_is_made_with_its_files(secrets: dict[str, dict[str, bytes]]) -> None:
    for workload in workloads("prod"):
        container = main_container(workload)
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        words = "\n".join(container["command"] + container.get("args", []))
        words += "\n".join(str(one.get("value", "")) for one in container["env"])
        words += named("prod", "ConfigMap", _cluster())["data"]["metadata"]
        for volume in pod(workload)["volumes"]:
            if "secret" not in volume or volume["secret"].get("optional"):
                continue
            for file in secrets[volume["secret"]["secretName"]]:
                assert f"{mounts[volume['name']]}/{file}" in words


def _cluster() -> str:
    (name,) = (
        one["metadata"]["name"]
        for one in of_kind("prod", "ConfigMap")
        if one["metadata"]["name"].startswith("mooncake-cluster")
    )
    return str(name)


def test_secrets_are_long_and_new_each_time(secrets: dict[str, dict[str, bytes]], folder: Path) -> None:
    assert len(read_secret({"MOONCAKE_SECRET_FILE": str(folder / "mooncake-cluster" / "secret")})) == 64
    again = _made()
    for name in ("mooncake-cluster", "mooncake-admin", "mooncake-api"):
        ((key, value),) = secrets[name].items()
        assert len(value) == 64
        assert again[name][key] != value


def test_the_certificate_of_etcd_has_every_name_that_clients_and_servers_call_it(
    secrets: dict[str, dict[str, bytes]],
) -> None:
    certificate = x509.load_pem_x509_certificate(secrets["mooncake-etcd-server"]["tls.crt"])
    known = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    options = parse_etcd(named("prod", "ConfigMap", _cluster())["data"]["metadata"])
    called = {endpoint.host for endpoint in options.endpoints}
    arguments = main_container(named("prod", "StatefulSet", "etcd"))["command"]
    (others,) = (word for word in arguments if word.startswith("--initial-cluster="))
    called |= set(re.findall(r"https://([^:,]+):", others))
    assert called == {f"etcd-{index}.etcd-peers" for index in range(3)}
    assert called <= set(known.get_values_for_type(x509.DNSName))


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[EtcdServers]:
    own, client = folder / "mooncake-etcd-server", folder / "mooncake-etcd-client"
    tls = Tls(own / "ca.crt", own / "tls.crt", own / "tls.key", client / "tls.crt", client / "tls.key")
    servers = EtcdServers(tmp_path, tls=tls, flags=("--client-cert-auth=true",))
    try:
        servers.start()
        yield servers
    finally:
        servers.close()


@NEEDS_ETCD
async def test_etcd_and_our_client_accept_each_other_by_these_certificates(
    server: EtcdServers, folder: Path
) -> None:
    address = named("prod", "ConfigMap", _cluster())["data"]["metadata"]
    query = address.partition("?")[2].replace(MOUNT, str(folder / "mooncake-etcd-client"))
    metadata = EtcdMetadata(parse_etcd(f"etcds://127.0.0.1:{server.ports[0]}?{query}"))
    try:
        await metadata.put("deploy/test", b"there")
        assert (await metadata.get("deploy/test")).entries[0].value == b"there"
    finally:
        await metadata.close()

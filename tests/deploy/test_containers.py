"""Container files fit the project and its manifests. They cannot be built where tests run."""

import fnmatch
import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.manifests import CLUSTERS, DEPLOY, ROOT, needs_kubectl, pod, workloads

FILES = sorted((DEPLOY / "containers").iterdir())
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
KNOWN = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "SHELL", "USER", "ENTRYPOINT", "CMD"}
"""No ADD (it fetches and unpacks), no VOLUME, EXPOSE or HEALTHCHECK: the pods say these."""

each_file = pytest.mark.parametrize("path", FILES, ids=lambda path: path.suffix[1:])


def instructions(path: Path) -> list[tuple[str, str]]:
    """Return its instructions, continued lines joined."""
    lines = [line for line in path.read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [
        (word, rest.strip())
        for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line.strip())
    ]


def said(path: Path, word: str) -> list[str]:
    return [rest for name, rest in instructions(path) if name == word]


def test_there_is_one_for_each_image_of_ours() -> None:
    assert [path.name for path in FILES] == [
        "Containerfile.conductor", "Containerfile.store", "Containerfile.worker",
    ]  # fmt: skip


@each_file
def test_only_instructions_that_we_mean_to_use(path: Path) -> None:
    assert {name for name, _ in instructions(path)} <= KNOWN


@each_file
def test_the_last_stage_runs_as_a_high_user_that_manifests_name(path: Path) -> None:
    assert said(path, "FROM")[-1] == "${BASE}"
    assert said(path, "USER") == ["10001:10001"]
    assert [name for name, _ in instructions(path)][-4:] == ["USER", "WORKDIR", "ENTRYPOINT", "CMD"]
    assert said(path, "ENTRYPOINT") == ['["mooncake"]']
    common = (DEPLOY / "base" / "common.yaml").read_text()
    assert "runAsUser: 10001" in common
    assert "runAsGroup: 10001" in common


@each_file
def test_bases_are_versions_and_may_be_pinned_by_digest(path: Path) -> None:
    (base,) = said(path, "ARG")
    name, _, image = base.partition("=")
    assert name == "BASE"  # --build-arg BASE=...@sha256:...
    assert re.fullmatch(r"[a-z./-]+:v?\d+\.\d+\.\d+[a-z-]*", image), image


def test_the_worker_stands_on_the_vllm_that_we_are_made_for() -> None:
    (base,) = said(DEPLOY / "containers" / "Containerfile.worker", "ARG")
    (ours,) = (one for one in PROJECT["project"]["optional-dependencies"]["cuda"] if one.startswith("vllm=="))
    assert fnmatch.fnmatch(base.rpartition(":v")[2], ours.removeprefix("vllm=="))


@each_file
def test_what_is_copied_is_there_and_reaches_the_build(path: Path) -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for copy in said(path, "COPY"):
        if copy.startswith("--from="):
            continue
        for source in copy.split()[:-1]:
            assert (ROOT / source).exists(), source
            assert source.partition("/")[0] in allowed, source
    packages = {name.rstrip("*") for name in PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert packages <= {copy.split()[0] for copy in said(path, "COPY")}


def test_nothing_else_reaches_the_build() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] not in ("#", "!")]
    assert lines == ["*", "**/__pycache__", "**/*.pyc"]


@each_file
def test_layers_hold_no_secret(path: Path) -> None:
    for name, rest in instructions(path):
        if name in ("ARG", "ENV", "COPY"):
            assert not re.search(r"(?i)token|password|secret|_key|\.ssh|\.netrc|pip\.conf", rest), rest


@each_file
def test_packages_come_from_the_lock_with_extras_that_exist(path: Path) -> None:
    run = "\n".join(said(path, "RUN"))
    assert re.search(r"-c (requirements/cpu|/tmp/image)\.lock", run)
    for extras in re.findall(r"[.\)]\[([a-z,]+)\]", run):
        assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"]), extras
    script = (ROOT / "scripts" / "install").read_text()
    (version,) = re.findall(r"^UV_VERSION=(\S+)$", script, re.MULTILINE)
    assert set(re.findall(r"uv==(\S+)", run)) <= {version}


@each_file
@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_commands_are_well_formed(path: Path) -> None:
    for run in said(path, "RUN"):
        subprocess.run(["bash", "-n", "-c", run], check=True, timeout=60)
        shlex.split(run)
        if "apt-get install" in run:
            assert "--no-install-recommends" in run
            assert "rm -rf /var/lib/apt/lists/*" in run


@pytest.mark.skipif(shutil.which("awk") is None, reason="no awk")
def test_of_our_lock_the_worker_takes_what_vllms_image_does_not_have(tmp_path: Path) -> None:
    (run,) = (one for one in said(DEPLOY / "containers" / "Containerfile.worker", "RUN") if "awk" in one)
    (program,) = re.findall(r"awk (.*?) >/tmp/rest.lock", run)
    (tmp_path / "image.lock").write_text("PyYAML==1.0\nsome_thing==2.0\n")
    (tmp_path / "ours.lock").write_text("pyyaml==6.0.3\nsome-thing==9\nstructlog==26.1.0\n")
    command = f"awk {program}".replace("/tmp/", f"{tmp_path}/")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "structlog==26.1.0\n"


@needs_kubectl
def test_images_of_manifests_have_the_version_of_the_package() -> None:
    built = {f"mooncake-{path.suffix[1:]}" for path in FILES}
    used = set()
    for overlay in CLUSTERS:
        for workload in workloads(overlay):
            for container in pod(workload)["containers"]:
                name, _, tag = container["image"].partition(":")
                if name in built:
                    used.add(name)
                    assert tag == PROJECT["project"]["version"]
    assert used == built

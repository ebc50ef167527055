"""checkov finds nothing, but for what deploy/checkov.yaml and annotations explain."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.deploy.manifests import DEPLOY, GROUPS, OVERLAYS, ROOT, needs_kubectl, rendered, workloads

CHECKOV = ROOT / ".venv-kube" / "bin" / "checkov"
RUN_S_MAX = 300
DEPLOYED = {"apiVersion": "apps/v1", "kind": "Deployment"}

pytestmark = [
    needs_kubectl,
    pytest.mark.integration,
    pytest.mark.skipif(not CHECKOV.exists(), reason="no checkov here: scripts/kube-parts"),
]


def test_checkov_has_nothing_to_say(tmp_path: Path) -> None:
    for overlay in OVERLAYS:
        (tmp_path / f"{overlay}.yaml").write_text(rendered(overlay))
    # it knows no LeaderWorkerSet: its pods as those of Deployments
    pods = [{**one, **DEPLOYED} for one in workloads("lws") if one["kind"] == GROUPS]
    assert len(pods) == 2
    (tmp_path / "groups.yaml").write_text(yaml.safe_dump_all(pods))
    for path in (DEPLOY / "containers").iterdir():
        folder = tmp_path / path.suffix[1:]
        folder.mkdir()
        shutil.copy(path, folder / "Dockerfile")  # the name by which it knows such a file
    command = [str(CHECKOV), "--directory", str(tmp_path), "--config-file", str(DEPLOY / "checkov.yaml")]
    command += ["--framework", "kubernetes", "dockerfile", "--skip-download", "--quiet", "--compact"]
    environment = {**os.environ, "LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [*command, "--output", "json"],
        capture_output=True,
        text=True,
        timeout=RUN_S_MAX,
        check=False,
        env=environment,
    )
    reports = json.loads(done.stdout)
    failed = [
        f"{one['check_id']} {one['check_name']}: {one['file_path']} {one['resource']}"
        for report in reports
        for one in report["results"]["failed_checks"]
    ]
    assert failed == []
    assert done.returncode == 0, done.stderr
    passed = {report["check_type"]: report["summary"]["passed"] for report in reports}
    assert passed["kubernetes"] > 1000, passed  # it did look
    assert passed["dockerfile"] > 100, passed

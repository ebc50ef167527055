"""`python -m mooncake.dashboards`: write what is made from boards and rules; `--check`: compare.

`--runbooks URL`: alerts link to their pages there. It stays in the rules until another one is given;
`site_url` of mkdocs.yml says the same for good.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from mooncake.core.errors import ConfigError
from mooncake.dashboards import FOLDER
from mooncake.dashboards.boards import BOARDS
from mooncake.dashboards.rules import (
    PROMETHEUS_RULE,
    RULES,
    SITE,
    prometheus_rule,
    runbooks_at,
    site_runbooks,
    with_runbooks,
)

KUSTOMIZATION = FOLDER.parent / "kustomization.yaml"


def made(runbooks: str | None = None) -> dict[Path, str]:
    """Return what each generated file should hold; `runbooks`: an alert's page, see rules.runbooks_at."""
    files: dict[Path, str] = {}
    for build in BOARDS:
        board = build()
        files[FOLDER / f"{board.uid}.json"] = (
            json.dumps(board, cls=JSONEncoder, indent=1, sort_keys=True) + "\n"
        )
    files[KUSTOMIZATION] = _kustomization([path.name for path in files])
    if RULES.exists():  # a source tree: the package alone has no deploy/
        page = runbooks or (site_runbooks(SITE.read_text()) if SITE.exists() else None)
        rules = RULES.read_text()
        files[RULES] = rules if page is None else with_runbooks(rules, page)
        files[PROMETHEUS_RULE] = prometheus_rule(files[RULES])
    return files


def _kustomization(names: list[str]) -> str:
    lines = [
        "# Made by `python -m mooncake.dashboards`: a ConfigMap per board, which Grafana's sidecar finds.",
        "apiVersion: kustomize.config.k8s.io/v1beta1",
        "kind: Kustomization",
        "generatorOptions:",
        "  disableNameSuffixHash: true",
        "  labels:",
        '    grafana_dashboard: "1"',
        "configMapGenerator:",
    ]
    for name in names:
        lines += [f"  - name: {name.removesuffix('.json')}", f"    files: [json/{name}]"]
    return "\n".join(lines) + "\n"


def drift(files: Mapping[Path, str]) -> list[str]:
    """Return what differs from `files`, one line each; boards that nobody makes any more, too."""
    differing = [
        f"{path}: not as made"
        for path, text in files.items()
        if not path.exists() or path.read_text() != text
    ]
    return differing + [
        f"{path}: nobody makes it" for path in sorted(FOLDER.glob("*.json")) if path not in files
    ]


def main(arguments: list[str]) -> int:
    """Write, or compare; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m mooncake.dashboards")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if files differ")
    parser.add_argument("--runbooks", metavar="URL", help="where alerts' pages are served")
    options = parser.parse_args(arguments)
    try:
        files = made(None if options.runbooks is None else runbooks_at(options.runbooks))
    except ConfigError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    differing = drift(files)
    if options.check:
        for line in differing:
            sys.stderr.write(f"{line}; run python -m mooncake.dashboards\n")
        return 1 if differing else 0
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.glob("*.json"):
        if path not in files:
            path.unlink()
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    sys.stdout.write(f"{len(files)} files, {len(differing)} of them changed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

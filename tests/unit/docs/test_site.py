"""The site builds without a warning, has every page in its nav, and needs nothing from elsewhere."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
BUILD_S = 240
"""It takes 9 s of CPU."""
FETCHED = re.compile(r'(?:<script[^>]*\ssrc|<link[^>]*\shref|<img[^>]*\ssrc)="(https?:)?//', re.IGNORECASE)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the site needs mooncake-serving[docs]")
    pytest.importorskip("mkdocstrings", reason="the site needs mooncake-serving[docs]")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_every_page_of_docs_is_built_and_in_the_nav(site: Path) -> None:
    """mkdocs fails on pages that the nav leaves out (mkdocs.yml, validation); this is that they are there."""
    found = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(found) > 20
    pages = [
        (page.with_stem("index") if page.stem == "README" else page).with_suffix(".html") for page in found
    ]
    assert not [page for page in pages if not (site / page).is_file()]
    start = (site / "index.html").read_text()
    assert not [page for page in pages if f'href="{page.as_posix()}"' not in start]


def test_the_site_fetches_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not FETCHED.search(page.read_text()), page


def test_lists_and_tables_are_such_though_no_blank_line_stands_before_them(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = re.sub("<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
        assert not re.findall(r"(?m)^(?:<p>)?(?:[-*] |\| ).{0,80}", text), page


def test_python_reference_comes_from_docstrings(site: Path) -> None:
    text = (site / "api.html").read_text()
    for name in (
        "kvstore.client.pool.Pool",
        "transfer.engine.TransferEngine",
        "mooncake.core.errors.PeerTimeout",
    ):
        assert f'id="{name}"' in text


def test_measurements_and_changes_are_pages(site: Path) -> None:
    assert "Measurements, newest first" in (site / "log.html").read_text()
    assert 'href="log.html"' in (site / "tuning.html").read_text()
    assert (site / "changelog.html").is_file()


def test_the_command_line_page_is_what_the_commands_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "docs_reference.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=BUILD_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr

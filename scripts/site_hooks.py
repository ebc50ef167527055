"""What mkdocs.yml cannot say: pages from files outside docs/, folders in the nav, links that leave docs/.

Pages that the nav names and that are not written yet are left out, so that each can come when it is ready;
a page that is written and that the nav does not name fails the build (validation.omitted_files).
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
PAGES = {
    "readme.md": "README.md",
    "log.md": "benchmarks/LOG.md",
    "changelog.md": "CHANGELOG.md",
    "contributing.md": "CONTRIBUTING.md",
}
"""Page of the site -> the file it is."""
WIDE = ("comparison.md", "configuration.md", "metrics.md")
"""Their tables get the room of the table of contents."""
_FENCE = re.compile(r"\s*(```|~~~)")
_BLOCK = re.compile(r"(?P<list>[-*] |\d+\. )|(?P<table>\|)")
"""Python-Markdown wants a blank line before a list or a table; GitHub does not, and our pages have none."""
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Write folders of the nav out, and leave out what is not there."""
    config.nav = _present(config.nav, Path(config.docs_dir))
    return config


def _present(nav: list[Any], docs: Path) -> list[Any]:
    kept: list[Any] = []
    for entry in nav:
        ((title, target),) = entry.items()
        if isinstance(target, list):
            below: Any = _present(target, docs)
        elif target.endswith("/"):
            below = [target + path.name for path in sorted((docs / target).glob("*.md"))]
        else:
            below = target if target in PAGES or (docs / target).is_file() else None
        if below:
            kept.append({title: below})
    return kept


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are files of the tree."""
    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:  # noqa: ARG001
    """Let links to files outside docs/ lead to their page of the site, or be the file's name."""
    uri = page.file.src_uri
    if uri in WIDE:
        page.meta["hide"] = ["toc"]
    here = posixpath.dirname(PAGES.get(uri, f"docs/{uri}"))

    def link(match: re.Match[str]) -> str:
        picture, text, target, anchor = match[1], match[2], match[3], match[4] or ""
        if re.match(r"[a-z]+:", target):
            return match[0]
        path = posixpath.normpath(posixpath.join(here, target))
        for name, source in PAGES.items():
            if path == source:
                return f"[{text}]({posixpath.relpath(name, posixpath.dirname(uri) or '.')}{anchor})"
        if path.startswith("docs/"):
            if (ROOT / path / "README.md").is_file():
                path += "/README.md"
            inside = posixpath.relpath(path.removeprefix("docs/"), posixpath.dirname(uri) or ".")
            return f"{picture}[{text}]({inside}{anchor})"
        return text if text.strip("`") == path else f"{text} (`{path}`)"

    return _LINK.sub(link, _with_blanks(markdown))


def _with_blanks(markdown: str) -> str:
    """Put a blank line before each list and table that follows a paragraph."""
    lines: list[str] = []
    inside, before = False, ""  # a fence; the kind of the block that goes on
    for line in markdown.splitlines():
        if _FENCE.match(line):
            inside = not inside
        found = None if inside else _BLOCK.match(line)
        kind = "" if found is None else str(found.lastgroup)
        if kind and kind != before and lines and lines[-1].strip():
            lines.append("")
        lines.append(line)
        if kind:
            before = kind
        elif not line.strip() or not line.startswith(" "):
            before = ""  # what is indented belongs to the list's entry
    return "\n".join(lines) + "\n"

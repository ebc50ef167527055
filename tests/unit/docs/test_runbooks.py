"""What runbooks and pages tell people to type is answered by a cluster whose doors are shut."""

import re
from pathlib import Path

DOCS = Path(__file__).resolve().parents[3] / "docs"
GUARDED = re.compile(r"https?://\S*?/(?:mooncake/|config\b|metrics\b|drain\b|livez|debug)")
"""Asked for a key, or for the admin token, where there is one."""


def test_every_curl_to_a_guarded_path_shows_a_key():
    commands = [
        (page.name, found)
        for page in sorted(DOCS.rglob("*.md"))
        for found in re.findall(r"\bcurl [^`\n]*", page.read_text())
        if GUARDED.search(found)
    ]
    assert len(commands) > 5
    assert [(name, found) for name, found in commands if "Authorization: Bearer $" not in found] == []

"""Grafana boards: defined in Python, kept as JSON beside it.

`python -m mooncake.dashboards` writes json/ anew from boards/ (Grafana's own SDK, needed by developers only);
whoever shows boards reads the JSON: Grafana, the live page, `mooncake dashboards`.
"""

import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "json"
"""One file per board; the file's name is the board's uid."""


def board_files() -> dict[str, Path]:
    """Return the JSON file of each board by its uid, in the order of the menu (the overview first)."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.json"), key=_rank)}


def load_boards() -> dict[str, dict[str, Any]]:
    """Return the boards as Grafana imports them, by uid, in the order of the menu."""
    return {uid: json.loads(path.read_text()) for uid, path in board_files().items()}


def _rank(path: Path) -> tuple[bool, str]:
    return path.stem != "mooncake-overview", path.stem

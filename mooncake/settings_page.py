"""The tables of docs/configuration.md, made from the models: `python -m mooncake.settings_page FILE`."""

import sys
from collections.abc import Iterator
from pathlib import Path

from mooncake.core.options import SECTIONS
from mooncake.core.options_base import Options, Setting, settings_of

MARK = "<!-- from here on made by `python -m mooncake.settings_page docs/configuration.md` -->\n"
"""What stands before it is written by people."""
_NAMES = {
    "up": "`mooncake up`: a cluster on one machine",
    "conductor": "`mooncake conductor`: the decision core, and gateways",
    "gateway": "`mooncake gateway`: one that joins a core",
    "prefill": "`mooncake prefill`",
    "decode": "`mooncake decode`",
    "follower": "`mooncake follower`: one more node of an engine",
    "store": "`mooncake store`",
    "directory": "`mooncake directory`",
    "indexer": "`mooncake indexer`",
}


def page(text: str) -> str:
    """Return the text of the page with the tables as they are now."""
    tables = (f"\n## {_NAMES[name]}\n{_table(kind)}" for name, kind in SECTIONS.items())
    return text.partition(MARK)[0] + MARK + "".join(tables)


def _table(kind: type[Options]) -> str:
    return "\n".join((*_rows(kind), ""))


def _rows(kind: type[Options]) -> Iterator[str]:
    yield "| key | flag | environment | default | meaning | reloads |"
    yield "|---|---|---|---|---|---|"
    for one in settings_of(kind).values():
        cells = (
            "" if one.secret else f"`{one.key}`",
            _flag(one),
            f"`{one.env}`",
            "has to be said" if one.default is None else f"`{one.default}`" if one.default else "",
            _meaning(one),
            "yes" if one.reloads else "",
        )
        yield f"| {' | '.join(cells)} |"


def _flag(one: Setting) -> str:
    if one.secret:
        return ""
    if one.kind == "words":
        return "`-- WORDS`"
    return f"`--{one.key.replace('_', '-')}`"


def _meaning(one: Setting) -> str:
    if "|" in one.kind:
        rest = f" One of {', '.join(f'`{name}`' for name in one.kind.split('|'))}."
    else:
        rest = f" ({one.range})" if one.range else ""
    return one.text.replace("|", "\\|") + rest


def main() -> int:
    """Write the tables into the file that is named."""
    path = Path(sys.argv[1])
    path.write_text(page(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())

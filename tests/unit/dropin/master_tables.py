"""Writes the two tables of docs/master.md: python -m tests.unit.dropin.master_tables"""

import re
from pathlib import Path

from mooncake.dropin.master import flags, metrics

HERE = Path(__file__).parent
PAGE = HERE.parents[2] / "docs" / "master.md"


def main() -> None:
    """Replace what stands between the marks."""
    text = PAGE.read_text()
    names = (HERE / "upstream_master_metrics.txt").read_text().split()
    for mark, table in (("flags", flags.table()), ("metrics", metrics.table(names))):
        pattern = rf"(<!-- {mark} -->\n).*?(<!-- end of {mark} -->)"
        text = re.sub(pattern, lambda found, table=table: found[1] + table + found[2], text, flags=re.DOTALL)
    PAGE.write_text(text)


if __name__ == "__main__":
    main()

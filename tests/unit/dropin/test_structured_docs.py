"""docs/structured.md: its example runs."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[3] / "docs/structured.md"


def test_the_example_runs(master):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert example.count("127.0.0.1:50051") == 1
    exec(compile(example.replace("127.0.0.1:50051", master.address), str(PAGE), "exec"), {})  # noqa: S102

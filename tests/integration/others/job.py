"""What these programs have in common: the job, the answer, memory with something in it."""

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

Job = dict[str, Any]


def answer(run: Callable[[Job], Any]) -> None:
    """Answer the one job on stdin; what is printed meanwhile goes to stderr."""
    job = json.load(sys.stdin)
    sys.path[:0] = job["folders"]
    answers_fd = os.dup(1)
    os.dup2(2, 1)
    failed = True
    try:
        with os.fdopen(answers_fd, "w") as out:
            json.dump(run(job), out)
        failed = False
    except BaseException:  # noqa: BLE001 - told by stderr; nobody waits for the threads that are left
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(failed)

"""ParallelAxis, TensorParallelism and ReadTarget of `mooncake.store`; fields and checks are upstream's."""

import operator
from typing import Any

from mooncake.core.errors import RequestError

MODES = ("as_stored", "shard", "full")


class ParallelAxis:
    """One axis: `kind` "tp", "dp", "ep" or "pp", `rank` of `size`, and what its kind needs besides."""

    def __init__(self) -> None:
        """No kind yet, and one rank."""
        self.kind = ""
        self.rank = 0
        self.size = 1
        self.split_dim: int | None = None
        self.expert_id: int | None = None
        self.stage_id: int | None = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "kind":
            right = isinstance(value, str)
        elif value is None:
            right = name not in {"rank", "size"}
        else:
            right = hasattr(value, "__index__")
            value = operator.index(value) if right else value
        if not right:
            raise TypeError(f"{name} of a ParallelAxis cannot be {value!r}")
        super().__setattr__(name, value)


class TensorParallelism:
    """The axes that say which piece of a tensor an object is."""

    def __init__(self) -> None:
        """No axes yet."""
        self.axes: list[ParallelAxis] = []


class ReadTarget:
    """What a reader wants: the object of that name, one piece of the tensor, or all of it."""

    def __init__(self) -> None:
        """The object of that name."""
        self._mode = MODES[0]
        self.parallelism: TensorParallelism | None = None

    @property
    def mode(self) -> str:
        """Return "as_stored", "shard" or "full".

        Raises:
            TypeError, RequestError: when set to something else.
        """
        return self._mode

    @mode.setter
    def mode(self, value: str) -> None:
        if not isinstance(value, str):
            raise TypeError(f"mode of a ReadTarget cannot be {value!r}")
        if value not in MODES:
            raise RequestError(f"mode of a ReadTarget is one of {', '.join(MODES)}, not {value!r}")
        self._mode = value

"""The tree of errors is complete: nothing can be raised that has no name on the wire."""

import re

import pytest

from mooncake.core import errors
from mooncake.core.errors import WIRE_ERRORS, MooncakeError
from mooncake.core.messages import Failure
from mooncake.core.rpc import failure_of, raise_failure


def tree(cls: type[MooncakeError]) -> list[type[MooncakeError]]:
    """Return `cls` and everything below it that the errors module defines."""
    below = [c for c in cls.__subclasses__() if c.__module__ == errors.__name__]
    return [cls, *(leaf for child in below for leaf in tree(child))]


ALL = tree(MooncakeError)


def test_every_class_has_its_own_wire_name():
    assert {cls.code for cls in ALL} == set(WIRE_ERRORS)
    assert len({cls.code for cls in ALL}) == len(ALL)
    assert set(WIRE_ERRORS.values()) == set(ALL)


def test_every_class_stands_in_the_drawn_tree_under_its_parent():
    drawn: dict[str, str] = {}
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if match := re.match(r"^    ((?:\|   |    )*)(?:\|-- |`-- )?([A-Z]\w+)", line):
            depth = (len(line) - len(line.lstrip(" |`-"))) // 4 - 1
            path[depth:] = [match[2]]
            drawn[match[2]] = path[-2] if depth else "Exception"
    assert drawn == {cls.__name__: cls.__bases__[0].__name__ for cls in ALL}


@pytest.mark.parametrize("cls", ALL)
def test_an_error_crosses_the_wire_as_itself(cls):
    with pytest.raises(MooncakeError, match="peer: what happened") as caught:
        raise_failure(failure_of(cls("what happened")), "peer")
    assert type(caught.value) is cls


def test_an_unknown_code_of_a_newer_peer_is_still_our_error():
    with pytest.raises(MooncakeError) as caught:
        raise_failure(Failure("from-the-future", "?"), "peer")
    assert type(caught.value) is MooncakeError


def test_only_errors_that_a_retry_can_help_are_retryable():
    assert {cls.__name__ for cls in ALL if cls.retryable} == {
        "PeerError",
        "PeerTimeout",
        "PeerGone",
        "CapacityError",
        "NotLeader",
    }


def test_what_is_not_a_failure_is_returned():
    assert raise_failure(7, "peer") == 7

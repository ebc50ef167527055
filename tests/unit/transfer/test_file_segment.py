"""Memory of a file as a segment: exactly the wanted bytes of it, for one owner at a time."""

import pytest

from mooncake.core.errors import ConfigError
from transfer.file_segment import FileSegment

PAGE = 4096


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "memory"
    file.write_bytes(bytes(8 * PAGE))
    return file


def test_a_segment_is_a_part_of_its_file(path):
    segment = FileSegment.open("s", str(path), 2 * PAGE, 3 * PAGE)
    segment.view(0, 2 * PAGE)[:] = b"x" * (2 * PAGE)
    segment.close()
    assert path.read_bytes() == bytes(3 * PAGE) + b"x" * (2 * PAGE) + bytes(3 * PAGE)


@pytest.mark.parametrize(
    ("size", "offset"),
    [(0, 0), (-PAGE, 0), (PAGE, 1), (PAGE + 1, 0), (9 * PAGE, 0), (PAGE, 8 * PAGE), (PAGE, -PAGE)],
)
def test_ranges_that_are_not_there_are_refused(path, size, offset):
    with pytest.raises(ConfigError):
        FileSegment.open("s", str(path), size, offset)


@pytest.mark.parametrize("other", ["", "/nowhere", "/tmp", "a\0b"])
def test_what_is_no_file_is_refused_by_name(other):
    with pytest.raises(ConfigError, match="memory of a file"):
        FileSegment.open("s", other, PAGE)


def test_a_byte_has_one_owner_until_it_closes_even_while_a_view_is_held(path):
    first = FileSegment.open("a", str(path), 4 * PAGE)
    held = first.view(0, PAGE)
    with pytest.raises(ConfigError, match="another segment"):
        FileSegment.open("b", str(path), 4 * PAGE, 3 * PAGE)
    FileSegment.open("c", str(path), 4 * PAGE, 4 * PAGE).close()
    first.close()
    first.close()
    FileSegment.open("b", str(path), 4 * PAGE, 3 * PAGE).close()
    assert len(held) == PAGE

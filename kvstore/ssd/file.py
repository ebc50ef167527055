"""The file of an SSD tier: made, locked, checked, and read back after a start (see kvstore.ssd.index).

A tier is a directory with one file, `objects`. The directory is locked (flock) for as long as a process
has the tier open: the lock ends with the process, however it ends. The file is made under another name
with its header in place, so it is never seen half made.
"""

import contextlib
import fcntl
import mmap
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import msgspec
import structlog

from kvstore.header import (
    BLANK_PAGE,
    HEADER_BYTES,
    TIER_BYTES,
    FileHeader,
    Record,
    Unreadable,
    decode_file,
    decode_record,
    encode_file,
)
from kvstore.ssd.index import SsdIndex
from kvstore.ssd.layout import Geometry
from kvstore.ssd.model import Recovered
from mooncake.core.errors import CapacityError, ConfigError, MooncakeError, RequestError
from mooncake.core.keys import block_checksum
from transfer.file import FileIO
from transfer.file_disk import DirectFile, disk_error
from transfer.model import Opcode

log = structlog.get_logger(__name__)

FILE_NAME = "objects"
CHUNK_SLOTS = 64
"""Header pages read at once: 256 KiB, where the disk nearly reaches its bandwidth."""
WAVE_CHUNKS = 64
"""Chunks in flight during recovery: 16 MiB of memory."""
VERIFIED_GENERATIONS = 2
"""Segments that a power cut may have torn, see the sync policy of kvstore.ssd.tier."""
VERIFY_BYTES = 32 << 20
"""Read and hashed at once."""
PIECE_BYTES = 1 << 20
"""One access of this size is as fast as any larger one."""
_ADVICE = "give another directory or capacity, or start without the ssd tier"
START_S_MAX = 60.0
"""For one wave, or for the file's own header. A disk that is slower than this is broken."""


def lock_directory(path: str) -> int:
    """Make the directory if need be and lock it; returns the descriptor that holds the lock.

    Raises:
        ConfigError: another process has it, or it cannot be made or opened.
    """
    try:
        Path(path).mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(f"ssd tier {path}: {error.strerror}; {_ADVICE}") from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(fd)
        raise ConfigError(
            f"ssd tier {path}: another process has it open; give each store a directory of its own"
        ) from error
    return fd


def open_file(path: str, node: str, geometry: Geometry, io: FileIO) -> tuple[DirectFile, bytes]:
    """Open the tier's file, or make it; returns it and the tier's id. The directory is locked.

    Raises:
        ConfigError: not writable; of another node, version or size; its header is damaged.
        CapacityError: the disk has no room for it.
    """
    name = Path(path, FILE_NAME)
    try:
        return _open(name, node, geometry, io) if name.exists() else _make(name, node, geometry, io)
    except OSError as error:
        raise _advised(name, disk_error(error, "its file")) from error


def _advised(name: Path, error: MooncakeError) -> MooncakeError:
    kind = CapacityError if isinstance(error, CapacityError) else ConfigError
    return kind(f"ssd tier {name.parent}: {error}; {_ADVICE}")


def _open_direct(name: Path, *, create_bytes: int = 0) -> DirectFile:
    try:
        return DirectFile.open(str(name), write=True, create=bool(create_bytes), size_bytes=create_bytes)
    except CapacityError as error:
        raise _advised(name, CapacityError(f"{create_bytes} bytes wanted: {error}")) from error
    except (RequestError, ConfigError) as error:
        raise _advised(name, error) from error


def _make(name: Path, node: str, geometry: Geometry, io: FileIO) -> tuple[DirectFile, bytes]:
    draft = name.with_suffix(".new")
    draft.unlink(missing_ok=True)  # of a start that was killed; the directory is ours
    tier = secrets.token_bytes(TIER_BYTES)
    page = encode_file(FileHeader(tier, node, geometry.segments, geometry.segment_bytes, geometry.slots))
    file = _open_direct(draft, create_bytes=geometry.file_bytes)
    try:
        _write_header(file, geometry, page, io)
        draft.rename(name)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        file.close()
    _sync_directory(name.parent)
    return _open_direct(name), tier


def _open(name: Path, node: str, geometry: Geometry, io: FileIO) -> tuple[DirectFile, bytes]:
    short = name.stat().st_size < geometry.file_bytes
    file = _open_direct(name)
    try:
        pages = [_read_page(file, offset, io) for offset in (0, geometry.file_bytes - HEADER_BYTES)]
        found = [decode_file(page) for page in pages]
        header = next((f for f in found if isinstance(f, FileHeader)), found[0])
        _check(name, header, node, geometry)
        assert isinstance(header, FileHeader)
        if short:
            log.warning("ssd.truncated", path=str(name), bytes=name.stat().st_size, want=geometry.file_bytes)
            with name.open("r+b") as raw:
                os.posix_fallocate(raw.fileno(), 0, geometry.file_bytes)
        if short or found[0] != found[1]:
            _write_header(file, geometry, encode_file(header), io)
    except BaseException:
        file.close()
        raise
    return file, header.tier


def _check(name: Path, header: FileHeader | Unreadable, node: str, geometry: Geometry) -> None:
    wrong = ""
    if header is Unreadable.VERSION:
        wrong = "its file was written by another version"
    elif isinstance(header, Unreadable):
        wrong = "its file's header is damaged, or it is no file of ours"
    elif header.node != node:
        wrong = f"its file belongs to node {header.node!r}, this is {node!r}"
    elif (header.segments, header.segment_bytes, header.slots) != (
        geometry.segments,
        geometry.segment_bytes,
        geometry.slots,
    ):
        wrong = (
            f"its file has {header.segments} segments of {header.segment_bytes} bytes with {header.slots} "
            f"header pages, the settings ask for {geometry.segments} of {geometry.segment_bytes} with "
            f"{geometry.slots}"
        )
    if wrong:
        raise ConfigError(f"ssd tier {name.parent}: {wrong}; remove {name} to start empty")


def _write_header(file: DirectFile, geometry: Geometry, page: bytes, io: FileIO) -> None:
    view = memoryview(page)
    ends = [(0, view), (geometry.file_bytes - HEADER_BYTES, view)]
    io.transfer(Opcode.WRITE, file, ends, START_S_MAX)
    file.sync()


def _read_page(file: DirectFile, offset: int, io: FileIO) -> bytes:
    page = bytearray(HEADER_BYTES)
    with contextlib.suppress(MooncakeError):  # beyond the end, or a lost sector: no header
        io.transfer(Opcode.READ, file, [(offset, memoryview(page))], START_S_MAX)
        return bytes(page)
    return BLANK_PAGE


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class _Headers(msgspec.Struct):
    """The headers of one segment, as far as they were read."""

    found: list[tuple[int, Record]] = msgspec.field(default_factory=list)
    slots_used: int = 0
    next_slot: int = 0


def recover(file: DirectFile, index: SsdIndex, io: FileIO, now_s: float) -> Recovered:
    """Fill an empty `index` from the header pages of `file`, and verify the newest objects.

    Raises:
        PeerTimeout: the disk hangs.
    """
    counts = _scan(file, index, io, now_s)
    records = index.newest(VERIFIED_GENERATIONS)
    for record in _unsound(file, io, sorted(records, key=lambda r: r.offset)):
        index.drop(record)
        counts.corrupt += 1
    counts.objects, counts.bytes = len(index), index.live_bytes
    return counts


def _unsound(file: DirectFile, io: FileIO, records: list[Record]) -> list[Record]:
    """Return those of `records`, in order of offset, whose bytes are not what was put. Reads in long runs."""
    bad: list[Record] = []
    while records:
        start, count = records[0].offset, 1
        while count < len(records) and _end(records[count]) - start <= VERIFY_BYTES:
            count += 1
        some, records = records[:count], records[count:]
        span = memoryview(mmap.mmap(-1, _end(some[-1]) - start))
        errors = io.submit(Opcode.READ, file, _pieces(start, span), START_S_MAX).wait()
        if errors and count > 1:  # a lost sector: find out whose
            bad += [record for each in some for record in _unsound(file, io, [each])]
            continue
        for record in some:
            view = span[record.offset - start :][: record.object.stored_bytes]
            if errors or block_checksum(record.object.key, view) != record.object.checksum:
                bad.append(record)
    return bad


def _end(record: Record) -> int:
    return record.offset + record.object.stored_bytes


def _pieces(start: int, span: memoryview) -> list[tuple[int, memoryview]]:
    """Return the reads of one span: as many at once as the disk likes."""
    return [(start + at, span[at : at + PIECE_BYTES]) for at in range(0, span.nbytes, PIECE_BYTES)]


def _scan(file: DirectFile, index: SsdIndex, io: FileIO, now_s: float) -> Recovered:
    """Read headers. They are written from the first slot on: a segment is read until a blank chunk."""
    counts = Recovered()
    geometry = index.geometry
    scans = [_Headers() for _ in range(geometry.segments)]
    memory = memoryview(mmap.mmap(-1, WAVE_CHUNKS * CHUNK_SLOTS * HEADER_BYTES))
    todo = list(range(geometry.segments))
    while todo:
        wave, todo = todo[:WAVE_CHUNKS], todo[WAVE_CHUNKS:]
        chunks = list(_chunks(wave, scans, geometry, memory))
        requests = [
            (geometry.header_offset(number, scans[number].next_slot), view) for number, view in chunks
        ]
        errors = io.submit(Opcode.READ, file, requests, START_S_MAX).wait()
        for place, (number, view) in enumerate(chunks):
            more = _take_chunk(scans[number], view, counts, lost=place in errors)
            if more and scans[number].next_slot < geometry.slots:
                todo.append(number)
    for number, done in enumerate(scans):
        adopted = index.adopt(now_s, number, done.found, done.slots_used)
        counts.stale += adopted.stale
        counts.misplaced += adopted.misplaced
    return counts


def _chunks(
    wave: list[int], scans: list[_Headers], geometry: Geometry, memory: memoryview
) -> Iterator[tuple[int, memoryview]]:
    chunk_bytes = CHUNK_SLOTS * HEADER_BYTES
    for place, number in enumerate(wave):
        slots = min(CHUNK_SLOTS, geometry.slots - scans[number].next_slot)
        yield number, memory[place * chunk_bytes : place * chunk_bytes + slots * HEADER_BYTES]


def _take_chunk(done: _Headers, view: memoryview, counts: Recovered, *, lost: bool) -> bool:
    """Decode one chunk; returns whether there may be more behind it."""
    first, slots = done.next_slot, view.nbytes // HEADER_BYTES
    done.next_slot += slots
    if lost:  # the disk cannot read it
        done.slots_used = done.next_slot
        counts.torn += slots
        return True
    for slot in range(slots):
        record = decode_record(view[slot * HEADER_BYTES : (slot + 1) * HEADER_BYTES])
        if record is Unreadable.BLANK:
            continue
        done.slots_used = first + slot + 1
        if isinstance(record, Record):
            done.found.append((first + slot, record))
        elif record is Unreadable.TORN:
            counts.torn += 1
        else:
            counts.foreign += 1
    return done.slots_used > first

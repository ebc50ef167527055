"""Which stored batch holds which field of which logical row, and when a batch may be removed.

A fragment is a stored batch of one stage; its name is its manifest's. Rows have names (keys) within a
partition, and a field of a row is where it was last published. Fragments that `publish` brought are managed:
once no row refers to one and nobody reads it, its handle is returned as retired, by every call, until
`ack_retired` says that it was removed. A call that raises has changed nothing.
"""

import copy
import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, ParamSpec, TypeVar

from mooncake.core.errors import CapacityError, RequestError
from mooncake.dropin.structured.arguments import names, normalized, tags_of, text
from mooncake.dropin.structured.model import MooncakeDataProtoRef

PUBLICATIONS_MAX = 1 << 16
"""Results kept for callers that ask again with the same operation id; the oldest is forgotten first."""
READS_MAX = 1 << 16
"""Of callers that read at a time: more have forgotten to release theirs."""

Handle = dict[str, Any]
Location = tuple[str, int]
P = ParamSpec("P")
T = TypeVar("T")


@dataclass
class Fragment:
    """A stored batch that rows refer to or somebody reads."""

    handle: Handle
    managed: bool
    uses: int = 0
    readers: int = 0


@dataclass
class Entry:
    """A row."""

    tag: dict[str, Any] = field(default_factory=dict)
    fields: dict[str, Location] = field(default_factory=dict)


def _locked(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], T]:
    @functools.wraps(method)
    def call(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> T:
        with self._lock:
            return method(self, *args, **kwargs)

    return call


class DataProtoCatalog:
    """See the module. Thread-safe; what it returns is the caller's own."""

    def __init__(self) -> None:
        """Know of nothing."""
        self._lock = threading.RLock()
        self._partitions: dict[str, dict[str, Entry]] = {}
        self._fragments: dict[str, Fragment] = {}
        self._retired: dict[str, Handle] = {}
        self._publications: dict[str, dict[str, Any]] = {}
        self._reads: dict[int, tuple[str, ...]] = {}
        self._next_read = 0
        self._drained = False

    # ------------------------------------------------------------ publishing

    @_locked
    def update(
        self,
        partition: str,
        keys: Sequence[str],
        *,
        tags: Sequence[Mapping[str, Any]] | None = None,
        handle: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Set tags of rows, or where their fields are; the fragment stays the caller's to remove.

        Raises:
            ValueError, TypeError: wrong arguments. RequestError: drained.
        """
        return self._update(partition, keys, tags, handle, managed=False)

    @_locked
    def publish(
        self,
        operation_id: str,
        partition: str,
        keys: Sequence[str],
        *,
        tags: Sequence[Mapping[str, Any]] | None = None,
        handle: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As update, of a managed fragment; the same operation again answers the same and changes nothing."""
        operation = text(operation_id, "operation_id")
        if operation not in self._publications:
            self._remember(operation, self._update(partition, keys, tags, handle, managed=handle is not None))
        return copy.deepcopy(self._publications[operation])

    @_locked
    def publish_append(
        self,
        operation_id: str,
        fragment_id: str,
        partition: str,
        keys: Sequence[str],
        *,
        previous_handle: Mapping[str, Any],
        handle: Mapping[str, Any],
    ) -> dict[str, Any]:
        """Replace a managed fragment by one with more fields; idempotent as publish.

        Returns:
            As update; {"append_rejected": why} if the fragment is not what the caller thinks.
        """
        operation = text(operation_id, "operation_id")
        if operation not in self._publications:
            text(fragment_id, "fragment_id")
            partition, keys = text(partition, "partition"), names(keys, "keys")
            previous, before = normalized(previous_handle)
            ref, after = normalized(handle)
            why = self._why_not(fragment_id, partition, keys, previous, before, ref)
            result = {"append_rejected": why}
            if not why:
                fields = [name for name in ref.field_index if name not in previous.field_index]
                self._fragments[fragment_id].handle = after
                self._place(partition, keys, fields, fragment_id)
                result = self._result(partition, keys)
            self._remember(operation, result)
        return copy.deepcopy(self._publications[operation])

    @_locked
    def ack_publication(self, operation_id: str) -> None:
        """Forget the result of an operation: its caller has it."""
        self._publications.pop(text(operation_id, "operation_id"), None)

    def _why_not(
        self,
        fragment_id: str,
        partition: str,
        keys: tuple[str, ...],
        previous: MooncakeDataProtoRef,
        before: Handle,
        ref: MooncakeDataProtoRef,
    ) -> str:
        if self._drained:
            return "DataProto catalog is drained"
        current = self._fragments.get(fragment_id)
        if current is None or not current.managed or current.handle != before:
            return f"stale DataProto append handle: {fragment_id!r}"
        was = (previous.batch_size, previous.partition, previous._storage_group_id)
        now = (ref.batch_size, ref.partition, ref._storage_group_id)
        if was != now or ref.batch_size != len(keys) or ref.partition != partition:
            return "appended DataProto handle changed fragment identity"
        if any(ref.field_index.get(name) != at for name, at in previous.field_index.items()):
            return "appended DataProto handle changed existing fields"
        entries = self._partitions.get(partition, {})
        missing = [key for key in keys if key not in entries]
        if missing:
            return f"keys not found in partition {partition!r}: {missing}"
        for row, key in enumerate(keys):
            if any(at[0] == fragment_id and at[1] != row for at in entries[key].fields.values()):
                return f"key {key!r} is not row {row} of {fragment_id!r}"
        return ""

    def _update(
        self,
        partition: str,
        keys: Sequence[str],
        tags: Sequence[Mapping[str, Any]] | None,
        handle: Mapping[str, Any] | None,
        *,
        managed: bool,
    ) -> dict[str, Any]:
        if self._drained:
            raise RequestError("the DataProto catalog is drained: make a new one")
        partition, rows = text(partition, "partition"), names(keys, "keys")
        new_tags = tags_of(tags, len(rows))
        if new_tags is None and handle is None:
            raise ValueError("catalog update requires tags or a DataProto handle")
        fields: Iterable[str] = ()
        fragment_id = ""
        if handle is not None:
            fragment_id, plain, fields = self._fragment(handle, len(rows), managed)
            self._fragments.setdefault(fragment_id, Fragment(plain, managed))
        entries = self._partitions.setdefault(partition, {})
        for row, key in enumerate(rows):
            entries.setdefault(key, Entry()).tag.update(new_tags[row] if new_tags else {})
        self._place(partition, rows, fields, fragment_id)
        return self._result(partition, rows)

    def _fragment(
        self, handle: Mapping[str, Any], rows: int, managed: bool
    ) -> tuple[str, Handle, tuple[str, ...]]:
        ref, plain = normalized(handle)
        if len(ref.stage_refs) != 1:
            raise ValueError("catalog fragments must contain exactly one DataProto stage")
        if ref.batch_size != rows:
            raise ValueError(f"DataProto batch size {ref.batch_size} does not match {rows} logical keys")
        fields = names(ref.field_index, "field names")
        fragment_id = next(iter(ref.stage_refs.values())).manifest_key
        if fragment_id in self._retired:
            raise ValueError(f"DataProto fragment id is pending retirement: {fragment_id!r}")
        known = self._fragments.get(fragment_id)
        if known is not None and known.handle != plain:
            raise ValueError(f"DataProto fragment id collision: {fragment_id!r}")
        if known is not None and known.managed != managed:
            raise ValueError(f"DataProto fragment management mismatch: {fragment_id!r}")
        return fragment_id, plain, fields

    def _place(self, partition: str, keys: Sequence[str], fields: Iterable[str], fragment_id: str) -> None:
        left: dict[str, None] = {}
        entries = self._partitions[partition]
        for name in fields:
            for row, key in enumerate(keys):
                old = entries[key].fields.get(name)
                if old is not None:
                    self._fragments[old[0]].uses -= 1
                    left[old[0]] = None
                entries[key].fields[name] = (fragment_id, row)
                self._fragments[fragment_id].uses += 1
        self._retire(left)

    def _retire(self, fragment_ids: Iterable[str]) -> None:
        for one in fragment_ids:
            fragment = self._fragments[one]
            if fragment.uses or fragment.readers:
                continue
            del self._fragments[one]
            if fragment.managed:
                self._retired[one] = fragment.handle

    def _remember(self, operation_id: str, result: dict[str, Any]) -> None:
        self._publications[operation_id] = result
        while len(self._publications) > PUBLICATIONS_MAX:
            del self._publications[next(iter(self._publications))]

    # ------------------------------------------------------------ reading

    @_locked
    def resolve(
        self, partition: str, keys: Sequence[str], fields: Sequence[str] | None = None, *, pin: bool = False
    ) -> dict[str, Any]:
        """Return where fields of rows are.

        Args:
            partition: of the rows.
            keys: which, in the order in which they are wanted.
            fields: which; None: all that any of the rows has.
            pin: keep these fragments until release_read is called with the "read_token".

        Returns:
            "keys", "tags", "fields"; "field_groups": fields with the (fragment, row) of each key;
            "handles" of the fragments; "meta_info" of all of them.

        Raises:
            ValueError: a row, or a field of one, is not there; or meta_info contradict each other.
            CapacityError: too many reads are pinned.
        """
        entries = self._partitions.get(text(partition, "partition"), {})
        rows = names(keys, "keys")
        missing = [key for key in rows if key not in entries]
        if missing:
            raise ValueError(f"keys were not found in partition {partition!r}: {missing}")
        chosen = field_names(entries, rows) if fields is None else list(names(fields, "field names"))
        if not chosen:
            raise ValueError("requested keys do not contain any fields")
        groups: dict[tuple[Location, ...], list[str]] = {}
        for name in chosen:
            late = [key for key in rows if name not in entries[key].fields]
            if late:
                raise ValueError(f"fields are not ready for key {late[0]!r}: {[name]}")
            groups.setdefault(tuple(entries[key].fields[name] for key in rows), []).append(name)
        ids = tuple(dict.fromkeys(at[0] for locations in groups for at in locations))
        result = {
            "keys": list(rows),
            "tags": [copy.deepcopy(entries[key].tag) for key in rows],
            "fields": chosen,
            "field_groups": [{"fields": some, "locations": list(at)} for at, some in groups.items()],
            "handles": {one: copy.deepcopy(self._fragments[one].handle) for one in ids},
            "meta_info": self._meta_info(ids),
        }
        return {**result, "read_token": self._pin(ids)} if pin else result

    def _meta_info(self, ids: Sequence[str]) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for one in ids:
            for name, value in self._fragments[one].handle["meta_info"].items():
                if merged.setdefault(name, value) != value:
                    raise ValueError(f"conflicting DataProto meta_info value for {name!r}")
        return copy.deepcopy(merged)

    def _pin(self, ids: tuple[str, ...]) -> int:
        if len(self._reads) >= READS_MAX:
            raise CapacityError(f"{READS_MAX} reads are pinned: release those that have ended")
        self._next_read += 1
        self._reads[self._next_read] = ids
        for one in ids:
            self._fragments[one].readers += 1
        return self._next_read

    @_locked
    def release_read(self, token: int) -> dict[str, Any]:
        """End a pinned read, once or more often; return what may be removed."""
        ids = self._reads.pop(token, ())
        for one in ids:
            self._fragments[one].readers -= 1
        self._retire(ids)
        return self._retired_handles()

    @_locked
    def list(self, partition: str | None = None) -> dict[str, dict[str, Any]]:
        """Return the tags of all rows, by partition and key."""
        if partition is not None:
            text(partition, "partition")
        return {
            name: {key: copy.deepcopy(entry.tag) for key, entry in entries.items()}
            for name, entries in self._partitions.items()
            if partition in (None, name)
        }

    # ------------------------------------------------------------ removing

    @_locked
    def remove(self, partition: str, keys: Sequence[str]) -> dict[str, Any]:
        """Forget rows, known or not; return what may be removed."""
        entries = self._partitions.get(text(partition, "partition"), {})
        left: dict[str, None] = {}
        for key in names(keys, "keys"):
            entry = entries.pop(key, Entry())
            for fragment_id, _ in entry.fields.values():
                self._fragments[fragment_id].uses -= 1
                left[fragment_id] = None
        if not entries:
            self._partitions.pop(partition, None)
        self._retire(left)
        return self._retired_handles()

    @_locked
    def drain(self) -> dict[str, Any]:
        """Forget everything for good; return what may be removed.

        Raises:
            RequestError: somebody reads.
        """
        if self._reads:
            raise RequestError(f"cannot drain a DataProto catalog with {len(self._reads)} active read(s)")
        self._retired.update({one: part.handle for one, part in self._fragments.items() if part.managed})
        for known in (self._partitions, self._fragments, self._publications):
            known.clear()
        self._drained = True
        return self._retired_handles()

    @_locked
    def ack_retired(self, handles: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Forget retired fragments that were removed; return what else may be.

        Raises:
            ValueError: one is retired with another handle than this.
        """
        for handle in handles:
            ref, plain = normalized(handle)
            known = [one for one, retired in self._retired.items() if retired == plain]
            other = [one.manifest_key for one in ref.stage_refs.values() if one.manifest_key in self._retired]
            if not known and other:
                raise ValueError(f"retired DataProto fragment mismatch: {other[0]!r}")
            for one in known:
                del self._retired[one]
        return self._retired_handles()

    def _result(self, partition: str, keys: Sequence[str]) -> dict[str, Any]:
        entries = self._partitions[partition]
        tags = [copy.deepcopy(entries[key].tag) for key in keys]
        fields = field_names(entries, keys)
        return {"keys": [*keys], "tags": tags, "fields": fields, **self._retired_handles()}

    def _retired_handles(self) -> dict[str, Any]:
        return {"retired_handles": [*copy.deepcopy(self._retired).values()]}


def field_names(entries: Mapping[str, Entry], keys: Iterable[str]) -> list[str]:
    """Return the fields that any of the rows has."""
    return list(dict.fromkeys(name for key in keys for name in entries[key].fields))

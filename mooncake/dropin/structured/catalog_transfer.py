"""Batches that are stored and published in a catalog, which may be in another process.

A call of the catalog that fails may have been done: its publication is kept, and repeated under the same
operation id before the next one, until the catalog answers. Only what it refuses is removed from the store.
"""

import threading
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import structlog

from mooncake.core.errors import MooncakeError, PeerError, UserError
from mooncake.dropin.structured.arguments import names, normalized, tags_of, text
from mooncake.dropin.structured.batches import split
from mooncake.dropin.structured.handles import export_dataproto_ref

TRIES = 2
"""Of a call of the catalog whose link failed."""
REFUSED = (UserError, ValueError, TypeError)
LINK_FAILED = (PeerError, OSError)
RESULTS = "_mooncake_catalog_results"

log = structlog.get_logger(__name__)


class Publication(NamedTuple):
    """A call of the catalog, and what removes from the store what it would publish."""

    method: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    undo: Callable[[], None]


class DataProtoCatalogTransfer:
    """A transfer and a catalog together. May be used by several threads."""

    def __init__(self, transfer: Any, catalog_call: Callable[..., Any]) -> None:
        """Use both.

        Args:
            transfer: MooncakeBundleTransfer.
            catalog_call: called as (method, *args, **kwargs); calls that method of a DataProtoCatalog.
        """
        self.transfer = transfer
        self._catalog_call = catalog_call
        self._lock = threading.RLock()
        self._open: dict[str, Publication] = {}

    # ------------------------------------------------------------ writing

    def put(
        self,
        data: Any,
        *,
        partition: str,
        keys: Sequence[str],
        tags: Sequence[Mapping[str, Any]] | None = None,
        **put_kwargs: Any,
    ) -> dict[str, Any]:
        """Store a batch and publish its rows, or only tags if `data` is None; see DataProtoCatalog.publish.

        Raises:
            ValueError, TypeError: wrong arguments, or refused by the catalog; nothing is left then.
            Others: see MooncakeBundleTransfer.put, and whatever catalog_call raises.
        """
        self._settle()
        text(partition, "partition")
        rows = names(keys, "keys")
        plain_tags = tags_of(tags, len(rows))
        if data is None and plain_tags is None:
            raise ValueError("catalog update requires tags or DataProto data")
        handle: dict[str, Any] | None = None
        if data is not None:
            _check_rows(data, len(rows))
            stored = self.transfer.put(data, type="dataproto", partition=partition, **put_kwargs)
            handle = self._exported(stored)
        return self._publish(
            Publication(
                "publish",
                (partition, rows),
                {"tags": plain_tags, "handle": handle},
                lambda: self.transfer.cleanup_dataproto(handle) if handle else None,
            )
        )

    def append(
        self,
        fragment_id: str,
        handle: Mapping[str, Any],
        data: Any,
        *,
        partition: str,
        keys: Sequence[str],
        stage: str,
        **append_kwargs: Any,
    ) -> dict[str, Any]:
        """Store more fields of a published batch and publish these.

        Raises:
            ValueError: the batch is not what it was, or wrong arguments; nothing is left then.
            Others: see put.
        """
        self._settle()
        rows = names(keys, "keys")
        if append_kwargs.get("overwrite"):
            raise ValueError("catalog append does not support overwrite")
        _check_rows(data, len(rows))
        ref, previous = normalized(handle)
        if ref.partition != text(partition, "partition"):
            raise ValueError("DataProto handle partition does not match Catalog partition")
        known = self._catalog_call("resolve", partition, rows, list(ref.field_index))["handles"]
        if known.get(text(fragment_id, "fragment_id")) != previous:
            raise ValueError(f"stale DataProto append handle: {fragment_id!r}")
        appended = export_dataproto_ref(
            self.transfer.append_dataproto_fields(previous, data, stage=stage, **append_kwargs)
        )
        return self._publish(
            Publication(
                "publish_append",
                (fragment_id, partition, rows),
                {"previous_handle": previous, "handle": appended},
                lambda: self.transfer.cleanup_dataproto_append(previous, appended),
            )
        )

    def _exported(self, ref: Any) -> dict[str, Any]:
        try:
            return export_dataproto_ref(ref)
        except TypeError:  # meta_info that is no JSON
            self.transfer.cleanup_dataproto(ref)
            raise

    def _publish(self, publication: Publication, operation_id: str = "") -> dict[str, Any]:
        operation = operation_id or uuid.uuid4().hex
        with self._lock:
            self._open[operation] = publication
        try:
            result = self._tried(publication.method, operation, *publication.args, **publication.kwargs)
            if result.get("append_rejected"):
                raise ValueError(result["append_rejected"])
        except REFUSED:
            self._forget(operation)
            publication.undo()
            raise
        self._forget(operation)
        self._remove_retired(result)
        return result

    def _forget(self, operation: str) -> None:
        with self._lock:
            self._open.pop(operation, None)
        try:
            self._catalog_call("ack_publication", operation)
        except LINK_FAILED as error:  # the catalog forgets it some day by itself
            log.warning("mooncake.catalog: publication not acknowledged", reason=str(error))

    def _tried(self, method: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        for left in reversed(range(TRIES)):
            try:
                return cast(dict[str, Any], self._catalog_call(method, *args, **kwargs))
            except LINK_FAILED as error:
                if not left:
                    raise
                log.warning("mooncake.catalog: call failed, tried again", call=method, reason=str(error))
        raise AssertionError("unreachable")

    def _settle(self) -> None:
        """Publish what no answer came for; what is refused was told to its caller as failed already."""
        with self._lock:
            waiting = list(self._open.items())
        for operation, publication in waiting:
            try:
                self._publish(publication, operation)
            except REFUSED as error:
                log.warning("mooncake.catalog: an earlier publication is refused", reason=str(error))

    # ------------------------------------------------------------ reading

    def resolve(
        self, partition: str, keys: Sequence[str], fields: Sequence[str] | None = None
    ) -> dict[str, Any]:
        """Return where rows are, pinned until release_read; see DataProtoCatalog.resolve."""
        return cast(dict[str, Any], self._catalog_call("resolve", partition, keys, fields, pin=True))

    def release_read(self, token: int) -> None:
        """End a read."""
        self._remove_retired(self._catalog_call("release_read", token))

    def attach_results(self, output: Any, results: Sequence[Any]) -> None:
        """Remember with `output` what it was made of, for release_result."""
        setattr(output, RESULTS, list(results))

    def release_result(self, output: Any) -> None:
        """Release what was attached."""
        results = getattr(output, RESULTS, ())
        setattr(output, RESULTS, [])
        self.discard_results(results)

    def discard_results(self, results: Sequence[Any], *, strict: bool = False) -> None:
        """Release what was read; `strict` changes nothing."""
        del strict
        for result in results:
            self.transfer.release_result(result)

    def list(self, partition: str | None = None) -> dict[str, dict[str, Any]]:
        """Return the tags of all rows."""
        return cast(dict[str, dict[str, Any]], self._catalog_call("list", partition))

    # ------------------------------------------------------------ removing

    def remove(self, partition: str, keys: Sequence[str]) -> None:
        """Forget rows; batches that nobody needs any more are removed from the store."""
        self._remove_retired(self._catalog_call("remove", partition, keys))

    def drain(self) -> None:
        """End the catalog and remove all that it managed.

        Raises:
            PeerError: some could not be removed; call again.
        """
        self._settle()
        failures = self._remove_retired(self._tried("drain"))
        if failures:
            raise PeerError(f"{failures} retired DataProto fragments could not be removed: drain again")

    def close(self) -> None:
        """Publish what is still open; raises what catalog_call raises."""
        self._settle()

    def _remove_retired(self, result: Mapping[str, Any]) -> int:
        """Remove what may be; return how many could not: the catalog names them again in its next answer."""
        removed = []
        handles: Iterable[Any] = result.get("retired_handles", ())
        failures = 0
        for handle in handles:
            try:
                self.transfer.cleanup_dataproto(handle)
                removed.append(handle)
            except MooncakeError as error:
                failures += 1
                log.warning("mooncake.catalog: retired fragment not removed", reason=str(error))
        if removed:
            try:
                self._catalog_call("ack_retired", removed)
            except LINK_FAILED as error:
                failures += 1
                log.warning("mooncake.catalog: removal not acknowledged", reason=str(error))
        return failures


def _check_rows(data: Any, rows: int) -> None:
    sized = hasattr(data, "__len__") and not isinstance(data, Mapping)
    count = len(data) if sized else split(data).rows()
    if count != rows:
        raise ValueError(f"DataProto batch size {count} does not match {rows} logical keys")
